"""The engine for CUDA devices on a fake driver, which runs the real kernels, stream by stream.

Nothing is done there before it is waited for (or by chance): whoever reads too early reads garbage.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import cuda, windows
from mtckpt.capture.addresses import OnDevice, on_device
from mtckpt.capture.base import Move, Span
from mtckpt.capture.engine import AnyEngine
from mtckpt.capture.memory import Mapping, map_file
from mtckpt.errors import CaptureFailed, RestoreFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mtckpt.capture.base import Mode as CaptureMode
    from mtckpt.capture.driver import Driver

SIZES = (1, 3, 8, 17, 200, 4096, 8192, CHUNK_BYTES, CHUNK_BYTES + 24, 3 * CHUNK_BYTES + 5)


class Scene:
    """Arrays, some of them on devices, and a file in which they lie one after the other."""

    def __init__(self, fake: FakeCuda, driver: Driver, folder: Path, seed: int) -> None:
        self.fake = fake
        self.random = random.Random(seed)
        self.engine = AnyEngine()
        self.engine._cuda = cuda.CudaEngine(driver)
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.spans: list[Span] = []
        self.sources: list[int] = []
        self.path = folder / "slot"
        self.mapping: Mapping | None = None
        self.awaited = False

    def add(self, size_bytes: int, ordinal: int = 0) -> None:
        array = np.frombuffer(self.random.randbytes(size_bytes), np.uint8).copy()
        start = self.spans[-1].start + self.spans[-1].size_bytes if self.spans else 4096
        chunk = 0
        if self.spans:
            chunk = self.spans[-1].chunk + -(-self.spans[-1].size_bytes // CHUNK_BYTES)
        self.spans.append(Span(start, size_bytes, chunk))
        self.sources.append(self.place(array, ordinal))

    def place(self, array: np.ndarray[Any, Any], ordinal: int) -> int:
        """An address of ``array``, which lies on a device from now on, or in host memory (-1)."""
        self.arrays.append(array)
        if ordinal < 0 or not array.nbytes:
            return array.ctypes.data if array.nbytes else 0
        self.fake.adopt(array.ctypes.data, array.nbytes, ordinal)
        return on_device(ordinal, awaited=self.awaited)(array.ctypes.data)

    @property
    def end(self) -> int:
        return self.spans[-1].start + self.spans[-1].size_bytes

    @property
    def num_chunks(self) -> int:
        return self.spans[-1].chunk + -(-self.spans[-1].size_bytes // CHUNK_BYTES)

    def slot(self) -> Mapping:
        if self.mapping is None:
            self.path.write_bytes(bytes(self.end))
            fd = os.open(self.path, os.O_RDWR)
            self.mapping = map_file(fd, self.end, writable=True)
            os.close(fd)
            self.engine.register(self.mapping.address, self.end)
        return self.mapping

    def capture(self, mode: CaptureMode = "auto") -> tuple[Any, memoryview]:
        digests = memoryview(bytearray(8 * self.num_chunks)).cast("Q")
        base = self.slot().address
        return self.engine.capture(self.sources, self.spans, base, digests, mode), digests

    def check(self, values: Sequence[bytes], digests: memoryview) -> None:
        data = self.path.read_bytes()
        for value, span in zip(values, self.spans, strict=True):
            assert data[span.start : span.start + span.size_bytes] == value
            for i, begin in enumerate(range(0, span.size_bytes, CHUNK_BYTES)):
                chunk = value[begin : begin + CHUNK_BYTES]
                assert digests[span.chunk + i] == xxhash.xxh3_64_intdigest(chunk)

    def values(self) -> list[bytes]:
        return [array.tobytes() for array in self.arrays]

    def close(self) -> None:
        if self.mapping is not None:
            self.engine.unregister(self.mapping.address)
            self.mapping.close()
        self.engine.close()


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


def fill(scene: Scene, ordinals: Sequence[int]) -> None:
    """Arrays of many sizes, descending as in a shard, on these devices in turn."""
    for i, size_bytes in enumerate(sorted(SIZES * 3, reverse=True)):
        scene.add(size_bytes, ordinals[i % len(ordinals)])


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


def landed(scene: Scene, ordinals: Sequence[int]) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    targets = []
    first = len(scene.arrays)
    for i, span in enumerate(scene.spans):
        array = np.zeros(span.size_bytes, np.uint8)
        targets.append(scene.place(array, ordinals[i % len(ordinals)]))
    return scene.arrays[first:], targets


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
