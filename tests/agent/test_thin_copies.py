"""Copies that leave out what their holder has captured too: over sockets, read by everybody."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from boxed import Boxed, boxed_arrays
from shard_maker import flip
from tcp_proxy import TcpProxy

import mtckpt
from mtckpt import _delivery, _handshake, _inventory, _restore, _transfer
from mtckpt._boxes import whole
from mtckpt._choice import plan_restore
from mtckpt._handshake import PeerAddress
from mtckpt._holdings import holdings_of
from mtckpt._manifest import SaveName
from mtckpt._restore import Attempt, Scope
from mtckpt._source import Place
from mtckpt.adapters import active_adapters
from mtckpt.agent import receiving, work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.findings import SaveScan
from mtckpt.agent.peer_server import PeerServer
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import Damaged, NoHealthyStep, TierUnavailable
from mtckpt.tiers import LocalTier, Survives

AGENT = "a" * 16
SECRET = _handshake.new_secret()
PULLING = work.TierRef("peers", "pull", label="peers")
SHAPE = (700, 1000)
SHARED = np.random.default_rng(5).standard_normal(SHAPE)
MORE = np.random.default_rng(6).standard_normal((300, 1000))
HALF = SHAPE[0] // 2
Arrays = dict[str, np.ndarray[Any, Any]]


def own(rank: int) -> np.ndarray[Any, Any]:
    return np.full(5000, float(rank))


@pytest.fixture(scope="module")
def server() -> PeerServer:
    return PeerServer()


class Scene:
    """Two nodes with two ranks each, which hold two arrays alike: one is cut, one is of one rank.

    Node "there" has ranks 0 and 1, node "here" ranks 2 and 3.
    """

    def __init__(self, server: PeerServer, path: Path) -> None:
        self.roots = {"there": path / "there", "here": path / "here"}
        for rank in range(4):
            save = self.write(rank, {"shared": SHARED, "more": MORE, "own": own(rank)})
        name = SaveName.parse(save.name)
        assert name is not None
        self.name = name
        self.carrier = Carrier()
        served = [
            work.ServedRun("run", SECRET.hex(), [work.TierRef("ram", str(root), label="ram")])
            for root in (self.roots["there"],)
        ]
        self.port = server.serve(work.ServePeers(PULLING, AGENT, "127.0.0.1", 0, served)).port

    def write(self, rank: int, arrays: Arrays) -> Path:
        """What a rank has captured: its half of ``shared``, ``more`` if it is even."""
        first = 0 if rank % 2 == 0 else HALF
        stored = {
            "shared": arrays["shared"][first : first + HALF],
            "more": arrays["more"] if rank % 2 == 0 else arrays["more"][:0],
            "own": arrays["own"],
        }
        boxes = {"shared": ((first, 0), SHAPE), "more": ((0, 0), MORE.shape)}
        root = self.roots["there" if rank < 2 else "here"]
        root.mkdir(mode=0o700, exist_ok=True)
        return builders.build_save(
            root, "run", 10, stored, {"step": 10}, boxes=boxes, rank=rank, world_size=4, alike="ab"
        )

    def pull(self, rank: int, *beside: int, port: int = 0, mends: bool = False) -> work.Flushed:
        address = PeerAddress("127.0.0.1", 1, port or self.port, agent_id=AGENT, name="there")
        target = work.TierRef("ram", str(self.roots["here"]), label="ram")
        command = work.Pull(
            PULLING, "run", str(self.name), rank, address, SECRET.hex(), target, [*beside], mends
        )
        done = self.carrier.carry(command, lambda _: None)
        assert isinstance(done, work.Flushed)
        return done

    def file(self, node: str, rank: int) -> Path:
        return self.roots[node] / "run" / str(self.name) / f"rank-{rank:05d}.safetensors"

    def damaged(self, rank: int) -> dict[str, str]:
        """What is wrong with a shard here."""
        tier = LocalTier(self.roots["here"], name="ram", sync=False, survives=Survives.PROCESS)
        place = Place(tier, tier, in_memory=True)
        return _transfer.verify_shard(place, "run", self.name, rank).damaged


@pytest.fixture
def scene(server: PeerServer, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(server, tmp_path)
    with boxed_arrays():
        yield made
    made.carrier.close()


def test_what_was_captured_here_too_neither_comes_nor_is_stored(scene: Scene) -> None:
    half_bytes = HALF * 8000
    with TcpProxy(("127.0.0.1", scene.port), "flip", 1 << 40) as proxy:
        for rank, left_out in ((0, half_bytes + MORE.nbytes), (1, half_bytes)):
            done = scene.pull(rank, 2, 3, port=proxy.port)
            assert done.reused_bytes == left_out
            assert done.copied_bytes < 60_000  # its own array, a header, a table, a record
            assert scene.damaged(rank) == {}
            assert scene.pull(rank, 2, 3).copied_bytes == 0
        assert proxy.sent_bytes < 150_000


def restored(roots: dict[str, Path], rank: int) -> dict[str, int]:
    """All of the state, as a rank has it, from places by label; bytes by place."""
    tiers = {label: LocalTier(root, read_only=True) for label, root in roots.items()}
    held = {label: _inventory.scan(tier, "run", label=label) for label, tier in tiers.items()}
    (candidate,) = plan_restore([holdings_of(each) for each in held.values()], "latest").candidates
    near = ["ram"]
    scope = Scope(
        "run",
        {
            label: _delivery.Place(label, tier, mapped=label == "ram", near=label in near)
            for label, tier in tiers.items()
        },
        {label: held[label] for label in near},
        active_adapters(),
        CpuEngine(),
        lambda label, work, size_bytes=0: work(),
        rank,
    )
    live: dict[str, Any] = {
        "shared": Boxed(SHAPE, float, [whole(SHAPE)]),
        "more": Boxed(MORE.shape, float, [whole(MORE.shape)]),
        "own": np.zeros(5000),
        "step": 0,
    }
    found = _restore.restore_from(
        candidate, scope, live, partial=False, rename=None, attempt=Attempt(), last=True
    ).sources
    for tier in tiers.values():
        tier.close()
    assert live["shared"].equals(SHARED)
    assert live["more"].equals(MORE)
    assert np.array_equal(live["own"], own(rank))
    return found


def test_a_node_has_all_of_a_save_with_thin_copies_of_the_rest(scene: Scene) -> None:
    for rank in (0, 1):
        scene.pull(rank, 2, 3)
    here = scene.roots["here"]
    for rank in range(4):
        assert restored({"ram": here}, rank).keys() == {"ram"}
    loaded = mtckpt.load(here / "run")
    assert np.array_equal(loaded["shared"], SHARED)
    tier = LocalTier(here, read_only=True)
    (save,) = _inventory.scan(tier, "run").saves.values()
    assert save.complete
    assert save.size_bytes < 2 * SHARED.nbytes + MORE.nbytes
    scanned = scene.carrier.carry(
        work.Scan(work.TierRef("ram", str(here), label="ram"), "run", repair=False), lambda _: None
    )
    assert isinstance(scanned, work.Scanned)
    (found,) = scanned.runs[0].saves
    assert isinstance(found, SaveScan)
    assert found.thin == [0, 1]  # they are no slots of ranks of this node, whoever forgot that


def test_a_replica_that_differs_is_no_copy(scene: Scene) -> None:
    other = SHARED.copy()
    other[HALF + 3, 7] += 1
    scene.write(3, {"shared": other, "more": MORE, "own": own(3)})
    assert scene.pull(0, 2, 3).reused_bytes == HALF * 8000 + MORE.nbytes
    done = scene.pull(1, 2, 3)
    assert done.reused_bytes == 0
    assert done.copied_bytes > HALF * 8000
    assert scene.file("here", 1).read_bytes() == scene.file("there", 1).read_bytes()


def test_what_is_not_captured_here_any_more_comes_with_the_next_offer(scene: Scene) -> None:
    scene.pull(0, 2, 3)
    assert scene.pull(0).copied_bytes > HALF * 8000 + MORE.nbytes
    assert scene.file("here", 0).read_bytes() == scene.file("there", 0).read_bytes()


class Crowded(dict[Any, Any]):
    """Whoever looks for the oldest waits a moment for somebody else who does."""

    def __init__(self, count: int) -> None:
        super().__init__((number, {}) for number in range(count))
        self._both = threading.Barrier(2)

    def __iter__(self) -> Iterator[Any]:
        found = list(super().__iter__())
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both.wait(0.5)
        return iter(found)


def test_two_copies_at_once_do_not_let_go_of_the_same_save(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "_CAPTURED", Crowded(receiving._MAX_CAPTURED))
    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(scene.pull, rank, beside) for rank, beside in ((0, 2), (1, 3))]
        assert all(each.result().copied_bytes for each in done)
    assert len(receiving._CAPTURED) == receiving._MAX_CAPTURED


@pytest.mark.parametrize("at", [-5, 4096 + 5])
def test_a_shard_is_mended_from_a_thin_copy_and_what_is_beside(scene: Scene, at: int) -> None:
    """Here lies what rank 2 captured; over there a copy that leaves out what ranks 0 and 1 have."""
    path = scene.file("here", 2)
    whole_one = path.read_bytes()
    thin_root = scene.roots["there"]
    for rank in (2, 3):
        _thin_into(scene, thin_root, rank)
    assert scene.file("there", 2).stat().st_size < 60_000
    flip(path, at % len(whole_one))
    assert scene.damaged(2)
    assert scene.pull(2, mends=True).rewritten
    assert path.read_bytes() == whole_one
    # One that was made whole over there is taken as it is.
    flip(path, at % len(whole_one))
    flip(scene.file("there", 0), scene.file("there", 0).stat().st_size - 5)
    flip(scene.file("there", 0), 4096 + 5)
    with pytest.raises(Damaged):
        scene.pull(2, mends=True)


@pytest.mark.parametrize("suffix", ["json", "xxh3"])
def test_what_is_damaged_here_is_not_said_of_the_copy(scene: Scene, suffix: str) -> None:
    """A thin copy mends nothing without the record and the table that are here."""
    for rank in (2, 3):
        _thin_into(scene, scene.roots["there"], rank)
    path = scene.file("here", 2).with_suffix(f".{suffix}")
    flip(path, path.stat().st_size // 2)
    before = scene.file("here", 2).read_bytes()
    with pytest.raises(TierUnavailable, match="leaves out what the damaged files here"):
        scene.pull(2, mends=True)
    assert scene.file("here", 2).read_bytes() == before
    path.unlink()
    with pytest.raises(TierUnavailable, match="leaves out what the damaged files here"):
        scene.pull(2, mends=True)


def _thin_into(scene: Scene, root: Path, rank: int) -> None:
    """The other node's copy of a rank of this one, as it makes it."""
    from mtckpt import _thinning
    from mtckpt._source import ArrivingSource, open_shard
    from mtckpt.agent.receiving import _captured

    here = LocalTier(scene.roots["here"], name="ram", sync=False, survives=Survives.PROCESS)
    there = LocalTier(root, name="ram", sync=False, survives=Survives.PROCESS)
    source, target = Place(here, here, is_peer=True), Place(there, there, in_memory=True)
    command = work.Pull(
        PULLING, "run", str(scene.name), rank, PeerAddress("", 0, 0), "",
        work.TierRef("ram", str(root)), [0, 1],
    )  # fmt: skip
    with open_shard(source, "run", scene.name, rank) as shard:
        assert isinstance(shard.data, ArrivingSource)
        thin = _thinning.thinned(shard, _captured(command, target, scene.name))
        _transfer.store_shard(thin, target, "run", scene.name, rank)


