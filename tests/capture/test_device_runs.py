"""The public object with tensors on devices, end to end: a real agent, a fake driver.

Tensors are in host memory, and the fake is told that it is a device's. What it queues is done only
when it is waited for, so values that change after ``save()`` must already have been taken.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from agent_checks import status_of
from fake_cuda import FakeCuda, Mode

import mtckpt
from mtckpt import _save
from mtckpt.adapters.torch import looks
from mtckpt.capture import driver as driver_module
from mtckpt.capture import underway
from mtckpt.capture.addresses import on_device
from mtckpt.capture.arenas import Arenas
from mtckpt.capture.base import Span
from mtckpt.capture.engine import AnyEngine
from mtckpt.capture.memory import map_file
from mtckpt.errors import CaptureFailed, CaptureStuck, SaveFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._shard import ShardLayout
    from mtckpt.agent.protocol import SlotGrant
    from mtckpt.capture.driver import Driver

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


class Devices:
    """Which tensors are on a device."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake
        self.ordinals: dict[int, int] = {}

    def move(self, tensors: Sequence[torch.Tensor], ordinal: int = 0) -> None:
        for tensor in tensors:
            if tensor.numel() and tensor.data_ptr() not in self.ordinals:
                storage = tensor.untyped_storage()
                self.fake.adopt(storage.data_ptr(), storage.nbytes(), ordinal)
                self.ordinals[tensor.data_ptr()] = ordinal

    def ordinals_of(self, block: Sequence[torch.Tensor]) -> list[int]:
        return [self.ordinals.get(tensor.data_ptr(), -1) for tensor in block]


@pytest.fixture
def devices(
    fake_cuda: FakeCuda, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Devices]:
    fake_cuda.mode(Mode.LAZY)
    found = Devices(fake_cuda)
    monkeypatch.setattr(driver_module.Driver, "_loaded", (os.getpid(), driver))
    monkeypatch.setattr(looks, "ordinals_of", found.ordinals_of)
    monkeypatch.setattr(looks, "on_host", lambda block: [o < 0 for o in found.ordinals_of(block)])
    yield found
    for address in found.ordinals:
        fake_cuda.disown(address)


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    found = [*state["model"].parameters(), *state["model"].buffers()]
    for entry in state["optimizer"].state.values():
        found += [value for value in entry.values() if value.dim()]
    return found


def make_state(seed: int, devices: Devices) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(300, 400), torch.nn.BatchNorm1d(400), torch.nn.Linear(400, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 300)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": torch.tensor(seed), "n": seed}
    devices.move(tensors_of(state))
    return state


def values_of(state: dict[str, Any]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors_of(state)]


def open_run(tmp_path: Path, **ram: Any) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1, **ram), mtckpt.Disk(tmp_path / "disk", every=1)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


@pytest.mark.parametrize("capture", ["auto", "snapshot", "blocking"])
def test_a_model_on_a_device_comes_back_from_memory(
    tmp_path: Path, devices: Devices, capture: str
) -> None:
    with open_run(tmp_path, capture=capture) as checkpointer:
        state = make_state(1, devices)
        checkpointer.restore(state)
        for step in range(1, 5):
            wanted = values_of(state)
            checkpointer.save(step, state).wait("staged", timeout_s=20)
            with torch.no_grad():
                for tensor in tensors_of(state):
                    tensor += 1
        assert "cuMemHostRegister_v2" in devices.fake.calls()
        again = make_state(2, devices)
        restored = checkpointer.restore(again)
        assert (restored.step, set(restored.sources)) == (4, {"ram"})
        assert all(map(torch.equal, values_of(again), wanted))
        assert int(again["step"]) == 1


def test_a_fresh_optimizer_gets_its_moments_on_the_device(tmp_path: Path, devices: Devices) -> None:
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer.restore(state)
        checkpointer.save(1, state).wait("staged", timeout_s=20)
    other = make_state(2, devices)
    other["optimizer"] = torch.optim.AdamW(other["model"].parameters())
    with open_run(tmp_path) as checkpointer:  # from disk: memory was freed
        restored = checkpointer.restore(other)
        assert set(restored.sources) == {"disk"}
    assert all(map(torch.equal, values_of(other), values_of(state)))


def test_a_copy_that_the_bus_spoiled_is_not_loaded(tmp_path: Path, devices: Devices) -> None:
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer.restore(state)
        for step in range(1, 3):
            wanted = values_of(state)
            checkpointer.save(step, state).wait("local", timeout_s=20)
            with torch.no_grad():
                state["model"][0].weight += 1
        again = make_state(2, devices)
        devices.fake.flip(skip=4)
        restored = checkpointer.restore(again)
        assert restored.step == 2
        assert all(map(torch.equal, values_of(again), wanted))


