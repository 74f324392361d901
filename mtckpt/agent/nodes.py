"""Saves whose ranks are on several nodes: what a node tells the lead, and the lead them. Pure.

Knows which ranks are where, and makes news of a save out of what an agent knows of it. The lead is
the agent of rank 0's node: nodes tell it what they have, and it tells all of them what that amounts
to. News is a state and no event: the last one stands for all before, so it may come twice, late, or
not at all and then again. Does not send (``links``), does not decide (``agreement``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Rank, Uuid, WorldSize
from mtckpt.agent.protocol import WireError
from mtckpt.agent.saves import RAM
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from mtckpt.agent.protocol import Join, NodeOfRun
    from mtckpt.agent.saves import SaveState

__all__ = [
    "Heard",
    "Layout",
    "News",
    "Tell",
    "layout_of",
    "moved",
    "news_for_lead",
    "news_for_nodes",
    "nothing_of",
]

MAX_NAMED = 8


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a save stands with whoever tells. All but the names are empty by default.

    ``parts`` are the ranks whose records a node has, by tier, once it has those of all its ranks;
    ``whole`` the tiers in which, as the lead knows, all nodes have theirs. ``read_back`` and
    ``damaged`` are tiers where that much was read and found good, and where something was not.
    ``due`` travels too: a tier may be due by the clock of rank 0. ``wanted`` are stores that are to
    have it although they were not due, since a node of it is about to go. ``twins`` are what a
    node's ranks have stored of what others hold too; ``diverged`` the leaves of which copies
    differ, as the lead has found out.
    """

    save: str
    save_id: Uuid
    incarnation_id: str = ""
    world_size: WorldSize = 1
    plan_digest: str = ""
    due: list[str] = []
    parts: dict[str, list[Rank]] = {}
    whole: list[str] = []
    read_back: list[str] = []
    damaged: list[str] = []
    superseded: list[str] = []
    failed: dict[str, WireError] = {}
    called_off: str = ""
    wanted: list[str] = []
    twins: dict[str, dict[str, list[int]]] = {}
    diverged: dict[str, list[int]] = {}


class Tell(msgspec.Struct, frozen=True):
    """From an agent to the lead, or from the lead to an agent. ``node`` is the teller's number in
    the layout that both were given, and ``address`` where it is now: another agent may have taken
    the place of the one that joined."""

    node: int
    address: PeerAddress
    saves: list[News] = []


class Heard(msgspec.Struct, frozen=True):
    """``agent_id`` of whoever heard it: another than before knows nothing of what was told then."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Which ranks are on which node; ``here`` and ``lead`` are numbers of nodes."""

    nodes: tuple[NodeOfRun, ...]
    here: int
    lead: int

    @property
    def is_lead(self) -> bool:
        return self.here == self.lead

    @property
    def own(self) -> frozenset[int]:
        """The ranks of this node."""
        return frozenset(self.nodes[self.here].ranks)

    def node_of(self, rank: int) -> int | None:
        return next((n for n, node in enumerate(self.nodes) if rank in node.ranks), None)

    def host_of(self, rank: int) -> str:
        number = self.node_of(rank)
        return "an unknown host" if number is None else str(self.nodes[number].address)

    def partners(self) -> list[int]:
        """The nodes that this one speaks to: the lead, or all others."""
        others = [number for number in range(len(self.nodes)) if number != self.here]
        return others if self.is_lead else [self.lead]

    def describe(self, ranks: Collection[int]) -> str:
        """Ranks with the nodes they are on: ``ranks 2, 3 on b``."""
        wanted = set(ranks)
        parts = [
            f"{named(wanted.intersection(node.ranks))} on {node.address}"
            for node in self.nodes
            if wanted.intersection(node.ranks)
        ]
        more = f" and {len(parts) - MAX_NAMED} more nodes" if len(parts) > MAX_NAMED else ""
        return "; ".join(parts[:MAX_NAMED]) + more or named(wanted)


def layout_of(join: Join, rank: int) -> Layout:
    """The nodes as the one of ``rank`` sees them. Raises UsageError if that is on none."""
    here = next((n for n, node in enumerate(join.nodes) if rank in node.ranks), None)
    if here is None:
        raise UsageError("this rank is on no node of the run", state="nothing was done", rank=rank)
    return Layout(tuple(join.nodes), here, join.lead)


def moved(join: Join, number: int, address: PeerAddress) -> Join:
    """The same nodes, one of them at another address: another agent is there now."""
    nodes = list(join.nodes)
    nodes[number] = msgspec.structs.replace(nodes[number], address=address)
    return msgspec.structs.replace(join, nodes=nodes)


def named(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 2, 3, ...``."""
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:MAX_NAMED]))
    more = ", ..." if len(listed) > MAX_NAMED else ""
    return f"rank{'s' if len(listed) != 1 else ''} {shown}{more}"


def news_for_lead(save: SaveState, layout: Layout, incarnation: int) -> News | None:
    """What the lead is to know; None while there is nothing to know.

    Of the incarnation that goes on the lead hears of a tier once all ranks of this node are there.
    Ranks may have been on other nodes before: of earlier ones it hears of whatever is here.
    """
    parts = {
        label: sorted(ranks)
        for label, ranks in save.ranks.items()
        if ranks and (layout.own <= ranks or save.name.incarnation < incarnation)
    }
    if save.called_off:
        parts.pop(RAM, None)
    failed = {label: why for label, why in save.failed.items() if label != RAM or save.called_off}
    if not (parts or failed or save.superseded or save.called_off or save.wanted):
        return None
    return News(
        **_identity(save),
        due=sorted(save.due),
        parts=parts,
        read_back=sorted(save.verified & parts.keys()),
        damaged=sorted(save.damaged & parts.keys()),
        superseded=sorted(save.superseded),
        failed=failed,
        called_off=save.called_off,
        wanted=sorted(save.wanted),
        twins=save.twins if RAM in parts else {},
    )


def news_for_nodes(save: SaveState) -> News | None:
    """What every other node is to know, from the lead; None while that is nothing. The lead may
    have no part of it: of an earlier start."""
    labels = save.ranks.keys() | set(save.told.labels())
    whole = sorted(
        set(filter(save.is_whole, labels)) - save.uncommitted
        # Its own parts may have been recycled since.
        | ({RAM} if "staged" in save.stages else set())
    )
    failed, superseded = save.failures(), save.passed_over()
    if not (whole or failed or superseded or save.called_off or save.wanted):
        return None
    return News(
        **_identity(save),
        due=sorted(save.due),
        whole=whole,
        read_back=[label for label in whole if save.is_verified(label)],
        damaged=sorted(filter(save.is_damaged, labels)),
        superseded=sorted(superseded),
        failed=failed,
        called_off=save.called_off,
        wanted=sorted(save.wanted),
        diverged=save.diverged,
    )


def nothing_of(save: SaveState) -> News:
    """That a node has nothing of a save."""
    return News(**_identity(save))


def _identity(save: SaveState) -> dict[str, Any]:
    return {
        "save": str(save.name),
        "save_id": save.save_id,
        "incarnation_id": save.incarnation_id,
        "world_size": save.world_size,
        "plan_digest": save.plan_digest,
    }
