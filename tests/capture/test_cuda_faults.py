"""Captures and restores that go wrong in the middle: nothing is under way to what is given back.

The fake driver does nothing before it is waited for, so whatever was not waited for is seen.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from device_scene import Scene, landed
from fake_cuda import FakeCuda, Mode

from mtckpt.capture import cuda, gates, underway
from mtckpt.capture.arenas import Arenas
from mtckpt.capture.engine import AnyEngine
from mtckpt.errors import CaptureFailed, CaptureStuck, RestoreFailed, UsageError

if TYPE_CHECKING:
    from mtckpt.capture.base import Mode as CaptureMode
    from mtckpt.capture.driver import Driver


@pytest.fixture
def scene(fake_cuda: FakeCuda, driver: Driver, tmp_path: Path) -> Iterator[Scene]:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    fake_cuda.mode(Mode.LAZY)
    found = Scene(fake_cuda, driver, tmp_path, seed)
    yield found
    found.close()
    assert not gates.open_gates()


@pytest.fixture
def guarded(scene: Scene) -> Iterator[Scene]:
    """What is first in the scene is changed only by those who wait at gates."""

    def addresses() -> set[int]:
        return {int(scene.sources[0])}

    gates.guard(addresses)
    yield scene
    gates._guards.remove(addresses)


def assert_next_one_works(scene: Scene) -> None:
    values = scene.values()
    capture, digests = scene.capture()
    capture.finish(digests)
    scene.check(values, digests)


def engine_of(scene: Scene) -> cuda.CudaEngine:
    assert scene.engine._cuda is not None
    return scene.engine._cuda


def test_copies_of_one_device_end_before_the_failure_of_another_is_raised(scene: Scene) -> None:
    for _ in range(4):
        scene.add(20 << 20, 0)
    scene.add(1000, 1)
    address = scene.slot().address
    scene.fake.fail("cuLaunchKernel", 2, skip=4)  # a window of the first device each
    with pytest.raises(CaptureFailed, match="device refused"):
        scene.capture("blocking")
    assert scene.fake.counts().queued == 0
    assert not scene.engine.holds(address)
    assert_next_one_works(scene)


def test_copies_end_before_a_failure_at_the_end_is_raised(scene: Scene) -> None:
    for ordinal in (0, 1):
        for _ in range(3):
            scene.add(20 << 20, ordinal)
    capture, digests = scene.capture("blocking")
    scene.fake.fail("cuMemHostAlloc", 2)
    with pytest.raises(CaptureFailed, match="device refused"):
        capture.finish(digests)
    assert scene.fake.counts().queued == 0
    assert_next_one_works(scene)


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_copies_end_before_a_failure_of_the_host_is_raised(
    guarded: Scene, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """And no optimizer waits for a capture that has been given up."""
    scene = guarded
    for size_bytes, ordinal in ((1 << 20, 0), (1000, 0), (1000, -1)):
        scene.add(size_bytes, ordinal)

    def fail(*_: Any, **__: Any) -> None:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(scene.engine._host, "capture", fail)
        with pytest.raises(kind):
            scene.capture("overlap")
    assert scene.fake.counts().queued == 0
    assert not gates.open_gates()
    assert_next_one_works(scene)


def test_a_capture_that_nobody_came_to_finish_ends_before_the_next(scene: Scene) -> None:
    scene.add(1 << 20, 0)
    scene.capture("blocking")
    assert scene.engine.holds(scene.slot().address)
    assert_next_one_works(scene)
    assert not scene.engine.holds(scene.slot().address)


def test_what_a_device_that_is_stuck_may_use_is_left_to_it(
    scene: Scene, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        scene.add(20 << 20, 0)
    capture, digests = scene.capture("blocking")
    monkeypatch.setattr(underway, "FINISH_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(driver), "event_done", lambda *_: False)
        with pytest.raises(CaptureStuck):
            capture.finish(digests)
    before, address = scene.fake.counts(), scene.slot().address
    assert before.queued
    scene.fake.calls()
    assert scene.engine.holds(address)
    assert not scene.engine.unregister(address)
    with pytest.raises(CaptureStuck):
        scene.capture()
    assert scene.engine.holds(address)
    engine_of(scene).close()
    assert scene.fake.counts() == before  # nothing was given back, nor waited for
    assert not {"cuStreamSynchronize", "cuMemHostUnregister"}.intersection(scene.fake.calls())


def test_a_failure_that_is_not_followed_by_an_end_is_one_of_a_stuck_device(
    scene: Scene, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.add(1 << 20, 0)
    scene.add(1000, 1)
    scene.slot()
    monkeypatch.setattr(underway, "_SETTLE_S", 0.0)
    monkeypatch.setattr(type(driver), "stream_idle", lambda *_: False)
    scene.fake.fail("cuLaunchKernel", 2, skip=1)
    with pytest.raises(CaptureStuck, match="has not ended its copies"):
        scene.capture()
    assert scene.engine.holds(scene.slot().address)


def test_each_piece_has_its_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that is slowed takes as long as it takes, as long as the device does its part."""
    for _ in range(5):
        scene.add(32 << 20, 0)
    capture, digests = scene.capture()
    engine_of(scene).bytes_per_s = 32 << 20
    passed_s = [0.0]

    def sleep(pause_s: float) -> None:
        passed_s[0] += pause_s

    clock = SimpleNamespace(monotonic=lambda: passed_s[0], sleep=sleep)
    monkeypatch.setattr("mtckpt.capture.draining.time", clock)
    monkeypatch.setattr(underway, "FINISH_S", 2.0)
    capture.finish(digests)
    assert passed_s[0] >= 4.0
    scene.check(scene.values(), digests)


