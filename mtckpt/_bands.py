"""Arrays of an open save: whole ones, and in bands where one of them may be larger than memory.

Knows how the boxes of all ranks join into arrays, and which chunks a band needs. Does not know
frameworks or files: ``OpenShard`` reads, and compares every byte with its digest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from mtckpt import _boxes
from mtckpt._boxes import Box
from mtckpt._dtypes import DTYPES
from mtckpt._shard import CHUNK_BYTES
from mtckpt.errors import Damaged

if TYPE_CHECKING:
    import numpy as np

    from mtckpt._manifest import ArrayEntry
    from mtckpt._reading import OpenShard

__all__ = ["Band", "Part", "bands", "joined", "whole_shape"]

_MAX_CELLS = 10_000_000
# A shard, and the number of an entry of it.
Part = tuple["OpenShard", int]


class Band(NamedTuple):
    """A box of an array, and its bytes in C order."""

    box: Box
    raw: np.ndarray[Any, Any]


def whole_shape(entry: ArrayEntry) -> tuple[int, ...]:
    """The shape of the array that an entry is of."""
    return entry.shape if entry.global_shape is None else entry.global_shape


def joined(parts: Sequence[Part], entry: ArrayEntry) -> np.ndarray[Any, Any]:
    """The bytes of a whole array. ``parts`` are of all ranks that hold it together.

    Raises Damaged where they differ, are not all of it, or differ from their digests.
    """
    boxes = _boxes_of(parts, entry)
    return _filled(_boxes.whole(whole_shape(entry)), boxes, DTYPES[entry.dtype].item_bytes)


def bands(parts: Sequence[Part], entry: ArrayEntry, max_bytes: int) -> Iterator[Band]:
    """The same piece by piece, in C order: all of one shape but those at the end of an axis.

    Takes memory for two bands and a few chunks. A band has at least one element.
    """
    boxes = _boxes_of(parts, entry)
    item_bytes = DTYPES[entry.dtype].item_bytes
    for box in _cut(whole_shape(entry), max(1, max_bytes // item_bytes)):
        yield Band(box, _filled(box, boxes, item_bytes))


def _cut(shape: tuple[int, ...], max_items: int) -> Iterator[Box]:
    """An array as boxes of at most so many items, which follow one another in C order."""
    if math.prod(shape) <= max_items:
        yield _boxes.whole(shape)
        return
    axis = next(i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= max_items)
    rest = shape[axis + 1 :]
    height = max_items // math.prod(rest)
    for position in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], height):
            offsets = (*position, first, *([0] * len(rest)))
            yield Box(offsets, (*([1] * axis), min(height, shape[axis] - first), *rest))


def _filled(box: Box, boxes: dict[Box, Part], item_bytes: int) -> np.ndarray[Any, Any]:
    """The bytes of a box, from all stored ones that have some of it."""
    import numpy as np

    raw = np.empty(math.prod(box.shape) * item_bytes, np.uint8)
    there = raw.reshape((*box.shape, item_bytes))
    for stored, (shard, index) in boxes.items():
        if stored == box:
            shard.read(shard.tensors[index], raw.data)
            return raw
        piece = _boxes.intersection(box, stored)
        if piece is not None:
            there[_slices(piece, box)] = _piece(piece, stored, shard, index, item_bytes)
    return raw


def _piece(
    piece: Box, stored: Box, shard: OpenShard, index: int, item_bytes: int
) -> np.ndarray[Any, Any]:
    """Some of a stored box, by way of the chunks from its first byte to its last."""
    import numpy as np

    tensor = shard.tensors[index]
    steps = [math.prod(stored.shape[axis + 1 :]) * item_bytes for axis in range(len(stored.shape))]
    begins = map(int.__sub__, piece.offsets, stored.offsets)
    start = sum(map(int.__mul__, begins, steps))
    last = sum((size - 1) * step for size, step in zip(piece.shape, steps, strict=True))
    first, stop = start // CHUNK_BYTES, -(-(start + last + item_bytes) // CHUNK_BYTES)
    memory = np.empty(min(stop * CHUNK_BYTES, tensor.size_bytes) - first * CHUNK_BYTES, np.uint8)
    shard.read(tensor, memory.data, first, stop)
    return np.ndarray(
        (*piece.shape, item_bytes), np.uint8, memory, start - first * CHUNK_BYTES, (*steps, 1)
    )


def _slices(piece: Box, box: Box) -> tuple[slice, ...]:
    """Where a piece lies within a box."""
    return tuple(
        slice(at - base, at - base + size)
        for at, base, size in zip(piece.offsets, box.offsets, piece.shape, strict=True)
    )


# -- which boxes there are -------------------------------------------------------------------------


def _boxes_of(parts: Sequence[Part], entry: ArrayEntry) -> dict[Box, Part]:
    """The stored boxes of an array, equal ones once. Raises Damaged unless they are all of it."""
    if entry.global_shape is None:
        return {_boxes.whole(entry.shape): parts[0]}
    boxes: dict[Box, Part] = {}
    for shard, index in parts:
        box = shard.entries[index]
        if (box.dtype, box.global_shape) != (entry.dtype, entry.global_shape):
            raise Damaged("ranks disagree about an array", path=entry.path, step=shard.record.step)
        boxes.setdefault(Box(box.offsets or (), box.shape), (shard, index))
    if not _covers(list(boxes), entry.global_shape):
        raise Damaged(
            "the boxes of all ranks do not make up the whole array",
            path=entry.path,
            global_shape=entry.global_shape,
            num_boxes=len(boxes),
        )
    return boxes


def _covers(boxes: Sequence[Box], whole: tuple[int, ...]) -> bool:
    """Whether every element lies in a box: exact, on the grid that the boxes' edges make."""
    import numpy as np

    if not math.prod(whole):
        return True
    full = [box for box in boxes if math.prod(box[1])]
    edges = []
    for axis, size in enumerate(whole):
        marks = {0, size}
        for offsets, shape in full:
            marks.update((offsets[axis], offsets[axis] + shape[axis]))
        edges.append(sorted(marks))
    if math.prod([len(marks) - 1 for marks in edges]) > _MAX_CELLS:
        return False
    covered = np.zeros([len(list(pairwise(marks))) for marks in edges], bool)
    position = [{mark: i for i, mark in enumerate(marks)} for marks in edges]
    for offsets, shape in full:
        cells = tuple(
            slice(at[o], at[o + size]) for at, o, size in zip(position, offsets, shape, strict=True)
        )
        covered[cells] = True
    return bool(covered.all())