def told(checkpointer: mtckpt.Checkpointer, save: mtckpt.Save) -> CaptureFailed:
    with pytest.raises(SaveFailed):
        save.wait("staged", timeout_s=20)
    error = save.exception()
    assert isinstance(error, CaptureFailed)
    return error


def test_a_device_that_fails_in_the_background_is_told(tmp_path: Path, devices: Devices) -> None:
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer.restore(state)
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        devices.fake.fail("cuMemcpyDtoHAsync_v2", 719)
        save = checkpointer.save(2, state)
        assert "719" in told(checkpointer, save).what
        with pytest.raises(SaveFailed):
            checkpointer.save(3, state)
        save = checkpointer.save(4, state)
        save.wait("staged", timeout_s=20)
        again = make_state(2, devices)
        assert checkpointer.restore(again).step == 4


def test_nothing_of_a_device_is_left(tmp_path: Path, devices: Devices) -> None:
    before = devices.fake.counts()
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer.restore(state)
        for step in range(1, 21):
            checkpointer.save(step, state).wait("staged", timeout_s=20)
        checkpointer.restore(state)
        for step in range(21, 24):
            checkpointer.save(step, state).wait("staged", timeout_s=20)
    after = devices.fake.counts()
    assert after._replace(contexts=0) == before._replace(contexts=0)


@pytest.mark.parametrize("capture", ["overlap", "snapshot-overlap"])
def test_an_optimizer_waits_for_a_capture_that_goes_on(
    tmp_path: Path,
    devices: Devices,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    capture: str,
) -> None:
    """Parameters and moments are read after ``save()``; the step comes after that on its stream."""
    with driver.current(0):
        stream = driver.stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=stream))
    with open_run(tmp_path, capture=capture) as checkpointer:
        state = make_state(1, devices)
        checkpointer.restore(state)
        for step in range(1, 4):
            wanted = values_of(state)
            save = checkpointer.save(step, state)
            assert save.due
            if step == 1:
                # The step is made on the host here, and so after its stream.
                state["optimizer"].register_step_pre_hook(lambda *_: synchronize(driver, stream))
            state["optimizer"].step()
            save.wait("staged", timeout_s=20)
        again = make_state(2, devices)
        assert checkpointer.restore(again).step == 3
        assert all(map(torch.equal, values_of(again), wanted))
    with driver.current(0):
        driver.destroy_stream(stream)


def synchronize(driver: Driver, stream: int) -> None:
    with driver.current(0):
        driver.synchronize(stream)


def put_on_thread(monkeypatch: pytest.MonkeyPatch, stream: int) -> None:
    """As PyTorch has it: this thread works on a stream, others on the default one."""
    mine = threading.get_ident()

    def current(_: int) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=stream if threading.get_ident() == mine else 0)

    def own(arenas: Arenas, _: object, size_bytes: int) -> tuple[int, None]:
        return arenas._driver.alloc(size_bytes), None

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(Arenas, "_of_torch", own)


@pytest.mark.parametrize("cheap_bytes", [0, 1 << 30], ids=["read in a thread", "staged"])
def test_a_restore_waits_for_what_its_caller_had_put_on_the_device(
    tmp_path: Path,
    devices: Devices,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    cheap_bytes: int,
) -> None:
    """An update of a parameter that is still under way does not come after its restore."""
    monkeypatch.setattr("mtckpt._delivery._CHEAP_BYTES", cheap_bytes)
    with driver.current(0):
        stream = driver.stream()
    put_on_thread(monkeypatch, stream)
    parameter, update = torch.ones(1 << 20), torch.full((1 << 20,), 7.0)
    devices.move([parameter, update])
    state = {"p": parameter}
    with open_run(tmp_path) as checkpointer:
        for step in range(1, 3):
            checkpointer.save(step, state).wait("staged", timeout_s=20)
        with driver.current(0):
            driver.on_device(parameter.data_ptr(), update.data_ptr(), 4 << 20, stream)
        assert checkpointer.restore(state).step == 2
        synchronize(driver, stream)
    assert torch.equal(parameter, torch.ones(1 << 20))


