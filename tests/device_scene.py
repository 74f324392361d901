"""Arrays on devices of the fake driver, a slot, and the engine between them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from fake_cuda import WHY_NOT, FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import cuda, gates
from mtckpt.capture.addresses import on_device
from mtckpt.capture.base import Span
from mtckpt.capture.driver import Driver
from mtckpt.capture.engine import AnyEngine
from mtckpt.capture.memory import Mapping, map_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt.capture.base import Mode as CaptureMode

SIZES = (1, 3, 8, 17, 200, 4096, 8192, CHUNK_BYTES, CHUNK_BYTES + 24, 3 * CHUNK_BYTES + 5)


class Scene:
    """Arrays, some of them on devices, and a file in which they lie one after the other."""

    def __init__(self, fake: FakeCuda, driver: Driver, folder: Path, seed: int) -> None:
        self.fake = fake
        self.random = random.Random(seed)
        self.engine = AnyEngine()
        self.engine._cuda = cuda.CudaEngine(driver, self.engine._host.copy)
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

    def capture(
        self, mode: CaptureMode = "auto", known: memoryview | None = None
    ) -> tuple[Any, memoryview]:
        """Also gives the digests: those of what lies in the slot, ``known``, or new ones."""
        digests = memoryview(bytearray(8 * self.num_chunks)).cast("Q") if known is None else known
        base = self.slot().address
        capture = self.engine.capture(
            self.sources, self.spans, base, digests, mode, is_known=known is not None
        )
        return capture, digests

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


def fill(scene: Scene, ordinals: Sequence[int]) -> None:
    """Arrays of many sizes, descending as in a shard, on these devices in turn."""
    for i, size_bytes in enumerate(sorted(SIZES * 3, reverse=True)):
        scene.add(size_bytes, ordinals[i % len(ordinals)])


def landed(scene: Scene, ordinals: Sequence[int]) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    targets = []
    first = len(scene.arrays)
    for i, span in enumerate(scene.spans):
        array = np.zeros(span.size_bytes, np.uint8)
        targets.append(scene.place(array, ordinals[i % len(ordinals)]))
    return scene.arrays[first:], targets


def step_in_a_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer steps inside of a graph capture, and a device does not read its values."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    fake = FakeCuda(folder)
    fake.reset()
    fake.mode(Mode.LAZY)
    driver = Driver(str(fake.path))
    with driver.current(0):
        training, packing, taken = driver.stream(), driver.stream(), driver.event()
        place, host = driver.alloc(8), driver.alloc_host(8)
        for _ in range(2):
            driver.to_host(host, place, 8, packing)
        driver.record(taken, packing)
    fake.capture(training)
    monkeypatch.setattr(gates, "_HOLD_S", -1.0)
    gates.Gate(driver, 0, taken).hold(training)
