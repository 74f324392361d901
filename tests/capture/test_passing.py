"""Captures to a slot that the driver does not take: through pinned memory, and right all the same.

On the fake driver, where nothing is done before it is waited for (or by chance): what is taken out
of pinned memory too early, or overwritten there, is wrong bytes in the slot.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from device_scene import Scene, fill
from device_trainer import make_state, open_run, put_on_device, saved_twice, values_at
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture import cuda, draining
from mtckpt.capture.base import MODES
from mtckpt.capture.driver import Driver
from mtckpt.errors import CaptureFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtckpt.capture.base import Mode as CaptureMode

_NOT_SUPPORTED = 801


@pytest.fixture(params=[Mode.LAZY, Mode.RANDOM, Mode.IMMEDIATE], ids=str)
def scene(
    fake_cuda: FakeCuda,
    driver: Driver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Scene]:
    """With small windows, so that many pieces take turns in few places."""
    monkeypatch.setattr(cuda, "WINDOW_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(cuda, "_TURN_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(draining, "WINDOW_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(draining, "_GROUPS", (1, 3))
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    fake_cuda.mode(request.param, seed)
    fake_cuda.fail("cuMemHostRegister_v2", _NOT_SUPPORTED)
    found = Scene(fake_cuda, driver, tmp_path, seed)
    yield found
    found.close()


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where devices copy to."""
    found: list[int] = []
    to_host = Driver.to_host

    def noted(self: Driver, target: int, *rest: Any) -> None:
        found.append(target)
        to_host(self, target, *rest)

    monkeypatch.setattr(Driver, "to_host", noted)
    return found


@pytest.mark.parametrize("mode", ["auto", "blocking"])
@pytest.mark.parametrize("ordinals", [[0], [0, 1, -1]], ids=str)
def test_bytes_are_those_at_the_call_and_no_device_copies_to_the_slot(
    scene: Scene,
    targets: list[int],
    caplog: pytest.LogCaptureFixture,
    mode: CaptureMode,
    ordinals: list[int],
) -> None:
    fill(scene, ordinals)
    scene.add(40 * CHUNK_BYTES, 0)
    for _ in range(3):
        values = scene.values()
        capture, digests = scene.capture(mode)
        capture.finish(digests)
        scene.check(values, digests)
        for array in scene.arrays:
            array += 1
    base = scene.slot().address
    assert targets
    assert not [target for target in targets if base <= target < base + scene.end]
    assert caplog.text.count("cannot be registered") == 1
    assert scene.fake.calls().count("cuMemHostRegister_v2") == 1


def test_what_has_not_changed_is_left(scene: Scene) -> None:
    scene.add(40 * CHUNK_BYTES, 0)
    capture, digests = scene.capture()
    capture.finish(digests)
    for chunk in (2, 17, 18, 33):
        scene.arrays[0][chunk * CHUNK_BYTES] ^= 1
    scene.fake.copied_out()
    capture, _ = scene.capture(known=digests)
    assert capture.finish(digests)
    assert scene.fake.copied_out() < 20 * CHUNK_BYTES
    scene.check(scene.values(), digests)


@pytest.mark.parametrize("mode", ["auto", "blocking"])
def test_what_was_cut_short_does_not_come_to_the_next_slot(scene: Scene, mode: CaptureMode) -> None:
    scene.add(40 * CHUNK_BYTES, 0)
    scene.slot()
    scene.fake.fail("cuMemcpyDtoHAsync_v2", 719, skip=3)
    with pytest.raises(CaptureFailed, match="719"):
        capture, digests = scene.capture(mode)
        capture.finish(digests)
    for array in scene.arrays:
        array += 1
    capture, digests = scene.capture(mode)
    capture.finish(digests)
    scene.check(scene.values(), digests)


def test_nothing_is_left(scene: Scene) -> None:
    before = scene.fake.counts()
    scene.add(40 * CHUNK_BYTES, 0)
    for mode in MODES:
        capture, digests = scene.capture(mode)
        capture.finish(digests)
    scene.close()
    assert scene.fake.counts()._replace(contexts=0) == before


def test_a_slot_that_was_taken_before_is_copied_to_as_ever(
    fake_cuda: FakeCuda, driver: Driver, tmp_path: Path, targets: list[int]
) -> None:
    """Each slot is judged by itself: memory that may be pinned can end between two."""
    scene = Scene(fake_cuda, driver, tmp_path, 1)
    scene.add(CHUNK_BYTES, 0)
    capture, digests = scene.capture()
    capture.finish(digests)
    assert scene.slot().address + scene.spans[0].start in targets
    scene.close()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("runtime_dir")
def test_a_run_whose_slots_the_driver_refuses(
    fake_cuda: FakeCuda, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.mode(Mode.LAZY)
    fake_cuda.fail("cuMemHostRegister_v2", _NOT_SUPPORTED, times=1000)
    state = make_state()
    put_on_device(fake_cuda, driver, monkeypatch.setattr, state)
    with open_run(tmp_path) as checkpointer:
        saved_twice(checkpointer, state)
        values_at(3, state)
        checkpointer.save(3, state).wait("local", timeout_s=30)
        assert checkpointer.status().counters["left_bytes"]
        wanted = {name: array.copy() for name, array in state.items()}
        state["base"][:] = 0
        assert checkpointer.restore(state).step == 3
    assert all(np.array_equal(state[name], wanted[name]) for name in wanted)
