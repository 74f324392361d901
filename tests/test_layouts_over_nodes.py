"""Nodes whose memory does not hold all that their ranks hold alike share it out, and say so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from node_scene import Cluster, Node
from node_worker import SIZE

from mtckpt._joining import Needs, layout_of, layouts_of
from mtckpt._schedule import Disk, Peers

pytestmark = pytest.mark.timeout(120)
ARRAY_BYTES = 8 * SIZE  # each rank has one of its own, and one that all of them hold alike
MARGIN_BYTES = 200_000  # headers, tables and records
Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    """Nodes with so much memory."""
    mounted: list[Path] = []
    made: list[Cluster] = []

    def with_memory(node: Node, size_bytes: int) -> Node:
        options = f"size={size_bytes}"
        ram = node.places.ram
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", ram], check=True)
        mounted.append(ram)
        return node

    def make(count: int, size_bytes: int) -> Cluster:
        nodes = [with_memory(Node(tmp_path, name), size_bytes) for name in "abcd"[:count]]
        made.append(Cluster(tmp_path, nodes))
        return made[-1]

    yield make
    for each in made:
        each.close()
    for ram in mounted:
        subprocess.run(["umount", "-l", ram], check=True)


def shard_bytes(node: Node, step: int) -> dict[int, int]:
    """What the shards of a step take in a node's memory, by rank."""
    paths = node.places.ram.glob(f"*/run/step-*{step}.*/rank-*.safetensors")
    return {int(path.stem.removeprefix("rank-")): path.stat().st_size for path in paths}


@pytest.mark.root
def test_what_all_hold_alike_is_captured_by_two_of_four_where_memory_is_short(
    cluster: Make,
) -> None:
    # In two slots its own array and half of what all hold, twice a copy of another's own: five
    # arrays; with all of it in each slot that would be six.
    job = cluster(4, 11 * ARRAY_BYTES // 2)
    settings = {"copies": 1, "every": 1000, "slots": 2}
    job.start(**settings)
    assert job.all("restore") == [None] * 4
    for _ in range(3):
        step = job.saved("replicated")
    for number, node in enumerate(job.nodes):
        held = shard_bytes(node, step)
        partner = (number + 2) % 4
        assert set(held) == {number, partner}  # its own, and its partner's copy
        # Two of four parts each; its partner has captured the same two, and nothing is sent.
        assert 0 <= held[number] - 3 * ARRAY_BYTES // 2 < MARGIN_BYTES
        assert 0 <= held[partner] - ARRAY_BYTES < MARGIN_BYTES
        counters = node.status().counters
        assert counters["left_out_bytes"] == 3 * ARRAY_BYTES // 2
        assert 0 <= counters["pulled_bytes"] - 3 * ARRAY_BYTES < MARGIN_BYTES
    job.nodes[1].lose()
    for rank in job.ranks:
        rank.kill()
    job.nodes[1] = Node(job.path, "new")
    job.start(**settings)
    restored = job.all("restore")
    assert [found for found, _ in restored] == [step] * 4  # values have been compared
    # What another node captured comes from there, though this one lost nothing.
    assert all("peers" in sources for _, sources in restored)
    job.saved("replicated")


@pytest.mark.root
def test_all_is_captured_on_each_where_memory_holds_it(cluster: Make) -> None:
    job = cluster(2, 40 * ARRAY_BYTES)
    job.start(every=1000, slots=2)
    job.all("restore")
    step = job.saved()
    for node in job.nodes:
        (size_bytes,) = shard_bytes(node, step).values()
        assert 2 * ARRAY_BYTES <= size_bytes < 2 * ARRAY_BYTES + MARGIN_BYTES
    # Slots of an earlier start are no reason to change that.
    filler = 40 * ARRAY_BYTES - 4 * ARRAY_BYTES
    (job.nodes[0].places.ram / "filler").write_bytes(os.urandom(1024) * (filler // 1024 - 600))
    for rank in job.ranks:
        rank.kill()
    job.start(every=1000, slots=2)
    assert job.all("restore")[0][0] == step
    step = job.saved()
    assert shard_bytes(job.nodes[0], step)[0] >= 2 * ARRAY_BYTES


def test_one_node_without_room_decides_for_all() -> None:
    roomy, tight = Needs(10, 90, 2, 1000), Needs(10, 90, 2, 200)
    nodes = [(0, 1), (2,)]
    assert layout_of(layouts_of([roomy, roomy, roomy], nodes, [Disk("/d")])).name == "node"
    assert layout_of(layouts_of([roomy, tight, roomy], nodes, [Disk("/d")])).name == "spread"
    # Of two nodes with one copy each captures all of it anyway.
    assert layout_of(layouts_of([roomy, roomy, tight], nodes, [Peers(copies=1)])).name == "node"
    each = [(0,), (1,), (2,), (3,)]
    assert (
        layout_of(layouts_of([roomy, roomy, tight, tight], each, [Peers(copies=1)])).name
        == "spread"
    )
    # Of what is each rank's own there is nothing to share out.
    alone = Needs(100, 0, 2, 10)
    assert layout_of(layouts_of([alone, alone, alone], nodes, [])).name == "node"
