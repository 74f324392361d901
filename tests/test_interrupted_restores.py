"""Ctrl-C amid restore() and close(): nobody writes to live state, and what comes next works."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt import _delivery, _session
from mtckpt.capture import cpu

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

_PACKAGE = os.path.dirname(mtckpt.__file__)
_STRIDE = 499  # of some 6000 points; where it starts is drawn anew each time
_STRIDE_OF_CLOSE = 71


def _end_of(*names: str) -> None:
    for thread in threading.enumerate():
        if thread.name.startswith(names):
            thread.join(20)
            assert not thread.is_alive(), thread


@pytest.mark.usefixtures("interruptible")
def test_nobody_writes_to_live_state_once_an_interrupt_is_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is checked and placed in one pass, by a thread that the caller waits for."""
    main = threading.main_thread()
    assert main.ident is not None
    copy, ident = cpu._copy, main.ident
    interrupted, gone_on = threading.Event(), threading.Event()

    def slowly(target: int, source: int, size_bytes: int) -> None:
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(ident, signal.SIGINT)
            gone_on.wait(0.3)  # unless the call waits for this
        copy(target, source, size_bytes)

    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1, slots=2)], timeout_s=20) as checkpointer:
        state: dict[str, Any] = {"w": np.zeros(24 << 20, np.uint8)}
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)  # as more would be
        monkeypatch.setattr(cpu, "_copy", slowly)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.restore(state)
        state["w"][:] = 7  # the user goes on with something else
        gone_on.set()
        _end_of("mtckpt-read", "mtckpt-copy")
        assert interrupted.is_set()
        assert (state["w"] == 7).all()
        assert checkpointer.restore(state).step == 1
        assert not state["w"].any()


def test_what_was_not_begun_for_lack_of_a_thread_is_brought_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written to live state: it is not undefined."""
    read, start = _delivery.Delivery._read, threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("mtckpt-read"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def without_threads(*args: Any) -> list[int]:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            return read(*args)

    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path / "disk")]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20) as checkpointer:
        state: dict[str, Any] = {"w": np.ones(24 << 10, np.uint8)}
        checkpointer.save(1, state).wait("local", timeout_s=20)
        monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)  # as more would be
        monkeypatch.setattr(_delivery.Delivery, "_read", without_threads)
        state["w"][:] = 7
        assert checkpointer.restore(state).step == 1
        assert (state["w"] == 1).all()


class Interrupting:
    """Raises KeyboardInterrupt as a function of ours begins, or a call that one makes begins or
    ends: what waits is in a call."""

    def __init__(self, point: int) -> None:
        self.left = point

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        at = frame.f_back if event == "call" and frame.f_back else frame
        ours = any(f.f_code.co_filename.startswith(_PACKAGE) for f in (frame, at))
        if ours and event in ("call", "c_return"):
            self.left -= 1
            if self.left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def _interrupted(point: int, work: Callable[[], object]) -> bool:
    """Whether the work was interrupted: it has a point of that number."""
    interrupt = Interrupting(point)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            sys.setprofile(interrupt)
            work()
        finally:
            sys.setprofile(None)
    return interrupt.left < 0


# Where a generator is let go of amid the interrupt, Python says so and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_anywhere_in_a_restore_costs_that_restore_alone(
    tmp_path: Path, seed: int
) -> None:
    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path / "disk")]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10) as checkpointer:
        state: dict[str, Any] = {"w": np.zeros(1000, int), "n": 0}
        for step, point in enumerate(range(seed % _STRIDE, 9000, _STRIDE), 1):
            state["w"][:] = state["n"] = step
            saved = checkpointer.save(step, state)
            assert not saved.skipped, f"{saved.skipped}: after an interrupt at point {point}"
            saved.wait("local", timeout_s=20)
            state["w"][:] = state["n"] = -1
            if not _interrupted(point, lambda: checkpointer.restore(state)):
                break
            state["w"][:] = state["n"] = -2
            restored = checkpointer.restore(state)
            assert (restored.step, state["n"]) == (step, step)
            assert (state["w"] == step).all()
        assert 100 < point < 9000
        _end_of("mtckpt-read")


def test_a_save_that_was_not_handed_over_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Any] = {"w": np.ones(1000, int)}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def lose(checkpointer: mtckpt.Checkpointer, step: int) -> None:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(_session.Session, "submit", interrupted)
            checkpointer.save(step, state)

    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path / "disk", every=100)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=90, max_stall_s=10) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        lose(checkpointer, 2)
        checkpointer.save(2, state).wait("staged", timeout_s=20)  # it was no step yet
        lose(checkpointer, 3)
        assert checkpointer.restore(state).step == 2
        checkpointer.save(4, state).wait("staged", timeout_s=20)
        lose(checkpointer, 5)
    assert [step.step for step in mtckpt.steps(tmp_path / "disk" / "r")] == [4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_after_an_interrupt_anywhere_in_close_the_run_is_opened_again(
    tmp_path: Path, seed: int
) -> None:
    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path / "disk")]
    state: dict[str, Any] = {"w": np.zeros(1000, int)}
    for point in range(seed % _STRIDE_OF_CLOSE, 9000, _STRIDE_OF_CLOSE):
        checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)
        step = checkpointer.restore(state).next_step + 1
        state["w"][:] = step
        saved = checkpointer.save(step, state)
        assert not saved.skipped, f"{saved.skipped}: after an interrupt at point {point}"
        if not _interrupted(point, checkpointer.close):
            break
        if point % 2:  # else it is left to who opens the run again
            checkpointer.close(timeout_s=20)
            assert mtckpt.load(tmp_path / "disk" / "r")["w"][0] == step
            _end_of("mtckpt-")
    assert 100 < point < 9000