@pytest.mark.parametrize("text", ["1GB", "-1", "nan", ""])
def test_a_cap_that_is_none_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MTCKPT_CAPTURE_BYTES_PER_S", text)
    with pytest.raises(UsageError, match="no number of bytes a second"):
        AnyEngine()


@pytest.mark.parametrize("is_read", [True, False])
def test_a_graph_that_is_captured_takes_no_gate_along(
    scene: Scene, driver: Driver, is_read: bool
) -> None:
    with driver.current(0):
        training, packing, taken = driver.stream(), driver.stream(), driver.event()
        place, host = driver.alloc(8), driver.alloc_host(8)
        driver.to_host(host, place, 8, packing)
        driver.record(taken, packing)
        if is_read:
            driver.synchronize(packing)
    scene.fake.capture(training)
    gates.Gate(driver, 0, taken).hold(training)
    assert scene.fake.counts().queued == 0
    assert scene.fake.end_capture(training)


def test_damage_on_the_host_keeps_the_sound_part_of_a_device_out_too(scene: Scene) -> None:
    scene.add(300_000, -1)
    scene.add(200_000, 0)
    capture, digests = scene.capture()
    capture.finish(digests)
    scene.slot().view[scene.spans[0].start + 5] ^= 1
    live, targets = landed(scene, [-1, 0])
    with open(scene.path, "rb") as file:
        found = scene.engine.fetch(
            file.fileno(), scene.spans, targets, digests, lambda _: None, whole=True
        )
    assert found == [0]
    assert not any(array.any() for array in live)


def test_what_is_only_looked_at_is_placed_nowhere(scene: Scene) -> None:
    """Some of what is read at once, all of it sound: an address of 0 is none."""
    for size_bytes in (300_000, 200_000, 1000):
        scene.add(size_bytes, 0)
    values = scene.values()
    capture, digests = scene.capture()
    capture.finish(digests)
    live, targets = landed(scene, [0])
    targets[1] = type(targets[1])(0)
    with open(scene.path, "rb") as file:
        found = scene.engine.fetch(
            file.fileno(), scene.spans, targets, digests, lambda _: None, whole=True
        )
    assert found == []
    assert [live[i].tobytes() for i in (0, 2)] == [values[0], values[2]]
    assert not live[1].any()


