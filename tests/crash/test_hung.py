"""Something hangs: agent, trainer, data process, disk. Every call ends, and says who it is.

SIGSTOP stands for a process that the kernel does not run any more; a FUSE file system that answers
nothing stands for a dead mount, where whoever asks is stuck in the kernel and cannot be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import agent_pid, data_processes, status_of, until
from hung_fs import HungDisk
from shard_maker import RUN, make_shard, put_shard

import mtckpt
from mtckpt import _session
from mtckpt._slots import BESIDE
from mtckpt.agent import address, work
from mtckpt.agent.pool import Pool
from mtckpt.errors import (
    AgentUnavailable,
    CheckpointError,
    CloseFailed,
    RestoreUnavailable,
    SaveFailed,
    TierUnavailable,
    WaitTimeout,
)

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

# What a deadline may be missed by on a machine that does ten other things.
SLACK_S = 10.0


@pytest.fixture
def stop() -> Iterator[Callable[[int], Callable[[], None]]]:
    """Stops a process; what it returns lets it go on."""
    stopped: list[int] = []

    def let_go_on(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def stop_process(pid: int) -> Callable[[], None]:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        return lambda: let_go_on(pid)

    yield stop_process
    for pid in stopped:
        let_go_on(pid)


TRAINER = """
import sys
import numpy as np
import mtckpt

state = {"w": np.zeros(100_000, int), "note": "at 0"}
c = mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), mtckpt.Disk(sys.argv[1], every=1)], timeout_s=20)
step = c.restore(state).next_step
while True:
    step += 1
    state["w"][:] = step
    state["note"] = f"at {step}"
    try:
        c.save(step, state).wait("local", timeout_s=20)
    except mtckpt.errors.CheckpointError as error:
        print(type(error).__name__, flush=True)
        break
    print(step, flush=True)
"""


class Trainer:
    """A process that saves step after step, and says each that is on disk, then how it ended."""

    def __init__(self, disk: Path, scratch: Path) -> None:
        self._path = scratch / "said"
        with self._path.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TRAINER, str(disk)],
                stdout=said,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.pid = self.process.pid
        until(lambda: len(self.said()) >= 2, 60.0)

    def said(self) -> list[str]:
        return self._path.read_text().split()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@pytest.fixture
def trainer(runtime_dir: Path, tmp_path: Path) -> Iterator[Callable[[Path], Trainer]]:
    started: list[Trainer] = []

    def start(disk: Path) -> Trainer:
        started.append(Trainer(disk, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HungDisk]:
    pytest.importorskip("mfusepy", reason="needs mfusepy to mount a file system that hangs")
    disk = HungDisk(tmp_path)
    yield disk
    disk.close()


@contextlib.contextmanager
def ends_within(limit_s: float) -> Iterator[None]:
    started_s, waited_s = time.monotonic(), _waited_for_processors_s()
    yield
    took_s = time.monotonic() - started_s
    slack_s = SLACK_S + _waited_for_processors_s() - waited_s
    assert took_s < limit_s + slack_s, f"took {took_s:.1f} s where {limit_s:g} s are allowed"


def _waited_for_processors_s() -> float:
    """For how long, since this machine started, somebody had to wait for a processor. 0 where the
    kernel does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/pressure/cpu").read_text().split()[4].removeprefix("total=")) / 1e6
    return 0.0


def open_run(path: Path, **settings: Any) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(path, every=1)]
    return mtckpt.Checkpointer("r", tiers, **{"timeout_s": 2.0, "max_stall_s": 0.3, **settings})


def state_of(step: int) -> dict[str, Any]:
    return {"w": np.full(100_000, step), "note": f"at {step}"}


def is_state(state: dict[str, Any], step: int) -> bool:
    return bool((state["w"] == step).all()) and state["note"] == f"at {step}"


def errors_of(error: CloseFailed) -> str:
    return "\n".join(f"{type(e).__name__}: {e}" for e in error.errors)


# -- the agent -------------------------------------------------------------------------------------

Stop = Callable[[int], Callable[[], None]]


