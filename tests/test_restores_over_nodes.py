"""Restores of ranks that are on several nodes: real agents on loopback, ranks as processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_checks import until
from node_scene import Cluster, Node
from node_worker import SIZE

pytestmark = pytest.mark.timeout(120)
ARRAY_BYTES = SIZE * 8


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(count: int = 2, per_node: int = 1) -> Cluster:
        made.append(Cluster(tmp_path, [Node(tmp_path, name) for name in "abc"[:count]]))
        made[-1].start(per_node)
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_memory(node: Node) -> list[int]:
    """Ranks whose shards of the only step are there."""
    records = node.places.ram.glob("*/run/step-*/rank-*.json")
    return sorted(int(path.stem.removeprefix("rank-")) for path in records)


def test_ranks_that_come_back_read_their_own_memory(cluster: Callable[..., Cluster]) -> None:
    job = cluster(2, per_node=2)
    assert job.all("restore") == [None] * 4
    for step in (1, 2):
        job.save(step)
    job.start(2)
    assert job.all("restore") == [[2, {"ram": 2 * ARRAY_BYTES}]] * 4
    # Of rank 3 alone: nobody else has to ask at the same time.
    whole = [["ram"], ["staged"]]
    found = {step: [tiers, stages] for step, tiers, stages in job.all("steps", ranks=[3])[0]}
    assert found[2] in (whole, [["ram", "disk"], ["staged", "local"]])
    job.save(3)


def test_ranks_that_come_back_on_other_nodes_read_from_peers(
    cluster: Callable[..., Cluster],
) -> None:
    job = cluster(2)
    job.save(1, "local")
    job.nodes.reverse()
    job.start()
    told = json.loads(job.nodes[0].command("explain", "run", "--json"))
    first, second = told["shards"]
    assert first["source"].startswith("peers-")
    assert first["source"].endswith("-ram")
    assert second["source"] == "ram"
    reasons = {each["tier"]: each["reason"] for each in first["rejected"]}
    assert reasons["ram"] == reasons["disk"] == "has no record of this rank"
    # What is their own is on the other node; what all hold alike is on this one too.
    assert job.all("restore") == [[1, {"ram": ARRAY_BYTES, "peers": ARRAY_BYTES}]] * 2
    job.save(2)


@pytest.mark.parametrize("where", ["in memory", "on disk"])
def test_another_run_is_restored_from_the_parts_of_all_nodes(
    cluster: Callable[..., Cluster], where: str
) -> None:
    job = cluster(2)
    if where == "in memory":
        job.save(1)
    else:
        job.save(1, "local")
        job.all("close")
    job.start(run="tuned")
    tier = "ram" if where == "in memory" else "disk"
    assert job.all("restore") == [None, None]
    assert job.all("restore", "run") == [[1, {tier: 2 * ARRAY_BYTES}]] * 2
    job.nodes.reverse()
    job.start(run="tuned-again")
    assert job.all("restore") == [None, None]
    for step, sources in job.all("restore", "run"):
        assert step == 1
        assert sources["peers"] >= ARRAY_BYTES


def test_more_ranks_on_the_same_nodes(cluster: Callable[..., Cluster]) -> None:
    job = cluster(2)
    job.save(1)
    job.start(2)
    found = job.all("adopt")
    # Ranks 0 and 2 take what rank 0 had of its own, 1 and 3 what rank 1 had.
    mixed = {"ram": ARRAY_BYTES, "peers": ARRAY_BYTES}
    assert found == [
        [1, 0, {"ram": 2 * ARRAY_BYTES}], [1, 1, mixed], [1, 0, mixed],
        [1, 1, {"ram": 2 * ARRAY_BYTES}],
    ]  # fmt: skip
    job.save(2, "local")


def test_fewer_nodes_take_over_what_the_one_that_is_left_out_still_has(
    cluster: Callable[..., Cluster],
) -> None:
    job = cluster(2)
    job.save(1)
    left_out = job.nodes.pop()
    try:
        job.start(2)
        own, private = job.all("adopt")
        assert own == [1, 0, {"ram": 2 * ARRAY_BYTES}]
        assert private == [1, 1, {"ram": ARRAY_BYTES, "peers": ARRAY_BYTES}]
        job.save(2)
        job.start(2)
        assert [each[1] for each in job.all("restore")] == [{"ram": 2 * ARRAY_BYTES}] * 2
    finally:
        job.nodes.append(left_out)


def test_a_copy_that_another_node_has_damaged_is_passed_over_and_healed_there(
    cluster: Callable[..., Cluster],
) -> None:
    job = cluster(2)
    job.save(1, "local")
    (shard,) = job.nodes[0].places.ram.glob("*/run/step-*/rank-00000.safetensors")
    sound = shard.read_bytes()
    with shard.open("r+b") as file:
        at = len(sound) - ARRAY_BYTES - 1  # the last byte of what is rank 0's own
        file.seek(at)
        file.write(bytes([sound[at] ^ 1]))
    job.nodes.reverse()
    job.start()
    restored = job.all("restore")
    assert [sorted(sources) for _, sources in restored] == [["peers", "ram"]] * 2
    until(lambda: shard.exists() and shard.read_bytes() == sound)


@pytest.mark.parametrize("stage", ["staged", "local"])
def test_a_lost_node_is_no_fresh_start(cluster: Callable[..., Cluster], stage: str) -> None:
    """Nobody has what it had: that there was a step is known on the other node all the same."""
    job = cluster(2)
    job.save(1, stage)
    left = job.nodes[0].places.ram if stage == "staged" else job.nodes[0].disk
    until(lambda: list(left.rglob("manifest.json")))
    job.nodes[1].lose()
    job.nodes[1] = Node(job.path, "c")
    if stage == "local":
        for path in job.nodes[0].places.ram.glob("*/run/step-*"):
            shutil.rmtree(path)
    job.start()
    for error in job.all("restore"):
        assert error["error"] == "NoHealthyStep"
        assert "records of ranks [1] are missing" in error["text"]


@pytest.mark.parametrize(("before", "after"), [("rows", "rows"), ("rows", "columns")])
def test_another_mesh_takes_no_more_memory_than_its_own_part(
    cluster: Callable[..., Cluster], before: str, after: str
) -> None:
    """From RAM and peers. A whole array in any process would be seen in the kernel's peak."""
    job = cluster(2, per_node=2)
    assert job.all("save_mesh", 1, before, 4) == [""] * 4
    assert all(isinstance(each, str) for each in job.all("wait", 1, "staged"))
    if after == "rows":
        job.nodes.reverse()
    job.start()
    for step, own_bytes, peak_bytes, sources in job.all("restore_mesh", after, 2, 4 << 20):
        assert step == 1
        assert "peers" in sources
        assert sum(sources.values()) < own_bytes * (1.01 if after == "rows" else 2.2)
        assert peak_bytes <= 1.1 * own_bytes


