"""The agent's HTTP side for agents of other nodes: small messages of runs that both are of.

Knows the handshake, one for each connection, and that a connection speaks of one run. Does not know
what a verb does. Payload never passes here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from mtckpt import _handshake
from mtckpt._handshake import MAX_SMALL_BYTES, Answerer, Hello, Proof
from mtckpt._peer_tls import server_tls
from mtckpt.agent.serving import HttpServer, reply
from mtckpt.errors import AccessDenied, AgentUnavailable, FormatError

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from mtckpt.agent.runs import RunState

__all__ = ["MAX_PEER_MESSAGE_BYTES", "PeerListener", "PeerVerb"]

logger = logging.getLogger(__name__)

MAX_PEER_CONNECTIONS = 1024
MAX_PEER_MESSAGE_BYTES = 16 * 1024 * 1024
PROVE_S = 5.0
VERB_S = 60.0
BACKLOG = 512
# The type of a message, and what answers it: (run, message) -> reply.
PeerVerb = tuple[type[Any], "Callable[[RunState, Any], Awaitable[Any]]"]


@dataclass(eq=False)
class _Guest:
    """One connection. ``answerer.run_key`` is empty until it has proved."""

    answerer: Answerer
    since_s: float = field(default_factory=lambda: time.monotonic())


class PeerListener(HttpServer):
    """See the module. ``verbs`` may grow while it serves."""

    max_connections = MAX_PEER_CONNECTIONS

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
        self._binding = ""
        self._server: asyncio.AbstractServer | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve on a socket that is bound."""
        await self.prepare(MAX_PEER_MESSAGE_BYTES)
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        tls = server_tls()
        self._binding = tls.binding if tls else ""
        self._server = await loop.create_server(
            self.connection,
            sock=listener,
            backlog=BACKLOG,
            ssl=tls.context if tls else None,
            ssl_handshake_timeout=PROVE_S if tls else None,
        )

    async def stop(self) -> None:
        """Close everything. Answers under way are cut off."""
        if self._server is not None:
            self._server.close()
        await super().stop()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """What can be asked."""
        router.add_post(_handshake.HELLO_PATH, self._hello)
        router.add_post(_handshake.PROVE_PATH, self._prove)
        router.add_post("/v1/runs/{key}/{verb}", self._verb)

    def may_connect(self, transport: asyncio.BaseTransport) -> bool:
        """Anybody; nothing is answered before a proof."""
        return True

    def patience_s(self, connection: web.RequestHandler) -> float:
        """A stranger has moments from its first byte on, whatever it says meanwhile."""
        guest = self._guests.get(connection)
        if guest is None:
            return PROVE_S
        if guest.answerer.run_key:
            return super().patience_s(connection)
        return PROVE_S if time.monotonic() - guest.since_s < PROVE_S else 0.0

    def close_idle(self) -> None:
        """Close connections that say nothing, and forget those that are closed."""
        super().close_idle()
        for connection in [c for c in self._guests if c.transport is None]:
            del self._guests[connection]

    # -- requests --------------------------------------------------------------------------------

    def _guest(self, request: web.Request) -> _Guest:
        guest = self._guests.get(request.protocol)
        if guest is None:
            answerer = Answerer(self._agent_id, "control", self._secret_of, self._binding)
            guest = _Guest(answerer)
            self._guests[request.protocol] = guest
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
        return reply(self._guest(request).answerer.welcome(hello))

    async def _prove(self, request: web.Request) -> web.Response:
        proof = await self._word(request, Proof)
        try:
            self._guest(request).answerer.check(proof)
        except AccessDenied:
            logger.warning("refused %s: it does not know the secret", request.remote)
            raise
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
        run = self._runs.get(request.match_info["key"])
        if run is None:
            raise AgentUnavailable("this agent has no such run any more")
        try:
            return reply(await asyncio.wait_for(verb(run, message), VERB_S))
        except asyncio.TimeoutError as error:
            raise AgentUnavailable("it took too long", timeout_s=VERB_S) from error
