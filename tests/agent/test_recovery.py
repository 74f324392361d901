"""Owners and agents die at bad moments: what was acknowledged is there, nothing is torn."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent_checks import (
    Own,
    Trainers,
    agent_pid,
    kill_agent,
    ram_root,
    status_of,
    steps_in,
    until,
)
from fake_trainer import TrainerProcess, disk

from mtckpt import _inventory, _manifest
from mtckpt.agent import protocol
from mtckpt.agent.protocol import TierConfig
from mtckpt.errors import AgentUnavailable, RunLocked, StepExists
from mtckpt.tiers import LocalTier

# -- the trainer dies ------------------------------------------------------------------------------


def test_a_killed_trainer_resumes_from_ram(
    trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_TAKEOVER_S", "600")  # the death is noticed at once, or never
    first = trainers(tiers=[disk(tmp_path / "d")])
    first.do("open")
    first.do("begin", 1)
    for step in (1, 2, 3):
        first.do("save", step, ["disk"])
    first.kill()
    second = trainers(tiers=[disk(tmp_path / "d")])
    opened = second.do("open")
    assert opened["fenced_pid"] == 0
    assert 3 in steps_in(ram_root(), name="ram")
    until(lambda: 3 in steps_in(tmp_path / "d"))
    with pytest.raises(RunLocked, match="incarnation 1 of this run is known"):
        second.do("begin", 1)
    second.do("begin", 2)
    second.do("save", 4, [])


def test_an_agent_that_nobody_reaches_any_more_lets_another_have_its_memory(
    trainers: Trainers, runtime_dir: Path
) -> None:
    """Its user has logged out, and the directory of the session has gone with its socket."""
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    before = agent_pid()
    shutil.rmtree(runtime_dir)

    def opens() -> bool:
        try:
            first.do("open")
        except AgentUnavailable:
            return False
        return True

    until(opens)
    assert agent_pid() != before
    first.do("save", 2, [])
    assert steps_in(ram_root(), name="ram") == [1, 2]


def test_memory_elsewhere_is_no_way_around_whoever_has_the_run(
    trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went on with slots beside its disk; another job under its name asks for memory."""
    monkeypatch.setenv("MTCKPT_TAKEOVER_S", "0.2")
    tiers = [disk(tmp_path / "d")]
    (tmp_path / "beside").mkdir(mode=0o700)
    first = trainers(tiers=tiers, ram_path=str(tmp_path / "beside"))
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, ["disk"])
    until(lambda: steps_in(tmp_path / "d") == [1])
    with pytest.raises(RunLocked, match="owns this run and is alive"):
        trainers(tiers=tiers).do("open")
    first.do("save", 2, [])
    assert steps_in(tmp_path / "beside", name="ram") == [1, 2]


def test_what_a_dead_trainer_had_finished_is_sealed(trainers: Trainers, tmp_path: Path) -> None:
    first = trainers(tiers=[disk(tmp_path / "d")])
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, ["disk"], True)  # every byte is there, the agent was not told
    first.kill()
    second = trainers(tiers=[disk(tmp_path / "d")])
    opened = second.do("open")
    assert len(opened["finished"]) == 1
    assert opened["finished"][0].startswith("step-000000000002.000001.")
    assert steps_in(ram_root(), name="ram") == [1, 2]
    until(lambda: steps_in(tmp_path / "d") == [2])  # it was due there


def test_what_a_dead_trainer_had_not_finished_is_never_offered(trainers: Trainers) -> None:
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, [], False)
    first.kill()
    second = trainers()
    assert second.do("open")["finished"] == []
    assert steps_in(ram_root(), name="ram") == [1]
    slots = until(lambda: status_of()).slots
    assert [slot.state for slot in slots].count("capturing") == 0
    second.do("begin", 2)
    for step in (2, 3, 4, 5):  # its slots are used again
        second.do("save", step, [])
    assert len(until(lambda: status_of()).slots) == 3


