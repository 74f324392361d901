"""Nodes of a simulated cluster: shipped agents over places in memory, and what lies between them.

Knows how an agent is put together, what reaches it, and what can go wrong on the way: messages that
are late, lost or come twice, data processes that die, places that are mute or full, agents that are
killed. Every draw is from the world's seed. Holds no rule of the protocol: what agents and trainers
do about all this is in the package.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtckpt._events import EventStream
from mtckpt.agent import work
from mtckpt.agent.owners import Process as ProcessFacts
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.server import AgentServer
from mtckpt.agent.tools import OnProgress, Tools
from mtckpt.agent.verbs import Verbs
from mtckpt.errors import CheckpointError, TierUnavailable
from mtckpt.testing._commands import Commands
from mtckpt.testing._devices import Directory
from mtckpt.testing._files import Files
from mtckpt.testing._virtual import Fiber, Loop, ends

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress

__all__ = ["Agent", "Chances", "Node", "Process", "World"]

LIMITS = Limits(
    call_timeout_s=5.0,
    owed_s=600.0,
    rank_s=8.0,
    takeover_s=2.0,
    delete_grace_s=1.0,
)
HOUSEKEEPING_S = 1.0
# The Agent whose code is running, if it is one.
running: contextvars.ContextVar[Any] = contextvars.ContextVar("running", default=None)


@dataclass(slots=True)
class Chances:
    """How likely it is that something goes wrong with one message, or one command."""

    lost: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    died: float = 0.0
    unanswered: float = 0.0
    leased: float = 0.0


class World:
    """One simulation. ``problems`` are what no fault explains."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.loop = Loop()
        self.chances = Chances()
        self.store = Directory("store")
        self.nodes: list[Node] = []
        self.processes: dict[int, Process] = {}
        self.listeners: dict[tuple[str, int], Any] = {}  # a PeerListener each
        self.blocked: set[tuple[str, str]] = set()
        self.problems: list[str] = []
        self.log: Callable[[str], None] | None = None
        self._pidfds: dict[int, int] = {}
        self._numbers = iter(range(100, 1 << 30))
        self.loop.set_exception_handler(self._lost_error)
        self.loop.on_task = _note_task
        self.loop.on_watch = self._watched

    # -- kernel ----------------------------------------------------------------------------------

    def number(self) -> int:
        """One that nobody else has."""
        return next(self._numbers)

    def urandom(self, size_bytes: int) -> bytes:
        return self.random.randbytes(size_bytes)

    def note(self, text: str) -> None:
        """For who replays a seed."""
        if self.log is not None:
            self.log(f"{self.loop.time() - 1000.0:9.3f} {text}")

    def _lost_error(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, CheckpointError):
            return
        self.problems.append(f"{context.get('message')}: {error!r}")

    def open_pidfd(self, pid: int, start_ticks: int) -> int | None:
        process = self.processes.get(pid)
        if process is None or process.dead or process.start_ticks != start_ticks:
            return None
        fd = 1_000_000 + self.number()
        self._pidfds[fd] = pid
        return fd

    def peer_pidfd(self, process: Process) -> int:
        """Of who connected, whether it lives or not."""
        fd = 1_000_000 + self.number()
        self._pidfds[fd] = process.pid
        return fd

    def dup(self, fd: int) -> int:
        return self.peer_pidfd(self.processes[self._pidfds[fd]])

    def close_fd(self, fd: int) -> None:
        self._pidfds.pop(fd, None)

    def read_process(self, pid: int) -> ProcessFacts | None:
        process = self.processes.get(pid)
        if process is None or process.dead:
            return None
        state = "T" if process.stopped else "S"
        return ProcessFacts(pid, state, process.parent_pid, process.start_ticks, False)

    def ended(self, pid: int) -> None:
        """Whoever holds a descriptor of that process is told, a little later."""
        for fd, of in list(self._pidfds.items()):
            if of == pid:
                self.loop.call_later(self.random.random() * 0.05, self._tell, fd)

    def _watched(self, fd: int) -> None:
        if self.processes[self._pidfds[fd]].dead:
            self.loop.call_soon(self._tell, fd)

    def _tell(self, fd: int) -> None:
        if (callback := self.loop.watched.get(fd)) is not None:
            callback()

    # -- chance ----------------------------------------------------------------------------------

    def happens(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance

    def delay_s(self) -> float:
        """How long something small takes: mostly a millisecond, at times much longer."""
        draw = self.random.random()
        if self.happens(self.chances.late):
            return draw * 2.0
        return 0.0002 + 0.002 * draw

    def reaches(self, source: str, target: str) -> bool:
        return (source, target) not in self.blocked

    def keep_stopped(self) -> None:
        """From now on nothing happens in agents that are stopped, if there are any."""
        agents = [node.agent for node in self.nodes if node.agent is not None]
        self.loop.keeps = _keeps if any(agent.stopped for agent in agents) else None

    def close(self) -> None:
        """End everything that still runs."""
        for node in self.nodes:
            node.lose()
        for _ in range(20):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        self.problems.clear()
        self.loop.close()


class Node:
    """A machine: its memory, its disk, its agent and the processes of trainers."""

    def __init__(self, world: World, name: str, *, room: int = 1000) -> None:
        self.world = world
        self.name = name
        self.host = f"10.0.0.{len(world.nodes) + 1}"
        self.boot_id = f"boot-{world.number()}"
        self.ram = Directory("ram")
        self.disk = Directory("disk")
        self.files = Files()
        self.room = room
        self.commands = Commands(self.directory, self.memory_of, room)
        self.agent: Agent | None = None
        self.lost = False
        world.nodes.append(self)

    def __repr__(self) -> str:
        return f"Node({self.name})"

    def directory(self, ref: work.TierRef) -> Directory:
        """The memory behind a place."""
        if ref.kind == "store":
            return self.world.store
        return self.ram if ref.kind == "ram" else self.disk

    def memory_of(self, address: PeerAddress, run_key: str, secret: str) -> Directory:
        """Another node's, as its agent serves it. Raises TierUnavailable."""
        listener = self.world.listeners.get((address.host, address.control_port))
        if listener is None or not self.world.reaches(self.name, listener.agent.node.name):
            raise TierUnavailable(f"{address} does not answer", tier="peers")
        if listener.secret_of(run_key) != bytes.fromhex(secret):
            raise TierUnavailable(f"{address} knows another secret", tier="peers")
        memory: Directory = listener.agent.node.ram
        return memory

    @property
    def processes(self) -> list[Process]:
        return [p for p in self.world.processes.values() if p.node is self and not p.dead]

    def start_agent(self) -> Agent:
        """The one that serves here, started if there is none."""
        if self.agent is None:
            self.agent = Agent(self)
        return self.agent

    def kill_all(self) -> None:
        """Every process of it ends."""
        for process in self.processes:
            process.kill()
        if self.agent is not None:
            self.agent.kill()

    def reboot(self) -> None:
        """All processes and the memory are gone; the disk is not."""
        self.world.note(f"{self.name} boots again")
        self.kill_all()
        self.ram.clear()
        self.files.clear()
        self.boot_id = f"boot-{self.world.number()}"
        self.commands = Commands(self.directory, self.memory_of, self.room)

    def lose(self) -> None:
        """All of it is gone for good."""
        self.world.note(f"{self.name} is lost")
        self.kill_all()
        self.ram.clear()
        self.files.clear()
        self.disk.clear()
        self.lost = True


class Process:
    """A trainer's process: fibers that run on a node until they are killed."""

    def __init__(self, node: Node, parent_pid: int = 1) -> None:
        self.node = node
        self.world = node.world
        self.pid = node.world.number()
        self.start_ticks = node.world.number()
        self.parent_pid = parent_pid
        self.dead = self.stopped = False
        self.stopped_s = -1.0  # when it was so last
        self.fibers: list[Fiber] = []
        self.world.processes[self.pid] = self

    def __repr__(self) -> str:
        return f"Process({self.pid} on {self.node.name})"

    def spawn(self, target: Callable[[], None]) -> Fiber:
        """A thread of it."""
        fiber = Fiber(self.world.loop, target, self)
        self.fibers.append(fiber)
        return fiber

    def kill(self) -> None:
        """SIGKILL."""
        if self.dead:
            return
        self.dead = True
        for fiber in self.fibers:
            fiber.kill()
        self.world.ended(self.pid)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True
        for fiber in self.fibers:
            fiber.stop()

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped, self.stopped_s = False, self.world.loop.time()
        for fiber in self.fibers:
            fiber.go_on()


# -- agents ----------------------------------------------------------------------------------------


def _note_task(task: asyncio.Task[Any]) -> None:
    """It ends with the agent whose code has made it."""
    owner = running.get()
    if isinstance(owner, Agent):
        owner.note(task)
        if owner.dead:
            task.cancel()


def _keeps(call: Any) -> bool:
    """Whether a call is of an agent that is stopped, which has it then."""
    owner = call.context.get(running)
    if not isinstance(owner, Agent) or not owner.stopped:
        return False
    owner.kept.append(call)
    return True


class Agent:
    """A shipped control process, with all that it knows. It may be killed at any await."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.world = node.world
        self.dead = self.stopped = False
        self.kept: list[Any] = []  # calls that were to be made while it was stopped
        self.tasks: list[asyncio.Task[Any]] = []
        self._many_tasks = 64
        self.context = contextvars.copy_context()
        self.context.run(running.set, self)
        self.registry: Registry
        self.server: AgentServer
        self.context.run(self._make)

    def _make(self) -> None:
        self.tools = Tools(Pool(self), LIMITS, EventStream(20))
        self.registry = Registry(self.tools, "/nowhere", service=False)
        self.server = AgentServer(self.registry, Verbs(self.registry))
        self.world.note(f"{self.node.name}: agent {self.registry.agent_id} starts")
        if self.world.log is not None:
            self.tools.events.subscribe(
                lambda event: self.world.note(
                    f"{self.node.name}: "
                    + ", ".join(f"{k}={v}" for k, v in event.items() if k not in ("seq", "time"))
                )
            )
        self.world.loop.create_task(self._live())

    def __repr__(self) -> str:
        return f"Agent({self.node.name})"

    def note(self, task: asyncio.Task[Any]) -> None:
        """It ends with this process."""
        self.tasks.append(task)
        if len(self.tasks) > self._many_tasks:
            self.tasks = [each for each in self.tasks if not each.done()]
            self._many_tasks = 64 + 2 * len(self.tasks)

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run something in this process."""
        task: asyncio.Task[Any] = self.context.run(self.world.loop.create_task, coroutine)
        return task

    async def _live(self) -> None:
        await asyncio.sleep(0.05 + self.world.delay_s())
        self.tools.start(self.registry.start(), "reading what was left")
        chores: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            if chores is None or chores.done():
                chores = self.tools.start(self.registry.housekeeping(), "housekeeping")

    async def ask(self, body: bytes | None, path: str, process: Process) -> tuple[int, bytes]:
        """One request of a process of this node."""
        base, _, query = path.partition("?")
        parts = base.strip("/").split("/")
        request = Request(base, body, process, dict(q.split("=") for q in query.split("&") if q))
        request.match_info = {"key": parts[2] if len(parts) > 2 else "", "verb": parts[-1]}
        handler = {"open": self.server._post_open, "changes": self.server._get_changes}.get(
            parts[-1], self.server._post_verb
        )
        asked: Any = request
        response: Any = await self.server._answer_errors(asked, handler)
        return response.status, bytes(response.body)

    def kill(self) -> None:
        """SIGKILL: its data processes go with it."""
        if self.dead:
            return
        self.world.note(f"{self.node.name}: agent {self.registry.agent_id} is killed")
        self.go_on()
        self.dead = True
        self.node.agent = None
        self.node.commands = Commands(self.node.directory, self.node.memory_of, self.node.room)
        for place, listener in list(self.world.listeners.items()):
            if listener.agent is self:
                del self.world.listeners[place]
        for task in list(self.tasks):
            task.cancel()

    def stop(self) -> None:
        """SIGSTOP, to its data processes too."""
        self.stopped = True
        self.world.keep_stopped()

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.world.keep_stopped()
        kept, self.kept = self.kept, []
        self.world.loop.again(kept)


class Request:
    """As much of an HTTP request as the server looks at."""

    def __init__(
        self, path: str, body: bytes | None, process: Process, query: dict[str, str]
    ) -> None:
        self.path = path
        self.method = "GET" if body is None else "POST"
        self.query = query
        self.match_info: dict[str, str] = {}
        self.protocol = self
        self.transport = self
        self.process = process
        self._body = body or b""

    def read(self) -> asyncio.Future[bytes]:
        """All of it has come."""
        future: asyncio.Future[bytes] = self.process.world.loop.create_future()
        future.set_result(self._body)
        return future

    def is_closing(self) -> bool:
        return self.process.dead

    def get_extra_info(self, name: str) -> Process:
        del name
        return self.process


class Pool:
    """In the place of the data processes: commands are carried out here, and may go wrong."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._world = agent.world

    async def call(
        self,
        command: work.Command,
        timeout_s: float,
        on_progress: OnProgress | None = None,
        *,
        stall_s: float | None = None,
    ) -> work.Result:
        """See ``DataProcesses.call``."""
        del on_progress, stall_s
        if self._agent.dead:
            raise asyncio.CancelledError
        if isinstance(command, work.ServePeers):
            return work.Serving(command.port or 7000)
        for again in (False, True):
            task = asyncio.get_running_loop().create_task(self._carry(command, again))
            dies = self._world.happens(self._world.chances.died)
            limit_s = self._world.random.random() * 0.03 if dies else timeout_s
            done = await ends(task, limit_s)
            if done and not self._world.happens(self._world.chances.unanswered):
                return task.result()
            task.cancel()
            if not done and not dies:
                raise TierUnavailable(
                    f"no answer within {timeout_s:g} s", tier=self._label(command)
                )
        raise TierUnavailable("the data process ended twice", tier=self._label(command))

    def _label(self, command: work.Command) -> str:
        place = work.place_of(command)
        return place.label if place is not None else ""

    async def _carry(self, command: work.Command, again: bool) -> work.Result:
        world = self._world
        commands = self._agent.node.commands
        await asyncio.sleep(world.delay_s())
        is_slow = world.random.random() < 0.25

        async def pause() -> None:
            if is_slow:
                await asyncio.sleep(world.random.random() * 0.02)

        return await commands.carry(command, pause, again=again)

    async def forget(self, place: work.TierRef) -> None:
        del place

    async def keep(self, places: Iterable[work.TierRef]) -> None:
        del places

    async def close(self) -> None:
        return None