def test_a_stopped_agent_is_named_by_restore(tmp_path: Path, stop: Stop) -> None:
    with open_run(tmp_path / "d", timeout_s=20.0) as c:
        c.save(1, state_of(1)).wait("local", timeout_s=20)
    agent_runs = open_run(tmp_path / "other", timeout_s=20.0)
    agent_runs.save(1, state_of(1)).wait("local", timeout_s=20)  # so that the agent stays
    go_on = stop(agent_pid())
    late = mtckpt.Checkpointer("late", [mtckpt.Disk(tmp_path / "d")], timeout_s=1.0)
    with (
        ends_within(2.0),
        pytest.raises(AgentUnavailable, match="did not answer in time") as caught,
    ):
        late.restore({"w": np.zeros(100_000)})
    assert caught.value.details["socket"]
    go_on()
    assert not late.restore({"w": np.zeros(100_000)})
    late.close()
    agent_runs.close(timeout_s=20)


@pytest.mark.torture
def test_a_stopped_agent_costs_saves_and_never_the_loop(
    tmp_path: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than every deadline: saves are called off or fail as typed errors, and go on after."""
    monkeypatch.setattr(_session, "_LISTEN_S", 1.0)
    c = open_run(tmp_path / "d", timeout_s=1.0, on_failure="warn")
    until(lambda: c.save(int(time.monotonic() * 100), state_of(1)).skipped is None)
    go_on = stop(agent_pid())
    skipped = []
    first: mtckpt.Save | None = None
    deadline_s = time.monotonic() + 8.0
    step = int(time.monotonic() * 100) + 1
    while time.monotonic() < deadline_s:
        with ends_within(0.3), contextlib.suppress(RuntimeWarning):
            save = c.save(step, state_of(step))
        first = first or save
        if save.skipped is not None:
            skipped.append(save.skipped)
        step += 1
        time.sleep(0.2)
    assert first is not None
    with ends_within(0.2), pytest.raises((WaitTimeout, SaveFailed)):
        first.wait("staged", timeout_s=0.2)
    assert skipped
    assert all("agent" in text for text in skipped), skipped
    go_on()

    def goes_on() -> bool:
        nonlocal step
        step += 1
        with contextlib.suppress(RuntimeWarning, CheckpointError):
            save = c.save(step, state_of(step))
            save.wait("local", timeout_s=20)
            return True
        time.sleep(0.1)
        return False

    until(goes_on, 30.0)
    c.close(timeout_s=20)


def test_an_agent_that_cannot_be_started_costs_saves_and_never_the_loop(tmp_path: Path) -> None:
    """It died, and somebody sits on the lock of its start: who waits holds up nobody else."""
    c = open_run(tmp_path / "d", timeout_s=25.0)
    c.save(1, state_of(1)).wait("local", timeout_s=20)
    pid = agent_pid()
    with address.locked(address.find(), 5.0):
        os.kill(pid, signal.SIGKILL)
        for step in range(2, 5):
            c._session.next_slot = None  # as when no slot was free after the save before
            time.sleep(0.3)
            with ends_within(0.3):
                assert c.save(step, state_of(step)).skipped
    until(lambda: c.save(int(time.monotonic() * 100), state_of(2)).skipped is None, 30.0)
    c.close(timeout_s=30)


def test_close_with_a_stopped_agent_ends_and_names_it(tmp_path: Path, stop: Stop) -> None:
    c = open_run(tmp_path / "d", timeout_s=20.0)
    c.save(1, state_of(1)).wait("local", timeout_s=20)
    stop(agent_pid())
    with ends_within(0.5), pytest.raises(CloseFailed) as caught:
        c.close(timeout_s=0.5)
    assert "AgentUnavailable" in errors_of(caught.value)


# -- a trainer -------------------------------------------------------------------------------------


def test_a_stopped_trainer_is_fenced_by_the_next_start(
    tmp_path: Path, stop: Stop, trainer: Callable[[Path], Trainer]
) -> None:
    old = trainer(tmp_path / "d")
    go_on = stop(old.pid)
    last = int(old.said()[-1])
    with open_run(tmp_path / "d", timeout_s=20.0) as c:
        state = state_of(0)
        restored = c.restore(state)
        assert restored.step is not None
        assert restored.step >= last
        assert is_state(state, restored.step)
        c.save(restored.next_step, state).wait("local", timeout_s=20)
        go_on()
        assert old.process.wait(30) == 0
        assert old.said()[-1] in ("RunLocked", "SaveFailed")
        assert c.steps()[-1].step == restored.next_step


# -- data processes --------------------------------------------------------------------------------


@pytest.mark.torture
def test_a_stopped_process_of_ram_is_replaced(
    tmp_path: Path, ram_dir: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "2.0")
    c = open_run(tmp_path / "d", timeout_s=20.0, on_failure="warn")
    c.save(1, state_of(1)).wait("local", timeout_s=20)
    root = next(path for path in data_processes() if path.startswith(str(ram_dir)))
    stop(data_processes()[root])
    step = 1

    def goes_on() -> bool:
        nonlocal step
        step += 1
        with ends_within(0.8), contextlib.suppress(RuntimeWarning):
            save = c.save(step, state_of(step))
        with contextlib.suppress(SaveFailed, WaitTimeout):
            save.wait("local", timeout_s=0.5)
            return True
        assert c.status().run == "r"
        return False

    until(goes_on, 30.0)
    c.close(timeout_s=20)


@pytest.mark.torture
def test_a_stopped_process_of_ram_calls_the_first_save_off(
    tmp_path: Path, ram_dir: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "1.0")
    c = open_run(tmp_path / "d", timeout_s=20.0)
    assert not c.restore(state_of(0))
    root = next(path for path in data_processes() if path.startswith(str(ram_dir)))
    stop(data_processes()[root])
    with ends_within(1.0):
        skipped = c.save(1, state_of(1)).skipped
    assert skipped is not None
    assert "ram did not answer" in skipped
    until(lambda: c.save(int(time.monotonic() * 100), state_of(2)).skipped is None, 30.0)
    c.close(timeout_s=30)


# -- a disk ----------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.root
def test_a_hung_disk_is_owed_and_catches_up(
    disk: HungDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "1.0")
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "2.0")
    path, fine = disk.path / "d", tmp_path / "fine"
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(path, every=1), mtckpt.Disk(fine, every=1)]
    c = mtckpt.Checkpointer("r", tiers, timeout_s=20.0, max_stall_s=5.0)
    c.save(1, state_of(1)).wait("local", timeout_s=20)
    until(lambda: all(not tier["owed"] for tier in c.status().tiers))
    disk.hang()
    for step in range(2, 8):
        save = c.save(step, state_of(step))
        assert save.skipped is None
        save.wait("local", timeout_s=20)  # by the other disk
    hung = until(lambda: next((t for t in c.status().tiers if t["problem"]), None))
    assert hung["label"] == "disk"
    assert hung["path"] == str(path)
    assert 7 in hung["owed"]
    assert "disk did not answer" in hung["problem"]
    with ends_within(2.0), pytest.raises(CloseFailed, match="disk") as caught:
        c.close(timeout_s=2.0)
    assert "did not answer" in errors_of(caught.value)
    found = status_of()
    assert found is not None
    assert 7 in next(tier for tier in found.tiers if tier.label == "disk").owed
    disk.free()
    until(lambda: (run := status_of()) is None or not run.tiers[1].owed, 60.0)
    last = {step.step: step for step in mtckpt.steps(path / "r")}[7]
    assert last.damaged == ()


def owed_to_disk() -> list[int]:
    found = status_of()
    return next(tier.owed for tier in found.tiers if tier.label == "disk") if found else []


@pytest.mark.fuse
@pytest.mark.root
def test_a_hung_disk_does_not_hold_up_a_restore(
    disk: HungDisk,
    trainer: Callable[[Path], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RAM has the newest step: that is taken. RAM has none: it is said which disk is silent."""
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "5.0")
    path = disk.path / "d"
    killed = trainer(path)
    disk.hang()
    written = max(step.step for step in mtckpt.steps(disk.backing / "d" / "r"))
    until(lambda: max(owed_to_disk(), default=0) > written)  # or memory could be freed below
    killed.kill()
    last = int(killed.said()[-1])
    c = open_run(path, timeout_s=1.0)
    state = state_of(0)
    with ends_within(3.0):
        restored = c.restore(state)
    assert restored.step is not None
    assert restored.step >= last
    assert set(restored.sources) == {"ram"}
    assert is_state(state, restored.step)
    assert str(path) in restored.skipped["tier disk"]
    with ends_within(4.0):
        c.close(timeout_s=3)
    assert f"memory is not free yet: tier disk at {path}" in caplog.text
    disk.free()
    until(lambda: status_of() is None, 60.0)  # the disk has it, so RAM is freed

    late = open_run(path, timeout_s=1.0)
    disk.hang()
    before = state_of(0)
    with ends_within(3.0), pytest.raises(RestoreUnavailable) as caught:
        late.restore(before)
    assert str(path) in str(caught.value)
    assert "disk" in str(caught.value)
    assert "slots that an earlier start may have on disk are passed over" in caplog.text
    assert is_state(before, 0)
    with ends_within(3.0), pytest.raises(RestoreUnavailable, match=str(path)):
        late.restore(before, source=path / "r")
    disk.free()
    assert late.restore(before).step == restored.step
    late.close(timeout_s=30)

    disk.die()  # "Transport endpoint is not connected": not "there is nothing"
    dead = open_run(path, timeout_s=1.0)
    with ends_within(3.0), pytest.raises(RestoreUnavailable, match=str(path)):
        dead.restore(before)
    with pytest.raises(RestoreUnavailable, match="not connected"):
        dead.restore(before, source=path / "r")


