"""Strangers, thieves and liars at the ports for other nodes: refused, bounded, and named."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import shard_maker
import two_nodes
from agent_checks import until
from tcp_proxy import TcpProxy

from mtckpt import _handshake
from mtckpt._handshake import Challenger, Hello, PeerAddress, Proof, Role, Welcome
from mtckpt.agent import peer_server, work
from mtckpt.agent.nodes import Tell
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.peer_server import PeerServer
from mtckpt.agent.protocol import Done
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    CheckpointError,
    TierUnavailable,
)
from mtckpt.tiers import LocalTier, Survives
from mtckpt.tiers.peer import PeerTier

RUN, OTHER = "run", "other"
AGENT = "a" * 16
SECRETS = {RUN: _handshake.new_secret(), OTHER: _handshake.new_secret()}


class Talk:
    """A connection by hand. Answers are (status, body); None once the server has closed it."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.file = self.sock.makefile("rb")

    def send(self, text: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(text)

    def answer(self) -> tuple[int, bytes] | None:
        with contextlib.suppress(ConnectionError):
            if not (line := self.file.readline(1000)):
                return None
            length = 0
            while field := self.file.readline(1000).strip().lower():
                if field.startswith(b"content-length:"):
                    length = int(field.split(b":")[1])
            return int(line.split()[1]), self.file.read(length)
        return None

    def post(self, path: str, message: Any) -> tuple[int, bytes] | None:
        body = msgspec.json.encode(message)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + body)
        return self.answer()

    def get(self, path: str, more: str = "") -> tuple[int, bytes] | None:
        self.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
        return self.answer()

    def prove(
        self, run: str = RUN, role: Role = "data", secret: bytes = b""
    ) -> tuple[Hello, Proof]:
        """As who knows the secret does; what was said."""
        challenger = Challenger(run, role, secret or SECRETS[run], "" if secret else AGENT)
        said = self.post("/v1/hello", challenger.hello())
        assert said is not None
        proof = challenger.check(msgspec.json.decode(said[1], type=Welcome))
        assert self.post("/v1/prove", proof) == (200, b"{}")
        return challenger.hello(), proof

    def is_closed(self) -> bool:
        return self.answer() is None

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class Scene:
    """Two runs served by one process, with a shard each."""

    def __init__(self, path: Path) -> None:
        self.server = PeerServer()
        self.shard = shard_maker.make_shard(path, size=50)
        self.data = shard_maker.put_shard(path / "ram", self.shard)
        self.ref = work.TierRef("ram", str(path / "ram"), label="ram")
        runs = [work.ServedRun(run, secret.hex(), [self.ref]) for run, secret in SECRETS.items()]
        command = work.ServePeers(self.ref, AGENT, "127.0.0.1", 0, runs)
        self.port = self.server.serve(command).port
        self.key = f"{RUN}/{self.shard.name}/{self.data.name}"
        self.object = f"/v1/objects/ram/{self.key}"

    def tier(self, port: int = 0, timeout_s: float = 10.0, secret: bytes = b"") -> PeerTier:
        address = PeerAddress("127.0.0.1", 1, port or self.port, agent_id=AGENT, name="there")
        return PeerTier(address, RUN, secret or SECRETS[RUN], timeout_s=timeout_s)

    def num_connections(self) -> int:
        return len(self.server._connections)

    def is_whole(self) -> bool:
        tier = self.tier()
        out = bytearray(100)
        tier.read_into(self.key, memoryview(out), 5000)
        tier.close()
        return bytes(out) == self.shard.data[5000:5100]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def talk(scene: Scene) -> Iterator[Callable[[], Talk]]:
    made: list[Talk] = []

    def begin() -> Talk:
        made.append(Talk(scene.port))
        return made[-1]

    yield begin
    for each in made:
        each.close()


# -- who does not know the secret ------------------------------------------------------------------


def test_a_wrong_proof_is_refused_and_the_connection_ended(talk: Callable[[], Talk]) -> None:
    stranger = talk()
    hello = Challenger(RUN, "data", _handshake.new_secret()).hello()
    said = stranger.post("/v1/hello", hello)
    assert said is not None
    assert SECRETS[RUN].hex().encode() not in said[1]
    welcome = msgspec.json.decode(said[1], type=Welcome)
    for guess in ("00" * 32, welcome.proof):  # at random, and what the server itself has said
        other = talk()
        said = other.post("/v1/hello", hello)
        assert said is not None
        answer = other.post("/v1/prove", Proof(guess))
        assert answer is not None
        assert answer[0] == 403
        assert "does not know this run's secret" in json.loads(answer[1])["what"]
        assert other.is_closed()


