"""What a dead owner left in slots: finished captures become saves, the others free slots.

Knows which of them may be offered. Does not know how an owner's death is noticed.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from mtckpt._slots import DIRECTORY
from mtckpt.agent import queue, work
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM, Slot, new_id
from mtckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Leftovers", "adopt_slots"]

logger = logging.getLogger(__name__)


class Leftovers:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring) -> None:
        self._tools = tools
        self._ring = ring

    async def take_in(self, run: RunState, holder: str) -> None:
        """Something was brought into the run's memory, from where an agent is gone: it is as if
        this one had it. No part is a copy for another node any more; see ``adopt_slots``."""
        async with run.sealing:
            scanned = await self._tools.call(work.Scan(run.ram, run.key), work.Scanned)
            run.noted_guests = {}
            for scan in scanned.runs:
                run.note_scan(RAM, scan)
                adopt_slots(run, scan.slots, holder)

    async def settle(self, run: RunState, owner: Owner) -> None:
        """An owner died: seal what it had finished, free what it had not. Raises TierUnavailable
        where memory does not answer; what is not settled then is by another call."""
        trouble: CheckpointError | None = None
        async with run.sealing:
            mine = [
                s
                for s in run.slots.values()
                if s.state is SlotState.CAPTURING and s.holder == owner.holder
            ]
            scanned = {s.slot_id: s for s in await self._ring.scan_slots(run)} if mine else {}
            for slot in mine:
                found = scanned.get(slot.slot_id)
                if found is None:
                    run.slots.pop(slot.slot_id, None)
                    continue
                try:
                    await self._settle_slot(run, owner, slot, found)
                except CheckpointError as error:
                    trouble = error
            run.plans.pop(owner.holder, None)
        run.touch()
        if trouble is not None:
            raise trouble

    async def _settle_slot(
        self, run: RunState, owner: Owner, slot: Slot, found: work.SlotScan
    ) -> None:
        if not found.save:
            slot.state, slot.holder, slot.doubtful = SlotState.FREE, "", False
            return
        if (
            not owner.fenced_by
            and found.incarnation == owner.incarnation >= run.incarnation
            and _is_missing(run, found)
        ):
            try:
                save = await self._ring.seal_slot(run, slot, found.save, found.rank, verify=True)
            except CheckpointError as error:
                logger.warning("run %s: %s was not sealed: %s", run.key, found.save, error.what)
                if queue.is_owed(error):
                    raise
            else:
                run.finished.append(found.save)
                self._tools.events.emit(
                    "save.finished", run=run.run, step=save.name.step, owner_pid=owner.pid
                )
                return
        # A finished capture that must never be offered: it goes, so that no later agent seals it.
        if slot.slot_id in run.slots:
            await self._ring.free(run, slot)


def _is_missing(run: RunState, found: work.SlotScan) -> bool:
    """Whether a finished capture is a save, or the part of one, that is not there yet."""
    save = run.save_at(found.incarnation, found.step)
    return save is None or (
        str(save.name) == found.save and save.is_open and save.lacks(found.rank)
    )


def adopt_slots(run: RunState, found: list[work.SlotScan], holder: str) -> None:
    """Take in the slots that another agent left; ``holder`` may still be writing to them."""
    base = os.path.join(run.ram.path, run.key, DIRECTORY)
    known = {(slot.save, slot.rank) for slot in run.slots.values()}
    for scan in found:
        if scan.slot_id in run.slots:
            continue
        run.slots[scan.slot_id] = Slot(
            scan.slot_id,
            SlotState.CAPTURING,
            scan.shard_bytes,
            scan.table_bytes,
            scan.inode,
            os.path.join(base, f"{scan.slot_id}.safetensors"),
            os.path.join(base, f"{scan.slot_id}.xxh3"),
            os.path.join(base, f"{scan.slot_id}.json"),
            holder=holder,
            doubtful=True,
        )
    for save in run.saves.values():
        for rank in save.ranks.get(RAM, ()):
            if (str(save.name), rank) in known:
                continue
            slot = Slot(new_id(), SlotState.COMMITTED, save.shard_bytes[rank])
            slot.save, slot.rank = str(save.name), rank
            run.slots[slot.slot_id] = slot
