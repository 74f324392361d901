"""A shard comes from another node's memory into this one's: over sockets, and over bad ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import shard_maker
from tcp_proxy import Kind, TcpProxy

from mtckpt import _handshake, _transfer
from mtckpt._handshake import PeerAddress
from mtckpt._source import Place
from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.peer_server import PeerServer
from mtckpt.errors import CheckpointError, Damaged, TierFull, TierUnavailable
from mtckpt.tiers import LocalTier, Survives

RUN = shard_maker.RUN
AGENT = "a" * 16
SECRET = _handshake.new_secret()
PULLING = work.TierRef("peers", "pull", label="peers")


@pytest.fixture(scope="module")
def server() -> PeerServer:
    """One for all tests: it listens until the process ends."""
    return PeerServer()


class Scene:
    """A shard in the memory of one node, and the empty memory of another."""

    def __init__(self, server: PeerServer, path: Path, size: int = 50) -> None:
        self.shard = shard_maker.make_shard(path, rank=1, world_size=2, size=size)
        self.there, self.here = path / "there", path / "here"
        self.data = shard_maker.put_shard(self.there, self.shard)
        self.here.mkdir(mode=0o700)
        served = work.ServedRun(
            RUN, SECRET.hex(), [work.TierRef("ram", str(self.there), label="ram")]
        )
        self.port = server.serve(work.ServePeers(PULLING, AGENT, "127.0.0.1", 0, [served])).port
        self.carrier = Carrier()
        self.target = work.TierRef("ram", str(self.here), label="ram")

    def pull(self, port: int = 0, secret: bytes = SECRET) -> work.Flushed:
        address = PeerAddress("127.0.0.1", 1, port or self.port, agent_id=AGENT, name="there")
        name = str(self.shard.name)
        command = work.Pull(PULLING, RUN, name, 1, address, secret.hex(), self.target)
        news: list[work.Progress] = []
        done = self.carrier.carry(command, news.append)
        assert isinstance(done, work.Flushed)
        assert news[-1].done_bytes == news[-1].total_bytes or not done.copied_bytes
        return done

    def held(self) -> list[str]:
        """What is in this node's memory, half of things included."""
        return sorted(str(p.relative_to(self.here)) for p in self.here.rglob("*") if p.is_file())

    def is_whole(self) -> bool:
        """Whether all of the shard is here, by its digests and byte for byte."""
        tier = LocalTier(self.here, name="ram", sync=False, survives=Survives.PROCESS)
        place = Place(tier, tier, in_memory=True)
        verified = _transfer.verify_shard(place, RUN, self.shard.name, 1)
        tier.close()
        same = (self.here / self.data.relative_to(self.there)).read_bytes() == self.shard.data
        return not verified.damaged and same


@pytest.fixture
def scene(server: PeerServer, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(server, tmp_path)
    yield made
    made.carrier.close()


def test_a_shard_arrives_whole_and_a_second_pull_sends_no_byte_of_it(scene: Scene) -> None:
    done = scene.pull()
    assert done.copied_bytes > len(scene.shard.data) > 4 * 4 << 20
    assert done.reread_bytes == 0
    assert scene.is_whole()
    assert scene.pull().copied_bytes == 0


@pytest.mark.parametrize("at", [100_000, 6 << 20])
@pytest.mark.parametrize("kind", ["flip", "duplicate", "truncate", "reset"])
def test_what_a_connection_damages_is_asked_for_again(scene: Scene, kind: Kind, at: int) -> None:
    with TcpProxy(("127.0.0.1", scene.port), kind, at) as proxy:
        done = scene.pull(proxy.port)
        assert proxy.hits == 1
    assert scene.is_whole()
    if kind in ("flip", "duplicate"):
        assert 0 < done.reread_bytes <= 2 * (2 << 20)


def test_a_connection_that_damages_everything_leaves_nothing(scene: Scene) -> None:
    with TcpProxy(("127.0.0.1", scene.port), "flip", 2_000_000, times=10_000) as proxy:
        with pytest.raises(Damaged, match="bytes differ from their digest") as caught:
            scene.pull(proxy.port)
        assert proxy.hits > 2
    assert caught.value.details["tier"] == "peers"
    assert scene.held() == []


@pytest.mark.parametrize("at", [10_000_000, (2 << 20) - 10, (2 << 20) + 10, -1])
def test_damage_at_the_source_is_not_copied(scene: Scene, at: int) -> None:
    """Also in a chunk that two requests bring, and in the last one."""
    content = bytearray(scene.shard.data)
    content[at] ^= 1
    shard_maker.write(scene.data, bytes(content))
    with pytest.raises(Damaged, match="bytes differ from their digest"):
        scene.pull()
    assert scene.held() == []


@pytest.mark.parametrize("other", [{"step": 11, "seed": 4}, {"seed": 3}, {"rank": 0}])
def test_another_shard_under_the_right_name_is_refused(
    scene: Scene, tmp_path: Path, other: dict[str, int]
) -> None:
    """Of another step, of other content, of another rank: what a file is called proves nothing."""
    facts = {"rank": 1, "world_size": 2, "size": 50, **other}
    wrong = shard_maker.make_shard(tmp_path / "wrong", **facts)
    shard_maker.write(scene.data, wrong.data)
    with pytest.raises(Damaged):
        scene.pull()
    for suffix, data in (("xxh3", wrong.table), ("json", wrong.record)):
        shard_maker.write(scene.data.with_suffix(f".{suffix}"), data)
    if other != {"seed": 3}:  # the same save's with another content would be that save
        with pytest.raises(Damaged):
            scene.pull()
        assert scene.held() == []


def test_what_is_not_offered_any_more_is_tried_again_later(scene: Scene) -> None:
    shutil.rmtree(scene.there / RUN / str(scene.shard.name))
    with pytest.raises(TierUnavailable, match="does not have what it offers"):
        scene.pull()
    with pytest.raises(CheckpointError):
        scene.pull(secret=_handshake.new_secret())
    with pytest.raises(TierUnavailable):
        scene.pull(port=1)
    assert scene.held() == []


def test_no_room_is_said_before_a_byte_comes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtckpt._room.tier_label", lambda _: "ram")
    monkeypatch.setattr("mtckpt._room.memory_left_bytes", lambda: (1 << 20, "cgroup /job"))
    with pytest.raises(TierFull, match="cgroup /job has no room"):
        scene.pull()
    assert scene.held() == []
