"""HTTP requests whose bodies are the caller's memory: nothing is copied on the way out or in.

It knows connections, deadlines and proxies. It does not know stores, signatures or what a status
means, retries nothing and follows no redirect: a URL is asked once, or the request has failed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import ssl
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from mtckpt.tiers._store import Kind, Refused, redacted

__all__ = ["Answer", "Http", "got_from"]

# As much as the kernel takes at a time anyway; between two pieces the deadline is looked at.
PIECE_BYTES = 1 << 20
MAX_ANSWER_BYTES = 16 << 20
MAX_IDLE = 64


class Answer(NamedTuple):
    """A status, its headers (names in lower case), and the body unless it went into ``out``."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    got_bytes: int


def got_from(answer: Answer, offset: int) -> int:
    """How many bytes of a range came. Raises Refused where they are of another place."""
    said = answer.headers.get("content-range", "")
    if not said.startswith(f"bytes {offset}-") and (offset or answer.status == 206):
        raise Refused(Kind.CORRUPTED, f"asked from {offset} on, got {said!r}")
    return answer.got_bytes


@dataclass(slots=True)
class _Running:
    connection: http.client.HTTPConnection
    end_s: float
    overdue: bool = False


class Http:
    """A pool of connections. Thread-safe; one request at a time on each connection.

    Args:
        stall_s: how long a live connection may move no byte.
        verify: False, or a file or directory of certificates; None: what the system trusts.
    """

    def __init__(self, *, stall_s: float = 20.0, verify: str | bool | None = None) -> None:
        self._stall_s = stall_s
        self._verify = verify
        self._lock = threading.Lock()
        self._idle: defaultdict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(
            list
        )
        self._running: set[int] = set()
        self._watched: dict[int, _Running] = {}
        self._watching = False
        self._context: ssl.SSLContext | None = None
        self._closed = False

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        body: Sequence[memoryview | bytes] = (),
        out: memoryview | None = None,
    ) -> Answer:
        """Ask once. The buffers of ``body`` are sent one after the other. ``out`` takes the body of
        a success; an answer longer than it is refused.

        Raises:
            Refused: UNREACHABLE for whatever kept the whole answer from arriving in time.
        """
        failed: str
        try:
            with self._connection(url, timeout_s) as (connection, target):
                return self._ask(connection, method, target, headers, body, out)
        except Refused:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: the watchdog closed the connection while it was being read.
            failed = f"{type(error).__name__}: {error}"
        raise Refused(Kind.UNREACHABLE, redacted(failed))

    def close(self) -> None:
        """Close idle connections, and those in use when their request ends. Idempotent."""
        with self._lock:
            self._closed = True
            idle = [one for some in self._idle.values() for one in some]
            self._idle.clear()
        for connection in idle:
            connection.close()

    # -- one request -----------------------------------------------------------------------------

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Sequence[memoryview | bytes],
        out: memoryview | None,
    ) -> Answer:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body or method in ("PUT", "POST"):
            connection.putheader("Content-Length", str(sum(map(len, body))))
        connection.endheaders()
        try:
            for buffer in body:
                view = memoryview(buffer)
                for start in range(0, len(view), PIECE_BYTES):
                    connection.sock.sendall(view[start : start + PIECE_BYTES])
        except (BrokenPipeError, ConnectionResetError):
            # A server that has refused early closes its side: its answer may be there to read.
            connection.sock.settimeout(1.0)
            answer = self._answer(connection, None)
            connection.close()
            if answer.status < 300:
                raise
            return answer
        return self._answer(connection, out)

    def _answer(self, connection: http.client.HTTPConnection, out: memoryview | None) -> Answer:
        with connection.getresponse() as response:
            headers = {name.lower(): value for name, value in response.getheaders()}
            if out is None or response.status >= 300:
                body = response.read(MAX_ANSWER_BYTES + 1)
                if len(body) > MAX_ANSWER_BYTES:
                    raise Refused(Kind.CORRUPTED, f"an answer of over {MAX_ANSWER_BYTES} bytes")
                return Answer(response.status, headers, body, len(body))
            return Answer(response.status, headers, b"", _fill(response, out))

    # -- connections -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(
        self, url: str, timeout_s: float
    ) -> Iterator[tuple[http.client.HTTPConnection, str]]:
        """A connection for this URL and what to ask on it; kept if all went well."""
        parts = urlsplit(url)
        place = (parts.scheme, parts.netloc)
        target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        connection = self._taken(place) or self._opened(*place, min(timeout_s, self._stall_s))
        if getattr(connection, "asks_proxy", False):
            target = f"{parts.scheme}://{parts.netloc}{target}"
        running = _Running(connection, time.monotonic() + timeout_s)
        try:
            with self._watch(running):
                yield connection, target
        except BaseException:
            connection.close()
            if running.overdue:
                raise TimeoutError(f"no whole answer within {timeout_s:.1f} s") from None
            raise
        with self._lock:
            if not self._closed and len(self._idle[place]) < MAX_IDLE:
                self._idle[place].append(connection)
                return
        connection.close()

    def _taken(self, place: tuple[str, str]) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                if not self._idle[place]:
                    return None
                connection = self._idle[place].pop()
            # Nothing is due on an idle connection: what can be read there is its end.
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()

    def _opened(self, scheme: str, netloc: str, connect_s: float) -> http.client.HTTPConnection:
        host, _, port = netloc.rpartition("@")[2].partition(":")
        proxy = "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
        through = urlsplit(proxy).netloc.rpartition("@")[2] if proxy else netloc
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(
                through, timeout=connect_s, context=self._tls()
            )
            if proxy:
                connection.set_tunnel(host, int(port) if port else None)
        else:
            connection = http.client.HTTPConnection(through, timeout=connect_s)
            connection.asks_proxy = bool(proxy)  # type: ignore[attr-defined]  # a note of ours on it
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(self._stall_s)
        return connection

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                bundle = self._verify if isinstance(self._verify, str) else None
                is_file = bundle is not None and os.path.isfile(bundle)
                self._context = ssl.create_default_context(
                    cafile=bundle if is_file else None,
                    capath=bundle if bundle and not is_file else None,
                )
                if self._verify is False:
                    self._context.check_hostname = False
                    self._context.verify_mode = ssl.CERT_NONE
            return self._context

    # -- the watchdog ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watch(self, running: _Running) -> Iterator[None]:
        """Break the connection when its time is up: a byte now and then keeps no request alive."""
        with self._lock:
            self._watched[id(running)] = running
            if not self._watching:
                # No thread to be had: then the next request asks for one.
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._look, name="mtckpt-http", daemon=True).start()
                    self._watching = True
        try:
            yield
        finally:
            with self._lock:
                del self._watched[id(running)]

    def _look(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(0.25)
            now_s = time.monotonic()
            with self._lock:
                if self._watched:
                    idle_since = now_s
                elif now_s - idle_since > 5:
                    self._watching = False
                    return
                overdue = [one for one in self._watched.values() if one.end_s < now_s]
            for one in overdue:
                one.overdue = True
                with contextlib.suppress(OSError, AttributeError):
                    # AttributeError: it is closed already, and has no socket any more.
                    one.connection.sock.shutdown(2)


def _fill(response: http.client.HTTPResponse, out: memoryview) -> int:
    done = 0
    while done < len(out):
        got = response.readinto(out[done : done + PIECE_BYTES])
        if not got:
            break
        done += got
    if response.length is not None and response.length > 0 and done < len(out):
        raise http.client.IncompleteRead(b"", response.length)
    if done == len(out) and response.read(1):
        raise Refused(Kind.CORRUPTED, "more bytes than the range that was asked for")
    return done
