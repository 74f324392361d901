"""A node's saves as another node reads them: over sockets, from one agent, proved and verified."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import two_nodes
from agent_checks import kill_agent
from fake_trainer import body_of
from two_nodes import Node

from mtckpt import _handshake, _inventory, _transfer
from mtckpt._source import Place
from mtckpt.agent import protocol
from mtckpt.agent.interfaces import choose_host, fixed_ports
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.peers import others_kept
from mtckpt.agent.protocol import Done
from mtckpt.errors import (
    AccessDenied,
    CheckpointError,
    ObjectNotFound,
    ShortRead,
    TierReadOnly,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers import BytesSource, read_all
from mtckpt.tiers.peer import PeerTier


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Node]]:
    with two_nodes.nodes(2) as made:
        yield made


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run for this test alone, on nodes that several tests share."""
    return str(request.node.name).replace("_", "-")[:40]


def test_a_staged_save_is_listed_read_and_verified_from_another_node(
    pair: list[Node], run: str, tmp_path: Path
) -> None:
    here, there = pair
    secret = two_nodes.joined(run, here, there, disks=tmp_path)
    here.trainer.save(10, ["disk"])
    here.trainer.wait_stage(10, "local")
    address = here.listen()
    for place in ("ram", "disk"):
        tier = PeerTier(address, run, secret, place=place)
        found = _inventory.scan(tier, run)
        assert not found.problems
        (save,) = found.saves.values()
        assert (save.name.step, sorted(save.records), save.complete) == (10, [0], True)
        verified = _transfer.verify_shard(Place(tier, tier), run, save.name, 0, read_data=True)
        assert not verified.damaged
        assert verified.read_bytes > here.trainer.size_bytes
        key = _inventory.shard_keys(run, save.name, 0)[0]
        start = here.trainer.layout.data_start
        out = bytearray(1000)
        tier.read_into(key, memoryview(out), start + 500)
        assert bytes(out) == body_of(10)[500:1500]
        tier.close()
    # What has not been sealed is nobody's: the slots of the trainer are not served.
    tier = PeerTier(address, run, secret)
    assert all(".slots" not in info.key for info in tier.list())
    tier.close()


def test_a_peer_answers_as_any_tier_does(pair: list[Node], run: str) -> None:
    secret = two_nodes.joined(run, *pair)
    pair[0].trainer.save(10)
    with_tier = PeerTier(pair[0].listen(), run, secret)
    (record,) = [info for info in with_tier.list(f"{run}/") if info.key.endswith("00000.json")]
    assert with_tier.stat(record.key) == record
    assert len(read_all(with_tier, record.key, max_bytes=1 << 20)) == record.size_bytes
    with pytest.raises(ShortRead):
        with_tier.read_into(record.key, memoryview(bytearray(10)), record.size_bytes - 5)
    with pytest.raises(ShortRead):
        with_tier.read_into(record.key, memoryview(bytearray(10)), record.size_bytes)
    with pytest.raises(ObjectNotFound):
        with_tier.stat(f"{run}/nothing")
    with pytest.raises(ObjectNotFound):
        with_tier.read_into(f"{run}/nothing", memoryview(bytearray(10)))
    with pytest.raises(AccessDenied):
        with_tier.stat("another/nothing")
    assert list(with_tier.list("another/")) == []
    with pytest.raises(TierReadOnly):
        with_tier.put(f"{run}/x", BytesSource(b"x"))
    with pytest.raises(TierReadOnly):
        with_tier.delete(record.key)
    with_tier.close()


def test_only_who_knows_the_secret_is_answered(pair: list[Node], run: str) -> None:
    two_nodes.joined(run, *pair)
    address = pair[0].listen()
    tier = PeerTier(address, run, _handshake.new_secret())
    with pytest.raises(AccessDenied, match="does not know this run's secret") as caught:
        list(tier.list())
    assert address.host in str(caught.value)
    client = PeerClient(address, run, _handshake.new_secret())
    with pytest.raises(AccessDenied, match="does not know this run's secret"):
        client.call("anything", Done(), Done, 5.0)


def test_no_more_than_a_word_is_read_of_a_stranger(pair: list[Node], run: str) -> None:
    two_nodes.joined(run, *pair)
    address = pair[0].listen()
    # Large for a stranger, small for a peer; larger than it looks; without a size.
    words: list[tuple[dict[str, str], bytes | Iterator[bytes]]] = [
        ({}, b" " * (_handshake.MAX_SMALL_BYTES + 1)),
        ({"Content-Encoding": "gzip"}, b" " * 1000),
        ({}, iter([b"{}"])),
    ]
    for head, body in words:
        connection = http.client.HTTPConnection(address.host, address.control_port, timeout=10)
        connection.request("POST", _handshake.HELLO_PATH, body, head)
        answer = connection.getresponse()
        assert (answer.status, b"not a word of a peer" in answer.read()) == (422, True)
        connection.close()


def test_a_proof_is_good_for_as_long_as_its_secret() -> None:
    secrets = {"run": _handshake.new_secret()}
    client = _handshake.Challenger("run", "control", secrets["run"])
    server = _handshake.Answerer("agent", "control", secrets.get)
    assert not server.still_knows
    assert server.check(client.check(server.welcome(client.hello()))) == "run"
    assert server.still_knows
    secrets["run"] = _handshake.new_secret()  # the job starts anew
    assert not server.still_knows
    del secrets["run"]
    assert not server.still_knows


