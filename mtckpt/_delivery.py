"""One shard from the places that have it to the addresses where it is wanted, verified on the way.

Knows places, leases, spans and the engine. Does not know trees, frameworks or which step is wanted.
No byte reaches a target that was not checked against its digest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from mtckpt import _shard, _striped
from mtckpt._describing import Copy, Loaded, Place, Want, describe, whole_wants
from mtckpt._held import hold
from mtckpt._patience import Leave
from mtckpt.capture.base import Engine, Move, Span
from mtckpt.capture.memory import Mapping as MemoryMapping
from mtckpt.capture.memory import anonymous
from mtckpt.errors import (
    CheckpointError,
    Damaged,
    FormatError,
    NoHealthyStep,
    RestoreFailed,
    TierError,
    TierUnavailable,
)
from mtckpt.tiers._blocks import in_threads

if TYPE_CHECKING:
    from mtckpt._held import Held
    from mtckpt._shard import StoredTensor
    from mtckpt._striped import Striped

__all__ = [
    "Attempt",
    "Copy",
    "Delivery",
    "Loaded",
    "Place",
    "Want",
    "Within",
    "describe",
    "whole_wants",
]


class Within(Protocol):
    """Runs a look into a tier in bounded time; the more bytes it is about, the longer."""

    def __call__(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any: ...


@dataclass(slots=True)
class Attempt:
    """What one restore has met so far.

    ``bad`` holds ``(tier label, key, reason)`` of damaged copies, ``silent`` the places far away
    that did not answer, ``rates`` what places have brought in a second; ``touched`` turns true with
    the first byte that may have changed in live state.
    """

    bad: list[tuple[str, str, str]] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    touched: bool = False

    def touch(self) -> None:
        """Told before live state is written to."""
        self.touched = True

    def refuse(self, place: Place, key: str, error: CheckpointError) -> None:
        """Note what a place has instead of a sound copy, or that it has stopped answering."""
        if isinstance(error, TierUnavailable) and not place.near:
            self.silent.setdefault(place.label, error.what)
        else:
            self.bad.append((place.label, key, error.what))


# -- bytes from one place --------------------------------------------------------------------------

# Copying as many bytes once more takes a few milliseconds.
_CHEAP_BYTES = 64 * 1024 * 1024
_STAGE_BYTES = 64 * 1024 * 1024
# How long an interrupt waits for what is just being placed.
_END_S = 10.0


class Delivery:
    """Brings what is wanted of one shard to its targets, from one place after the other.

    From storage, and where there is little of it, everything is brought to staging memory and
    checked there before the first live byte changes. ``beside`` is how many shards may do so at the
    same time, 0 where some of what is wanted has been placed by then. A large copy in RAM is not
    copied twice: each chunk is checked and then placed while it is in the cache. The last copy of
    the last step that could be restored is checked as a whole first: should it be damaged, live
    state is as it was. ``touch`` is told before anything is placed.
    """

    def __init__(
        self,
        loaded: Loaded,
        key: str,
        wants: Sequence[Want],
        engine: Engine,
        within: Within,
        attempt: Attempt,
        progress: Callable[[int], None],
        touch: Callable[[], None],
        beside: int = 1,
    ) -> None:
        self._cheap_bytes = _CHEAP_BYTES // beside if beside else -1
        self._loaded = loaded
        self._key = key
        self._engine = engine
        self._within = within
        self._attempt = attempt
        self._progress = progress
        self._touch = touch
        self._done_bytes = 0
        self._stages: list[MemoryMapping] = []
        self._moves: list[Move] = []
        self._staged_wants: set[int] = set()
        self.by_label: dict[str, int] = {}
        self._wants = sorted(wants, key=attrgetter("span"))

    def fetch(
        self,
        usable: Sequence[Place],
        further: Iterator[Place],
        reasons: list[str],
        *,
        peers: Callable[[set[str]], Iterable[Copy]] = lambda _: (),
        others: Callable[[set[str]], Iterable[Copy]] = lambda _: (),
        last_resort: bool,
        check: Literal["", "keep", "drop"] = "",
    ) -> None:
        """Get every byte here, and check it. Raises NoHealthyStep if no place has all of them.

        ``further`` is looked at where ``usable`` places are not enough, and then ``others``: shards
        that may have tensors of these names, of which those count that have the same digests. What
        is large comes from other nodes side by side: ``peers`` are such shards on more of them.
        With ``check`` no byte is placed anywhere; what was staged for it is kept for the next call,
        or dropped.
        """
        wanted = [i for i in range(len(self._wants)) if i not in self._staged_wants]
        sound: list[tuple[Place, list[int]]] = []
        places = itertools.chain(list(usable), further)
        while wanted and (place := next(places, None)) is not None:
            last = last_resort and place is usable[-1]
            if place.node and self._size_of(wanted) >= _striped.STRIPED_BYTES:
                first = Copy(place, self._key, self._loaded)
                copies, spare = _striped.choose(
                    itertools.chain([first], peers(self._names(wanted))),
                    functools.partial(self._alike, wanted=wanted),
                )
                again = [copy.place for copy in spare if copy.loaded is self._loaded]
                places = itertools.chain(again, places)
                if len(copies) > 1:
                    wanted = self._from_several(copies, wanted, reasons)
                    continue
            try:
                if not place.mapped or self._size_of(wanted) <= self._cheap_bytes:
                    spans = dict(zip(wanted, self._spans(wanted), strict=True))
                    left = self._staged(Copy(place, self._key, self._loaded), spans)
                elif check:
                    left = self._checked(place, wanted)
                    sound.append((place, sorted(set(wanted).difference(left))))
                elif last:
                    left = self._from_ram(place, wanted, whole=True)
                    if left:  # then nothing was placed
                        sound.append((place, sorted(set(wanted).difference(left))))
                else:
                    left = self._from_ram(place, wanted)
            except (FormatError, TierError) as error:
                reasons.append(f"{place.label}: {error.what}")
                self._attempt.refuse(place, self._key, error)
                continue
            self._note_bad(place, left, reasons)
            wanted = left
        if wanted:
            wanted = self._from_others(others, wanted, reasons)
        if check == "drop":
            self._moves, self._stages, self._staged_wants = [], [], set()
        if not check and not wanted:
            # All is here, or lies sound in memory: only now is anything placed from there.
            for place, these in sound:
                wanted += self._from_ram(place, these)
                self._note_bad(place, wanted, reasons)
        if wanted:
            raise NoHealthyStep("; ".join(reasons), step=self._loaded.record.step)

    def _note_bad(
        self, place: Place, left: Sequence[int], reasons: list[str], key: str = ""
    ) -> None:
        if not left:
            return
        tensors = self._loaded.layout.tensors
        bad = {self._wants[i].number: tensors[self._wants[i].number].name for i in left}
        names = ", ".join(name[:80] for name in list(bad.values())[:3])
        reason = f"{len(bad)} tensors differ from their digests ({names})"
        reasons.append(f"{place.label}: {reason}")
        self._attempt.bad.append((place.label, key or self._key, reason))

    def _checked(self, place: Place, wanted: list[int]) -> list[int]:
        """Which of what is wanted differs from its digest there; nothing is placed."""
        spans, digests = self._spans(wanted), self._loaded.table.digests
        # What is wanted on a device is checked there: nowhere, on that device.
        nowhere = [type(self._wants[i].address)(0) for i in wanted]
        with self._within(place.label, functools.partial(self._hold_at, place)) as held:
            check = functools.partial(self._engine.fetch, held.fd, spans, nowhere, digests, _ignore)
            bad = self._read(place, check, self._size_of(wanted))
        return sorted(wanted[i] for i in bad)

    def _from_ram(self, place: Place, wanted: list[int], *, whole: bool = False) -> list[int]:
        """Check each chunk and place it while it is in the cache; what is not sound is left.

        ``whole``: nothing is placed unless all is sound.
        """
        size_bytes = self._size_of(wanted)
        spans, digests = self._spans(wanted), self._loaded.table.digests
        targets = [self._wants[i].address for i in wanted]
        cuts = {at: cut for at, i in enumerate(wanted) if (cut := self._wants[i].cuts)}
        with self._within(place.label, functools.partial(self._hold_at, place)) as held:
            leave = Leave()

            def count(size_bytes: int) -> None:
                leave.check()
                self._count(size_bytes)

            def touch() -> None:
                leave.check()
                self._touch()

            place_all = functools.partial(
                self._engine.fetch, held.fd, spans, targets, digests, count,
                cuts=cuts, whole=whole, placing=touch,
            )  # fmt: skip
            try:
                bad = self._read(place, functools.partial(leave.run, place_all), size_bytes)
            except _Late as error:
                leave.end(0)
                raise RestoreFailed(
                    f"{place.label}: {error.what}",
                    step=self._loaded.record.step,
                    live_state="undefined",
                    state="live state is undefined: the tier stopped answering in the middle",
                ) from error
            except BaseException:
                # An interrupt: whoever made it may go on with this memory, and not with our bytes.
                leave.end(_END_S)
                raise
        left = sorted(wanted[i] for i in bad)
        if whole and left:
            return left
        self._touch()
        self._credit(place, size_bytes - self._size_of(left))
        return left

    def _read(self, place: Place, work: Callable[[], list[int]], size_bytes: int) -> list[int]:
        """Run a pass of the engine, in bounded time; what goes wrong is an error of the tier."""
        began: list[bool] = []
        ended: list[bool] = []

        def bounded() -> list[int]:
            began.append(True)
            try:
                return work()
            except OSError as error:
                ended.append(True)
                raise TierUnavailable(
                    f"{self._key} could not be read: {error.strerror}",
                    tier=place.label,
                    key=self._key,
                ) from error

        try:
            return cast("list[int]", self._within(place.label, bounded, size_bytes))
        except TierUnavailable as error:
            if ended or not began:
                raise
            raise _Late(error.what, tier=place.label, key=self._key) from error

    def _from_others(
        self,
        others: Callable[[set[str]], Iterable[Copy]],
        wanted: list[int],
        reasons: list[str],
    ) -> list[int]:
        """What is left once shards have been asked that hold some of the same tensors."""
        for copy in others(self._names(wanted)):
            spans = self._alike(copy.loaded, wanted)
            if not spans:
                continue
            try:
                left = self._staged(copy, spans)
            except (FormatError, TierError) as error:
                reasons.append(f"{copy.place.label}: {error.what}")
                self._attempt.refuse(copy.place, copy.key, error)
                continue
            wanted = sorted({*wanted} - spans.keys() | {*left})
            if not wanted:
                break
        return wanted

    def _from_several(
        self, copies: Sequence[Copy], wanted: list[int], reasons: list[str]
    ) -> list[int]:
        """What is left once several sources have brought what they can, each what it is fast at."""
        labels = [copy.place.label for copy in copies]
        rates = {i: r for i, each in enumerate(labels) if (r := self._attempt.rates.get(each))}
        spans = dict(zip(wanted, self._spans(wanted), strict=True))
        there = [self._alike(copy.loaded, wanted) for copy in copies]
        bring = functools.partial(
            _striped.bring, copies, spans, there, self._engine, self._loaded.table.digests,
            rates, self._count,
        )  # fmt: skip
        try:
            done: Striped = self._within(labels[0], bring, self._size_of(wanted))
        except TierError as error:  # all of them together were too slow
            for copy in copies:
                reasons.append(f"{copy.place.label}: {error.what}")
                self._attempt.refuse(copy.place, copy.key, error)
            return wanted
        for source, copy in enumerate(copies):
            if source in done.rates:
                self._attempt.rates[copy.place.label] = done.rates[source]
            if source in done.errors:
                reasons.append(f"{copy.place.label}: {done.errors[source].what}")
                self._attempt.refuse(copy.place, copy.key, done.errors[source])
            self._note_bad(copy.place, sorted(done.bad.get(source, ())), reasons, copy.key)
            self._credit(copy.place, done.bytes_by.get(source, 0))
        self._stages.append(done.memory)
        self._staged_wants.update(spans.keys() - done.left)
        self._moves += self._moves_from(done.memory.address, spans, done.left)
        return sorted(done.left)

    def _alike(self, loaded: Loaded, wanted: Iterable[int]) -> dict[int, Span]:
        """What is wanted and is there too, by the digests of the tensors, and where."""
        theirs, own = loaded.layout.by_name(), self._loaded
        spans: dict[int, Span] = {}
        for i in wanted:
            number, span, *_ = self._wants[i]
            tensor = own.layout.tensors[number]
            there = theirs.get(tensor.name)
            if there is not None and _digests(own, tensor) == _digests(loaded, there):
                start = span.start - tensor.start + there.start
                chunk = span.chunk - tensor.first_chunk + there.first_chunk
                spans[i] = Span(start, span.size_bytes, chunk)
        return spans

    def _staged(self, copy: Copy, spans: dict[int, Span]) -> list[int]:
        fetch = functools.partial(self._stage, copy, spans)
        left: list[int]
        place = copy.place
        left, moves, memory = self._within(place.label, fetch, copy.loaded.layout.size_bytes)
        self._stages.append(memory)
        self._moves += moves
        self._staged_wants.update(spans.keys() - {*left})
        self._credit(place, self._size_of(spans.keys() - {*left}))
        return left

    def _stage(
        self, copy: Copy, wanted: dict[int, Span]
    ) -> tuple[list[int], list[Move], MemoryMapping]:
        """Runs in a thread that may be given up: it touches nothing but what it returns."""
        place, loaded = copy.place, copy.loaded
        with self._hold(copy):
            memory = anonymous(loaded.layout.size_bytes)
            spans = sorted(wanted.values(), key=lambda span: span.start)
            view = memory.view if memory.size_bytes else memoryview(b"")
            pieces = iter(_pieces(_extents(spans), _STAGE_BYTES // place.streams))

            def read(_: int) -> None:
                for begin, end in pieces:
                    place.tier.read_into(copy.key, view[begin:end], begin)
                    self._count(end - begin)

            in_threads(place.streams, read)
            base = memory.address
            numbers = list(wanted)
            checked = self._engine.verify(base, list(wanted.values()), loaded.table.digests)
            left = {numbers[i] for i in checked}
        return sorted(left), self._moves_from(base, wanted, left), memory

    def _moves_from(self, base: int, spans: dict[int, Span], left: set[int]) -> list[Move]:
        """What gets from staging memory to its place, but for what is not sound there."""
        return [
            move
            for i, span in spans.items()
            if i not in left
            for move in self._wants[i].moves(base + span.start)
        ]

    def finish(self) -> None:
        """Every byte is here: copy what was staged to where it is wanted."""
        if self._moves:
            self._engine.copy(self._moves, self._touch)
        self._moves = []
        self._stages = []

    def _hold(self, copy: Copy) -> Held:
        held = hold(copy.place.tier, copy.key)
        if held.size_bytes != copy.loaded.layout.size_bytes:
            held.close()
            raise Damaged("shard has another size", key=copy.key, tier=copy.place.label)
        return held

    def _hold_at(self, place: Place) -> Held:
        return self._hold(Copy(place, self._key, self._loaded))

    def _names(self, wanted: Iterable[int]) -> set[str]:
        tensors = self._loaded.layout.tensors
        return {tensors[self._wants[i].number].name for i in wanted}

    def _size_of(self, wanted: Iterable[int]) -> int:
        return sum([self._wants[i].span.size_bytes for i in wanted])

    def _spans(self, wanted: Sequence[int]) -> list[Span]:
        return [self._wants[i].span for i in wanted]

    def _credit(self, place: Place, size_bytes: int) -> None:
        if size_bytes:
            self.by_label[place.label] = self.by_label.get(place.label, 0) + size_bytes

    def _count(self, size_bytes: int) -> None:
        # Threads may lose an addition to each other: it is for people to look at.
        self._done_bytes += size_bytes
        self._progress(self._done_bytes)


class _Late(TierUnavailable):
    """A place that did not answer in time, as opposed to one that answered with an error."""


def _digests(loaded: Loaded, tensor: StoredTensor) -> bytes:
    first = tensor.first_chunk
    return loaded.table.digests[first : first + tensor.num_chunks].tobytes()


def _ignore(_: int) -> None:
    pass


def _pieces(extents: Sequence[tuple[int, int]], size_bytes: int) -> list[tuple[int, int]]:
    return [
        (begin, min(begin + size_bytes, stop))
        for start, stop in extents
        for begin in range(start, stop, size_bytes)
    ]


def _extents(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Ranges of the file that cover the spans, which come in its order; small gaps are read too."""
    found: list[tuple[int, int]] = []
    for span in spans:
        stop = span.start + span.size_bytes
        if found and span.start <= found[-1][1] + _shard.CHUNK_BYTES:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((span.start, stop))
    return found