def test_a_forked_worker_keeps_nothing_alive(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_TAKEOVER_S", "600")  # the death is noticed at once, or never
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    child = first.do("fork")
    try:
        first.kill()
        second = trainers()
        second.do("open")
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


# -- two owners ------------------------------------------------------------------------------------


def test_a_live_owner_is_not_displaced(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_TAKEOVER_S", "1.5")
    first, second = trainers(), trainers()
    first.do("open")
    first.do("begin", 1)
    started_s = time.monotonic()
    with pytest.raises(RunLocked) as caught:
        second.do("open")
    assert time.monotonic() - started_s > 1.4
    assert caught.value.details["owner_pid"] == first.pid
    first.do("save", 1, [])  # and it goes on


@pytest.mark.parametrize("how", ["stopped", "orphaned"])
def test_an_owner_that_cannot_mean_it_is_fenced(
    how: str, trainers: Trainers, runtime_dir: Path
) -> None:
    first, second = trainers(), trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, [], True)
    if how == "stopped":
        os.kill(first.pid, signal.SIGSTOP)
    else:
        pytest.importorskip("ctypes")
        _pretend_parent(runtime_dir, first)
    opened = second.do("open")
    assert opened["fenced_pid"] == first.pid
    second.do("begin", 2)
    slots = {slot.slot_id: slot.state for slot in until(lambda: status_of()).slots}
    taken = [slot_id for slot_id, state in slots.items() if state == "capturing"]
    assert taken  # the fenced one's, which is not given out while it lives
    for step in (10, 11, 12, 13):
        second.do("save", step, [])
    states = {slot.slot_id: slot.state for slot in until(lambda: status_of()).slots}
    assert all(states[slot_id] == "capturing" for slot_id in taken)
    if how == "stopped":
        os.kill(first.pid, signal.SIGCONT)
    with pytest.raises(RunLocked) as caught:
        first.do("seal")
    assert caught.value.details["owner_pid"] == second.pid
    assert first.do("changes")["fenced"]["error"] == "RunLocked"
    assert 2 not in steps_in(ram_root(), name="ram")
    first.kill()
    freed = until(lambda: None if _capturing() & set(taken) else status_of())
    assert freed.owner_pid == second.pid
    second.do("save", 14, [])


def _capturing() -> set[str]:
    slots = until(lambda: status_of()).slots
    return {slot.slot_id for slot in slots if slot.state == "capturing"}


def _pretend_parent(runtime_dir: Path, trainer: TrainerProcess) -> None:
    """As after SIGKILL of a launcher: another parent than when the run was opened.

    A real one is in the test of the whole; here the agent is told of another parent, by the file
    that it reads when it is started again.
    """
    kill_agent()
    path = ram_root() / "r" / ".run.json"
    text = path.read_text()
    assert f'"parent_pid":{os.getpid()}' in text
    path.write_text(text.replace(f'"parent_pid":{os.getpid()}', '"parent_pid":999999'))
    until(lambda: status_of())


def test_a_new_checkpointer_in_the_same_process_fences_the_older(own: Own) -> None:
    first = own("r")
    first.open()
    first.begin(1)
    first.save(1)
    seal = first.capture(2, first.slot().grant, [])  # type: ignore[arg-type]  # None fails too
    for number in range(2, 8):  # a notebook's cell, run again and again: no slot is leaked
        newer = own("r")
        newer.open()
        newer.begin(number)
        newer.save(number)
    with pytest.raises(RunLocked, match="taken this run over"):
        first.seal(seal)
    assert first.changes().fenced is not None
    assert len(newer.run_status().slots) <= 3
    newer.close()


def test_the_same_step_twice_is_refused_and_a_repeated_seal_is_not(own: Own) -> None:
    trainer = own("r")
    trainer.open()
    trainer.begin(1)
    slot = trainer.slot().grant
    assert slot is not None
    seal = trainer.capture(5, slot, [])
    first = trainer.seal(seal)
    assert trainer.seal(seal).save == first.save  # the reply was lost: the same answer
    trainer.save_id = lambda step: _manifest.save_id(trainer.incarnation_id, step, 1)  # type: ignore[method-assign]  # another attempt of the same step
    with pytest.raises(StepExists):
        trainer.save(5)
    trainer.close()


# -- the agent dies --------------------------------------------------------------------------------


def test_a_killed_agent_is_replaced_and_knows_everything(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    for step in (1, 2):
        trainer.save(step, ["disk"])
    kill_agent()
    assert trainer.open().finished == []
    status = trainer.run_status()
    assert (status.incarnation, status.owner_pid) == (1, os.getpid())
    assert 2 in status.tiers[0].steps
    for step in (3, 4, 5, 6, 7):
        trainer.save(step, ["disk"])
    trainer.wait_stage(7, "local")
    assert len(trainer.run_status().slots) == 3
    trainer.close()


def test_a_capture_under_way_survives_the_agent(own: Own) -> None:
    trainer = own("r")
    trainer.open()
    trainer.begin(1)
    trainer.save(1)
    slot = trainer.slot().grant
    assert slot is not None
    trainer.held[slot.slot_id] = slot.inode
    kill_agent()
    trainer.open()
    seal = trainer.capture(2, slot, [])  # the same files, by the same inode
    trainer.seal(seal)
    assert steps_in(ram_root(), name="ram") == [1, 2]
    for step in range(3, 9):
        trainer.save(step)
    trainer.close()


def test_what_was_owed_is_done_by_the_next_agent(own: Own, tmp_path: Path) -> None:
    blocked = tmp_path / "d"
    blocked.write_text("in the way")  # a tier that cannot be opened
    trainer = own("r", [disk(blocked)])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    trainer.save(2, ["disk"])
    kill_agent()
    blocked.unlink()
    agent_pid()  # nobody opens the run: the record itself says what is due
    until(lambda: steps_in(blocked) == [2] if blocked.is_dir() else False)


@pytest.mark.parametrize("finished", [True, False])
def test_trainer_and_agent_die_together(finished: bool, trainers: Trainers, tmp_path: Path) -> None:
    first = trainers(tiers=[disk(tmp_path / "d")])
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, ["disk"])
    first.do("capture", 2, ["disk"], finished)
    pid = agent_pid()
    os.kill(pid, signal.SIGKILL)
    first.kill()
    until(lambda: not Path(f"/proc/{pid}").exists())  # while it ends it may take connections
    second = trainers(tiers=[disk(tmp_path / "d")])
    opened = second.do("open")
    assert len(opened["finished"]) == finished
    until(lambda: steps_in(ram_root(), name="ram") == ([1, 2] if finished else [1]))
    newest = 2 if finished else 1
    until(lambda: newest in steps_in(tmp_path / "d"))


def test_a_fenced_owner_stays_fenced_when_the_agent_is_replaced(trainers: Trainers) -> None:
    first, second = trainers(), trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("capture", 2, [], False)
    os.kill(first.pid, signal.SIGSTOP)
    second.do("open")
    second.do("begin", 2)
    second.do("save", 3, [])
    kill_agent()
    second.do("open")
    for step in (4, 5, 6):
        second.do("save", step, [])
    os.kill(first.pid, signal.SIGCONT)
    with pytest.raises(RunLocked):
        first.do("seal")
    assert steps_in(ram_root(), name="ram")[-1] == 6


def test_a_call_to_an_agent_that_died_is_an_error_and_opening_again_helps(own: Own) -> None:
    trainer = own("r")
    trainer.open()
    trainer.begin(1)
    kill_agent()
    with pytest.raises(AgentUnavailable):
        trainer.save(1)
    trainer.open()
    trainer.save(1)
    trainer.close()


def test_sigterm_ends_it_and_leaves_the_rest_to_files(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    pid = agent_pid()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert steps_in(ram_root(), name="ram") == [1]
    trainer.open()
    trainer.wait_stage(1, "local")
    trainer.close()


# -- namespaces and stuck things -------------------------------------------------------------------

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable)


@pytest.mark.root
def test_an_agent_in_another_pid_namespace_sees_a_death(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_TAKEOVER_S", "0.5")
    if subprocess.run([*UNSHARE, "-c", ""], capture_output=True, check=False).returncode != 0:
        pytest.skip("pid namespaces cannot be made here")
    host = trainers("host", program=UNSHARE)  # starts the agent in there
    host.do("open")
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, [], True)
    with pytest.raises(RunLocked):
        trainers().do("open")  # alive, though no /proc of the agent's shows it
    first.kill()
    second = trainers()
    started_s = time.monotonic()
    assert len(second.do("open")["finished"]) == 1
    assert time.monotonic() - started_s < 4.0
    assert steps_in(ram_root(), name="ram") == [1, 2]


# -- what a tier still lacked ----------------------------------------------------------------------


def test_small_files_that_a_tier_lacked_come_there_after_the_agents_death(
    own: Own, tmp_path: Path
) -> None:
    """The start of the run, and metrics that were reported: what is newest and what is best in a
    store is read from them, where nothing else is left."""
    place = tmp_path / "store"
    place.write_bytes(b"no directory can be made here")
    trainer = own("r", [TierConfig("store", "store", f"file://{place}")])
    trainer.open()
    assert "store" in trainer.begin(1).owed
    trainer.save(1, ["store"])
    trainer.call("report", protocol.Report(trainer.holder, 1, {"loss": 0.5}), protocol.Done)
    kill_agent()
    place.unlink()
    trainer.open()
    trainer.wait_stage(1, "durable")
    trainer.close()
    tier = LocalTier(place, read_only=True)
    found = _inventory.scan(tier, "r")
    tier.close()
    assert [(i.number, i.id) for i in found.incarnations] == [(1, trainer.incarnation_id)]
    assert [save.metrics for save in found.saves.values()] == [{"loss": 0.5}]