@pytest.fixture(params=[0, 1 << 30], ids=["checked while placed", "staged"])
def cheap_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", request.param)


@pytest.mark.usefixtures("cheap_bytes")
def test_what_is_damaged_in_memory_comes_from_whoever_has_the_same_bytes(scene: Scene) -> None:
    """A rank's own array from its thin copy, what it shares from what others have captured."""
    for rank in (0, 1):
        scene.pull(rank, 2, 3)
    roots = {"ram": scene.roots["there"], "peers-b": scene.roots["here"]}
    assert restored(roots, 0).keys() == {"ram"}
    path = scene.file("there", 0)
    header_bytes = path.stat().st_size - HALF * 8000 - MORE.nbytes - 40_000
    for at in (header_bytes + 5, header_bytes + MORE.nbytes + 5, path.stat().st_size - 5):
        flip(path, at)  # more, own and shared, in the order of the file
    found = restored(roots, 0)
    assert found["peers-b"] == HALF * 8000 + MORE.nbytes + 40_000
    flip(scene.file("here", 2), scene.file("here", 2).stat().st_size - 5)
    with pytest.raises(NoHealthyStep):
        restored(roots, 0)


def test_what_others_have_of_the_same_name_is_not_taken_for_it(scene: Scene) -> None:
    """A replica that differs: what it has is sound, and not what this rank had."""
    other = SHARED.copy()
    other[3, 7] += 1
    for rank in (2, 3):
        scene.write(rank, {"shared": other, "more": MORE, "own": own(rank)})
    roots = {"ram": scene.roots["there"], "peers-b": scene.roots["here"]}
    assert restored(roots, 0).keys() == {"ram"}
    path = scene.file("there", 0)
    flip(path, path.stat().st_size - 5)
    with pytest.raises(NoHealthyStep, match="ram: 1 tensors differ"):
        restored(roots, 0)


