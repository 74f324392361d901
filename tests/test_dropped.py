"""A Checkpointer that is dropped without a word does what ``close()`` does, in the background."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import mtckpt
from mtckpt import _checkpointer, _endings
from mtckpt._handle import Save
from mtckpt.errors import AgentUnavailable, CloseFailed, SaveFailed, TierFull

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(folder: Path) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(folder / "disk", every=1000)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def restored_step(folder: Path) -> tuple[int | None, int]:
    state = {"w": np.zeros(5)}
    with open_run(folder) as checkpointer:
        return checkpointer.restore(state).step, int(state["w"][0])


def wait_for_closing() -> None:
    for thread in list(_endings._closing):
        thread.join(30)
        assert not thread.is_alive()


def test_the_newest_step_is_sent_on_and_memory_is_free(tmp_path: Path, ram_dir: Path) -> None:
    checkpointer = open_run(tmp_path)
    for step in range(1, 4):
        checkpointer.save(step, {"w": np.full(5, float(step))}).wait("staged", timeout_s=20)
    gone = weakref.ref(checkpointer._saver)
    threads = checkpointer._session._threads
    assert threads
    assert list(ram_dir.rglob("*.safetensors"))
    del checkpointer
    wait_for_closing()
    gc.collect()
    assert gone() is None
    assert not any(thread.is_alive() for thread in threads)
    assert not list(ram_dir.rglob("*.safetensors"))
    assert (tmp_path / "disk").exists()
    assert restored_step(tmp_path) == (3, 3)


def test_one_in_a_cycle_is_closed_once_it_is_collected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one that has saved nothing, nothing else holds the connections: they are collected too."""
    for step in (0, 1):
        checkpointer = open_run(tmp_path)
        assert not checkpointer.restore({"w": np.zeros(5)})
        if step:
            checkpointer.save(step, {"w": np.ones(5)}).wait("staged", timeout_s=20)
        checkpointer.itself = checkpointer  # type: ignore[attr-defined]
        del checkpointer
        gc.collect()
        wait_for_closing()
    assert "while closing" not in caplog.text
    assert restored_step(tmp_path) == (1, 1)


def test_another_may_be_opened_at_once(tmp_path: Path) -> None:
    checkpointer = open_run(tmp_path)
    checkpointer.save(1, {"w": np.full(5, float(1))}).wait("staged", timeout_s=20)
    del checkpointer
    state = {"w": np.zeros(5)}
    with open_run(tmp_path) as other:
        assert other.restore(state).step == 1
        other.save(2, {"w": np.full(5, float(2))}).wait("staged", timeout_s=20)
    wait_for_closing()
    assert restored_step(tmp_path) == (2, 2)


def test_nothing_is_begun_for_one_that_did_nothing_or_was_closed(tmp_path: Path) -> None:
    before = threading.active_count()
    checkpointer = open_run(tmp_path)
    del checkpointer
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.full(5, float(1))})
    del checkpointer
    with pytest.raises(mtckpt.errors.UsageError):
        mtckpt.Checkpointer("r", timeout_s=-1)
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "mtckpt-close"]
    assert threading.active_count() <= before


def test_what_failed_while_the_agent_went_away_is_told_by_close_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = open_run(tmp_path)

    def gone(*_: object) -> None:
        checkpointer._failed(Save(1, planned={}), TierFull("no room", tier="disk"))
        raise AgentUnavailable("it went away")

    monkeypatch.setattr(_checkpointer, "bring_home", gone)
    with pytest.raises(CloseFailed) as raised:
        checkpointer.close(timeout_s=5)
    assert list(map(type, raised.value.errors)) == [AgentUnavailable, SaveFailed]
