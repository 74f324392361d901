"""Owners, agents and disks die at bad moments; what was acknowledged is there, nothing is torn."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import SIZE_BYTES, FakeTrainer, TrainerProcess, body_of, disk

from mtckpt import _inventory, _manifest
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.spawn import ensure_agent
from mtckpt.errors import AgentUnavailable, RunLocked, StepExists, TierFull
from mtckpt.tiers import LocalTier


@pytest.fixture
def trainers(runtime_dir: Path, ram_dir: Path) -> Iterator[Callable[..., TrainerProcess]]:
    started: list[TrainerProcess] = []

    def start(run: str = "r", tiers: list[TierConfig] | None = None, **options: Any) -> Any:
        started.append(TrainerProcess(run, tiers, **options))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.fixture
def own(runtime_dir: Path, ram_dir: Path) -> Iterator[Callable[..., FakeTrainer]]:
    """Trainers in this process."""
    made: list[FakeTrainer] = []

    def make(*arguments: Any, **options: Any) -> FakeTrainer:
        made.append(FakeTrainer(*arguments, **options))
        return made[-1]

    yield make
    for trainer in made:
        trainer.client.close()


Trainers = Callable[..., TrainerProcess]
Own = Callable[..., FakeTrainer]


def agent_pid() -> int:
    with AgentClient(ensure_agent(20.0), 20.0) as client:
        return client.call("/status", None, protocol.AgentStatus).pid


def kill_agent() -> None:
    pid = agent_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())


def status_of(run: str = "r") -> protocol.RunStatus | None:
    with AgentClient(ensure_agent(20.0), 20.0) as client:
        found = client.call("/status", None, protocol.AgentStatus)
    return next((r for r in found.runs if r.run == run), None)


def until(what: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)
    return found


def steps_in(root: Path, run: str = "r", *, name: str = "disk") -> list[int]:
    """Steps that are whole in a tier, read without the agent and byte by byte."""
    tier = LocalTier(root, name=name, sync=False, read_only=True)
    try:
        inventory = _inventory.scan(tier, _manifest.run_key(run))
    finally:
        tier.close()
    steps = []
    for save in inventory.saves.values():
        if not save.records:
            continue
        assert save.problems == []
        assert save.complete
        path = root / _manifest.run_key(run) / str(save.name) / _manifest.shard_file(0)
        data = path.read_bytes()
        body = body_of(save.name.step, len(data) - save.records[0].shard.data_start)
        assert data.endswith(body), f"{save.name} is torn"
        steps.append(save.name.step)
    return sorted(steps)


def ram_root() -> Path:
    return Path(protocol.ram_base())


# -- the trainer dies ------------------------------------------------------------------------------


def test_a_killed_trainer_resumes_from_ram(trainers: Trainers, tmp_path: Path) -> None:
    first = trainers(tiers=[disk(tmp_path / "d")])
    first.do("open")
    first.do("begin", 1)
    for step in (1, 2, 3):
        first.do("save", step, ["disk"])
    first.kill()
    second = trainers(tiers=[disk(tmp_path / "d")])
    started_s = time.monotonic()
    opened = second.do("open")
    assert time.monotonic() - started_s < 2.0  # the death was noticed at once
    assert opened["fenced_pid"] == 0
    assert 3 in steps_in(ram_root(), name="ram")
    until(lambda: 3 in steps_in(tmp_path / "d"))
    with pytest.raises(RunLocked, match="incarnation 1 of this run is known"):
        second.do("begin", 1)
    second.do("begin", 2)
    second.do("save", 4, [])


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


def test_a_forked_worker_keeps_nothing_alive(trainers: Trainers) -> None:
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    child = first.do("fork")
    try:
        first.kill()
        second = trainers()
        started_s = time.monotonic()
        second.do("open")
        assert time.monotonic() - started_s < 2.0
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


# -- two owners ------------------------------------------------------------------------------------


def test_a_live_owner_is_not_displaced(trainers: Trainers) -> None:
    first, second = trainers(), trainers()
    first.do("open")
    first.do("begin", 1)
    started_s = time.monotonic()
    with pytest.raises(RunLocked) as caught:
        second.do("open")
    assert 4.0 < time.monotonic() - started_s < 15.0
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


# -- tiers -----------------------------------------------------------------------------------------


def test_slots_run_out_and_say_why(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    grants = [trainer.slot().grant for _ in range(3)]
    assert all(grants)
    started_s = time.monotonic()
    none = trainer.slot(wait_s=0.3)
    assert none.grant is None
    assert 0.25 < time.monotonic() - started_s < 5.0
    assert none.reason.count("one is captured") == 3
    assert grants[0] is not None
    trainer.call("release", protocol.Release(trainer.holder, grants[0].slot_id), protocol.Done)
    assert trainer.slot(wait_s=0.0).grant is not None
    trainer.close()


def test_another_shape_gets_new_slots_while_the_old_ones_stay(own: Own, ram_dir: Path) -> None:
    old = own("r")
    old.open()
    old.begin(1)
    for step in (1, 2, 3):
        old.save(step)
    new = own("r", size_bytes=2 * SIZE_BYTES)
    new.open()
    new.begin(2)
    slot = new.slot().grant
    assert slot is not None
    assert 3 in steps_in(ram_root(), name="ram")  # until the new one's first save is complete
    new.seal(new.capture(4, slot, []))
    new.save(5)
    until(lambda: steps_in(ram_root(), name="ram") == [4, 5])
    sizes = {slot.size_bytes for slot in new.run_status().slots}
    assert sizes == {new.layout.size_bytes}
    new.close()


def test_no_room_is_typed_and_has_the_arithmetic(own: Own) -> None:
    trainer = own("r", size_bytes=3 * 2**44)
    trainer.open()
    trainer.begin(1)
    with pytest.raises(TierFull) as caught:
        trainer.slot()
    assert int(str(caught.value.details["needed_bytes"])) > 2**44
    assert trainer.run_status().slots == []
    trainer.close()


def test_a_tier_that_refuses_is_reported_once_and_tried_again(own: Own, tmp_path: Path) -> None:
    blocked = tmp_path / "d"
    blocked.write_text("in the way")
    trainer = own("r", [disk(blocked)])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    change = trainer.wait(1, lambda c: c.failed or c.owed)
    assert "staged" in change.stages
    assert "disk" in {**change.failed, **change.owed}
    blocked.unlink()
    trainer.save(2, ["disk"])
    trainer.wait_stage(2, "local")
    assert trainer.run_status().tiers[1].problem == ""
    trainer.close()


def test_retention_keeps_what_the_rule_says(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d", keep=2)])
    trainer.open()
    trainer.begin(1)
    for step in range(1, 8):
        trainer.save(step, ["disk"])
        trainer.wait_stage(step, "local")
    until(lambda: steps_in(tmp_path / "d") == [6, 7])
    until(lambda: trainer.run_status().counters["deleted"] == 5)
    trainer.close()


def test_damage_is_found_healed_and_told(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    sealed = trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    key = f"r/{sealed.save}/{_manifest.shard_file(0)}"
    path = tmp_path / "d" / key
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    trainer.call("damage", protocol.Damage("disk", key, "a reader said so"), protocol.Done)
    until(lambda: trainer.run_status().counters.get("healed"))
    assert steps_in(tmp_path / "d") == [1]
    names = trainer.client.text("/events?follow=0").splitlines()
    assert any("save.damaged" in n for n in names)
    assert any("save.healed" in n and '"source": "ram"' in n for n in names)
    for hostile in ("r/../../etc/passwd", "x", "r/step-1/rank-00000.json", f"r/{sealed.save}/../x"):
        trainer.call("damage", protocol.Damage("disk", hostile, ""), protocol.Done)
    trainer.save(2)
    trainer.close()


def test_the_scrubber_finds_and_heals_ram(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_SCRUB_S", "0.2")
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    sealed = trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    path = ram_root() / "r" / sealed.save / _manifest.shard_file(0)
    with open(path, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(100))
    until(lambda: trainer.run_status().counters.get("healed"))
    assert steps_in(ram_root(), name="ram") == [1]
    trainer.close()


def test_metrics_known_later_go_where_the_save_is(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    sealed = trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    trainer.call("report", protocol.Report(trainer.holder, 1, {"loss": 0.25}), protocol.Done)
    for root in (ram_root(), tmp_path / "d"):
        tier = LocalTier(root, read_only=True, sync=False)
        (save,) = _inventory.scan(tier, "r").saves.values()
        tier.close()
        assert save.metrics == {"loss": 0.25}
        assert str(save.name) == sealed.save
    trainer.close()


# -- the end ---------------------------------------------------------------------------------------


def test_close_frees_ram_once_a_slower_tier_has_it(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1)  # due nowhere but in RAM
    trainer.flush()
    trainer.close()
    until(lambda: not (ram_root() / "r").exists())
    assert steps_in(tmp_path / "d") == [1]
    assert status_of() is None


def test_close_keeps_ram_while_nothing_else_has_it(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.3")
    trainer = own("r")
    trainer.open()
    trainer.begin(1)
    trainer.save(1)
    trainer.close()
    time.sleep(1.0)
    assert steps_in(ram_root(), name="ram") == [1]
    status = until(lambda: status_of())
    assert not status.owner_alive
    with AgentClient(ensure_agent(5.0), 5.0) as client:
        removed = client.call("/v1/runs/r/rm", protocol.Remove(), protocol.Removed)
    assert len(removed.removed) == 1
    assert not (ram_root() / "r").exists()


def test_ram_of_an_owner_that_never_comes_back_is_freed(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_RAM_TTL_S", "1.0")
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.5")
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    pid = agent_pid()
    first.kill()
    until(lambda: not (ram_root() / "r").exists())
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_removing_a_run_that_is_alive_is_refused(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    for step in (1, 2):
        trainer.save(step, ["disk"])
        trainer.wait_stage(step, "local")
    with pytest.raises(RunLocked, match="is alive"):
        trainer.call("rm", protocol.Remove(), protocol.Removed)
    removed = trainer.call("rm", protocol.Remove(1, ["disk"]), protocol.Removed)
    assert removed.removed == [next(r for r in removed.removed if "step-000000000001." in r)]
    assert steps_in(tmp_path / "d") == [2]
    trainer.close()


def test_two_runs_do_not_touch_each_other(own: Own, tmp_path: Path) -> None:
    first, second = own("a", [disk(tmp_path / "d")]), own("b", [disk(tmp_path / "d")])
    for trainer in (first, second):
        trainer.open()
        trainer.begin(1)
        trainer.save(1, ["disk"])
        trainer.wait_stage(1, "local")
    first.close()
    until(lambda: not (ram_root() / "a").exists())
    assert steps_in(ram_root(), "b", name="ram") == [1]
    assert steps_in(tmp_path / "d", "a") == steps_in(tmp_path / "d", "b") == [1]
    second.close()
