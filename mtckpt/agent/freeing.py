"""When all RAM of a run is freed, and what is known of it where that was cut off or others did it.

Knows what has to be safe elsewhere before. Does not free single slots or saves (``ring``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from mtckpt import _inventory, _manifest
from mtckpt.agent import beside, owners, queue, work
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM
from mtckpt.errors import UsageError, WaitTimeout

if TYPE_CHECKING:
    from mtckpt.agent.flushing import Flusher
    from mtckpt.agent.links import Links
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.saves import SaveState, Slot, TierState
    from mtckpt.agent.tools import Tools
    from mtckpt.agent.work import TierRef

__all__ = ["Freer", "is_busy", "is_elsewhere", "why_kept"]

_POLL_S = 0.05


class Freer:
    """See the module. One for the agent; a run that is freed is none of ``runs`` any more."""

    def __init__(
        self, tools: Tools, runs: dict[str, RunState], links: Links, flusher: Flusher, ring: Ring
    ) -> None:
        self._tools = tools
        self._runs = runs
        self._links = links
        self._flusher = flusher
        self._ring = ring

    async def let_go(self, run: RunState) -> None:
        """Free a run's RAM if nobody owns it, nothing is owed, and it is safe elsewhere."""
        if run.gone or run.living() or run.settling or run.opening.locked() or is_busy(run):
            return
        if self._links.is_behind(run):
            return
        newest = run.newest_staged()
        safe = newest is None or any(
            tier.scanned and newest.is_complete(label) and label not in newest.damaged
            for label, tier in run.tiers.items()
            if not tier.is_peers  # that is memory as well: it may be freed at the same time
        )
        safe = safe and not any(s.is_open and s.ranks.get(RAM) for s in run.saves.values())  # doubt
        safe = safe and not _holds_for_others(run)
        in_ram = any(RAM in save.ranks or save.guests for save in run.saves.values())
        left_s = owners.uptime_s() - run.left_s
        if left_s > self._tools.limits.ram_ttl_s:
            why = "nobody came back" if safe else "nobody came back; no other tier has the newest"
        elif run.closing and safe:
            why = "closed"
        elif not in_ram and left_s > self._tools.limits.idle_s:
            why = "nothing is in RAM"
        else:
            return
        resting = any(tier.to_keep for tier in run.tiers.values())  # and all of those rest
        if resting and not (in_ram or run.slots):
            return
        self._tools.events.emit("ram.freed", run=run.run, reason=why, lost=not safe or None)
        async with run.opening:
            run.emptying = True
            try:
                await (self._empty(run) if resting else self.wipe(run))
            finally:
                run.emptying = False

    async def wipe(self, run: RunState) -> None:
        """Free all of a run's RAM and forget it; slower tiers keep what they have. To be called
        under ``run.opening``: who comes back meanwhile waits, and opens it anew."""
        if run.gone:
            return  # it is free, and what is there by now is the next one's
        run.gone = run.doubted = True
        for tier in run.tiers.values():
            tier.wake.set()
        try:
            await self._tools.call(work.Wipe(run.ram, run.key), work.Freed)
        except BaseException:
            run.gone = False
            self._flusher.start(run)
            raise
        if self._runs.get(run.key) is run:
            del self._runs[run.key]
        run.touch()

    async def move(self, run: RunState, ram: TierRef) -> bool:
        """Free all of a run's RAM, and go on with it in other memory, with the same owners; False
        where that has what nobody else has. To be called under ``run.opening``."""
        run.emptying = True
        try:
            while run.allocating:  # noqa: ASYNC110 - each has its deadline
                await asyncio.sleep(_POLL_S)
            async with run.sealing:
                if not is_elsewhere(run):
                    return False
                await self._empty(run)
                run.ram = ram
        finally:
            run.emptying = False
        await self.look_again(run)
        run.touch()
        return True

    async def _empty(self, run: RunState) -> None:
        """Free all of a run's RAM; it goes on with what is elsewhere."""
        run.doubted = True
        await self._tools.call(work.Wipe(run.ram, run.key), work.Freed)
        run.slots.clear()
        for save in list(run.saves.values()):
            save.guests.clear()
            if RAM in save.ranks:
                run.drop_copy(save, RAM)
                self._ring.note_gone(run, save)

    def refuse_move(self, run: RunState, root: str) -> NoReturn:
        """Raise why a run stays in its memory: UsageError, or WaitTimeout where what is there alone
        is on its way to slower tiers, and slots may lie beside a disk once it is there."""
        saves = [save for save in run.saves.values() if save.ranks.get(RAM) or save.guests]
        comes = any(save.owed or save.is_open for save in saves)
        if beside.is_one(root) and comes and not any(save.guests for save in saves):
            raise WaitTimeout(
                "what is there comes to slower tiers before slots come to the disk", stage="local"
            )
        raise UsageError(
            f"the newest save of this run is in {run.ram.path} and nowhere else",
            state="nothing was done",
            actions=[f"use Ram({run.ram.path!r}) once more", "or: mtckpt rm of the run"],
            run=run.run,
            path=root,
        )

    async def look_again(self, run: RunState) -> None:
        """Before anybody goes on with a run that was to go, or that somebody may have removed: its
        slots and saves may have gone, and with them the notes for the next agent."""
        if not run.doubted or run.gone or _is_in_use(run):
            return
        async with run.sealing:
            # What comes while it is looked for may not be found, and is there.
            slots, guests = list(run.slots.values()), run.all_guests()
            scanned = await self._tools.call(
                work.Scan(run.ram, run.key, repair=False), work.Scanned
            )
            if _is_in_use(run):
                return  # what is on its way, or is being mended, may not be found either
            found = next((scan for scan in scanned.runs if scan.run_key == run.key), None)
            found = found or work.RunScan(run.key)
            for save in _note_left(run, found, slots, guests):
                self._ring.note_gone(run, save)
                run.touch(save)
            run.doubted = False
        try:
            await self._note_again(run, {each.number for each in found.incarnations})
        except BaseException:  # before anybody goes on
            run.doubted = True
            raise

    async def _note_again(self, run: RunState, found: set[int]) -> None:
        """What the next agent needs, where only some of it was found."""
        lost = run.begun.keys() - found
        if lost and run.layout is not None:
            await self._links.note(run)
        for number in lost:
            known = run.begun[number]
            key, data = _inventory.incarnation_key(run.key, known), _manifest.encode_sealed(known)
            await self._tools.call(work.PutSmall(run.ram, key, data), work.Stored)


