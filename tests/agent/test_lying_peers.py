"""Who knows the secret of a run and lies, or takes all the time there is: an error, and in time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import msgspec
import pytest

from mtckpt import _handshake
from mtckpt._handshake import Answerer, Hello, PeerAddress
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.protocol import Done
from mtckpt.errors import AgentUnavailable, CheckpointError, TierError, TierUnavailable
from mtckpt.tiers.peer import PeerTier

RUN = "run"
AGENT = "a" * 16
SECRETS = {RUN: _handshake.new_secret()}


def tier_at(port: int, timeout_s: float) -> PeerTier:
    address = PeerAddress("127.0.0.1", 1, port, agent_id=AGENT, name="there")
    return PeerTier(address, RUN, SECRETS[RUN], timeout_s=timeout_s)


class Liar:
    """A server that proves itself, and then answers every request with the same bytes."""

    def __init__(
        self,
        answer: bytes,
        endless: bytes = b"",
        role: _handshake.Role = "data",
        pause_s: float = 0,
    ) -> None:
        self._answer, self._endless, self._role, self._pause_s = answer, endless, role, pause_s
        self.num_asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Liar:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        answerer = Answerer(AGENT, self._role, SECRETS.get)
        with sock, sock.makefile("rb") as file, contextlib.suppress(OSError):
            while line := file.readline():
                length = 0
                while field := file.readline().strip().lower():
                    if field.startswith(b"content-length:"):
                        length = int(field.split(b":")[1])
                body = file.read(length)
                if b"/v1/hello" in line:
                    said = answerer.welcome(msgspec.json.decode(body, type=Hello))
                    self._send(sock, msgspec.json.encode(said))
                elif b"/v1/prove" in line:
                    self._send(sock, b"{}")
                else:
                    self.num_asked += 1
                    sock.sendall(self._answer)
                    while self._endless:
                        sock.sendall(self._endless)
                        time.sleep(self._pause_s)

    def _send(self, sock: socket.socket, body: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


RANGE = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/10\r\nContent-Length: %d\r\n\r\n%s"


@pytest.mark.parametrize(
    ("answer", "endless"),
    [
        (RANGE % (20, b"x" * 20), b""),  # more than was asked for
        (RANGE.replace(b"0-9", b"5-14") % (10, b"x" * 10), b""),  # from another place
        (b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/10\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + b"x" * 10, b""),
        (b"HTTP/1.1 500 " + b"x" * 70_000 + b"\r\n\r\n", b""),
        (b"HTTP/1.1 500 X\r\n", b"A: b\r\n" * 1000),
        (b"HTTP/1.1 500 X\r\nContent-Length: 999999999999\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n", b"x" * 65536),
        (b"\x00" * 100, b""),
        (b"HTTP/1.1 403 F\r\nContent-Length: 3\r\n\r\nno!", b""),
    ],
    ids=range(10),
)
def test_what_a_liar_answers_to_a_range_is_an_error_of_the_tier(
    answer: bytes, endless: bytes
) -> None:
    with Liar(answer, endless) as liar:
        tier = tier_at(liar.port, timeout_s=2.0)
        out = bytearray(b"." * 12)
        with pytest.raises(TierError) as caught:
            tier.read_into(f"{RUN}/x", memoryview(out)[1:11])
        assert len(str(caught.value)) < 2000
        assert out[0] == out[11] == ord(".")  # nothing beside what was asked for
        tier.close()


@pytest.mark.parametrize(
    ("answer", "drop"),
    [
        (b"HTTP/1.1 206 P\r\nX: ", b"x"),
        (b"HTTP/1.1 206 P\r\n", b"A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (RANGE.replace(b"0-9/10", b"0-999999/9999999") % (1_000_000, b""), b"x"),
        (b"HTTP/1.1 404 N\r\nContent-Length: 3000\r\n\r\n", b"x"),
    ],
    ids=["field", "fields", "continue", "body", "refusal"],
)
def test_what_comes_a_drop_at_a_time_is_not_waited_for(answer: bytes, drop: bytes) -> None:
    """The deadline is one for the whole answer, and not as much again for each drop."""
    with Liar(answer, drop, pause_s=0.05) as liar:
        tier = tier_at(liar.port, timeout_s=0.5)
        with pytest.raises(TierUnavailable, match="did not answer in time"):
            tier.read_into(f"{RUN}/x", memoryview(bytearray(1_000_000)))
        assert liar.num_asked == 1  # nor is whoever was as slow as that asked again
        tier.close()


def test_a_word_that_comes_a_drop_at_a_time_is_not_waited_for() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\nX: "
    with Liar(head, b"x", "control", 0.05) as liar:
        address = PeerAddress("127.0.0.1", liar.port, 1, agent_id=AGENT)
        client = PeerClient(address, RUN, SECRETS[RUN])
        with pytest.raises(AgentUnavailable, match="did not answer in time"):
            client.call("tell", Done(), Done, 0.5)
        client.close()


@pytest.mark.parametrize(
    "objects",
    [
        [("other/x", 1)],
        [("run/../x", 1)],
        [("run/b", 1), ("run/a", 1)],
        [("run/a", 1), ("run/a", 1)],
    ],
)
def test_a_listing_of_what_was_not_asked_for_is_refused(objects: list[tuple[str, int]]) -> None:
    body = msgspec.json.encode({"objects": objects, "more": True})
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with Liar(answer) as liar:
        tier = tier_at(liar.port, timeout_s=2.0)
        with pytest.raises(CheckpointError):
            list(tier.list(f"{RUN}/"))
        tier.close()


def test_a_listing_without_an_end_has_one() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"
    with Liar(head, b" " * 65536) as liar:
        tier = tier_at(liar.port, timeout_s=5.0)
        with pytest.raises(TierUnavailable, match="larger than any can be"):
            list(tier.list(f"{RUN}/"))
        tier.close()
