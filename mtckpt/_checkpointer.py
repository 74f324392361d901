"""The public object: one run, its tiers, and the loop that trains.

Knows the order of things: open, restore, save, close, and which errors reach the loop when. The
work is done in ``_save``, ``_restore`` and the node agent; everything here is bounded in time.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mtckpt import _inventory, _manifest, _restore, _retention, _save
from mtckpt._coordination import check_single
from mtckpt._handle import Restored, Save, Status, Step, stage_of_tier
from mtckpt._manifest import Incarnation, Record
from mtckpt._progress import progress
from mtckpt._restore import Place
from mtckpt._schedule import AUTO_START_STEPS, Disk, DueTier, Ram, Schedule, auto_interval, parse_every
from mtckpt._session import Session
from mtckpt.adapters import active_adapters
from mtckpt.agent import protocol
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import (
    AgentUnavailable,
    CheckpointError,
    CloseFailed,
    FormatError,
    ForkedProcess,
    NoHealthyStep,
    RestoreIgnored,
    RestoreUnavailable,
    RunLocked,
    SaveFailed,
    StepExists,
    TierFull,
    TierUnavailable,
    UnsupportedPlatform,
    UsageError,
)
from mtckpt.tiers import LocalTier, Survives

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)

State = Any
_EXIT_S = 30.0
_open_runs: dict[str, weakref.ref[Checkpointer]] = {}


class Checkpointer:
    """Saves and restores the state of one training run.

    Args:
        run: the name of the run; a restart under the same name goes on with it.
        tiers: where to keep checkpoints, fastest first. By default memory of this machine, then
            ``./checkpoints``.
        timeout_s: how long the node agent or a tier may take to answer.
        max_stall_s: how long a save may wait for a free slot before it is called off.
        on_failure: a tier that failed is raised by the next ``save``, or is a warning.

    Raises:
        UsageError: settings that cannot work, with the arithmetic.
        UnsupportedPlatform: this operating system can only read checkpoints.
        GroupMissing: the job has several ranks.
    """

    def __init__(
        self,
        run: str,
        tiers: Sequence[Ram | Disk] | None = None,
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
        check_single(group)
        self.run = run
        self._run_key = _manifest.run_key(run)
        self._named = tiers is not None
        self._ram, self._disks = _split(tiers, run)
        self._max_stall_s = max_stall_s
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._labels = _labels(self._disks)
        self._schedule = _schedule(self._ram, self._disks, self._labels, self._named)
        ram_path = os.path.abspath(self._ram.path) if self._ram.path else protocol.ram_base()
        self._session = Session(
            run,
            self._run_key,
            [
                protocol.TierConfig(
                    label, "disk", os.path.abspath(disk.path), _retention.keep_to_wire(disk.keep)
                )
                for label, disk in zip(self._labels, self._disks, strict=True)
            ],
            ram_path,
            timeout_s=timeout_s,
            on_error=self._failed,
        )
        self._ring = _save.SlotRing()
        self._session.held = self._ring.held
        self._planner = _save.Planner()
        self._engine = CpuEngine()
        self._pid = os.getpid()
        self._closed = False
        self._incarnation: Incarnation | None = None
        self._parent: tuple[int, int] | None = None
        self._highest = 0
        self._scanned = False
        self._saved: set[int] = set()
        self._pending: list[SaveFailed] = []
        self._lock = threading.Lock()
        self._restored: Restored | None = None
        self._last: Save | None = None
        self._skipping = False
        self._counters = {"saves": 0, "called_off": 0}
        self._tempo = _Tempo()
        self._fence_older()
        atexit.register(_close_at_exit, weakref.ref(self))

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
            UnsupportedState: a value that cannot be saved, with its path.
            CaptureFailed: the state could not be read; the step was not started.
            RunLocked: another process took the run over.
        """
        if tiers == "due" and not self._pending and self._session.fenced is None:
            if self._pid == os.getpid() and not self._schedule.is_due(step, time.monotonic()):
                if type(step) is not int or step < 0:
                    raise UsageError(f"step must be an int of 0 or more, not {step!r}")
                return Save(step)
        started_s = time.perf_counter()
        self._check_save(step)
        labels = self._due_labels(step, tiers)
        if not labels:
            return Save(step)
        if step in self._saved:
            raise StepExists(
                f"step {step} was saved already in this start of the job",
                step=step,
                state="nothing was written",
                actions=("save each step once; restart or restore to save it again",),
            )
        try:
            return self._save_now(step, state, metrics or {}, labels)
        finally:
            self._schedule.done(step, labels, time.monotonic())
            self._adjust(step, time.perf_counter() - started_s)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics of a saved step that became known later (an evaluation)."""
        self._check_alive()
        message = protocol.Report(
            self._session.holder, step, {name: float(v) for name, v in metrics.items()}
        )
        self._session.wait_idle(self._timeout_s)
        self._session.call("report", message, protocol.Done)

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
            source: another run's name, or a directory of checkpoints (a warm start).
            partial: load what both have; by default any difference is an error.
            rename: maps each path of the checkpoint to a new one; None drops it.

        Returns:
            Restored, which is false if there is no step of this run anywhere.

        Raises:
            StateMismatch: the full difference; live state is unchanged.
            NoHealthyStep: steps exist and none is usable.
            RestoreUnavailable: a tier did not answer, and no other one has a step.
            StepNotFound: the step that was asked for does not exist.
        """
        self._check_alive()
        started_s = time.perf_counter()
        self._session.open()
        restored = self._restore(state, step, source, partial, rename)
        restored.elapsed_s = time.perf_counter() - started_s
        if restored:
            self._parent = None if source else (restored_incarnation(restored), restored.step or 0)
            self._incarnation = None
            self._saved.clear()
            self._schedule.resumed(restored.step or 0, time.monotonic())
        self._restored = restored
        logger.info("run %s: %s", self.run, restored)
        return restored

    def steps(self) -> list[Step]:
        """Every step of this run in every tier that answers, newest last."""
        self._check_alive()
        inventories, _ = self._scan(self._places())
        return list_steps(inventories.values(), {p.label: p.tier for p in self._places()})

    def status(self) -> Status:
        """What each tier holds and owes."""
        self._check_alive()
        self._session.open()
        with _agent_status(self._session) as agent:
            run = next((r for r in agent.runs if r.run == self.run), None)
        return Status(
            run=self.run,
            incarnation=run.incarnation if run else 0,
            tiers=tuple(_as_dict(tier) for tier in run.tiers) if run else (),
            counters={**(run.counters if run else {}), **self._counters},
            every=self._schedule.tiers[0].every_steps,
        )

    def close(self, *, timeout_s: float = 600.0) -> None:
        """Send the newest step to every tier, wait for it, and free the memory. Idempotent.

        Raises:
            CloseFailed: what did not get there within ``timeout_s``, error by error.
        """
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        errors: list[CheckpointError] = list(self._pending)
        self._pending.clear()
        try:
            errors += self._drain(timeout_s)
        finally:
            self._session.close(5.0)
            self._ring.clear()
            if _open_runs.get(self._run_key, _no_one)() is self:
                del _open_runs[self._run_key]
        if errors:
            error = CloseFailed(
                f"{len(errors)} pieces of work were not done: "
                + "; ".join(e.what for e in errors[:5]),
                state="what was staged stays in memory of this node until it is flushed",
                actions=("look at `mtckpt status`",),
                run=self.run,
            )
            error.errors = tuple(errors)
            raise error from errors[0]

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close(timeout_s=_EXIT_S)
        except CheckpointError as error:
            # The loop's own exception is on its way; ours must not hide it.
            logger.warning("run %s: while closing after an exception: %s", self.run, error)

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
            raise UsageError("this Checkpointer is closed", state="nothing was done")
        if self._session.fenced is not None:
            raise self._session.fenced

    def _check_save(self, step: int) -> None:
        self._check_alive()
        if type(step) is not int or not 0 <= step < _manifest.MAX_STEP:
            raise UsageError(f"step must be an int of 0 or more, not {step!r}")
        if self._pending:
            with self._lock:
                failure = self._pending.pop(0)
                self._pending.clear()
            raise failure from failure.__cause__
        restored = self._restored
        if restored is not None and getattr(restored, "_must_read", False):
            raise RestoreIgnored(
                "the restored state was never read",
                state="nothing was saved",
                actions=("use `state = restored.state` after restore()",),
            )

    def _due_labels(self, step: int, tiers: str) -> list[str]:
        if tiers == "all":
            return [tier.label for tier in self._schedule.tiers]
        if tiers != "due":
            raise UsageError(f"tiers={tiers!r}: must be 'due' or 'all'", state="nothing was done")
        return self._schedule.due(step, time.monotonic())

    def _save_now(
        self, step: int, state: State, metrics: Mapping[str, float], labels: Sequence[str]
    ) -> Save:
        planned = {"ram": "staged"}
        planned.update({label: stage_of_tier("disk") for label in labels if label != "ram"})
        try:
            self._begin()
        except AgentUnavailable as error:
            return self._call_off(Save(step, planned=planned), f"the node agent: {error.what}")
        assert self._incarnation is not None
        save_id = _manifest.save_id(self._incarnation.id, step, 0)
        save = Save(step, save_id, planned=planned)
        try:
            if _is_producer(state):
                state = state()
            captured = self._planner.prepare(state, active_adapters())
        except Exception as error:
            # A user's state_dict or a framework may raise anything: it is named and wrapped.
            raise _save.capture_error(step, error) from error
        grant = self._slot(captured.plan.layout, save)
        if grant is None:
            return save
        identity = _save.Identity(
            self.run, step, self._incarnation.number, self._incarnation.id, save_id
        )
        due = [label for label in labels if label != "ram"]
        every = self._schedule.tiers[0].every_steps if self._schedule.auto else 0
        try:
            slot = self._ring.adopt(grant, captured.plan.layout)
            _save.write_shard(
                captured, slot, identity, self._engine,
                due=due, metrics=metrics, every=every or 0,
            )  # fmt: skip
        except Exception as error:
            # Whatever went wrong, the slot goes back first; it has no generation word.
            self._session.next_slot = None
            with contextlib.suppress(CheckpointError):
                release = protocol.Release(self._session.holder, grant.slot_id)
                self._session.call("release", release, protocol.Done)
            raise _save.capture_error(step, error) from error
        save._advance(("captured",))
        self._saved.add(step)
        self._last = save
        self._counters["saves"] += 1
        if self._skipping:
            self._skipping = False
            logger.warning("run %s: saves go on with step %d", self.run, step)
        seal = protocol.Seal(
            self._session.holder, grant.slot_id, grant.inode, save_id, step, due
        )
        layout = captured.plan.layout
        self._session.submit(seal, save, lambda: self._prepare_next(layout))
        return save

    def _slot(self, layout: Any, save: Save) -> protocol.SlotGrant | None:
        """The next free slot, waited for ``max_stall_s`` at most; None calls the save off."""
        deadline_s = time.monotonic() + self._max_stall_s
        if not self._session.wait_idle(self._max_stall_s):
            self._call_off(save, "the node agent has not taken the previous save yet")
            return None
        grant, self._session.next_slot = self._session.next_slot, None
        if grant is not None and self._ring.fits(grant, layout):
            return grant
        want = protocol.WantSlots(
            self._session.holder,
            layout.size_bytes,
            layout.table_bytes,
            0 if self._ram.slots == "auto" else int(self._ram.slots),
            max(0.0, deadline_s - time.monotonic()),
        )
        try:
            slots = self._ask_slot(want)
        except AgentUnavailable as error:
            self._call_off(save, f"the node agent: {error.what}")
            return None
        if slots.grant is None:
            self._call_off(save, slots.reason or "no slot is free")
        return slots.grant

    def _ask_slot(self, want: protocol.WantSlots) -> protocol.Slots:
        try:
            return self._session.call("slots", want, protocol.Slots)
        except TierFull as error:
            beside = os.path.join(self._disk_path() or "", ".mtckpt-slots")
            if self._named or not self._disks or self._session.ram_path == beside:
                raise
            logger.warning(
                "run %s: %s; saves are captured on disk instead of in memory", self.run, error.what
            )
            os.makedirs(beside, mode=0o700, exist_ok=True)
            self._session.move_slots(beside)
            assert self._incarnation is not None
            self._send_begin(self._incarnation)
            return self._session.call("slots", want, protocol.Slots)

    def _disk_path(self) -> str | None:
        return os.path.abspath(self._disks[0].path) if self._disks else None

    def _prepare_next(self, layout: Any) -> None:
        """In the background, after a seal: map the next slot before the next save needs it."""
        grant = self._session.next_slot
        try:
            if grant is None:
                want = protocol.WantSlots(
                    self._session.holder,
                    layout.size_bytes,
                    layout.table_bytes,
                    0 if self._ram.slots == "auto" else int(self._ram.slots),
                    0.0,
                )
                grant = self._session.call("slots", want, protocol.Slots).grant
            if grant is not None:
                self._ring.adopt(grant, layout)
                self._session.next_slot = grant
        except (CheckpointError, OSError) as error:
            # Only a head start is lost: the next save asks for its slot itself and raises.
            logger.debug("run %s: no slot ahead of time: %s", self.run, error)

    def _call_off(self, save: Save, reason: str) -> Save:
        save._advance(skipped=reason)
        self._counters["called_off"] += 1
        if not self._skipping:
            self._skipping = True
            logger.warning("run %s: the save of step %d was called off: %s", self.run, save.step, reason)
        return save

    def _failed(self, save: Save, error: CheckpointError) -> None:
        """A tier failed in the background: the next save raises it, or it is a warning."""
        stage = "staged" if not save.reached & {"staged"} else "local"
        failure = SaveFailed(
            f"step {save.step} did not reach {stage}: {error.what}",
            stage=stage,
            step=save.step,
            tier=getattr(error, "tier", None),
            state="training goes on; earlier steps are unchanged",
        )
        failure.__cause__ = error
        if self._on_failure == "warn":
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
            return
        with self._lock:
            self._pending.append(failure)

    def _begin(self) -> None:
        """Start an incarnation before the first save of this start of the job."""
        if self._incarnation is not None:
            return
        self._session.open()
        if not self._scanned:
            self._scan(self._places())
        incarnation = Incarnation(
            version=_manifest.FORMAT_VERSION,
            run=self.run,
            number=self._highest + 1,
            id=str(uuid.uuid4()),
            parent=self._parent,
        )
        self._send_begin(incarnation)
        self._highest = incarnation.number
        self._session.incarnation = incarnation.number
        self._incarnation = incarnation

    def _send_begin(self, incarnation: Incarnation) -> None:
        message = protocol.Begin(
            self._session.holder, incarnation.number, incarnation.id, incarnation.parent
        )
        self._session.call("incarnation", message, protocol.Begun)

    def _adjust(self, step: int, stall_s: float) -> None:
        """Ram(every="auto"): the interval that keeps the measured loss under 1 %."""
        wanted = self._tempo.note(step, stall_s)
        first = self._schedule.tiers[0]
        if self._schedule.auto and wanted is not None and wanted != first.every_steps:
            old = first.every_steps or wanted
            if wanted > old or wanted < 0.8 * old:
                logger.info("run %s: saving every %d steps (was %d)", self.run, wanted, old)
                first.every_steps = wanted

    # -- restoring -------------------------------------------------------------------------------

    def _places(self) -> list[Place]:
        opened = self._session.open()
        ram = LocalTier(opened.ram_root, name="ram", survives=Survives.PROCESS, read_only=True)
        disks = [
            Place(label, LocalTier(disk.path, read_only=True), mapped=False)
            for label, disk in zip(self._labels, self._disks, strict=True)
            if os.path.isdir(disk.path)
        ]
        return [Place("ram", ram, mapped=True), *disks]

    def _scan(self, places: Sequence[Place]) -> tuple[dict[str, Any], dict[str, str]]:
        inventories, silent = _restore.scan_places(places, self._run_key, self._within)
        known = _inventory.all_incarnations(inventories.values())
        numbers = [i.number for i in known]
        numbers += [name.incarnation for inv in inventories.values() for name in inv.saves]
        self._highest = max([self._highest, *numbers])
        self._scanned = True
        return inventories, silent

    def _within(self, label: str, work: Callable[[], Any]) -> Any:
        """Run ``work`` in a thread that may be left behind, so that a stuck tier is an error."""
        result: list[Any] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:  # noqa: BLE001 - raised by the caller below
                failure.append(error)

        thread = threading.Thread(target=run, name=f"mtckpt-read-{label}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if failure:
            raise failure[0]
        if not result:
            raise TierUnavailable(
                f"tier {label} did not answer", tier=label, timeout_s=self._timeout_s
            )
        return result[0]

    def _restore(
        self,
        state: State,
        step: int | Literal["latest", "best"],
        source: str | os.PathLike[str] | None,
        partial: bool,
        rename: Callable[[str], str | None] | None,
    ) -> Restored:
        places, run_key = self._places(), self._run_key
        inventories, silent = self._scan(places)
        if source is not None:
            places, run_key = self._source(source, places)
            inventories, silent = _restore.scan_places(places, run_key, self._within)
        best = _retention.best_of([disk.keep for disk in self._disks])
        plan = _restore.plan_restore(list(inventories.values()), step, best=best)
        skipped = dict(plan.skipped)
        if not plan.candidates:
            if silent:
                raise RestoreUnavailable(
                    "; ".join(f"{label}: {why}" for label, why in silent.items()),
                    tiers=", ".join(silent),
                    state="live state unchanged",
                    actions=("repair or leave out the tier, then restart",),
                )
            if skipped:
                raise _no_healthy_step(skipped)
            return Restored(None, state)
        skipped.update({f"tier {label}": why for label, why in silent.items()})
        by_label = {place.label: place for place in places}
        for candidate in plan.candidates:
            bad: list[tuple[str, str, str]] = []
            size = sum(
                record.shard.size_bytes
                for record in inventories[candidate.sources[0]].saves[candidate.name].records.values()
            )
            try:
                with progress(
                    "restore", total_bytes=size, run=self.run, step=candidate.name.step
                ) as show:
                    outcome = self._within(
                        candidate.sources[0],
                        lambda c=candidate, b=bad, s=show: _restore.restore_from(
                            c, by_label, inventories, run_key, state, active_adapters(),
                            self._engine, partial=partial, rename=rename, bad=b, progress=s,
                        ),
                    )  # fmt: skip
            except (NoHealthyStep, FormatError) as error:
                skipped[f"step {candidate.name.step}"] = error.what
                continue
            finally:
                if source is None:
                    self._report_damage(bad)
            return self._restored_from(outcome, skipped)
        raise _no_healthy_step(skipped)

    def _restored_from(self, outcome: _restore.Outcome, skipped: dict[str, str]) -> Restored:
        record: Record = outcome.record
        age_s = max(0.0, time.time() - record.saved_at_s)
        logger.info(
            "run %s: step %d of incarnation %d, saved %.0f s ago on %s, from %s",
            self.run, record.step, record.incarnation, age_s, record.host,
            ", ".join(outcome.sources) or "no bytes",
        )  # fmt: skip
        if self._schedule.auto and record.every:
            self._schedule.tiers[0].every_steps = record.every
        restored = Restored(
            record.step,
            outcome.state,
            sources=outcome.sources,
            skipped={k: v for k, v in skipped.items()},
            id_=record.save_id,
        )
        restored._incarnation = record.incarnation
        return restored

    def _source(
        self, source: str | os.PathLike[str], places: Sequence[Place]
    ) -> tuple[list[Place], str]:
        """Another run of these tiers, or a directory of checkpoints."""
        text = os.fspath(source)
        if not isinstance(source, os.PathLike) and "/" not in text:
            return list(places), _manifest.run_key(text)
        root, _, key = os.path.abspath(text).rpartition("/")
        if not os.path.isdir(text):
            raise RestoreUnavailable(
                f"there is no directory {text}", tiers="source", state="live state unchanged"
            )
        return [Place("disk", LocalTier(root, read_only=True), mapped=False)], key

    def _report_damage(self, bad: Sequence[tuple[str, str, str]]) -> None:
        for label, key, reason in bad:
            logger.warning("run %s: %s of tier %s is damaged: %s", self.run, key, label, reason)
            with contextlib.suppress(CheckpointError):
                self._session.call("damage", protocol.Damage(label, key, reason), protocol.Done)

    # -- the end ---------------------------------------------------------------------------------

    def _drain(self, timeout_s: float) -> list[CheckpointError]:
        deadline_s = time.monotonic() + timeout_s
        session = self._session
        if session.opened is None:
            return []
        errors: list[CheckpointError] = []
        if not session.wait_idle(timeout_s):
            errors.append(AgentUnavailable("the node agent did not take the last save", run=self.run))
            return errors
        last = self._last
        try:
            if last is not None and session.fenced is None:
                last._plan({label: "local" for label in self._labels})
                session.watch(last)
                session.call("flush", protocol.Flush(session.holder), protocol.Done)
                errors += self._await_newest(last, deadline_s)
            with self._lock:
                errors += self._pending
                self._pending.clear()
            session.stop_listening()
            session.call(
                "close", protocol.Close(session.holder, free_ram=not errors), protocol.Done
            )
        except (CheckpointError, RunLocked) as error:
            if not isinstance(error, RunLocked):
                errors.append(error)
        return errors

    def _await_newest(self, last: Save, deadline_s: float) -> list[CheckpointError]:
        with progress("close", total_bytes=0, run=self.run, step=last.step):
            while not last.done() and time.monotonic() < deadline_s:
                last._pause(0.2)
        if last.done():
            return []
        owed = "; ".join(f"{k}: {v}" for k, v in last._owed.items()) or "still under way"
        return [
            SaveFailed(
                f"step {last.step} did not reach every tier in time: {owed}",
                stage="local",
                step=last.step,
            )
        ]

    def _fence_older(self) -> None:
        older = _open_runs.get(self._run_key, _no_one)()
        if older is not None and not older._closed and older._pid == os.getpid():
            logger.warning("run %s was opened again in this process: the older one is closed", self.run)
            older._session.fenced = RunLocked(
                f"run {self.run} was opened again in this process",
                run=self.run,
                owner_pid=os.getpid(),
            )
            older._closed = True
            older._session.close(0.1)
        _open_runs[self._run_key] = weakref.ref(self)


class _Tempo:
    """Measures what saving costs against what a step takes."""

    def __init__(self) -> None:
        self._last_step: int | None = None
        self._last_s = 0.0
        self._stalls: list[float] = []

    def note(self, step: int, stall_s: float) -> int | None:
        """After a save: the interval that keeps the loss under 1 %, once it can be known."""
        now_s = time.perf_counter()
        wanted = None
        if self._last_step is not None and step > self._last_step:
            step_s = (now_s - stall_s - self._last_s) / (step - self._last_step)
            # The first stall has the slots' first touch in it: the median of the last five counts.
            self._stalls = [*self._stalls[-4:], stall_s]
            wanted = auto_interval(sorted(self._stalls)[len(self._stalls) // 2], step_s)
        self._last_step, self._last_s = step, now_s
        return wanted


def restored_incarnation(restored: Restored) -> int:
    return int(getattr(restored, "_incarnation", 0))


def _no_healthy_step(skipped: Mapping[str, str]) -> NoHealthyStep:
    lines = "\n".join(f"  {what}: {why}" for what, why in skipped.items())
    return NoHealthyStep(
        f"steps exist and none of them is usable:\n{lines}\n ",
        reasons=tuple(f"{what}: {why}" for what, why in skipped.items()),
        state="live state unchanged",
        actions=(
            "mtckpt verify --read-data shows every damaged file",
            "start under another run name to begin again from nothing",
        ),
    )


def _split(tiers: Sequence[Ram | Disk] | None, run: str) -> tuple[Ram, list[Disk]]:
    if tiers is None:
        return Ram(), [Disk("checkpoints")]
    rams = [tier for tier in tiers if isinstance(tier, Ram)]
    disks = [tier for tier in tiers if isinstance(tier, Disk)]
    if len(rams) + len(disks) != len(tiers) or not tiers or len(rams) > 1:
        raise UsageError(
            f"tiers={list(tiers)!r}: give at most one Ram and any number of Disk tiers",
            state="nothing was done",
        )
    for disk in disks:
        _retention.parse_keep(disk.keep)
    return (rams[0] if rams else Ram(every=1)), disks


def _labels(disks: Sequence[Disk]) -> list[str]:
    return ["disk" if i == 0 else f"disk-{i + 1}" for i in range(len(disks))]


def _schedule(ram: Ram, disks: Sequence[Disk], labels: Sequence[str], named: bool) -> Schedule:
    auto = ram.every == "auto"
    now_s = time.monotonic()
    first = DueTier("ram", AUTO_START_STEPS if auto else int(ram.every), None, last_s=now_s)
    slower = [
        DueTier(label, *parse_every(disk.every, times=True), last_s=now_s)
        for label, disk in zip(labels, disks, strict=True)
    ]
    return Schedule([first, *slower], auto=auto)


def _is_producer(state: Any) -> bool:
    """A callable that makes the state; a module is callable too, and is state itself."""
    return callable(state) and not hasattr(state, "state_dict") and not isinstance(state, Mapping)


def list_steps(inventories: Any, tiers: Mapping[str, Any]) -> list[Step]:
    """The saves of several inventories as steps, oldest first."""
    inventories = list(inventories)
    line = _manifest.newest_line(_inventory.all_incarnations(inventories))
    names = sorted({name for inv in inventories for name in inv.saves})
    steps = []
    for name in names:
        entries = [inv.saves[name] for inv in inventories if name in inv.saves]
        complete = [e for e in entries if e.complete and not e.aborted]
        record = next((e.records[r] for e in complete for r in e.records), None)
        metrics: dict[str, float] = {}
        for entry in entries:
            metrics.update(entry.metrics)
        stages = {stage_of_tier(e.tier.partition("-")[0]) for e in complete}
        steps.append(
            Step(
                step=name.step,
                id=record.save_id if record else name.short_id,
                tiers=tuple(e.tier for e in complete),
                stages=tuple(sorted(stages, reverse=True)),
                size_bytes=max((e.size_bytes for e in entries), default=0),
                metrics=metrics,
                damaged=tuple(p for e in entries for p in e.problems),
                incarnation=name.incarnation,
                abandoned=bool(line) and not _manifest.on_line(name, line),
            )
        )
    return steps


@contextlib.contextmanager
def _agent_status(session: Session) -> Any:
    yield session.status()


def _as_dict(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _no_one() -> None:
    return None


def _close_at_exit(reference: weakref.ref[Checkpointer]) -> None:
    checkpointer = reference()
    if checkpointer is not None and not checkpointer._closed:
        try:
            checkpointer.close(timeout_s=_EXIT_S)
        except CheckpointError as error:
            # At exit there is nobody left to raise to: the log and the agent's status have it.
            logger.error("run %s: while closing at exit: %s", checkpointer.run, error)
