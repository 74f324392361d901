"""From boxes that are wanted to the chunks that each rank's shard has to deliver for them.

Knows records of all ranks, boxes and chunks. Does not read anything: it says which chunks of which
tensors go where, and what is taken out of those that are not wanted whole: a chunk of that kind is
wanted once, however many boxes it has something for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mtckpt import _boxes
from mtckpt._boxes import Box
from mtckpt._delivery import Loaded, Want
from mtckpt._dtypes import DTYPES
from mtckpt._reading import check_box
from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move, Span
from mtckpt.errors import Damaged, NoHealthyStep

if TYPE_CHECKING:
    from mtckpt._manifest import ArrayEntry
    from mtckpt._shard import StoredTensor

__all__ = ["Stores", "Wants", "assemble"]

# How much is staged at a time of chunks that are wanted in part, where bytes are staged: a share of
# what is wanted, which counts twice at most, within bounds.
STAGED_SHARE = 32
MIN_STAGED_BYTES = 8 * 1024 * 1024
MAX_STAGED_BYTES = 256 * 1024 * 1024

# What is wanted of each shard, by rank.
Wants = dict[int, list[Want]]


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
        self._by_path: dict[str, list[tuple[int, int, ArrayEntry, Box]]] = {}

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
                    box = Box(entry.offsets, entry.shape)
                    self._by_path.setdefault(entry.path, []).append((rank, index, entry, box))

    def _known(self, wanted: ArrayEntry, step: int) -> list[tuple[int, int, Box]]:
        found = []
        for rank, index, entry, box in self._by_path.get(wanted.path, ()):
            if entry.ranks != wanted.ranks:
                continue  # another array, of other ranks, that has the same path there
            if (entry.dtype, entry.global_shape) != (wanted.dtype, wanted.global_shape):
                raise Damaged(
                    "ranks disagree about an array", leaf=wanted.path[:200], rank=rank, step=step
                )
            found.append((rank, index, box))
        return found


def assemble(
    wanted: Sequence[tuple[int, int, Box]],
    base: int,
    stores: Stores,
    open_shard: Callable[[int], Loaded],
    is_staged: Callable[[int], bool],
) -> list[Wants]:
    """Plan ``(address, entry of the base rank's record, box)``; each address has C order.

    ``open_shard`` gives the description of a rank's shard; ``is_staged`` says of an open one
    whether its bytes take memory of their own on their way. What would take much of that comes in
    several parts, one to be done with before the next. Raises NoHealthyStep for bytes that no shard
    has, and what ``open_shard`` raises.
    """
    own = open_shard(base)
    drafts = [_Draft(open_shard, is_staged)]
    items = [DTYPES[own.entries[index].dtype].item_bytes for _, index, _ in wanted]
    sizes = [math.prod(box.shape) * n for (_, _, box), n in zip(wanted, items, strict=True)]
    limit = min(MAX_STAGED_BYTES, max(MIN_STAGED_BYTES, sum(sizes) // STAGED_SHARE))
    for address, index, box in wanted:
        entry = own.entries[index]
        stored = (
            [(base, index, _boxes.whole(entry.shape))]
            if entry.offsets is None
            else stores.of(entry, box, own.record.step)
        )
        pieces = _covered(box, entry, stored, own.record.step)
        if not any(map(is_staged, {stored[which][0] for which, _ in pieces})):
            drafts[-1].add_pieces(pieces, stored, box, entry, address)
            continue
        for slab_address, slab in _slabs(address, box, entry, limit):
            if drafts[-1].staged_bytes >= limit:
                drafts.append(_Draft(open_shard, is_staged))
            pieces = _covered(slab, entry, stored, own.record.step)
            drafts[-1].add_pieces(pieces, stored, slab, entry, slab_address)
    return [draft.finished() for draft in drafts]


def _covered(
    box: Box, entry: ArrayEntry, stored: Sequence[tuple[int, int, Box]], step: int
) -> list[tuple[int, Box]]:
    """Of which stored boxes a box is made. Raises NoHealthyStep where something is in none."""
    pieces, missing = _boxes.cover(box, [place for _, _, place in stored])
    if missing:
        raise NoHealthyStep(
            f"no shard has {list(missing[0].shape)} at {list(missing[0].offsets)}"
            f" of {entry.path[:200]}",
            step=step,
            leaf=entry.path[:200],
        )
    return pieces


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


class _Draft:
    """A part that is being planned; ``staged_bytes`` is what its cuts take besides, so far."""

    def __init__(
        self, open_shard: Callable[[int], Loaded], is_staged: Callable[[int], bool]
    ) -> None:
        self.staged_bytes = 0
        self._open = open_shard
        self._is_staged = is_staged
        self._wants: Wants = {}
        self._cuts: dict[tuple[int, int], list[Move]] = {}  # sources count from the tensor's start
        self._chunks: dict[tuple[int, int], set[int]] = {}

    def add_pieces(
        self,
        pieces: Sequence[tuple[int, Box]],
        stored: Sequence[tuple[int, int, Box]],
        box: Box,
        entry: ArrayEntry,
        address: int,
    ) -> None:
        """Want a box at an address, made of these pieces of stored boxes."""
        for which, piece in pieces:
            rank, index, place = stored[which]
            number = self._open(rank).numbers[index]
            for run in _boxes.runs(piece, place, box, DTYPES[entry.dtype].item_bytes):
                self._add(rank, number, run, address)

    def _add(self, rank: int, number: int, run: _boxes.Run, address: int) -> None:
        """Chunks that lie wholly in a run go straight to their place; its edges are cut out."""
        if run.times > 1 and max(run.size_bytes, run.source_step) <= CHUNK_BYTES:
            steps = run.times, run.source_step, run.target_step
            self._cut(rank, number, Move(run.source, address + run.target, run.size_bytes, *steps))
            return
        for single in run.singles():
            self._add_single(rank, number, single, address)

    def _add_single(self, rank: int, number: int, run: _boxes.Run, address: int) -> None:
        tensor = self._open(rank).layout.tensors[number]
        start, stop, target = run.source, run.source + run.size_bytes, address + run.target
        first = -(-start // CHUNK_BYTES)
        last = tensor.num_chunks if stop == tensor.size_bytes else stop // CHUNK_BYTES
        if first >= last:
            self._cut(rank, number, Move(start, target, run.size_bytes))
            return
        span = _span(tensor, first, last)
        begin, end = first * CHUNK_BYTES, first * CHUNK_BYTES + span.size_bytes
        want = Want(number, span, target + (begin - start))
        self._wants.setdefault(rank, []).append(want)
        if start < begin:
            self._cut(rank, number, Move(start, target, begin - start))
        if end < stop:
            self._cut(rank, number, Move(end, target + (end - start), stop - end))

    def _cut(self, rank: int, number: int, move: Move) -> None:
        """Take rows out of chunks, of which none from the first to the last row is free of any."""
        stop = move.source + (move.times - 1) * move.source_step + move.size_bytes
        self._cuts.setdefault((rank, number), []).append(move)
        chunks = self._chunks.setdefault((rank, number), set())
        before = len(chunks)
        chunks.update(range(move.source // CHUNK_BYTES, -(-stop // CHUNK_BYTES)))
        if self._is_staged(rank):
            self.staged_bytes += (len(chunks) - before) * CHUNK_BYTES

    def finished(self) -> Wants:
        """With the chunks that are wanted in part, each once."""
        for (rank, number), chunks in sorted(self._chunks.items()):
            tensor = self._open(rank).layout.tensors[number]
            ranges = _ranges(sorted(chunks))
            firsts = [first for first, _ in ranges]
            moves: list[list[Move]] = [[] for _ in ranges]
            for move in self._cuts[rank, number]:
                at = bisect_right(firsts, move.source // CHUNK_BYTES) - 1
                moves[at].append(move._replace(source=move.source - firsts[at] * CHUNK_BYTES))
            self._wants.setdefault(rank, []).extend(
                Want(number, _span(tensor, *bounds), 0, cuts)
                for bounds, cuts in zip(ranges, moves, strict=True)
            )
        return self._wants


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
