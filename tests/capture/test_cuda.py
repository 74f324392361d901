"""The engine for CUDA devices on a fake driver, which runs the real kernels, stream by stream.

Nothing is done there before it is waited for (or by chance): whoever reads too early reads garbage.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from device_scene import SIZES, Scene, fill, landed
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import windows
from mtckpt.capture.addresses import OnDevice
from mtckpt.capture.base import Move
from mtckpt.capture.engine import AnyEngine
from mtckpt.errors import CaptureFailed, RestoreFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtckpt.capture.base import Mode as CaptureMode
    from mtckpt.capture.driver import Driver


@pytest.fixture(params=[Mode.LAZY, Mode.RANDOM, Mode.IMMEDIATE], ids=str)
def scene(
    fake_cuda: FakeCuda, driver: Driver, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    fake_cuda.mode(request.param, seed)
    found = Scene(fake_cuda, driver, tmp_path, seed)
    yield found
    found.close()


@pytest.mark.parametrize("mode", ["auto", "blocking"])
@pytest.mark.parametrize("ordinals", [[0], [0, -1], [0, 1, -1]], ids=str)
def test_bytes_and_digests_are_those_at_the_call(
    scene: Scene, mode: CaptureMode, ordinals: list[int]
) -> None:
    fill(scene, ordinals)
    for _ in range(3):
        values = scene.values()
        capture, digests = scene.capture(mode)
        capture.finish(digests)
        scene.check(values, digests)
        for array in scene.arrays:
            array += 1


@pytest.mark.parametrize("mode", ["auto", "blocking"])
def test_what_is_awaited_may_change_at_once(scene: Scene, mode: CaptureMode) -> None:
    """Beside other arrays of the same devices, whose frameworks have streams."""
    fill(scene, [0, 1])
    scene.awaited = True
    for size_bytes in SIZES:
        scene.add(size_bytes, 1)
    values = scene.values()
    capture, digests = scene.capture(mode)
    for array in scene.arrays[-len(SIZES) :]:
        array += 1
    capture.finish(digests)
    scene.check(values, digests)


def test_a_device_without_room_is_gone_through_in_turns(scene: Scene) -> None:
    """And what fits is a snapshot: the last windows of the shard."""
    scene.fake.memory(3 << 30)
    for _ in range(5):
        scene.add(20 << 20)
    assert windows.room_bytes("auto", 1 << 30, 2 << 30, 3 << 30) == 1 << 30
    values = scene.values()
    capture, digests = scene.capture("blocking")
    capture.finish(digests)
    scene.check(values, digests)


def test_everything_is_given_back(scene: Scene) -> None:
    before = scene.fake.counts()
    fill(scene, [0, 1, -1])
    for mode in ("auto", "blocking", "auto"):
        capture, digests = scene.capture(mode)
        capture.finish(digests)
    scene.close()
    after = scene.fake.counts()
    scene.mapping = None
    scene.engine = AnyEngine()
    assert after._replace(contexts=0, modules=0) == before._replace(contexts=0, modules=0)


def test_a_capture_in_a_graph_is_refused(scene: Scene) -> None:
    scene.add(1000)
    scene.fake.fail("cuMemAlloc_v2", 2, times=100)
    with pytest.raises(CaptureFailed):
        scene.capture()
    scene.fake.fail("cuMemAlloc_v2", 2, times=0)


@pytest.mark.parametrize("large_pages", [False, True])
@pytest.mark.parametrize("ordinals", [[0], [1, -1, 0]], ids=str)
def test_what_was_saved_comes_back(
    scene: Scene, ordinals: list[int], large_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtckpt.capture.landing._has_large_pages", lambda fd: large_pages)
    fill(scene, [0])
    values = scene.values()
    capture, digests = scene.capture()
    capture.finish(digests)
    live, targets = landed(scene, ordinals)
    with open(scene.path, "rb") as file:
        bad = scene.engine.fetch(file.fileno(), scene.spans, targets, digests, lambda _: None)
    assert bad == []
    assert [array.tobytes() for array in live] == values


@pytest.mark.parametrize("large_pages", [False, True])
def test_no_bad_chunk_reaches_its_target(
    scene: Scene, large_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtckpt.capture.landing._has_large_pages", lambda fd: large_pages)
    fill(scene, [0])
    values = scene.values()
    capture, digests = scene.capture()
    capture.finish(digests)
    hurt = scene.random.randrange(len(scene.spans))
    at = scene.spans[hurt].start + scene.random.randrange(scene.spans[hurt].size_bytes)
    scene.slot().view[at] ^= 1
    live, targets = landed(scene, [0])
    with open(scene.path, "rb") as file:
        bad = scene.engine.fetch(file.fileno(), scene.spans, targets, digests, lambda _: None)
        nowhere = [OnDevice.__new__(type(target), 0) for target in targets]
        only_checked = scene.engine.fetch(
            file.fileno(), scene.spans, nowhere, digests, lambda _: None
        )
    assert bad == only_checked == [hurt]
    begin = (at - scene.spans[hurt].start) // CHUNK_BYTES * CHUNK_BYTES
    assert not live[hurt][begin : begin + CHUNK_BYTES].any()
    for i, array in enumerate(live):
        assert i == hurt or array.tobytes() == values[i]


def test_moves_reach_devices_strided_or_not(scene: Scene) -> None:
    source = np.frombuffer(scene.random.randbytes(1 << 20), np.uint8).copy()
    target = np.zeros(2 << 20, np.uint8)
    at = scene.place(target, 0)
    moves = [
        Move(source.ctypes.data, at + 7, 300_001),
        Move(source.ctypes.data + 400_000, at + 400_000, 13, 1000, 13, 64),
        Move(source.ctypes.data + 500_000, at + 1_000_000, 100, 50, 200, 100),
    ]
    scene.engine.copy(moves)
    assert target[7 : 7 + 300_001].tobytes() == source[:300_001].tobytes()
    for i in range(1000):
        begin = 400_000 + 64 * i
        assert (target[begin : begin + 13] == source[400_000 + 13 * i :][:13]).all()
    for i in range(50):
        assert (target[1_000_000 + 100 * i :][:100] == source[500_000 + 200 * i :][:100]).all()
    scene.engine.copy([Move(at + 7, at + 1_500_000, 1000)])
    assert target[1_500_000:][:1000].tobytes() == source[:1000].tobytes()


def test_an_error_of_the_device_is_named(scene: Scene) -> None:
    scene.add(100_000)
    scene.fake.fail("cuLaunchKernel", 700)
    with pytest.raises(CaptureFailed, match="ILLEGAL_ADDRESS"):
        scene.capture()
    live, targets = landed(scene, [0])
    assert live
    scene.path.write_bytes(bytes(scene.end))
    scene.fake.fail("cuMemcpyHtoDAsync_v2", 700, skip=3)
    digests = memoryview(bytearray(8 * scene.num_chunks)).cast("Q")
    with open(scene.path, "rb") as file, pytest.raises(RestoreFailed, match="ILLEGAL_ADDRESS"):
        scene.engine.fetch(file.fileno(), scene.spans, targets, digests, lambda _: None)