def test_a_call_reaches_the_other_agent_and_is_typed(pair: list[Node], run: str) -> None:
    secret = two_nodes.joined(run, *pair)
    with_client = PeerClient(pair[0].listen(), run, secret)
    for _ in range(2):  # over one connection
        with pytest.raises(CheckpointError, match="Not Found"):
            with_client.call("no-such-verb", Done(), Done, 5.0)
    with_client.close()


def test_the_secret_is_kept_for_the_next_agent_and_for_nobody_else(
    pair: list[Node], run: str
) -> None:
    secret = two_nodes.joined(run, *pair)
    node = pair[0]
    (kept,) = node.places.ram.glob(f"*/{run}/.join.json")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert secret.hex() in kept.read_text()
    others = [path for path in node.places.ram.rglob("*") if path.is_file() and path != kept]
    assert others
    assert not any(secret.hex().encode() in path.read_bytes() for path in others)
    log = node.places.runtime / protocol.LOG_NAME
    assert secret.hex() not in log.read_text()


def test_nodes_of_earlier_starts_are_known_until_something_is_whole(
    pair: list[Node], run: str
) -> None:
    """The job came back on other nodes, and that start ended before it had saved anything."""
    here, there = pair
    first = two_nodes.joined(run, here, there)
    addresses = [here.listen(), there.listen()]
    # Nobody is there: it was lost as well.
    lost = protocol.PeerAddress(two_nodes.HOST, 9, 9, name="lost")
    second = _handshake.new_secret()
    here.join(second, addresses[0], lost)

    def others() -> list[tuple[str, list[protocol.PeerAddress]]]:
        with here.here():
            opened = here.trainer.open()
        return [(each.secret, [node.address for node in each.nodes]) for each in opened.others]

    known = [(second.hex(), [lost]), (first.hex(), [addresses[1]])]
    assert others() == known
    here.join(second, addresses[0], lost)
    with here.here():
        kill_agent()
    assert others() == known
    here.trainer.begin(2)
    assert others() == known
    here.trainer.next_slot = None
    here.trainer.save(20)
    assert others() == known[:1]
    here.join(_handshake.new_secret(), here.listen(), there.listen())
    assert first.hex() not in [secret for secret, _ in others()]


def test_an_agent_that_was_started_again_does_not_count_as_another_node(
    pair: list[Node], run: str
) -> None:
    two_nodes.joined(run, *pair)
    here, there = pair
    before = here.listen()
    with here.here():
        kill_agent()
        with _taken(before.control_port):
            opened = here.trainer.open()
    address = here.listen()
    assert address.control_port != before.control_port
    (others,) = others_kept(opened.ram_root, run, opened.agent_id)
    assert [node.address for node in others.nodes] == [there.listen()]
    assert opened.others == [others]


@contextlib.contextmanager
def _taken(port: int) -> Iterator[None]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((two_nodes.HOST, port))
        sock.listen()
        yield


def test_ports_that_were_named_are_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        wanted = [a.getsockname()[1], b.getsockname()[1]]
        monkeypatch.setenv("MTCKPT_PEER_PORTS", "{},{}".format(*wanted))
        with two_nodes.nodes(1) as (node,):
            node.train("run")
            with pytest.raises(TierUnavailable, match="MTCKPT_PEER_PORTS"):
                node.listen()
            a.close()
            b.close()
            address = node.listen()
            assert [address.control_port, address.data_port] == wanted


@pytest.mark.parametrize("text", ["7600", "0,7601", "7600,7600", "7600,99999", "a,b", "1,2,3"])
def test_ports_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MTCKPT_PEER_PORTS", text)
    with pytest.raises(UsageError, match="MTCKPT_PEER_PORTS"):
        fixed_ports()


def test_a_data_process_that_died_is_replaced_at_the_same_port(pair: list[Node], run: str) -> None:
    secret = two_nodes.joined(run, *pair)
    node = pair[0]
    node.trainer.save(10)
    address = node.listen()
    with_tier = PeerTier(address, run, secret)
    before = list(with_tier.list())
    os.kill(_listening_pid(address.data_port), signal.SIGKILL)
    node.join(_handshake.new_secret(), address)  # the agent tells the data process what to serve
    node.join(secret, address)
    assert list(with_tier.list()) == before
    with_tier.close()


def _listening_pid(port: int) -> int:
    """The process that listens at a port of this machine."""
    wanted = ""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].partition(":")[2], 16) == port:
            wanted = f"socket:[{fields[9]}]"
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == wanted:
                return int(fd.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody listens at {port}")


def test_a_name_of_the_loopback_is_not_where_other_nodes_find_this_one() -> None:
    assert choose_host("", "127.0.0.1") == choose_host("", "localhost") == "127.0.0.1"
    try:
        elsewhere = choose_host("", "")
    except UsageError:
        elsewhere = "127.0.0.1"  # there is no other way out of here
    assert choose_host("", "127.1") == elsewhere  # what is no address is resolved like a name
