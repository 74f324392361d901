"""The restore pipeline: a chosen step -> verified bytes in host memory -> live state.

Knows where each tensor's bytes come from, and in which order things may be touched: names, shapes
and types are compared before the first live byte changes, and no byte reaches live state that was
not verified. Does not know frameworks; what goes where is ``_placing``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mtckpt import _boxes, _inventory, _state
from mtckpt._assembly import Stores, Wants, assemble
from mtckpt._copies import Scope, Shards
from mtckpt._delivery import Attempt, Delivery, Loaded, Place, Within, whole_wants
from mtckpt._dtypes import DTYPES
from mtckpt._placing import Placing, Stored, rename_tree, settle
from mtckpt._state import ArraySpec, ByPath, Node, StateAdapter
from mtckpt.capture.base import nothing
from mtckpt.capture.collector import collector_paused
from mtckpt.errors import CheckpointError, Damaged, RestoreFailed, StateMismatch

if TYPE_CHECKING:
    from mtckpt._choice import Candidate
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import ArrayEntry, Record, SaveName
    from mtckpt.capture.base import Move
    from mtckpt.tiers import ObjectInfo, Survives

__all__ = ["Attempt", "Place", "Scope", "Silent", "restore_from", "scan_places"]

logger = logging.getLogger(__name__)

# How much is read at a time of each of two arrays that are compared.
_COMPARED_BYTES = 64 * 1024 * 1024


class Silent:
    """In the place of a tier that could not be opened: every look at it says why."""

    def __init__(self, name: str, survives: Survives, error: CheckpointError) -> None:
        self.name = name
        self.survives = survives
        self._error = error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise self._error

    def close(self) -> None:
        return None


# -- one save into live state ----------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """A restore that happened. ``record`` is of the save; ``sources`` has bytes by tier.

    ``replaced``: some of ``state`` is new, and only there.
    ``every`` is the automatic interval that the save's rank 0 carries on.
    """

    name: SaveName
    record: Record
    state: Any
    sources: dict[str, int]
    replaced: bool
    every: int = 0


@collector_paused()
def restore_from(
    candidate: Candidate,
    scope: Scope,
    state: Any,
    *,
    partial: bool,
    rename: Callable[[str], str | None] | None,
    attempt: Attempt,
    last: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Restore one save. ``last``: there is no other to try after it.

    Raises:
        StateMismatch: the template differs; nothing of this save was placed.
        NoHealthyStep: no source, alone or together, has every byte; ``attempt.touched`` says
            whether live state is as it was.
        RestoreFailed: live state is undefined.
    """
    enough = functools.partial(_enough_memory, candidate, attempt)
    with scope.together(f"match {candidate.name}"), enough():
        shards = Shards(candidate, scope, attempt)
        loaded = shards.open_with(state) if type(state) is ByPath else shards.open(shards.base)
        reads_same = functools.partial(_reads_same, scope, shards, attempt)
        placing, resolve = _match(
            loaded, state, scope.adapters, reads_same, partial=partial, rename=rename
        )
        wants, repeats = whole_wants(loaded, placing.addresses)
        parts = _join(placing, shards)
        parts[0][shards.base] = wants + parts[0].get(shards.base, [])
        scope.engine.settle(_targets(parts, repeats))  # in this thread; others read
    # What is damaged spoils nothing where no byte goes into live arrays.
    last, touch = (last, attempt.touch) if placing.changes_live else (False, nothing)
    fetching = _Fetching(scope, shards, attempt, progress, touch, (state, placing, resolve))
    only = placing.changes_live and len(parts) == 1
    with scope.together("fetch"), enough():
        if last and sum(map(len, parts)) > 1:
            # One shard after the other is placed: that the last of them is sound is seen first.
            for part in parts:
                fetching.fetch(part, last=True, only=only, check="keep" if only else "drop")
            last = False
        while len(parts) > 1:  # what is staged of this one goes before the next needs room
            fetching.fetch(parts[0], last=last, only=only)
            fetching.place()
            del parts[0]
        fetching.fetch(parts[0], last=last, only=only)
    with scope.together("place"), enough():
        fetching.place()
        scope.engine.copy(repeats, touch)
        return _finish(candidate, loaded, placing, state, resolve, fetching.sources)


