"""What both HTTP servers of the control process have in common: connections, limits and errors.

Whatever comes in, the server lives: a request that cannot be right gets a typed answer, a
connection that may not be gets closed before a byte of it is read. Does not know sockets' addresses
or what can be asked.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from mtckpt.agent import protocol
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    CheckpointError,
    FormatError,
    RunLocked,
    StepExists,
    TierFull,
    TierUnavailable,
    UnsupportedPlatform,
    UsageError,
    WaitTimeout,
)

__all__ = ["HttpServer", "reply"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
BODY_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 2.0
MAX_HEADER_BYTES = 8190

_STATUS_OF = (
    (RunLocked, 409),
    (StepExists, 409),
    (UnsupportedPlatform, 501),
    (UsageError, 400),
    (FormatError, 422),
    (AccessDenied, 403),
    (TierFull, 507),
    (TierUnavailable, 503),
    (WaitTimeout, 503),
    (AgentUnavailable, 503),
)


def http_status(error: CheckpointError) -> int:
    """The status that goes with an error."""
    return next((status_ for type_, status_ in _STATUS_OF if isinstance(error, type_)), 500)


class _Gate(asyncio.Protocol):
    """One connection before HTTP has seen it: handed on only if its user may connect."""

    def __init__(self, server: HttpServer, make_handler: Callable[[], web.RequestHandler]) -> None:
        self._server = server
        self._make_handler = make_handler

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._server.admits(transport):
            transport.abort()
            return
        handler = self._make_handler()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        # Whoever connects only to see that we are there is going to ask for something.
        self._server.idle_since[handler] = self._server.asked_s = time.monotonic()


class HttpServer(abc.ABC):
    """HTTP over one listening socket, until ``stopped`` is set."""

    max_connections = MAX_CONNECTIONS

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None
        self.stopped = asyncio.Event()
        self.asked_s = time.monotonic()
        self.in_flight = 0
        # Connections that no request is being answered on, and since when.
        self.idle_since: dict[web.RequestHandler, float] = {}

    async def prepare(self, max_body_bytes: int) -> None:
        """Make ready to answer; ``connection`` may be called then."""
        app = web.Application(client_max_size=max_body_bytes, middlewares=[self._answer_errors])
        self.add_routes(app.router)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=IDLE_TIMEOUT_S,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
        await self._runner.setup()

    @abc.abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None:
        """What can be asked."""

    @abc.abstractmethod
    def may_connect(self, transport: asyncio.BaseTransport) -> bool:
        """Whether whoever is at the other end may."""

    def is_trusted(self, connection: web.RequestHandler) -> bool:
        """Whether whoever is at the other end may go on after a request that was refused."""
        return True

    def transports(self) -> list[asyncio.Transport]:
        """Of the connections that are open."""
        assert self._runner is not None
        assert self._runner.server is not None
        handlers = self._runner.server.connections
        return [each.transport for each in handlers if each.transport is not None]

    def connection(self) -> asyncio.Protocol:
        """What a listening socket makes of a new connection."""
        return _Gate(self, self.handler)

    def handler(self) -> web.RequestHandler:
        """What speaks HTTP on one connection."""
        assert self._runner is not None
        assert self._runner.server is not None
        return self._runner.server()

    async def stop(self) -> None:
        """Close everything. Answers under way are cut off."""
        self.stopped.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def admits(self, transport: asyncio.BaseTransport) -> bool:
        """Whether there is room for a connection, and it may be."""
        if len(self.idle_since) + self.in_flight >= self.max_connections:
            self.close_idle()
        if len(self.idle_since) + self.in_flight >= self.max_connections:
            logger.warning("refused a connection: %d are open", self.max_connections)
            return False
        return self.may_connect(transport)

    def close_idle(self) -> None:
        """Close connections that have been saying nothing, or half a request, for long."""
        now_s = time.monotonic()
        for connection, since_s in list(self.idle_since.items()):
            if connection.transport is None:
                del self.idle_since[connection]  # the other end has closed it
            elif now_s - since_s > IDLE_TIMEOUT_S:
                # Not closed: that would wait for it to take what it was answered.
                connection.transport.abort()

    # -- requests --------------------------------------------------------------------------------

    @web.middleware
    async def _answer_errors(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        connection = request.protocol
        self.idle_since.pop(connection, None)
        self.in_flight += 1
        try:
            response = await self._answer(request, handler)
        finally:
            self.in_flight -= 1
            self.asked_s = time.monotonic()
            if request.transport is not None:
                self.idle_since[connection] = time.monotonic()
        if response.status >= 400 and not self.is_trusted(connection):
            response.force_close()  # who cannot prove or spell is not asked again
        return response

    async def _answer(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except CheckpointError as error:
            return reply(protocol.error_to_wire(error), http_status(error))
        except web.HTTPException as error:
            wire = protocol.WireError("UsageError", f"{request.path}: {error.reason}")
            return reply(wire, error.status)
        except Exception as error:
            # One request that meets a bug must not end the agent of all runs.
            logger.exception("%s %s failed", request.method, request.path)
            return reply(protocol.error_to_wire(error), 500)

    async def message(self, request: web.Request, type_: type[Any]) -> Any:
        """The request's body, typed. Raises FormatError."""
        try:
            body = await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise FormatError("the request's body did not come in time") from error
        except OSError as error:  # the other end is gone; nobody is there to be answered
            raise FormatError("the request's body broke off") from error
        return protocol.decode(body, type_)


def reply(message: Any, status_: int = 200) -> web.Response:
    """A message as the answer."""
    return web.Response(
        body=protocol.encode(message), status=status_, content_type="application/json"
    )
