"""When all RAM of a run is freed, and what is known of it where that was cut off or others did it.

Knows what has to be safe elsewhere before. Does not free single slots or saves (``ring``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest
from mtckpt.agent import queue, work
from mtckpt.agent.saves import RAM

if TYPE_CHECKING:
    from mtckpt.agent.flushing import Flusher
    from mtckpt.agent.links import Links
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Freer", "is_busy"]


class Freer:
    """See the module. One for the agent; a run that is freed is none of ``runs`` any more."""

    def __init__(
        self, tools: Tools, runs: dict[str, RunState], links: Links, flusher: Flusher
    ) -> None:
        self._tools = tools
        self._runs = runs
        self._links = links
        self._flusher = flusher

    async def let_go(self, run: RunState) -> None:
        """Free a run's RAM if nobody owns it, nothing is owed, and it is safe elsewhere."""
        if run.gone or run.living() or run.settling or run.opening.locked() or is_busy(run):
            return
        if self._links.is_behind(run):
            return
        newest = run.newest_staged()
        safe = newest is None or any(
            newest.is_complete(label) and label not in newest.damaged
            for label, tier in run.tiers.items()
            if not tier.is_peers  # that is memory as well: it may be freed at the same time
        )
        safe = safe and not any(s.is_open and s.ranks.get(RAM) for s in run.saves.values())  # doubt
        in_ram = any(RAM in save.ranks or save.guests for save in run.saves.values())
        left_s = time.time() - run.left_at
        if left_s > self._tools.limits.ram_ttl_s:
            why = "nobody came back" if safe else "nobody came back; no other tier has the newest"
        elif run.closing and safe:
            why = "closed"
        elif not in_ram and left_s > self._tools.limits.idle_s:
            why = "nothing is in RAM"
        else:
            return
        self._tools.events.emit("ram.freed", run=run.run, reason=why, lost=not safe or None)
        await self.wipe(run)

    async def wipe(self, run: RunState) -> None:
        """Free all of a run's RAM and forget it; slower tiers keep what they have."""
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

    async def look_again(self, run: RunState) -> None:
        """Before anybody goes on with a run that was to go, or that somebody may have removed: its
        slots and saves may have gone, and with them the notes for the next agent."""
        if not run.doubted or run.gone or any(s.readers or s.recycling for s in run.saves.values()):
            return
        async with run.sealing:
            scanned = await self._tools.call(
                work.Scan(run.ram, run.key, repair=False), work.Scanned
            )
            found = next((scan for scan in scanned.runs if scan.run_key == run.key), None)
            found = found or work.RunScan(run.key)
            run.note_left(found)
            run.doubted = False
        there = {incarnation.number for incarnation in found.incarnations}
        for number in run.begun.keys() - there:
            known = run.begun[number]
            key, data = _inventory.incarnation_key(run.key, known), _manifest.encode_sealed(known)
            await self._tools.call(work.PutSmall(run.ram, key, data), work.Stored)


def is_busy(run: RunState) -> bool:
    """Whether something is owed or under way."""
    return (
        any(tier.to_keep or tier.small_owed for tier in run.tiers.values())
        or any(save.writing or save.readers or save.recycling for save in run.saves.values())
        or any(queue.pick_flush(t.label, run.flushable(t)) for t in run.tiers.values())
    )
