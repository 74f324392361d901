"""Boxes that one job wants, out of the boxes that another one stored: real files, all ranks."""

from __future__ import annotations

import itertools
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from boxed import Boxed, boxed_arrays, place
from hypothesis import given, settings
from hypothesis import strategies as st

import mtckpt
from mtckpt import _assembly, _delivery, _inventory, _restore
from mtckpt._boxes import Box, whole
from mtckpt._choice import plan_restore
from mtckpt._holdings import holdings_of
from mtckpt._restore import Attempt, Place, Scope
from mtckpt._shard import CHUNK_BYTES
from mtckpt._state import ByPath
from mtckpt.adapters import active_adapters
from mtckpt.capture import memory
from mtckpt.capture.addresses import on_device
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import Damaged, NoHealthyStep, StateMismatch
from mtckpt.tiers import LocalTier

Stored = dict[str, tuple[np.ndarray[Any, Any], list[list[Box]]]]


def write(root: Path, stored: Stored) -> int:
    """One save of as many ranks as each array has lists of boxes."""
    world_size = len(next(iter(stored.values()))[1])
    for rank in range(world_size):
        arrays, boxes = {}, {}
        for path, (array, ranks) in stored.items():
            assert len(ranks[rank]) == 1
            box = ranks[rank][0]
            arrays[path] = np.array(array[place(box)], order="C")
            boxes[path] = (box.offsets, array.shape)
        builders.build_save(root, "run", 1, arrays, boxes=boxes, rank=rank, world_size=world_size)
    return world_size


def restore(root: Path, state: Any, rank: int = 0, *, mapped: bool = True) -> dict[str, int]:
    """Bytes by tier, which is one in memory or one of storage."""
    tier = LocalTier(root, read_only=True)
    inventory = _inventory.scan(tier, "run", label="disk")
    (candidate,) = plan_restore([holdings_of(inventory)], "latest").candidates
    scope = Scope(
        "run",
        {"disk": Place("disk", tier, mapped=mapped)},
        {"disk": inventory},
        active_adapters(),
        CpuEngine(),
        lambda label, work, size_bytes=0: work(),
        rank,
    )
    return _restore.restore_from(
        candidate, scope, state,
        partial=False, rename=None, attempt=Attempt(), last=True,
    ).sources  # fmt: skip


def rows(shape: tuple[int, ...], ranks: int) -> list[list[Box]]:
    edges = [shape[0] * rank // ranks for rank in range(ranks + 1)]
    return [[Box((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:]))] for a, b in pairwise(edges)]


def columns(shape: tuple[int, int], ranks: int) -> list[list[Box]]:
    return [
        [Box((0, box.offsets[0]), (shape[0], box.shape[0]))]
        for ((box,),) in zip(rows((shape[1], shape[0]), ranks), strict=True)
    ]


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    edges = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))


