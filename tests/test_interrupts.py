"""Ctrl-C amid a call, descriptors or threads that run out: what comes after goes on as before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import builders
import numpy as np
import pytest

import mtckpt
from mtckpt import _shard
from mtckpt._held import Place
from mtckpt._manifest import SaveName
from mtckpt._source import open_shard
from mtckpt.capture import pages
from mtckpt.capture.cpu import CpuEngine, _Unit
from mtckpt.errors import AgentUnavailable, RestoreUnavailable, TierUnavailable
from mtckpt.tiers import LocalTier
from mtckpt.tiers.wrappers import DeadlineTier

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

_PACKAGE = os.path.dirname(mtckpt.__file__)
_STRIDE = 9


class Interrupting:
    """Raises KeyboardInterrupt at one of the points at which Python looks for signals: as one of
    our functions begins, or as a call of C from one ends."""

    def __init__(self, point: int) -> None:
        self._left = point

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(_PACKAGE):
            self._left -= 1
            if self._left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def test_an_interrupt_anywhere_in_a_save_costs_that_save_alone(seed: int) -> None:
    """With two slots: one that nobody gave back would leave none for any later save."""
    tiers = [mtckpt.Ram(every=1, slots=2)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10) as checkpointer:
        state = {"w": np.zeros(1000, int)}
        for step in (1, 2):
            checkpointer.save(step, state).wait("staged", timeout_s=20)
        step = 2
        for point in range(seed % _STRIDE, 2000, _STRIDE):
            step += 2
            sys.setprofile(Interrupting(point))
            try:
                checkpointer.save(step - 1, state)
            except KeyboardInterrupt:
                sys.setprofile(None)
            else:
                break
            finally:
                sys.setprofile(None)
            state["w"][:] = step
            saved = checkpointer.save(step, state)
            assert not saved.skipped, f"after an interrupt at point {point}"
            saved.wait("staged", timeout_s=20)
        assert 100 < point < 2000
        template = {"w": np.zeros(1000, int)}
        assert checkpointer.restore(template).step == step - 1
        assert (template["w"] == step - 2).all()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core copies by one thread")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("amid", ["own piece", "join"])
def test_nobody_copies_any_more_once_an_interrupt_is_out(amid: str) -> None:
    main = threading.main_thread()
    begun, at_work, interrupted = threading.Event(), threading.Event(), threading.Event()
    ended: list[int] = []

    def work(unit: _Unit) -> None:
        if threading.current_thread() is main:
            at_work.set()
            assert begun.wait(20)
            if amid == "own piece":
                interrupted.wait(20)
            return
        begun.set()
        assert at_work.wait(20)
        time.sleep(0.2)  # the caller gets to where it waits
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGINT)
        interrupted.set()
        time.sleep(0.3)  # as a large piece takes
        ended.append(unit.which)

    # Neither thread gets both pieces, as each waits for the other.
    units = [_Unit(which, 0, 0, 64 << 20, 0) for which in range(2)]
    with pytest.raises(KeyboardInterrupt):
        CpuEngine(max_threads=2)._run(units, work, sum(unit.size_bytes for unit in units))
    assert len(ended) == 1


DESCRIPTORS = """
import logging, os, resource, signal, sys, threading
import numpy as np
import mtckpt

heard = threading.Semaphore(0)

class Hear(logging.Handler):
    def emit(self, record):
        if "starting another" in record.getMessage() and record.threadName == "mtckpt-listener":
            heard.release()

logging.getLogger("mtckpt").addHandler(Hear())
tiers = [mtckpt.Ram(every=1), mtckpt.Disk(sys.argv[1])]
checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=20)
state = {"w": np.ones(1000)}
checkpointer.save(1, state).wait("local", timeout_s=20)
agent = int(open(os.environ["MTCKPT_RUNTIME_DIR"] + "/agent.pid").read())
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
os.kill(agent, signal.SIGKILL)
assert all(heard.acquire(timeout=10) for _ in range(2)), "nobody listens any more"
try:
    checkpointer.save(2, state)
except mtckpt.errors.CheckpointError as error:
    print(type(error).__name__, error.what)
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
checkpointer.save(3, state, tiers="all").wait("local", timeout_s=20)
checkpointer.close(timeout_s=20)
"""


def test_descriptors_that_run_out_while_the_agent_is_away_cost_a_save(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", DESCRIPTORS, str(tmp_path / "disk")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "CaptureFailed the record could not be written: Too many open files" in said.stdout


@pytest.fixture
def no_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """As where a limit of processes is reached (``pids.max`` of a container)."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    @contextlib.contextmanager
    def without() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            yield

    return without


def test_without_threads_calls_fail_by_errors_of_ours_and_work_again_later(
    tmp_path: Path, no_threads: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path / "disk")]
    checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)
    state = {"w": np.zeros(3_000_000, int)}  # more than one thread's share
    with no_threads(), pytest.raises(AgentUnavailable, match="can't start new thread"):
        checkpointer.save(1, state)
    checkpointer.save(1, state).wait("local", timeout_s=20)  # what raised was not saved
    with no_threads():
        saved = checkpointer.save(3, state)
        with pytest.raises(RestoreUnavailable, match="disk was not asked"):
            checkpointer.restore(state)
    saved.wait("local", timeout_s=20)
    checkpointer.save(4, state).wait("local", timeout_s=20)
    assert checkpointer.restore(state).step == 4
    with no_threads():  # as at the end of the process, which some versions of Python see so
        checkpointer.close(timeout_s=20)


def test_reading_goes_on_without_threads(
    tmp_path: Path, no_threads: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    path = builders.build_save(tmp_path, "r", 1, {"w": np.arange(4_000_000)})
    name = SaveName.parse(path.name)
    assert name is not None
    tier = LocalTier(tmp_path, read_only=True)
    slow = DeadlineTier(tier, timeout_s=10)
    with no_threads():
        assert mtckpt.load(path)["w"][-1] == 3_999_999
        with open_shard(Place(tier, tier, in_memory=True), "r", name, 0) as shard:
            shard.data.read_all()
            view = shard.data.read(0, shard.layout.size_bytes)
            _shard.verify_mapped(shard.layout, shard.table, memoryview(view))
        with pytest.raises(TierUnavailable, match="can't start new thread"):
            slow.stat("r")
        kept = [pages.fresh(pages._BLOCK_BYTES) for _ in range(3)]
        assert len(kept) == 3
    tier.close()