def test_what_only_a_store_has_comes_to_the_memory_of_its_own_nodes(
    cluster: Callable[..., Cluster],
) -> None:
    """Each shard once over the network, and from then on as after any save: with its copies."""
    job = cluster(2)
    settings = {"store": f"file://{job.path}/store", "copies": 1}
    job.start(2, **settings)
    job.save(1, "durable")
    for node in job.nodes:
        node.lose()
    job.nodes = [Node(job.path, "c"), Node(job.path, "d")]
    job.start(2, **settings)
    restored = job.all("restore")
    assert [step for step, _ in restored] == [1] * 4
    assert [sources["store"] for _, sources in restored] == [2 * ARRAY_BYTES] * 4
    for node in job.nodes:
        assert node.status().counters["fetched"] == 1
    until(lambda: [in_memory(node) for node in job.nodes] == [[0, 1, 2, 3]] * 2)
    for node in job.nodes:
        until(lambda: node.status().counters.get("guests") == 2)  # noqa: B023
        assert len(node.status().slots) == 2  # its own ranks'
        assert node.status().counters["left_out_bytes"] == ARRAY_BYTES
    for process in job.ranks:
        process.kill()
    job.start(2, **settings)
    assert job.all("restore") == [[1, {"ram": 2 * ARRAY_BYTES}]] * 4
    job.save(2, "replicated")
