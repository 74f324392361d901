"""Boxes of global arrays: which stored ones cover a wanted one, and which bytes that means. Pure.

Knows intervals in any number of dimensions and C order. Does not know files, ranks' memory or
frameworks. A box without dimensions is one element; a box with a length of 0 is empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

__all__ = [
    "Box",
    "Run",
    "cover",
    "intersection",
    "of_run",
    "runs",
    "seats_of",
    "share_of",
    "spread_of",
    "whole",
]

# What is smaller is not worth dividing among the ranks of a node.
MIN_SPLIT_BYTES = 256 * 1024


class Box(NamedTuple):
    """The elements ``offsets[d] <= i < offsets[d] + shape[d]`` of a global array."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not math.prod(self.shape)


class Run(NamedTuple):
    """Bytes that lie together in both: where they begin in the source and in the target.

    As many ``times``, each so many bytes after the one before.
    """

    source: int
    target: int
    size_bytes: int
    times: int = 1
    source_step: int = 0
    target_step: int = 0

    def singles(self) -> Iterator[Run]:
        """The same, one by one."""
        for number in range(self.times):
            yield Run(
                self.source + number * self.source_step,
                self.target + number * self.target_step,
                self.size_bytes,
            )


def whole(shape: tuple[int, ...]) -> Box:
    """All of an array of this shape."""
    return Box((0,) * len(shape), shape)