@contextlib.contextmanager
def _enough_memory(candidate: Candidate, attempt: Attempt) -> Iterator[None]:
    """What it means that there is not: an older step would need as much."""
    try:
        yield
    except MemoryError as error:
        became = "undefined" if attempt.touched else "unchanged"
        raise RestoreFailed(
            f"too little memory for a restore: {error}",
            step=candidate.name.step,
            live_state=became,
            state="live state is undefined: part of it was placed"
            if attempt.touched
            else "live state unchanged",
            actions=(
                "free memory of this process, or give it more: ulimit -v, the limit of its cgroup",
                "restore before other large things are made, and fewer at a time",
            ),
        ) from error


def _targets(parts: Sequence[Wants], repeats: Sequence[Move]) -> Iterator[int]:
    """Wherever anything is going to be written."""
    for part in parts:
        for wants in part.values():
            yield from [want.address for want in wants]
            yield from [move.target for want in wants for move in want.cuts]
    yield from (move.target for move in repeats)


class _Fetching:
    """What one save's shards have delivered so far; ``sources`` has bytes by tier. ``owners`` have
    the memory that is written to."""

    def __init__(
        self,
        scope: Scope,
        shards: Shards,
        attempt: Attempt,
        progress: Callable[[int], None],
        touch: Callable[[], None],
        owners: object,
    ) -> None:
        self.sources: dict[str, int] = {}
        self._scope = scope
        self._shards = shards
        self._attempt = attempt
        self._progress = progress
        self._touch = touch
        # A thread that was given up still writes, if its tier answers after all: it has ``_told``.
        self._owners = owners
        self._deliveries: list[tuple[int, Delivery]] = []
        self._kept: dict[int, Delivery] = {}
        self._before_bytes = 0

    def fetch(
        self,
        part: Wants,
        *,
        last: bool,
        only: bool,
        check: Literal["", "keep", "drop"] = "",
    ) -> None:
        """Get every byte of a part here; the ``only`` one may be staged where that is cheap. Raises
        NoHealthyStep; see ``Delivery.fetch``."""
        shards = self._shards
        deliveries = self._kept or {
            rank: Delivery(
                shards.open(rank), shards.keys(rank)[0], wants, self._scope.engine,
                self._scope.within, self._attempt, self._told, self._touch,
                len(part) if only else 0,
            )
            for rank, wants in part.items()
        }  # fmt: skip
        self._kept = deliveries if check == "keep" else {}
        for rank, delivery in deliveries.items():
            delivery.fetch(
                shards.usable[rank], shards.further(rank), shards.reasons,
                peers=functools.partial(shards.peers, rank),
                others=functools.partial(shards.others, rank), last_resort=last, check=check,
            )  # fmt: skip
            if not check:
                self._deliveries.append((rank, delivery))
                self._before_bytes += sum(delivery.by_label.values())

    def _told(self, size_bytes: int) -> None:
        self._progress(self._before_bytes + size_bytes)

    def _fetched(self, rank: int, label: str) -> str:
        """Where bytes came from that were brought to this node just now, or else ``label``."""
        is_near = self._scope.places[label].near
        return (is_near and self._shards.fetched(rank)) or label

    def place(self) -> None:
        """Move what was staged to where it is wanted."""
        for rank, delivery in self._deliveries:
            delivery.finish()
            for label, size_bytes in delivery.by_label.items():
                source = self._fetched(rank, label)
                self.sources[source] = self.sources.get(source, 0) + size_bytes
        self._deliveries = []


def _join(placing: Placing, shards: Shards) -> list[Wants]:
    """What of which shards the wanted boxes are made of; nothing is looked at where none is."""
    if not placing.boxes:
        return [{}]
    stores = Stores(shards.levels(), shards.entries)
    return assemble(placing.boxes, shards.base, stores, shards.open, shards.is_staged)


