"""Peers() under data parallelism: what nodes hold alike is not sent, and is not lost with one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_checks import until
from node_scene import Cluster, Node
from node_worker import SIZE

from mtckpt._handle import size_text

pytestmark = pytest.mark.timeout(120)
ARRAY_BYTES = 8 * SIZE  # each rank has one of its own, and one that all of them hold alike
SMALL_BYTES = 30_000  # header, table and record of a shard


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes with two ranks each, and copies in each other's memory; no disk is due."""
    made = Cluster(tmp_path, [Node(tmp_path, name) for name in "ab"])
    for node in made.nodes:
        node.environment["MTCKPT_SCRUB_S"] = "0.5"
    made.start(2, copies=1, every=1000)
    yield made
    made.close()


def shard_bytes(node: Node, step: int) -> dict[int, int]:
    paths = node.places.ram.glob(f"*/run/step-*{step}.*/rank-*.safetensors")
    return {int(path.stem.removeprefix("rank-")): path.stat().st_size for path in paths}


def flip(node: Node, rank: int, at: int) -> None:
    (path,) = node.places.ram.glob(f"*/run/step-*/rank-{rank:05}.safetensors")
    with path.open("r+b") as file:
        file.seek(at, 2)
        byte = file.read(1)
        file.seek(at, 2)
        file.write(bytes([byte[0] ^ 1]))


def test_a_save_sends_nothing_of_what_both_nodes_hold_and_survives_one(job: Cluster) -> None:
    job.save(1, "replicated")
    for number, node in enumerate(job.nodes):
        held = shard_bytes(node, 1)
        for rank in range(4):
            # A rank copies half of what all hold alike; the other node's copy has none of it.
            wanted = ARRAY_BYTES + (ARRAY_BYTES // 2 if rank // 2 == number else 0)
            assert wanted <= held[rank] < wanted + SMALL_BYTES
        counters = node.status().counters
        assert counters["left_out_bytes"] == ARRAY_BYTES
        assert 2 * ARRAY_BYTES <= counters["pulled_bytes"] < 2 * (ARRAY_BYTES + SMALL_BYTES)
    own, partner = job.nodes
    told = json.loads(own.command("explain", "run", "--json"))
    for shard in told["shards"]:
        assert shard["source"] == "ram"
        assert shard["left_out_bytes"] == (0 if shard["rank"] < 2 else ARRAY_BYTES // 2)
        assert any(
            each["tier"].startswith("peers-") and each["reason"] == "not needed: ram comes first"
            for each in shard["rejected"]
        )
    lines = [line.split() for line in own.command("explain", "run").splitlines()]
    thin = {line[0]: " ".join(line[3:7]) for line in lines if line[6:7] == ["elsewhere"]}
    assert thin == dict.fromkeys("23", f"ram, {size_text(ARRAY_BYTES // 2)} elsewhere")
    # A flipped bit of what both have, and one of what only its copy has too.
    flip(own, 0, -5)
    until(lambda: own.status().counters.get("healed", 0) >= 1)
    flip(own, 1, -ARRAY_BYTES // 2 - 5)
    until(lambda: own.status().counters.get("healed", 0) >= 2)
    flip(partner, 0, -5)
    until(lambda: partner.status().counters.get("healed", 0) >= 1)
    assert shard_bytes(partner, 1)[0] < ARRAY_BYTES + SMALL_BYTES
    job.save(2, "replicated")
    partner.lose()  # its processes, its memory and its disk
    for process in job.ranks:
        process.kill()
    own.kill_agent()
    job.nodes[1] = Node(job.path, "new")
    job.start(2, copies=1, every=1000)
    restored = job.all("restore")  # all values have been compared
    assert [step for step, _ in restored] == [2] * 4
    assert [sources.keys() for _, sources in restored[:2]] == [{"ram"}] * 2
    for _, sources in restored[2:]:
        assert sources.keys() <= {"peers", "ram"}  # they may have been given back by then
        assert sum(sources.values()) == 2 * ARRAY_BYTES
    job.save(3, "replicated")


def test_a_replica_that_differs_is_copied(job: Cluster) -> None:
    """Its bytes are on no other node."""
    for number, process in enumerate(job.ranks):
        process.tell("save_flipped" if number == 2 else "save", 1)
    assert [process.answer() for process in job.ranks] == [""] * 4
    assert all("replicated" in reached for reached in job.all("wait", 1, "replicated"))
    for node, rank in ((job.nodes[0], 2), (job.nodes[1], 0)):
        assert shard_bytes(node, 1)[rank] > 3 * ARRAY_BYTES // 2
        assert node.status().counters["left_out_bytes"] == ARRAY_BYTES // 2
