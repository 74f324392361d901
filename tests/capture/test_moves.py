"""Bytes that were checked already, from host memory to devices: all that is needed is got first.

On the fake driver, whose memory runs out when it is told to.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from device_scene import Scene
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import engine
from mtckpt.capture.base import Move
from mtckpt.errors import RestoreFailed

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

_OUT_OF_MEMORY = 2
NUM_ROWS, ROW_BYTES, STEP_BYTES = 3000, 2000, 3000


@pytest.fixture
def scene(fake_cuda: FakeCuda, driver: Driver, tmp_path: Path) -> Iterator[Scene]:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    fake_cuda.mode(Mode.LAZY)
    found = Scene(fake_cuda, driver, tmp_path, seed)
    yield found
    found.close()


class Rows:
    """Rows from host memory to two devices and to host memory, in one call."""

    def __init__(self, scene: Scene) -> None:
        self.source = np.frombuffer(scene.random.randbytes(9 << 20), np.uint8).copy()
        self.targets = [np.zeros(9 << 20, np.uint8) for _ in range(3)]
        at = [
            scene.place(one, ordinal) for one, ordinal in zip(self.targets, (0, 1, -1), strict=True)
        ]
        source = self.source.ctypes.data + 64
        self.moves = [
            Move(source, target + 3, ROW_BYTES, NUM_ROWS, STEP_BYTES, STEP_BYTES) for target in at
        ]
        self.told = 0

    def tell(self) -> None:
        self.told += 1

    def assert_there(self) -> None:
        shape = NUM_ROWS, STEP_BYTES
        rows = self.source[64:][: NUM_ROWS * STEP_BYTES].reshape(shape)
        for target in self.targets:
            found = target[3:][: NUM_ROWS * STEP_BYTES].reshape(shape)
            assert (found[:, :ROW_BYTES] == rows[:, :ROW_BYTES]).all()
            assert not found[:, ROW_BYTES:].any()


@pytest.mark.parametrize(
    ("call", "skip"), [("cuMemAlloc_v2", 0), ("cuMemAlloc_v2", 3), ("cuMemHostAlloc", 6)]
)
def test_where_there_is_no_memory_nothing_has_changed(scene: Scene, call: str, skip: int) -> None:
    """Also where it is the second device that has none."""
    rows = Rows(scene)
    for ordinal in (0, 1):
        scene.engine._devices()._kernels_of(ordinal)
    before = scene.fake.counts()
    scene.fake.fail(call, _OUT_OF_MEMORY, skip=skip, times=9)
    with pytest.raises(RestoreFailed) as raised:
        scene.engine.copy(rows.moves, rows.tell)
    assert raised.value.details["live_state"] == "unchanged"
    assert "OUT_OF_MEMORY" in raised.value.what
    assert not rows.told
    assert not any(target.any() for target in rows.targets)
    assert scene.fake.counts() == before


@pytest.mark.parametrize(("call", "times"), [("cuMemAlloc_v2", 3), ("cuMemHostAlloc", 2)])
def test_where_there_is_little_memory_there_are_more_batches(
    scene: Scene, call: str, times: int
) -> None:
    rows = Rows(scene)
    scene.fake.fail(call, _OUT_OF_MEMORY, times=times)
    scene.fake.calls()
    scene.engine.copy(rows.moves, rows.tell)
    assert rows.told == 1
    assert scene.fake.calls().count("cuLaunchKernel") > 2
    rows.assert_there()


def test_what_fails_later_says_that_live_state_is_undefined(scene: Scene) -> None:
    rows = Rows(scene)
    scene.fake.fail("cuLaunchKernel", 700, skip=1)
    with pytest.raises(RestoreFailed) as raised:
        scene.engine.copy(rows.moves, rows.tell)
    assert raised.value.details["live_state"] == "undefined"
    assert rows.told == 1


@pytest.mark.parametrize("is_damaged", [False, True])
def test_rows_are_taken_out_of_chunks_that_host_memory_has_checked(
    scene: Scene, is_damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two devices and the host, more than goes through host memory at a time."""
    monkeypatch.setattr(engine, "_ACROSS_BYTES", 2 * CHUNK_BYTES)
    scene.add(5 * CHUNK_BYTES + 99, -1)
    scene.add(3000, -1)
    _, digests = scene.capture()
    if is_damaged:
        scene.slot().view[scene.spans[0].start + 5] ^= 1
    value = scene.arrays[0]
    thirds = [np.zeros((CHUNK_BYTES // 5, 8), np.uint8) for _ in range(3)]
    cuts = {
        0: [
            Move(8 * place, scene.place(third, place - 1), 8, len(third), 24, 8)
            for place, third in enumerate(thirds)
        ]
    }
    small = np.zeros(3000, np.uint8)
    fd = os.open(scene.path, os.O_RDONLY)
    bad = scene.engine.fetch(
        fd, scene.spans, [0, scene.place(small, 1)], digests, lambda _: None, cuts=cuts,
        whole=is_damaged,
    )  # fmt: skip
    os.close(fd)
    assert bad == ([0] if is_damaged else [])
    rows = value[: 24 * len(thirds[0])].reshape(-1, 24)
    for place, third in enumerate(thirds):
        wanted = np.zeros_like(third) if is_damaged else rows[:, 8 * place : 8 * place + 8]
        assert np.array_equal(third, wanted)
    assert small.any() is np.bool_(not is_damaged)
