"""Layouts of jobs over several nodes, for tests of what is decided from them."""

from __future__ import annotations

from mtckpt._handshake import PeerAddress
from mtckpt.agent.nodes import Layout
from mtckpt.agent.protocol import NodeOfRun


def layout(here: int, *racks: str) -> Layout:
    """A node in each of these racks, with two ranks each; the first leads."""
    nodes = [
        NodeOfRun(
            PeerAddress("10.0.0.1", 1, number, f"boot-{number}", domains=(("rack", rack),)),
            [2 * number, 2 * number + 1],
        )
        for number, rack in enumerate(racks)
    ]
    return Layout(tuple(nodes), here, 0)
