"""What stands in the place of clocks, processes, sockets and files while a simulation runs.

Knows the names in the package that reach out of the process, one by one; a name that has gone is an
error. Nothing that decides is replaced.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mtckpt import (
    _foreign,
    _gathering,
    _handle,
    _joining,
    _progress,
    _restore,
    _run,
    _saver,
    _session,
    _turns,
    _writing,
)
from mtckpt.adapters import active_adapters
from mtckpt.agent import (
    address,
    beside,
    drains,
    fetching,
    holding,
    known_runs,
    owners,
    peers,
    protocol,
    registry,
    roots,
    server,
    verbs,
)
from mtckpt.testing._files import UID, open_of, os_of
from mtckpt.testing._restores import PeerPlace, restore_from
from mtckpt.testing._trainers import begin
from mtckpt.testing._virtual import Threads, Time
from mtckpt.testing._wires import (
    AgentClient,
    PatientClient,
    PeerClient,
    PeerListener,
    bind,
    ensure_agent,
)
from mtckpt.testing.cluster import Node, Process, World, running

if TYPE_CHECKING:
    from mtckpt.testing._devices import Directory

__all__ = ["Collected", "names_of"]

# A store's real connections have threads, which may be about while a story is played beside them.
_REAL = ("mtckpt.testing", "mtckpt.tiers._store_http")


class Collected(logging.Handler):
    """What agents log as an error is a bug: what can be expected is a warning at most."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR if world.log is None else logging.DEBUG)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.note(f"    {record.levelname} {record.getMessage()}")
        if record.levelno >= logging.ERROR:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                text += f": {record.exc_info[1]!r}"
            self._world.problems.append(f"logged as an error: {text}")


@dataclass
class Names:
    """Values for names of modules, put there for the time of a simulation."""

    values: list[tuple[Any, str, Any]] = field(default_factory=list)

    def put(self, module: Any, name: str, value: Any) -> None:
        is_there = hasattr(module, name) or hasattr(builtins, name)
        assert is_there, f"{module.__name__} has no {name} any more"
        self.values.append((module, name, value))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        before = [(module, name, vars(module).get(name, self)) for module, name, _ in self.values]
        try:
            for module, name, value in self.values:
                setattr(module, name, value)
            yield
        finally:
            for module, name, value in before:
                if value is self:  # one of all modules
                    delattr(module, name)
                else:
                    setattr(module, name, value)


def names_of(world: World) -> Names:
    """What stands in the place of clocks, processes, sockets and files, for this world."""
    names = Names()
    clock = Time(world.loop)
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("mtckpt.") or name.startswith(_REAL):
            continue
        if getattr(module, "time", None) is time:
            names.put(module, "time", clock)
        if getattr(module, "random", None) is random:
            names.put(module, "random", world.random)

    def spawn(target: Callable[[], None]) -> Any:
        fiber = world.loop.fiber
        assert fiber is not None
        process: Process = fiber.owner
        return process.spawn(target)

    threads = Threads(world.loop, spawn)
    for module in (_session, _turns, _handle, _run, _progress, _gathering):
        names.put(module, "threading", threads)
    _put_files(names, world)
    names.put(_session, "queue", threads)
    names.put(_session, "AgentClient", functools.partial(AgentClient, world))
    names.put(_session, "ensure_agent", ensure_agent(world))
    names.put(_session, "start_ticks", lambda pid: world.processes[pid].start_ticks)
    names.put(os, "urandom", world.urandom)
    names.put(os, "environ", {})
    names.put(peers, "domains_here", dict)
    names.put(owners, "read_process", world.read_process)
    names.put(owners, "open_pidfd", world.open_pidfd)
    names.put(owners, "peer_pidfd", world.peer_pidfd)
    for module in (owners, server, verbs):
        names.put(module, "os", _os_of(world))
    names.put(roots, "aside", _at_once)
    names.put(address, "peer_of", lambda process: address.Peer(process.pid, 0, 0))
    names.put(registry, "boot_id", lambda: _node_here().boot_id)
    names.put(protocol, "ram_base", lambda: "/")
    names.put(peers, "PeerClient", PeerClient)
    names.put(peers, "PeerListener", PeerListener)
    names.put(peers, "_bind", bind(world))
    names.put(peers, "choose_host", lambda *_: _node_here().host)
    names.put(_run, "LocalTier", _local_tier(world))
    names.put(_run, "tier_label", lambda _: "ram")
    names.put(_run, "open_store", lambda *_, **__: world.store)
    names.put(_restore, "restore_from", restore_from(world))
    names.put(_writing, "Writing", begin(world))
    names.put(_gathering, "PeerClient", functools.partial(PatientClient, world))
    names.put(_gathering, "PeerTier", functools.partial(PeerPlace, world))
    active_adapters()
    return names


def _put_files(names: Names, world: World) -> None:
    """What stands in the place of the file system, and of what is known of a machine by it."""

    def here() -> Node:
        fiber = world.loop.fiber
        node: Node = (running.get() if fiber is None else fiber.owner).node
        return node

    for module in (_joining, beside, drains, holding, known_runs, roots):
        names.put(module, "os", os_of(lambda: here().files))
    for module in (drains, holding, known_runs, roots):
        names.put(module, "open", open_of(lambda: here().files))
    for module in (_joining, _run, registry):
        names.put(module, "socket", SimpleNamespace(gethostname=lambda: here().name))
    names.put(known_runs, "trusted_uids", lambda _: {UID})
    names.put(roots, "lock", lambda _: _Held())
    names.put(_foreign, "hints", lambda _: [])
    names.put(_run, "is_directory", lambda *_: True)
    names.put(_run, "in_time", _in_time)
    names.put(_saver, "left_bytes_at", lambda _: 1 << 30)
    names.put(_saver, "bytes_below", lambda _: 0)
    names.put(fetching, "check_room", lambda *_: None)


class _Held:
    """A lock that nobody else wants."""

    def is_of(self, _: str) -> bool:
        return True

    def close(self) -> None:
        return None


def _in_time(work: Callable[[], Any], _: float, *, name: str) -> list[Any]:
    """Nothing hangs that is not asked of an agent."""
    del name
    return [work()]


async def _at_once(work: Callable[[], Any], *_: Any) -> Any:
    return work()


def _node_here() -> Node:
    node: Node = running.get().node
    return node


def _local_tier(world: World) -> Callable[..., Directory]:
    def open_(path: str, *, name: str, **_: Any) -> Directory:
        del path
        fiber = world.loop.fiber
        assert fiber is not None
        node: Node = fiber.owner.node
        return node.ram if name == "ram" else node.disk

    return open_


def _os_of(world: World) -> SimpleNamespace:
    """In the place of ``os`` where descriptors of processes are closed."""
    own = {"close": world.close_fd, "dup": world.dup, "urandom": world.urandom}
    return SimpleNamespace(**{**vars(os), **own})
