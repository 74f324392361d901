"""Chunks that a capture leaves as they lie in the slot: those whose digests say so, and no others.

On the fake driver, whose kernels are the real ones: digests decide there as they do on a device.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from device_scene import Scene, fill
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import cuda, draining
from mtckpt.capture.base import Span
from mtckpt.capture.windows import Spread, narrowed, windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtckpt.capture.driver import Driver


@pytest.fixture
def scene(
    fake_cuda: FakeCuda, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """With small windows, so that there are several groups of several of them."""
    monkeypatch.setattr(cuda, "WINDOW_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(draining, "WINDOW_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(draining, "_GROUPS", (1, 3))
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    fake_cuda.mode(Mode.LAZY)
    found = Scene(fake_cuda, driver, tmp_path, seed)
    yield found
    found.close()


def left_of(bits: bytes, num_chunks: int) -> set[int]:
    """Numbers of the chunks; there are none behind the last one."""
    found = {i for i in range(8 * len(bits)) if bits[i // 8] >> i % 8 & 1}
    assert not bits or len(bits) == -(-num_chunks // 8)
    assert all(i < num_chunks for i in found)
    return found


def change(scene: Scene, share: float) -> set[int]:
    """Change a byte in about this share of the chunks; their numbers."""
    changed = set()
    for array, span in zip(scene.arrays, scene.spans, strict=True):
        for i, begin in enumerate(range(0, span.size_bytes, CHUNK_BYTES)):
            if scene.random.random() < share:
                size_bytes = min(CHUNK_BYTES, span.size_bytes - begin)
                array[begin + scene.random.randrange(size_bytes)] ^= 1
                changed.add(span.chunk + i)
    return changed


@pytest.mark.parametrize("ordinals", [[0], [0, -1], [0, 1, -1]], ids=str)
def test_bytes_are_right_whatever_has_changed(scene: Scene, ordinals: list[int]) -> None:
    for _ in range(3):
        scene.add(7 * CHUNK_BYTES + 5, ordinals[0])
    scene.add(5 * CHUNK_BYTES, ordinals[-1])
    fill_more(scene, ordinals)
    capture, digests = scene.capture()
    assert capture.finish(digests) == b""
    for share in (0.0, 0.1, 0.02, 1.0, 0.3, 0.0):
        changed = change(scene, share)
        values, before = scene.values(), list(digests)
        capture, _ = scene.capture(known=digests)
        left = left_of(capture.finish(digests), scene.num_chunks)
        scene.check(values, digests)
        assert not left & changed
        assert all(digests[i] == before[i] for i in left)
        assert bool(left) == (share < 0.3) or share == 0.3


def fill_more(scene: Scene, ordinals: list[int]) -> None:
    """Smaller arrays behind the large ones, on the devices in turn."""
    for i in range(20):
        scene.add(scene.random.choice((3, 4096, CHUNK_BYTES - 8)), ordinals[i % len(ordinals)])


def test_what_is_left_does_not_cross_the_bus(scene: Scene) -> None:
    scene.add(40 * CHUNK_BYTES, 0)
    capture, digests = scene.capture()
    capture.finish(digests)
    scene.arrays[0][17 * CHUNK_BYTES] ^= 1
    scene.fake.copied_out()
    capture, _ = scene.capture(known=digests)
    left = left_of(capture.finish(digests), scene.num_chunks)
    assert left == set(range(40)) - {17}
    words = 8 * scene.num_chunks  # of digests, once to compare and once at the end
    assert scene.fake.copied_out() == CHUNK_BYTES + 2 * words
    scene.check(scene.values(), digests)


def test_where_little_could_be_left_all_is_copied(scene: Scene) -> None:
    scene.add(40 * CHUNK_BYTES, 0)
    capture, digests = scene.capture()
    capture.finish(digests)
    for chunk in range(32):
        scene.arrays[0][chunk * CHUNK_BYTES] ^= 1
    capture, _ = scene.capture(known=digests)
    left = left_of(capture.finish(digests), scene.num_chunks)
    assert left == set(range(32, 40))  # which a group of windows has for the most part
    scene.check(scene.values(), digests)


def test_digests_of_something_else_leave_nothing(scene: Scene) -> None:
    scene.add(40 * CHUNK_BYTES, 0)
    digests = memoryview(bytearray(scene.random.randbytes(8 * 40))).cast("Q")
    capture, _ = scene.capture(known=digests)
    assert capture.finish(digests) == b""
    scene.check(scene.values(), digests)


def test_what_goes_through_the_ring_is_copied(scene: Scene) -> None:
    fill(scene, [0])
    capture, digests = scene.capture("blocking")
    capture.finish(digests)
    capture, _ = scene.capture("blocking", known=digests)
    assert capture.finish(digests) == b""
    scene.check(scene.values(), digests)


def test_stretches_end_with_their_window_and_cross_small_gaps() -> None:
    spans = [Span(4096, 12 * CHUNK_BYTES, 0), Span(4096 + 13 * CHUNK_BYTES, 3 * CHUNK_BYTES, 12)]
    spread = Spread(spans, [0, 1])
    cut = windows(spread, 6 * CHUNK_BYTES, alone=True)
    assert [(w.first, w.stop) for w in cut] == [(0, 6), (6, 12), (12, 15)]
    wanted = np.zeros(15, np.bool_)
    wanted[[0, 2, 5, 6, 11, 12, 14]] = True
    found = [(number, part.first, part.stop) for number, part in narrowed(spread, cut, wanted)]
    assert found == [(0, 0, 3), (0, 5, 6), (1, 6, 7), (1, 11, 12), (2, 12, 15)]
    parts = [part for _, part in narrowed(spread, cut, wanted)]
    assert parts[0].begin == 4096
    assert parts[0].size_bytes == 3 * CHUNK_BYTES
    assert narrowed(spread, cut[1:], wanted[6:])[0][0] == 0
    assert narrowed(spread, cut, np.zeros(15, np.bool_)) == []