@settings(max_examples=40)
@given(data=st.data())
def test_any_box_comes_from_any_boxes(data: st.DataObject, tmp_path_factory: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    dtype = data.draw(st.sampled_from(["uint8", "float32", "complex128"]))
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    ranks = data.draw(st.lists(boxes_in(shape), min_size=1, max_size=4))
    stored = [[box] for box in ranks]
    wanted = data.draw(st.lists(boxes_in(shape), min_size=1, max_size=3))
    covered = np.zeros(shape, bool)
    for box in ranks:
        covered[place(box)] = True
    complete = all(covered[place(box)].all() for box in wanted)
    root = tmp_path_factory.mktemp("root")
    try:
        write(root, {"w": (array, stored)})
        with boxed_arrays():
            live = Boxed(shape, dtype, wanted)
            if complete:
                restore(root, {"w": live})
                assert live.equals(array)
            else:
                with pytest.raises(NoHealthyStep, match="no shard has"):
                    restore(root, {"w": live})
    finally:
        shutil.rmtree(root)


def test_a_box_of_which_a_part_is_nowhere_is_refused(tmp_path: Path) -> None:
    array = np.arange(6.0)
    write(tmp_path, {"w": (array, [[Box((0,), (4,))]])})
    with boxed_arrays(), pytest.raises(NoHealthyStep, match="no shard has"):
        restore(tmp_path, {"w": Boxed((6,), "float64", [Box((0,), (6,))])})


@pytest.fixture(params=[0, 1 << 30], ids=["checked while placed", "staged"])
def cheap_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("saved", [rows, columns])
@pytest.mark.parametrize("wanted", [rows, columns])
def test_large_arrays_of_many_chunks(
    tmp_path: Path, saved: Any, wanted: Any, cheap_bytes: int
) -> None:
    shape = (701, 1003)
    array = np.random.default_rng(5).standard_normal(shape, np.float32)
    write(tmp_path, {"w": (array, saved(shape, 3))})
    with boxed_arrays():
        for boxes in [*wanted(shape, 2), [whole(shape)], *wanted(shape, 3)]:
            live = Boxed(shape, np.float32, boxes)
            restore(tmp_path, {"w": live})
            assert live.equals(array)
        plain = np.zeros(shape, np.float32)
        restore(tmp_path, {"w": plain})
        assert np.array_equal(plain, array)


@pytest.mark.parametrize("limit", [1, 300_000, 1 << 30])
def test_what_is_staged_at_a_time_is_bounded(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of what is wanted, of storage; memory is read through a buffer."""
    monkeypatch.setattr(_assembly, "MIN_STAGED_BYTES", 0)
    monkeypatch.setattr(_assembly, "MAX_STAGED_BYTES", limit)
    staged: list[int] = []

    def assemble(*arguments: Any) -> Any:
        parts = _assembly.assemble(*arguments)
        for part in parts:
            cut = [want for wants in part.values() for want in wants if want.cuts]
            staged.append(sum(want.span.size_bytes for want in cut))
        return parts

    monkeypatch.setattr(_restore, "assemble", assemble)
    shape = (300, 1003)
    arrays = {name: np.random.default_rng(i).standard_normal(shape) for i, name in enumerate("ab")}
    write(tmp_path, {name: (array, rows(shape, 3)) for name, array in arrays.items()})
    with boxed_arrays():
        for mapped in (True, False):
            staged.clear()
            live = {name: Boxed(shape, float, columns(shape, 2)[1]) for name in arrays}
            restore(tmp_path, live, mapped=mapped)
            assert all(live[name].equals(array) for name, array in arrays.items())
            assert (len(staged) == 1) is mapped
    # A slab of rows that is planned, on top of a limit that was not quite reached before.
    share = sum(array.nbytes for array in arrays.values()) // 2 // _assembly.STAGED_SHARE
    assert max(staged) <= 2 * min(limit, share) + 5 * CHUNK_BYTES


def memory_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How large each piece of memory is that a restore stages bytes in."""
    taken: list[int] = []

    def anonymous(size_bytes: int) -> Any:
        taken.append(size_bytes)
        return memory.anonymous(size_bytes)

    monkeypatch.setattr(_delivery, "anonymous", anonymous)
    return taken


def test_shards_of_many_ranks_take_no_more_memory_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is little enough to be staged, and all of them are not."""
    shape = (48, CHUNK_BYTES // 32)
    array = np.random.default_rng(1).standard_normal(shape)
    write(tmp_path, {"w": (array, rows(shape, 6))})
    taken = memory_taken(monkeypatch)
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 4 * CHUNK_BYTES)
    with boxed_arrays():
        live = Boxed(shape, float, [whole(shape)])
        restore(tmp_path, {"w": live})
        assert live.equals(array)
    assert sum(taken) <= 4 * CHUNK_BYTES


def test_another_mesh_takes_no_memory_but_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)
    shape = (8192, 2048)
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    write(tmp_path, {"w": (array, rows(shape, 4))})
    taken = memory_taken(monkeypatch)
    with boxed_arrays():
        live = Boxed(shape, np.float32, columns(shape, 2)[1])
        restore(tmp_path, {"w": live})
        assert live.equals(array)
    assert not taken


def test_addresses_on_devices_stay_on_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole chunks, their edges and rows; a plain number would be written to as host memory."""
    address_on = on_device(1)
    seen: list[int] = []

    def assemble(wanted: Any, *more: Any) -> Any:
        there = [(address_on(address), index, box) for address, index, box in wanted]
        for part in _assembly.assemble(there, *more):
            for want in itertools.chain(*part.values()):
                seen.extend([move.target for move in want.cuts] or [want.address])
        return _assembly.assemble(wanted, *more)

    monkeypatch.setattr(_restore, "assemble", assemble)
    shape = (401, 1003)
    write(tmp_path, {"w": (np.zeros(shape), rows(shape, 3))})
    with boxed_arrays():
        restore(tmp_path, {"w": Boxed(shape, float, [*rows(shape, 2)[1], *columns(shape, 2)[0]])})
    assert len(seen) > 4
    assert set(map(type, seen)) == {address_on}


def test_only_the_chunks_that_are_needed_are_read(tmp_path: Path) -> None:
    rows_bytes = CHUNK_BYTES // 4
    array = np.arange(64 * rows_bytes // 8).reshape(64, -1)  # 16 chunks, 4 rows each
    write(tmp_path, {"w": (array, [[whole(array.shape)]])})
    with boxed_arrays():
        live = Boxed(array.shape, array.dtype, [Box((8, 0), (4, array.shape[1]))])
        assert restore(tmp_path, {"w": live}) == {"disk": CHUNK_BYTES}
        assert live.equals(array)
        live = Boxed(array.shape, array.dtype, [Box((6, 0), (4, array.shape[1]))])
        assert restore(tmp_path, {"w": live}) == {"disk": 2 * CHUNK_BYTES}
        assert live.equals(array)


def test_what_is_private_stays_with_its_rank(tmp_path: Path) -> None:
    for rank in range(3):
        builders.build_save(tmp_path, "run", 1, {"w": np.full(5, rank)}, rank=rank, world_size=3)
    for rank, expected in enumerate([0, 1, 2, 0, 1]):
        live = np.zeros(5, int)
        restore(tmp_path, {"w": live}, rank)
        assert live.tolist() == [expected] * 5


def test_groups_of_ranks_have_arrays_of_their_own_under_one_path(tmp_path: Path) -> None:
    shape = (6, 4)
    arrays = [np.arange(24.0).reshape(shape) + 100 * group for group in range(2)]
    for rank in range(4):
        group = rank // 2
        (box,) = rows(shape, 2)[rank % 2]
        builders.build_save(
            tmp_path, "run", 1, {"w": arrays[group][place(box)]},
            boxes={"w": (box.offsets, shape)}, ranks=(2 * group, 2 * group + 1),
            rank=rank, world_size=4,
        )  # fmt: skip
    for rank in range(4):
        live = np.zeros(shape)
        restore(tmp_path, {"w": live}, rank)
        assert np.array_equal(live, arrays[rank // 2])
    with mtckpt.load(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint["w"], arrays[0])
        assert np.array_equal(checkpoint.read("w", rank=3), arrays[1])


def test_a_flipped_bit_in_any_shard_is_found(tmp_path: Path, cheap_bytes: int) -> None:
    shape = (400, 500)
    array = np.random.default_rng(6).standard_normal(shape)
    write(tmp_path, {"w": (array, rows(shape, 2))})
    (shard,) = tmp_path.rglob("rank-00001.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with boxed_arrays():
        for boxes in ([whole(shape)], columns(shape, 2)[1]):
            live = Boxed(shape, float, boxes)
            with pytest.raises(NoHealthyStep, match="differ from their digests"):
                restore(tmp_path, {"w": live})
            assert live.equals(np.zeros(shape))


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    array = np.zeros((4, 4))
    for rank, shape in enumerate([(4, 4), (8, 4)]):
        builders.build_save(
            tmp_path, "run", 1, {"w": array[:2]}, boxes={"w": ((2 * rank, 0), shape)},
            rank=rank, world_size=2,
        )  # fmt: skip
    with boxed_arrays():
        with pytest.raises(Damaged, match="ranks disagree"):
            restore(tmp_path, {"w": np.zeros((4, 4))})
        with pytest.raises(StateMismatch):
            restore(tmp_path, {"w": np.zeros((2, 4))})


def test_by_path_global_arrays_of_any_rank_are_found_and_private_ones_of_this(
    tmp_path: Path,
) -> None:
    there = np.arange(12.0).reshape(4, 3)
    for rank in range(3):
        arrays = {"in/own": np.full(2, float(rank))}
        boxes = {}
        if rank:  # of ranks 1 and 2
            arrays["deep/er/there"] = there[2 * rank - 2 : 2 * rank]
            boxes["deep/er/there"] = ((2 * rank - 2, 0), (4, 3))
            arrays["secret"] = np.ones(1)
        builders.build_save(
            tmp_path, "run", 1, arrays, boxes=boxes, rank=rank, world_size=3, ranks=(1, 2)
        )
    for rank in range(3):
        wanted = ByPath({"in/own": np.zeros(2), "deep/er/there": np.zeros((4, 3))})
        restore(tmp_path, wanted, rank)
        assert wanted["in/own"].tolist() == [rank, rank]
        assert np.array_equal(wanted["deep/er/there"], there)
    with pytest.raises(StateMismatch, match="secret"):
        restore(tmp_path, ByPath({"in/own": np.zeros(2), "secret": np.zeros(1)}), 0)