def test_what_was_overheard_is_good_for_nothing(scene: Scene, talk: Callable[[], Talk]) -> None:
    friend = talk()
    hello, proof = friend.prove()
    assert friend.get(f"/v1/stat/ram/{scene.key}") is not None
    # The same words again: on a connection of its own, and on the one that they were said on.
    thief = talk()
    assert thief.post("/v1/hello", hello) is not None
    answer = thief.post("/v1/prove", proof)
    assert answer is not None
    assert answer[0] == 403
    assert thief.is_closed()
    again = friend.post("/v1/prove", proof)
    assert again is not None
    assert again[0] == 403


def test_a_secret_is_good_for_its_own_run_and_port(scene: Scene, talk: Callable[[], Talk]) -> None:
    other = talk()
    other.prove(OTHER)
    answer = other.get(scene.object, "Range: bytes=0-9\r\n")
    assert answer is not None
    assert answer[0] == 403
    assert "of another run" in json.loads(answer[1])["what"]
    # Said for the other port, or by an agent that the client does not mean.
    wrong_role = talk().post("/v1/hello", Challenger(RUN, "control", SECRETS[RUN]).hello())
    assert wrong_role is not None
    assert wrong_role[0] == 403
    tier = scene.tier(secret=SECRETS[OTHER])
    with pytest.raises(AccessDenied, match=r"there \(127.0.0.1\)"):
        tier.stat(scene.key)
    unknown = talk().post("/v1/hello", Challenger("nobody", "data", SECRETS[RUN]).hello())
    assert unknown is not None
    assert unknown[0] == 503


@pytest.mark.parametrize(
    "path",
    ["/v1/list/ram/run/", "/v1/hello2", "/metrics", "/"],
    ids=["list", "other", "metrics", "root"],
)
def test_nothing_is_answered_before_a_proof(talk: Callable[[], Talk], path: str) -> None:
    stranger = talk()
    answer = stranger.get(path)
    assert answer is not None
    assert answer[0] in (400, 403)
    assert stranger.is_closed()


# -- what is too large, or no request --------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"X" * 20_000,
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(50)) + b"\r\n",
        b"POST /v1/hello HTTP/1.1\r\nContent-Length: 99999\r\n\r\n",
        b"POST /v1/hello HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/hello HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/hello HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"POST /v1/hello HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]",
        b"POST /v1/hello HTTP/1.1\r\nContent-Length: 15\r\n\r\n" + b"[" * 15,
    ],
    ids=range(13),
)
def test_what_is_no_request_ends_the_connection(
    scene: Scene, talk: Callable[[], Talk], said: bytes
) -> None:
    stranger = talk()
    stranger.send(said)
    with contextlib.suppress(OSError):  # it may have been ended already
        stranger.sock.shutdown(socket.SHUT_WR)
    answer = stranger.answer()
    assert answer is None or (answer[0] == 400 and len(answer[1]) < 2000)
    assert answer is None or stranger.is_closed()
    assert scene.is_whole()


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/v1/objects/ram/run/../../etc/passwd", "", {400, 403, 404}),
        ("/v1/objects/ram/run/.join.json", "", {400, 404}),
        ("/v1/objects/ram/run//x", "", {400, 404}),
        ("/v1/objects/disk/KEY", "", {404}),
        ("/v1/objects/ram/KEY", "", {400}),  # all of it is more than a range may be
        ("/v1/objects/ram/KEY", "Range: bytes=0-99999999999\r\n", {206, 400}),
        ("/v1/objects/ram/KEY", "Range: bytes=-5\r\n", {400}),
        ("/v1/objects/ram/KEY", "Range: bytes=0-1,5-9\r\n", {400}),
        ("/v1/objects/ram/KEY", "Range: bytes=99999999-999999999\r\n", {416}),
        ("/v1/list/ram/other/", "", {403}),
    ],
)
def test_who_has_proved_is_not_given_more_than_objects_of_the_run(
    scene: Scene, talk: Callable[[], Talk], path: str, more: str, status: set[int]
) -> None:
    scene.server.place(RUN, "ram")
    guest = talk()
    guest.prove()
    answer = guest.get(path.replace("KEY", scene.key), more)
    assert answer is not None
    assert answer[0] in status or (answer[0] == 206 and len(answer[1]) <= len(scene.shard.data))


# -- who takes long --------------------------------------------------------------------------------


def test_a_thousand_idle_connections_keep_nobody_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_server, "PROVE_S", 1.0)
    before = threading.active_count()
    idle = []
    most = 0
    try:
        for number in range(1000):
            idle.append(socket.create_connection(("127.0.0.1", scene.port), timeout=10))
            if number % 100 == 99:
                most = max(most, scene.num_connections(), threading.active_count() - before)
                assert scene.is_whole()  # whoever can prove gets in
        assert most <= peer_server.MAX_CONNECTIONS + 8
        until(lambda: scene.num_connections() == 0)
        until(lambda: threading.active_count() <= before + 1)
    finally:
        for sock in idle:
            sock.close()


