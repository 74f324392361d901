"""Peers(): what one node has in memory is in another's as well, found again, and let go in turn."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import until
from node_scene import Cluster, Node

from mtckpt import _inventory, _transfer
from mtckpt._source import Place
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.tiers import LocalTier, Survives

pytestmark = pytest.mark.timeout(120)
Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    made: list[Cluster] = []

    def make(count: int = 3, scrub_s: float = 3600.0, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path, [Node(tmp_path, name) for name in "abcd"[:count]]))
        for node in made[-1].nodes:
            node.environment["MTCKPT_SCRUB_S"] = str(scrub_s)
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


def spoil(node: Node, rank: int) -> None:
    """One bit of the only shard of a rank in a node's memory."""
    (path,) = node.places.ram.glob(f"*/run/step-*/rank-{rank:05}.safetensors")
    with path.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 1]))


def slots(node: Node) -> int:
    return len(node.status().slots)


def guests(node: Node, step: int) -> set[int]:
    """Ranks whose shards of a step are in a node's memory without being in one of its slots."""
    own = {slot.step for slot in node.status().slots}
    return set(in_memory(node).get(step, [])) if step not in own else set()


def test_each_node_holds_the_newest_parts_of_another(cluster: Make) -> None:
    job = cluster(3)
    for step in range(1, 6):
        job.save(step, "replicated")
    # The next one on the ring; what is older goes once all nodes have a copy of what is newer.
    log = (job.nodes[0].places.runtime / "agent.log").read_text()
    assert "all nodes are in host" in log  # of all of them it is said what that does not survive
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


@pytest.mark.parametrize(
    "agents", [pytest.param("live on", marks=pytest.mark.torture), "are killed"]
)
def test_a_job_goes_on_after_the_loss_of_a_node_without_a_disk_or_store(
    cluster: Make, agents: str
) -> None:
    job = cluster(3, every=1000)
    for step in (1, 2, 3):
        job.save(step, "replicated")
    job.nodes[1].lose()
    for rank in job.ranks:
        rank.kill()
    if agents == "are killed":
        for node in (job.nodes[0], job.nodes[2]):
            node.kill_agent()
    job.nodes[1] = Node(job.path, "new")
    job.start(copies=1, every=1000)
    restored = job.all("restore")
    assert [step for step, _ in restored] == [3] * 3
    for number, (_, sources) in enumerate(restored):
        # Others may have given the new one its parts back by then, into its memory.
        assert sources.keys() <= ({"ram", "peers"} if number == 1 else {"ram"})
    job.save(4)
    # Until all nodes have copies of something newer, all that was restored is kept.
    assert {rank for node in job.nodes for rank in in_memory(node).get(3, [])} == {0, 1, 2}
    job.save(5, "replicated")
    for node in job.nodes:
        until(lambda: not guests(node, 3))  # noqa: B023
        assert slots(node) <= 3


def test_a_node_that_was_replaced_has_its_parts_back_before_anything_is_saved(
    cluster: Make,
) -> None:
    """Else whoever held the copies would have the only ones, and the next loss be the last. They
    are its own again: slots for what comes next."""
    job = cluster(2, every=1000)
    for step in (1, 2, 3):
        job.save(step, "replicated")
    for lost in (1, 0):
        job.nodes[lost].lose()
        for rank in job.ranks:
            rank.kill()
        job.nodes[lost] = Node(job.path, f"new-{lost}")
        job.start(copies=1, every=1000)
        assert [step for step, _ in job.all("restore")] == [3] * 2
        for node in job.nodes:
            until(lambda: in_memory(node).get(3) == [0, 1])  # noqa: B023
    until(lambda: 3 in {slot.step for slot in job.nodes[0].status().slots})
    job.save(4, "replicated")
    assert slots(job.nodes[0]) <= 3


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


def test_damage_is_mended_from_the_other_node(cluster: Make) -> None:
    job = cluster(2, scrub_s=0.5, every=1000)
    job.save(1, "replicated")
    node = job.nodes[0]
    for rank in (0, 1):  # its own part, and the one that it holds for the other node
        spoil(node, rank)
    until(lambda: node.status().counters.get("healed", 0) >= 2)
    assert in_memory(node)[1] == [0, 1]
    job.save(2, "replicated")