@pytest.mark.usefixtures("cheap_bytes")
def test_ranks_of_one_place_stand_in_for_each_other(scene: Scene) -> None:
    for rank in (0, 1):
        scene.pull(rank)
    path = scene.file("here", 0)
    flip(path, path.stat().st_size - 5)
    assert restored({"ram": scene.roots["here"]}, 0).keys() == {"ram"}


def test_a_shard_that_leaves_nothing_out_is_found_behind_those_that_do(
    scene: Scene, tmp_path: Path
) -> None:
    """Both nodes let go of what they had captured, and kept each other's thin copies."""
    for root in scene.roots.values():
        shutil.copytree(root, tmp_path / "store", dirs_exist_ok=True)
    for rank in (0, 1):
        scene.pull(rank, 2, 3)
    for rank in (2, 3):
        _thin_into(scene, scene.roots["there"], rank)
    for node, ranks in (("there", (0, 1)), ("here", (2, 3))):
        for rank in ranks:
            for path in scene.file(node, rank).parent.glob(f"rank-{rank:05d}.*"):
                path.unlink()
    nodes = {"ram": scene.roots["here"], "peers-b": scene.roots["there"]}
    for rank in range(4):
        found = restored({**nodes, "store": tmp_path / "store"}, rank)
        assert found["store"] == SHARED.nbytes + MORE.nbytes
        with pytest.raises(NoHealthyStep, match="no shard has"):
            restored(nodes, rank)
