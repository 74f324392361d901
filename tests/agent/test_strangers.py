"""Many who have proved nothing, at the port for small messages: counted, and in nobody's way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from agent_checks import until

from mtckpt import _handshake
from mtckpt._handshake import PeerAddress
from mtckpt.agent import peer_listener
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.peer_listener import PeerListener
from mtckpt.agent.protocol import Done
from mtckpt.agent.strangers import source_of, who_goes
from mtckpt.errors import CheckpointError

RUN, AGENT = "run", "a" * 16
SECRET = _handshake.new_secret()


@dataclass(frozen=True)
class Someone:
    source: str
    since_s: float


# -- who goes --------------------------------------------------------------------------------------


def test_nobody_goes_while_there_is_room() -> None:
    crowd = [Someone("a", 1.0), Someone("b", 2.0)]
    assert who_goes(crowd, "a", 3, 2) is None
    assert who_goes([], "a", 3, 2) is None


def test_the_oldest_of_the_largest_crowd_goes_whoever_comes() -> None:
    crowd = [Someone("quiet", 1.0), Someone("loud", 3.0), Someone("loud", 2.0)]
    assert who_goes(crowd, "third", 3, 3) == Someone("loud", 2.0)
    assert who_goes(crowd, "loud", 9, 2) == Someone("loud", 2.0)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("what", "ever", False),
    ],
)
def test_a_place_is_an_address_or_the_network_of_a_host(one: str, other: str, alike: bool) -> None:
    assert (source_of(one) == source_of(other)) is alike


# -- at the port -----------------------------------------------------------------------------------


class Listening:
    """A listener for one run, whose loop runs in a thread."""

    def __init__(self) -> None:
        async def make() -> PeerListener:
            return PeerListener(AGENT, {}, {RUN: SECRET}.get, {})

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self.listener = asyncio.run_coroutine_threadsafe(make(), self._loop).result(10)
        asyncio.run_coroutine_threadsafe(self.listener.start(self.sock), self._loop).result(10)
        self._talks: list[socket.socket] = []

    def close(self) -> None:
        for sock in self._talks:
            sock.close()
        asyncio.run_coroutine_threadsafe(self.listener.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        """From another address of this machine."""
        sock = socket.create_connection(("127.0.0.1", self.port), 10, (host, 0))
        self._talks.append(sock)
        return sock

    def num_strangers(self) -> int:
        return sum(guest.is_stranger for guest in list(self.listener._guests.values()))

    def gets_in(self) -> bool:
        """Whether somebody who knows the secret is answered."""
        client = PeerClient(PeerAddress("127.0.0.1", self.port, 1, agent_id=AGENT), RUN, SECRET)
        try:
            with pytest.raises(CheckpointError, match="Not Found"):  # and so it has answered
                client.call("no-such-verb", Done(), Done, 10.0)
        finally:
            client.close()
        return True


@pytest.fixture
def listening() -> Iterator[Listening]:
    made = Listening()
    yield made
    made.close()


def is_ended(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        return sock.recv(1) == b""
    return True


def test_strangers_of_one_place_hold_no_more_than_their_share(listening: Listening) -> None:
    most = peer_listener.MAX_STRANGERS_OF_ONE
    crowd = [listening.connect() for _ in range(most + 40)]
    assert all(map(is_ended, crowd[:40]))  # at once, for those that came later
    until(lambda: listening.num_strangers() == most)
    assert listening.gets_in()


def test_who_knows_the_secret_gets_in_past_all_strangers_there_may_be(listening: Listening) -> None:
    most, of_one = peer_listener.MAX_STRANGERS, peer_listener.MAX_STRANGERS_OF_ONE
    slow = listening.connect()  # somebody from elsewhere, whose next word takes its time
    for number in range(most):
        listening.connect(f"127.0.1.{1 + number // of_one}")
    until(lambda: listening.num_strangers() == most)
    assert listening.gets_in()
    for _ in range(most):
        listening.connect("127.0.1.1")
    until(lambda: listening.num_strangers() <= most)
    slow.sendall(b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert slow.recv(12) == b"HTTP/1.1 422"
    assert listening.gets_in()


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("node.example")
    for name, blobs in (
        ("CERT", issued.cert_chain_pems),
        ("KEY", [issued.private_key_pem]),
        ("CA", [authority.cert_pem]),
    ):
        path = tmp_path / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        monkeypatch.setenv(f"MTCKPT_PEER_TLS_{name}", str(path))


@pytest.mark.usefixtures("tls")
def test_who_has_not_spoken_tls_yet_is_counted(listening: Listening) -> None:
    most = peer_listener.MAX_STRANGERS_OF_ONE
    crowd = [listening.connect() for _ in range(most + 10)]
    assert all(map(is_ended, crowd[:10]))
    until(lambda: listening.num_strangers() == most)
    assert listening.gets_in()


@pytest.mark.usefixtures("tls")
def test_half_a_handshake_of_tls_is_not_waited_for(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "PROVE_S", 0.3)
    half = listening.connect()
    half.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert is_ended(half)
    until(lambda: listening.num_strangers() == 0)


@pytest.mark.parametrize(
    "said",
    [
        b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n",
        b"POST /v1/runs/run/tell HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n",
        b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nX: ",
    ],
    ids=["word", "message", "head"],
)
def test_a_letter_at_a_time_is_not_waited_for(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(peer_listener, "PROVE_S", 0.3)
    loris = listening.connect()
    loris.sendall(said)
    began_s = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began_s < 8.0 and listening.num_strangers():
            loris.sendall(b"x")
            time.sleep(0.02)
    assert listening.num_strangers() == 0


def test_who_does_not_take_its_answers_is_ended(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing it would wait until it has taken them."""
    monkeypatch.setattr("mtckpt.agent.serving.IDLE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(peer_listener, "PROVE_S", 60.0)
    deaf = listening.connect()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.settimeout(0.2)
    ask = b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    monkeypatch.setattr(listening.listener, "is_trusted", lambda _: True)
    with contextlib.suppress(OSError):
        while True:
            deaf.sendall(ask * 10)
    until(lambda: _tidied(listening) == 0)


def _tidied(listening: Listening) -> int:
    done = threading.Event()

    def tidy() -> None:
        listening.listener.close_idle()
        done.set()

    listening._loop.call_soon_threadsafe(tidy)
    done.wait(10)
    return len(listening.listener._guests)
