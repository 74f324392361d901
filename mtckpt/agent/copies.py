"""Copies of this node's parts on other nodes: who is to hold them, and asking until they do.

Knows the partners, by the rule of ``partners``, and what each has acknowledged. A copy is
made by the node that gets it: here it is only asked for, for as long as the save's slot is held.
Does not move bytes, and does not decide when a save is due (``flushing``).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mtckpt.agent.guests import Lost, Offer, Taken
from mtckpt.agent.partners import partners_of, placement_of
from mtckpt.agent.protocol import Done
from mtckpt.agent.queue import backoff_s
from mtckpt.agent.saves import RAM
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    CheckpointError,
    Damaged,
    FormatError,
    NodeDraining,
    TierUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.peers import Peers
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.saves import SaveState, TierState
    from mtckpt.agent.tools import Tools

__all__ = ["Copies"]

logger = logging.getLogger(__name__)

MAX_CALLS = 16
# One answer says how far a copy is, at the latest after WAIT_S.
WAIT_S = 2.0
CALL_S = 15.0
_T = TypeVar("_T")


class Copies:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring, peers: Peers) -> None:
        self._tools = tools
        self._ring = ring
        self._peers = peers
        self._threads = ThreadPoolExecutor(MAX_CALLS, "mtckpt-copies")
        peers.verbs["lost"] = (Lost, self.lost)

    def look(self, run: RunState, tier: TierState) -> None:
        """What has changed for the copies since: who holds them, or that none are needed."""
        if run.layout is None:
            # All ranks are on this node: there is nobody to hold a copy.
            for save in [s for s in run.saves.values() if tier.label in s.owed and s.is_staged]:
                self._ring.supersede(run, save, tier.label)
                run.touch(save)
            return
        self._tell_placement(run, run.layout, tier.config.copies)
        outlived = run.outlived()
        saves = [save for save in run.saves.values() if save not in outlived]
        self._give_back(run, run.layout, tier.config.copies, saves)
        boot_ids = {node.address.boot_id for node in run.layout.nodes}
        agent_ids = {node.address.agent_id for node in run.layout.nodes}
        for save in [s for s in run.saves.values() if tier.label in s.ranks]:
            if save in outlived:
                # Its partners let go of it by the same rule, also where others were still to come.
                run.drop_copy(save, tier.label)
                if not save.is_replicated:
                    self._ring.supersede(run, save, tier.label)
                    run.touch(save)
            elif not save.held_by <= boot_ids or save.held_on & run.leaving:
                self._gone(run, tier, save)
            elif not save.held_on and not save.held_agents <= agent_ids:
                # Of an earlier start, and the agent that took them is gone: memory may be, too.
                save.inherited = True
                self.offer_again(run, tier, save)

    def _give_back(
        self, run: RunState, layout: Layout, copies: int, saves: Iterable[SaveState]
    ) -> None:
        """Once a start of the job: what is held here goes to the nodes that have those ranks now.
        One that was replaced has lost its own, and this would be all that there is. What came back
        to this node in that way goes to its partners: it may be all that there is by now."""
        if run.given_back_in == run.secret:
            return
        run.given_back_in = run.secret
        partners = partners_of(
            layout, min(copies, len(layout.nodes) - 1), run.troubles, run.leaving
        )
        for save in saves:
            takers: dict[int, list[int]] = {}
            for rank in sorted(save.guests):
                owner = layout.node_of(rank)
                for number in partners if owner == layout.here else [owner]:
                    if number is not None:
                        takers.setdefault(number, []).append(rank)
            for number, ranks in takers.items():
                giving = self._give(run, run.secret, save, number, ranks)
                self._tools.start(giving, f"copies of {save.name} to node {number}")

    async def _give(
        self, run: RunState, secret: str, save: SaveState, number: int, ranks: list[int]
    ) -> None:
        """Asked again until that node has them, or they are not needed any more."""
        attempt = 0
        while not run.gone and run.secret == secret and save.guests.issuperset(ranks):
            try:
                await self._have_taken(run, secret, save, number, ranks, lambda *_: None)
                return
            except TierUnavailable as error:
                logger.info("run %s: node %d: %s", run.key, number, error.what)
            except CheckpointError as error:
                # It goes on without them; the next save is on two nodes again.
                logger.warning("run %s: node %d: %s", run.key, number, error.what)
                return
            attempt += 1
            await asyncio.sleep(backoff_s(attempt, random.random()))

    async def lost(self, run: RunState, message: Lost) -> Done:
        """A partner found a copy damaged, and could not have it again: it is offered anew."""
        save = run.saves.get(message.save)
        for tier in run.tiers.values():
            if save and tier.is_peers and save.ranks.get(tier.label, set()) & {*message.ranks}:
                self._gone(run, tier, save)
        return Done()

    def _gone(self, run: RunState, tier: TierState, save: SaveState) -> None:
        """What was acknowledged is there no more: owed again."""
        logger.warning("run %s: copies of %s are gone", run.key, save.name)
        self._tools.events.emit("copies.lost", run=run.run, step=save.name.step)
        self.offer_again(run, tier, save)

    def offer_again(self, run: RunState, tier: TierState, save: SaveState) -> None:
        """Owed again: those that have it say so, and hear at the same time how this node is."""
        run.drop_copy(save, tier.label)
        save.due.add(tier.label)
        run.touch(save)

    def _tell_placement(self, run: RunState, layout: Layout, copies: int) -> None:
        """Once a start of the job, by the lead: what the copies survive, and what they do not."""
        if run.placement_told_in == run.secret or not layout.is_lead:
            return
        run.placement_told_in = run.secret
        placed = placement_of(layout.nodes, copies, run.troubles, run.leaving)
        for warning in placed.warnings:
            logger.warning("run %s: %s", run.key, warning)
        self._tools.events.emit("copies.placed", run=run.run, report=placed.as_json())

    async def copy(self, run: RunState, tier: TierState, save: SaveState) -> int:
        """Have all partners take this node's part of a save; the bytes that they took.

        Raises TierUnavailable where one does not answer, and whatever else one says: TierFull,
        Damaged for what they got of it again and again.
        """
        layout = run.layout
        if layout is None:
            raise TierUnavailable("no other node of this run is known", tier=tier.label)
        ranks = sorted(save.ranks[RAM])
        wanted = min(tier.config.copies, len(layout.nodes) - 1)
        partners = partners_of(layout, wanted, run.troubles, run.leaving)
        far: dict[int, Taken] = {}

        def note(number: int, taken: Taken) -> None:
            far[number] = taken
            tier.done_bytes = sum(each.done_bytes for each in far.values())
            tier.total_bytes = max(1, sum(each.total_bytes for each in far.values()))

        secret = run.secret
        asked = [self._have_taken(run, secret, save, number, ranks, note) for number in partners]
        results = await asyncio.gather(*asked, return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        for error in failed:
            if isinstance(error, CheckpointError):
                error.details.update(copies=wanted, copies_made=len(results) - len(failed))
            raise error
        if run.secret != secret:
            raise _anew()
        if len(partners) < wanted:
            names = ", ".join(str(layout.nodes[number].address) for number in sorted(run.leaving))
            raise TierUnavailable(
                f"copies={wanted} have no other node to go to: {names} is about to go",
                tier=tier.label,
                step=save.name.step,
            )
        save.held_by = {far[number].boot_id for number in partners}
        save.held_agents = {far[number].agent_id for number in partners}
        save.held_on = set(partners)
        save.ranks[tier.label] = set(ranks)
        return sum(far[number].done_bytes for number in partners)

    def candidates(self, run: RunState) -> list[int]:
        """The other nodes that stay, its partner first: who can take what this one leaves."""
        layout = run.layout
        assert layout is not None
        first = partners_of(layout, 1, run.troubles, run.leaving)
        return [
            number
            for number in dict.fromkeys([*first, *range(len(layout.nodes))])
            if number != layout.here and number not in run.leaving
        ]

    async def hand_over(
        self, run: RunState, save: SaveState, ranks: list[int], number: int, call_s: float
    ) -> None:
        """Have another node take these parts, which this one has, since this one goes.

        Raises TierUnavailable where it does not answer within ``call_s``, and whatever else it
        says.
        """
        taken: dict[int, Taken] = {}
        note = taken.__setitem__
        await self._have_taken(run, run.secret, save, number, ranks, note, call_s)
        self._tools.events.emit(
            "copies.handed_over", run=run.run, step=save.name.step, node=number, ranks=len(ranks)
        )

    async def _have_taken(
        self,
        run: RunState,
        secret: str,
        save: SaveState,
        number: int,
        ranks: list[int],
        note: Callable[[int, Taken], None],
        call_s: float = CALL_S,
    ) -> None:
        """``secret`` is that of the start of the job in which the node has this number."""
        patience_s = self._tools.limits.call_timeout_s
        done_bytes, moved_s = -1, time.monotonic()
        while True:
            layout = run.layout
            if layout is None or run.secret != secret:
                raise _anew()
            try:
                taken = await self._ask(run, layout, save, number, ranks, call_s)
            except Damaged:
                run.troubles[number] += 1
                raise
            run.troubles[number] = max(run.troubles[number], taken.failures)
            note(number, taken)
            if taken.boot_id:
                return
            now_s = time.monotonic()
            if taken.done_bytes > done_bytes:
                done_bytes, moved_s = taken.done_bytes, now_s
            elif now_s - moved_s > patience_s:
                raise TierUnavailable(
                    f"{layout.nodes[number].address} has taken nothing for {patience_s:.0f} s",
                    tier="peers",
                    step=save.name.step,
                )

    async def _ask(
        self,
        run: RunState,
        layout: Layout,
        save: SaveState,
        number: int,
        ranks: list[int],
        call_s: float,
    ) -> Taken:
        here, there = self._peers.address, layout.nodes[number].address
        if here is None:
            raise TierUnavailable("this agent does not listen to other nodes", tier="peers")
        name, leaving = str(save.name), bool(run.draining)
        offer = Offer(layout.here, here, name, save.save_id, ranks, WAIT_S, leaving)
        try:
            client = self._peers.client(run.key, msgspec.structs.replace(there, agent_id=""))
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, client.call, "pull", offer, Taken, call_s
            )
        except Damaged:
            raise  # what is here, as far as the partner can tell: it is healed before it goes again
        except NodeDraining as error:
            run.note_leaving(number, True)
            raise TierUnavailable(
                error.what,
                tier="peers",
                step=save.name.step,
                has_own=bool(error.details.get("has_own")),
            ) from error
        except (AgentUnavailable, AccessDenied, FormatError) as error:
            # Its next agent, or the next start of the job there, may know more.
            raise TierUnavailable(error.what, tier="peers", step=save.name.step) from error

    def close(self) -> None:
        """Ask nobody any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _anew() -> TierUnavailable:
    return TierUnavailable("the job was started anew: its nodes have other numbers", tier="peers")
