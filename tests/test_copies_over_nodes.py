"""Peers(): what one node has in memory is in another's as well, found again, and let go in turn."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import until
from node_scene import Cluster, Node

from mtckpt import _inventory, _transfer
from mtckpt._source import Place
from mtckpt.tiers import LocalTier, Survives

pytestmark = pytest.mark.timeout(120)
Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    made: list[Cluster] = []

    def make(count: int = 3, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path, [Node(tmp_path, name) for name in "abcd"[:count]]))
        made[-1].start(**{"copies": 1, **settings})
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_memory(node: Node) -> dict[int, list[int]]:
    """Ranks whose shards are whole in a node's memory, byte for byte, by step."""
    (root,) = [path for path in node.places.ram.iterdir() if path.is_dir()]
    tier = LocalTier(root, name="ram", sync=False, survives=Survives.PROCESS, read_only=True)
    place = Place(tier, tier, in_memory=True)
    found: dict[int, list[int]] = {}
    try:
        for save in _inventory.scan(tier, "run").saves.values():
            for rank in sorted(save.records):
                if not _transfer.verify_shard(place, "run", save.name, rank).damaged:
                    found.setdefault(save.name.step, []).append(rank)
    finally:
        tier.close()
    return found


def slots(node: Node) -> int:
    return len(node.status().slots)


def test_each_node_holds_the_newest_parts_of_another(cluster: Make) -> None:
    job = cluster(3)
    for step in range(1, 6):
        job.save(step, "replicated")
    # The next one on the ring; what is older goes once all nodes have a copy of what is newer.
    for number, node in enumerate(job.nodes):
        held = {number, (number + 2) % 3}
        until(lambda: set(in_memory(node)[5]) == held)  # noqa: B023
        until(lambda: all(r == [number] for s, r in in_memory(node).items() if s < 5))  # noqa: B023
        assert slots(node) <= 3  # guests are none
        status = node.status()
        assert status.counters["guests"] == 5
        (peers,) = [tier for tier in status.tiers if tier.kind == "peers"]
        assert peers.steps[-1] == 5
        assert not peers.owed


def test_what_a_lost_node_had_is_on_the_others(cluster: Make) -> None:
    job = cluster(3)
    for step in (1, 2):
        job.save(step, "replicated")
    job.nodes[1].signal_all(signal.SIGKILL)
    left = [job.nodes[0], job.nodes[2]]
    assert {rank for node in left for rank in in_memory(node)[2]} == {0, 1, 2}
    for rank in job.ranks:
        rank.kill()
    for node in left:
        node.kill_agent()
    job.nodes[1].lose()
    job.nodes[1] = Node(job.path, "new")
    job.start(copies=1)
    # Nobody has restored step 2: its own nodes use the memory again, and copies stay until all
    # nodes have copies of something newer.
    job.save(10, "staged")
    assert {2}.issubset(in_memory(left[0])[2])
    assert {1}.issubset(in_memory(left[1])[2])
    job.save(11, "replicated")
    for node in job.nodes:
        until(lambda: in_memory(node).get(2, []) == [])  # noqa: B023
        assert slots(node) <= 4


def test_agents_that_are_killed_find_their_guests_again(cluster: Make) -> None:
    job = cluster(2)
    for step in (1, 2):
        job.save(step, "replicated")
    for node in job.nodes:
        node.kill_agent()
    for step in range(3, 7):
        job.save(step, "replicated")
    for number, node in enumerate(job.nodes):
        until(lambda: in_memory(node)[6] == [0, 1])  # noqa: B023
        until(lambda: all(r == [number] for s, r in in_memory(node).items() if s < 6))  # noqa: B023
        assert slots(node) <= 3


def test_a_partner_that_is_silent_is_owed_and_gets_the_newest_later(cluster: Make) -> None:
    job = cluster(2, slots=3)
    job.save(1, "replicated")
    job.nodes[1].signal_all(signal.SIGSTOP)
    (rank,) = job.nodes[:1]
    assert job.all("save", 2, ranks=[0]) == [""]
    job.nodes[1].signal_all(signal.SIGCONT)
    assert job.all("save", 2, ranks=[1]) == [""]
    assert all("replicated" in reached for reached in job.all("wait", 2, "replicated"))
    assert re.fullmatch(r"\d+", str(rank.agent_pid))


def test_on_one_node_nothing_is_owed(cluster: Make) -> None:
    job = cluster(1)
    job.save(1, "local")
    (told,) = job.all("wait", 1, "replicated")
    assert told["error"] == "StageNotPlanned"
    assert job.all("close") == [None]