def test_slots_that_are_refused_are_tried_once(scene: Scene) -> None:
    scene.add(1000, 0)
    scene.fake.fail("cuMemHostRegister_v2", 801, times=100)
    scene.fake.calls()
    for _ in range(3):
        assert_next_one_works(scene)
    scene.fake.fail("cuMemHostRegister_v2", 801, times=0)
    assert scene.fake.calls().count("cuMemHostRegister_v2") == 1


def test_memory_that_was_unmapped_without_a_word_is_registered_anew(
    scene: Scene, driver: Driver
) -> None:
    scene.add(1000, 0)
    with driver.current(0):
        driver.register(scene.slot().address, scene.end)
    scene.fake.calls()
    assert_next_one_works(scene)
    calls = [call for call in scene.fake.calls() if "Register" in call or "Unregister" in call]
    assert calls == ["cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemHostRegister_v2"]


@pytest.mark.parametrize("call", ["cuMemHostUnregister", "cuStreamDestroy_v2", "cuMemFree_v2"])
def test_what_is_refused_at_the_end_is_logged_and_the_rest_given_back(
    scene: Scene, call: str
) -> None:
    before = scene.fake.counts()
    scene.add(1000, 0)
    assert_next_one_works(scene)
    scene.fake.fail(call, 1)
    scene.close()
    after = scene.fake.counts()
    left = sum(after[1:]) - sum(before[1:])
    assert left == 1 if call != "cuMemFree_v2" else left > 0
    scene.mapping, scene.engine = None, AnyEngine()


def saved(scene: Scene, sizes: Sequence[int], ordinals: Sequence[int]) -> memoryview:
    for size_bytes, ordinal in zip(sizes, ordinals, strict=True):
        scene.add(size_bytes, ordinal)
    capture, digests = scene.capture("blocking")
    capture.finish(digests)
    return digests


@pytest.mark.parametrize("skip", range(12))
def test_whoever_waits_for_all_to_be_sound_knows_whether_anything_was_placed(
    scene: Scene, skip: int
) -> None:
    """The bus spoils a copy, perhaps when all has been found sound and is read once more."""
    digests = saved(scene, [300_000, 200_000], [0, 1])
    live, targets = landed(scene, [0, 1])
    told: list[bool] = []
    scene.fake.flip(skip=skip)

    def placing() -> None:
        assert not any(array.any() for array in live)
        told.append(True)

    with open(scene.path, "rb") as file:
        scene.engine.fetch(
            file.fileno(), scene.spans, targets, digests, lambda _: None,
            whole=True, placing=lambda: None if told else placing(),
        )  # fmt: skip
    assert told or not any(array.any() for array in live)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("large_pages", [False, True])
@pytest.mark.parametrize("skip", range(4))
def test_a_restore_for_which_there_is_no_memory_has_changed_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, whole: bool, large_pages: bool, skip: int
) -> None:
    monkeypatch.setattr("mtckpt.capture.landing._has_large_pages", lambda fd: large_pages)
    digests = saved(scene, [20 << 20], [0])
    live, targets = landed(scene, [0])
    before, told = scene.fake.counts(), []
    scene.fake.fail("cuMemAlloc_v2", 2, skip=skip, times=7)
    with open(scene.path, "rb") as file, pytest.raises(RestoreFailed) as raised:
        scene.engine.fetch(
            file.fileno(), scene.spans, targets, digests, lambda _: None,
            whole=whole, placing=lambda: told.append(True),
        )  # fmt: skip
    assert raised.value.details["live_state"] == "unchanged"
    assert "OUT_OF_MEMORY" in raised.value.what
    assert not told
    assert not live[0].any()
    assert scene.fake.counts() == before


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("times", range(1, 4))
def test_a_restore_goes_through_what_memory_there_is(scene: Scene, whole: bool, times: int) -> None:
    digests = saved(scene, [20 << 20], [0])
    live, targets = landed(scene, [0])
    scene.fake.fail("cuMemAlloc_v2", 2, times=times)
    with open(scene.path, "rb") as file:
        assert (
            scene.engine.fetch(
                file.fileno(), scene.spans, targets, digests, lambda _: None, whole=whole
            )
            == []
        )
    assert live[0].tobytes() == scene.arrays[0].tobytes()


