"""What is large comes from several nodes side by side: real agents, one of which dies meanwhile."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from node_scene import Cluster, Node
from node_worker import SIZE, state_at

from mtckpt import _inventory, _restore, _striped
from mtckpt._choice import plan_restore
from mtckpt._copies import Scope
from mtckpt._delivery import Attempt, Place
from mtckpt._holdings import holdings_of
from mtckpt._shard import CHUNK_BYTES
from mtckpt.adapters import active_adapters
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.peers import others_kept
from mtckpt.capture.cpu import CpuEngine
from mtckpt.tiers.peer import PeerTier

pytestmark = pytest.mark.timeout(120)
ARRAY_BYTES = 8 * SIZE
MIN_BYTES = 10_000  # headers are shorter


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes with a rank each and one save. Each has captured what both hold alike; of the
    other's own part it has a copy without that."""
    made = Cluster(tmp_path, [Node(tmp_path, name) for name in "ab"])
    made.start(copies=1, every=1000)
    made.save(1, "replicated")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as large, and comes chunk by chunk."""
    monkeypatch.setattr(_striped, "STRIPED_BYTES", 1)
    monkeypatch.setattr(_striped, "PIECE_BYTES", CHUNK_BYTES)


class Watched(PeerTier):
    """Another node's memory. A test is told before and after a range of a shard's data is read."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        is_data = key.endswith(".safetensors") and len(out) > MIN_BYTES
        if is_data:
            self.before()
        super().read_into(key, out, offset)
        if is_data:
            self.after()


@pytest.fixture
def memory(job: Cluster) -> Iterator[dict[str, Watched]]:
    """That of both nodes, by what either keeps of the other."""
    found = {}
    for node, name in zip(job.nodes, "ba", strict=True):
        with AgentClient(str(node.places.runtime / protocol.SOCKET_NAME), 20.0) as client:
            agent_id = client.call("/status", None, protocol.AgentStatus).agent_id
        ram = next(tier.path for tier in node.status().tiers if tier.label == "ram")
        (others, *_) = others_kept(ram, "run", agent_id)
        (other,) = others.nodes
        found[name] = Watched(other.address, "run", bytes.fromhex(others.secret), timeout_s=5.0)
    yield dict(sorted(found.items()))
    for tier in found.values():
        tier.close()


def restored(tiers: Mapping[str, PeerTier], rank: int, attempt: Attempt) -> dict[str, int]:
    """All of a rank's state on a node that has nothing of it; bytes by place."""
    held = {label: _inventory.scan(tier, "run", label=label) for label, tier in tiers.items()}
    (candidate,) = plan_restore([holdings_of(each) for each in held.values()], "latest").candidates
    places = {
        label: Place(label, tier, mapped=False, near=False, streams=2, node=label)
        for label, tier in tiers.items()
    }
    scope = Scope(
        "run", places, {}, active_adapters(), CpuEngine(),
        lambda label, work, size_bytes=0: work(), rank,
    )  # fmt: skip
    live = state_at(0, rank)
    found = _restore.restore_from(
        candidate, scope, live, partial=False, rename=None, attempt=attempt, last=True
    ).sources
    wanted = state_at(1, rank)
    assert np.array_equal(live["own"], wanted["own"])
    assert np.array_equal(live["shared"].value, wanted["shared"].value)
    return found


def test_two_nodes_that_have_the_same_bytes_each_bring_some(memory: dict[str, Watched]) -> None:
    both = threading.Barrier(2)
    for tier in memory.values():
        once = iter([both.wait])  # neither is late by more than its first range
        tier.before = lambda once=once: next(once, lambda _: None)(30)  # type: ignore[misc]
    attempt = Attempt()
    found = restored(memory, 0, attempt)
    assert found.keys() == {"a", "b"}
    assert sum(found.values()) == 2 * ARRAY_BYTES
    assert attempt.rates.keys() == {"a", "b"}
    assert not attempt.bad


def test_a_node_that_is_slow_holds_up_one_range_and_no_more(memory: dict[str, Watched]) -> None:
    """It is not asked for another before the first has come; there are eight in all."""
    enough, came = threading.Event(), itertools.count(1)
    memory["a"].before = lambda: enough.wait(30)  # type: ignore[assignment]
    memory["b"].after = lambda: enough.set() if next(came) == 6 else None
    found = restored(memory, 0, Attempt())
    assert found["a"] <= 2 * CHUNK_BYTES
    assert sum(found.values()) == 2 * ARRAY_BYTES


def test_what_a_node_that_dies_was_to_bring_the_other_brings(
    job: Cluster, memory: dict[str, Watched]
) -> None:
    came, dead, asked = threading.Event(), threading.Event(), itertools.count(1)

    def dies() -> None:
        number = next(asked)
        if number == 2:
            assert came.wait(30)
            job.nodes[1].lose()
            dead.set()
        assert number == 1 or dead.wait(30)

    memory["b"].before, memory["b"].after = dies, came.set
    memory["a"].before = lambda: dead.wait(30)  # type: ignore[assignment]
    attempt = Attempt()
    found = restored(memory, 0, attempt)
    assert 0 < found["b"] <= CHUNK_BYTES
    assert found["a"] == 2 * ARRAY_BYTES - found["b"]
    assert attempt.silent.keys() == {"b"}
    assert not attempt.bad


@pytest.mark.parametrize("striped_bytes", [1, 1 << 40])
def test_damage_on_one_node_is_told_from_what_the_other_brought(
    job: Cluster, memory: dict[str, Watched], monkeypatch: pytest.MonkeyPatch, striped_bytes: int
) -> None:
    """The first that is asked has all of it damaged; the other has it in two shards."""
    monkeypatch.setattr(_striped, "STRIPED_BYTES", striped_bytes)
    (path,) = job.nodes[0].places.ram.glob("*/run/step-*/rank-00000.safetensors")
    size_bytes = path.stat().st_size
    with path.open("r+b") as file:
        for at in range(size_bytes - 5, size_bytes - 2 * ARRAY_BYTES, -10_000):
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
    asked = threading.Event()
    memory["a"].after = asked.set
    memory["b"].before = lambda: asked.wait(30)  # type: ignore[assignment]
    attempt = Attempt()
    assert restored(memory, 0, attempt) == {"b": 2 * ARRAY_BYTES}
    ((label, key, reason),) = attempt.bad
    assert (label, key.rpartition("/")[2]) == ("a", path.name)
    assert "differ from their digests" in reason
