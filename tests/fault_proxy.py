"""An HTTP proxy that fails on purpose, between a client and a real store.

It knows requests, answers and sockets, and nothing of any store but the two error documents that
it makes up. Requests pass unchanged, ``Host`` included, so signatures hold. What goes wrong is told
by rules; chance comes from the seed, so a failing run can be had again.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "answer",  # `status` and `code` instead of asking the store
    "refused",  # the connection is cut before the store is asked
    "lost",  # the store does it, and the connection is cut
    "late",  # the store does it, and `status` and `code` are the answer all the same
    "stall",  # the connection stays, and no byte moves
    "cut",  # half of the answer's body, then the end of the connection
    "trickle",  # the answer's body, a byte now and then
    "short",  # fewer bytes than asked for, in an answer that is right in itself
    "wrong",  # a bit of the answer's body flipped
    "other_range",  # the right number of bytes from another place
    "stale",  # the answer that this target had the first time
]

MAX_HEAD = 64 << 10
HOLD_S = 30.0
TRICKLE_S = 0.05


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Args:
        match: a regular expression searched for in "METHOD target".
        nth, times: the first matching request that it hits, counted from 1, and how many in a row;
            times None is for ever.
        chance: of those, how many in a hundred are hit.
    """

    kind: Kind
    match: str = ""
    nth: int = 1
    times: int | None = 1
    chance: float = 100.0
    status: int = 503
    code: str = "SlowDown"


@dataclass(slots=True)
class Seen:
    """One request that arrived, and what was done to it."""

    line: str
    fault: Fault | None
    size_bytes: int


@dataclass(slots=True)
class _Request:
    method: str
    target: str
    head: dict[str, str]
    body: bytes


@dataclass
class FaultProxy:
    """Use as a context manager; ``url`` is where it listens. ``seen`` is what came by, in order."""

    upstream: str
    rules: list[Fault] = field(default_factory=list)
    seed: int = 0
    url: str = ""
    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    _first: dict[str, tuple[int, list[tuple[str, str]], bytes]] = field(default_factory=dict)
    _counts: Counter[Fault] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _open: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> FaultProxy:
        self._random = random.Random(self.seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        scheme = "https" if self.tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def set(self, *rules: Fault) -> None:
        """Other rules from now on, counted from now on."""
        with self._lock:
            self.rules = list(rules)
            self._counts.clear()

    def hits(self) -> Counter[str]:
        """How many requests each kind of fault has hit."""
        return Counter(one.fault.kind for one in self.seen if one.fault is not None)

    # -- connections -----------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        upstream = http.client.HTTPConnection(self.upstream.partition("://")[2], timeout=60)
        try:
            with (
                connection,
                contextlib.ExitStack() as stack,
                contextlib.suppress(OSError, http.client.HTTPException, ValueError),
            ):
                # Whatever breaks here breaks the connection, which is what a proxy would do.
                if self.tls is not None:
                    connection = stack.enter_context(
                        self.tls.wrap_socket(connection, server_side=True)
                    )
                while (request := _read_request(connection)) is not None:
                    if not self._handle(connection, upstream, request):
                        return
        finally:
            upstream.close()
            with self._lock:
                self._open.discard(connection)

    def _handle(
        self, connection: socket.socket, upstream: http.client.HTTPConnection, request: _Request
    ) -> bool:
        """Answer one request; False if the connection ends with it."""
        fault = self._due(request)
        kind = fault.kind if fault else None
        if kind == "refused":
            return False
        if fault and kind == "answer":
            _send(connection, *_made_up(fault, request))
            return True
        if kind == "stall":
            self._ended.wait(HOLD_S)
            return False
        status, headers, body = self._ask(upstream, request)
        if kind == "lost":
            return False
        if fault and kind == "late":
            _send(connection, *_made_up(fault, request))
            return True
        if kind == "stale":
            status, headers, body = self._first.get(request.target, (status, headers, body))
        with self._lock:
            self._first.setdefault(request.target, (status, headers, body))
        if kind == "wrong" and body:
            place = self._random.randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        if kind == "other_range":
            body = body[1:] + body[:1]
            headers = [(n, _moved(v) if n.lower() == "content-range" else v) for n, v in headers]
        if kind == "short":
            body = body[: len(body) // 2]
        if kind == "trickle":
            _send(connection, status, headers, b"", claimed=len(body))
            for byte in body:
                if self._ended.wait(TRICKLE_S):
                    break
                connection.sendall(bytes([byte]))
            return False
        if kind == "cut":
            _send(connection, status, headers, body[: len(body) // 2], claimed=len(body))
            return False
        _send(connection, status, headers, body, without_body=request.method == "HEAD")
        return True

    def _ask(
        self, upstream: http.client.HTTPConnection, request: _Request
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream.putrequest(
            request.method, request.target, skip_host=True, skip_accept_encoding=True
        )
        for name, value in request.head.items():
            upstream.putheader(name, value)
        upstream.endheaders(request.body or None)
        answer = upstream.getresponse()
        body = answer.read()
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection")
        ]
        return answer.status, headers, body

    def _due(self, request: _Request) -> Fault | None:
        line = f"{request.method} {request.target}"
        found: Fault | None = None
        with self._lock:
            for rule in self.rules:
                if not re.search(rule.match, line):
                    continue
                self._counts[rule] += 1
                last = float("inf") if rule.times is None else rule.nth + rule.times - 1
                hit = rule.nth <= self._counts[rule] <= last
                if found is None and hit and self._random.random() * 100 < rule.chance:
                    found = rule
            self.seen.append(Seen(line, found, len(request.body)))
        return found


def _moved(content_range: str) -> str:
    first, last, size = map(int, re.findall(r"\d+", content_range))
    return f"bytes {first + 1}-{last + 1}/{size}"


def _made_up(fault: Fault, request: _Request) -> tuple[int, list[tuple[str, str]], bytes]:
    if "/storage/v1/" in request.target:
        text = f'{{"error": {{"code": {fault.status}, "message": "{fault.code}"}}}}'
        return fault.status, [("Content-Type", "application/json")], text.encode()
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
    )
    if fault.status == 200:  # of something that stands before the store
        text = f"<html><body>{fault.code}</body></html>"
    body = b"" if request.method == "HEAD" else text.encode()
    return fault.status, [("Content-Type", "application/xml")], body


def _pieces(connection: socket.socket) -> Iterator[bytes]:
    while piece := connection.recv(1 << 16):
        yield piece


def _read_request(connection: socket.socket) -> _Request | None:
    data = b""
    pieces = _pieces(connection)
    while b"\r\n\r\n" not in data:
        piece = next(pieces, b"")
        if not piece or len(data) > MAX_HEAD:
            return None
        data += piece
    raw, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    head = {}
    for line in lines:
        name, _, value = line.partition(":")
        head[name.lower()] = value.strip()
    if head.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        del head["expect"]
    wanted = int(head.get("content-length", 0))
    body = bytearray(rest)
    while len(body) < wanted:
        piece = next(pieces, b"")
        if not piece:
            return None
        body += piece
    return _Request(method, target, head, bytes(body))


def _send(
    connection: socket.socket,
    status: int,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    *,
    claimed: int | None = None,
    without_body: bool = False,
) -> None:
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"]
    for name, value in headers:
        if name.lower() != "content-length" or without_body:
            lines.append(f"{name}: {value}")
    if not without_body:
        lines.append(f"Content-Length: {len(body) if claimed is None else claimed}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