def of_run(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements ``start`` to ``stop`` of an array in C order, as boxes in that order.

    Each box's own elements lie together there. At most two boxes an axis, less one.
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _in_row(shape, first, head, tail)
    found = _in_row(shape, first, head, row) if head else []
    first += bool(head)
    if first < last:
        found.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + _in_row(shape, last, 0, tail)


def _in_row(shape: tuple[int, ...], number: int, start: int, stop: int) -> list[Box]:
    inner = of_run(shape[1:], start, stop)
    return [Box((number, *box.offsets), (1, *box.shape)) for box in inner]


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes of one array have in common; None if that is nothing."""
    offsets, shape = [], []
    for a, m, b, n in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True):
        begin, end = max(a, b), min(a + m, b + n)
        if begin >= end:
            return None
        offsets.append(begin)
        shape.append(end - begin)
    return Box(tuple(offsets), tuple(shape))


def cover(wanted: Box, stored: Sequence[Box]) -> tuple[list[tuple[int, Box]], list[Box]]:
    """Pieces of ``stored`` that make up ``wanted``, none of it twice, and what is in none of them.

    A piece is ``(index in stored, box)``; boxes that come first in ``stored`` are preferred.
    """
    pieces: list[tuple[int, Box]] = []
    left = [] if wanted.is_empty else [wanted]
    for index, box in enumerate(stored):
        if not left:
            break
        still: list[Box] = []
        for part in left:
            common = intersection(part, box)
            if common is None:
                still.append(part)
            else:
                pieces.append((index, common))
                still += _without(part, common)
        left = still
    return pieces, left


def _without(box: Box, hole: Box) -> list[Box]:
    """``box`` without ``hole``, which lies in it, as boxes that do not overlap."""
    parts = []
    offsets, shape = list(box.offsets), list(box.shape)
    for axis, (start, length) in enumerate(zip(hole.offsets, hole.shape, strict=True)):
        before = start - offsets[axis]
        after = offsets[axis] + shape[axis] - start - length
        if before:
            cut = [*shape[:axis], before, *shape[axis + 1 :]]
            parts.append(Box(tuple(offsets), tuple(cut)))
        if after:
            at = [*offsets[:axis], start + length, *offsets[axis + 1 :]]
            parts.append(Box(tuple(at), (*shape[:axis], after, *shape[axis + 1 :])))
        offsets[axis], shape[axis] = start, length
    return parts


def runs(piece: Box, source: Box, target: Box, item_bytes: int) -> Iterator[Run]:
    """How the bytes of ``piece`` go from ``source`` to ``target``, boxes that both hold all of it.

    Runs are as long as can be, in the order of both; those along one axis come as one.
    """
    if piece.is_empty:
        return
    # From the last axis on, as many as are whole in both: what they hold lies together.
    axis = len(piece.shape)
    while axis > 0 and (
        axis == len(piece.shape) or piece.shape[axis] == source.shape[axis] == target.shape[axis]
    ):
        axis -= 1
    size_bytes = math.prod(piece.shape[axis:]) * item_bytes
    source_steps, target_steps = _strides(source.shape), _strides(target.shape)
    source_at = sum(map(_steps, piece.offsets, source.offsets, source_steps))
    target_at = sum(map(_steps, piece.offsets, target.offsets, target_steps))
    count, steps = 1, (0, 0)
    if axis > 0:
        count = piece.shape[axis - 1]
        steps = source_steps[axis - 1] * item_bytes, target_steps[axis - 1] * item_bytes
    for position in itertools.product(*map(range, piece.shape[: max(0, axis - 1)])):
        yield Run(
            (source_at + sum(map(int.__mul__, position, source_steps))) * item_bytes,
            (target_at + sum(map(int.__mul__, position, target_steps))) * item_bytes,
            size_bytes,
            count,
            *steps,
        )


def _steps(offset: int, base: int, stride: int) -> int:
    return (offset - base) * stride


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return strides


def share_of(shape: tuple[int, ...], size_bytes: int, name: str, member: int, members: int) -> Box:
    """The part of an array that ``member`` of those that all hold it has to store; maybe empty.

    The parts of all members are the whole, each byte once: every member computes its own from
    nothing but this array, so they agree without a word. Large arrays are divided along the first
    axis, which keeps each part in one piece; small ones go to one member, chosen by their name.
    An array without dimensions is one element, which every member stores.
    """
    if members <= 1 or not shape:
        return whole(shape)
    length = shape[0]
    if size_bytes >= MIN_SPLIT_BYTES and length >= members:
        first, stop = length * member // members, length * (member + 1) // members
    else:
        owner = xxh3_64_intdigest(name.encode()) % members
        first, stop = (0, length) if owner == member else (0, 0)
    return Box((first, *([0] * (len(shape) - 1))), (stop - first, *shape[1:]))


def seats_of(seat: int, num_seats: int, copies: int) -> tuple[int, ...]:
    """``seat`` of a ring and ``copies`` others that stand evenly spaced, as many as there are.

    Everybody is held by as many as everybody else holds. Seats that lie beside one another, up to
    ``num_seats - ceil(num_seats / (1 + copies))`` of them, never hold one's all.
    """
    count = min(copies, num_seats - 1) + 1
    return tuple((seat + turn * num_seats // count) % num_seats for turn in range(count))


def _held_by(here: int, num_seats: int, copies: int) -> list[int]:
    """The seats whose ``seats_of`` has ``here`` among them, in order."""
    return sorted((2 * here - seat) % num_seats for seat in seats_of(here, num_seats, copies))


def spread_of(
    shape: tuple[int, ...],
    size_bytes: int,
    name: str,
    nodes: Sequence[Sequence[int]],
    rank: int,
    copies: int,
) -> list[Box]:
    """The parts of an array that ``rank`` has to store so that ``1 + copies`` nodes have each byte.

    ``nodes`` are the ranks that hold the array, node by node in the order of a ring. Nodes share it
    out as the members of one do (``share_of``), and each part is stored by its node and the
    ``seats_of`` that one; the ranks of a node then share what it stores. An array without
    dimensions is one element, which everybody stores.
    """
    if not shape:
        return [whole(shape)]
    num_nodes, length = len(nodes), shape[0]
    here = next(seat for seat, ranks in enumerate(nodes) if rank in ranks)
    if size_bytes >= MIN_SPLIT_BYTES and length >= num_nodes:
        seats = _held_by(here, num_nodes, copies)
        parts = [(length * k // num_nodes, length * (k + 1) // num_nodes) for k in seats]
    else:
        # Another choice than that of a member: who is first on its node is not always asked.
        seat = xxh3_64_intdigest(name.encode(), seed=1) % num_nodes
        parts = [(0, length)] if here in seats_of(seat, num_nodes, copies) else []
    boxes = []
    member, members = nodes[here].index(rank), len(nodes[here])
    for first, stop in parts:
        if first < stop:
            part_bytes = size_bytes * (stop - first) // length
            share = share_of((stop - first, *shape[1:]), part_bytes, name, member, members)
            if not share.is_empty:
                boxes.append(Box((first + share.offsets[0], *share.offsets[1:]), share.shape))
    return boxes