def test_a_slot_that_a_stuck_device_may_write_to_is_not_granted_again(
    tmp_path: Path, devices: Devices, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(1, devices)
    checkpointer = open_run(tmp_path, slots=3)
    checkpointer._max_stall_s = 1
    ring = checkpointer._saver.ring
    checkpointer.save(1, state).wait("staged", timeout_s=20)
    monkeypatch.setattr(underway, "FINISH_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(driver), "event_done", lambda *_: False)
        stuck = checkpointer.save(2, state)
        assert isinstance(told(checkpointer, stuck), CaptureStuck)
    withheld = ring.withheld()
    assert len(withheld) == 1
    monkeypatch.setattr(underway, "FINISH_S", 20.0)
    with pytest.raises(SaveFailed):
        checkpointer.save(3, state)
    given: list[str] = []
    adopt = ring.adopt

    def noted(grant: SlotGrant, layout: ShardLayout) -> _save.HeldSlot:
        given.append(grant.slot_id)
        return adopt(grant, layout)

    monkeypatch.setattr(ring, "adopt", noted)
    for step in range(4, 9):
        save = checkpointer.save(step, state)
        if save.skipped is None:
            save.wait("staged", timeout_s=20)
    assert given
    assert withheld[0] not in given
    assert withheld[0] in ring.held()  # which an agent that is started anew is told
    mapped = {slot.data.address for slot in ring._slots.values()}
    devices.fake.calls()
    checkpointer.close(timeout_s=20)
    assert "cuMemHostUnregister" not in devices.fake.calls()
    assert mapped <= {slot.data.address for slot in _save._left_mapped}


def test_a_step_whose_capture_failed_may_be_saved_again(tmp_path: Path, devices: Devices) -> None:
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        devices.fake.fail("cuMemcpyDtoHAsync_v2", 719)
        told(checkpointer, checkpointer.save(2, state))
        with pytest.raises(SaveFailed):
            checkpointer.save(2, state, tiers="all")
        checkpointer.save(2, state, tiers="all").wait("staged", timeout_s=20)


def test_a_save_while_the_one_before_leaves_the_device_says_so(
    tmp_path: Path, devices: Devices, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(1, devices)
    with open_run(tmp_path) as checkpointer:
        checkpointer._max_stall_s = 0.5
        with monkeypatch.context() as patch:
            patch.setattr(type(driver), "event_done", lambda *_: False)
            first = checkpointer.save(1, state)
            assert checkpointer.save(2, state).skipped == (
                "the previous save is still leaving the device"
            )
        first.wait("staged", timeout_s=20)


def test_what_an_older_start_in_this_process_held_is_given_back(
    tmp_path: Path, devices: Devices
) -> None:
    """A notebook cell that is run again: the name is bound anew, and nobody has closed anything."""
    state = make_state(1, devices)
    before = devices.fake.counts()
    older = open_run(tmp_path)
    older.save(1, state).wait("staged", timeout_s=20)
    held = devices.fake.counts()
    assert held.registrations
    with open_run(tmp_path) as checkpointer:
        for thread in older._session._threads:
            thread.join(30)
        after = devices.fake.counts()
        assert after._replace(contexts=0) == before._replace(contexts=0)
        assert not older._saver.ring.held()
        checkpointer.restore(state)
        checkpointer.save(2, state).wait("staged", timeout_s=20)


def test_what_is_dropped_without_a_word_is_given_back(tmp_path: Path, devices: Devices) -> None:
    engine = AnyEngine()
    before = devices.fake.counts()
    ring = _save.SlotRing(engine)
    (tmp_path / "slot").write_bytes(bytes(8192))
    fd = os.open(tmp_path / "slot", os.O_RDWR)
    slot = SimpleNamespace(data=map_file(fd, 8192, writable=True))
    os.close(fd)
    ring._slots[1] = slot  # type: ignore[assignment]
    engine.register(slot.data.address, 8192)
    source = torch.ones(100)
    devices.move([source])
    digests = memoryview(bytearray(8)).cast("Q")
    sources = [on_device(0)(source.data_ptr())]
    engine.capture(sources, [Span(4096, 400, 0)], slot.data.address, digests).finish(digests)
    assert devices.fake.counts().registrations == 1
    del ring
    gc.collect()
    assert devices.fake.counts()._replace(contexts=0) == before._replace(contexts=0)


# -- what does not change ------------------------------------------------------------------------


def mostly_frozen(devices: Devices) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = {"base": torch.randn(1 << 20), "tuned": torch.ones(1000)}
    devices.move(list(state.values()))
    return state


def saved_twice(checkpointer: mtckpt.Checkpointer, state: dict[str, torch.Tensor]) -> None:
    """Both slots have been captured into, and the older one is the next."""
    for step in (1, 2):
        state["tuned"] += 1
        checkpointer.save(step, state).wait("local", timeout_s=20)
    assert checkpointer._session.wait_idle(20)


def assert_restored(
    checkpointer: mtckpt.Checkpointer, state: dict[str, torch.Tensor], step: int
) -> None:
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    restored = checkpointer.restore(state)
    assert (restored.step, set(restored.sources)) == (step, {"ram"})
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_what_does_not_change_is_left_in_its_slot(tmp_path: Path, devices: Devices) -> None:
    state = mostly_frozen(devices)
    with open_run(tmp_path, slots=2) as checkpointer:
        saved_twice(checkpointer, state)
        devices.fake.copied_out()
        for step in (3, 4, 5):
            state["tuned"] += 1
            checkpointer.save(step, state).wait("local", timeout_s=20)
        assert devices.fake.copied_out() < 4 << 20
        assert checkpointer.status().counters["left_bytes"] == 3 * (4 << 20)
        state["base"][7] += 1
        checkpointer.save(6, state).wait("local", timeout_s=20)
        assert_restored(checkpointer, state, 6)


def spread_out(devices: Devices, seed: int, shift: int) -> dict[str, torch.Tensor]:
    """Tensors on two devices in turn, beginning with device ``shift``, and one in host memory."""
    torch.manual_seed(seed)
    state = {f"t{i}": torch.randn(50_000 + 10_000 * i) for i in range(9)}
    for i, tensor in enumerate(list(state.values())[:-1]):
        devices.move([tensor], (i + shift) % 2)
    return state


@pytest.mark.parametrize("capture", ["auto", "blocking"])
def test_what_was_on_one_device_comes_back_to_another(
    tmp_path: Path, devices: Devices, capture: str
) -> None:
    """And is left in its slot, whichever device finds that it has not changed."""
    state = spread_out(devices, 1, 0)
    with open_run(tmp_path, slots=2, capture=capture) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state).wait("local", timeout_s=20)
        swapped = spread_out(devices, 2, 1)
        assert checkpointer.restore(swapped).step == 2
        assert all(torch.equal(swapped[name], state[name]) for name in state)
        swapped["t3"] += 1
        swapped["t8"] += 1
        checkpointer.save(3, swapped).wait("local", timeout_s=20)
        assert bool(checkpointer.status().counters.get("left_bytes")) == (capture == "auto")
        assert_restored(checkpointer, swapped, 3)
    other = spread_out(devices, 3, 0)
    with open_run(tmp_path, capture=capture) as checkpointer:  # from disk
        assert checkpointer.restore(other).step == 3
        assert all(torch.equal(other[name], swapped[name]) for name in other)


def test_a_bit_that_flipped_in_what_was_left_is_found(tmp_path: Path, devices: Devices) -> None:
    state = mostly_frozen(devices)
    with open_run(tmp_path, slots=2) as checkpointer:
        saved_twice(checkpointer, state)
        grant = checkpointer._session.next_slot
        assert grant is not None
        checkpointer._saver.ring._slots[grant.inode].data.view[3 << 20] ^= 4
        save = checkpointer.save(3, state)
        with pytest.raises(SaveFailed, match="what lay in its slot was damaged"):
            save.wait("staged", timeout_s=20)
        assert save.skipped
        run = status_of()
        assert run is not None
        assert (run.counters["damaged"], run.counters["called_off"]) == (1, 1)
        checkpointer.save(4, state).wait("local", timeout_s=20)  # training goes on
        for step in (5, 6, 7):
            checkpointer.save(step, state).wait("local", timeout_s=20)
        assert_restored(checkpointer, state, 7)


def test_digests_of_a_slot_that_was_written_by_half_say_nothing(
    tmp_path: Path, devices: Devices
) -> None:
    """Values as they were two saves ago are copied all the same: others have been there since."""
    state = mostly_frozen(devices)
    with open_run(tmp_path, slots=2) as checkpointer:
        saved_twice(checkpointer, state)
        before = state["base"].clone()
        state["base"] += 1
        devices.fake.fail("cuMemcpyDtoHAsync_v2", 719, skip=2)
        told(checkpointer, checkpointer.save(3, state))
        state["base"].copy_(before)
        with pytest.raises(SaveFailed):
            checkpointer.save(4, state)
        checkpointer.save(5, state).wait("local", timeout_s=20)
        assert_restored(checkpointer, state, 5)
