"""The agent's HTTP side for agents of other nodes: small messages of runs that both are of.

Knows the handshake, one for each connection, and that a connection speaks of one run. Does not know
what a verb does. Payload never passes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any

from aiohttp import web

from mtckpt import _handshake
from mtckpt._handshake import MAX_SMALL_BYTES, Answerer, Hello, Proof
from mtckpt._peer_tls import server_tls
from mtckpt.agent.serving import HttpServer, reply
from mtckpt.agent.strangers import source_of, who_goes
from mtckpt.errors import AccessDenied, AgentUnavailable, FormatError, UsageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from mtckpt._peer_tls import Tls
    from mtckpt.agent.runs import RunState

__all__ = ["MAX_PEER_MESSAGE_BYTES", "PeerListener", "PeerVerb"]

logger = logging.getLogger(__name__)

MAX_PEER_CONNECTIONS = 1024
# Of those, such as have not proved anything yet, in TLS or above it; and those from one place.
MAX_STRANGERS = 256
MAX_STRANGERS_OF_ONE = 64
MAX_PEER_MESSAGE_BYTES = 16 * 1024 * 1024
PROVE_S = 5.0
VERB_S = 60.0
BACKLOG = 512
ACCEPT_PAUSE_S = 0.5
# The type of a message, and what answers it: (run, message) -> reply.
PeerVerb = tuple[type[Any], "Callable[[RunState, Any], Awaitable[Any]]"]


class _Guest:
    """One connection, from the moment that it was accepted."""

    def __init__(
        self, sock: socket.socket, host: str, handler: web.RequestHandler, answerer: Answerer
    ) -> None:
        self.host = host
        self.source = source_of(host)
        self.since_s = time.monotonic()
        self.answerer = answerer
        self.opening: asyncio.Task[None] | None = None
        self.limit: asyncio.TimerHandle | None = None
        self.is_over = False
        self._sock = sock  # its transport's to close
        self._handler = handler

    @property
    def is_stranger(self) -> bool:
        """Whether it is there and has not proved that it knows a run's secret."""
        return not self.is_over and not self.answerer.run_key

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it that has to be counted."""
        return (self.opening is None or self.opening.done()) and self._handler.transport is None

    def end(self, why: str) -> None:
        """Close it, whatever is under way. Idempotent."""
        if not self.is_over:
            logger.info("connection of %s is ended: %s", self.host, why)
        self.is_over = True
        self.may_stay()
        with contextlib.suppress(OSError):  # a handshake has no transport yet that could be closed
            self._sock.shutdown(SHUT_RDWR)
        if self._handler.transport is not None:
            self._handler.transport.abort()

    def may_stay(self) -> None:
        """It has proved itself, or there is nothing left to end."""
        if self.limit is not None:
            self.limit.cancel()
            self.limit = None


class PeerListener(HttpServer):
    """See the module. ``verbs`` may grow while it serves."""

    def __init__(
        self,
        agent_id: str,
        runs: Mapping[str, RunState],
        secret_of: Callable[[str], bytes | None],
        verbs: Mapping[str, PeerVerb],
    ) -> None:
        super().__init__()
        self._agent_id = agent_id
        self._runs = runs
        self._secret_of = secret_of
        self._verbs = verbs
        self._guests: dict[web.RequestHandler, _Guest] = {}
        self._listener: socket.socket | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve on a socket that is bound. Raises UsageError: certificates cannot be used."""
        server_tls()
        await self.prepare(MAX_PEER_MESSAGE_BYTES)
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listener = listener
        self._heed()

    async def stop(self) -> None:
        """Close everything. Answers under way are cut off."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for guest in self._guests.values():
            guest.end("the agent stops to listen")
        opening = [guest.opening for guest in self._guests.values() if guest.opening is not None]
        if opening:
            await asyncio.wait(opening, timeout=PROVE_S)
        await super().stop()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """What can be asked."""
        router.add_post(_handshake.HELLO_PATH, self._hello)
        router.add_post(_handshake.PROVE_PATH, self._prove)
        router.add_post("/v1/runs/{key}/{verb}", self._verb)

    def may_connect(self, transport: asyncio.BaseTransport) -> bool:
        """Anybody; nothing is answered before a proof."""
        return True

    def is_trusted(self, connection: web.RequestHandler) -> bool:
        """Whether it has proved that it knows a run's secret."""
        guest = self._guests.get(connection)
        return guest is not None and not guest.is_stranger

    def close_idle(self) -> None:
        """Close connections that say nothing, and forget those that are closed."""
        super().close_idle()
        for connection in [c for c, guest in self._guests.items() if guest.is_gone]:
            self._guests.pop(connection).may_stay()

    # -- connections -----------------------------------------------------------------------------

    def _heed(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        """One connection, counted before anything of it is read or answered."""
        try:
            sock, where = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # No descriptor left, or a connection that ended in the backlog.
            logger.warning("no connection was accepted: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE_S, self._heed)
            return
        try:
            sock.setblocking(False)
            self._take(sock, str(where[0]))
        except UsageError as error:
            logger.warning("refused a connection of %s: %s", where[0], error.what)
            sock.close()

    def _take(self, sock: socket.socket, host: str) -> None:
        tls = server_tls()  # certificates may have been renewed
        self.close_idle()
        if len(self._guests) >= MAX_PEER_CONNECTIONS:
            logger.warning("refused a connection of %s: %d are open", host, len(self._guests))
            sock.close()
            return
        strangers = [guest for guest in self._guests.values() if guest.is_stranger]
        last = who_goes(strangers, source_of(host), MAX_STRANGERS, MAX_STRANGERS_OF_ONE)
        if last is not None:
            last.end("others want to prove themselves")
        handler = self.handler()
        binding = tls.binding if tls else ""
        answerer = Answerer(self._agent_id, "control", self._secret_of, binding)
        guest = self._guests[handler] = _Guest(sock, host, handler, answerer)
        guest.opening = asyncio.get_running_loop().create_task(self._open(sock, handler, tls))
        self._limit(guest)

    def _limit(self, guest: _Guest) -> None:
        """A stranger has moments, whatever it says meanwhile."""
        if guest.limit is None:
            loop = asyncio.get_running_loop()
            guest.limit = loop.call_later(PROVE_S, guest.end, "it did not prove itself in time")

    async def _open(
        self, sock: socket.socket, handler: web.RequestHandler, tls: Tls | None
    ) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: handler,
                sock,
                ssl=tls.context if tls else None,
                ssl_handshake_timeout=PROVE_S if tls else None,
            )
        except OSError as error:  # of TLS, mostly: nothing was said yet
            logger.info("a connection did not begin: %s", error)
            return
        self.idle_since[handler] = time.monotonic()

    # -- requests --------------------------------------------------------------------------------

    def _guest(self, request: web.Request) -> _Guest:
        guest = self._guests.get(request.protocol)
        if guest is None or guest.is_over:
            raise AccessDenied("the connection has ended", state="nothing was done")
        return guest

    async def _word(self, request: web.Request, type_: type[Any]) -> Any:
        """A stranger's message: small, of a size that it says, and as it is."""
        length = request.content_length
        odd = length is None or length > MAX_SMALL_BYTES or "Content-Encoding" in request.headers
        if odd:
            raise FormatError("not a word of a peer", state="nothing was read")
        return await self.message(request, type_)

    async def _hello(self, request: web.Request) -> web.Response:
        hello = await self._word(request, Hello)
        guest = self._guest(request)
        welcome = guest.answerer.welcome(hello)
        self._limit(guest)  # it is a stranger again
        return reply(welcome)

    async def _prove(self, request: web.Request) -> web.Response:
        proof = await self._word(request, Proof)
        guest = self._guest(request)
        try:
            guest.answerer.check(proof)
        except AccessDenied:
            logger.warning("refused %s: it does not know the secret", request.remote)
            raise
        guest.may_stay()
        return reply({})

    async def _verb(self, request: web.Request) -> web.Response:
        # Before a byte of the message is read.
        answerer = self._guest(request).answerer
        if answerer.run_key != request.match_info["key"] or not answerer.still_knows:
            raise AccessDenied("nothing is answered before a proof", state="nothing was done")
        found = self._verbs.get(request.match_info["verb"])
        if found is None:
            raise web.HTTPNotFound
        type_, verb = found
        message = await self.message(request, type_)
        if not answerer.still_knows:
            raise AccessDenied("the job was started anew meanwhile", state="nothing was done")
        run = self._runs.get(request.match_info["key"])
        if run is None:
            raise AgentUnavailable("this agent has no such run any more")
        try:
            return reply(await asyncio.wait_for(verb(run, message), VERB_S))
        except asyncio.TimeoutError as error:
            raise AgentUnavailable("it took too long", timeout_s=VERB_S) from error
