"""Boxes of global arrays, held against NumPy on every example that hypothesis can think of."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtckpt._boxes import (
    MIN_SPLIT_BYTES,
    Box,
    Run,
    cover,
    intersection,
    of_run,
    runs,
    seats_of,
    share_of,
    spread_of,
    whole,
)

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    edges = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, list[Box]]:
    """An array's shape, a wanted box of it, and stored ones that may leave some of it out."""
    shape = draw(shapes)
    stored = draw(st.lists(boxes_in(shape), max_size=6))
    if draw(st.booleans()):
        stored.append(whole(shape))
    return shape, draw(boxes_in(shape)), stored


def singles(piece: Box, source: Box, target: Box, item_bytes: int) -> list[Run]:
    return [one for run in runs(piece, source, target, item_bytes) for one in run.singles()]


def place(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))


def marked(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray[Any, Any]:
    count = np.zeros(shape, int)
    for box in boxes:
        count[place(box)] += 1
    return count


@given(scenes())
def test_pieces_and_what_is_missing_make_up_the_wanted_box_once(
    scene: tuple[tuple[int, ...], Box, list[Box]],
) -> None:
    shape, wanted, stored = scene
    pieces, missing = cover(wanted, stored)
    for index, piece in pieces:
        assert intersection(piece, stored[index]) == piece
    found = marked(shape, [piece for _, piece in pieces])
    assert np.array_equal(found + marked(shape, missing), marked(shape, [wanted]))
    assert not np.any(found & (marked(shape, stored) == 0))
    assert not np.any(marked(shape, missing) & (marked(shape, stored) > 0))


@given(scenes())
def test_a_wanted_box_is_put_together_byte_for_byte(
    scene: tuple[tuple[int, ...], Box, list[Box]],
) -> None:
    shape, wanted, stored = scene
    array = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    target = np.full(wanted.shape, -1, np.int16)
    out = bytearray(target.tobytes())
    pieces, missing = cover(wanted, stored)
    for index, piece in pieces:
        source = array[place(stored[index])].tobytes()
        for start, to, size_bytes, *_ in singles(piece, stored[index], wanted, 2):
            out[to : to + size_bytes] = source[start : start + size_bytes]
    expected = array.copy()
    for box in missing:
        expected[place(box)] = -1
    assert bytes(out) == expected[place(wanted)].tobytes()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_run_of_elements_is_a_few_boxes_in_its_order(lengths: list[int], data: Any) -> None:
    shape = tuple(lengths)
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    array = np.arange(size).reshape(shape)
    boxes = of_run(shape, start, stop)
    parts = [array[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in boxes]
    assert [int(n) for part in parts for n in part.flat] == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    assert not any(box.is_empty for box in boxes)


@given(scenes())
def test_runs_are_as_long_as_can_be(scene: tuple[tuple[int, ...], Box, list[Box]]) -> None:
    _, wanted, stored = scene
    for index, piece in cover(wanted, stored)[0]:
        found = list(singles(piece, stored[index], wanted, 4))
        assert sum(run.size_bytes for run in found) == math.prod(piece.shape) * 4
        for before, after in pairwise(found):
            touching = (
                before.source + before.size_bytes == after.source,
                before.target + before.size_bytes == after.target,
            )
            assert before.source < after.source
            assert before.target < after.target
            assert touching != (True, True)


@given(shapes, st.integers(1, 5), st.text(max_size=5), st.booleans())
def test_shares_are_the_whole_each_byte_once(
    shape: tuple[int, ...], members: int, name: str, large: bool
) -> None:
    size_bytes = MIN_SPLIT_BYTES if large else 1
    shares = [share_of(shape, size_bytes, name, member, members) for member in range(members)]
    if shape:
        assert np.array_equal(marked(shape, shares), np.ones(shape, int))
    else:
        assert shares == [whole(())] * members


def test_large_arrays_are_divided_evenly_and_small_ones_spread() -> None:
    sizes = [share_of((1001, 7), 2**20, "w", member, 4).shape[0] for member in range(4)]
    assert sorted(sizes) == [250, 250, 250, 251]
    owners = [
        next(m for m in range(4) if not share_of((3,), 12, f"layer/{i}", m, 4).is_empty)
        for i in range(400)
    ]
    assert all(60 < owners.count(member) < 140 for member in range(4))


@given(shapes, st.data())
def test_a_spread_array_is_on_so_many_nodes_each_byte_once(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Ranks are on nodes as they come; each node that has a byte has it in one rank."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    ranks = iter(data.draw(st.permutations(range(sum(sizes)))))
    nodes = [tuple(sorted(next(ranks) for _ in range(size))) for size in sizes]
    copies = data.draw(st.integers(0, 3))
    size_bytes = data.draw(st.sampled_from((1, MIN_SPLIT_BYTES, 40 * MIN_SPLIT_BYTES)))
    name = data.draw(st.text(max_size=5))
    if not shape:
        assert spread_of(shape, size_bytes, name, nodes, 0, copies) == [whole(())]
        return
    counts = [
        marked(
            shape,
            [b for r in node for b in spread_of(shape, size_bytes, name, nodes, r, copies)],
        )
        for node in nodes
    ]
    assert all(count.max(initial=0) <= 1 for count in counts)
    assert np.array_equal(np.sum(counts, axis=0), np.full(shape, min(1 + copies, len(nodes))))
    # Whoever stores a row of it is evenly spaced on the ring.
    for row in range(shape[0] if math.prod(shape) else 0):
        holders = {seat for seat, count in enumerate(counts) if count[row].any()}
        assert holders in [set(seats_of(seat, len(nodes), copies)) for seat in range(len(nodes))]


def test_a_spread_state_costs_each_node_its_fraction() -> None:
    """Four nodes of two ranks, one copy: a node stores half of it, a rank a quarter."""
    nodes = [(0, 1), (2, 3), (4, 5), (6, 7)]
    for rank in range(8):
        boxes = spread_of((1024, 256), 2**20, "w", nodes, rank, 1)
        assert sum(math.prod(box.shape) for box in boxes) == 2**20 // 4 // 4
    counts = [0] * 8
    for i in range(800):
        for rank in range(8):
            counts[rank] += bool(spread_of((3,), 12, f"layer/{i}", nodes, rank, 1))
    assert all(140 < count < 260 for count in counts)


@given(st.integers(1, 12), st.integers(0, 4))
def test_seats_are_evenly_spaced(num_seats: int, copies: int) -> None:
    count = min(copies + 1, num_seats)
    held = [0] * num_seats
    for seat in range(num_seats):
        seats = seats_of(seat, num_seats, copies)
        assert seats[0] == seat
        assert len(set(seats)) == count
        for other in seats:
            held[other] += 1
        gaps = [(b - a) % num_seats for a, b in zip(seats, (*seats[1:], seat), strict=True)]
        assert count == 1 or set(gaps) <= {num_seats // count, -(-num_seats // count)}
    assert set(held) == {count}