def _reads_same(scope: Scope, shards: Shards, attempt: Attempt, one: int, other: int) -> bool:
    """True if two arrays of the base rank's record have the same bytes, however ranks divide them.

    Both are read whole. Raises NoHealthyStep.
    """
    entries = shards.open(shards.base).entries
    first, second = entries[one], entries[other]
    shape, item_bytes = _whole_shape(first), DTYPES[first.dtype].item_bytes
    if (first.dtype, shape) != (second.dtype, _whole_shape(second)):
        return False
    stores = Stores(shards.levels(), shards.entries)
    size, most = math.prod(shape), max(1, _COMPARED_BYTES // item_bytes)
    for start in range(0, size, most):
        for box in _boxes.of_run(shape, start, min(size, start + most)):
            # Others each time: a thread that was given up may still write to these.
            held = [bytearray(math.prod(box.shape) * item_bytes) for _ in range(2)]
            wanted = [
                (ctypes.addressof(ctypes.c_char.from_buffer(into)), index, box)
                for into, index in zip(held, (one, other), strict=True)
            ]
            fetching = _Fetching(scope, shards, attempt, lambda _: None, nothing, held)
            parts = assemble(wanted, shards.base, stores, shards.open, shards.is_staged)
            for part in parts:
                fetching.fetch(part, last=False, only=False)
                fetching.place()
            if held[0] != held[1]:
                return False
    return True


def _whole_shape(entry: ArrayEntry) -> tuple[int, ...]:
    return entry.shape if entry.global_shape is None else entry.global_shape


def _match(
    loaded: Loaded,
    state: Any,
    adapters: Sequence[StateAdapter],
    reads_same: Callable[[int, int], bool],
    *,
    partial: bool,
    rename: Callable[[str], str | None] | None,
) -> tuple[Placing, Any]:
    record = loaded.record
    try:
        plain = [_state.decode_plain(v) for v in msgspec.json.decode(record.plain, type=list[Any])]
        tree = msgspec.json.decode(record.structure)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"record does not parse: {error}", step=record.step) from error
    root = _state.node_from_json(tree, len(loaded.entries), len(plain))
    stored = _stored(loaded.entries)
    if type(state) is ByPath:
        root = _by_path(stored, state)
    if rename is not None:
        root, stored = rename_tree(root, stored, [], rename)
    for adapter in adapters:
        adapter.survey(state)
    placing = Placing(stored, plain, adapters, partial=partial)
    resolved = placing.match(state, root)
    placing.tell_apart(loaded.is_same, reads_same)
    placing.raise_diff(record.step)
    placing.reserve()
    return placing, resolved


def _by_path(stored: Sequence[Stored], wanted: ByPath) -> Node:
    """The arrays that are wanted, in one dictionary."""
    index_of: dict[str, int] = {}
    for index, array in enumerate(stored):
        index_of.setdefault(array.path, index)  # the first of several boxes of one array
    keys = [path for path in wanted if path in index_of]
    children = [Node(_state.ARRAY, index=index_of[path]) for path in keys]
    return Node(_state.DICT, keys=keys, children=children)


# From its fields in order: calling the class takes three times as long.
_stored_of: Callable[[tuple[str, ArraySpec, int]], Stored] = functools.partial(
    tuple.__new__, Stored
)


def _stored(entries: Sequence[ArrayEntry]) -> list[Stored]:
    """The arrays of a record; those of one type and shape share a spec."""
    specs: dict[tuple[Any, ...], ArraySpec] = {}
    stored = []
    for index, entry in enumerate(entries):
        kind = entry.dtype, entry.shape, entry.framework, entry.offsets, entry.global_shape
        spec = specs.get(kind)
        if spec is None:
            spec = specs[kind] = ArraySpec(*kind)
        bytes_of = index if entry.same_as is None else entry.same_as
        stored.append(_stored_of((entry.path, spec, bytes_of)))
    return stored


def _finish(
    candidate: Candidate,
    loaded: Loaded,
    placing: Placing,
    given: Any,
    resolved: Any,
    sources: dict[str, int],
) -> Outcome:
    """Every byte is in its place: the rest is the objects' own work."""
    try:
        for action in placing.finish:
            action()
        state = settle(resolved) if resolved is not given else given
    except StateMismatch:
        raise
    except Exception as error:
        # Whatever a user's load_state_dict raises: live state is part old, part new by now.
        raise RestoreFailed(
            f"load_state_dict failed: {type(error).__name__}: {error}",
            step=candidate.name.step,
            live_state="undefined",
            state="live state is undefined",
        ) from error
    return Outcome(candidate.name, loaded.record, state, sources, placing.replaced, candidate.every)


def scan_places(
    places: Iterable[Place], run_key: str, within: Within
) -> tuple[dict[str, Inventory], dict[str, str]]:
    """Every place's inventory, and the places that did not answer with the reason."""
    inventories: dict[str, Inventory] = {}
    silent: dict[str, str] = {}
    for place in places:
        started_s = time.monotonic()
        try:
            inventories[place.label] = within(
                place.label,
                functools.partial(_inventory.scan, place.tier, run_key, label=place.label),
            )
        except CheckpointError as error:
            silent[place.label] = error.what
            logger.warning(
                "tier %s did not answer after %.1f s: %s",
                place.label,
                time.monotonic() - started_s,
                error.what,
            )
    return inventories, silent
