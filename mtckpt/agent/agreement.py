"""A save of several ranks is whole or called off: what ranks and other nodes say about it.

Knows who has sealed, who declined, who ended, and how long the others have waited. A save that is
called off gives its slots back at once, so that no rank holds one for a save that nobody finishes.
Does not seal or copy.

Over several nodes the lead decides. A node may call a save off by itself while one of its own ranks
lacks its part, for then no other node can have all of it. Once it has told the lead that its ranks
are there it waits for the lead's word, or for whoever restores and decides from the records.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mtckpt import _manifest
from mtckpt.agent import protocol
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.errors import CheckpointError, RankTimeout, StepDisagreement

if TYPE_CHECKING:
    from mtckpt.agent.nodes import Layout, News
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Agreement"]

logger = logging.getLogger(__name__)

# What the lead's word may take, once the lead has waited for as long as ranks are waited for.
WORD_S = 5.0


class Agreement:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring) -> None:
        self._tools = tools
        self._ring = ring

    async def sealed(self, run: RunState, owner: Owner) -> None:
        """A rank has sealed its part of some save: do the ranks save the same?"""
        await self._compare(run, owner.incarnation)

    async def _compare(self, run: RunState, incarnation: int) -> None:
        if run.layout and incarnation < run.incarnation:
            return  # nodes give those back one by one
        # What an agent before this one left may have been whole, and may be gone elsewhere since.
        open_saves = [s for s in run.open_saves(incarnation) if not (run.layout and s.found)]
        for save in open_saves:
            if found := self._disagreement(run, save):
                error, last_step = found
                for each in open_saves:
                    if each is save or (each.name.step <= last_step and _lacking(run, each)):
                        await self._call_off(run, each, error.what, error)
                return

    def _disagreement(self, run: RunState, save: SaveState) -> tuple[CheckpointError, int] | None:
        """What the ranks differ in, and the last step that they did it up to."""
        step = save.name.step
        if save.disputed:
            error = StepDisagreement(
                f"at step {step} ranks have different global arrays",
                stage="staged",
                step=step,
                actions=("build the same state on every rank",),
            )
            return error, step
        ahead, last_step = min(
            ((rank, last) for rank, last in run.ahead_of(save.order) if _may_miss(run, save, rank)),
            default=(-1, step),
        )
        if last_step == step:
            return None
        lacking = set(_lacking(run, save))
        has = [rank for rank in range(save.world_size) if rank not in lacking]
        host = f" on {run.layout.host_of(ahead)}" if run.layout else ""
        error = StepDisagreement(
            f"ranks {has[:8]} saved step {step}, rank {ahead}{host} went on to step"
            f" {last_step} without it",
            stage="staged",
            step=step,
            rank=ahead,
        )
        return error, last_step

    async def declined(self, run: RunState, owner: Owner, message: protocol.CallOff) -> None:
        """A rank takes no part in a save: whoever has sealed it gives it up, nobody else begins."""
        name = _manifest.save_name(message.step, owner.incarnation, message.save_id)
        owner.last_step = max(owner.last_step, message.step)
        reason = message.reason
        if owner.world_size > 1:
            reason = f"rank {owner.rank}: {reason}"
        async with run.sealing:
            save = run.saves.setdefault(str(name), SaveState(name, message.save_id))
            save.world_size = max(save.world_size, owner.world_size)
        await self._call_off(run, save, reason)

    async def heard(self, run: RunState, save: SaveState, news: News) -> None:
        """Another node has said something of a save: the lead, or to the lead."""
        if news.called_off and not save.called_off:
            wire = news.failed.get(RAM)
            error = protocol.error_from_wire(wire) if wire is not None else None
            await self._call_off(run, save, news.called_off, error, is_word=True)
        await self._compare(run, save.name.incarnation)

    async def left(self, run: RunState, owner: Owner) -> None:
        """A rank is gone: what it has no part in cannot become whole."""
        for save in run.open_saves(owner.incarnation):
            if save.lacks(owner.rank):
                error = RankTimeout(
                    f"rank {owner.rank} ended without its part of step {save.name.step}",
                    stage="staged",
                    rank=owner.rank,
                    step=save.name.step,
                )
                await self._call_off(run, save, error.what, error)

    async def outgrown(self, run: RunState, holder: str) -> None:
        """A rank finds memory too small for its part: what lacks that ends there."""
        for owner in [each for each in run.owners.values() if each.holder == holder]:
            for save in run.open_saves(owner.incarnation):
                if save.lacks(owner.rank):
                    reason = f"rank {owner.rank}: memory was too small for it"
                    await self._call_off(run, save, reason)

    async def begun(
        self, run: RunState, number: int, parent: tuple[int, int] | None = None
    ) -> None:
        """An incarnation starts: nobody finishes what an earlier one left open.

        But for what it was restored from, which then was whole, on however few nodes the job is
        now. What else was not known to be had no part in that, and what is left of it holds no slot
        any more: other nodes may have had the rest of it, and be lost.
        """
        at = None if parent is None else tuple(parent)
        for save in list(run.saves.values()):
            if save.name.incarnation >= number:
                continue
            if save.order == at:
                save.chosen, save.called_off = True, ""
            elif save.is_open and (at is None or save.order > at):
                await self._call_off(run, save, "the job was started anew before all ranks had it")
            elif save.ranks.get(RAM) and not save.is_complete(RAM):
                async with run.sealing:
                    await self._give_back(run, save)

    async def overdue(self, run: RunState) -> None:
        """Call off what ranks have let others wait for too long."""
        limit_s = self._tools.limits.rank_s
        for save in list(run.saves.values()):
            waited_s = time.monotonic() - save.began_s
            if not save.is_open or waited_s <= limit_s:
                continue
            if save.disputed and (found := self._disagreement(run, save)):
                await self._call_off(run, save, found[0].what, found[0])
                continue
            lacking = save.lacking()
            layout = run.layout
            own_lack = layout is not None and layout.own.intersection(lacking)
            may_be_whole = save.found or (save.offered and not own_lack)
            if layout and (may_be_whole or not (layout.is_lead or own_lack)):
                if waited_s > limit_s + min(limit_s, WORD_S) and RAM not in save.failed:
                    self._doubt(run, layout, save, lacking)
                continue
            if layout and not layout.is_lead:
                lacking = sorted(layout.own.intersection(lacking))
            who = layout.describe(lacking) if layout else f"ranks {lacking[:8]}"
            error = RankTimeout(
                f"{who} did not capture their parts of step {save.name.step}"
                f" within {limit_s:.0f} s",
                stage="staged",
                rank=lacking[0],
                ranks=lacking,
                step=save.name.step,
                timeout_s=limit_s,
            )
            await self._call_off(run, save, error.what, error)

    def _doubt(self, run: RunState, layout: Layout, save: SaveState, lacking: list[int]) -> None:
        """Whether it is whole others know, who are silent: its owners are told, and it is kept."""
        if layout.is_lead:
            who = f"the agent of {layout.describe(lacking)} does"
        else:
            who = f"the agent of rank 0 on {layout.host_of(0)} does"
        error = RankTimeout(
            f"step {save.name.step} is in memory here, and {who} not say whether it is on all"
            " nodes",
            stage="staged",
            rank=lacking[0] if layout.is_lead else 0,
            ranks=lacking,
            step=save.name.step,
            state="it is kept, and counts once that is known",
        )
        save.failed[RAM] = protocol.error_to_wire(error)
        logger.warning("run %s: %s", run.key, error.what)
        self._tools.events.emit("save.in_doubt", run=run.run, step=save.name.step)
        run.touch(save)

    async def _call_off(
        self,
        run: RunState,
        save: SaveState,
        reason: str,
        error: CheckpointError | None = None,
        *,
        is_word: bool = False,
    ) -> None:
        """No rank can make it whole any more, one that has not come to it yet included.

        ``is_word``: some node says so. It has come to an end then also where a newer one is whole.
        """
        async with run.sealing:  # what is just being sealed would not be given back
            untouched = not (save.ranks.get(RAM) or save.stages or save.called_off)
            is_open = save.is_unsettled if is_word else save.is_open
            if not (is_open or untouched):
                return
            save.called_off = reason
            if error is not None:
                save.failed[RAM] = protocol.error_to_wire(error)
            self._told(run, save)
            await self._give_back(run, save)
        run.forget_old()

    async def _give_back(self, run: RunState, save: SaveState) -> None:
        """The slots of what is no save are free again."""
        for shard in [s for s in run.slots.values() if s.save == str(save.name)]:
            try:
                slot = await self._ring.recycle_shard(run, save, shard)
            except CheckpointError as trouble:
                # It is no save all the same; its memory goes with a later one's.
                logger.warning("run %s: %s: %s", run.key, save.name, trouble.what)
                continue
            if slot is not None:
                slot.state, slot.holder = SlotState.FREE, ""
        run.touch(save)

    def _told(self, run: RunState, save: SaveState) -> None:
        run.counters["called_off"] += 1
        self._tools.count("save_called_off")
        logger.warning("run %s: step %d called off: %s", run.key, save.name.step, save.called_off)
        self._tools.events.emit(
            "save.called_off", run=run.run, step=save.name.step, reason=save.called_off
        )
        run.touch(save)


def _may_miss(run: RunState, save: SaveState, rank: int) -> bool:
    """Whether this node may call a save off for want of that rank's part: of any at the lead, else
    of its own. What its own ranks have is told to the lead, and may be whole by then."""
    is_ours = not run.layout or run.layout.is_lead or rank in run.layout.own
    return is_ours and save.lacks(rank)


def _lacking(run: RunState, save: SaveState) -> list[int]:
    """All such ranks."""
    if run.layout and not run.layout.is_lead:
        return sorted(rank for rank in run.layout.own if save.lacks(rank))
    return save.lacking()
