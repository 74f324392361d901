"""How an agent starts, when it leaves, and what it tidies up then.

Knows the order: serve first, then look at what was left; leave only under the lock that a starting
trainer takes, so that nobody is left with a dead socket. Does not know what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from mtckpt import _events
from mtckpt.agent import address
from mtckpt.agent.address import Address
from mtckpt.agent.queue import Limits
from mtckpt.errors import AccessDenied, AgentUnavailable

if TYPE_CHECKING:
    from mtckpt.agent.pool import Pool
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.server import AgentServer
    from mtckpt.agent.tools import Tools

__all__ = ["run_own", "run_service"]

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 4 * 1024 * 1024
# What is being written when it is to end may end by then.
STOP_S = 10.0
_CLOSING_NAME = ".closing"
_SPAWN_TURNS = 200


class BoundedLog(logging.Handler):
    """Appends to a file, which becomes ``.1`` when it is large. stderr follows."""

    def __init__(self, path: str, max_bytes: int = MAX_LOG_BYTES) -> None:
        super().__init__()
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self._open()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        os.dup2(fd, 2)  # what the interpreter itself has to say

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._fd, f"{self.format(record)}\n".encode(errors="replace"))
            if os.fstat(self._fd).st_size > self._max_bytes:
                os.replace(self._path, f"{self._path}.1")
                self._open()
        except OSError:
            return  # a full disk under the log must not stop the agent


def run_own(fd: int, directory: str) -> int:
    """The agent of one user, on the socket that the trainer bound. Returns the exit status."""
    where = Address(directory)
    _log_to(where)
    listener = socket.socket(fileno=fd)
    listener.set_inheritable(False)
    return _run(Life(listener, where, service=False, owns_socket=True, stays=False))


def run_service(
    directory: str | None = None, group: str | None = None, grace_s: float | None = None
) -> int:
    """``mtckpt agent run``: on systemd's socket (LISTEN_FDS), or on one bound here.

    With ``group`` its members may connect and share the RAM tier; else only this user and root.
    ``grace_s`` is what SIGTERM leaves for bringing away what is here, None: MTCKPT_GRACE_S.
    """
    if directory is None:
        directory = os.environ.get("MTCKPT_RUNTIME_DIR") or address.SERVICE_DIRECTORY
    where = Address(os.path.abspath(directory), service=True)
    before_mask = os.umask(0o007 if group else 0o077)
    try:
        return _serve_at(where, group, grace_s)
    finally:
        os.umask(before_mask)  # whoever called is not ours, and may go on when we could not start


def _serve_at(where: Address, group: str | None, grace_s: float | None) -> int:
    service = group is not None
    if group:
        _join_group(where, group)
    else:
        address.make_directory(where.directory)
    inherited = _systemd_socket()
    if inherited is not None:
        life = Life(inherited, where, service=service, owns_socket=False, stays=True)
        return _run(life.with_grace(grace_s))
    with address.locked(where, STOP_S):
        if address.answers(where.socket_path, 1.0):
            raise AgentUnavailable(
                "another agent serves here already",
                state="nothing was started",
                actions=["stop it: mtckpt agent stop"],
                socket=where.socket_path,
            )
        listener = address.bind(where.socket_path, 0o660 if group else 0o600)
    life = Life(listener, where, service=service, owns_socket=True, stays=True)
    return _run(life.with_grace(grace_s))


def _join_group(where: Address, group: str) -> None:
    """The directory is ours, may be entered by the group, and is written by us alone."""
    import grp

    try:
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        os.makedirs(where.directory, mode=0o750, exist_ok=True)
        os.chown(where.directory, -1, gid)
        os.chmod(where.directory, 0o2750)
    except (KeyError, OSError) as error:
        raise AccessDenied(
            f"cannot serve group {group}: {error}",
            state="nothing was started",
            actions=[f"add this user to the group: usermod -aG {group} $USER"],
            path=where.directory,
        ) from error


def _systemd_socket() -> socket.socket | None:
    """The first socket that systemd passed to this process, if it did."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if int(os.environ.get("LISTEN_FDS") or 0) < 1:
        return None
    listener = socket.socket(fileno=3)
    listener.set_inheritable(False)
    return listener


def _log_to(where: Address) -> None:
    root = logging.getLogger()
    root.addHandler(BoundedLog(where.log_path))
    level = os.environ.get("MTCKPT_LOG_LEVEL", "INFO").upper()
    root.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO")
    sys.stdout = sys.stderr


def _run(life: Life) -> int:
    try:
        asyncio.run(life.run())
    except Exception:
        # The last line of defence: the log names it, and the next trainer starts another agent.
        logger.exception("the agent ends by an error")
        return 1
    return 0


