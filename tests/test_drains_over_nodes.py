"""Nodes that are drained and then lost: nothing goes with them, on whatever nodes it has to be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _isolation
import pytest
from agent_checks import until
from node_scene import Cluster, Node

from mtckpt.agent import drains, protocol
from mtckpt.agent.client import AgentClient

pytestmark = pytest.mark.timeout(120)
Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    made: list[Cluster] = []

    def make(count: int, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path, [Node(tmp_path, name) for name in "abcd"[:count]]))
        for node in made[-1].nodes:
            node.environment["MTCKPT_GRACE_S"] = "8"
        made[-1].start(every=1000, **settings)
        return made[-1]

    yield make
    for each in made:
        each.close()


def drained(node: Node, timeout_s: float = 30.0) -> drains.Drained:
    with AgentClient(str(node.places.runtime / protocol.SOCKET_NAME), timeout_s + 10) as client:
        return client.call("/v1/drain", drains.Drain(timeout_s), drains.Drained)


def stays(node: Node) -> None:
    with AgentClient(str(node.places.runtime / protocol.SOCKET_NAME), 40.0) as client:
        assert client.call("/v1/drain", drains.Drain(cancel=True), drains.Drained).safe


def is_draining(node: Node) -> bool:
    with AgentClient(str(node.places.runtime / protocol.SOCKET_NAME), 40.0) as client:
        return bool(client.call("/status", None, protocol.AgentStatus).draining)


def replaced(job: Cluster, *numbers: int) -> None:
    """These nodes are gone with all that they had; others are in their place."""
    for number in numbers:
        job.nodes[number].lose()
    for rank in job.ranks:
        rank.kill()
    for number in numbers:
        job.nodes[number] = Node(job.path, f"new-{number}")


def test_without_copies_another_node_takes_what_a_drained_one_has(cluster: Make) -> None:
    job = cluster(2)
    job.saved()
    step = job.saved()
    told = drained(job.nodes[1])
    assert told.safe, told
    assert told.runs[0].detail.startswith(f"step {step} is in the memory of ")
    # It is said on all ranks why none of them saves any more, the slots given ahead or not: the
    # step that was brought away is the newest whole one, and so it stays in memory.
    for later in range(step + 1, step + 5):
        job.all("save", later)
        for _, text in job.fails(later, 0, 1):
            assert "is being drained" in text
    replaced(job, 1)
    job.start(every=1000)
    assert [found for found, *_ in job.all("restore")] == [step] * 2


def test_copies_on_a_drained_node_are_made_anew_elsewhere(cluster: Make) -> None:
    """Also those of a node that is gone already, of which it had the only ones."""
    job = cluster(4, copies=1)
    step = job.saved("replicated")
    # By the ring node 2 has copies for node 0, and node 0 those for node 2.
    job.nodes[0].lose()
    assert drained(job.nodes[2]).safe
    replaced(job, 2)
    job.nodes[0] = Node(job.path, "new-0")
    job.start(copies=1, every=1000)
    assert [found for found, *_ in job.all("restore")] == [step] * 4


def test_owners_of_copies_on_a_drained_node_choose_another_partner(cluster: Make) -> None:
    job = cluster(3, copies=1)
    job.saved("replicated")
    before = [node.status().counters["guests"] for node in job.nodes]
    assert drained(job.nodes[1]).safe
    # Of the two that stay, one now holds what was on the drained node, beside what it had.
    until(
        lambda: (
            sum(job.nodes[number].status().counters["guests"] for number in (0, 2))
            == before[0] + before[2] + 1
        )
    )


def test_nodes_that_all_go_do_not_wait_for_each_other(cluster: Make) -> None:
    job = cluster(2, copies=1)
    job.saved("replicated")
    job.save(2)
    for rank in job.ranks:
        rank.kill()
    pids = [node.agent_pid for node in job.nodes]
    for node in job.nodes:
        node.signal_all(signal.SIGTERM)
    for pid in pids:
        until(lambda: not _isolation._is_alive(pid))  # noqa: B023
    assert all(2 in node.steps_on_disk() for node in job.nodes)


def test_a_silent_partner_does_not_outlast_the_grace_period(cluster: Make) -> None:
    job = cluster(2, copies=1)
    job.saved("replicated")
    job.save(2)
    for rank in job.ranks:
        rank.kill()
    first, second = job.nodes
    pid = first.agent_pid
    second.signal_all(signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not _isolation._is_alive(pid), 30.0)
    finally:
        second.signal_all(signal.SIGCONT)
    assert 2 in first.steps_on_disk()
    log = (first.places.runtime / "agent.log").read_text()
    assert "run run is drained: step 2 is on disk" in log
    assert "another node did not take all of it in time" in log


def test_all_nodes_bring_the_newest_step_to_the_store_for_one_that_goes(
    cluster: Make, tmp_path: Path
) -> None:
    """It was not due there, and in a store a part of a step is none."""
    settings: dict[str, Any] = {"store": f"file://{tmp_path}/store"}
    job = cluster(2, **settings)
    step = job.saved()
    assert drained(job.nodes[1]).safe
    (stays_on, _) = job.nodes
    until(lambda: step in next(t.steps for t in stays_on.status().tiers if t.kind == "store"))
    replaced(job, 0, 1)
    job.start(every=1000, **settings)
    assert [found for found, *_ in job.all("restore")] == [step] * 2


def test_copies_for_a_lost_node_go_to_the_store_where_no_other_one_takes_them(
    cluster: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"copies": 1, "store": f"file://{tmp_path}/store"}
    job = cluster(2, **settings)
    step = job.saved("replicated")
    job.nodes[0].lose()
    told = drained(job.nodes[1])
    assert told.safe, told
    assert told.runs[0].detail.startswith(f"step {step} is in store")
    replaced(job, 0, 1)
    job.start(every=1000, **settings)
    assert [found for found, *_ in job.all("restore")] == [step] * 2


def test_a_node_that_stays_after_all_takes_saves_again(cluster: Make) -> None:
    """Taken back while it waited for a part of a save that is still to come."""
    job = cluster(2)
    job.saved()
    step = job.begin(ranks=[0])
    with ThreadPoolExecutor(1) as threads:
        draining = threads.submit(drained, job.nodes[0])
        until(lambda: is_draining(job.nodes[0]))
        stays(job.nodes[0])
        job.all("save", step, ranks=[1])
        draining.result()
    step = job.saved()
    for rank in job.ranks:
        rank.kill()
    job.start(every=1000)
    assert [found for found, *_ in job.all("restore")] == [step] * 2


def test_a_step_that_becomes_whole_once_the_node_is_gone_was_brought_away_too(
    cluster: Make,
) -> None:
    """The node has told of its part, and has not heard whether the others have theirs."""
    job = cluster(3)
    job.saved()
    step = job.begin(ranks=[1, 2])
    told = drained(job.nodes[1], 10.0)
    assert told.safe, told
    job.nodes[1].lose()
    assert job.all("save", step, ranks=[0]) == [""]
    assert all("staged" in reached for reached in job.all("wait", step, "staged", ranks=[0, 2]))
    replaced(job, 1)
    job.start(every=1000)
    assert [found for found, *_ in job.all("restore")] == [step] * 3


def test_two_nodes_that_go_do_not_count_on_each_other(cluster: Make) -> None:
    """The first has given its parts to the second, and is there still when that is to go."""
    job = cluster(3)
    step = job.saved()
    assert drained(job.nodes[1]).safe
    (taker,) = (n for n in (0, 2) if job.nodes[n].status().counters.get("guests"))
    assert drained(job.nodes[taker]).safe
    replaced(job, 1, taker)
    job.start(every=1000)
    assert [found for found, *_ in job.all("restore")] == [step] * 3
