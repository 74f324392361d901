"""The public object: one run, its tiers, and the loop that trains.

Knows the order of things: open, restore, save, close, and which errors reach the loop when. The
work is done in ``_save``, ``_restore`` and the node agent; everything here is bounded in time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from mtckpt import _endings, _manifest, _restorer, _retention
from mtckpt._closing import bring_home, left_s, let_go
from mtckpt._gathering import survey
from mtckpt._handle import Restored, Save, Status, Step, check_seconds, stage_of_tier
from mtckpt._media import warn_of_media
from mtckpt._run import Run
from mtckpt._saver import Saver
from mtckpt._schedule import (
    Ram,
    Tempo,
    TierSettings,
    absolute,
    labels_of,
    make_schedule,
    split_tiers,
)
from mtckpt._session import Session
from mtckpt._steps import list_steps, metrics_of, step_number
from mtckpt._turns import Turns, in_turn
from mtckpt._usable import check_places
from mtckpt.agent import protocol
from mtckpt.capture.engine import AnyEngine
from mtckpt.errors import (
    CheckpointError,
    CloseFailed,
    ForkedProcess,
    RestoreIgnored,
    RunLocked,
    SaveFailed,
    UnsupportedPlatform,
    UsageError,
)

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)

State = Any
_open_runs: dict[tuple[str, int], weakref.ref[Checkpointer]] = {}


class Checkpointer:
    """Saves and restores the state of one training run.

    Args:
        run: the name of the run; a restart under the same name goes on with it.
        tiers: where to keep checkpoints, fastest first. By default memory of this machine, then
            ``./checkpoints``.
        group: what joins the ranks of a job of several. By default that of torch.distributed or
            jax.distributed, found at the first restore or save.
        timeout_s: how long the node agent, a tier, or other ranks may take to answer.
        max_stall_s: how long a save may wait for a free slot, or for another thread's call, before
            it is called off.
        on_failure: a tier that failed is raised by the next ``save``, or is a warning.

    Raises:
        UsageError: settings that cannot work, with the arithmetic; a directory of a new run that
            cannot be made.
        AccessDenied: a directory of a tier that others can change, or that is somebody else's.
        UnsupportedPlatform: this operating system can only read checkpoints.
    """

    def __init__(
        self,
        run: str,
        tiers: Sequence[TierSettings] | None = None,
        *,
        group: object = None,
        timeout_s: float = 60.0,
        max_stall_s: float = 2.0,
        on_failure: Literal["raise", "warn"] = "raise",
    ) -> None:
        if sys.platform != "linux":
            raise UnsupportedPlatform(
                f"taking part in a run needs Linux for now; this is {sys.platform}",
                actions=("mtckpt.load(location) reads checkpoints here",),
            )
        if on_failure not in ("raise", "warn"):
            raise UsageError(f"on_failure={on_failure!r}: must be 'raise' or 'warn'")
        self.run = run
        self._run_key = _manifest.run_key(run)
        check_seconds("timeout_s", timeout_s)
        check_seconds("max_stall_s", max_stall_s)
        self._ram, self._slow = split_tiers(tiers)
        insists = any(isinstance(tier, Ram) for tier in tiers or ())
        for tier in self._slow:
            _retention.parse_keep(tier.keep)
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._labels = labels_of(self._slow)
        self._schedule = make_schedule(self._ram, self._slow, self._labels)
        ram_path = absolute(self._ram.path) if self._ram.path else protocol.ram_base()
        places = dict(zip(self._labels, (tier.place for tier in self._slow), strict=True))
        warn_of_media(places, check_places(run, {"ram": ram_path, **places}))
        self._session = Session(
            run,
            self._run_key,
            [
                protocol.tier_config(label, tier, _retention.keep_to_wire(tier.keep))
                for label, tier in zip(self._labels, self._slow, strict=True)
            ],
            ram_path,
            timeout_s=timeout_s,
            on_error=_endings.told_weakly(self._failed),
        )
        slow = self._slow, self._labels
        self._link = Run(run, self._run_key, self._session, *slow, timeout_s, group)
        self._engine = AnyEngine()
        self._saver = Saver(self._link, self._engine, self._ram, insists=insists)
        self._max_stall_s = max_stall_s
        self._pid = os.getpid()
        self._closed = self._ended = False  # one after the other
        self._cut_off = False  # by an interrupt, in between
        self._behind: list[CheckpointError] | None = None  # what is not in all tiers at the end
        self._undone: list[CheckpointError] = []
        self._offered = 0  # the highest step that ``save`` was called with
        self._pending: list[SaveFailed] = []
        self._lock = threading.Lock()
        self._turns = Turns()
        self._restored: Restored | None = None
        self._tempo = Tempo()
        self._open_key = (self._run_key, getattr(group, "rank", 0))  # a thread may be a rank
        self._fence_older()
        _endings.close_at_exit(self)

    # -- the loop --------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """True if ``save(step, ...)`` would save anything. Costs a microsecond."""
        return self._schedule.is_due(step, time.monotonic())

    def save(
        self,
        step: int,
        state: State | Callable[[], State],
        *,
        metrics: Mapping[str, float] | None = None,
        tiers: Literal["due", "all"] = "due",
    ) -> Save:
        """Copy ``state`` into memory of the node and return; the agent does the rest.

        Does nothing when no tier is due. When it returns, the tensors may be changed: the bytes
        saved are those at the call. ``state`` may be a callable that is called only when due.

        Raises:
            SaveFailed: an *earlier* save failed to reach a tier (once, with the tier's error).
            StepExists: this step was saved already since the job started.
            UsageError: the step is lower than one that was offered before.
            UnsupportedState: a value that cannot be saved, with its path.
            CaptureFailed: the state could not be read; the step was not started.
            RunLocked: another process took the run over.
            GroupMissing: the job has several ranks, and nothing joins them (at the first call).
            RankTimeout: other ranks did not come to the first save of this start of the job.
        """
        if (
            tiers == "due"
            and type(step) is int
            and step >= self._offered
            and step not in self._saver.steps
            and not self._schedule.is_due(step, time.monotonic())
            and not self._pending
            and self._session.fenced is None
            and self._pid == os.getpid()
            and not self._closed
        ):
            self._offered = step
            return Save(step)
        return self._save(step, state, metrics or {}, tiers)

    def _save(self, step: int, state: Any, metrics: Mapping[str, float], tiers: str) -> Save:
        self._check_alive()
        self._link.enter()
        called_s = time.monotonic()

        def work() -> Save:
            left_s = max(0.0, self._max_stall_s - (time.monotonic() - called_s))
            return self._save_now(step, state, metrics, tiers, left_s)

        if self._link.group.world_size > 1 and self._link.incarnation is None:
            # All ranks meet at the first save, for which none can be called off.
            return self._turns.take("save", self._timeout_s, work)
        instead = functools.partial(self._pass_over, step, tiers)
        return self._turns.take("save", self._max_stall_s, work, instead)

    def _pass_over(self, step: int, tiers: str, reason: str) -> Save:
        """A save that another thread keeps from its turn is called off, on all ranks."""
        step = self._check_save(step)
        labels = self._wanted(step, tiers)
        if not labels:
            return Save(step)
        self._schedule.done(step, labels, time.monotonic())
        return self._saver.pass_over(step, labels, reason)

    def _wanted(self, step: int, tiers: str) -> list[str]:
        self._saver.refuse_again(step)
        return self._schedule.wanted(step, tiers, keeps_time=self._link.group.rank == 0)

    def _save_now(
        self, step: int, state: Any, metrics: Mapping[str, float], tiers: str, stall_s: float
    ) -> Save:
        started_s = time.perf_counter()
        step = self._check_save(step)
        self._link.join()
        labels = self._wanted(step, tiers)
        self._raise_failed(step, labels)
        if not labels:
            return Save(step)
        if self._link.group.world_size > 1:
            # All ranks are due at the same steps, whatever comes of this one here.
            self._schedule.done(step, labels, time.monotonic())
        every = self._schedule.every_to_carry
        save = self._saver.save(step, state, metrics, labels, every, stall_s)
        # A save that raised was not started: the tiers are still due.
        self._schedule.done(step, labels, time.monotonic())
        wanted = self._tempo.note(step, time.perf_counter() - started_s)
        self._schedule.adapt(wanted, self.run, at_once=self._link.group.world_size == 1)
        return save

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics of a saved step that became known later (an evaluation)."""
        self._check_alive()
        step = step_number(step)
        message = protocol.Report(self._session.holder, step, metrics_of(step, metrics))
        self._session.wait_idle(self._timeout_s)
        self._session.call("report", message, protocol.Done)

    @in_turn
    def restore(
        self,
        state: State,
        *,
        step: int | Literal["latest", "best"] = "latest",
        source: str | os.PathLike[str] | None = None,
        partial: bool = False,
        rename: Callable[[str], str | None] | None = None,
    ) -> Restored:
        """Load the newest healthy step into ``state``, verified, from the fastest tier that has it.

        Args:
            state: the template; what it holds is what is loaded, in place.
            step: a step number, or "best" by the KeepBest rule of a tier.
            source: another run's name, or the directory or URL of a run (a warm start).
            partial: load what both have; by default any difference is an error.
            rename: maps each path of the checkpoint to a new one; None drops it.

        Returns:
            Restored, which is false if there is no step of this run anywhere.

        Raises:
            StateMismatch: the full difference; live state is unchanged.
            NoHealthyStep: steps exist and none is usable.
            RestoreUnavailable: a tier did not answer, and no other one has a step.
            StepNotFound: the step that was asked for, or any of ``source``, does not exist.
            UsageError: ``step`` is neither a step nor one of the two words.
            GroupMissing: the job has several ranks, and nothing joins them.
            RankTimeout: other ranks did not come; restore has to be called on all of them.
        """
        if step not in ("latest", "best"):
            step = step_number(step, words='"latest", "best" or ')
        started_s = time.perf_counter()
        with self._meeting():
            done = _restorer.restore(self._link, self._engine, state, step, source, partial, rename)
        done.elapsed_s = time.perf_counter() - started_s
        _restorer.go_on(self._link, done, source)
        if done:
            if self._schedule.auto and done._every:
                self._schedule.tiers[0].every_steps = done._every
            self._saver.steps.clear()
            self._schedule.resumed(done.step or 0, time.monotonic())
        self._offered, self._restored = 0, done
        logger.info("run %s: %s%s", self.run, done._saved, done)
        return done

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around what all ranks look at together; by then the last save is in memory."""
        self._link.join()
        with self._link.meeting():
            self._session.open()
            self._saver.await_staged(self._timeout_s / 2)
            yield

    @in_turn
    def _read(self, state: Any, step: int, source: str | None, partial: bool) -> Restored:
        """``restore``, of a run that goes on from where it is: nothing of it changes."""
        with self._meeting():
            found = _restorer.restore(self._link, self._engine, state, step, source, partial, None)
        logger.info("run %s: %s%s", self.run, found._saved, found)
        return found

    @in_turn
    def _go_on_below(self, step: int) -> None:
        """Have the next save, of ``step``, go on from all below it, whatever was restored."""
        if 0 < self._offered < step:
            return  # it does so by itself
        with self._meeting():
            _restorer.go_on_below(self._link, step)
        self._saver.steps.clear()
        self._offered = 0

    def _records(self, step: Any, source: str | None = None) -> dict[int, _manifest.Record]:
        """See ``_restorer.records_of``."""
        self._check_alive()
        return _restorer.records_of(self._link, self._engine, step, source)

    def steps(self) -> list[Step]:
        """Every step of this run in every tier that answers, newest last.

        Those that are whole or damaged; a save still in the making, or called off, is none.
        """
        self._check_alive()
        return list_steps(survey(self._link))

    def status(self) -> Status:
        """What each tier holds and owes."""
        self._check_alive()
        self._link.enter()
        self._session.open()
        agent = self._session.status()
        run = next((r for r in agent.runs if r.run == self.run), None)
        return Status(
            run=self.run,
            incarnation=run.incarnation if run else 0,
            tiers=tuple(map(msgspec.structs.asdict, run.tiers)) if run else (),
            counters={**(run.counters if run else {}), **self._saver.all_counters},
            every=self._schedule.tiers[0].every_steps,
        )

    def close(self, *, timeout_s: float = 600.0) -> None:
        """Send the newest step to every tier, wait for it, and free the memory. Idempotent.

        One that an interrupt has ended goes on when it is called again.

        Raises:
            CloseFailed: what did not get there within ``timeout_s``, error by error.
            WaitTimeout: another thread's call did not end within it. Nothing was done.
        """
        check_seconds("timeout_s", timeout_s)
        if self._ended or self._pid != os.getpid():
            return
        deadline_s = time.monotonic() + timeout_s
        try:
            self._turns.take("close", timeout_s, functools.partial(self._close, deadline_s))
        except Exception:
            raise
        except BaseException:  # an interrupt: the next call goes on
            self._cut_off = True
            raise

    def _close(self, deadline_s: float) -> None:
        if self._ended:
            return  # by the thread that was waited for
        self._closed = True
        # Where an interrupt comes, all stays as it is: who calls again goes on from there.
        self._undone += self._take_pending()
        try:
            if self._behind is None:
                behind = bring_home(self._saver, self._labels, deadline_s, self._failed)
                self._behind = [*behind, *self._take_pending()]
            let_go(self._saver, deadline_s, free_ram=not self._behind)
        except RunLocked:
            pass  # Another process has it, and closes it.
        except CheckpointError as why:
            self._undone.append(why)
        self._undone += [*(self._behind or ()), *self._take_pending()]
        self._link.connections.close()
        self._session.close(left_s(deadline_s, 5.0))
        if self._session.wait_idle(0.0):  # else a device may still copy into a slot
            self._saver.ring.close()
        if _open_runs.get(self._open_key, lambda: None)() is self:
            del _open_runs[self._open_key]
        self._ended = True
        if errors := list({error.what: error for error in self._undone}.values()):
            error = CloseFailed(
                f"{len(errors)} pieces of work were not done: "
                + "; ".join(e.what for e in errors[:5]),
                state="what was staged stays in memory of this node until it is flushed",
                actions=("look at `mtckpt status`",),
                run=self.run,
            )
            error.errors = tuple(errors)
            raise error from errors[0]

    def __repr__(self) -> str:
        last = self._saver.last
        saved = f", saved step {last.step}" if last is not None else ""
        tiers = " + ".join(["ram", *self._labels])
        return f"Checkpointer({self.run!r}, {tiers}{saved}{', closed' if self._closed else ''})"

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close(timeout_s=_endings.EXIT_S)
        except CheckpointError as error:
            # The loop's own exception is on its way; ours must not hide it.
            logger.warning("run %s: while closing after an exception: %s", self.run, error)

    def __del__(self) -> None:
        # Not where the constructor raised, nor in a fork, nor if nobody was spoken to.
        is_open = not getattr(self, "_ended", True) and self._pid == os.getpid()
        if is_open and self._session.opened is not None:
            _endings.close_dropped(self)

    # -- saving ----------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(
                "this Checkpointer belongs to the process that opened it",
                owner_pid=self._pid,
                pid=os.getpid(),
                state="nothing was done",
                actions=("open one in this process, or save from the parent",),
            )
        if self._closed:
            raise UsageError("this Checkpointer is closed", actions=("use a newer one of it",))
        if self._session.fenced is not None:
            raise self._session.fenced

    def _check_save(self, step: int) -> int:
        self._check_alive()
        self._offered = number = step_number(step, least=self._offered)
        restored = self._restored
        if restored is not None and restored._must_read:
            raise RestoreIgnored(
                "the restored state was never read",
                state="nothing was saved",
                actions=("use `state = restored.state` after restore()",),
            )
        return number

    def _raise_failed(self, step: int, labels: Sequence[str]) -> None:
        """What went wrong since the last save; where that is raised, no rank saves this step."""
        failures = self._take_pending()
        if failures and self._on_failure == "warn":
            warnings.warn(str(failures[0]), RuntimeWarning, stacklevel=3)
        elif failures:
            if labels and self._link.group.world_size > 1:
                self._schedule.done(step, labels, time.monotonic())
                self._saver.decline(step, "an earlier save had failed")
            raise failures[0] from failures[0].__cause__

    def _failed(self, save: Save, error: CheckpointError) -> None:
        """A tier failed in the background: the next save raises it, or it is a warning."""
        tier = str(getattr(error, "tier", None) or "disk")
        stage = "staged" if not save.reached & {"staged"} else stage_of_tier(tier)
        failure = SaveFailed(
            f"step {save.step} did not reach {stage}: {error.what}",
            stage=stage,
            step=save.step,
            tier=getattr(error, "tier", None),
            state="training goes on; earlier steps are unchanged",
        )
        failure.__cause__ = error
        with self._lock:
            self._pending.append(failure)

    def _take_pending(self) -> list[SaveFailed]:
        with self._lock:
            failures, self._pending = self._pending, []
        return failures

    def _fence_older(self) -> None:
        older = _open_runs.get(self._open_key, lambda: None)()
        is_left = older is not None and (older._cut_off or not older._closed) and not older._ended
        if older is not None and is_left and older._pid == os.getpid():
            why = f"run {self.run} was opened again in this process"
            logger.warning("%s: the older one is closed", why)
            older._session.fenced = RunLocked(why, run=self.run, owner_pid=os.getpid())
            older._closed = older._ended = True
            older._session.close(0.1, last=older._saver.ring.close)
            older._link.connections.close()
        _open_runs[self._open_key] = weakref.ref(self)
