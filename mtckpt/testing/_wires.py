"""What lies between the processes of a simulated cluster: requests, late, lost or twice.

Knows who can reach whom. Stands in the place of sockets and HTTP on both sides; what is asked and
answered is the package's own, encoded as it is on a wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from mtckpt.agent import protocol
from mtckpt.errors import AccessDenied, AgentUnavailable, CheckpointError
from mtckpt.testing._virtual import Fiber, ends
from mtckpt.testing.cluster import Agent, Node, World, running

__all__ = [
    "AgentClient",
    "PatientClient",
    "PeerClient",
    "PeerListener",
    "Socket",
    "bind",
    "ensure_agent",
]

# -- between processes of a node -------------------------------------------------------------------


def _fiber(world: World) -> Fiber:
    assert world.loop.fiber is not None
    return world.loop.fiber


class AgentClient:
    """In the place of the client by which a trainer asks its agent."""

    def __init__(self, world: World, socket_path: str, timeout_s: float = 10.0) -> None:
        self.world = world
        self.socket_path = socket_path
        self.timeout_s = timeout_s

    def call(
        self, path: str, message: Any, reply_type: type[Any], timeout_s: float | None = None
    ) -> Any:
        """See ``client.AgentClient.call``."""
        fiber, world = _fiber(self.world), self.world
        body = None if message is None else protocol.encode(message)
        fiber.sleep(world.delay_s())
        agent = fiber.owner.node.agent
        if agent is None:
            raise AgentUnavailable("no agent listens here")
        task = agent.start(agent.ask(body, path, fiber.owner))
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        status, data = _found(task, limit_s, is_done=fiber.pause(task, limit_s))
        fiber.sleep(world.delay_s())
        if status == 200:
            return protocol.decode(data, reply_type)
        raise protocol.error_from_wire(protocol.decode(data, protocol.WireError))

    def close(self) -> None:
        return None


def _found(task: asyncio.Task[Any], timeout_s: float, *, is_done: bool) -> Any:
    """What another process answered, if it lives and is in time. It goes on if it is not."""
    if not is_done:
        raise AgentUnavailable(f"no answer within {timeout_s:g} s")
    if task.cancelled():
        raise AgentUnavailable("the agent ended before it answered")
    return task.result()


def ensure_agent(world: World) -> Callable[[float], str]:
    """In the place of what starts an agent where there is none."""

    def ensure(timeout_s: float) -> str:
        del timeout_s
        node: Node = _fiber(world).owner.node
        if node.agent is None:
            _fiber(world).sleep(world.random.random() * 0.3)
        node.start_agent()
        return node.name

    return ensure


# -- between agents --------------------------------------------------------------------------------


class Socket:
    """A bound socket, as far as anybody asks."""

    def __init__(self, host: str, port: int) -> None:
        self.place = (host, port)

    def getsockname(self) -> tuple[str, int]:
        return self.place


class PeerListener:
    """In the place of the server that agents of other nodes ask."""

    def __init__(
        self,
        agent_id: str,
        runs: Any,
        secret_of: Callable[[str], bytes | None],
        verbs: Any,
    ) -> None:
        del agent_id
        self.agent: Agent = running.get()
        self.runs = runs
        self.secret_of = secret_of
        self.verbs = verbs
        self._place: tuple[str, int] | None = None

    async def start(self, listener: Socket) -> None:
        self._place = listener.place
        self.agent.world.listeners[listener.place] = self

    async def stop(self) -> None:
        if self._place is not None:
            self.agent.world.listeners.pop(self._place, None)

    def close_idle(self) -> None:
        return None


class PeerClient:
    """In the place of what asks agents of other nodes. ``call`` is awaited."""

    def __init__(
        self,
        address: protocol.PeerAddress,
        run_key: str,
        secret: bytes,
        here: Node | None = None,
    ) -> None:
        self.address = address
        self.run_key = run_key
        self._secret = secret
        self._here: Node = here or running.get().node
        self._world = self._here.world

    async def call(self, verb: str, message: Any, reply_type: type[Any], timeout_s: float) -> Any:
        """See ``peer_client.PeerClient.call``."""
        world = self._world
        body = protocol.encode(message)
        await asyncio.sleep(world.delay_s())
        listener = world.listeners.get((self.address.host, self.address.control_port))
        source = self._here.name
        if listener is None:
            raise AgentUnavailable(f"the agent of {self.address}: refused")
        target = listener.agent.node.name
        if not world.reaches(source, target) or world.happens(world.chances.lost):
            await asyncio.sleep(timeout_s)
            raise AgentUnavailable(f"the agent of {self.address}: did not answer in time")
        task = listener.agent.start(self._heard(listener, verb, body))
        if world.happens(world.chances.twice):
            world.loop.call_later(
                world.delay_s() * 3,
                lambda: listener.agent.start(self._again(listener, verb, body)),
            )
        answer = _found(task, timeout_s, is_done=await ends(task, timeout_s))
        await asyncio.sleep(world.delay_s())
        if not world.reaches(target, source) or world.happens(world.chances.lost):
            await asyncio.sleep(timeout_s)
            raise AgentUnavailable(f"the agent of {self.address}: did not answer in time")
        return protocol.decode(answer, reply_type)

    async def _heard(self, listener: PeerListener, verb: str, body: bytes) -> bytes:
        if listener.secret_of(self.run_key) != self._secret:
            raise AccessDenied("it does not know the secret of that run")
        type_, answer = listener.verbs[verb]
        run = listener.runs.get(self.run_key)
        if run is None:
            raise AgentUnavailable("this agent has no such run any more")
        return protocol.encode(await answer(run, protocol.decode(body, type_)))

    async def _again(self, listener: PeerListener, verb: str, body: bytes) -> None:
        with contextlib.suppress(CheckpointError):
            await self._heard(listener, verb, body)

    def close(self) -> None:
        return None


class PatientClient:
    """The same for a trainer, which waits for the answer."""

    def __init__(
        self, world: World, address: protocol.PeerAddress, run_key: str, secret: bytes
    ) -> None:
        self._fiber = _fiber(world)
        self._loop = world.loop
        self._asks = PeerClient(address, run_key, secret, self._fiber.owner.node)

    def call(self, verb: str, message: Any, reply_type: type[Any], timeout_s: float) -> Any:
        """See ``peer_client.PeerClient.call``."""
        task = self._loop.create_task(self._asks.call(verb, message, reply_type, timeout_s))
        self._fiber.pause(task, None)
        return task.result()

    def close(self) -> None:
        return None


def bind(world: World) -> Callable[..., Socket]:
    """In the place of what binds a socket; at another port if that one is taken."""

    def bound(host: str, port: int = 0, *, insists: bool = False) -> Socket:
        taken = (host, port) in world.listeners or world.happens(0.1)
        if not port or (taken and not insists):
            port = world.number()
        return Socket(host, port)

    return bound
