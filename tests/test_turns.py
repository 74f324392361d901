"""Calls of one Checkpointer in an unusual order: from threads, from within, right after another."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from agent_checks import until

import mtckpt
from mtckpt._turns import Turns
from mtckpt.errors import CaptureFailed, SaveFailed, StepExists, UsageError, WaitTimeout
from mtckpt.testing.groups import local_groups

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path, **settings: Any) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", keep=None)]
    limits = {"timeout_s": 20, "max_stall_s": 10, **settings}
    return mtckpt.Checkpointer("r", tiers, **limits)


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
        with pytest.raises(StepExists, match="step 4 was saved already"):
            checkpointer.save(4, state)
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
        assert "made by a callable must not save" in str(refused[0])
        assert [step.step for step in checkpointer.steps()] == [1]


def test_a_state_may_ask_what_there_is(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.zeros(3)}).wait("local", timeout_s=20)

        def state() -> dict[str, Any]:
            checkpointer.report(1, {"loss": 0.5})
            assert checkpointer.status().tiers
            return {"w": np.zeros(3), "saved": len(checkpointer.steps())}

        checkpointer.save(2, state).wait("local", timeout_s=20)
        template = {"w": np.zeros(3), "saved": 0}
        assert checkpointer.restore(template).state["saved"] == 1


@contextlib.contextmanager
def amid_a_restore(checkpointer: mtckpt.Checkpointer) -> Iterator[None]:
    """Another thread restores, and does not come to an end meanwhile."""
    begun, may_end = threading.Event(), threading.Event()

    def rename(path: str) -> str:
        begun.set()
        assert may_end.wait(50)
        return path

    with ThreadPoolExecutor(1) as pool:
        restored = pool.submit(checkpointer.restore, {"w": np.zeros(3)}, rename=rename)
        try:
            assert begun.wait(20)
            yield
        finally:
            may_end.set()
        assert restored.result(20).step == 1


def test_a_save_that_another_thread_holds_up_is_called_off(tmp_path: Path) -> None:
    with open_run(tmp_path, max_stall_s=0.2) as checkpointer:
        state = {"w": np.ones(3)}
        checkpointer.save(1, state).wait("local", timeout_s=20)
        with amid_a_restore(checkpointer):
            assert "restore() of another thread" in str(checkpointer.save(2, state).skipped)
            with pytest.raises(UsageError, match="tiers='some'"):
                checkpointer.save(3, state, tiers="some")  # type: ignore[arg-type]
        checkpointer.save(4, state, tiers="all").wait("local", timeout_s=20)
        assert [step.step for step in checkpointer.steps()] == [1, 4]
        assert checkpointer.status().counters["called_off"] == 1


def test_a_look_waits_for_no_other_thread(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)}).wait("local", timeout_s=20)
        with amid_a_restore(checkpointer):
            assert [step.step for step in checkpointer.steps()] == [1]
            assert checkpointer.status().incarnation == 1
            checkpointer.report(1, {"loss": 0.5})


def test_a_close_waits_for_another_thread_as_long_as_it_may_itself(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)}).wait("local", timeout_s=20)
        with amid_a_restore(checkpointer):
            with pytest.raises(WaitTimeout, match=r"close\(\) waited for restore") as raised:
                checkpointer.close(timeout_s=0.2)
            assert raised.value.details["timeout_s"] == 0.2
        checkpointer.save(2, {"w": np.ones(3)})  # it is open as before


def test_a_look_at_a_stopped_agent_does_not_hold_a_save_up(
    tmp_path: Path, runtime_dir: Path
) -> None:
    checkpointer = open_run(tmp_path, max_stall_s=0.3)
    state = {"w": np.ones(3)}
    checkpointer.save(1, state).wait("local", timeout_s=20)
    pid = int((runtime_dir / "agent.pid").read_text())
    with ThreadPoolExecutor(2) as pool:
        os.kill(pid, signal.SIGSTOP)
        try:
            looks: list[Future[Any]] = [
                pool.submit(checkpointer.status),
                pool.submit(checkpointer.report, 1, {"x": 1}),
            ]
            until(lambda: waiting_for_an_answer() >= 2)
            saves = [checkpointer.save(step, state) for step in range(2, 6)]
            assert any(save.skipped for save in saves)
            assert not any(look.done() for look in looks)
        finally:
            os.kill(pid, signal.SIGCONT)
        for look in looks:
            look.result(20)
    checkpointer.save(6, state).wait("local", timeout_s=20)
    checkpointer.close(timeout_s=20)


def waiting_for_an_answer() -> int:
    """How many threads of a pool have asked an agent something."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = 0
    for ident, frame in sys._current_frames().items():
        calls = {each.f_code.co_name for each, _ in traceback.walk_stack(frame)}
        found += "getresponse" in calls and "ThreadPool" in names.get(ident, "")
    return found


def test_a_save_that_one_rank_has_no_turn_for_is_called_off_on_all(tmp_path: Path) -> None:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk")]
    ranks = [
        mtckpt.Checkpointer("r", tiers, group=group, timeout_s=20, max_stall_s=1)
        for group in local_groups(2)
    ]
    state = {"w": np.ones(3)}
    begun, may_end = threading.Event(), threading.Event()

    def slow_state() -> dict[str, Any]:
        begun.set()
        assert may_end.wait(50)
        raise RuntimeError("no state")

    with ThreadPoolExecutor(3) as pool:
        for save in pool.map(lambda rank: rank.save(1, state), ranks):
            save.wait("staged", timeout_s=20)
        slow = pool.submit(ranks[1].save, 2, slow_state)
        assert begun.wait(20)
        late = ranks[1].save(3, state)
        there = ranks[0].save(3, state)
        may_end.set()
        assert isinstance(slow.exception(20), CaptureFailed)
        assert "save() of another thread" in str(late.skipped)
        with pytest.raises(SaveFailed, match=r"rank 1: save\(\) of another thread"):
            there.wait("staged", timeout_s=20)
        for save in pool.map(lambda rank: rank.save(4, state), ranks):
            save.wait("staged", timeout_s=20)
        list(pool.map(lambda rank: rank.close(timeout_s=20), ranks))


def test_a_turn_is_not_waited_for_without_end() -> None:
    turns = Turns()
    waited: list[BaseException] = []

    def wait() -> None:
        try:
            turns.take("save", 0.05, lambda: None)
        except WaitTimeout as error:
            waited.append(error)
        waited.append(turns.take("save", 0.05, RuntimeError, RuntimeError))

    def work() -> None:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()

    turns.take("restore", 1, work)
    assert "save() waited for restore() of another thread" in str(waited[0])
    assert str(waited[1]) == "restore() of another thread has not ended"
    turns.take("save", 0, lambda: None)


class _Interrupt(BaseException):
    """What a signal handler raises."""


def test_an_interrupt_anywhere_leaves_the_turn_free() -> None:
    """At each instruction of a turn, as a signal handler may that raises."""
    turns = Turns()
    own = {Turns.take.__code__, Turns._end.__code__}
    left = 0
    kept: list[_Interrupt] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code not in own:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise _Interrupt
        return trace

    before = sys.gettrace()
    for point in range(1000):
        left = point
        sys.settrace(trace)
        try:
            turns.take("save", 1, lambda: None)
        except _Interrupt as error:
            sys.settrace(before)
            # While the error lives, as in the clause of a loop that saves once it is interrupted.
            turns.take("save", 0, lambda: None)
            kept.append(error)
        else:
            break
        finally:
            sys.settrace(before)
    assert 50 < len(kept) < 1000
