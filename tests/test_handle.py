"""The handles: stages only grow, waits are bounded, errors arrive."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import mtckpt
from mtckpt._handle import Restored, Save, Status, size_text
from mtckpt.errors import CheckpointError, SaveFailed, StageNotPlanned, TierFull, WaitTimeout


def make(**planned: str) -> Save:
    return Save(7, "id", planned={"ram": "staged", **planned})


def test_a_save_that_is_not_due_is_done_and_gives_no_stage() -> None:
    save = Save(3)
    assert not save.due
    assert save.done()
    with pytest.raises(StageNotPlanned, match="step 3"):
        save.wait("staged", timeout_s=0.1)


def test_a_stage_above_the_one_waited_for_will_do() -> None:
    save = make(disk="local")
    save._advance(("local",))
    save.wait("staged", timeout_s=0)
    save.wait("local", timeout_s=0)
    assert save.done()


def test_local_is_not_replicated_and_durable_is_both() -> None:
    save = make(disk="local", store="durable")
    save._advance(("local",))
    with pytest.raises(WaitTimeout):
        save.wait("durable", timeout_s=0.01)
    save._advance(("durable",))
    assert save.reached == {"local", "durable"}
    save.wait("replicated", timeout_s=0)


def test_waiting_for_what_no_tier_gives_says_so_at_once() -> None:
    began_s = time.monotonic()
    with pytest.raises(StageNotPlanned, match="local"):
        make().wait("local", timeout_s=30)
    assert time.monotonic() - began_s < 5


def test_a_failure_is_raised_with_its_cause_and_never_takes_a_stage_back() -> None:
    save = make(disk="local")
    save._advance(("captured", "staged"))
    cause = TierFull("no room", tier="disk", needed_bytes=10, free_bytes=1)
    told: list[CheckpointError] = []
    for _ in range(2):
        save._advance(failed={"disk": cause}, on_error=lambda _, error: told.append(error))
    assert told == [cause]
    save.wait("staged", timeout_s=0)
    with pytest.raises(SaveFailed, match="no room") as raised:
        save.wait("local", timeout_s=0)
    assert raised.value.__cause__ is cause
    assert raised.value.details["step"] == 7
    assert save.exception() is cause
    assert save.done()


def test_the_next_save_knows_of_a_failure_before_whoever_waits_for_it() -> None:
    save = make(disk="local")
    order = []

    def wait() -> None:
        with pytest.raises(SaveFailed):
            save.wait("local", timeout_s=20)
        order.append("waited")

    def on_error(_: Save, __: CheckpointError) -> None:
        waiter.join(0.3)
        order.append("told")

    waiter = threading.Thread(target=wait)
    waiter.start()
    save._advance(failed={"disk": TierFull("no room", tier="disk")}, on_error=on_error)
    waiter.join(20)
    assert order == ["told", "waited"]


def test_called_off_and_superseded_saves_say_why() -> None:
    skipped = make()
    skipped._advance(skipped="no slot is free: step 5 is being flushed")
    with pytest.raises(SaveFailed, match="being flushed"):
        skipped.wait("staged", timeout_s=1)
    older = make(disk="local")
    older._advance(("staged",), superseded=["disk"])
    assert older.done()
    with pytest.raises(StageNotPlanned, match="superseded"):
        older.wait("local", timeout_s=1)


def test_a_waiter_is_woken() -> None:
    save = make()
    threading.Timer(0.05, lambda: save._advance(("staged",))).start()
    save.wait("staged", timeout_s=10)


def test_step_zero_was_restored_and_nothing_was_not() -> None:
    assert Restored(0, {})
    assert Restored(0, {}).next_step == 1
    nothing = Restored(None, {})
    assert not nothing
    assert nothing.next_step == 0
    assert "starting at step 0" in str(nothing)
    text = str(Restored(4, {}, sources={"ram": 2**30}, skipped={"step 5": "damaged"}))
    assert "ram (1.0 GiB)" in text
    assert "step 5: damaged" in text


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (5, 2048, 3 * 2**40)] == ["5 B", "2.0 KiB", "3.0 TiB"]


def test_what_a_notebook_shows_is_short(tmp_path: Path, runtime_dir: Path) -> None:
    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path)]) as checkpointer:
        assert repr(checkpointer) == "Checkpointer('r', ram + disk)"
        checkpointer.save(7, {"w": 1}).wait("local", timeout_s=20)
        assert repr(checkpointer) == "Checkpointer('r', ram + disk, saved step 7)"
        assert (
            repr(checkpointer.status()) == "Status('r', incarnation 1, ram: step 7, disk: step 7)"
        )
    assert repr(checkpointer) == "Checkpointer('r', ram + disk, saved step 7, closed)"
    owing = {"label": "disk", "newest_step": None, "owed": [8], "problem": "disk full"}
    told = repr(Status("r", 2, (owing,)))
    assert told == "Status('r', incarnation 2, disk: nothing, owes 1 step: disk full)"
