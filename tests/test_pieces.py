"""Who stores what: all ranks of a node together store every byte of what they share, once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from boxed import Boxed, BoxedAdapter, place
from hypothesis import given
from hypothesis import strategies as st

from mtckpt import _state
from mtckpt._boxes import MIN_SPLIT_BYTES, Box, whole
from mtckpt._pieces import Members, Recipe, divide, gather
from mtckpt._replicas import Replicated
from mtckpt._save import make_plan


def recipe_of(state: Any, members: Members) -> tuple[Recipe, list[Any]]:
    adapters = [BoxedAdapter()]
    flat = _state.flatten(state, adapters)
    specs = [
        owner.spec(array, path)
        for owner, array, path in zip(flat.owners, flat.arrays, flat.paths, strict=True)
    ]
    recipe = divide(flat, specs, members)
    arrays = gather(recipe, flat.owners, flat.arrays)
    assert arrays is not None
    return recipe, arrays


@given(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(2, 5),
    st.booleans(),
    st.data(),
)
def test_every_byte_once_for_each_node(
    shape: tuple[int, ...], world_size: int, large: bool, data: st.DataObject
) -> None:
    """Rows of an array go to pairs of ranks, another array to all; ranks are on two nodes."""
    if large and shape:
        shape = (shape[0], max(1, MIN_SPLIT_BYTES // 8), *shape[1:2])
    everybody = tuple(range(world_size))
    node = tuple(sorted(data.draw(st.sets(st.sampled_from(everybody), min_size=1))))
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    stored: dict[str, Any] = {name: np.zeros(shape, np.int8) for name in ("w", "r")}
    for rank in node:
        half = tuple(r for r in everybody if r % 2 == rank % 2)
        box = whole(shape)
        if shape:
            edge = shape[0] // 2
            first, stop = (0, edge) if rank % 2 == 0 else (edge, shape[0])
            box = Box((first, *[0] * (len(shape) - 1)), (stop - first, *shape[1:]))
        state = {"w": Boxed(shape, float, [box], half, of=array), "r": Replicated(array)}
        recipe, arrays = recipe_of(state, Members(rank, world_size, node))
        for piece, found in zip(recipe.pieces, arrays, strict=True):
            spec = piece.spec
            name = ("w", "r")[piece.leaf]
            where = place(Box(spec.offsets or (), spec.shape))
            assert np.array_equal(found, array[where])
            stored[name][where] += 1
    if shape:
        assert (stored["r"] == 1).all()
        halves = {rank % 2 for rank in node}
        edge = shape[0] // 2
        assert (stored["w"][:edge] == (0 in halves)).all()
        assert (stored["w"][edge:] == (1 in halves)).all()
    else:
        assert stored["r"] == len(node)  # one element is stored by everybody


@given(st.data(), st.booleans(), st.sampled_from(["replicated", "boxed"]))
def test_no_byte_is_left_to_another_rank_whatever_each_has_tied(
    data: st.DataObject, large: bool, kind: str
) -> None:
    """Three names, of one array or of several as each rank happens to hold them, on some ranks."""
    world_size = data.draw(st.integers(2, 4))
    holders = tuple(sorted(data.draw(st.sets(st.integers(0, world_size - 1), min_size=2))))
    shape = (MIN_SPLIT_BYTES // 8, 2) if large else (5, 2)
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    names = ["a", data.draw(st.text("bcde", min_size=1, max_size=3)), "z"]
    covered = {name: np.zeros(shape, bool) for name in names}
    for rank in holders:
        alike = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
        held: list[Any] = [Replicated(array.copy(), holders) for _ in range(3)]
        if kind == "boxed":
            held = [Boxed(shape, float, [whole(shape)], holders, of=array) for _ in range(3)]
        state = {name: held[which] for name, which in zip(names, alike, strict=True)}
        flat = _state.flatten(state, [BoxedAdapter()])
        plan, kept = make_plan(flat, Members(rank, world_size, tuple(range(world_size))))
        arrays = cast("tuple[object, list[Any]]", kept)[1]
        for index, piece in enumerate(plan.recipe.pieces):
            twin = plan.same_as.get(index, index)
            assert twin not in plan.same_as
            where = place(Box(piece.spec.offsets or (), piece.spec.shape))
            assert np.array_equal(arrays[twin], array[where])
            covered[flat.paths[piece.leaf]][where] = True
    for name in names:
        assert covered[name].all(), name


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 3), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 2),
    st.booleans(),
)
def test_a_spread_state_is_on_so_many_nodes(
    shape: tuple[int, ...], sizes: list[int], copies: int, large: bool
) -> None:
    """Rows go to even and odd ranks, another array to all: of each, so many nodes that hold it."""
    if large:
        shape = (shape[0], max(1, MIN_SPLIT_BYTES // 8), *shape[1:2])
    ranks = iter(range(sum(sizes)))
    nodes = tuple(tuple(next(ranks) for _ in range(size)) for size in sizes)
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    edge, digests = shape[0] // 2, set()
    counts = {name: np.zeros(shape, np.int8) for name in ("w", "r")}
    for node in nodes:
        stored = {name: np.zeros(shape, np.int8) for name in ("w", "r")}
        for rank in node:
            half = tuple(r for r in range(sum(sizes)) if r % 2 == rank % 2)
            first, stop = (0, edge) if rank % 2 == 0 else (edge, shape[0])
            box = Box((first, *[0] * (len(shape) - 1)), (stop - first, *shape[1:]))
            state = {"w": Boxed(shape, float, [box], half, of=array), "r": Replicated(array)}
            recipe, arrays = recipe_of(state, Members(rank, sum(sizes), node, nodes, copies))
            digests.add(recipe.agreed)
            assert {piece.leaf for piece in recipe.pieces[:2]} == {0, 1}  # all leaves are named
            for piece, found in zip(recipe.pieces, arrays, strict=True):
                where = place(Box(piece.spec.offsets or (), piece.spec.shape))
                assert np.array_equal(found, array[where])
                stored[("w", "r")[piece.leaf]][where] += 1
        for name, count in stored.items():
            assert count.max(initial=0) <= 1
            counts[name] += count
    assert len(digests) == 1
    assert (counts["r"] == min(1 + copies, len(nodes))).all()
    for odd, rows in ((0, slice(0, edge)), (1, slice(edge, None))):
        holding = sum(any(rank % 2 == odd for rank in node) for node in nodes)
        assert (counts["w"][rows] == min(1 + copies, holding)).all()


def test_ranks_that_divide_otherwise_do_not_agree() -> None:
    spread = Members(0, 2, (0,), ((0,), (1,)), 1)
    others = (Members(0, 2, (0,)), Members(0, 2, (0,), ((0,), (1,)), 2))
    digests = [recipe_of({"w": Replicated(np.zeros(8))}, m)[0].agreed for m in (spread, *others)]
    assert len(set(digests)) == 3


def test_ranks_agree_by_what_they_share_alone() -> None:
    """Its digest is the same on all ranks, whatever is private or lies elsewhere."""
    digests = set()
    for rank in range(3):
        state = {
            "own": np.zeros(rank + 1),
            "shared": Replicated(np.zeros(7)),
            "pair": Replicated(np.zeros(rank // 2 + 1), (0, 1) if rank < 2 else (2,)),
        }
        digests.add(recipe_of(state, Members(rank, 3, (0, 1, 2)))[0].agreed)
        recipe, _ = recipe_of(state, Members(rank, 3, (0, 1, 2)))
        assert [piece.ranks for piece in recipe.pieces[1:]] == [
            None,
            (0, 1) if rank < 2 else (2,),
        ]
    assert len(digests) == 1
    other, _ = recipe_of({"shared": Replicated(np.zeros(8))}, Members(0, 3, (0, 1, 2)))
    assert other.agreed not in digests


def test_what_changed_since_the_plan_is_not_gathered() -> None:
    members = Members(0, 2, (0, 1))
    owners: list[Any] = [BoxedAdapter()]
    for before, after in [
        (Replicated(np.zeros(6)), np.zeros(7)),
        (Replicated(np.zeros(6)), np.zeros(6, np.float32)),
        (
            Boxed((6,), float, [Box((0,), (3,))], (0, 1)),
            Boxed((6,), float, [Box((3,), (3,))], (0, 1)),
        ),
        (Boxed((6,), float, [Box((0,), (3,))], (0, 1)), Boxed((6,), float, [Box((0,), (3,))])),
        (Boxed((6,), float, [Box((0,), (3,))], (0,)), Boxed((7,), float, [Box((0,), (3,))], (0,))),
    ]:
        recipe, _ = recipe_of({"w": before}, members)
        value = before.value if isinstance(before, Replicated) else before
        assert gather(recipe, owners, [value]) is not None
        assert gather(recipe, owners, [after]) is None


def test_alone_nothing_is_divided() -> None:
    recipe, _ = recipe_of({"w": Replicated(np.zeros(6))}, Members())
    assert recipe.is_plain
    assert recipe.pieces[0].spec.offsets is None


class Looked(tuple[int, ...]):
    """Ranks, and how often somebody has gone through them."""

    times = 0

    def __iter__(self) -> Iterator[int]:
        Looked.times += 1
        return super().__iter__()

    def __contains__(self, rank: object) -> bool:
        Looked.times += 1
        return super().__contains__(rank)


@pytest.mark.parametrize("copies", [0, 1])
def test_ranks_are_gone_through_once_however_many_arrays_they_hold(copies: int) -> None:
    world_size = 400
    nodes = tuple(tuple(range(first, first + 8)) for first in range(0, world_size, 8))
    members = Members(9, world_size, nodes[1], nodes if copies else (), copies)
    Looked.times = 0
    everybody = Looked(range(world_size))
    state = {
        f"w{number}": Boxed((8, 4), float, [whole((8, 4))], everybody, sharers=everybody)
        for number in range(50)
    }
    recipe, _ = recipe_of(state, members)
    assert len({piece.alike for piece in recipe.pieces}) == 1
    assert all(piece.ranks is None for piece in recipe.pieces)
    assert Looked.times < 10
