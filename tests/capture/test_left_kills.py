"""Whoever is killed while a save leaves chunks as they lie in the slot, or knows nothing of such
chunks: no step is lost or wrong.

Trainers of their own processes, a real agent, a fake driver.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from agent_checks import kill_agent, until
from device_trainer import (
    BETWEEN,
    CHANGED,
    NUM_CHUNKS,
    State,
    killed,
    make_state,
    open_run,
    put_on_device,
    saved_twice,
    signal_all,
    values_at,
    when_sent,
)
from fake_cuda import FakeCuda, Mode

from mtckpt._shard import CHUNK_BYTES
from mtckpt.agent import protocol
from mtckpt.errors import SaveFailed

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

ALL_BYTES = NUM_CHUNKS * CHUNK_BYTES


@pytest.fixture
def state(fake_cuda: FakeCuda, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    fake_cuda.mode(Mode.LAZY)
    found = make_state()
    put_on_device(fake_cuda, driver, monkeypatch.setattr, found)
    yield found
    for array in found.values():
        fake_cuda.disown(array.ctypes.data)


def at_step(step: int) -> State:
    wanted = make_state()
    for each in range(1, step + 1):
        values_at(each, wanted)
    return wanted


def assert_same(state: State, wanted: State) -> None:
    assert all(np.array_equal(state[name], wanted[name]) for name in wanted)


def slot_of_base(ram_dir: Path, chunks: tuple[int, ...]) -> tuple[Path, int]:
    """The file that holds the base as it is at the third step in these chunks, and at the second
    one in all others; and where the base begins in it."""
    base, third = make_state()["base"], at_step(3)["base"]
    for chunk in chunks:
        base[chunk * CHUNK_BYTES] = third[chunk * CHUNK_BYTES]
    wanted = base.tobytes()
    found = {path: path.read_bytes().find(wanted) for path in ram_dir.rglob(".slots/*.safetensors")}
    return next((path, at) for path, at in found.items() if at >= 0)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_slot_that_a_dead_trainer_drained_to_by_half_is_copied_whole(
    tmp_path: Path, ram_dir: Path, fake_cuda: FakeCuda, state: State
) -> None:
    killed(fake_cuda, tmp_path, "draining")
    slot_of_base(ram_dir, CHANGED[:1])  # the first stretch is there, the second is not
    with open_run(tmp_path) as checkpointer:
        restored = checkpointer.restore(state)
        assert (restored.step, set(restored.sources)) == (2, {"ram"})
        assert_same(state, at_step(2))
        fake_cuda.copied_out()
        # The base is again what the digests in that slot were of.
        checkpointer.save(3, state).wait("local", timeout_s=30)
        assert fake_cuda.copied_out() >= ALL_BYTES
        assert not checkpointer.status().counters.get("left_bytes")
        state["tuned"] += 1
        checkpointer.save(4, state).wait("local", timeout_s=30)
        # The other slot was whole, whoever had filled it.
        assert checkpointer.status().counters["left_bytes"] >= ALL_BYTES
        wanted = {name: array.copy() for name, array in state.items()}
        state["base"][:] = 0
        restored = checkpointer.restore(state)
        assert (restored.step, set(restored.sources)) == (4, {"ram"})
        assert_same(state, wanted)


@pytest.mark.parametrize("is_hurt", [False, True], ids=["sound", "hurt"])
def test_what_a_dead_trainer_left_is_looked_at_before_it_counts(
    tmp_path: Path, ram_dir: Path, fake_cuda: FakeCuda, state: State, is_hurt: bool
) -> None:
    """Its seal was on its way to who looks at what was left."""
    killed(fake_cuda, tmp_path, "sealing")
    path, at = slot_of_base(ram_dir, CHANGED)
    if is_hurt:
        flip(path, at + BETWEEN * CHUNK_BYTES)
    signal_all(signal.SIGCONT)
    with open_run(tmp_path) as checkpointer:
        restored = checkpointer.restore(state)
        assert (restored.step, set(restored.sources)) == (2 if is_hurt else 3, {"ram"})
        assert_same(state, at_step(2 if is_hurt else 3))
        assert checkpointer.status().counters.get("damaged", 0) == int(is_hurt)


@pytest.mark.parametrize("is_hurt", [False, True], ids=["sound", "hurt"])
def test_what_was_left_is_looked_at_whichever_agent_does_it(
    tmp_path: Path,
    ram_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    is_hurt: bool,
) -> None:
    """The first one is killed while it has a seal to look at."""
    with open_run(tmp_path) as checkpointer:
        saved_twice(checkpointer, state)
        stopped = signal_all(signal.SIGSTOP)
        sent = threading.Event()
        when_sent("seal", sent.set, monkeypatch.setattr)
        values_at(3, state)
        save = checkpointer.save(3, state)
        assert sent.wait(30)
        if is_hurt:
            path, at = slot_of_base(ram_dir, CHANGED)
            flip(path, at + BETWEEN * CHUNK_BYTES)
        kill_agent()  # its data processes end with it
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stopped))
        if is_hurt:
            with pytest.raises(SaveFailed, match="what lay in its slot was damaged"):
                save.wait("staged", timeout_s=30)
            assert save.skipped
            assert checkpointer.status().counters["called_off"] == 1
        else:
            save.wait("local", timeout_s=30)
            assert checkpointer.status().counters["left_bytes"] == ALL_BYTES - 2 * CHUNK_BYTES
        step = 2 if is_hurt else 3
        restored = checkpointer.restore(state)
        assert (restored.step, set(restored.sources)) == (step, {"ram"})
        assert_same(state, at_step(step))
        checkpointer.save(5, state).wait("local", timeout_s=30)


def test_an_agent_that_would_not_look_at_what_was_left_is_given_all(
    tmp_path: Path, fake_cuda: FakeCuda, state: State
) -> None:
    with open_run(tmp_path) as checkpointer:
        saved_twice(checkpointer, state)
        told = msgspec.to_builtins(checkpointer._session.open())
        told.pop("checks_left", None)  # one from before there was that does not say it
        checkpointer._session.opened = msgspec.convert(told, protocol.Opened)
        fake_cuda.copied_out()
        values_at(3, state)
        checkpointer.save(3, state).wait("local", timeout_s=30)
        assert fake_cuda.copied_out() >= ALL_BYTES
        assert not checkpointer.status().counters.get("left_bytes")
        assert checkpointer.restore(state).step == 3
        assert_same(state, at_step(3))
