"""Saves whose ranks are on several nodes: two or three agents on loopback, ranks as processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import until
from node_scene import Cluster, Node

pytestmark = pytest.mark.timeout(120)
Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    made: list[Cluster] = []

    def make(count: int = 2, per_node: int = 1, rank_s: float = 60.0, **settings: Any) -> Cluster:
        nodes = [Node(tmp_path, name) for name in "abc"[:count]]
        for node in nodes:
            node.environment["MTCKPT_RANK_S"] = str(rank_s)
        made.append(Cluster(tmp_path, nodes))
        made[-1].start(per_node, **settings)
        return made[-1]

    yield make
    for each in made:
        each.close()


def errors(answers: list[Any]) -> list[Any]:
    """Each answer has to be an error; its class, cause and text."""
    assert all(isinstance(each, dict) for each in answers), answers
    return [(each["error"], each["cause"], each["text"]) for each in answers]


def test_saves_reach_all_nodes_and_old_ones_go(cluster: Make) -> None:
    job = cluster(2, per_node=2)
    for step in range(1, 6):
        job.save(step, "local")
    # Each node has the parts of its own ranks, and lets go by the rules of the tier: keep=2.
    first, second = job.nodes
    until(lambda: first.steps_on_disk() == {4: [0, 1], 5: [0, 1]})
    until(lambda: second.steps_on_disk() == {4: [2, 3], 5: [2, 3]})
    for node in job.nodes:
        status = node.status()
        assert status.counters["staged"] == 5
        # To memory and to disk, read back, and then there is a greeting.
        assert status.counters["told"] <= 5 * 5 + 2
        assert {slot.state for slot in status.slots} <= {"committed", "capturing", "free"}
    assert job.all("close") == [None] * 4
    for node in job.nodes:  # memory is free once disks have it
        until(lambda: not list(node.places.ram.rglob("*.safetensors")))  # noqa: B023


def test_a_rank_that_declines_calls_the_save_off_on_all_nodes(cluster: Make) -> None:
    job = cluster(3)
    job.save(1)
    for decliner, step in ((2, 2), (0, 3)):  # a node's rank, and the lead's own
        others = [rank for rank in range(3) if rank != decliner]
        for rank in others:
            job.ranks[rank].tell("save", step)
        job.ranks[decliner].tell("bad", step)
        assert [job.ranks[rank].answer() for rank in others] == ["", ""]
        assert errors([job.ranks[decliner].answer()])[0][0] == "UnsupportedState"
        for name, _, text in errors(job.all("wait", step, "staged", ranks=others)):
            assert name == "SaveFailed"
            assert f"rank {decliner}: the state could not be read" in text
    for step in (4, 5, 6, 7):  # no slot was lost
        job.save(step, "local")
    assert all(set(node.steps_on_disk()) <= {4, 5, 6, 7} for node in job.nodes)


def test_disagreements_are_told_on_all_nodes(cluster: Make) -> None:
    job = cluster(2)
    job.save(1, "local")
    for rank, step in ((0, 2), (1, 3)):
        job.ranks[rank].tell("save", step)
    assert [rank.answer() for rank in job.ranks] == ["", ""]
    for rank, step in ((0, 2), (1, 3)):
        (told,) = errors(job.all("wait", step, "staged", ranks=[rank]))
        assert told[:2] == ("SaveFailed", "StepDisagreement")
    assert [each[1] for each in errors(job.all("save", 4))] == ["StepDisagreement"] * 2
    job.save(5)
    job.ranks[0].tell("save", 6)
    job.ranks[1].tell("other", 6)  # another global array under the same path
    assert [rank.answer() for rank in job.ranks] == ["", None]
    for told in errors(job.all("wait", 6, "staged")):
        assert told[:2] == ("SaveFailed", "StepDisagreement")
        assert "different global arrays" in told[2]
    job.all("save", 7)
    job.save(8, "local")
    assert {step for node in job.nodes for step in node.steps_on_disk()} <= {1, 5, 8}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_dies_is_named_and_the_others_do_not_hang(cluster: Make, lost: int) -> None:
    """The lead's node, or another one. What was whole before stays, and the next job goes on."""
    job = cluster(2, rank_s=1.5)
    job.save(1, "local")
    job.nodes[lost].signal_all(signal.SIGKILL)
    left = 1 - lost
    assert job.all("save", 2, ranks=[left]) == [""]
    ((name, cause, text),) = errors(job.all("wait", 2, "staged", ranks=[left]))
    assert (name, cause) == ("SaveFailed", "RankTimeout")
    assert f"rank {lost}" in text
    job.start()
    for step in (2, 3, 4):
        job.save(step, "local")


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_agents_that_are_killed_come_back_and_saves_go_on(
    cluster: Make, which: tuple[int, ...]
) -> None:
    job = cluster(2)
    job.save(1)
    for step in (2, 3):
        assert job.all("save", step) == ["", ""]
        for number in which:
            job.nodes[number].kill_agent()
        for reached in job.all("wait", step, "local"):
            assert isinstance(reached, str), reached
    for step in (4, 5):
        job.save(step, "local")
    for node, rank in zip(job.nodes, (0, 1), strict=True):
        until(lambda: node.steps_on_disk() == {4: [rank], 5: [rank]})  # noqa: B023