def test_a_word_a_letter_at_a_time_is_not_waited_for(
    scene: Scene, talk: Callable[[], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_server, "PROVE_S", 0.5)
    loris = talk()
    until(lambda: scene.num_connections() == 1)
    with contextlib.suppress(OSError):
        for letter in b"POST /v1/hello HTTP/1.1\r\n" * 1000:
            loris.sock.sendall(bytes([letter]))
            time.sleep(0.02)
            if scene.num_connections() == 0:
                break
    until(lambda: scene.num_connections() == 0)


def test_who_asks_and_does_not_listen_gives_the_shard_back(
    scene: Scene, talk: Callable[[], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot must not stay leased for a reader that stands still."""
    monkeypatch.setattr(peer_server, "ANSWER_S", 0.5)
    monkeypatch.setattr(peer_server, "MIN_BYTES_PER_S", 1 << 30)
    guest = talk()
    guest.prove()
    guest.send(f"GET {scene.object} HTTP/1.1\r\nRange: bytes=0-19999999\r\n\r\n".encode())
    tier = LocalTier(Path(scene.ref.path), name="ram", sync=False, survives=Survives.PROCESS)

    def is_leased() -> bool:
        with tier.try_exclusive(scene.key) as fd:
            return fd is None

    until(is_leased)
    until(lambda: not is_leased())
    tier.close()


@pytest.mark.parametrize("at", [50, 3_000_000])
def test_a_peer_that_falls_silent_is_named_in_time(scene: Scene, at: int) -> None:
    """Half open: the connection stands and nothing comes, in the handshake or in the bytes."""
    with TcpProxy(("127.0.0.1", scene.port), "stall", at, times=100) as proxy:
        tier = scene.tier(proxy.port, timeout_s=0.5)
        out = memoryview(bytearray(16 << 20))
        began_s = time.monotonic()
        with pytest.raises(TierUnavailable, match=r"there \(127.0.0.1\): did not answer in time"):
            tier.read_into(scene.key, out)
        assert time.monotonic() - began_s < 30.0
        tier.close()


# -- the port for small messages -------------------------------------------------------------------


def test_who_comes_while_there_is_no_thread_is_refused_and_the_next_is_answered(
    scene: Scene, talk: Callable[[], Talk], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert talk().is_closed()
    until(lambda: scene.num_connections() == 0)
    talk().prove()


def test_the_control_port_is_no_softer(tmp_path: Path) -> None:
    with two_nodes.nodes(2) as pair:
        secret = two_nodes.joined(RUN, *pair)
        address = pair[0].listen()
        hello = Challenger(RUN, "control", _handshake.new_secret()).hello()
        for path, message, status in (
            ("/v1/prove", Proof("00" * 32), 403),
            ("/v1/prove", Proof("00" * 32), 403),
            (f"/v1/runs/{RUN}/tell", Done(), 403),
            (f"/v1/runs/{RUN}/pull", Done(), 403),
        ):
            stranger = Talk(address.control_port)
            assert stranger.post("/v1/hello", hello) is not None
            answer = stranger.post(path, message)
            assert answer is not None
            assert answer[0] == status
            assert stranger.is_closed()
            stranger.close()
        stranger = Talk(address.control_port)
        stranger.send(
            b"POST /v1/hello HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 9999
        )
        answer = stranger.answer()
        assert answer is None or answer[0] >= 400
        stranger.close()
        idle = [
            socket.create_connection((address.host, address.control_port), timeout=10)
            for _ in range(1000)
        ]
        client = PeerClient(address, RUN, secret)
        with pytest.raises(CheckpointError, match="Not Found"):  # and so it has answered
            client.call("no-such-verb", Done(), Done, 10.0)
        client.close()
        for sock in idle:
            sock.close()
        # What one start of the job says is nothing to the next.
        late = Talk(address.control_port)
        late.prove(role="control", secret=secret)
        word = msgspec.json.encode(Tell(1, pair[1].listen()))
        head = f"POST /v1/runs/{RUN}/tell HTTP/1.1\r\nHost: x\r\nContent-Length: {len(word)}"
        late.send(head.encode() + b"\r\n\r\n" + word[:1])
        secret = _handshake.new_secret()
        for node in pair:
            node.join(secret, *(each.listen() for each in pair))
        late.send(word[1:])
        answer = late.answer()
        assert answer is not None
        assert answer[0] == 403
        late.close()
        # What another run's nodes share opens nothing here.
        client = PeerClient(address, "nobody", secret)
        with pytest.raises(AgentUnavailable):
            client.call("tell", Done(), Done, 5.0)
