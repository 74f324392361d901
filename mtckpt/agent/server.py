"""The agent's HTTP side for processes of this node: who may connect, which verb answers.

Knows users and paths. Does not know what a verb does, nor what any HTTP server needs (``serving``).
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

from mtckpt.agent import address, drains, owners, protocol, status
from mtckpt.agent.serving import MAX_CONNECTIONS, HttpServer, reply
from mtckpt.agent.tools import until
from mtckpt.agent.verbs import Caller, Verbs
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    UsageError,
)

if TYPE_CHECKING:
    import socket

    from mtckpt._events import Event
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.runs import RunState

__all__ = ["AgentServer"]

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
MAX_POLL_S = 60.0
MAX_QUEUED_EVENTS = 1000
# Of a service: one user of its group keeps no other out.
MAX_CONNECTIONS_OF_ONE = MAX_CONNECTIONS // 2
HEARTBEAT_S = 2.0


class AgentServer(HttpServer):
    """HTTP over one listening socket, until ``stopped`` is set."""

    def __init__(self, registry: Registry, verbs: Verbs) -> None:
        super().__init__()
        self._registry = registry
        self._verbs = verbs
        self._server: asyncio.AbstractServer | None = None
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
            "listen": (protocol.Listen, verbs.listen),
            "join": (protocol.Join, verbs.join),
            "lend": (protocol.Lend, verbs.lend),
        }

    # -- life ------------------------------------------------------------------------------------

    async def start(self, listener: socket.socket) -> None:
        """Serve on a socket that listens already; connections in its backlog are answered."""
        await self.prepare(protocol.MAX_MESSAGE_BYTES)
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        # The socket's file is ours, or systemd's, to remove: not asyncio's, which would since 3.13.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await loop.create_unix_server(
            self.connection, sock=listener, backlog=address.BACKLOG, **options
        )

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """What can be asked."""
        router.add_get("/status", self._get_status)
        router.add_get("/metrics", self._get_metrics)
        router.add_get("/healthz", self._get_healthz)
        router.add_get("/readyz", self._get_readyz)
        router.add_get("/events", self._get_events)
        router.add_get("/v1/runs/{key}/changes", self._get_changes)
        router.add_post("/v1/runs/{key}/open", self._post_open)
        router.add_post("/v1/runs/{key}/{verb}", self._post_verb)
        router.add_post("/v1/stop", self._post_stop)
        router.add_post("/v1/drain", self._post_drain)

    async def stop(self) -> None:
        """Close everything. Answers under way are cut off."""
        if self._server is not None:
            self._server.close()
        await super().stop()

    def may_connect(self, transport: asyncio.BaseTransport) -> bool:
        """Whether the user at the other end may."""
        uid = address.peer_of(transport.get_extra_info("socket")).uid
        if uid in (0, os.geteuid()):
            return True
        # A service's socket is its group's: the kernel has checked that.
        if not self._registry.service:
            logger.warning("refused a connection of user %d", uid)
            return False
        sockets = [each.get_extra_info("socket") for each in self.transports()]
        if sum(address.peer_of(each).uid == uid for each in sockets) < MAX_CONNECTIONS_OF_ONE:
            return True
        logger.warning("refused a connection of user %d, who has %d", uid, MAX_CONNECTIONS_OF_ONE)
        return False

    # -- requests --------------------------------------------------------------------------------

    async def _ready(self) -> None:
        if self._registry.ready.is_set():
            return
        if not await until(self._registry.ready, START_TIMEOUT_S):
            raise AgentUnavailable("the agent is still reading what an earlier one left")

    async def _run(self, request: web.Request) -> RunState:
        await self._ready()
        return self._known(request)

    def _known(self, request: web.Request) -> RunState:
        run = self._registry.runs.get(request.match_info["key"])
        if run is None:
            raise AgentUnavailable(
                "this agent does not know the run",
                actions=["open the run again"],
                run=request.match_info["key"][:200],
            )
        if not self._verbs.may_speak(run, _uid_of(request)):
            raise AccessDenied(
                "this run belongs to another user",
                state="nothing was done",
                actions=["open it first, with its token in MTCKPT_TOKEN"],
                run=run.run,
            )
        return run

    async def _post_open(self, request: web.Request) -> web.Response:
        message = await self.message(request, protocol.Open)
        await self._ready()
        assert request.transport is not None
        connection = request.transport.get_extra_info("socket")
        peer = address.peer_of(connection)
        pidfd = owners.peer_pidfd(connection)
        try:
            caller = Caller(peer.pid, peer.uid, pidfd)
            return reply(await self._verbs.open(caller, request.match_info["key"], message))
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _post_verb(self, request: web.Request) -> web.Response:
        found = self._posts.get(request.match_info["verb"])
        if found is None:
            raise web.HTTPNotFound
        type_, verb = found
        message = await self.message(request, type_)
        await self._ready()
        if type_ is protocol.Close and request.match_info["key"] not in self._registry.runs:
            # Said again, since the first answer was lost; or the run went with another rank's end.
            return reply(protocol.Done("was closed before"))
        # Nothing is waited for since that look: the run may go at any time.
        return reply(await verb(self._known(request), message))

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
            while not (run.has_news(since, holder) or self.stopped.is_set()):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or request.transport is None or request.transport.is_closing():
                    break
                await until(run.changed, min(left_s, 1.0))
        finally:
            if owner is not None:
                owner.listening -= 1
                owner.heard_s = time.monotonic()
        return reply(run.changes(since, holder))

    async def _get_status(self, _: web.Request) -> web.Response:
        return reply(status.agent_status(self._registry))

    async def _get_healthz(self, _: web.Request) -> web.Response:
        """It answers, whatever its tiers do: what is slow is not mended by another agent."""
        return reply(protocol.Done("it answers"))

    async def _get_readyz(self, _: web.Request) -> web.Response:
        """It knows what an agent before it left, so that a run can be opened at once."""
        if not self._registry.ready.is_set():
            raise AgentUnavailable("the agent is still reading what an earlier one left")
        self._registry.drainer.refuse()
        return reply(protocol.Done("it is ready"))

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

    def _check_own_user(self, request: web.Request) -> None:
        if _uid_of(request) not in (0, os.geteuid()):
            raise AccessDenied("only the agent's own user may stop it", state="it goes on")

    async def _post_stop(self, request: web.Request) -> web.Response:
        message: protocol.Stop = await self.message(request, protocol.Stop)
        self._check_own_user(request)
        detail = ""
        if message.drain:
            reason = "the agent is stopped"
            drained = await self._registry.drainer.drain(message.timeout_s, reason, ends=True)
            lacking = [(run.run, why) for run in drained.runs for why in run.lacking]
            detail = "\n".join(f"{run}: {why}" for run, why in lacking)
        asyncio.get_running_loop().call_later(0.05, self.stopped.set)
        return reply(protocol.Done(detail))

    async def _post_drain(self, request: web.Request) -> web.Response:
        message: drains.Drain = await self.message(request, drains.Drain)
        self._check_own_user(request)
        await self._ready()
        drainer = self._registry.drainer
        if message.cancel:
            drainer.cancel()
            return reply(drains.Drained(True))
        reason = f"{self._registry.host} is about to go: it is being drained"
        return reply(await drainer.drain(message.timeout_s, reason))


def _uid_of(request: web.Request) -> int:
    if request.transport is None:
        raise AccessDenied("whoever asked is gone", state="nothing was done")
    return address.peer_of(request.transport.get_extra_info("socket")).uid


def _line(event: Event) -> bytes:
    return json.dumps(event, default=str).encode() + b"\n"
