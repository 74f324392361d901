"""What ranks find out of their nodes: who is where, what copies survive, who captures what.

Pure but for a look at a directory: every rank that is told the same finds the same. Does not talk
(``_run`` does), and knows of a state only how large it is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from mtckpt._placement import choose_layout
from mtckpt._schedule import Peers
from mtckpt.agent import protocol
from mtckpt.agent.partners import placement_of
from mtckpt.errors import UsageError
from mtckpt.tiers._os_errors import tier_error

if TYPE_CHECKING:
    from mtckpt._placement import Layout
    from mtckpt._schedule import SlowTier

__all__ = [
    "Needs",
    "joined_of",
    "layout_of",
    "layouts_of",
    "node_of",
    "nodes_of",
    "nowhere",
    "ring_of",
    "warnings_of",
]


class Needs(NamedTuple):
    """What a rank would capture of its own and of what other nodes hold too, into how many slots,
    and the room that there is on its node."""

    private_bytes: int
    shared_bytes: int
    slots: int
    room_bytes: int


def warnings_of(tiers: Sequence[SlowTier], nodes: Sequence[protocol.NodeOfRun]) -> list[str]:
    """What copies on these nodes do not survive. Raises PlacementImpossible where a tier insists
    that they do."""
    return [
        warning
        for tier in tiers
        if isinstance(tier, Peers)
        for warning in placement_of(nodes, tier.copies, strict=tier.strict_placement).warnings
    ]


def layouts_of(
    told: Sequence[Needs], nodes: Sequence[Sequence[int]], tiers: Sequence[SlowTier]
) -> list[Layout]:
    """What each node would have all of them do with what they hold alike, from what each rank has
    told of itself, and whether that fits into its memory."""
    copies = _copies(tiers)
    found = []
    for ranks in nodes:
        needs = [told[rank] for rank in ranks]
        found.append(
            choose_layout(
                sum(each.private_bytes for each in needs),
                sum(each.shared_bytes for each in needs),
                len(nodes),
                copies=copies,
                slots=max(each.slots for each in needs),
                room_bytes=min(each.room_bytes for each in needs),
            )
        )
    return found


def layout_of(found: Sequence[Layout]) -> Layout:
    """How nodes divide what they hold alike: by sharing it out where one of them does not have the
    memory for all of it."""
    return next((layout for layout in found if layout.name == "spread"), found[0])


def ring_of(
    nodes: Sequence[protocol.NodeOfRun], tiers: Sequence[SlowTier]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The ranks of each node, in the order in which nodes are partners, and how many partners each
    has."""
    copies = _copies(tiers)
    return tuple(node.ranks for node in placement_of(nodes, copies).nodes), copies


def _copies(tiers: Sequence[SlowTier]) -> int:
    return sum(tier.copies for tier in tiers if isinstance(tier, Peers))


def joined_of(nodes: Sequence[str], told: list[Any]) -> protocol.Join:
    """Which ranks are on which node, from what each said of its memory and its agent's address.

    The node of rank 0 comes first and leads.
    """
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    addresses = [msgspec.convert(address, protocol.PeerAddress) for address, _, _ in told]
    return protocol.Join(
        "",
        told[0][1],
        len(nodes),
        [protocol.NodeOfRun(addresses[there[0]], there) for there in ranks.values()],
    )


def nodes_of(told: Sequence[Any]) -> list[str]:
    """The node of each rank, from what each said of its memory, its agent and its tiers.

    Raises UsageError where they have different tiers: an agent goes by one list for all ranks of
    its node, and a save that some do not bring to a tier is never whole there.
    """
    first = told[0][2]
    for rank, (_, _, labels) in enumerate(told):
        if labels != first:
            raise UsageError(
                f"rank 0 has the tiers {', '.join(first)}, and rank {rank} {', '.join(labels)}",
                rank=rank,
                state="nothing was done",
                actions=("give Checkpointer the same tiers on all ranks",),
            )
    return [str(node) for node, _, _ in told]


def nowhere(boot_id: str) -> protocol.PeerAddress:
    """This node, of which no other one hears."""
    return protocol.PeerAddress("", 0, 0, boot_id, name=socket.gethostname())


def node_of(opened: protocol.Opened) -> list[Any]:
    """Equal for ranks whose slots lie in one memory, whatever their host is called. It may lie on a
    disk, that hangs. Raises TierError where it is not there."""
    try:
        found = os.stat(opened.ram_root)
    except OSError as error:
        place = opened.ram_root
        raise tier_error(error, doing="open", tier="ram", key=None, place=place) from error
    return [opened.boot_id, found.st_dev, found.st_ino]