def _holds_for_others(run: RunState) -> bool:
    """Whether there are copies here that a node gave away because it goes: what that had on a disk
    goes with it. In a store they are safe."""
    layout = run.layout
    if layout is None:
        return False
    gone = {rank for number in run.leaving for rank in layout.nodes[number].ranks}
    outlived = run.outlived()
    return any(
        save.guests & gone
        and save not in outlived
        and not any(tier.is_store and save.is_complete(label) for label, tier in run.tiers.items())
        for save in run.saves.values()
    )


def is_elsewhere(run: RunState) -> bool:
    """Whether nothing is lost with RAM while its job goes on: of each save that has a part here a
    slower tier has that part, or something newer that is whole. Copies for other nodes are for when
    those are lost: it has to be whole as this node reads it then. Other nodes' memory does not
    count: they may let go at the same time. Nor does it matter whether the save in RAM is known to
    be whole, which an agent does not know that has just started."""
    slow = [tier.label for tier in run.tiers.values() if tier.scanned and not tier.is_peers]
    line = run.line()
    whole, whole_here = [], []
    for save in run.saves.values():
        sound = [label for label in slow if not save.is_damaged(label)]
        if any(map(save.is_complete, sound)):
            whole.append(save.worth(line))
        if any(len(save.ranks.get(label, ())) >= save.world_size for label in sound):
            whole_here.append(save.worth(line))

    def has(save: SaveState, ranks: set[int], held: list[tuple[bool, tuple[int, int]]]) -> bool:
        sound = (label for label in slow if not save.is_damaged(label))
        in_part = any(ranks <= save.ranks.get(label, set()) for label in sound)
        return in_part or (bool(held) and save.worth(line) <= max(held))

    return not run.unsettled and all(
        has(save, save.ranks.get(RAM, set()), whole) and has(save, save.guests, whole_here)
        for save in run.saves.values()
        if not save.called_off and (save.guests or save.ranks.get(RAM))
    )


def why_kept(run: RunState) -> str:
    """Which tiers keep the memory of a run that was closed from being freed; "" where none does."""
    if run.gone or run.living() or not run.closing:
        return ""
    slow = [
        f"tier {tier.label} at {tier.config.path}: {tier.problem or 'still under way'}"
        for tier in run.tiers.values()
        if tier.problem or not tier.scanned or _is_owed(run, tier)
    ]
    return "; ".join(slow)


def is_busy(run: RunState) -> bool:
    """Whether something is owed or under way. A store that only gives readers time owes nothing."""
    return (
        any(_is_owed(run, tier) for tier in run.tiers.values())
        or any(save.writing for save in run.saves.values())
        or _is_in_use(run)
    )


def _is_owed(run: RunState, tier: TierState) -> bool:
    """Whether something is on its way to a tier, or has still to go there."""
    return bool(
        (tier.to_keep and not tier.resting)
        or tier.small_owed
        or any(tier.label in save.writing for save in run.saves.values())
        or queue.pick_flush(tier.label, run.flushable(tier))
    )


def _is_in_use(run: RunState) -> bool:
    return any(save.readers or save.recycling for save in run.saves.values())


def _note_left(
    run: RunState, scan: work.RunScan, slots: list[Slot], guests: dict[str, list[int]]
) -> list[SaveState]:
    """What a scan of RAM did not find of what there was before is not there; what may be on its way
    to a save is. The saves of which something is gone."""
    free = {(slot.slot_id, slot.inode) for slot in scan.slots}
    shards = {(entry.save, rank) for entry in scan.saves for rank in entry.ranks}
    # Whose record cannot be read is damaged, and may be healed.
    in_doubt = {entry.save for entry in scan.saves if entry.problems}
    gone = []
    for slot in slots:
        if run.slots.get(slot.slot_id) is not slot:
            continue
        if slot.save and slot.save not in in_doubt and (slot.save, slot.rank) not in shards:
            gone.append(run.saves[slot.save])
            run.drop_shard(run.saves[slot.save], slot.slot_id, slot.rank)
        elif slot.state is SlotState.FREE and (slot.slot_id, slot.inode) not in free:
            del run.slots[slot.slot_id]
    for name in guests.keys() & run.saves.keys() - in_doubt:
        lost = {rank for rank in guests[name] if (name, rank) not in shards}
        run.saves[name].guests -= lost
    return gone
