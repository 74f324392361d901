"""The trainer's, CLI's and tests' side of the wire: one typed call at a time, always bounded.

Knows connections, deadlines and typed errors. Does not start an agent (``spawn``) and does not
decide what a failed call means. It promises no retry, except of an idle connection that the agent
had closed before it saw the request.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

from mtckpt.agent import address, protocol
from mtckpt.errors import (
    AccessDenied,
    AgentTooOld,
    AgentUnavailable,
    CheckpointError,
    FormatError,
)

__all__ = ["AgentClient"]

logger = logging.getLogger(__name__)

MAX_IDLE_CONNECTIONS = 4
# The idle connections of every client, by the id of the list: so no cycle that a client is in has
# them, and the collector leaves their closing to the client.
_kept: dict[int, list[_UnixConnection]] = {}
_T = TypeVar("_T")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the agent's socket, whose owner is checked before anything is sent."""

    def __init__(self, path: str) -> None:
        super().__init__("agent")
        self._path = path
        self.deadline_s = 0.0

    def connect(self) -> None:
        connection = address.connect(self._path, self.deadline_s - time.monotonic())
        uid = address.peer_of(connection).uid
        if uid not in address.trusted_uids(self._path):
            connection.close()
            raise AccessDenied(
                f"the agent's socket belongs to user {uid}, who is neither you, root nor its"
                " directory's owner",
                state="nothing was sent",
                actions=[f"remove {self._path}, or set MTCKPT_RUNTIME_DIR to a directory of yours"],
                socket=self._path,
            )
        self.sock = connection

    def limit(self) -> None:
        """Let the next blocking call end by the deadline."""
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if self.sock is not None:
            self.sock.settimeout(left_s)


class AgentClient:
    """Calls to one agent, from any number of threads.

    Args:
        socket_path: what ``ensure_agent`` returned.
        timeout_s: how long a call may take where it does not say itself.
    """

    def __init__(self, socket_path: str, timeout_s: float = 10.0) -> None:
        self.socket_path = socket_path
        self.timeout_s = timeout_s
        self._idle: list[_UnixConnection] = []
        _kept[id(self._idle)] = self._idle
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    def call(
        self,
        path: str,
        message: Any,
        reply_type: type[_T],
        timeout_s: float | None = None,
    ) -> _T:
        """POST ``message`` (GET if it is None) and return the typed reply.

        Raises:
            AgentUnavailable: no agent, or no whole answer within ``timeout_s``.
            AgentTooOld: it speaks another version of the protocol.
            CheckpointError: whatever the agent answered, as the class it was there.
        """
        body = None if message is None else protocol.encode(message)
        status, data = self._exchange(
            path, body, self.timeout_s if timeout_s is None else timeout_s
        )
        if status == 200:
            return protocol.decode(data, reply_type)
        raise self._refusal(status, data)

    def text(self, path: str, timeout_s: float | None = None) -> str:
        """GET something that is not one of our messages (``/metrics``)."""
        status, data = self._exchange(
            path, None, self.timeout_s if timeout_s is None else timeout_s
        )
        if status == 200:
            return data.decode(errors="replace")
        raise self._refusal(status, data)

    def close(self) -> None:
        """Close the connections that are idle. A later call opens new ones."""
        with self._lock:
            idle = self._idle[:]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # An opening that was refused leaves its client to nobody.
        if is_ending():
            return  # what this needs may be gone by now; the kernel closes all
        idle = _kept.pop(id(self._idle), [])
        while idle:
            idle.pop().close()

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _exchange(self, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        deadline_s = time.monotonic() + timeout_s
        try:
            connection = self._take()
            if connection is not None:
                try:
                    return self._send(connection, path, body, deadline_s)
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                    # The agent closed it while it was idle: the request was not seen.
                    pass
            return self._send(_UnixConnection(self.socket_path), path, body, deadline_s)
        except TimeoutError as error:
            raise self._unavailable("did not answer in time", timeout_s) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise self._unavailable("does not run", timeout_s) from error
        except PermissionError as error:
            raise AccessDenied(
                "may not connect to the agent", state="nothing was sent", socket=self.socket_path
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(f"went away: {error or type(error).__name__}", timeout_s) from (
                error
            )

    def _send(
        self, connection: _UnixConnection, path: str, body: bytes | None, deadline_s: float
    ) -> tuple[int, bytes]:
        connection.deadline_s = deadline_s
        try:
            connection.limit()
            headers = {"Content-Type": "application/json"} if body is not None else {}
            method = "GET" if body is None else "POST"
            connection.request(method, quote(path, safe="/?=&%"), body=body, headers=headers)
            connection.limit()
            response = connection.getresponse()
            data = self._read(connection, response)
            status, keep = response.status, not response.will_close
        except BaseException:
            connection.close()
            raise
        if keep:
            self._give_back(connection)
        else:
            connection.close()
        return status, data

    def _read(self, connection: _UnixConnection, response: http.client.HTTPResponse) -> bytes:
        """The body, refused above what any message can be; every piece within the deadline."""
        pieces: list[bytes] = []
        left_bytes = protocol.MAX_MESSAGE_BYTES
        while True:
            connection.limit()
            piece = response.read1(min(left_bytes + 1, 1 << 20))
            if not piece:
                response.close()  # read1 leaves it open, and the connection busy
                return b"".join(pieces)
            left_bytes -= len(piece)
            if left_bytes < 0:
                raise http.client.HTTPException("answer is larger than any can be")
            pieces.append(piece)

    def _take(self) -> _UnixConnection | None:
        with self._lock:
            if self._pid != os.getpid():  # a fork: the descriptors are the parent's conversation
                self._idle.clear()
                self._pid = os.getpid()
            return self._idle.pop() if self._idle else None

    def _give_back(self, connection: _UnixConnection) -> None:
        with self._lock:
            if len(self._idle) < MAX_IDLE_CONNECTIONS and self._pid == os.getpid():
                self._idle.append(connection)
                return
        connection.close()

    def _refusal(self, status: int, data: bytes) -> CheckpointError:
        try:
            error = protocol.error_from_wire(protocol.decode(data, protocol.WireError))
        except FormatError:
            text = data[:200].decode(errors="replace").strip()
            return self._unavailable(f"answered {status}: {text}", self.timeout_s)
        if isinstance(error, AgentTooOld):
            error.actions = (*error.actions, "stop the old agent: mtckpt agent stop")
        return error

    def _unavailable(self, what: str, timeout_s: float) -> AgentUnavailable:
        return AgentUnavailable(
            f"the node agent {what}",
            actions=[f"see its log beside the socket: {os.path.dirname(self.socket_path)}"],
            socket=self.socket_path,
            timeout_s=round(timeout_s, 3),
        )


@contextlib.contextmanager
def agent_client(timeout_s: float = 10.0) -> Iterator[AgentClient]:
    """A client of the agent that this process would use, which must run already (the CLI)."""
    with AgentClient(address.find().socket_path, timeout_s) as client:
        yield client
