"""Slots run out, tiers refuse, hang and rot, runs end: each is told, and nothing else suffers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from agent_checks import (
    Own,
    Trainers,
    agent_pid,
    data_processes,
    ram_root,
    status_of,
    steps_in,
    until,
)
from fake_trainer import SIZE_BYTES, disk

from mtckpt import _inventory, _manifest
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import ensure_agent
from mtckpt.errors import RunLocked, TierFull
from mtckpt.tiers import LocalTier

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
    assert none.reason == "no slot is free: 3 are captured"
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
    wanted = {new.layout.size_bytes}  # the files of the old ones go a moment before their slots
    until(lambda: {slot.size_bytes for slot in new.run_status().slots} == wanted)
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


def test_what_a_reader_held_goes_when_the_reader_has_gone(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d", keep=2)])
    trainer.open()
    trainer.begin(1)
    first = trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    reader = LocalTier(tmp_path / "d", read_only=True)
    with reader.lease(f"r/{first.save}/{_manifest.shard_file(0)}"):
        for step in (2, 3, 4):
            trainer.save(step, ["disk"])
            trainer.wait_stage(step, "local")
        until(lambda: steps_in(tmp_path / "d") == [1, 3, 4])
    reader.close()
    until(lambda: steps_in(tmp_path / "d") == [3, 4])  # with no flush after the reader
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


def test_who_asks_for_what_is_there_already_hears_that_it_is(own: Own, tmp_path: Path) -> None:
    """It was told before, and waits for the answer to what it asks now."""
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    trainer.wait(1, lambda change: "local" in change.stages and not change.waiting)
    since = trainer.changes().seq
    trainer.flush()
    told = trainer.changes(since, 1.0).saves
    assert [(change.step, change.waiting) for change in told] == [(1, [])]


def test_close_brings_what_somebody_removed_to_the_disk_again(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    (tmp_path / "d" / "r").rename(tmp_path / "removed")  # at once: something may come in meanwhile
    trainer.flush()
    trainer.close()
    until(lambda: not (ram_root() / "r").exists())
    assert steps_in(tmp_path / "d") == [1]


def test_close_keeps_ram_where_the_disk_has_gone(own: Own, tmp_path: Path) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    (tmp_path / "d").rename(tmp_path / "unmounted")
    (tmp_path / "d").touch()
    trainer.flush()
    trainer.close()
    assert steps_in(ram_root(), name="ram") == [1]
    (tmp_path / "d").unlink()
    until(lambda: not (ram_root() / "r").exists())
    assert steps_in(tmp_path / "d") == [1]


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


def test_a_stuck_disk_holds_up_nothing_but_itself(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_CALL_TIMEOUT_S", "3.0")
    stuck, fine = tmp_path / "stuck", tmp_path / "fine"
    trainer = own("r", [disk(stuck, "stuck"), disk(fine, "fine")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["stuck", "fine"])
    trainer.wait(1, lambda c: not c.waiting and "local" in c.stages)
    until(lambda: steps_in(stuck) == [1])
    pid = data_processes()[str(stuck)]
    os.kill(pid, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        for step in range(2, 9):
            trainer.save(step, ["stuck", "fine"])
        assert time.monotonic() - started_s < 3.0
        assert trainer.status().pid
        until(lambda: 8 in steps_in(fine))
        # The process that hangs is given up, and another one catches up with the newest.
        until(lambda: 8 in steps_in(stuck))
        assert not Path(f"/proc/{pid}").exists() or data_processes().get(str(stuck)) != pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: trainer.run_status().tiers[1].problem == "")
    assert trainer.run_status().counters["superseded"] >= 1
    trainer.close()


def test_data_processes_that_die_at_any_time_are_not_noticed(
    own: Own, tmp_path: Path, seed: int
) -> None:
    """One of them is killed in the middle of almost every save, RAM's as often as the disk's."""
    kill_at_random(own, tmp_path, random.Random(seed), num_saves=20)


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_data_processes_that_die_five_hundred_times(own: Own, tmp_path: Path, seed: int) -> None:
    kill_at_random(own, tmp_path, random.Random(seed), num_saves=500)


def kill_at_random(own: Own, tmp_path: Path, rng: random.Random, num_saves: int) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    for step in range(1, num_saves + 1):
        # The one before may have no successor yet.
        pids = until(lambda: sorted(set(data_processes().values())))
        timer = threading.Timer(rng.uniform(0.0, 0.02), kill_if_there, (rng.choice(pids),))
        timer.start()
        trainer.save(step, ["disk"])
        timer.join()
        if step % 4 == 0:
            trainer.wait_stage(step, "local")
    trainer.wait_stage(num_saves, "local")
    assert num_saves in steps_in(tmp_path / "d")
    assert num_saves in steps_in(ram_root(), name="ram")
    trainer.close()


def kill_if_there(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