def test_all_sound_or_nothing_is_placed(scene: Scene) -> None:
    digests = saved(scene, [300_000, 200_000], [0, 0])
    scene.slot().view[scene.spans[1].start + 7] ^= 1
    live, targets = landed(scene, [0])
    with open(scene.path, "rb") as file:
        found = scene.engine.fetch(
            file.fileno(), scene.spans, targets, digests, lambda _: None, whole=True
        )
    assert found == [1]
    assert not any(array.any() for array in live)


def test_a_place_is_packed_again_only_once_it_is_copied(scene: Scene) -> None:
    """Waiting for values to be read lets the device do what that needs, and nothing else."""
    scene.awaited = True
    values_and_digests = saved(scene, [20 << 20] * 5, [0] * 5)
    scene.check(scene.values(), values_and_digests)


def change(scene: Scene, driver: Driver, stream: int) -> np.ndarray[Any, Any]:
    """Put other values for the first array on a stream; returns them, to be kept."""
    other = np.frombuffer(scene.random.randbytes(scene.arrays[0].nbytes), np.uint8).copy()
    address = int(scene.place(other, 0))
    scene.arrays.pop()
    with driver.current(0):
        driver.on_device(int(scene.sources[0]), address, other.nbytes, stream)
    return other


@pytest.mark.parametrize("mode", ["auto", "blocking"])
@pytest.mark.parametrize("first", ["the caller", "the capture"])
def test_values_are_those_between_what_the_caller_does_before_and_after(
    scene: Scene,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    mode: CaptureMode,
    first: str,
) -> None:
    """On the stream that he works on; ``first`` is whom the host waits for first."""
    with driver.current(0):
        stream = driver.stream()
    monkeypatch.setattr(cuda.CudaEngine, "_streams", lambda *_: [stream])
    scene.add(3 << 20, 0)
    scene.slot()
    wanted = change(scene, driver, stream)
    capture, digests = scene.capture(mode)
    after = change(scene, driver, stream)
    if first == "the capture":
        capture.finish(digests)
    with driver.current(0):
        driver.synchronize(stream)
    assert (scene.arrays[0] == after).all()
    if first == "the caller":
        capture.finish(digests)
    scene.check([wanted.tobytes()], digests)


def test_whoever_holds_a_gate_changes_values_after_they_are_taken(
    guarded: Scene, driver: Driver
) -> None:
    scene = guarded
    scene.add(3 << 20, 0)
    values = scene.values()
    with driver.current(0):
        stream = driver.stream()
    capture, digests = scene.capture("overlap")
    (gate,) = gates.open_gates()
    gate.hold(stream)
    after = change(scene, driver, stream)
    with driver.current(0):
        driver.synchronize(stream)
    assert (scene.arrays[0] == after).all()
    capture.finish(digests)
    scene.check(values, digests)


def test_memory_that_is_cached_for_all_does_not_count_as_free(driver: Driver) -> None:
    """PyTorch without pools may have given it away by the next save."""
    memory = SimpleNamespace(data_ptr=lambda: 4096)
    torch = SimpleNamespace(
        cuda=SimpleNamespace(), uint8=None, OutOfMemoryError=MemoryError,
        device=lambda *_: None, empty=lambda *_, **__: memory,
    )  # fmt: skip
    with driver.current(0):
        arenas = Arenas(driver, 0)
        before = arenas.free_bytes()
        assert arenas._of_torch(torch, 1 << 20) == (4096, memory)
        assert arenas.free_bytes() == before
        torch.cuda.MemPool = lambda **_: object()
        torch.cuda.use_mem_pool = lambda *_, **__: contextlib.nullcontext()
        pooled = Arenas(driver, 0)
        for size_bytes in (4 << 20, 1 << 20):
            pooled._of_torch(torch, size_bytes)
            assert pooled.free_bytes()[0] == before[0] + size_bytes
