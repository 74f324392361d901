"""What nodes tell each other of their places: ranks are threads, nodes are directories."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import builders
import numpy as np
import pytest

from mtckpt import _coordination, _gathering, _restorer
from mtckpt._delivery import Place
from mtckpt._handshake import PeerAddress
from mtckpt._pieces import Members
from mtckpt._run import Run
from mtckpt._schedule import Disk, ObjectStore
from mtckpt.agent.protocol import Join, NodeOfRun, Others
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import (
    CheckpointError,
    NoHealthyStep,
    RestoreUnavailable,
    TierUnavailable,
)
from mtckpt.testing.groups import local_groups
from mtckpt.tiers import LocalTier

NAMES = "abc"


class Watched(LocalTier):
    """Lists what it is asked for."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(root, name=name, read_only=True)
        self.asked: list[str] = []
        self.silent = False

    def list(self, prefix: str = "") -> Any:
        self.asked.append("list")
        self._answer()
        return super().list(prefix)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        self.asked.append(key)
        self._answer()
        super().read_into(key, out, offset)

    def close(self) -> None:
        """It is looked into again."""

    def _answer(self) -> None:
        if self.silent:
            raise TierUnavailable(f"{self.name} does not answer", tier=self.name)


class Cluster:
    """Nodes with two ranks each, that all run one job; a store is shared."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int) -> None:
        self.root, self.num_nodes = root, num_nodes
        self.over_network: dict[tuple[str, str], Watched] = {}
        monkeypatch.setattr(_gathering, "PeerTier", self._peer)
        self.own: dict[tuple[int, str], Watched] = {}
        self.others: list[Others] = []
        self.timeout_s = 20.0
        self.comes_back = False  # a silent peer, once the nodes meet again
        self.met = threading.Barrier(2 * num_nodes, timeout=20.0)
        for label in ("ram", "disk", "store"):
            for node in range(num_nodes):
                (self.directory(node, label)).mkdir(parents=True, exist_ok=True)
        self.sessions = Join(
            "", "00", 2 * num_nodes,
            [NodeOfRun(PeerAddress("h", 1, 2, name=NAMES[n]), [2 * n, 2 * n + 1])
             for n in range(num_nodes)],
        )  # fmt: skip

    def directory(self, node: int, label: str) -> Path:
        return self.root / (label if label == "store" else f"{NAMES[node]}-{label}")

    def _peer(
        self,
        address: PeerAddress,
        run_key: str,
        secret: bytes,
        *,
        place: str,
        reads: str,
        timeout_s: float,
    ) -> Watched:
        assert (run_key, reads, secret) == ("run", "run", b"\0")
        directory = self.directory(NAMES.index(address.name), place)
        tier = Watched(directory, "peers")
        return self.over_network.setdefault((address.name, place), tier)

    def save(self, step: int, where: Mapping[str, Sequence[int]], world_size: int = 0) -> None:
        """``where`` has the ranks whose shards lie in a place, such as "a-ram"."""
        for place, ranks in where.items():
            for rank in ranks:
                arrays = {"w": np.full(1000, 10.0 * step + rank)}
                builders.build_save(
                    self.root / place, "run", step, arrays, {"rank": rank},
                    rank=rank, world_size=world_size or 2 * self.num_nodes,
                )  # fmt: skip

    def restore(self, **options: Any) -> list[Any]:
        """What each rank got, or the error that it raised."""
        groups = local_groups(2 * self.num_nodes)

        def work(rank: int) -> Any:
            state = {"w": np.zeros(1000), "rank": -1}
            run = cast(Run, _Run(self, groups[rank], rank))
            restored = _restorer.restore(
                run, CpuEngine(), state, options.get("step", "latest"), None, False, None
            )
            if restored:
                assert state["rank"] == rank
                wanted = np.full(1000, 10.0 * cast(int, restored.step) + rank)
                assert np.array_equal(cast(Any, state["w"]), wanted)
            return restored

        with ThreadPoolExecutor(len(groups)) as pool:
            futures = [pool.submit(work, rank) for rank in range(len(groups))]
        return [future.exception() or future.result() for future in futures]


class _Run:
    """As much of a Run as a restore asks for."""

    def __init__(self, cluster: Cluster, group: Any, rank: int) -> None:
        self.name = self.key = "run"
        self.tiers = [Disk("."), ObjectStore("file:///b")]
        self.labels = ["disk", "store"]
        self.timeout_s = cluster.timeout_s
        self.group = group
        self._cluster = cluster
        node = rank // 2
        self.members = Members(rank, 2 * cluster.num_nodes, (2 * node, 2 * node + 1))
        joined = cluster.sessions if cluster.num_nodes > 1 else None
        opened = SimpleNamespace(others=cluster.others)
        self.session = SimpleNamespace(joined=joined, call=self._call, opened=opened)
        self._places = [
            Place(label, self._tier(node, label), mapped=label == "ram", near=label != "store")
            for label in ("ram", "disk", "store")
        ]

    def _tier(self, node: int, label: str) -> Watched:
        tier = Watched(self._cluster.directory(node, label), label)
        return self._cluster.own.setdefault((node, label), tier)

    def _call(self, verb: str, *_: Any) -> None:
        assert verb == "damage"

    def join_nodes(self, nodes: Sequence[str]) -> None:
        assert list(nodes) == [str(rank // 2) for rank in range(self.members.world_size)]
        self._cluster.met.wait()
        for tier in self._cluster.over_network.values():
            tier.silent = tier.silent and not self._cluster.comes_back

    places = lambda self: self._places  # noqa: E731
    note = lambda *_: None  # noqa: E731
    fetch = lambda *_: None  # noqa: E731
    reading_s = lambda *_: 0.0  # noqa: E731
    hurrying = Run.hurrying

    def within(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any:
        return work()

    def exchange(self, stage: str, value: object, *, patient: bool = False) -> list[Any]:
        timeout_s = self.timeout_s * (20 if patient else 1)
        return _coordination.exchange(self.group, stage, value, timeout_s)

    def together(
        self, stage: str, foreign: Callable[[int, str, str], CheckpointError], _: float = 0
    ) -> AbstractContextManager[None]:
        return _coordination.together(self.group, stage, self.timeout_s, foreign)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cluster]:
    return lambda num_nodes: Cluster(tmp_path, monkeypatch, num_nodes)


def test_each_node_reads_its_own_memory_and_looks_once(cluster: Callable[[int], Cluster]) -> None:
    three = cluster(3)
    three.save(1, {"store": range(6)})
    three.save(2, {"a-ram": (0, 1), "b-ram": (2, 3), "c-ram": (4, 5)})
    for restored in three.restore():
        assert restored.step == 2
        assert restored.sources == {"ram": 8000}
        assert not restored.skipped
    assert not three.over_network or not any(t.asked for t in three.over_network.values())
    for (_, label), tier in three.own.items():
        assert tier.asked.count("list") == 1
        assert label != "store" or not any(key.endswith("tensors") for key in tier.asked)


def test_a_node_that_lost_everything_gets_it_from_peers(cluster: Callable[[int], Cluster]) -> None:
    three = cluster(3)
    three.save(1, {"store": range(6)})
    three.save(2, {"a-ram": (0, 1, 2), "c-ram": (4, 5), "a-disk": (2, 3), "store": range(6)})
    found = three.restore()
    assert [each.step for each in found] == [2] * 6
    assert [each.sources for each in found] == [
        {"ram": 8000}, {"ram": 8000}, {"peers": 8000}, {"peers": 8000}, {"ram": 8000}, {"ram": 8000}
    ]  # fmt: skip
    asked = {key: tier.asked for key, tier in three.over_network.items() if tier.asked}
    assert set(asked) == {("a", "ram"), ("a", "disk")}
    # Rank 2 from memory though a disk has it too; rank 3 from where it is.
    assert {key[-21:-12] for key in asked["a", "ram"] if key.endswith("tensors")} == {"ank-00002"}
    assert {key[-21:-12] for key in asked["a", "disk"] if key.endswith("tensors")} == {"ank-00003"}
    for (_, label), tier in three.own.items():
        assert label != "store" or not any(key.endswith("tensors") for key in tier.asked)


def test_what_no_peer_has_is_read_from_the_store(cluster: Callable[[int], Cluster]) -> None:
    two = cluster(2)
    two.save(3, {"a-ram": (0, 1), "b-ram": (2,), "store": range(4)})
    found = two.restore()
    assert [list(each.sources) for each in found] == [["ram"], ["ram"], ["ram"], ["store"]]


def test_all_nodes_go_on_from_the_same_older_step(cluster: Callable[[int], Cluster]) -> None:
    two = cluster(2)
    two.save(1, {"a-ram": (0, 1), "b-ram": (2, 3)})
    two.save(2, {"a-ram": (0, 1), "b-ram": (3,)})
    for restored in two.restore():
        assert restored.step == 1
        assert "records of ranks [2] are missing" in restored.skipped["step 2"]


def test_a_peer_that_falls_silent_is_named(cluster: Callable[[int], Cluster]) -> None:
    two = cluster(2)
    two.save(1, {"a-ram": (0, 1, 2, 3), "store": range(4)})
    _peer_of(two, "a", "ram").silent = True
    found = two.restore()
    assert [list(each.sources) for each in found] == [["ram"], ["ram"], ["store"], ["store"]]
    for each in found[2:]:
        assert each.skipped == {"tier peers-a-ram": "peers does not answer"}


@pytest.mark.parametrize("comes_back", [True, False])
def test_no_older_step_is_taken_because_an_agent_was_being_replaced(
    cluster: Callable[[int], Cluster], comes_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    two = cluster(2)
    two.save(1, {"store": range(4)})
    two.save(2, {"a-ram": range(4)})
    _peer_of(two, "a", "ram").silent, two.comes_back = True, comes_back
    for rank, restored in enumerate(two.restore()):
        assert getattr(restored, "step", restored) == (2 if comes_back else 1)
        where = "" if comes_back else "peers does not answer"
        assert where in restored.skipped.get("step 2", "")
        assert comes_back or rank < 2 or restored.skipped["tier peers-a-ram"] == where
    gave_up = "step 2 is passed over" in caplog.text
    assert gave_up == (not comes_back)


def test_a_tier_that_is_silent_on_another_node_is_no_fresh_start(
    cluster: Callable[[int], Cluster],
) -> None:
    two = cluster(2)
    silent = two.own[1, "disk"] = Watched(two.directory(1, "disk"), "disk")
    silent.silent = True
    for rank, error in enumerate(two.restore()):
        assert isinstance(error, RestoreUnavailable)
        where = "disk" if rank > 1 else "peers-b-disk"
        assert error.details["tiers"] == where
    two.save(1, {"a-ram": (0, 1), "b-ram": (2, 3)})
    for rank, restored in enumerate(two.restore()):
        assert restored.step == 1
        where = "disk" if rank > 1 else "peers-b-disk"
        assert restored.skipped == {f"tier {where}": "disk does not answer"}


def test_damage_on_one_node_takes_all_to_the_older_step(cluster: Callable[[int], Cluster]) -> None:
    two = cluster(2)
    two.save(1, {"a-ram": (0, 1), "b-ram": (2, 3)})
    two.save(2, {"a-ram": (0, 1), "b-ram": (2, 3)})
    (path,) = two.root.glob("b-ram/run/step-000000000002*/rank-00003.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for restored in two.restore():
        assert restored.step == 1
        assert "differ from their digests" in restored.skipped["step 2"]


@pytest.mark.parametrize("was_whole", [True, False])
def test_what_a_lost_node_had_was_a_step_if_it_was_whole_once(
    cluster: Callable[[int], Cluster], was_whole: bool
) -> None:
    two = cluster(2)
    two.save(1, {"b-ram": (2, 3)})
    if was_whole:
        (save,) = two.root.glob("b-ram/run/step-*")
        builders.build_manifest(save)
    for found in two.restore():
        if was_whole:
            assert isinstance(found, NoHealthyStep)
            assert "records of ranks [0, 1] are missing" in str(found)
        else:
            assert not found


def test_a_node_that_the_job_no_longer_has_gives_what_it_has(
    cluster: Callable[[int], Cluster],
) -> None:
    """Four ranks on two nodes, and then two on one of them: the other node is there still."""
    one = cluster(1)
    for label in ("ram", "disk"):
        one.directory(1, label).mkdir()
    for step, where in ((1, {"a-ram": (0, 1), "a-disk": (2, 3)}), (2, {"a-ram": (0, 1)})):
        one.save(step, where, world_size=4)
    one.save(2, {"b-ram": (2, 3)}, world_size=4)
    one.others = [Others([NodeOfRun(PeerAddress("h", 1, 2, name="b"), [2, 3])], "00")]
    assert [each.step for each in one.restore()] == [2, 2]
    assert [each.sources for each in one.restore()] == [{"ram": 8000}] * 2
    # It is not asked while this node has all of the newest step, and may be gone for good.
    _peer_of(one, "b", "ram").silent = True
    for restored in one.restore():
        assert restored.step == 1
        assert "tier peers-b-former1-ram" in restored.skipped
    one.save(3, {"a-ram": range(4)}, world_size=4)
    _peer_of(one, "b", "ram").asked.clear()
    assert [each.skipped for each in one.restore()] == [{}, {}]
    assert not _peer_of(one, "b", "ram").asked


def with_former_nodes(one: Cluster, *names: str) -> None:
    """Step 1 of four ranks is on this node, and on others that the job no longer has, the first of
    them of its last start."""
    one.save(1, {"a-ram": (0, 1), f"{names[-1]}-ram": (2, 3)}, world_size=4)
    for name in names:
        for label in ("ram", "disk"):
            (one.root / f"{name}-{label}").mkdir(exist_ok=True)
        node = NodeOfRun(PeerAddress("h", NAMES.index(name) + 1, 2, name=name), [2, 3])
        one.others.append(Others([node], "00"))


def test_nodes_of_starts_before_the_last_are_asked_too(
    cluster: Callable[[int], Cluster],
) -> None:
    one = cluster(1)
    with_former_nodes(one, "b", "c")
    assert [each.step for each in one.restore()] == [1, 1]


def test_nodes_that_may_be_gone_are_asked_side_by_side(
    cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither answers before the other was asked."""
    one = cluster(1)
    with_former_nodes(one, "b", "c")
    asked = threading.Barrier(2, timeout=20.0)
    first = {name: _peer_of(one, name, "ram") for name in "bc"}

    def answer(tier: Watched) -> None:
        if tier in first.values() and tier.asked == ["list"]:
            asked.wait()

    monkeypatch.setattr(Watched, "_answer", answer)
    assert [each.step for each in one.restore()] == [1, 1]


def test_a_node_that_may_be_gone_is_not_waited_for_longer_than_others_wait(
    cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cluster(1)
    one.timeout_s = 1.0
    with_former_nodes(one, "b", "c")
    dark, over = _peer_of(one, "b", "ram"), threading.Event()

    def answer(tier: Watched) -> None:
        if tier is dark:
            over.wait()

    monkeypatch.setattr(Watched, "_answer", answer)
    try:
        for restored in one.restore():
            assert restored.step == 1
            assert restored.skipped["tier peers-b-former1-ram"] == "did not answer within 1.0 s"
    finally:
        over.set()


def _peer_of(cluster: Cluster, name: str, place: str) -> Watched:
    return cluster._peer(
        PeerAddress("h", 1, 2, name=name), "run", b"\0", place=place, reads="run", timeout_s=1
    )