def test_a_copy_that_could_not_be_mended_is_made_anew_once_its_source_is(cluster: Make) -> None:
    """Both copies in memory are damaged, and the partner looks first: it has none from then on."""
    job = cluster(2, every=1)
    job.save(1, "replicated")
    assert all("local" in reached for reached in job.all("wait", 1, "local"))
    own, partner = job.nodes
    for node in (own, partner):
        spoil(node, 0)
    (path,) = partner.places.ram.glob("*/run/step-*/rank-00000.safetensors")
    key = f"run/{path.parent.name}/{path.name}"
    with AgentClient(str(partner.places.runtime / protocol.SOCKET_NAME), 20.0) as client:
        client.call("/v1/runs/run/damage", protocol.Damage("ram", key, "bad"), protocol.Done)
        until(lambda: partner.status().counters.get("damaged", 0))
    until(lambda: in_memory(own)[1] == [0, 1])  # from its disk
    until(lambda: in_memory(partner)[1] == [0, 1])


def test_a_node_whose_copies_rot_is_avoided(cluster: Make) -> None:
    job = cluster(3, scrub_s=0.5, every=1000)
    job.save(1, "replicated")
    rotten = job.nodes[1]
    for times in (1, 2, 3):
        (path,) = rotten.places.ram.glob("*/run/step-*/rank-00000.safetensors")
        with path.open("r+b") as file:
            file.seek(100_000)
            byte = file.read(1)
            file.seek(100_000)
            file.write(bytes([byte[0] ^ 1]))
        until(lambda: rotten.status().counters.get("healed", 0) >= times)  # noqa: B023
    job.save(2, "replicated")  # its answer says how often that was
    job.save(3, "replicated")
    assert in_memory(job.nodes[2])[3] == [0, 1, 2]
    assert in_memory(rotten)[3] == [1]


def test_a_placement_that_is_insisted_on_is_had_or_refused(cluster: Make) -> None:
    job = cluster(2, strict=True)  # both on one host
    for told in [*job.all("restore"), *job.all("save", 1)]:
        assert told["error"] == "PlacementImpossible"
        assert "all nodes are in host" in told["text"]
    assert not any(in_memory(node) for node in job.nodes)
    for node in job.nodes:
        node.lose()
        node.places.runtime.mkdir(exist_ok=True)
        node.environment["MTCKPT_DOMAINS"] = f"host={node.name}"
    job.start(copies=1, strict=True)
    job.save(1, "replicated")


@pytest.mark.root
def test_a_partner_without_room_says_so_and_saves_go_on(cluster: Make) -> None:
    job = cluster(2, slots=2, every=1000)
    small = job.nodes[1].places.ram
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small], check=True)
    try:
        job.save(1, "replicated")
        free = os.statvfs(small)
        (small / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 500_000))
        job.save(2)
        for told in job.all("wait", 2, "replicated"):
            assert (told["error"], told["cause"]) == ("SaveFailed", "TierFull")
            assert "has no room for copies of other nodes" in told["text"]
        assert 0 not in in_memory(job.nodes[1])[2]  # nothing is left of the try
        # Each is told once, as of any tier that failed; training goes on, with two slots too.
        for step in (3, 5):
            assert {told["error"] for told in job.all("save", step)} == {"SaveFailed"}
            job.save(step + 1)
            for told in job.all("wait", step + 1, "replicated"):
                assert (told["error"], told["cause"]) == ("SaveFailed", "TierFull")
    finally:
        job.close()
        subprocess.run(["umount", "-l", small], check=True)


def test_on_one_node_nothing_is_owed(cluster: Make) -> None:
    job = cluster(1)
    job.save(1, "local")
    (told,) = job.all("wait", 1, "replicated")
    assert told["error"] == "StageNotPlanned"
    assert job.all("close") == [None]