@pytest.mark.fuse
@pytest.mark.root
def test_slots_on_a_hung_disk_call_saves_off_and_say_which_it_is(
    disk: HungDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "2.0")
    path = disk.path / "d"
    tiers = [mtckpt.Ram(path / BESIDE, every=1), mtckpt.Disk(tmp_path / "fine", every=1000)]
    c = mtckpt.Checkpointer("r", tiers, timeout_s=20.0, max_stall_s=1.0)
    for step in (1, 2):
        c.save(step, state_of(step)).wait("staged", timeout_s=20)
    assert c._session.wait_idle(20)
    c._link.timeout_s = 2.0
    disk.hang()
    for step in (3, 4):
        with ends_within(8.0):
            save = c.save(step, state_of(step))
        assert save.skipped is not None
        assert step > 3 or str(path) in save.skipped
    with ends_within(8.0), pytest.raises(RestoreUnavailable, match=str(path)):
        c.restore(state_of(0))
    disk.free()
    steps = itertools.count(5)
    last = until(lambda: s if (s := next(steps)) and c.save(s, state_of(s)).skipped is None else 0)
    c.close(timeout_s=20)
    assert mtckpt.steps(tmp_path / "fine" / "r")[-1].step == last


@pytest.mark.torture
@pytest.mark.fuse
@pytest.mark.root
def test_a_disk_that_hangs_before_a_flush_is_noticed_however_large_the_flush(
    disk: HungDisk, tmp_path: Path, ram_dir: Path
) -> None:
    shard = make_shard(tmp_path)
    ram = work.TierRef("ram", str(ram_dir / "root"))
    target = work.TierRef("disk", str(disk.path / "d"))
    put_shard(Path(ram.path), shard)
    flush = work.Flush(RUN, str(shard.name), 0, ram, target)

    async def body() -> None:
        pool = Pool()
        try:
            await pool.call(work.Scan(target), 30)
            disk.hang()
            with ends_within(1.0), pytest.raises(TierUnavailable, match="did not answer Flush"):
                await pool.call(flush, 600, stall_s=1.0)
            disk.free()
            assert isinstance(await pool.call(flush, 600, stall_s=30.0), work.Flushed)
        finally:
            await pool.close()

    asyncio.run(body())


@pytest.mark.torture
@pytest.mark.fuse
@pytest.mark.root
def test_an_agent_leaves_though_a_disk_hangs(
    disk: HungDisk, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "60")
    c = open_run(disk.path / "d", timeout_s=20.0)
    c.save(1, state_of(1)).wait("local", timeout_s=20)
    disk.hang()
    c.save(2, state_of(2)).wait("staged", timeout_s=20)
    pid = agent_pid()
    os.kill(pid, signal.SIGTERM)
    with ends_within(12.0):  # what is being written gets ten seconds
        until(lambda: not (runtime_dir / "agent.pid").exists(), 30.0)
        until(lambda: not Path(f"/proc/{pid}").exists(), 30.0)
    disk.free()
    c.close(timeout_s=30)
    assert {step.step for step in mtckpt.steps(disk.path / "d" / "r")} >= {2}
