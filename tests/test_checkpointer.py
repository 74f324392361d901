"""The public object end to end: real slots, a real agent, real files, in this process."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtckpt
from mtckpt.errors import (
    CaptureFailed,
    CloseFailed,
    ForkedProcess,
    GroupMissing,
    NoHealthyStep,
    SaveFailed,
    StageNotPlanned,
    StateMismatch,
    StepExists,
    StepNotFound,
    UnsupportedState,
    UsageError,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path, run: str = "r", **settings: Any) -> mtckpt.Checkpointer:
    tiers = settings.pop("tiers", None) or [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
    ]
    return mtckpt.Checkpointer(run, tiers, timeout_s=20, max_stall_s=10, **settings)


def make_state(fill: float = 0.0) -> dict[str, Any]:
    return {"w": np.full((300, 7), fill, np.float32), "n": np.zeros((), np.int64), "note": "x"}


def test_nothing_is_there_then_a_step_comes_back(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        state = make_state(3.0)
        first = checkpointer.restore(state)
        assert not first
        assert first.next_step == 0
        state["note"] = "later"
        save = checkpointer.save(0, state, tiers="all")
        save.wait("local", timeout_s=20)
        assert {"captured", "staged", "local"} <= save.reached
    with open_run(tmp_path) as checkpointer:
        state = make_state()
        restored = checkpointer.restore(state)
        assert restored
        assert restored.step == 0
        assert restored.next_step == 1
        assert list(restored.sources) == ["disk"]  # close() freed the memory
        assert (state["w"] == 3.0).all()
        assert state["note"] == "later"


def test_nothing_due_touches_nothing(tmp_path: Path) -> None:
    def explode() -> object:
        raise AssertionError("state was asked for")

    with open_run(tmp_path, tiers=[mtckpt.Ram(every=10)]) as checkpointer:
        assert not checkpointer.due(9)
        save = checkpointer.save(9, explode)
        assert not save.due
        assert save.done()
        began_s = time.perf_counter()
        for _ in range(1000):
            checkpointer.save(9, explode)
        assert time.perf_counter() - began_s < 5
        with pytest.raises(CaptureFailed, match="state was asked for"):
            checkpointer.save(10, explode)
        assert checkpointer.save(20, make_state).due


def test_values_are_those_at_the_call(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        state = {"t": torch.full((1000, 300), 1.0)}
        checkpointer.save(1, state)
        state["t"].fill_(2.0)
        checkpointer.save(2, state)
        state["t"].fill_(3.0)
        restored = checkpointer.restore(state, step=1)
        assert restored.step == 1
        assert bool((state["t"] == 1.0).all())


def test_same_step_twice_is_refused_before_capture(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        for tiers in ("all", "due"):  # though no tier is due any more
            with pytest.raises(StepExists, match="step 1"):
                checkpointer.save(1, make_state(), tiers=tiers)


def test_bad_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path) as checkpointer:
        for step in (-1, 1.0, True, "1", 10**12, np.float32(1), torch.ones(2, dtype=torch.int64)):
            with pytest.raises(UsageError, match="step must be"):
                checkpointer.save(step, make_state())  # type: ignore[arg-type]
        with pytest.raises(UnsupportedState) as raised:
            checkpointer.save(1, {"a": {"b": object()}})
        assert raised.value.details["path"] == "a/b"
        checkpointer.save(1, make_state()).wait("staged", timeout_s=20)
        with pytest.raises(StepNotFound):
            checkpointer.restore(make_state(), step=99)
    with pytest.raises(UsageError, match="closed"):
        checkpointer.save(2, make_state())
    with pytest.raises(UsageError, match="keep=1"):
        open_run(tmp_path, tiers=[mtckpt.Disk(tmp_path, keep=1)])
    with pytest.raises(UsageError):
        open_run(tmp_path, run="")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for use in ("restore", "save"):
        checkpointer = open_run(tmp_path)
        arguments = (make_state(),) if use == "restore" else (1, make_state())
        with pytest.raises(GroupMissing, match="2 ranks"):
            getattr(checkpointer, use)(*arguments)


def test_a_step_is_an_integer_of_any_kind(tmp_path: Path) -> None:
    state = make_state()
    with open_run(tmp_path) as checkpointer:
        for step in (np.int64(1), torch.tensor(2), np.array(3)):
            state["w"][:] = float(step)
            save: Any = checkpointer.save(step, state)  # type: ignore[arg-type]
            assert type(save.step) is int
            save.wait("local", timeout_s=20)
        # What is no number never stands for the newest step.
        for wrong in (None, "newest", 2.0, True, [1]):
            with pytest.raises(UsageError, match='step must be "latest", "best" or an integer'):
                checkpointer.restore(state, step=wrong)  # type: ignore[arg-type]
        assert checkpointer.restore(state, step=np.int64(2)).step == 2  # type: ignore[arg-type]
        assert (state["w"] == 2).all()


def test_a_metric_that_is_no_number_costs_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(tmp_path) as checkpointer:
        metrics = {"loss": float("nan"), "top": torch.tensor(0.5), "worst": np.float32("inf")}
        checkpointer.save(1, make_state(), metrics=metrics).wait("local", timeout_s=20)  # type: ignore[arg-type]
        checkpointer.report(1, {"late": float("-inf"), "later": 2})
        (step,) = checkpointer.steps()
        assert step.metrics == {"top": 0.5, "later": 2}
        assert "metric loss of step 1 is nan" in caplog.text
        for wrong in ({"loss": "low"}, {"loss": None}, {"loss": [1]}, {3: 1.0}):
            with pytest.raises(UsageError, match="metric"):
                checkpointer.save(2, make_state(), metrics=wrong)  # type: ignore[arg-type]
        checkpointer.save(2, make_state()).wait("staged", timeout_s=20)


def test_names_that_no_record_can_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="run's name must be UTF-8"):
        open_run(tmp_path, run="l\udcffuf")
    with pytest.raises(UsageError, match="path of a tier must be UTF-8"):
        open_run(tmp_path, tiers=[mtckpt.Disk(tmp_path / "\udcff")])
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="deleted"):
        mtckpt.Checkpointer("run")


def test_a_template_that_differs_changes_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(5.0)).wait("staged", timeout_s=20)
        other: dict[str, Any] = {"w": np.zeros((7, 300), np.float32), "extra": np.zeros(2)}
        with pytest.raises(StateMismatch) as raised:
            checkpointer.restore(other)
        assert "extra" in getattr(raised.value, "missing", ())
        assert not other["w"].any()
        only = {"n": np.ones((), np.int64)}  # top-level keys that are not asked for are not read
        assert checkpointer.restore(only)
        renamed = {"v": np.zeros((300, 7), np.float32)}
        assert checkpointer.restore(renamed, rename=lambda path: "v" if path == "w" else None)
        assert (renamed["v"] == 5.0).all()


def test_roll_back_starts_a_branch(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, make_state(step)).wait("local", timeout_s=20)
    with open_run(tmp_path) as checkpointer:
        state = make_state()
        assert checkpointer.restore(state, step=10).step == 10
        checkpointer.save(11, make_state(11)).wait("local", timeout_s=20)
    with open_run(tmp_path) as checkpointer:
        assert checkpointer.restore(state).step == 11
        assert (state["w"] == 11).all()
        checkpointer.save(30, make_state(31)).wait("local", timeout_s=20)
        assert checkpointer.restore(state).step == 30
        assert (state["w"] == 31).all()


def test_a_start_whose_own_file_is_lost_keeps_its_steps(tmp_path: Path) -> None:
    """Its saves tell of it: neither an older step nor a fresh start stands in for them."""
    for step in (10, 20):
        with open_run(tmp_path) as checkpointer:
            state = make_state()
            checkpointer.restore(state)
            state["w"][:] = step
            checkpointer.save(step, state).wait("local", timeout_s=20)
    (lost,) = (tmp_path / "disk" / "r").glob("incarnation-000002.*")
    lost.unlink()
    with open_run(tmp_path) as checkpointer:
        restored = checkpointer.restore(state := make_state())
        assert (restored.step, float(state["w"][0, 0])) == (20, 20.0)


def test_best_by_metrics_given_at_once_and_later(tmp_path: Path) -> None:
    keep = [mtckpt.KeepLast(3), mtckpt.KeepBest(1, "loss")]
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", keep=keep)]
    with open_run(tmp_path, tiers=tiers) as checkpointer:
        checkpointer.save(1, make_state(1), metrics={"loss": 3.0}).wait("local", timeout_s=20)
        checkpointer.save(2, make_state(2)).wait("local", timeout_s=20)
        checkpointer.report(2, {"loss": 1.0})
        checkpointer.save(3, make_state(3), metrics={"loss": 2.0}).wait("local", timeout_s=20)
    with open_run(tmp_path, tiers=tiers) as checkpointer:
        state = make_state()
        assert checkpointer.restore(state, step="best").step == 2
        assert (state["w"] == 2).all()
    with open_run(tmp_path) as checkpointer, pytest.raises(StepNotFound, match="has a KeepBest"):
        checkpointer.restore(make_state(), step="best")


@pytest.mark.parametrize("make", [np.arange, torch.arange], ids=["numpy", "torch"])
@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_view_of_the_beginning_does_not_stand_for_the_whole(
    make: Any, first: str, tmp_path: Path
) -> None:
    """Both begin at one address; and nested beside each other or apart they come back."""

    def state(start: int) -> dict[str, Any]:
        whole = make(start, start + 1000)
        leaves = {"a": whole, "b": whole[:2]} if first == "whole" else {"a": whole[:2], "b": whole}
        return {"leaves": leaves, "apart": [whole[:10], whole[990:]]}

    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state(5)).wait("staged", timeout_s=20)
        live = state(0)
        assert checkpointer.restore(live)
    wanted = state(5)
    for name in ("a", "b"):
        assert live["leaves"][name].tolist() == wanted["leaves"][name].tolist()
    assert [part.tolist() for part in live["apart"]] == [p.tolist() for p in wanted["apart"]]


def test_another_run_is_a_warm_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_run(tmp_path, "The base") as checkpointer:  # which is no name of a directory
        checkpointer.save(5, make_state(8)).wait("local", timeout_s=20)
    for source in ("The base", str(tmp_path / "disk" / "The base")):
        with open_run(tmp_path, f"tuned-{len(source)}") as checkpointer:
            state = make_state()
            assert not checkpointer.restore(state)
            assert checkpointer.restore(state, source=source)
            assert (state["w"] == 8).all()
            assert "are abandoned" not in caplog.text
            checkpointer.save(7, state).wait("staged", timeout_s=20)
            checkpointer.restore(state, source=source)
        assert "came after this run had a step of its own" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("source", ["bsae", "disk", "disk/other", "memory://nowhere/base"])
def test_a_source_that_is_not_there_is_no_fresh_start(tmp_path: Path, source: str) -> None:
    with open_run(tmp_path, "base") as checkpointer:
        checkpointer.save(5, make_state(8)).wait("local", timeout_s=20)
    (tmp_path / "disk" / "other").mkdir()
    if source.startswith("disk"):
        source = str(tmp_path / source)
    with open_run(tmp_path, "tuned") as checkpointer:
        state = make_state()
        with pytest.raises(StepNotFound, match="which is what source="):
            checkpointer.restore(state, source=source)
        assert (state["w"] == make_state()["w"]).all()


def test_a_damaged_disk_copy_falls_back_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step)).wait("local", timeout_s=20)
    shards = sorted((tmp_path / "disk" / "r").glob("step-*/rank-00000.safetensors"))
    with shards[-1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with caplog.at_level(logging.WARNING), open_run(tmp_path) as checkpointer:
        state = make_state()
        restored = checkpointer.restore(state)
        assert restored.step == 1
        assert (state["w"] == 1).all()
        assert "step 2" in restored.skipped
    assert "damaged" in caplog.text


def test_a_disk_that_may_not_be_mounted_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "a"), mtckpt.Disk(tmp_path / "b")]
    with open_run(tmp_path, tiers=tiers) as checkpointer:
        assert not checkpointer.restore(make_state())
        checkpointer.save(1, make_state(1.0), tiers="all")
    assert {record.module for record in caplog.records} <= {"_media"}  # both are on one device
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    with open_run(tmp_path, tiers=tiers) as checkpointer:
        assert checkpointer.restore(make_state()).step == 1
    assert f"disk-2 at {tmp_path / 'b'} has nothing of this run, and disk has" in caplog.text
    assert f"at {tmp_path / 'a'} has" not in caplog.text


def test_every_step_damaged_is_no_fresh_start(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1)).wait("local", timeout_s=20)
    (record,) = (tmp_path / "disk" / "r").glob("step-*/rank-00000.json")
    record.write_bytes(record.read_bytes().replace(b'"step":1', b'"step":2'))
    with open_run(tmp_path) as checkpointer, pytest.raises(NoHealthyStep, match="step 1"):
        checkpointer.restore(make_state())


def test_a_first_flush_that_was_cut_off_is_no_step(tmp_path: Path) -> None:
    """With the power: memory is lost, and the disk has data of a step and never had a record."""
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1)).wait("local", timeout_s=20)
    (saved,) = (tmp_path / "disk" / "r").glob("step-*")
    (saved / "rank-00000.json").unlink()
    with open_run(tmp_path) as checkpointer, pytest.raises(NoHealthyStep, match="no record"):
        checkpointer.restore(make_state())  # its manifest says that it was whole
    (saved / "manifest.json").unlink()
    with open_run(tmp_path) as checkpointer:
        restored = checkpointer.restore(make_state())
        assert not restored
        assert restored.skipped == {"step 1": "no record is in disk"}
        checkpointer.save(1, make_state(2)).wait("local", timeout_s=20)
    with open_run(tmp_path) as checkpointer:
        state = make_state()
        assert checkpointer.restore(state).step == 1
        assert (state["w"] == 2).all()


def test_a_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(),
            torch.nn.Linear(16, 1),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        state = {"model": model, "opt": optimizer, "lr": schedule, "rng": mtckpt.rng()}
        return model, optimizer, state

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
        loss = model(torch.randn(4, 8)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state["lr"].step()

    model, optimizer, state = build()
    for _ in range(10):
        train(model, optimizer, state)
    want = [p.clone() for p in model.parameters()]
    model, optimizer, state = build()
    with open_run(tmp_path) as checkpointer:
        for step in range(5):
            train(model, optimizer, state)
            checkpointer.save(step, state)
    model, optimizer, state = build()
    with open_run(tmp_path) as checkpointer:
        restored = checkpointer.restore(state)
        assert restored.next_step == 5
        for _ in range(restored.next_step, 10):
            train(model, optimizer, state)
    assert all(map(torch.equal, want, model.parameters()))


def test_a_fork_is_told(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                checkpointer.save(2, make_state())
            except ForkedProcess:
                os.write(write_fd, b"told")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read_fd, 10) == b"told"
        os.close(read_fd)
        os.close(write_fd)


def test_opened_again_fences_the_older_one(tmp_path: Path) -> None:
    older = open_run(tmp_path)
    older.save(1, make_state(1)).wait("staged", timeout_s=20)
    with open_run(tmp_path) as newer:
        state = make_state()
        assert newer.restore(state).step == 1
        newer.save(2, state)
    with pytest.raises(Exception, match="use a newer one"):
        older.save(3, state)


def test_status_and_steps_tell_the_same(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state()).wait("local", timeout_s=20)
        (step,) = checkpointer.steps()
        assert step.tiers == ("ram", "disk")
        assert set(step.stages) == {"staged", "local"}
        status = checkpointer.status()
        assert status.counters["saves"] == 1
        assert {tier["label"] for tier in status.tiers} == {"ram", "disk"}
        with pytest.raises(StageNotPlanned):
            checkpointer.save(2, make_state()).wait("durable", timeout_s=1)


def test_a_disk_alone_sets_the_rhythm(tmp_path: Path) -> None:
    with open_run(tmp_path, tiers=[mtckpt.Disk(tmp_path / "disk", every=5)]) as checkpointer:
        assert [step for step in range(12) if checkpointer.due(step)][:1] == [5]
        assert not checkpointer.save(4, make_state()).due
        checkpointer.save(5, make_state()).wait("local", timeout_s=20)
    with pytest.raises(UsageError, match="clocks differ"):
        open_run(tmp_path, tiers=[mtckpt.Disk(tmp_path, every="10min")])


@pytest.mark.parametrize("on_failure", ["raise", "warn"])
def test_a_disk_that_fails_reaches_the_loop_once(tmp_path: Path, on_failure: Any) -> None:
    checkpointer = open_run(tmp_path, on_failure=on_failure)
    (tmp_path / "disk").write_text("a file where a directory should be")
    save = checkpointer.save(1, make_state())
    save.wait("staged", timeout_s=20)
    with pytest.raises(SaveFailed) as raised:
        save.wait("local", timeout_s=20)
    assert raised.value.__cause__ is not None
    deadline_s = time.monotonic() + 10
    while not checkpointer._pending and time.monotonic() < deadline_s:
        time.sleep(0.01)
    if on_failure == "raise":
        with pytest.raises(SaveFailed, match="step 1"):
            checkpointer.save(2, make_state())
    else:
        with pytest.warns(RuntimeWarning, match="step 1"):
            checkpointer.save(2, make_state())
    with pytest.raises(CloseFailed, match="did not reach local"):
        checkpointer.close(timeout_s=20)


def test_a_stopped_agent_costs_no_more_than_the_stall(tmp_path: Path, runtime_dir: Path) -> None:
    tiers = [mtckpt.Ram(every=1)]
    checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=0.3)
    checkpointer.save(1, make_state()).wait("staged", timeout_s=20)
    pid = int((runtime_dir / "agent.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        skipped = []
        for step in range(2, 6):
            began_s = time.monotonic()
            skipped.append(checkpointer.save(step, make_state()).skipped)
            assert time.monotonic() - began_s < 5
        assert any(skipped)
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline_s = time.monotonic() + 20
    step = 10
    while checkpointer.save(step, make_state()).skipped and time.monotonic() < deadline_s:
        step += 1
    checkpointer.close(timeout_s=20)


def test_a_start_that_does_not_restore_is_told_what_it_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, restores in ((7, False), (8, True), (9, False)):
        with open_run(tmp_path) as checkpointer:
            if restores:
                checkpointer.restore(make_state())
            checkpointer.save(step, make_state()).wait("staged", timeout_s=20)
    (told,) = [line for line in caplog.messages if "restore() was not called" in line]
    assert "step 8 and all that was saved before is abandoned" in told
