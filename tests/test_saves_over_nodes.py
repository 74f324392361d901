"""Saves whose ranks are on several nodes: two or three agents on loopback, ranks as processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_checks import until
from node_scene import Cluster, Node

from mtckpt import _inventory
from mtckpt.tiers import LocalTier

pytestmark = pytest.mark.timeout(120)


def running(
    path: Path, count: int, per_node: int | list[int] = 1, rank_s: float = 60.0, **settings: object
) -> Iterator[Cluster]:
    nodes = [Node(path, name) for name in "abc"[:count]]
    for node in nodes:
        node.environment["MTCKPT_RANK_S"] = str(rank_s)
    job = Cluster(path, nodes)
    try:
        job.start(per_node, **settings)
        yield job
    finally:
        job.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A rank on each of three nodes. Tests leave it at work, at whatever step."""
    yield from running(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Cluster]:
    """Two ranks on each of two nodes."""
    yield from running(tmp_path, 2, 2)


@pytest.fixture
def three_and_one(tmp_path: Path) -> Iterator[Cluster]:
    """With two slots each, that wait for one no longer than for a round trip; memory only."""
    yield from running(tmp_path, 2, [3, 1], slots=2, every=1000, max_stall_s=0.2)


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Cluster]:
    yield from running(tmp_path, 2, rank_s=4.0)


def test_saves_reach_all_nodes_and_old_ones_go(four: Cluster) -> None:
    job = four
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


@contextlib.contextmanager
def read_by_somebody(node: Node, step: int, rank: int) -> Iterator[None]:
    """A rank's part of a step, in the memory of its node, has a reader."""
    (root,) = {path.parent.parent for path in node.places.ram.glob("*/run/*-*")}
    tier = LocalTier(root, name="ram", read_only=True)
    try:
        (save,) = (s for s in _inventory.scan(tier, "run").saves.values() if s.name.step == step)
        with tier.lease(f"run/{save.name}/rank-{rank:05d}.safetensors"):
            yield
    finally:
        tier.close()


def test_a_rank_without_a_slot_holds_up_nobody_for_twenty_saves(three_and_one: Cluster) -> None:
    job = three_and_one
    first = job.saved()
    with read_by_somebody(job.nodes[1], first, 3):
        second = job.saved()
        for _ in range(20):
            job.step += 1
            *others, stuck = job.all("save", job.step)
            assert "no slot is free" in stuck
            assert "held by a reader" in stuck
            # The word of it may come before the others begin, or while theirs is on its way.
            for rank, said in enumerate(others):
                why = said or job.all("wait", job.step, "staged", ranks=[rank])[0]["text"]
                assert "rank 3: no slot is free" in why
        until(lambda: all(states(node, first, second) <= {None} for node in job.nodes))
    job.saved()  # together, and at once
    for _ in range(3):
        job.saved()


def states(node: Node, *whole: int) -> set[int | None]:
    """Steps besides these that slots of a node are taken by."""
    return {slot.step for slot in node.status().slots} - set(whole)


def test_a_rank_that_declines_calls_the_save_off_on_all_nodes(three: Cluster) -> None:
    job = three
    job.saved()
    for decliner in (2, 0):  # a node's rank, and the lead's own
        job.step += 1
        others = [rank for rank in range(3) if rank != decliner]
        for rank in others:
            job.ranks[rank].tell("save", job.step)
        job.ranks[decliner].tell("bad", job.step)
        for rank in others:  # the word of it may come before the others begin
            said = job.ranks[rank].answer()
            why = said or job.fails(job.step, rank)[0][1]
            assert f"rank {decliner}: the state could not be read" in why
        assert job.ranks[decliner].answer()["error"] == "UnsupportedState"
    called_off = {job.step - 1, job.step}
    for _ in range(4):  # no slot was lost
        job.saved("local")
    assert not any(called_off & node.steps_on_disk().keys() for node in job.nodes)


def test_disagreements_are_told_on_all_nodes(three: Cluster) -> None:
    job = three
    job.saved("local")
    step = job.step
    for rank, ahead in ((0, 1), (1, 1), (2, 2)):
        job.ranks[rank].tell("save", step + ahead)
    assert [rank.answer() for rank in job.ranks] == [""] * 3
    for rank, ahead in ((0, 1), (1, 1), (2, 2)):
        ((cause, _),) = job.fails(step + ahead, rank)
        assert cause == "StepDisagreement"
    job.step += 2
    job.told_once()
    job.saved()
    job.step += 1
    job.ranks[0].tell("save", job.step)
    for rank in (1, 2):  # another global array under the same path
        job.ranks[rank].tell("other", job.step)
    assert [rank.answer() for rank in job.ranks] == ["", None, None]
    for cause, text in job.fails(job.step, 0, 1, 2):
        assert cause == "StepDisagreement"
        assert "different global arrays" in text
    disputed = {step + 1, step + 2, job.step}
    job.told_once()
    job.saved("local")
    assert not any(disputed & node.steps_on_disk().keys() for node in job.nodes)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)])
def test_agents_that_are_killed_come_back_and_saves_go_on(
    three: Cluster, which: tuple[int, ...]
) -> None:
    job = three
    job.saved()
    step = job.begin()
    for number in which:
        job.nodes[number].kill_agent()
    for reached in job.all("wait", step, "local"):
        assert isinstance(reached, str), reached
    for _ in range(2):
        job.saved("local")
    for rank, node in enumerate(job.nodes):
        kept = {job.step - 1: [rank], job.step: [rank]}
        until(lambda: node.steps_on_disk() == kept)  # noqa: B023


def test_a_node_that_dies_is_named_and_the_others_do_not_hang(hasty: Cluster) -> None:
    """Another node, and then the lead's. What was whole before stays, and the next job goes on."""
    job = hasty
    for lost in (1, 0):
        job.saved("local")
        job.nodes[lost].signal_all(signal.SIGKILL)
        step = job.begin(ranks=[1 - lost])
        ((cause, text),) = job.fails(step, 1 - lost)
        assert cause == "RankTimeout"
        assert f"rank {lost}" in text
        job.start()
    job.saved("local")
