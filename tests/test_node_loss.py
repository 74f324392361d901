"""Hosts that are lost, replaced and come back: namespaces with memory and disks of their own.

After each the job goes on from what is left, and every value that is restored is compared.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from net_scene import Host, Network
from node_scene import Cluster
from node_worker import SIZE

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
STATE_BYTES = 2 * SIZE * 8  # an array of the rank's own, and one that all hold alike
MESSAGES_BYTES = 200_000
Make = Callable[..., "Job"]


class Job(Cluster):
    """A cluster of hosts."""

    def __init__(self, path: Path, hosts: list[Host]) -> None:
        super().__init__(path, hosts)
        self.hosts = hosts

    def replace(self, number: int, host: Host) -> Host:
        """Another host has that place; the one that had it."""
        before = self.hosts[number]
        self.hosts[number] = self.nodes[number] = host
        return before


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    yield made
    made.close()


@pytest.fixture
def cluster(tmp_path: Path, network: Network) -> Iterator[Make]:
    made: list[Job] = []

    def make(*names: str) -> Job:
        made.append(Job(tmp_path, [network.host(name) for name in names]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def restored(job: Cluster) -> list[Any]:
    """Step and sources of every rank; what they got has been compared."""
    answers = job.all("restore")
    assert all(isinstance(answer, list) for answer in answers), answers
    assert len({answer[0] for answer in answers}) == 1, answers
    job.step = answers[0][0]
    return answers


@pytest.mark.parametrize(
    "cycles", [3, pytest.param(50, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]
)
def test_hosts_that_are_lost_are_replaced_from_copies(
    cluster: Make, network: Network, cycles: int, seed: int
) -> None:
    dice = random.Random(seed)
    job = cluster("ant", "bee", "cat")
    settings: dict[str, Any] = {"copies": 1, "every": 1000, "peer_s": 4.0}
    job.start(**settings)
    assert job.all("restore") == [None] * 3
    for cycle in range(cycles):
        kept = job.saved("replicated")
        job.begin()  # which the loss meets somewhere on its way
        lost = dice.randrange(3)
        job.replace(lost, network.host(f"new-{cycle}")).lose()
        job.start(**settings)
        for rank, (step, sources) in enumerate(restored(job)):
            assert step >= kept
            assert sum(sources.values()) == STATE_BYTES
            # What was lost comes from other hosts, which may have given it back by then.
            if rank != lost:
                assert sources.keys() == {"ram"}
            else:
                assert sources.keys() <= {"peers", "ram"}


def received_bytes(host: Host) -> int:
    path = "/sys/class/net/eth0/statistics/rx_bytes"
    return int(host.output("cat", path))


def test_what_a_host_has_itself_does_not_cross_the_network(cluster: Make) -> None:
    """Ranks that crashed; and then agents and ranks of all hosts at once."""
    job = cluster("ant", "bee")
    job.start(every=1000)
    job.all("restore")
    job.saved()
    for lost in ("ranks", "everything"):
        for rank in job.ranks:
            rank.kill()
        if lost == "everything":
            for host in job.hosts:
                host.signal_all(signal.SIGKILL)
        before = [received_bytes(host) for host in job.hosts]
        job.start(every=1000)
        assert restored(job) == [[job.step, {"ram": STATE_BYTES}]] * 2
        for host, bytes_before in zip(job.hosts, before, strict=True):
            assert received_bytes(host) - bytes_before < MESSAGES_BYTES
        job.saved()


def test_agents_listen_where_packets_to_the_meeting_place_leave(cluster: Make) -> None:
    """Without MASTER_ADDR and without a default route, as under ``jax.distributed``."""
    job = cluster("ant", "bee")
    for host in job.hosts:
        del host.environment["MASTER_ADDR"]
    job.start(place=f"{job.hosts[0].address}:4000")
    job.all("restore")
    job.saved()


def test_steps_of_a_host_that_returns_from_an_earlier_start_are_never_newest(
    cluster: Make, network: Network, tmp_path: Path
) -> None:
    """They have higher numbers than the job has come to since, on what all hosts can see."""
    job = cluster("ant", "bee")
    shared = str(tmp_path / "shared")
    job.start(disk=shared, every=4)
    job.all("restore")
    for stage in ("staged", "staged", "staged", "local", "staged", "staged", "staged"):
        job.saved(stage)
    bee = job.replace(1, network.host("dog"))
    bee.signal_all(signal.SIGKILL)
    bee.unplug()
    job.start(disk=shared, every=1, peer_s=4.0)
    assert restored(job)[0][0] == 4
    job.saved("local")
    job.replace(1, bee).lose()  # with steps up to 7 in its memory
    bee.plug()
    job.start(disk=shared, every=1)
    first, second = restored(job)
    assert first == [5, {"ram": STATE_BYTES}]
    assert second == [5, {"disk": STATE_BYTES}]
    job.saved("local")
