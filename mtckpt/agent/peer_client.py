"""Asking the agent of another node: one typed call at a time, always bounded, proved both ways.

Knows connections, deadlines and typed errors. Does not decide what a failed call means, and tries
nothing twice, except on a connection that the other side had closed before it saw the request.
"""

from __future__ import annotations

import http.client
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from mtckpt.agent import protocol
from mtckpt.errors import AccessDenied, AgentUnavailable, CheckpointError, FormatError
from mtckpt.tiers._peer_http import PeerConnection, read_small

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress

__all__ = ["PeerClient"]

MAX_IDLE = 2
_T = TypeVar("_T")


class PeerClient:
    """Calls about one run to one agent, from any number of threads; each blocks.

    Args:
        address: where that agent listens.
        run_key: the run that is spoken of.
        secret: what its nodes share.
    """

    def __init__(self, address: PeerAddress, run_key: str, secret: bytes) -> None:
        self.address = address
        self.run_key = run_key
        self._secret = secret
        self._lock = threading.Lock()
        self._idle: list[PeerConnection] = []

    def __repr__(self) -> str:
        return f"PeerClient({str(self.address)!r}, {self.run_key!r})"

    def call(self, verb: str, message: Any, reply_type: type[_T], timeout_s: float) -> _T:
        """Ask, and return the typed answer.

        Raises:
            AgentUnavailable: no agent, another one by now, or no whole answer within ``timeout_s``.
            AccessDenied: one side does not know the run's secret.
            CheckpointError: whatever the agent answered, as the class it was there.
        """
        deadline_s = time.monotonic() + timeout_s
        body = protocol.encode(message)
        try:
            status, data = self._exchange(f"/v1/runs/{self.run_key}/{verb}", body, deadline_s)
        except (OSError, http.client.HTTPException) as error:
            why = "did not answer in time" if isinstance(error, TimeoutError) else f"{error!r}"
            raise self._unavailable(why, verb, timeout_s) from error
        except FormatError as error:
            raise self._unavailable(error.what, verb, timeout_s) from error
        if status == 200:
            return protocol.decode(data, reply_type)
        raise self._refusal(status, data, verb, timeout_s)

    def close(self) -> None:
        """Close the connections that are idle. A later call opens new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _exchange(self, path: str, body: bytes, deadline_s: float) -> tuple[int, bytes]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None and connection.is_stale():
            connection.close()
            connection = None
        if connection is not None:
            try:
                return self._send(connection, path, body, deadline_s)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                pass  # closed while it was idle: the request was not seen
        connection = PeerConnection(self.address, "control", self.run_key, self._secret)
        connection.open(deadline_s)
        return self._send(connection, path, body, deadline_s)

    def _send(
        self, connection: PeerConnection, path: str, body: bytes, deadline_s: float
    ) -> tuple[int, bytes]:
        connection.deadline_s = deadline_s
        try:
            response = connection.ask("POST", path, body)
            data = read_small(connection, response, protocol.MAX_MESSAGE_BYTES)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if connection.sock is not None and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return response.status, data
        connection.close()
        return response.status, data

    def _refusal(self, status: int, data: bytes, verb: str, timeout_s: float) -> CheckpointError:
        try:
            error = protocol.error_from_wire(protocol.decode(data, protocol.WireError))
        except FormatError:
            text = data[:200].decode(errors="replace").strip()
            return self._unavailable(f"answered {status}: {text}", verb, timeout_s)
        if isinstance(error, AccessDenied):
            error.details["peer"] = str(self.address)
        return error

    def _unavailable(self, why: str, verb: str, timeout_s: float) -> AgentUnavailable:
        return AgentUnavailable(
            f"the agent of {self.address}: {why}",
            actions=["see whether that node is up, and its agent: mtckpt status"],
            verb=verb,
            port=self.address.control_port,
            timeout_s=round(timeout_s, 3),
        )
