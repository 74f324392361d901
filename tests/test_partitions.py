"""Nodes whose network is cut, one way or both, or bad: hosts as namespaces, ranks as processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from agent_checks import until
from net_scene import Host, Network, apart
from node_scene import Cluster, Node

from mtckpt.agent import protocol

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
Cut = Callable[[Host, Host], None]


class Job(Cluster):
    """Three hosts with a rank each, and the step that they have come to."""

    def __init__(self, path: Path, rank_s: float) -> None:
        self.network = Network(path)
        self.hosts = [self.host(name, rank_s) for name in ("ant", "bee", "cat")]
        super().__init__(path, self.hosts)

    def host(self, name: str, rank_s: float) -> Host:
        made = self.network.host(name)
        made.environment["MTCKPT_RANK_S"] = str(rank_s)
        return made

    def close(self) -> None:
        super().close()
        self.network.close()

    def heal(self) -> None:
        for host in self.hosts:
            host.heal()

    def reached(self, step: int, timeout_s: float = 0.5) -> list[bool]:
        """Who knows, by then, that all have it."""
        answers = self.all("wait", step, "staged", timeout_s)
        assert all(isinstance(a, str) or a["error"] == "WaitTimeout" for a in answers), answers
        return [isinstance(answer, str) for answer in answers]

    def arrives(self, step: int, stage: str = "local") -> None:
        for answer in self.all("wait", step, stage):
            assert isinstance(answer, str), answer


@pytest.fixture(scope="module")
def patient_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    yield from running(tmp_path_factory.mktemp("patient"), 60.0)


@pytest.fixture(scope="module")
def strict_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    yield from running(tmp_path_factory.mktemp("strict"), 3.0, every=1000)


@pytest.fixture
def patient(patient_job: Job) -> Iterator[Job]:
    """Waits longer than any cut lasts."""
    yield patient_job
    patient_job.heal()


@pytest.fixture
def strict(strict_job: Job) -> Iterator[Job]:
    """Waits less long than cuts last. Its saves go to memory only: one word each to the lead."""
    yield strict_job
    strict_job.heal()


def running(path: Path, rank_s: float, **settings: int) -> Iterator[Job]:
    job = Job(path, rank_s)
    try:
        job.start(**settings)
        yield job
    finally:
        job.close()


def both_ways(lead: Host, other: Host) -> None:
    lead.deaf_to(other)
    other.deaf_to(lead)


def to_the_lead(lead: Host, other: Host) -> None:
    lead.deaf_to(other)


def from_the_lead(lead: Host, other: Host) -> None:
    other.deaf_to(lead)


@pytest.mark.parametrize("cut", [both_ways, to_the_lead, from_the_lead])
def test_a_cut_between_two_of_three_nodes_delays_a_save_and_no_more(patient: Job, cut: Cut) -> None:
    job, (lead, other, _) = patient, patient.hosts
    job.saved("local")
    cut(lead, other)
    step = job.begin()
    known = job.reached(step)
    assert not known[1]
    if cut is not from_the_lead:  # then its word may come through, and be answered by nobody
        assert known == [False] * 3
    assert step not in other.steps_on_disk()
    lead.heal()
    other.heal()
    job.arrives(step)
    job.saved("local")


def address_of(node: Node, number: int) -> protocol.PeerAddress:
    """Where a node of a job listens, as another of its nodes was told."""
    (path,) = node.places.ram.glob("*/run/.join.json")
    join = msgspec.convert(msgspec.json.decode(path.read_bytes())["join"], protocol.Join)
    return join.nodes[number].address


@pytest.mark.parametrize("bad", ["packets are lost", "connections are reset"])
def test_a_bad_network_slows_the_word_down_and_loses_none(patient: Job, bad: str) -> None:
    job = patient
    job.saved("local")
    for number, host in enumerate(job.hosts[:2]):
        if bad == "packets are lost":
            host.loses(0.3)
        else:
            host.resets(0.1, address_of(host, number).control_port)
    job.saved("local")
    job.heal()
    job.saved("local")


def counted(node: Node) -> dict[str, int]:
    """What a node has counted, but for the news that it had of its own job, which may be late."""
    counters = node.status().counters
    return {name: count for name, count in counters.items() if name != "told"}


def test_a_port_that_another_job_has_by_now_is_told_nothing(patient: Job, tmp_path: Path) -> None:
    job, bee = patient, patient.hosts[1]
    strangers = [Node(tmp_path, name, host="") for name in "yz"]
    for node in strangers:
        node.prefix, node.environment = bee.prefix, dict(bee.environment)
    others = Cluster(tmp_path, strangers)
    try:
        others.start()
        others.save(
            1, "local"
        )  # nothing is counted later: a run of the same name, on the same host, of another job
        job.saved("local")
        ours, theirs = address_of(job.hosts[0], 1), address_of(strangers[0], 1)
        assert (ours.host, ours.name, theirs.host) == (bee.address, "bee", bee.address)
        before = counted(strangers[1])
        bee.diverts(ours.control_port, theirs.control_port)
        bee.kill_agent()  # connections that stand are not diverted
        step = job.begin()
        assert not job.reached(step)[1]
        log = job.hosts[0].places.runtime / protocol.LOG_NAME
        until(lambda: "does not know this run's secret" in log.read_text())
        assert counted(strangers[1]) == before
        others.save(2)
        bee.heal()
        job.arrives(step)
        job.saved("local")
    finally:
        others.close()


def test_a_lead_that_is_cut_off_commits_nothing(strict: Job) -> None:
    """It calls the save off; the others do not know, keep their parts, and hear it in the end."""
    job, (lead, *others) = strict, strict.hosts
    job.saved()
    with apart(lead, *others):
        step = job.begin()
        ((cause, told),) = job.fails(step, 0)
        assert cause == "RankTimeout"
        assert "rank 1 on bee" in told
        assert "rank 2 on cat" in told
        for cause, told in job.fails(step, 1, 2):
            assert cause == "RankTimeout"
            assert f"rank 0 on ant ({lead.address})" in told
    settled(job, step)
    assert not any(step in in_memory(node) for node in job.hosts)


def settled(job: Job, step: int) -> None:
    """Nobody is in doubt any more: no slot is held for that step, and saves go on."""
    until(lambda: all(step not in held(node) for node in job.hosts), 30.0)
    job.told_once()
    for _ in range(3):
        job.saved()


def held(node: Node) -> list[int | None]:
    """Steps, whole or not, that slots of a node are taken by."""
    return [slot.step for slot in node.status().slots]


def in_memory(node: Node) -> list[int]:
    """Steps that a node knows to be whole."""
    return node.status().tiers[0].steps


def test_a_save_in_doubt_counts_once_the_word_comes(strict: Job) -> None:
    job, (lead, *others) = strict, strict.hosts
    job.saved()
    told = [node.status().counters["told"] for node in others]
    step = job.begin(ranks=(1, 2))
    until(lambda: all(n.status().counters["told"] > t for n, t in zip(others, told, strict=True)))
    with apart(lead, *others):
        assert job.all("save", step, ranks=[0]) == [""]
        (reached,) = job.all("wait", step, "staged", ranks=[0])
        assert isinstance(reached, str), reached  # the lead knows that all have it
        for _, text in job.fails(step, 1, 2):
            assert "rank 0 on ant" in text
    until(lambda: all(step in in_memory(node) for node in job.hosts), 30.0)
    job.told_once()
    job.saved()


def test_a_rank_that_is_stopped_is_named_and_fenced_afterwards(strict: Job) -> None:
    job, cat = strict, strict.hosts[2]
    job.saved()
    stopped = job.ranks[2]
    stopped.process.send_signal(signal.SIGSTOP)
    step = job.begin(ranks=(0, 1))
    for cause, text in job.fails(step, 0, 1):
        assert cause == "RankTimeout"
        assert f"rank 2 on cat ({cat.address})" in text
    stopped.tell("save", step)
    job.ranks.remove(stopped)  # another job has its run now, while it lives
    try:
        job.start(every=1000)
        job.saved()
        stopped.process.send_signal(signal.SIGCONT)
        if stopped.answer() == "":  # it captured that step before it knew
            stopped.tell("wait", step, "staged")
            assert "error" in stopped.answer()
        stopped.tell("save", step + 1)  # tells of the step before, if that was captured
        stopped.answer()
        stopped.tell("save", step + 2)
        answer = stopped.answer()
        assert answer["error"] == "RunLocked", answer
        job.saved()
    finally:
        stopped.close()