class Life:
    """One agent from its first request to its last."""

    def __init__(
        self,
        listener: socket.socket,
        where: Address,
        *,
        service: bool,
        owns_socket: bool,
        stays: bool,
    ) -> None:
        self._listener = listener
        self._where = where
        self._service = service
        self._owns_socket = owns_socket
        self._stays = stays
        self._limits = Limits.from_environment()
        self._socket_id = _identity(where.socket_path)
        # When everything has to be over, once SIGTERM has come.
        self._end_s: float | None = None

    def with_grace(self, grace_s: float | None) -> Life:
        """So many seconds from SIGTERM to the end; None leaves what the environment says."""
        if grace_s is not None:
            self._limits = replace(self._limits, grace_s=grace_s)
        return self

    async def run(self) -> None:
        """Serve until there is nothing left to do, or somebody ends it."""
        from mtckpt.agent.pool import Pool
        from mtckpt.agent.tools import Tools

        pool = Pool(log_path=None if self._stays else self._where.log_path)
        tools = Tools(pool, self._limits, _events.events)
        await self._start_ram(tools, pool)
        # aiohttp's client loads the system's certificates when it is imported, which is a quarter
        # of all that a start takes; this process never connects to anybody.
        with _without_certificates():
            from mtckpt.agent.server import AgentServer
        from mtckpt.agent.registry import Registry
        from mtckpt.agent.verbs import Verbs

        registry = Registry(tools, self._where.directory, service=self._service)
        server = AgentServer(registry, Verbs(registry))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, server.stopped.set)
        loop.add_signal_handler(signal.SIGTERM, self._terminate, server, registry)
        self._write_pid()
        await server.start(self._listener)
        tools.start(registry.start(), "reading what was left")
        logger.info("agent %s serves at %s", registry.agent_id, self._where.socket_path)
        tools.events.emit("agent.started", pid=os.getpid())
        with contextlib.ExitStack() as lock:
            await self._until_done(server, registry, lock)
            registry.drainer.end()
            await registry.stop(self._stop_s())
            self._leave()
            await registry.peers.close()
            await server.stop()
        await tools.pool.close()
        await registry.held.close()
        logger.info("agent %s ends", registry.agent_id)

    def _terminate(self, server: AgentServer, registry: Registry) -> None:
        """SIGTERM: bring away what is here while there is time. A second one ends it at once."""
        grace_s = self._limits.grace_s
        if self._end_s is not None or grace_s <= 0:
            server.stopped.set()
            return
        self._end_s = time.monotonic() + grace_s

        async def drain() -> None:
            try:
                # A part of the time is kept for what is under way then.
                reason = "the agent of this node was terminated"
                await registry.drainer.drain(0.8 * grace_s, reason, ends=True)
            finally:
                server.stopped.set()

        registry.tools.start(drain(), "draining")

    def _stop_s(self) -> float:
        if self._end_s is None:
            return STOP_S
        return min(STOP_S, max(0.0, self._end_s - time.monotonic()))

    async def _start_ram(self, tools: Tools, pool: Pool) -> None:
        """Let the RAM tier's data process import what it needs while we do."""
        from mtckpt.agent import protocol, work

        worker = pool.worker(work.TierRef("ram", protocol.ram_base(), self._service, "ram"))
        timeout_s = self._limits.call_timeout_s
        tools.start(worker.call(work.Ping(), timeout_s=timeout_s), "starting RAM's data process")
        for _ in range(_SPAWN_TURNS):
            if pool.pids():
                return
            await asyncio.sleep(0.001)

    async def _until_done(
        self, server: AgentServer, registry: Registry, lock: contextlib.ExitStack
    ) -> None:
        idle_s = self._limits.idle_s
        pause_s = min(1.0, idle_s / 4)
        chores: asyncio.Task[None] | None = None
        while not server.stopped.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.stopped.wait(), pause_s)
            if chores is None or chores.done():  # they may wait for a disk: we do not
                chores = registry.tools.start(registry.housekeeping(), "housekeeping")
            server.close_idle()
            if self._stays:
                continue
            if self._is_out_of_reach() and not registry.drainer.reason:
                return
            if not registry.is_idle() or server.in_flight:
                continue
            if time.monotonic() - server.asked_s > idle_s and self._hide(lock):
                return

    def _hide(self, lock: contextlib.ExitStack) -> bool:
        """Take the socket out of sight, unless somebody is starting or connecting just now.

        From here on a trainer waits for the lock and then starts an agent of its own. One that had
        connected before is still in the backlog: then the socket is put back, and we stay.
        """
        try:
            lock.enter_context(address.locked(self._where, 0.0))
        except (AgentUnavailable, OSError):
            return False
        hidden = self._where.socket_path + _CLOSING_NAME
        try:
            os.rename(self._where.socket_path, hidden)
        except FileNotFoundError:
            return True  # somebody removed the directory: nobody can reach us any more
        if select.select([self._listener], [], [], 0)[0]:
            os.rename(hidden, self._where.socket_path)
            lock.close()
            return False
        return True

    def _is_out_of_reach(self) -> bool:
        """Whether somebody has removed our socket (a logout its directory, a sweep of /tmp). Nobody
        new reaches us then, and while we have the memory no other agent may: it goes on with that.
        """
        try:
            is_ours = _identity(self._where.socket_path) == self._socket_id
        except OSError:
            return False  # it may be there
        if self._socket_id is None or is_ours:
            return False
        logger.warning("%s is not there any more: ending", self._where.socket_path)
        self._owns_socket = False  # what is there now, or will be, is another's
        return True

    def _leave(self) -> None:
        """Remove our files, if they are still ours."""
        if not self._owns_socket:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._where.socket_path + _CLOSING_NAME)
        with contextlib.suppress(OSError, ValueError), open(self._where.pid_path) as file:
            if int(file.read().split()[0]) != os.getpid():
                return
        for path in (self._where.pid_path, self._where.socket_path):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _write_pid(self) -> None:
        """For people and tests; nothing is decided by it."""
        try:
            with open(self._where.pid_path, "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            logger.warning("no pid file: %s", error)


def _identity(path: str) -> tuple[int, int] | None:
    """Which file a path names; None if none."""
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return info.st_dev, info.st_ino


@contextlib.contextmanager
def _without_certificates() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    os.environ.update(dict.fromkeys(before, "/dev/null"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
