"""Copies of this node's parts on other nodes: who is to hold them, and asking until they do.

Knows the partners, by the pure rule of ``_placement``, and what each has acknowledged. A copy is
made by the node that gets it: here it is only asked for, for as long as the save's slot is held.
Does not move bytes, and does not decide when a save is due (``flushing``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mtckpt import _placement
from mtckpt._survival import Node
from mtckpt.agent.guests import Lost, Offer, Taken
from mtckpt.agent.protocol import Done
from mtckpt.agent.saves import RAM
from mtckpt.errors import AccessDenied, AgentUnavailable, Damaged, FormatError, TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.peers import Peers
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.saves import SaveState, TierState
    from mtckpt.agent.tools import Tools

__all__ = ["Copies", "partners_of", "placement_of"]

logger = logging.getLogger(__name__)

MAX_CALLS = 16
# One answer says how far a copy is, at the latest after WAIT_S.
WAIT_S = 2.0
CALL_S = 15.0
_T = TypeVar("_T")


def placement_of(layout: Layout, copies: int) -> _placement.Placement:
    """Where the copies of every node's bytes go; all nodes that know the same decide the same."""
    nodes = [
        Node(_name(number), node.address.boot_id, tuple(node.ranks), dict(node.address.domains))
        for number, node in enumerate(layout.nodes)
    ]
    held = [_placement.Held((rank,), 1) for node in layout.nodes for rank in node.ranks]
    return _placement.place(nodes, held, copies)


def partners_of(layout: Layout, copies: int) -> list[int]:
    """The nodes, by number, that hold copies of what this one captures."""
    ranks = tuple(layout.nodes[layout.here].ranks)
    names = {_name(number): number for number in range(len(layout.nodes))}
    return [names[name] for name in placement_of(layout, copies).partners[ranks]]


class Copies:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring, peers: Peers) -> None:
        self._tools = tools
        self._ring = ring
        self._peers = peers
        self._threads = ThreadPoolExecutor(MAX_CALLS, "mtckpt-copies")
        self._told: dict[str, str] = {}
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
        for save in [s for s in run.saves.values() if tier.label in s.ranks]:
            if save in outlived:
                # Its partners let go of it by the same rule.
                run.drop_copy(save, tier.label)
            elif not save.held_by <= {node.address.boot_id for node in run.layout.nodes}:
                self._gone(run, tier, save)

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
        run.drop_copy(save, tier.label)
        save.due.add(tier.label)
        run.touch(save)

    def _tell_placement(self, run: RunState, layout: Layout, copies: int) -> None:
        """Once a start of the job, by the lead: what the copies survive, and what they do not."""
        if self._told.get(run.key) == run.secret or not layout.is_lead:
            return
        self._told[run.key] = run.secret
        placed = placement_of(layout, copies)
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
        partners = partners_of(layout, tier.config.copies)
        far: dict[int, Taken] = {}

        def note(number: int, taken: Taken) -> None:
            far[number] = taken
            tier.done_bytes = sum(each.done_bytes for each in far.values())
            tier.total_bytes = max(1, sum(each.total_bytes for each in far.values()))

        asked = [self._have_taken(run, save, number, ranks, note) for number in partners]
        results = await asyncio.gather(*asked, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        save.held_by = {far[number].boot_id for number in partners}
        save.ranks[tier.label] = set(ranks)
        return sum(far[number].done_bytes for number in partners)

    async def _have_taken(
        self,
        run: RunState,
        save: SaveState,
        number: int,
        ranks: list[int],
        note: Callable[[int, Taken], None],
    ) -> None:
        patience_s, secret = self._tools.limits.call_timeout_s, run.secret
        done_bytes, moved_s = -1, time.monotonic()
        while True:
            layout = run.layout
            if layout is None or run.secret != secret:
                raise TierUnavailable("the job was started anew", tier="peers")
            taken = await self._ask(run, layout, save, number, ranks)
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
        self, run: RunState, layout: Layout, save: SaveState, number: int, ranks: list[int]
    ) -> Taken:
        here, there = self._peers.address, layout.nodes[number].address
        if here is None:
            raise TierUnavailable("this agent does not listen to other nodes", tier="peers")
        offer = Offer(layout.here, here, str(save.name), save.save_id, ranks, WAIT_S)
        try:
            client = self._peers.client(run.key, msgspec.structs.replace(there, agent_id=""))
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, client.call, "pull", offer, Taken, CALL_S
            )
        except Damaged:
            raise  # what is here, as far as the partner can tell: it is healed before it goes again
        except (AgentUnavailable, AccessDenied, FormatError) as error:
            # Its next agent, or the next start of the job there, may know more.
            raise TierUnavailable(error.what, tier="peers", step=save.name.step) from error

    def close(self) -> None:
        """Ask nobody any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _name(number: int) -> str:
    return f"node {number}"
