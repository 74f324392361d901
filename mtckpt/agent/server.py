"""The agent's HTTP side: who may connect, what is read, which verb answers.

Knows connections, limits and the mapping of errors. Does not know what a verb does. Whatever comes
in, the server lives: a request that cannot be right gets a typed answer, a connection that is not
ours gets closed before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from mtckpt.agent import address, owners, protocol, status
from mtckpt.agent.verbs import Caller, Verbs
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
)

if TYPE_CHECKING:
    import socket

    from mtckpt._events import Event
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.runs import RunState

__all__ = ["AgentServer"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
BODY_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 2.0
MAX_POLL_S = 60.0
MAX_QUEUED_EVENTS = 1000
HEARTBEAT_S = 2.0

_STATUS_OF = (
    (RunLocked, 409),
    (StepExists, 409),
    (UnsupportedPlatform, 501),
    (UsageError, 400),
    (FormatError, 422),
    (AccessDenied, 403),
    (TierFull, 507),
    (TierUnavailable, 503),
    (AgentUnavailable, 503),
)


def http_status(error: CheckpointError) -> int:
    return next((status_ for type_, status_ in _STATUS_OF if isinstance(error, type_)), 500)


class _Gate(asyncio.Protocol):
    """One connection before HTTP has seen it: handed on only if its user may connect."""

    def __init__(self, server: AgentServer, make_handler: web.Server) -> None:
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


class AgentServer:
    """HTTP over one listening socket, until ``stopped`` is set."""

    def __init__(self, registry: Registry, verbs: Verbs) -> None:
        self._registry = registry
        self._verbs = verbs
        self._runner: web.AppRunner | None = None
        self._server: asyncio.AbstractServer | None = None
        self.stopped = asyncio.Event()
        self.asked_s = time.monotonic()
        self.in_flight = 0
        # Connections that no request is being answered on, and since when.
        self.idle_since: dict[web.RequestHandler, float] = {}
        self._posts: dict[str, tuple[type[Any], Callable[[RunState, Any], Awaitable[Any]]]] = {
            "incarnation": (protocol.Begin, verbs.begin),
            "slots": (protocol.WantSlots, verbs.want_slots),
            "seal": (protocol.Seal, verbs.seal),
            "release": (protocol.Release, verbs.release),
            "calloff": (protocol.CallOff, verbs.call_off),
            "report": (protocol.Report, verbs.report),
            "damage": (protocol.Damage, verbs.damage),
            "flush": (protocol.Flush, verbs.flush),
            "fetch": (protocol.Fetch, verbs.fetch),
            "close": (protocol.Close, verbs.close),
            "rm": (protocol.Remove, verbs.remove),
        }

    # -- life ------------------------------------------------------------------------------------

    async def start(self, listener: socket.socket) -> None:
        """Serve on a socket that listens already; connections in its backlog are answered."""
        app = web.Application(
            client_max_size=protocol.MAX_MESSAGE_BYTES, middlewares=[self._answer_errors]
        )
        app.router.add_get("/status", self._get_status)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/healthz", self._get_healthz)
        app.router.add_get("/readyz", self._get_readyz)
        app.router.add_get("/events", self._get_events)
        app.router.add_get("/v1/runs/{key}/changes", self._get_changes)
        app.router.add_post("/v1/runs/{key}/open", self._post_open)
        app.router.add_post("/v1/runs/{key}/{verb}", self._post_verb)
        app.router.add_post("/v1/stop", self._post_stop)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=IDLE_TIMEOUT_S,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        # The socket's file is ours, or systemd's, to remove: not asyncio's, which would since 3.13.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await loop.create_unix_server(
            self._connection, sock=listener, backlog=address.BACKLOG, **options
        )

    def _connection(self) -> asyncio.Protocol:
        assert self._runner is not None
        assert self._runner.server is not None
        return _Gate(self, self._runner.server)

    async def stop(self) -> None:
        """Close everything. Answers under way are cut off."""
        self.stopped.set()
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def admits(self, transport: asyncio.BaseTransport) -> bool:
        """Whether the user at the other end may connect, and there is room."""
        if len(self.idle_since) + self.in_flight >= MAX_CONNECTIONS:
            self.close_idle()
        if len(self.idle_since) + self.in_flight >= MAX_CONNECTIONS:
            logger.warning("refused a connection: %d are open", MAX_CONNECTIONS)
            return False
        uid = address.peer_of(transport.get_extra_info("socket")).uid
        # A service's socket is its group's: the kernel has checked that.
        if self._registry.service or uid in (0, os.geteuid()):
            return True
        logger.warning("refused a connection of user %d", uid)
        return False

    def close_idle(self) -> None:
        """Close connections that have been saying nothing, or half a request, for long."""
        now_s = time.monotonic()
        for connection, since_s in list(self.idle_since.items()):
            if connection.transport is None:
                del self.idle_since[connection]  # the other end has closed it
            elif now_s - since_s > IDLE_TIMEOUT_S:
                connection.transport.close()

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
            return await handler(request)
        except CheckpointError as error:
            return _reply(protocol.error_to_wire(error), http_status(error))
        except web.HTTPException as error:
            wire = protocol.WireError("UsageError", f"{request.path}: {error.reason}")
            return _reply(wire, error.status)
        except Exception as error:
            # One request that meets a bug must not end the agent of all runs.
            logger.exception("%s %s failed", request.method, request.path)
            return _reply(protocol.error_to_wire(error), 500)
        finally:
            self.in_flight -= 1
            self.asked_s = time.monotonic()
            if request.transport is not None:
                self.idle_since[connection] = time.monotonic()

    async def _message(self, request: web.Request, type_: type[Any]) -> Any:
        try:
            body = await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise FormatError("the request's body did not come in time") from error
        return protocol.decode(body, type_)

    async def _ready(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._registry.ready.wait(), START_TIMEOUT_S)
        if not self._registry.ready.is_set():
            raise AgentUnavailable("the agent is still reading what an earlier one left")

    async def _run(self, request: web.Request) -> RunState:
        await self._ready()
        run = self._registry.runs.get(request.match_info["key"])
        if run is None:
            raise AgentUnavailable(
                "this agent does not know the run",
                actions=["open the run again"],
                run=request.match_info["key"][:200],
            )
        return run

    async def _post_open(self, request: web.Request) -> web.Response:
        message = await self._message(request, protocol.Open)
        await self._ready()
        assert request.transport is not None
        connection = request.transport.get_extra_info("socket")
        peer = address.peer_of(connection)
        pidfd = owners.peer_pidfd(connection)
        try:
            caller = Caller(peer.pid, peer.uid, pidfd)
            return _reply(await self._verbs.open(caller, request.match_info["key"], message))
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _post_verb(self, request: web.Request) -> web.Response:
        found = self._posts.get(request.match_info["verb"])
        if found is None:
            raise web.HTTPNotFound
        type_, verb = found
        message = await self._message(request, type_)
        return _reply(await verb(await self._run(request), message))

    async def _get_changes(self, request: web.Request) -> web.Response:
        run = await self._run(request)
        try:
            since = int(request.query.get("since", "0"))
            timeout_s = float(request.query.get("timeout_s", "20"))
            timeout_s = max(0.0, min(timeout_s, MAX_POLL_S))  # 0 for what is no number, too
        except ValueError as error:
            raise UsageError("since and timeout_s are numbers") from error
        holder = request.query.get("holder", "")
        # Each agent counts from zero. A connection that broke is made anew by the client, which
        # does not know that another agent listens there by now.
        if request.query.get("agent", self._registry.agent_id) != self._registry.agent_id:
            raise AgentUnavailable(
                "another agent has taken this one's place", actions=["open the run again"]
            )
        owner = next((o for o in run.living() if o.holder == holder), None)
        if owner is not None:
            owner.listening += 1
            owner.listened = True
        try:
            deadline_s = time.monotonic() + timeout_s
            while run.seq <= since and not self.stopped.is_set():
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or request.transport is None or request.transport.is_closing():
                    break
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(run.changed.wait(), min(left_s, 1.0))
        finally:
            if owner is not None:
                owner.listening -= 1
                owner.heard_s = time.monotonic()
        return _reply(run.changes(since, holder))

    async def _get_status(self, _: web.Request) -> web.Response:
        return _reply(status.agent_status(self._registry))

    async def _get_healthz(self, _: web.Request) -> web.Response:
        """It answers, whatever its tiers do: what is slow is not mended by another agent."""
        return _reply(protocol.Done("it answers"))

    async def _get_readyz(self, _: web.Request) -> web.Response:
        """It knows what an agent before it left, so that a run can be opened at once."""
        if not self._registry.ready.is_set():
            raise AgentUnavailable("the agent is still reading what an earlier one left")
        return _reply(protocol.Done("it is ready"))

    async def _get_metrics(self, _: web.Request) -> web.Response:
        text = status.prometheus_text(self._registry)
        return web.Response(
            body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _get_events(self, request: web.Request) -> web.StreamResponse:
        """The events that are kept, then each as it happens; ``?follow=0`` ends after the first.

        A line that says ``alive`` comes when nothing happens: proxies close what is silent.
        """
        stream = self._registry.tools.events
        queue: asyncio.Queue[Event] = asyncio.Queue(MAX_QUEUED_EVENTS)

        def hear(event: Event) -> None:
            if not queue.full():  # a reader that is too slow misses events, nobody waits for it
                queue.put_nowait(event)

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        kept = stream.since(0)
        unsubscribe = stream.subscribe(hear)
        try:
            for event in kept:
                await response.write(_line(event))
            spoke_s = 0.0
            while request.query.get("follow", "1") != "0" and not self.stopped.is_set():
                if time.monotonic() - spoke_s > HEARTBEAT_S:
                    await response.write(_line({"time": round(time.time(), 3), "name": "alive"}))
                    spoke_s = time.monotonic()
                with contextlib.suppress(asyncio.TimeoutError):
                    event = await asyncio.wait_for(queue.get(), 1.0)
                    await response.write(_line(event))
                    spoke_s = time.monotonic()
                if request.transport is None or request.transport.is_closing():
                    break
        except ConnectionResetError:
            pass  # the reader left
        finally:
            unsubscribe()
        return response

    async def _post_stop(self, request: web.Request) -> web.Response:
        message: protocol.Stop = await self._message(request, protocol.Stop)
        assert request.transport is not None
        uid = address.peer_of(request.transport.get_extra_info("socket")).uid
        if uid not in (0, os.geteuid()):
            raise AccessDenied("only the agent's own user may stop it", state="it goes on")
        left = await self._registry.drain(message.timeout_s) if message.drain else 0
        asyncio.get_running_loop().call_later(0.05, self.stopped.set)
        return _reply(protocol.Done(f"{left} saves are still owed" if left else ""))


def _reply(message: Any, status_: int = 200) -> web.Response:
    return web.Response(
        body=protocol.encode(message), status=status_, content_type="application/json"
    )


def _line(event: Event) -> bytes:
    return json.dumps(event, default=str).encode() + b"\n"
