"""Which nodes of a job hold copies of which, as its agents and its trainers both decide it. Pure.

Knows the nodes as they were joined, and what is known of each since. The rule is that of
``_placement``; a node's bytes count as one here, whatever their size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from mtckpt import _placement
from mtckpt._survival import Node

if TYPE_CHECKING:
    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.protocol import NodeOfRun

__all__ = ["partners_of", "placement_of"]


def placement_of(
    nodes: Sequence[NodeOfRun],
    copies: int,
    troubles: Mapping[int, int] = MappingProxyType({}),
    leaving: Collection[int] = (),
    *,
    strict: bool = False,
) -> _placement.Placement:
    """Where the copies of every node's bytes go; all nodes that know the same decide the same.

    ``troubles`` are copies that did not verify on a node, ``leaving`` nodes that are about to go.
    With ``strict``, raises PlacementImpossible where any one domain has all copies of something.
    """
    placed = [
        Node(
            _name(number, node),
            node.address.boot_id,
            tuple(node.ranks),
            dict(node.address.domains),
            troubles.get(number, 0),
            number in leaving,
        )
        for number, node in enumerate(nodes)
    ]
    held = [_placement.Held((rank,), 1) for node in nodes for rank in node.ranks]
    return _placement.place(placed, held, copies, strict=strict)


def partners_of(
    layout: Layout,
    copies: int,
    troubles: Mapping[int, int] = MappingProxyType({}),
    leaving: Collection[int] = (),
) -> list[int]:
    """The nodes, by number, that hold copies of what this one captures: fewer where others go."""
    ranks = tuple(layout.nodes[layout.here].ranks)
    names = {_name(number, node): number for number, node in enumerate(layout.nodes)}
    placed = placement_of(layout.nodes, copies, troubles, leaving)
    numbers = [names[name] for name in placed.partners[ranks]]
    return [number for number in numbers if number not in leaving]


def _name(number: int, node: NodeOfRun) -> str:
    """One that no other node has, and that people know."""
    name = node.address.name
    return f"{name} (node {number})" if name else f"node {number}"
