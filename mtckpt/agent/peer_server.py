"""What a data process serves to other nodes: sealed objects of runs whose secret the reader knows.

Knows sockets, threads and limits, a small part of HTTP/1.1, and places by their labels. Payload
goes from the page cache to the socket (sendfile), under a lease, so that a slot which is used again
meanwhile never shows a reader another step's bytes. Does not decide what is served: the control
process says it, whole, each time. Nothing that a peer sends becomes a path: places are looked up in
a table, keys are checked and opened below a root.

A thread a connection: a disk that hangs holds up those who read it and nobody else. Every wait has
an end: ``_Watch`` shuts down whatever stands still for too long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from mtckpt import _handshake
from mtckpt._handshake import Answerer, Hello, Proof
from mtckpt._peer_tls import Tls, server_tls
from mtckpt.agent import peer_requests, work
from mtckpt.agent.peer_requests import MAX_HEAD_BYTES, Head
from mtckpt.agent.protocol import error_to_wire
from mtckpt.agent.strangers import source_of, who_goes
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    CheckpointError,
    FormatError,
    ObjectNotFound,
    ShortRead,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers._peer_http import MIN_BYTES_PER_S
from mtckpt.tiers.base import check_key
from mtckpt.tiers.local import LocalTier
from mtckpt.tiers.peer import MAX_LISTED, MAX_RANGE_BYTES, Listing, Stat

__all__ = ["PeerServer"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
# Of those, such as have not proved anything yet; and those from one place.
MAX_STRANGERS = 64
MAX_STRANGERS_OF_ONE = 32
# Requests that one place answers at a time; one that hangs takes no more threads than these.
MAX_PER_PLACE = 32
PROVE_S = 5.0
HEAD_S = 5.0
IDLE_S = 60.0
ANSWER_S = 10.0
_WATCH_S = 0.5
ROOM_S = 1.0
TLS_PIECE_BYTES = 256 * 1024
BACKLOG = 128
_STATUS = {
    ObjectNotFound: (404, "Not Found"),
    ShortRead: (416, "Range Not Satisfiable"),
    AccessDenied: (403, "Forbidden"),
    FormatError: (400, "Bad Request"),
    UsageError: (400, "Bad Request"),
    AgentUnavailable: (503, "Service Unavailable"),
    TierUnavailable: (503, "Service Unavailable"),
}


class PeerServer:
    """One listener and its connections; nothing until ``serve`` is called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._connections: dict[int, _Connection] = {}
        self._places: dict[work.TierRef, _Place] = {}
        self._runs: dict[str, work.ServedRun] = {}
        self.agent_id = ""

    def serve(self, command: work.ServePeers) -> work.Serving:
        """Listen, if nothing does yet, and serve exactly these runs from now on.

        The port is kept once there is one; another process's, if that is what is asked for, is
        taken over where it is free. TierUnavailable: no port at that address. UsageError:
        certificates that cannot be used.
        """
        server_tls()
        with self._lock:
            self.agent_id = command.agent_id
            self._runs = {run.run_key: run for run in command.runs}
            if self._listener is None:
                self._listener = _listen(command.host, command.port)
                for target in (self._accept, self._watch):
                    name = f"peers-{target.__name__}"
                    threading.Thread(target=target, name=name, daemon=True).start()
            port = self._listener.getsockname()[1]
            gone = [one for one in self._connections.values() if not self._still_serves(one)]
            refs = {ref for run in command.runs for ref in run.places}
            unused = [self._places.pop(ref) for ref in self._places.keys() - refs]
        for connection in gone:
            connection.end("its run is not served any more")
        for place in unused:
            place.close()
        return work.Serving(port)

    def secret_of(self, run_key: str) -> bytes | None:
        """What a peer has to know to read this run; None for one that is not served."""
        run = self._runs.get(run_key)
        return None if run is None else bytes.fromhex(run.secret)

    def lets_read(self, run_key: str, key: str) -> bool:
        """Whether who is of a run may read a key, or list what begins like it."""
        run = self._runs.get(run_key)
        return run is not None and any(key.startswith(f"{each}/") for each in (run_key, *run.lent))

    def place(self, run_key: str, label: str) -> _Place:
        """A place of a run. Raises ObjectNotFound: the table is all there is."""
        run = self._runs.get(run_key)
        ref = next((ref for ref in run.places if ref.label == label), None) if run else None
        if ref is None:
            raise ObjectNotFound(f"no place {label[:40]!r} is served here")
        with self._lock:
            return self._places.setdefault(ref, _Place(ref))

    def _still_serves(self, connection: _Connection) -> bool:
        key = connection.run_key
        return not key or (key in self._runs and connection.secret == self.secret_of(key))

    # -- connections -----------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                # No descriptor left, or a connection that ended in the backlog.
                logger.warning("no connection was accepted: %s", error)
                time.sleep(_WATCH_S)
                continue
            try:
                tls = server_tls()  # they may have been renewed
            except UsageError as error:
                logger.warning("refused a connection of %s: %s", peer[0], error.what)
                sock.close()
                continue
            if not self._wait_for_room():
                logger.warning("refused a connection of %s: %d are open", peer[0], MAX_CONNECTIONS)
                sock.close()
                continue
            connection = _Connection(self, sock, str(peer[0]), tls)
            with self._lock:
                strangers = [c for c in self._connections.values() if c.is_stranger]
                self._connections[id(connection)] = connection
            last = who_goes(strangers, connection.source, MAX_STRANGERS, MAX_STRANGERS_OF_ONE)
            if last is not None:
                last.end("others want to prove themselves")
            try:
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()
            except RuntimeError as error:  # no thread to be had: others are still to be answered
                logger.warning("refused a connection of %s: %s", peer[0], error)
                sock.close()
                with self._lock:
                    del self._connections[id(connection)]

    def _wait_for_room(self) -> bool:
        """False if it stays full. Connections that were ended take a moment to go."""
        until_s = time.monotonic() + ROOM_S
        while len(self._connections) >= MAX_CONNECTIONS:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.005)
        return True

    def _run(self, connection: _Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[id(connection)]

    def _watch(self) -> None:
        pause = threading.Event()  # nobody ends it but the end of the process
        while not pause.wait(_WATCH_S):
            now_s = time.monotonic()
            with self._lock:
                late = [c for c in self._connections.values() if c.deadline_s < now_s]
            for connection in late:
                connection.end("it was too slow")


class _Place:
    """A directory that is served; opened by whoever needs it first."""

    def __init__(self, ref: work.TierRef) -> None:
        self.ref = ref
        self._opened: LocalTier | None = None
        self._room = threading.BoundedSemaphore(MAX_PER_PLACE)

    def close(self) -> None:
        """Give its directory up, once nobody uses it any more. It opens again when asked."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    @contextlib.contextmanager
    def using(self) -> Iterator[LocalTier]:
        """The tier, for one of not too many requests at a time. Raises TierUnavailable."""
        if not self._room.acquire(timeout=ANSWER_S / 2):
            raise TierUnavailable(f"{self.ref.label} is busy", tier=self.ref.label)
        try:
            if self._opened is None:
                # Not under a lock: opening a disk may take for ever. Twice does no harm.
                self._opened = LocalTier(
                    self.ref.path,
                    name=self.ref.label,
                    sync=False,
                    group_access=self.ref.group_access,
                )
            yield self._opened
        except TierUnavailable:
            self._opened = None  # mounted anew, perhaps: the next request opens what is there then
            raise
        finally:
            self._room.release()


class _Connection:
    """One connection, from its proof to its end."""

    def __init__(self, server: PeerServer, sock: socket.socket, peer: str, tls: Tls | None) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self.source = source_of(peer)
        self.since_s = time.monotonic()
        self._is_ended = False
        self._buffer = bytearray()
        self._tls = tls
        binding = tls.binding if tls else ""
        self._answerer = Answerer(server.agent_id, "data", server.secret_of, binding)
        self.secret: bytes | None = None
        self.deadline_s = time.monotonic() + PROVE_S

    @property
    def run_key(self) -> str:
        """The run whose secret the other end has proved to know; empty before."""
        return self._answerer.run_key

    @property
    def is_stranger(self) -> bool:
        """Whether it is there and has not proved that it knows a run's secret."""
        return not self._is_ended and not self.run_key

    def end(self, why: str) -> None:
        """Wake whatever waits for the other end, from any thread."""
        logger.info("connection of %s is ended: %s", self._peer, why)
        self._is_ended = True
        with contextlib.suppress(OSError):
            # Of the socket below TLS, whose own is not for two threads.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def run(self) -> None:
        """Answer one request after another, until either end has had enough."""
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.enter_context(self._sock)
            self._sock.settimeout(None)  # the watch ends what takes too long
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                self._sock = stack.enter_context(
                    self._tls.context.wrap_socket(
                        self._sock, server_side=True, do_handshake_on_connect=False
                    )
                )
                self._sock.do_handshake()
            while (head := self._next_head()) is not None:
                try:
                    self._answer(head)
                except CheckpointError as error:
                    status, reason = _status_of(error)
                    body = msgspec.json.encode(error_to_wire(error))
                    self._send(status, reason, body)
                    if status in (400, 403):
                        return  # whoever cannot prove or spell is not asked again

    def _next_head(self) -> Head | None:
        """The next request, None at the end. A first word that makes no sense ends it, too."""
        if self.run_key:
            self.deadline_s = time.monotonic() + IDLE_S
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD_BYTES or not self._receive():
                return None
        if end > MAX_HEAD_BYTES:
            return None
        data = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        try:
            return peer_requests.parse_head(data)
        except FormatError as error:
            self._send(400, "Bad Request", msgspec.json.encode(error_to_wire(error)))
            return None

    def _receive(self) -> bool:
        data = self._sock.recv(MAX_HEAD_BYTES)
        if self.run_key and not self._buffer:  # it has begun to speak: now it has to finish
            self.deadline_s = time.monotonic() + HEAD_S
        self._buffer += data
        return bool(data)

    def _body(self, head: Head) -> bytes:
        while len(self._buffer) < head.body_bytes:
            if not self._receive():
                raise FormatError("the request ended within its body")
        body = bytes(self._buffer[: head.body_bytes])
        del self._buffer[: head.body_bytes]
        return body

    # -- answers ---------------------------------------------------------------------------------

    def _answer(self, head: Head) -> None:
        body = self._body(head)
        if head.method == "POST":
            return self._prove(head.path, body)
        if not self.run_key:
            raise AccessDenied("nothing is answered before a proof", state="nothing was sent")
        self.deadline_s = time.monotonic() + ANSWER_S
        verb, label, rest = peer_requests.split_path(head.path)
        place = self._server.place(self.run_key, label)
        if not self._server.lets_read(self.run_key, rest):
            raise AccessDenied("that is of another run", state="nothing was sent")
        with place.using() as tier:
            if verb == "objects":
                self._send_range(tier, check_key(rest), head)
            elif verb == "stat":
                self._send_message(Stat(tier.stat(check_key(rest)).size_bytes))
            else:
                self._send_message(_listing(tier, rest, head.after))
        return None

    def _prove(self, path: str, body: bytes) -> None:
        if path == _handshake.HELLO_PATH:
            self._send_message(self._answerer.welcome(_handshake.decode_small(body, Hello)))
        elif path == _handshake.PROVE_PATH:
            run_key = self._answerer.check(_handshake.decode_small(body, Proof))
            self.secret = self._server.secret_of(run_key)
            self._send_message({})
        else:
            raise FormatError("no such request")

    def _send_range(self, tier: LocalTier, key: str, head: Head) -> None:
        with tier.lease(key) as lease:
            first, last = head.first, min(head.last, lease.size_bytes - 1)
            size_bytes = last - first + 1
            if size_bytes <= 0:
                raise ShortRead(f"{key} ends before", key=key, got_bytes=lease.size_bytes)
            if size_bytes > MAX_RANGE_BYTES:
                raise FormatError(f"a range has {MAX_RANGE_BYTES} bytes at most")
            self.deadline_s = time.monotonic() + ANSWER_S + size_bytes / MIN_BYTES_PER_S
            self._send_head(
                206,
                "Partial Content",
                size_bytes,
                "application/octet-stream",
                f"Content-Range: bytes {first}-{last}/{lease.size_bytes}\r\n",
            )
            while first <= last:
                sent_bytes = self._send_file(lease.fd, first, last + 1 - first)
                if not sent_bytes:
                    raise ConnectionError("the object became shorter")  # ends the connection
                first += sent_bytes

    def _send_file(self, fd: int, offset: int, size_bytes: int) -> int:
        if self._tls is None:
            return os.sendfile(self._sock.fileno(), fd, offset, size_bytes)
        piece = os.pread(fd, min(size_bytes, TLS_PIECE_BYTES), offset)
        self._sock.sendall(piece)
        return len(piece)

    def _send_message(self, message: Any) -> None:
        self._send(200, "OK", msgspec.json.encode(message))

    def _send(self, status: int, reason: str, body: bytes) -> None:
        self._send_head(status, reason, len(body), "application/json", body=body)

    def _send_head(
        self,
        status: int,
        reason: str,
        size_bytes: int,
        kind: str,
        more: str = "",
        body: bytes = b"",
    ) -> None:
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\n"
        head += f"Content-Length: {size_bytes}\r\n{more}\r\n"
        # With MSG_MORE the head goes out with the first bytes that follow it.
        flags = 0 if body or self._tls else socket.MSG_MORE
        self._sock.sendall(head.encode("ascii") + body, flags)


def _listing(tier: LocalTier, prefix: str, after: str) -> Listing:
    found: list[tuple[str, int]] = []
    for info in tier.list(prefix):
        if info.key <= after:
            continue
        if len(found) == MAX_LISTED:
            return Listing(found, more=True)
        found.append((info.key, info.size_bytes))
    return Listing(found)


def _status_of(error: CheckpointError) -> tuple[int, str]:
    for type_, status in _STATUS.items():
        if isinstance(error, type_):
            return status
    return 500, "Internal Server Error"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise TierUnavailable(
            f"cannot listen at {host}: {error.strerror}",
            state="nothing is served to other nodes",
            actions=["set MTCKPT_PEER_HOST to an address of this node, or an interface's name"],
            tier="peers",
            port=port,
        ) from error
    return listener
