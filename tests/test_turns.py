"""Calls of one Checkpointer in an unusual order: from threads, from within, right after another."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt._turns import Turns
from mtckpt.errors import UsageError, WaitTimeout

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", keep=None)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def test_a_restore_finds_what_was_saved_just_before(tmp_path: Path) -> None:
    """Each save makes slots anew, so that none is in memory as soon as ``save`` returns."""
    with open_run(tmp_path) as checkpointer:
        for step in range(1, 6):
            saved = {"w": np.full(step * 1_000_000, step, np.uint8)}
            checkpointer.save(step, saved)
            state = {"w": np.zeros(step * 1_000_000, np.uint8)}
            assert checkpointer.restore(state).step == step
            assert (state["w"] == step).all()


def test_threads_take_turns(tmp_path: Path) -> None:
    failures: list[Exception] = []
    with open_run(tmp_path) as checkpointer:

        def look() -> None:
            state = {"w": np.zeros(1000, np.int64)}
            try:
                for _ in range(5):
                    checkpointer.restore(state, partial=True)
                    assert len({*state["w"].tolist()}) == 1
                    checkpointer.steps()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(1, 20):
            checkpointer.save(step, {"w": np.full(1000, step)})
        for thread in threads:
            thread.join()
        assert not failures
        assert not checkpointer.status().counters.get("damaged")


def test_a_step_lower_than_one_before_is_refused(tmp_path: Path) -> None:
    """A counter that starts anew with every pass: nothing would be due any more, or be newest."""
    with open_run(tmp_path) as checkpointer:
        state = {"w": np.zeros(3)}
        for step in range(5):
            checkpointer.save(step, state)
        with pytest.raises(UsageError, match="step 0 comes after step 4") as raised:
            checkpointer.save(0, state)
        assert "over all passes" in str(raised.value)
        checkpointer.save(4, state)  # not due, as before
        checkpointer.save(5, state).wait("local", timeout_s=20)
        checkpointer.restore(state, step=5)
        assert checkpointer.restore(state, step=5).next_step == 6
        checkpointer.save(6, state).wait("local", timeout_s=20)
    with mtckpt.Checkpointer("often", [mtckpt.Ram(every=10)]) as checkpointer:
        checkpointer.save(9, state)
        with pytest.raises(UsageError, match="step 3 comes after step 9"):
            checkpointer.save(3, state)


def test_a_call_from_within_another_is_refused(tmp_path: Path) -> None:
    """As by a signal handler that saves while the loop does."""
    with open_run(tmp_path) as checkpointer:
        refused: list[UsageError] = []

        def state() -> dict[str, Any]:
            with pytest.raises(UsageError, match=r"save\(\) was called from within save\(\)") as e:
                checkpointer.save(7, {"w": np.ones(3)})
            refused.append(e.value)
            return {"w": np.zeros(3)}

        checkpointer.save(1, state).wait("local", timeout_s=20)
        assert len(refused) == 1
        assert [step.step for step in checkpointer.steps()] == [1]


def test_a_turn_is_not_waited_for_without_end() -> None:
    turns = Turns(0.05)
    with turns.take("restore"), pytest.raises(WaitTimeout, match=r"save\(\) waited for restore"):
        waited: list[BaseException] = []

        def wait() -> None:
            try:
                with turns.take("save"):
                    pass
            except WaitTimeout as error:
                waited.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        raise waited[0]
    with turns.take("save"):
        pass
