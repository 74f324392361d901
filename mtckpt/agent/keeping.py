"""Keeps the slower tiers of a run by its rules: what was brought there is read back, older ones go.

Knows the order: nothing is deleted before its successor was read back, and what a store lets go
loses its records first and its data only after some time. Knows what cannot be deleted and when
that is tried again. Which saves the rules let go is said by ``Healer.not_kept``.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from mtckpt.agent import queue, work
from mtckpt.agent.saves import describe_failure
from mtckpt.errors import AccessDenied, CheckpointError

if TYPE_CHECKING:
    from mtckpt.agent.healing import Healer
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.saves import SaveState, TierState
    from mtckpt.agent.tools import Tools

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

# A store that does not let us delete may do so later: a right was given, a retention time is over.
DENIED_PAUSE_S = 3600.0


class Keeper:
    """What is done by the rules of tiers; one for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring, healer: Healer) -> None:
        self._tools = tools
        self._ring = ring
        self._healer = healer
        self.stopping = False

    def start(self, run: RunState, tier: TierState, save: SaveState) -> None:
        """A save has arrived in a tier: see what can go for it."""
        tier.to_keep += 1
        self._tools.start(self._keep(run, tier, save), f"retention of {run.key} in {tier.label}")
        if tier.is_store:
            self._tools.start(self._relieve(run), f"retention of {run.key} on disks")

    def look_again(self, run: RunState, tier: TierState) -> None:
        """See ``Flusher.look_again``. One look is enough for all that was said before it."""
        if not (tier.looking or tier.denied) and self._healer.not_kept(run, tier):
            tier.looking = True
            self._tools.start(
                self._let_go_in_turn(run, tier), f"retention of {run.key} in {tier.label}"
            )

    async def _keep(self, run: RunState, tier: TierState, save: SaveState) -> None:
        """Read the new save back, and only then let older ones go."""
        try:
            async with tier.keeping:
                if self.stopping or not self._is_worth_reading(run, tier, save):
                    return
                if not await self._healer.verify_save(run, save, tier.label):
                    return
                done = await self._let_go(run, tier)
        finally:
            tier.to_keep -= 1
            run.touch()
        self._go_on(run, tier, done)

    def _go_on(self, run: RunState, tier: TierState, done: bool) -> None:
        if not done and (tier.again is None or tier.again.done()):
            tier.again = self._tools.start(
                self._keep_again(run, tier), f"retention of {run.key} in {tier.label}"
            )

    async def _keep_again(self, run: RunState, tier: TierState) -> None:
        """Try what could not go yet from time to time: there may be no later flush."""
        attempt, done = 0, False
        while not done:
            attempt += 1
            pause_s = DENIED_PAUSE_S if tier.denied else queue.backoff_s(attempt, random.random())
            await asyncio.sleep(pause_s)
            if self.stopping or run.gone or run.tiers.get(tier.label) is not tier:
                return
            async with tier.keeping:
                done = await self._let_go(run, tier)
            run.touch()

    async def _relieve(self, run: RunState) -> None:
        """A store has what disks held on to for it, beyond their own rules."""
        for tier in [tier for tier in run.tiers.values() if not tier.is_store]:
            await self._let_go_in_turn(run, tier)

    async def _let_go_in_turn(self, run: RunState, tier: TierState) -> None:
        async with tier.keeping:
            tier.looking = False
            done = await self._let_go(run, tier)
        self._go_on(run, tier, done)

    def _is_worth_reading(self, run: RunState, tier: TierState, save: SaveState) -> bool:
        """What a store has is read back only where something can go then: it costs as a restore."""
        if not tier.is_store:
            return True
        return not tier.denied and bool(self._healer.not_kept(run, tier, as_if=save))

    async def _let_go(self, run: RunState, tier: TierState) -> bool:
        """Delete what the rules let go; False if some of it could not go now."""
        names = self._healer.not_kept(run, tier)
        if tier.is_store and run.layout and not run.layout.is_lead:
            names = []  # all nodes share it, and one of them looks after it
        if not names:
            tier.denied = ""  # nobody asks again: whether it still does is seen with the next
        done = True
        if tier.is_store and names:
            # Readers in a store leave no trace: from here on nobody begins to read these, and who
            # has begun gets some time.
            named = await self._delete_all(run, tier, names, records_only=True)
            done = len(named) == len(names)
            if named:
                tier.resting = True
                run.touch()
                try:
                    await asyncio.sleep(self._tools.limits.delete_grace_s)
                finally:
                    tier.resting = False
            names = named
        deleted = await self._delete_all(run, tier, names)
        return done and len(deleted) == len(names)

    async def _delete_all(
        self, run: RunState, tier: TierState, names: list[str], *, records_only: bool = False
    ) -> list[str]:
        """Delete these, or what speaks for them; those of which that is done."""
        deleted = []
        for name in names:
            if self.stopping:
                break
            if await self._try_delete(run, tier, name, records_only=records_only):
                deleted.append(name)
            elif tier.denied:
                break  # the others as well, and each try is a request or three
        return deleted

    async def _try_delete(
        self, run: RunState, tier: TierState, name: str, *, records_only: bool
    ) -> bool:
        """False if it could not be deleted now, which is told once."""
        if name not in run.saves:
            return True
        try:
            done = await self._delete(run, tier, run.saves[name], records_only=records_only)
        except CheckpointError as error:
            if tier.is_store and isinstance(error, AccessDenied):
                if not tier.denied:
                    logger.warning("run %s: %s deletes nothing: %s", run.key, tier.label, error)
                tier.denied = describe_failure(error)
            elif name not in tier.undeleted:
                logger.warning("run %s: %s keeps %s: %s", run.key, tier.label, name, error)
                tier.undeleted.add(name)
            return False
        tier.undeleted.discard(name)
        tier.denied = ""
        return done

    async def _delete(
        self, run: RunState, tier: TierState, save: SaveState, *, records_only: bool
    ) -> bool:
        """Delete one save, or what speaks for it; False if a reader has it."""
        async with run.lock(save, tier.label):
            if str(save.name) not in self._healer.not_kept(run, tier):
                return True  # wanted meanwhile, and there again perhaps: it is not what was let go
            command = work.Delete(tier.ref, run.key, str(save.name), records_only)
            deleted = await self._tools.call(command, work.Deleted)
        if deleted.busy:
            return False
        if records_only:
            save.ranks[tier.label] = set()
            return True
        run.drop_copy(save, tier.label)
        self._ring.note_gone(run, save)  # for a store that did not answer in time
        run.counters["deleted"] += 1
        self._tools.count("save_deleted", tier.label)
        self._tools.events.emit("save.deleted", run=run.run, step=save.name.step, tier=tier.label)
        run.touch(save)
        return True
