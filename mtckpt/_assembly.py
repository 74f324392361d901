"""From boxes that are wanted to the chunks that each rank's shard has to deliver for them.

Knows records of all ranks, boxes and chunks. Does not read anything: it says which chunks of which
tensors go where, and what is moved once all of them are there. Chunks that are wanted whole go to
where they are wanted; of the others the wanted bytes are taken out of scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


@dataclass(slots=True)
class Assembly:
    """``wants`` by rank; ``moves`` take place once all of them are there."""

    wants: dict[int, list[Want]] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    scratch: MemoryMapping | None = None


class Stores:
    """Where the boxes of global arrays are stored, by path: ``(rank, entry, box)``.

    ``first`` is the rank that is asked first, since its shard is read anyway.
    """

    def __init__(self, entries: Mapping[int, Sequence[ArrayEntry]], first: int) -> None:
        self._by_path: dict[str, list[tuple[int, int, ArrayEntry]]] = {}
        for rank in sorted(entries, key=lambda rank: (rank != first, rank)):
            for index, entry in enumerate(entries[rank]):
                check_box(entry)
                if entry.offsets is not None:
                    self._by_path.setdefault(entry.path, []).append((rank, index, entry))

    def of(self, wanted: ArrayEntry, step: int) -> list[tuple[int, int, Box]]:
        """Every stored box of one array. Raises Damaged where ranks disagree about the array."""
        found = []
        for rank, index, entry in self._by_path.get(wanted.path, ()):
            if (entry.dtype, entry.global_shape) != (wanted.dtype, wanted.global_shape):
                raise Damaged(
                    "ranks disagree about an array", leaf=wanted.path[:200], rank=rank, step=step
                )
            found.append((rank, index, Box(entry.offsets or (), entry.shape)))
        return found


@dataclass(slots=True)
class _Cut:
    """Bytes of a tensor that are wanted at an address, and share chunks with others."""

    rank: int
    number: int
    start: int
    size_bytes: int
    address: int


def assemble(
    wanted: Sequence[tuple[int, int, Box]],
    base: int,
    stores: Stores,
    open_shard: Callable[[int], Loaded],
) -> Assembly:
    """Plan ``(address, entry of the base rank's record, box)``; each address has C order.

    ``open_shard`` gives the description of a rank's shard. Raises NoHealthyStep for bytes that no
    shard has, and what ``open_shard`` raises.
    """
    assembly = Assembly()
    cuts: list[_Cut] = []
    own = open_shard(base)
    for address, index, box in wanted:
        entry = own.entries[index]
        stored = (
            [(base, index, _boxes.whole(entry.shape))]
            if entry.offsets is None
            else stores.of(entry, own.record.step)
        )
        pieces, missing = _boxes.cover(box, [place for _, _, place in stored])
        if missing:
            raise NoHealthyStep(
                f"no shard has {list(missing[0].shape)} at {list(missing[0].offsets)}"
                f" of {entry.path[:200]}",
                step=own.record.step,
                leaf=entry.path[:200],
            )
        item_bytes = DTYPES[entry.dtype].item_bytes
        for which, piece in pieces:
            rank, entry_index, place = stored[which]
            loaded = open_shard(rank)
            number = loaded.numbers[entry_index]
            tensor = loaded.layout.tensors[number]
            for run in _boxes.runs(piece, place, box, item_bytes):
                _plan_run(assembly, cuts, rank, number, tensor, run, address)
    _plan_cuts(assembly, cuts, open_shard)
    return assembly


def _plan_run(
    assembly: Assembly,
    cuts: list[_Cut],
    rank: int,
    number: int,
    tensor: StoredTensor,
    run: _boxes.Run,
    address: int,
) -> None:
    """Chunks that lie wholly in a run go straight to their place; its edges are cut out."""
    start, stop, target = run.source, run.source + run.size_bytes, address + run.target
    first = -(-start // CHUNK_BYTES)
    last = tensor.num_chunks if stop == tensor.size_bytes else stop // CHUNK_BYTES
    if first >= last:
        cuts.append(_Cut(rank, number, start, run.size_bytes, target))
        return
    begin, end = first * CHUNK_BYTES, min(last * CHUNK_BYTES, tensor.size_bytes)
    span = Span(tensor.start + begin, end - begin, tensor.first_chunk + first)
    assembly.wants.setdefault(rank, []).append(Want(number, span, target + begin - start))
    if start < begin:
        cuts.append(_Cut(rank, number, start, begin - start, target))
    if end < stop:
        cuts.append(_Cut(rank, number, end, stop - end, target + end - start))


def _plan_cuts(
    assembly: Assembly, cuts: Sequence[_Cut], open_shard: Callable[[int], Loaded]
) -> None:
    """Scratch memory for the chunks that are wanted in part, each once, and the moves out of it."""
    chunks: dict[tuple[int, int], set[int]] = {}
    for cut in cuts:
        last = -(-(cut.start + cut.size_bytes) // CHUNK_BYTES)
        chunks.setdefault((cut.rank, cut.number), set()).update(
            range(cut.start // CHUNK_BYTES, last)
        )
    spans: list[tuple[int, int, Span, int]] = []  # rank, number, span, offset in the scratch
    where: dict[tuple[int, int, int], int] = {}
    total = 0
    for (rank, number), needed in sorted(chunks.items()):
        tensor = open_shard(rank).layout.tensors[number]
        for first, last in _ranges(sorted(needed)):
            begin, end = first * CHUNK_BYTES, min(last * CHUNK_BYTES, tensor.size_bytes)
            span = Span(tensor.start + begin, end - begin, tensor.first_chunk + first)
            spans.append((rank, number, span, total))
            for chunk in range(first, last):
                where[rank, number, chunk] = total + (chunk - first) * CHUNK_BYTES
            total += end - begin
    if not spans:
        return
    scratch = assembly.scratch = anonymous(total)
    for rank, number, span, at in spans:
        assembly.wants.setdefault(rank, []).append(Want(number, span, scratch.address + at))
    for cut in cuts:
        at = where[cut.rank, cut.number, cut.start // CHUNK_BYTES] + cut.start % CHUNK_BYTES
        assembly.moves.append(Move(scratch.address + at, cut.address, cut.size_bytes))


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
