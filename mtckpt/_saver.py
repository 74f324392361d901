"""One save after another: begin, prepare, find a slot, capture, hand over.

Knows the order and what happens when a step of it fails: a slot goes back, a save is called off
with one sentence, the next one starts clean. Does not know when a save is due.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtckpt import _manifest, _pieces, _save, _writing
from mtckpt._handle import Save, size_text, stage_of_tier
from mtckpt._joining import Needs
from mtckpt._progress import progress
from mtckpt._room import bytes_below, left_bytes_at, ranks_full
from mtckpt._schedule import Disk, Peers
from mtckpt._slots import BESIDE
from mtckpt._steps import metrics_of
from mtckpt.adapters import active_adapters
from mtckpt.agent import protocol
from mtckpt.capture import gates
from mtckpt.errors import (
    AgentUnavailable,
    CheckpointError,
    SaveFailed,
    StageNotPlanned,
    StepExists,
    TierError,
    TierFull,
    TierUnavailable,
    UsageError,
    WaitTimeout,
)

if TYPE_CHECKING:
    from mtckpt._run import Run
    from mtckpt._schedule import Ram
    from mtckpt._shard import ShardLayout
    from mtckpt.capture.base import Engine

__all__ = ["Saver"]

logger = logging.getLogger(__name__)

_ANSWER_S = 0.5
_MIN_SLOTS = 2


class Saver:
    """See the module. ``insists``: RAM was asked for by name, so a full tmpfs is an error."""

    def __init__(self, run: Run, engine: Engine, ram: Ram, *, insists: bool) -> None:
        self.run = run
        self.counters = {"saves": 0, "called_off": 0}
        self.last: Save | None = None  # that was handed over
        self.steps: set[int] = set()
        self.ring = _save.SlotRing(engine, functools.partial(run.within, "ram"))
        self._session = run.session
        self._session.held = self._held
        self._engine = engine
        self._ram = ram
        self._insists = insists
        self._planner = _save.Planner()
        if "overlap" in ram.capture:
            gates.want()
        self._skipping = False
        self._leaving = False
        self._step = -1  # the newest that was begun
        # With its step, until the courier has it, or it has gone back.
        self._capturing: tuple[protocol.SlotGrant, int] | None = None
        self._ring_of = 0
        self._ring_slots = 2

    @property
    def all_counters(self) -> dict[str, int]:
        """Of the saves of this process; those that others have called off are called off here."""
        called_off = self.counters["called_off"] + self._session.called_off
        return {**self.counters, "called_off": called_off}

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float],
        labels: Sequence[str],
        every: int,
        stall_s: float,  # for a slot
    ) -> Save:
        """Save ``state`` as ``step``. ``every`` is the automatic interval to carry on, or 0."""
        planned = {label: stage_of_tier(label) for label in ("ram", *labels)}
        state, captured, failure = self._read(step, state)
        try:
            self._begin(self._needs(captured))
        except (AgentUnavailable, TierUnavailable) as error:
            return self._call_off(Save(step, planned=planned), _why(error))
        incarnation = self.run.incarnation
        assert incarnation is not None
        save_id = _manifest.save_id(incarnation.id, step, 0)
        save = Save(step, save_id, planned=planned)
        try:
            metrics = metrics_of(step, metrics)
            if failure is not None:
                raise failure
            if captured is None or self._planner.members is not self.run.members:
                self._planner = _save.Planner(self.run.members)
                captured = self._planner.prepare(state, active_adapters())
        except Exception as error:  # noqa: BLE001 - raised again, named
            # A user's state_dict or a framework may raise anything.
            self._decline(save, f"the state could not be read: {type(error).__name__}")
            _save.raise_capture_error(step, error)
        try:
            self._session.start()  # while the step counts as not saved
            grant = self._slot(captured.plan.layout, save, stall_s)
        except (AgentUnavailable, TierFull) as error:
            self._decline(save, error.what)
            raise
        if grant is None:
            return save
        members = self.run.members
        identity = _save.Identity(
            self.run.name, step, incarnation.number, incarnation.id, save_id,
            members.rank, members.world_size,
        )  # fmt: skip
        due = [label for label in labels if label != "ram"]
        self._capturing = grant, step
        try:
            slot = self.ring.adopt(grant, captured.plan.layout)
            writing = _writing.Writing(
                captured, slot, identity, self._engine,
                due=due, metrics=metrics, every=every, mode=self._ram.capture,
                may_leave=self._session.checks_left, write=self.ring.write,
            )  # fmt: skip
            if writing.is_done:
                writing.finish()
        except Exception as error:  # noqa: BLE001 - raised again, named; the slot goes back first
            return self._give_up(save, grant, error)
        if writing.is_captured:
            save._advance(("captured",))
        self.steps.add(step)
        self.counters["saves"] += 1
        self._note_going_on(step)
        seal = protocol.Seal(self._session.holder, grant.slot_id, grant.inode, save_id, step, due)
        after = functools.partial(self._prepare_next, captured.plan.layout)
        finish = None if writing.is_done else functools.partial(self._finish, writing, save, grant)
        self._session.submit(seal, save, after, finish, functools.partial(self._hand_over, save))
        return save

    def _held(self) -> dict[str, int]:
        """The slots of this process, also one that is being mapped: the agent's next one is not to
        take it for free."""
        capturing = {} if (now := self._capturing) is None else {now[0].slot_id: now[0].inode}
        return {**capturing, **self.ring.held()}

    def _hand_over(self, save: Save) -> None:
        """The courier has it: no interrupt keeps it from the agent any more."""
        self.last, self._capturing = save, None

    def _is_lost(self, step: int) -> bool:
        """Whether an interrupt ended the save of a step on its way to the agent."""
        idle, lost = self._session.wait_idle(_ANSWER_S), self._capturing
        return idle and lost is not None and lost[1] == step

    def _note_going_on(self, step: int) -> None:
        if self._skipping:
            self._skipping = False
            logger.warning("run %s: saves go on with step %d", self.run.name, step)

    def _read(self, step: int, state: Any) -> tuple[Any, _save.Captured | None, Exception | None]:
        """What a callable made, once a save; that taken apart, or why it could not be.

        The reason is told to the others once they have met.
        """
        self._step = step
        self._planner.members = self.run.members
        try:
            state = state() if _save.is_producer(state) else state
            return state, self._planner.prepare(state, active_adapters()), None
        except Exception as error:  # noqa: BLE001 - raised again, named
            # A user's state_dict or a framework may raise anything.
            return state, None, error

    def _needs(self, captured: _save.Captured | None) -> Needs | None:
        """What this rank would capture, and where, if that is to be agreed on; None where it cannot
        be told."""
        if captured is None or not self.run.lacks_layout:
            return None
        path = self._session.open().ram_root

        def look() -> tuple[int | None, int]:
            # What the run has there already makes room for what it saves.
            return left_bytes_at(path), bytes_below(os.path.join(path, self.run.key))

        free_bytes, own_bytes = self.run.within("ram", look)
        if free_bytes is None:
            return None
        layout = captured.plan.layout
        size_bytes = layout.size_bytes + layout.table_bytes
        shared = _pieces.shared_bytes(captured.plan.recipe, self.run.members)
        shared_bytes = min(size_bytes, shared)
        slots = _MIN_SLOTS if self._ram.slots == "auto" else int(self._ram.slots)
        return Needs(size_bytes - shared_bytes, shared_bytes, slots, free_bytes + own_bytes)

    def _finish(
        self, writing: _writing.Writing, save: Save, grant: protocol.SlotGrant
    ) -> bytes | None:
        """In the background: wait for what devices still copy; None where the slot is gone, and
        the save called off. Raises CaptureFailed."""
        self._leaving = True
        try:
            return writing.finish()
        except Exception as error:  # noqa: BLE001 - raised again, named
            # Here, too; the error is then told of the save.
            self.steps.discard(save.step)
            self._take_back(save, grant, error)
            self._call_off(save, _save.why_called_off(save.step, grant, error))
            return None
        finally:
            self._leaving = False

    def _give_up(self, save: Save, grant: protocol.SlotGrant, error: Exception) -> Save:
        """Raise why there is no capture; where only its slot is gone, the save is called off."""
        self._take_back(save, grant, error)
        self._capturing = None
        why = _save.why_called_off(save.step, grant, error)
        if not isinstance(error, TierUnavailable):
            self.ring.clear()  # memory was emptied: the agent begins it anew
        return self._call_off(save, why)

    def _take_back(self, save: Save, grant: protocol.SlotGrant, error: Exception) -> None:
        """Whatever went wrong, the slot goes back first; it has no generation word.

        One that a device may still write to does not: it is freed when this process has ended.
        """
        self._session.next_slot = None
        if not self.ring.withhold(grant):
            with contextlib.suppress(CheckpointError):
                release = protocol.Release(self._session.holder, grant.slot_id)
                self._session.call("release", release, protocol.Done)
        self._decline(save, f"the state could not be captured: {type(error).__name__}")

    def _slot(self, layout: ShardLayout, save: Save, stall_s: float) -> protocol.SlotGrant | None:
        """The next free slot, waited for ``stall_s`` at most; None calls the save off."""
        deadline_s = time.monotonic() + stall_s
        if not self._session.wait_idle(stall_s):
            leaving = "the previous save is still leaving the device"
            waiting = "the node agent has not taken the previous save yet"
            self._call_off(save, leaving if self._leaving else waiting)
            return None
        grant, self._session.next_slot = self._session.next_slot, None
        try:
            if grant is None or not self.ring.fits(grant, layout):
                want = protocol.WantSlots(
                    self._session.holder,
                    layout.size_bytes,
                    layout.table_bytes,
                    self._num_slots(layout),
                    max(0.0, deadline_s - time.monotonic()),
                    held=self.ring.withheld(),
                )
                self._give_back_lost(want.wait_s)
                slots = self._ask_slot(want)
                if (grant := slots.grant) is None:
                    self._call_off(save, slots.reason or "no slot is free")
                    return None
            return self._followed(grant)
        except (AgentUnavailable, TierUnavailable) as error:
            self._call_off(save, _why(error))
        except WaitTimeout as error:
            self._call_off(save, f"memory is too small now, and {error.what}")
        return None

    def _followed(self, grant: protocol.SlotGrant) -> protocol.SlotGrant:
        """A slot that another rank of this node has had moved to the disk with all others: this one
        looks there from now on."""
        place = os.path.join(self._disk_path() or "", BESIDE, "")
        has_moved = grant.data_path.startswith(place)
        if has_moved and not self._session.open().ram_root.startswith(place):
            self._session.move_slots(os.path.dirname(place))
        return grant

    def _give_back_lost(self, timeout_s: float) -> None:
        """The slot of a save that an interrupt ended on its way to the agent: it may hold all of a
        shard, and so would wait for a seal that never comes."""
        lost = self._capturing
        if lost is not None and not self.ring.withhold(lost[0]):
            release = protocol.Release(self._session.holder, lost[0].slot_id)
            self._session.call("release", release, protocol.Done, timeout_s)
        self._capturing = None

    def _begin(self, needs: Needs | None) -> None:
        if self.run.incarnation is not None:
            return
        self.run.prepare(needs)
        self._move_if_short()
        try:
            self.run.begin()
        except TierFull as error:
            self._move_slots(error)
            self.run.begin()
        place = os.path.dirname(self._session.open().ram_root)
        if os.path.basename(place) == BESIDE and place != self._session.ram_path:
            logger.warning(
                "run %s: saves are captured on disk, in %s, as by the start before, which has left"
                " there what no slower tier had; the next start looks at memory again",
                self.run.name, place,
            )  # fmt: skip

    def _ask_slot(self, want: protocol.WantSlots) -> protocol.Slots:
        try:
            return self._session.call("slots", want, protocol.Slots, self._patience_s(want))
        except TierFull as error:
            self._move_slots(error, amid_job=True)
            assert self.run.incarnation is not None
            self.run.send_begin(self.run.incarnation)
            return self._session.call("slots", want, protocol.Slots)

    def _move_if_short(self) -> None:
        """All ranks of this node are about to capture more than its memory holds, and know it. What
        was named, or has no disk, is full where somebody asks for a slot."""
        short, ram_path = self.run.short, self._session.open().ram_root
        if short is not None and not self._insists and self._disk_path():
            self.run.short = None  # also where an interrupt comes once they have moved
            self._move_slots(ranks_full(ram_path, len(self.run.members.node), *short))

    def _move_slots(self, error: TierFull, *, amid_job: bool = False) -> None:
        """Go on with slots on a disk, as do all ranks of the node. Raises the error, with what
        helps besides more memory, where memory is insisted on, or all is; amid a job WaitTimeout,
        where what is in memory comes to the disk first."""
        disk = self._disk_path() or ""
        beside = os.path.join(disk, BESIDE)
        if self._insists or not disk or self._session.ram_path == beside:
            raise self._with_advice(error)
        try:
            self._session.move_slots(beside)
        except (TierError, UsageError, WaitTimeout) as why:
            if amid_job and isinstance(why, WaitTimeout):
                raise
            # No room there either, or no right: what memory said stands. Or it has the only copy
            # of a step, which a slower tier is yet to be given.
            raise self._with_advice(error) from why
        if amid_job or self.run.members.rank == self.run.members.node[0]:
            logger.warning(
                "run %s: %s; saves are captured on disk instead, in %s; mtckpt doctor says how to"
                " give it more memory",
                self.run.name, error.what, beside,
            )  # fmt: skip

    def _with_advice(self, error: TierFull) -> TierFull:
        """What helps besides more memory, which the agent has said: it does not know the tiers."""
        if self._insists:
            advice = "leave Ram() out: saves are then captured on the disk of a Disk tier"
        elif not self._disk_path():
            advice = "name a Disk tier as well: saves are then captured there"
        else:
            return error
        error.actions = (*error.actions, advice)
        if self.run.short is not None and self._session.opened is not None:
            ranks = len(self.run.members.node)
            whole = ranks_full(self._session.opened.ram_root, ranks, *self.run.short)
            error.actions = (f"make room for all of them: {whole.what}", *error.actions)
        return error

    def _patience_s(self, want: protocol.WantSlots) -> float | None:
        """A ring that exists is answered at once; making one takes as long as its pages do."""
        known = self.ring.has((want.shard_bytes, want.table_bytes))
        return want.wait_s + _ANSWER_S if known else None

    def _num_slots(self, layout: ShardLayout) -> int:
        """Slots in the ring: three where memory allows, else two; decided once for a layout."""
        wanted = layout.size_bytes + layout.table_bytes
        if self._ring_of != wanted:
            self._ring_of = wanted
            path = self._session.open().ram_root
            free_bytes = self.run.within("ram", lambda: left_bytes_at(path)) or 0
            needed = 4 * wanted * len(self.run.members.node)  # by all ranks of this node
            fitting = 3 if free_bytes >= needed else 2
            self._ring_slots = fitting if self._ram.slots == "auto" else int(self._ram.slots)
            self._say_what_memory(wanted, free_bytes)
        return self._ring_slots

    def _say_what_memory(self, shard_bytes: int, free_bytes: int) -> None:
        members = self.run.members
        if members.rank != members.node[0]:
            return
        # A copy is kept until the next one is whole.
        others = sum(2 * tier.copies for tier in self.run.tiers if isinstance(tier, Peers))
        held = f" and {others} copies for other nodes" if others else ""
        ranks = len(members.node)
        total_bytes = (self._ring_slots + others) * shard_bytes * ranks
        logger.info(
            "run %s: memory of this node: %d slots%s of %s%s, %s in all; %s are free now",
            self.run.name, self._ring_slots, held, size_text(shard_bytes),
            f" for each of {ranks} ranks" if ranks > 1 else "",
            size_text(total_bytes), size_text(free_bytes),
        )  # fmt: skip

    def _disk_path(self) -> str | None:
        """The first tier on a disk, where there is one."""
        return next((tier.place for tier in self.run.tiers if isinstance(tier, Disk)), None)

    def _prepare_next(self, layout: ShardLayout) -> None:
        """In the background, after a seal: map the next slot before the next save needs it."""
        grant = self._session.next_slot
        try:
            if grant is None:
                want = protocol.WantSlots(
                    self._session.holder,
                    layout.size_bytes,
                    layout.table_bytes,
                    self._num_slots(layout),
                    0.0,
                    held=self.ring.withheld(),
                )
                grant = self._session.call("slots", want, protocol.Slots).grant
            if grant is not None:
                self._session.next_slot = grant  # before it is mapped: it is held from here on
                self.ring.adopt(grant, layout)
        except (CheckpointError, OSError) as error:
            # Only a head start is lost: the next save asks for its slot itself and raises.
            logger.debug("run %s: no slot ahead of time: %s", self.run.name, error)

    def await_staged(self, timeout_s: float) -> None:
        """Wait until the newest save is in memory of the node, or never will be: a restore that
        looked earlier would find an older one, or nothing."""
        deadline_s = time.monotonic() + timeout_s
        idle, last = self._session.wait_idle(timeout_s), self.last
        if idle and last is not None:
            with contextlib.suppress(SaveFailed, StageNotPlanned, WaitTimeout):
                last.wait("staged", timeout_s=max(0.0, deadline_s - time.monotonic()))

    def await_newest(self, last: Save, deadline_s: float) -> list[CheckpointError]:
        """Wait until ``last`` has come wherever it is to; the error if it has not in time."""
        with progress("close", total_bytes=0, run=self.run.name, step=last.step):
            while not last.done() and time.monotonic() < deadline_s:
                last._pause(0.2)
        if last.done():
            return []
        owed = "; ".join(f"{k}: {v}" for k, v in last._owed.items())
        owed = owed or f"{', '.join(sorted(last._waiting))}: still under way"
        return [
            SaveFailed(
                f"step {last.step} did not reach every tier in time: {owed}",
                stage=stage_of_tier(min(last._waiting, default="disk")),
                step=last.step,
            )
        ]

    def refuse_again(self, step: int) -> None:
        """Raise StepExists for a step that has been saved."""
        if step in self.steps and not self._is_lost(step):
            raise StepExists(
                f"step {step} was saved already in this start of the job",
                step=step,
                state="nothing was written",
                actions=("save each step once; restart or restore to save it again",),
            )

    def pass_over(self, step: int, labels: Sequence[str], reason: str) -> Save:
        """Call off a save that was not begun. The only call that may come amid another thread's."""
        incarnation = self.run.incarnation
        save_id = ""
        if incarnation is not None and step != self._step:  # else it would call off that one
            save_id = _manifest.save_id(incarnation.id, step, 0)
        planned = {label: stage_of_tier(label) for label in ("ram", *labels)}
        return self._call_off(Save(step, save_id, planned=planned), reason)

    def decline(self, step: int, reason: str) -> None:
        """Take no part in a step that this rank does not come to save."""
        incarnation = self.run.incarnation
        if incarnation is not None:
            self._decline(Save(step, _manifest.save_id(incarnation.id, step, 0)), reason)

    def _decline(self, save: Save, reason: str) -> None:
        """Nobody skips alone: the other ranks are told, where there are any."""
        if self.run.members.world_size > 1 and save.id:
            self._session.call_off(save, reason)

    def _call_off(self, save: Save, reason: str) -> Save:
        save._advance(skipped=reason)
        self._decline(save, reason)
        self.counters["called_off"] += 1
        if not self._skipping:
            self._skipping = True
            logger.warning(
                "run %s: the save of step %d was called off: %s", self.run.name, save.step, reason
            )
        return save


def _why(error: AgentUnavailable | TierUnavailable) -> str:
    """Why a save is called off: a tier names itself."""
    return error.what if isinstance(error, TierUnavailable) else f"the node agent: {error.what}"
