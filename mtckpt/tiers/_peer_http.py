"""One HTTP connection to another node's agent: proved in both directions before it is used.

Knows deadlines, the handshake and small answers. Does not know what is asked, nor what an error of
it means: OSError and HTTPException are the caller's to name.
"""

from __future__ import annotations

import functools
import http.client
import io
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from mtckpt import _handshake
from mtckpt._handshake import Challenger, PeerAddress, Refusal, Role, Welcome
from mtckpt._peer_tls import Tls, binding_of, client_tls
from mtckpt.errors import AccessDenied, AgentUnavailable, CheckpointError, FormatError

__all__ = ["MIN_BYTES_PER_S", "PeerConnection", "read_small", "refusal_text"]

READ_BYTES = 1 << 16
# What is slower than this is as good as not there.
MIN_BYTES_PER_S = 1024 * 1024


class _Bounded(io.RawIOBase):
    """What arrives at a socket, each piece of it in time; ``limit`` sets how long it may take.

    Without it, each of the pieces of a head or a body could take as long as all of them may.
    """

    def __init__(
        self,
        sock: socket.socket,
        limit: Callable[[socket.socket], None],
        got: Callable[[int], None],
    ) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)  # it keeps the socket open until it is closed
        self._limit = limit
        self._got = got

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._limit(self._sock)
        size_bytes = self._raw.readinto(buffer)
        self._got(size_bytes or 0)
        return size_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


class PeerConnection(http.client.HTTPConnection):
    """A connection for one role and run. Not for two threads at a time.

    Nothing of an answer, its head included, is waited for after ``deadline_s`` (of
    ``time.monotonic``), nor longer than ``silence_s`` after what came before it; and where silence
    has an end, an answer has to come at ``MIN_BYTES_PER_S`` on the whole.
    """

    auto_open = 0  # only ``open`` opens it: what is not proved is not used

    def __init__(self, address: PeerAddress, role: Role, run_key: str, secret: bytes) -> None:
        port = address.control_port if role == "control" else address.data_port
        super().__init__(address.host, port)
        self._begin = functools.partial(Challenger, run_key, role, secret, address.agent_id)
        self.deadline_s = 0.0
        self.silence_s = float("inf")
        self._asked_s = 0.0
        self._got_bytes = 0
        self._answer: http.client.HTTPResponse | None = None
        self.response_class = self._response  # type: ignore[assignment]  # a class, for typing

    def close(self) -> None:
        """Close it, with an answer that was not read to its end. Idempotent."""
        super().close()
        answer, self._answer = self._answer, None
        if answer is not None:  # one without a length has the socket for itself
            answer.close()

    def _response(self, sock: socket.socket, *args: Any, **more: Any) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, *args, **more)
        response.fp.close()
        response.fp = io.BufferedReader(_Bounded(sock, self._limit, self._count))
        return response

    def _count(self, size_bytes: int) -> None:
        self._got_bytes += size_bytes

    def _limit(self, sock: socket.socket) -> None:
        """Let the next blocking call end in time. Raises TimeoutError."""
        now_s = time.monotonic()
        pace_s = self._asked_s + self.silence_s + self._got_bytes / MIN_BYTES_PER_S
        left_s = min(self.deadline_s - now_s, self.silence_s, pace_s - now_s)
        if left_s <= 0:
            raise TimeoutError("the deadline has passed, or it is too slow")
        sock.settimeout(None if left_s == float("inf") else left_s)

    def open(self, deadline_s: float) -> None:
        """Connect, and prove on both sides.

        Raises:
            AccessDenied: the secret differs, the other side refuses this one, or its certificate
                is not to be believed.
            UsageError: certificates were given that cannot be used.
            AgentUnavailable: another agent, or one that has not joined the run.
            OSError, http.client.HTTPException: whatever kept the two apart.
        """
        self.deadline_s = deadline_s
        left_s = min(deadline_s - time.monotonic(), self.silence_s)
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        tls = client_tls()
        self.sock = socket.create_connection((self.host, self.port), timeout=left_s)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            challenger = self._begin(binding="" if tls is None else self._wrap(tls))
            answer = self._say(_handshake.HELLO_PATH, challenger.hello())
            proof = challenger.check(_handshake.decode_small(answer, Welcome))
            self._say(_handshake.PROVE_PATH, proof)
        except BaseException:
            self.close()
            raise

    def _wrap(self, tls: Tls) -> str:
        """Speak TLS from here on; a name for the certificate that the other side has shown."""
        import ssl

        try:
            secure = tls.context.wrap_socket(self.sock)
        except ssl.SSLCertVerificationError as error:
            raise AccessDenied(
                f"its certificate is not to be believed: {error.verify_message}",
                state="nothing was sent",
            ) from error
        self.sock = secure
        return binding_of(secure.getpeercert(binary_form=True))

    def is_stale(self) -> bool:
        """Whether an idle one was closed by the other side, or brings what nobody asked for."""
        if self.sock is None:
            return True
        look = select.poll()
        look.register(self.sock, select.POLLIN)
        return bool(look.poll(0))

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer."""
        self._asked_s, self._got_bytes = time.monotonic(), 0
        if self.sock is not None:
            self._limit(self.sock)
        self.request(method, path, body=body, headers=headers or {})
        self._answer = response = self.getresponse()
        return response

    def _say(self, path: str, message: Any) -> bytes:
        response = self.ask("POST", path, msgspec.json.encode(message))
        data = read_small(self, response, _handshake.MAX_SMALL_BYTES)
        if response.status == 200:
            return data
        what = refusal_text(data)
        if response.status == 403:
            raise AccessDenied(f"the peer refuses this process: {what}", state="nothing was sent")
        refused: CheckpointError = AgentUnavailable(f"the peer is not ready: {what}")
        raise refused


def read_small(
    connection: PeerConnection, response: http.client.HTTPResponse, max_bytes: int
) -> bytes:
    """The whole body. Raises HTTPException above ``max_bytes``, TimeoutError after the deadline."""
    pieces: list[bytes] = []
    left_bytes = max_bytes
    while True:
        piece = response.read1(min(left_bytes + 1, READ_BYTES))
        if not piece:
            break
        left_bytes -= len(piece)
        if left_bytes < 0:
            raise http.client.HTTPException("answer is larger than any can be")
        pieces.append(piece)
    if response.length:  # read1 does not tell an end that comes early
        raise http.client.IncompleteRead(b"", response.length)
    response.close()  # read1 leaves it open, and the connection busy
    return b"".join(pieces)


def refusal_text(data: bytes) -> str:
    """What an answer says that is no success; a line at most."""
    try:
        text = _handshake.decode_small(data, Refusal).what
    except FormatError:
        text = data[:200].decode(errors="replace")
    return " ".join(text.split())[:300]
