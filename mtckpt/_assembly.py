"""From boxes that are wanted to the chunks that each rank's shard has to deliver for them.

Knows records of all ranks, boxes and chunks. Does not read anything: it says which chunks of which
tensors go where, and what is moved once all of them are there. Chunks that are wanted whole go to
where they are wanted; of the others the wanted bytes are taken out of scratch memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mtckpt import _boxes
from mtckpt._boxes import Box
from mtckpt._delivery import Loaded, Want
from mtckpt._dtypes import DTYPES
from mtckpt._reading import check_box
from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move, Span
from mtckpt.capture.memory import Mapping as MemoryMapping
from mtckpt.capture.memory import anonymous
from mtckpt.errors import Damaged, NoHealthyStep

if TYPE_CHECKING:
    from mtckpt._manifest import ArrayEntry
    from mtckpt._shard import StoredTensor

__all__ = ["Assembly", "Stores", "assemble"]

# How much memory besides the live one a restore onto another mesh takes at a time: a share of what
# is wanted, which counts twice at most, within bounds.
SCRATCH_SHARE = 32
MIN_SCRATCH_BYTES = 8 * 1024 * 1024
MAX_SCRATCH_BYTES = 256 * 1024 * 1024


@dataclass(slots=True)
class Assembly:
    """``wants`` by rank; ``moves`` take place once all of them are there."""

    wants: dict[int, list[Want]] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    scratch: MemoryMapping | None = None


class Stores:
    """Where the boxes of global arrays are stored, by path: ``(rank, entry, box)``.

    ``levels`` has all ranks, those first that are asked first: what ranks of one level have makes
    those of the next superfluous, and their records are not looked at. ``entries`` gives a rank's.
    What ``Shards`` counts beyond the ranks are shards like any others here.
    """

    def __init__(
        self,
        levels: Sequence[Iterable[int]],
        entries: Callable[[int], Sequence[ArrayEntry]],
    ) -> None:
        self._levels = [level for level in levels if level]
        self._entries = entries
        self._by_path: dict[str, list[tuple[int, int, ArrayEntry]]] = {}

    def of(self, wanted: ArrayEntry, box: Box, step: int) -> list[tuple[int, int, Box]]:
        """Stored boxes that cover a box of an array, as far as any do; those to prefer first.

        Raises Damaged where ranks disagree about the array.
        """
        found = self._known(wanted, step)
        while self._levels and _boxes.cover(box, [place for _, _, place in found])[1]:
            self._learn(self._levels.pop(0))
            found = self._known(wanted, step)
        return found

    def _learn(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            for index, entry in enumerate(self._entries(rank)):
                check_box(entry)
                if entry.offsets is not None:
                    self._by_path.setdefault(entry.path, []).append((rank, index, entry))

    def _known(self, wanted: ArrayEntry, step: int) -> list[tuple[int, int, Box]]:
        found = []
        for rank, index, entry in self._by_path.get(wanted.path, ()):
            if entry.ranks != wanted.ranks:
                continue  # another array, of other ranks, that has the same path there
            if (entry.dtype, entry.global_shape) != (wanted.dtype, wanted.global_shape):
                raise Damaged(
                    "ranks disagree about an array", leaf=wanted.path[:200], rank=rank, step=step
                )
            found.append((rank, index, Box(entry.offsets or (), entry.shape)))
        return found


class _Cut(NamedTuple):
    """Bytes of a tensor that are wanted at an address, and share chunks with others.

    As many ``times``; no chunk from the first to the last of them is free of what is wanted.
    """

    rank: int
    number: int
    start: int
    size_bytes: int
    address: int
    times: int = 1
    source_step: int = 0
    target_step: int = 0

    @property
    def stop(self) -> int:
        return self.start + (self.times - 1) * self.source_step + self.size_bytes


def assemble(
    wanted: Sequence[tuple[int, int, Box]],
    base: int,
    stores: Stores,
    open_shard: Callable[[int], Loaded],
) -> list[Assembly]:
    """Plan ``(address, entry of the base rank's record, box)``; each address has C order.

    ``open_shard`` gives the description of a rank's shard. What needs much scratch memory comes in
    several parts, one to be done with before the next. Raises NoHealthyStep for bytes that no shard
    has, and what ``open_shard`` raises.
    """
    own = open_shard(base)
    drafts = [_Draft(open_shard)]
    items = [DTYPES[own.entries[index].dtype].item_bytes for _, index, _ in wanted]
    sizes = [math.prod(box.shape) * n for (_, _, box), n in zip(wanted, items, strict=True)]
    limit = min(MAX_SCRATCH_BYTES, max(MIN_SCRATCH_BYTES, sum(sizes) // SCRATCH_SHARE))
    for address, index, box in wanted:
        entry = own.entries[index]
        stored = (
            [(base, index, _boxes.whole(entry.shape))]
            if entry.offsets is None
            else stores.of(entry, box, own.record.step)
        )
        for slab_address, slab in _slabs(address, box, entry, limit):
            if drafts[-1].scratch_bytes >= limit:
                drafts.append(_Draft(open_shard))
            _plan_box(drafts[-1], slab_address, slab, entry, stored, own.record.step)
    return [draft.finished() for draft in drafts]


def _slabs(address: int, box: Box, entry: ArrayEntry, limit: int) -> Iterator[tuple[int, Box]]:
    """A box in slabs of rows, where the chunks that it is cut out of would be too many at once."""
    whole = entry.shape if entry.global_shape is None else entry.global_shape
    item_bytes = DTYPES[entry.dtype].item_bytes
    length = box.shape[0] if box.shape else 0
    most = max(1, limit // max(1, math.prod(whole[1:]) * item_bytes))
    if length <= most or box.shape[1:] == whole[1:]:
        yield address, box
        return
    row_bytes = math.prod(box.shape[1:]) * item_bytes
    for first in range(0, length, most):
        offsets = (box.offsets[0] + first, *box.offsets[1:])
        yield (
            address + first * row_bytes,
            Box(offsets, (min(most, length - first), *box.shape[1:])),
        )


def _plan_box(
    draft: _Draft,
    address: int,
    box: Box,
    entry: ArrayEntry,
    stored: Sequence[tuple[int, int, Box]],
    step: int,
) -> None:
    pieces, missing = _boxes.cover(box, [place for _, _, place in stored])
    if missing:
        raise NoHealthyStep(
            f"no shard has {list(missing[0].shape)} at {list(missing[0].offsets)}"
            f" of {entry.path[:200]}",
            step=step,
            leaf=entry.path[:200],
        )
    for which, piece in pieces:
        rank, entry_index, place = stored[which]
        for run in _boxes.runs(piece, place, box, DTYPES[entry.dtype].item_bytes):
            draft.add(rank, entry_index, run, address)


class _Draft:
    """An assembly that is being planned; ``scratch_bytes`` is what it needs so far."""

    def __init__(self, open_shard: Callable[[int], Loaded]) -> None:
        self.scratch_bytes = 0
        self._open = open_shard
        self._assembly = Assembly()
        self._cuts: list[_Cut] = []
        self._chunks: dict[tuple[int, int], set[int]] = {}

    def add(self, rank: int, index: int, run: _boxes.Run, address: int) -> None:
        """Chunks that lie wholly in a run go straight to their place; its edges are cut out."""
        loaded = self._open(rank)
        number = loaded.numbers[index]
        if run.times > 1 and max(run.size_bytes, run.source_step) <= CHUNK_BYTES:
            steps = run.times, run.source_step, run.target_step
            self._cut(_Cut(rank, number, run.source, run.size_bytes, address + run.target, *steps))
            return
        for single in run.singles():
            self._add_single(rank, number, single, address)

    def _add_single(self, rank: int, number: int, run: _boxes.Run, address: int) -> None:
        tensor = self._open(rank).layout.tensors[number]
        start, stop, target = run.source, run.source + run.size_bytes, address + run.target
        first = -(-start // CHUNK_BYTES)
        last = tensor.num_chunks if stop == tensor.size_bytes else stop // CHUNK_BYTES
        if first >= last:
            self._cut(_Cut(rank, number, start, run.size_bytes, target))
            return
        span = _span(tensor, first, last)
        begin, end = first * CHUNK_BYTES, first * CHUNK_BYTES + span.size_bytes
        want = Want(number, span, target + begin - start)
        self._assembly.wants.setdefault(rank, []).append(want)
        if start < begin:
            self._cut(_Cut(rank, number, start, begin - start, target))
        if end < stop:
            self._cut(_Cut(rank, number, end, stop - end, target + end - start))

    def _cut(self, cut: _Cut) -> None:
        self._cuts.append(cut)
        chunks = self._chunks.setdefault((cut.rank, cut.number), set())
        before = len(chunks)
        last = -(-cut.stop // CHUNK_BYTES)
        chunks.update(range(cut.start // CHUNK_BYTES, last))
        self.scratch_bytes += (len(chunks) - before) * CHUNK_BYTES

    def finished(self) -> Assembly:
        """With scratch memory for the chunks that are wanted in part, each once."""
        if not self._cuts:
            return self._assembly
        scratch = self._assembly.scratch = anonymous(self.scratch_bytes)
        where: dict[tuple[int, int, int], int] = {}
        address = scratch.address
        for (rank, number), chunks in sorted(self._chunks.items()):
            tensor = self._open(rank).layout.tensors[number]
            for first, last in _ranges(sorted(chunks)):
                want = Want(number, _span(tensor, first, last), address)
                self._assembly.wants.setdefault(rank, []).append(want)
                for chunk in range(first, last):
                    where[rank, number, chunk] = address
                    address += CHUNK_BYTES
        for cut in self._cuts:
            source = where[cut.rank, cut.number, cut.start // CHUNK_BYTES]
            source += cut.start % CHUNK_BYTES
            steps = cut.times, cut.source_step, cut.target_step
            self._assembly.moves.append(Move(source, cut.address, cut.size_bytes, *steps))
        return self._assembly


def _span(tensor: StoredTensor, first: int, last: int) -> Span:
    begin, end = first * CHUNK_BYTES, min(last * CHUNK_BYTES, tensor.size_bytes)
    return Span(tensor.start + begin, end - begin, tensor.first_chunk + first)


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
