"""The slots of a run: handed out, sealed, recycled, freed.

Knows the states of a slot and in which order files and states change. Does not copy a byte. A slot
is marked before anything is awaited, so that no two callers ever get the same one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

from mtckpt import _manifest
from mtckpt.agent import protocol, queue, work
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM, Plan, SaveState, Slot, new_id
from mtckpt.agent.tools import until
from mtckpt.errors import CheckpointError, Damaged, ObjectNotFound, StepExists, TierFull

if TYPE_CHECKING:
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Ring"]

logger = logging.getLogger(__name__)

MIN_RING = 2
MAX_WAIT_S = 60.0


class Ring:
    """What is done with slots; one for the agent, the state is the run's."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # -- handing out -----------------------------------------------------------------------------

    async def want(
        self, run: RunState, owner: Owner, message: protocol.WantSlots
    ) -> protocol.Slots:
        """A slot, now or within ``wait_s``. Raises TierFull where not even two fit."""
        if run.draining:
            return protocol.Slots(None, run.draining)
        plan = Plan(message.shard_bytes, message.table_bytes)
        run.plans[owner.holder] = (plan, max(1, message.count))
        run.doubt_others(owner, message.held)
        deadline_s = time.monotonic() + min(message.wait_s, MAX_WAIT_S)
        looked_at_doubtful = False
        while True:
            run.owner_of(owner.holder)  # it may have been fenced while we waited
            changed = run.changed
            slot = await self._obtain(run, owner)
            if slot is not None:
                self._tools.start(self._fill_up(run, owner), f"slots of {run.key}")
                return protocol.Slots(self._granted(run, owner, slot))
            if not looked_at_doubtful:
                looked_at_doubtful = True
                if await self._free_doubtful(run, owner):
                    continue
            left_s = deadline_s - time.monotonic()
            if run.allocating:
                left_s = max(left_s, self._tools.limits.call_timeout_s)
            if left_s <= 0:
                run.counters["no_slot"] += 1
                return protocol.Slots(None, self.why_busy(run))
            # Leases of readers end without telling us, so it is tried again now and then.
            await until(changed, min(left_s, 0.1))

    async def next_for(self, run: RunState, owner: Owner) -> protocol.SlotGrant | None:
        """A slot for the reply to a seal, if there is one without waiting or allocating."""
        if owner.holder not in run.plans or run.draining:
            return None
        try:
            slot = self._take_free(run, owner) or await self._recycle(run, owner)
        except CheckpointError as error:
            logger.warning("run %s: no slot for the next save: %s", run.key, error)
            return None
        return self._granted(run, owner, slot) if slot else None

    def _granted(self, run: RunState, owner: Owner, slot: Slot) -> protocol.SlotGrant:
        """What the owner left in its last slot it is likely to leave in this one."""
        if owner.left:
            self._tools.start(self._look_ahead(run, owner.left, slot), f"slot of {run.key}")
        return slot.grant()

    async def _look_ahead(self, run: RunState, left: bytes, slot: Slot) -> None:
        command = work.LookAhead(run.ram, run.key, slot.slot_id, slot.inode, left)
        try:
            await self._tools.call(command, work.Looked, slot.shard_bytes)
        except CheckpointError as error:
            # Only a head start is lost: the seal looks at all that was left.
            logger.debug("run %s: nothing was looked at ahead: %s", run.key, error)

    def _take_free(self, run: RunState, owner: Owner) -> Slot | None:
        if owner.is_out:
            return None
        plan, _ = run.plans[owner.holder]
        for slot in run.slots.values():
            if slot.state is SlotState.FREE and slot.fits(plan):
                slot.state, slot.holder, slot.rank = SlotState.CAPTURING, owner.holder, owner.rank
                slot.doubtful = False
                return slot
        return None

    async def _obtain(self, run: RunState, owner: Owner) -> Slot | None:
        slot = self._take_free(run, owner)
        if slot is None:
            slot = await self._allocate(run, owner)
        return slot or await self._recycle(run, owner)

    async def _allocate(self, run: RunState, owner: Owner) -> Slot | None:
        """A new slot, CAPTURING, if the ring is not full. None if it is, or memory is."""
        if owner.is_out or run.emptying:
            return None
        plan, count = run.plans[owner.holder]
        size = len(run.ring(owner, plan)) + run.allocating
        if size >= count:
            return None
        run.allocating += 1
        try:
            try:
                files = await self._allocate_files(run, plan)
            except TierFull:
                if not await self._free_other_plans(run, plan, hard=True):
                    raise
                files = await self._allocate_files(run, plan)
        except TierFull as error:
            if size < MIN_RING:
                raise
            run.plans[owner.holder] = (plan, size)
            logger.warning("run %s: no room for slot %d: %s", run.key, size + 1, error.what)
            return None
        finally:
            run.allocating -= 1
        slot = Slot.of(files, SlotState.CAPTURING)
        slot.holder, slot.rank = owner.holder, owner.rank
        run.slots[slot.slot_id] = slot
        if run.gone or owner.is_out:
            await self.free(run, slot)
            return None
        return slot

    async def _allocate_files(self, run: RunState, plan: Plan) -> work.SlotFiles:
        command = work.Allocate(run.ram, run.key, new_id(), plan.shard_bytes, plan.table_bytes)
        return await self._tools.call(command, work.SlotFiles, plan.shard_bytes)

    async def _fill_up(self, run: RunState, owner: Owner) -> None:
        """Allocate the rest of the ring while training goes on."""
        while not owner.dead and owner.holder in run.plans and not run.allocating:
            slot = await self._allocate(run, owner)
            if slot is None:
                return
            slot.state, slot.holder = SlotState.FREE, ""
            run.touch()

    # -- recycling -------------------------------------------------------------------------------

    async def _recycle(self, run: RunState, owner: Owner) -> Slot | None:
        """Make a slot of the oldest save that RAM need not hold any more, CAPTURING."""
        if owner.is_out:
            return None
        plan, _ = run.plans[owner.holder]
        busy: set[str] = set()
        while not owner.is_out and (name := queue.pick_recycle(run.facts(), frozenset(busy))):
            save = run.saves[name]
            shard = next(
                (s for s in run.slots.values() if s.save == name and s.rank == owner.rank), None
            )
            if shard is None or not shard.fits(plan):
                busy.add(name)  # of another shape, or of a rank that is no more: tidy() frees it
                continue
            slot = await self.recycle_shard(run, save, shard)
            if slot is None:
                busy.add(name)
                continue
            if not slot.fits(plan):
                await self.free(run, slot)
            elif owner.is_out:
                # It went while the slot was made, and what it left is settled: nobody has this one.
                slot.state = SlotState.FREE
            else:
                slot.state, slot.holder = SlotState.CAPTURING, owner.holder
                slot.rank = owner.rank
                return slot
        return None

    async def recycle_shard(self, run: RunState, save: SaveState, shard: Slot) -> Slot | None:
        """None while somebody reads it. The slot is taken: no other caller sees it."""
        save.recycling = True
        try:
            async with run.lock(save, RAM):
                if run.slots.get(shard.slot_id) is not shard:
                    return None  # somebody else was faster
                command = work.Recycle(run.ram, run.key, str(save.name), shard.rank, shard.slot_id)
                files = (await self._tools.call(command, work.Recycled)).files
        except ObjectNotFound:  # deleted by a command whose answer was lost
            run.drop_shard(save, shard.slot_id, shard.rank)
            self.note_gone(run, save)
            return None
        finally:
            save.recycling = False
        if files is None:
            return None
        run.drop_shard(save, shard.slot_id, shard.rank)
        self.note_gone(run, save)
        slot = Slot.of(files, SlotState.CAPTURING)
        run.slots[slot.slot_id] = slot
        run.touch(save)
        return slot

    def note_gone(self, run: RunState, save: SaveState) -> None:
        """Some of a save was let go: tiers that nobody can give it to any more take a newer one."""
        if save.called_off:
            return
        for label in save.owed:
            if run.source_for(save, label) is None:
                self.supersede(run, save, label)

    def supersede(self, run: RunState, save: SaveState, label: str) -> None:
        """A tier takes a newer save instead of this one: counted, no error."""
        save.superseded.add(label)
        save.owed_why.pop(label, None)
        run.counters["superseded"] += 1
        self._tools.count("saves_superseded", label)
        self._tools.events.emit("save.superseded", run=run.run, step=save.name.step, tier=label)

    def why_busy(self, run: RunState) -> str:
        """One sentence that names what holds each slot."""
        facts = {f.name: f for f in run.facts()}
        parts = []
        for slot in run.slots.values():
            if slot.save in facts:
                why = queue.blocks_recycling(facts[slot.save], list(facts.values()))
                parts.append(
                    f"step {run.saves[slot.save].name.step} {why or 'is held by a reader'}"
                )
            elif slot.state is SlotState.CAPTURING:
                fenced = slot.holder in run.fenced
                parts.append("one is a fenced process's" if fenced else "one is captured")
        each = Counter(parts).items()
        said = [part if n == 1 else part.replace("one is", f"{n} are", 1) for part, n in each]
        return f"no slot is free: {'; '.join(said) or 'none could be allocated'}"

    # -- sealing ---------------------------------------------------------------------------------

    async def seal(self, run: RunState, owner: Owner, message: protocol.Seal) -> tuple[str, str]:
        """The captured slot becomes a save: its name. Or why none comes of it, which the caller
        tells the other ranks. The caller asks for the next slot."""
        name = _manifest.save_name(message.step, owner.incarnation, message.save_id)
        async with run.sealing:
            run.owner_of(owner.holder)
            owner.last_step = max(owner.last_step, message.step)
            save = run.saves.get(str(name))
            if save is not None and save.called_off:
                await self.release(run, owner, message.slot_id)
                return str(name), ""
            if save is not None and owner.rank in save.ranks.get(RAM, ()):
                return str(name), ""  # the reply to the first try was lost
            if run.drained:
                # Other nodes would let go of the step before, which this one has brought away.
                await self.release(run, owner, message.slot_id)
                return "", run.draining
            other = run.save_at(owner.incarnation, message.step)
            if other is not save and other is not None and other.is_foreign(owner.incarnation_id):
                del run.saves[str(other.name)]  # its nodes were lost, and its number with them
                other = None
            if other is not None and other is not save:
                raise StepExists(
                    f"step {message.step} was saved before in this incarnation",
                    state="nothing was sealed; the first save is unchanged",
                    step=message.step,
                    run=run.run,
                )
            slot = run.slots.get(message.slot_id)
            if slot is not None and slot.state is SlotState.FREE and slot.inode == message.inode:
                # Given by the agent before this one, and not named when the run was opened again.
                slot.state, slot.holder, slot.rank = SlotState.CAPTURING, owner.holder, owner.rank
            if slot is None:  # with all others, to a disk; or somebody has emptied memory
                return "", "its place in memory was taken away"
            if slot.holder != owner.holder or slot.inode != message.inode:
                raise Damaged(
                    "the slot is not one that this process was given",
                    state="nothing was sealed; earlier saves are unchanged",
                    tier=RAM,
                    slot_id=message.slot_id,
                    inode=message.inode,
                )
            try:
                left = message.left
                await self.seal_slot(run, slot, str(name), owner.rank, verify=False, left=left)
            except Damaged as error:
                if not left:
                    raise
                # An old bit has flipped. The slot is gone: the next save copies everything.
                logger.warning("run %s: step %d: %s", run.key, message.step, error.what)
                return "", "what lay in its slot was damaged"
            owner.left = left
        return str(name), ""

    async def seal_slot(
        self,
        run: RunState,
        slot: Slot,
        name: str,
        rank: int,
        *,
        verify: bool,
        left: bytes = b"",
    ) -> SaveState:
        """Make a shard of a captured slot. To be called under ``run.sealing``."""
        command = work.SealSlot(
            run.ram, run.key, slot.slot_id, slot.inode, name, rank, verify=verify, left=left
        )
        try:
            sealed = await self._tools.call(command, work.SealedSlot, slot.shard_bytes)
        except Damaged:
            run.slots.pop(slot.slot_id, None)  # the data process has freed it
            run.counters["damaged"] += 1
            run.touch()
            raise
        except CheckpointError:
            slot.doubtful = slot.refused = run.doubted = True
            raise
        if sealed.left_bytes:
            run.counters["left_bytes"] += sealed.left_bytes
        return self._note_sealed(run, slot, name, sealed)

    def _note_sealed(
        self, run: RunState, slot: Slot, name: str, sealed: work.SealedSlot
    ) -> SaveState:
        parsed = _manifest.SaveName.parse(name)
        if parsed is None:
            raise Damaged("not the name of a save", key=name)
        save = run.saves.get(name)
        if save is None:
            save = run.saves[name] = SaveState(parsed, sealed.save_id)
        save.save_id = sealed.save_id
        save.incarnation_id, save.world_size = sealed.incarnation_id, sealed.world_size
        save.size_bytes += sealed.size_bytes
        save.shard_bytes[sealed.rank] = sealed.size_bytes
        save.metrics.update(sealed.metrics)
        save.plan_digest = save.plan_digest or sealed.plan_digest
        save.disputed |= sealed.plan_digest != save.plan_digest
        save.note_twins(sealed.rank, sealed.twins)
        save.due |= set(sealed.due) & run.tiers.keys()
        save.ranks.setdefault(RAM, set()).add(sealed.rank)
        slot.state, slot.save, slot.rank, slot.holder = SlotState.SEALED, name, sealed.rank, ""
        slot.shard_bytes, slot.doubtful = sealed.size_bytes, False
        if save.is_complete(RAM):
            self.note_staged(run, save)
        run.touch(save)
        return save

    def note_staged(self, run: RunState, save: SaveState) -> None:
        """All ranks have sealed their parts, on all nodes."""
        for shard in run.slots.values():
            if shard.save == str(save.name):
                shard.state = SlotState.COMMITTED
        if run.reach(save, "staged"):
            run.counters["staged"] += 1
            self._tools.count("save_staged")
            self._tools.count("bytes", RAM, save.size_bytes)
            self._tools.events.emit(
                "save.staged", run=run.run, step=save.name.step, bytes=save.size_bytes
            )
        self._tools.start(self.tidy(run), f"tidy {run.key}")
        if run.layout is not None:
            self._tools.start(self._note_whole(run, save), f"note of {run.key}")

    async def _note_whole(self, run: RunState, save: SaveState) -> None:
        """That a save was whole is known on each node, whatever becomes of others' parts."""
        async with run.lock(save, RAM):
            if RAM in save.ranks:
                command = work.Complete(run.ram, run.key, str(save.name), parts=True)
                await self._tools.call(command, work.Completed)

    async def release(self, run: RunState, owner: Owner, slot_id: str) -> None:
        """A capture that did not happen: its slot is free again."""
        slot = run.slots.get(slot_id)
        if slot is not None and slot.holder == owner.holder:
            if slot.state is SlotState.CAPTURING:
                slot.state, slot.holder = SlotState.FREE, ""
            run.touch()

    # -- what is left behind ---------------------------------------------------------------------

    async def give_up(self, run: RunState, owner: Owner) -> None:
        """Unlink the slots that an owner was given: what it still writes there is nobody's."""
        for slot in [s for s in run.slots.values() if s.holder == owner.holder]:
            if slot.state is SlotState.CAPTURING:
                await self.free(run, slot)
        run.plans.pop(owner.holder, None)

    async def scan_slots(self, run: RunState) -> list[work.SlotScan]:
        """What lies in the slots of a run, as the files say."""
        scan = await self._tools.call(work.Scan(run.ram, run.key, repair=False), work.Scanned)
        return [slot for found in scan.runs if found.run_key == run.key for slot in found.slots]

    async def _free_doubtful(self, run: RunState, owner: Owner) -> bool:
        """Free slots that count as being captured, and are not; True if there was one."""
        doubtful = [s for s in run.slots.values() if s.doubtful and s.holder == owner.holder]
        if not doubtful:
            return False
        scanned = {s.slot_id: s for s in await self.scan_slots(run)}
        sealed = [
            s.name.step for s in run.saves.values() if s.name.incarnation == owner.incarnation
        ]
        freed = False
        for slot in doubtful:
            found = scanned.get(slot.slot_id)
            if slot.state is not SlotState.CAPTURING or not slot.doubtful:
                continue
            if found is None:
                run.slots.pop(slot.slot_id, None)
            elif not found.save:
                slot.state, slot.holder, slot.doubtful = SlotState.FREE, "", False
            elif slot.refused or (sealed and found.step <= max(sealed)):
                await self.free(run, slot)
            else:
                continue  # its seal is on its way
            freed = True
        return freed

    async def tidy(self, run: RunState) -> None:
        """Free slots and saves of an older shape, once a save of the new one is complete."""
        for plan, _ in list(run.plans.values()):
            newest = run.newest_staged()
            if newest is None:
                return
            shards = [s for s in run.slots.values() if s.save == str(newest.name)]
            if any(shard.fits(plan) for shard in shards):
                await self._free_other_plans(run, plan)
                await self._free_excess(run, plan)

    async def _free_excess(self, run: RunState, plan: Plan) -> None:
        """Free what a ring has more than it should: an earlier owner or agent had died with it."""
        wanted = sum(count for other, count in run.plans.values() if other == plan)
        fitting = [s for s in run.slots.values() if s.fits(plan) and s.holder not in run.fenced]
        excess = len(fitting) - wanted
        for slot in fitting:
            if excess > 0 and slot.state is SlotState.FREE and slot.slot_id in run.slots:
                excess -= 1
                await self.free(run, slot)
        for save in sorted(run.saves.values(), key=lambda s: s.order):
            if excess <= 0:
                return
            num_shards = sum(slot.save == str(save.name) for slot in fitting)
            if num_shards and await self.drop_from_ram(run, save):
                excess -= num_shards

    async def _free_other_plans(self, run: RunState, plan: Plan, *, hard: bool = False) -> bool:
        """``hard``: memory is short, so a FREE slot goes before the new plan's first save too."""
        wanted = [p for p, _ in run.plans.values()] + [plan]
        freed = False
        for slot in list(run.slots.values()):
            if any(slot.fits(p) for p in wanted) or slot.slot_id not in run.slots:
                continue
            if slot.state is SlotState.FREE:
                await self.free(run, slot)
                freed = True
            elif slot.save:
                freed |= await self.drop_from_ram(run, run.saves[slot.save])
        if freed:
            run.touch()
        return freed

    async def drop_from_ram(self, run: RunState, save: SaveState) -> bool:
        """Delete a save from RAM if nothing needs it there; False if something does."""
        facts = run.facts()
        mine = next((f for f in facts if f.name == str(save.name)), None)
        if mine is None or save.recycling or queue.blocks_recycling(mine, facts):
            return False
        save.recycling = True
        try:
            async with run.lock(save, RAM):
                ranks = save.apart_from_guests
                command = work.Delete(run.ram, run.key, str(save.name), ranks=ranks)
                if (await self._tools.call(command, work.Deleted)).busy:
                    return False
        finally:
            save.recycling = False
        run.drop_copy(save, RAM)
        self.note_gone(run, save)
        run.touch(save)
        return True

    async def free(self, run: RunState, slot: Slot) -> None:
        """Unlink the files of a slot that is no save's."""
        run.slots.pop(slot.slot_id, None)
        await self._tools.call(work.Free(run.ram, run.key, slot.slot_id), work.Freed)
