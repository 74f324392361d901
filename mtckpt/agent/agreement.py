"""A save of several ranks is whole or called off: what the ranks of this node say about it.

Knows who has sealed, who declined, who ended, and how long the others have waited. A save that is
called off gives its slots back at once, so that no rank holds one for a save that nobody finishes.
Does not seal or copy.
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
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Agreement"]

logger = logging.getLogger(__name__)


class Agreement:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring) -> None:
        self._tools = tools
        self._ring = ring

    async def sealed(self, run: RunState, owner: Owner) -> None:
        """A rank has sealed its part of some save: do the ranks save the same?"""
        open_saves = run.open_saves(owner.incarnation)
        for save in open_saves:
            if found := self._disagreement(run, save):
                error, last_step = found
                for each in open_saves:
                    if each is save or (each.name.step <= last_step and each.lacking()):
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
        ahead = [
            other
            for other in run.owners.values()
            if other.incarnation == save.name.incarnation
            and other.rank in save.lacking()
            and other.last_step > step
        ]
        if not ahead:
            return None
        has = sorted(save.ranks[RAM])
        error = StepDisagreement(
            f"ranks {has[:8]} saved step {step}, rank {ahead[0].rank} went on to step"
            f" {ahead[0].last_step} without it",
            stage="staged",
            step=step,
            rank=ahead[0].rank,
        )
        return error, ahead[0].last_step

    async def declined(self, run: RunState, owner: Owner, message: protocol.CallOff) -> None:
        """A rank takes no part in a save: whoever has sealed it gives it up, nobody else begins."""
        name = _manifest.save_name(message.step, owner.incarnation, message.save_id)
        owner.last_step = max(owner.last_step, message.step)
        save = run.saves.get(str(name))
        reason = message.reason
        if owner.world_size > 1:
            reason = f"rank {owner.rank}: {reason}"
        if save is None:
            save = run.saves[str(name)] = SaveState(name, message.save_id)
            save.world_size, save.called_off = owner.world_size, reason
            self._told(run, save)
        else:
            await self._call_off(run, save, reason)

    async def left(self, run: RunState, owner: Owner) -> None:
        """A rank is gone: what it has no part in cannot become whole."""
        for save in run.open_saves(owner.incarnation):
            if owner.rank in save.lacking():
                error = RankTimeout(
                    f"rank {owner.rank} ended without its part of step {save.name.step}",
                    stage="staged",
                    rank=owner.rank,
                    step=save.name.step,
                )
                await self._call_off(run, save, error.what, error)

    async def begun(self, run: RunState, number: int) -> None:
        """An incarnation starts: nobody finishes what an earlier one left open."""
        for save in list(run.saves.values()):
            if save.is_open and save.name.incarnation < number:
                await self._call_off(run, save, "the job was started anew before all ranks had it")

    async def overdue(self, run: RunState) -> None:
        """Call off what ranks have let others wait for too long."""
        limit_s = self._tools.limits.rank_s
        for save in list(run.saves.values()):
            if save.is_open and time.monotonic() - save.began_s > limit_s:
                lacking = save.lacking()
                error = RankTimeout(
                    f"ranks {lacking[:8]} did not capture their parts of step {save.name.step}"
                    f" within {limit_s:.0f} s",
                    stage="staged",
                    rank=lacking[0],
                    ranks=lacking,
                    step=save.name.step,
                    timeout_s=limit_s,
                )
                await self._call_off(run, save, error.what, error)

    async def _call_off(
        self, run: RunState, save: SaveState, reason: str, error: CheckpointError | None = None
    ) -> None:
        async with run.sealing:
            if not save.is_open:
                return
            save.called_off = reason
            if error is not None:
                save.failed[RAM] = protocol.error_to_wire(error)
            self._told(run, save)
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
