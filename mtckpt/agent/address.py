"""Where the node agent is reached: its directory, socket, lock, pid file and log.

Knows which directory may be trusted, how a socket is bound and connected however long its path
is, and who is at the other end. Does not start anything. Promises nothing against a process of
the same user, nor against root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mtckpt.agent import holding, protocol
from mtckpt.errors import AccessDenied, AgentUnavailable, UnsupportedPlatform

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Address",
    "Peer",
    "bind",
    "connect",
    "find",
    "locked",
    "make_directory",
    "open_private",
    "peer_of",
]

SERVICE_DIRECTORY = "/run/mtckpt"
LOCK_NAME = "agent.lock"
# sun_path has 108 bytes, the last of them NUL.
MAX_SOCKET_PATH_BYTES = 107
BACKLOG = 128
_POLL_S = 0.005
_PEER = struct.Struct("=iII")


@dataclass(frozen=True, slots=True)
class Address:
    """One agent's directory. ``service`` says that somebody else starts it: we never do."""

    directory: str
    service: bool = False

    @property
    def socket_path(self) -> str:
        return os.path.join(self.directory, protocol.SOCKET_NAME)

    @property
    def lock_path(self) -> str:
        return os.path.join(self.directory, LOCK_NAME)

    @property
    def pid_path(self) -> str:
        return os.path.join(self.directory, protocol.PID_NAME)

    @property
    def log_path(self) -> str:
        return os.path.join(self.directory, protocol.LOG_NAME)


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel has it. ``pid`` is 0 in a foreign namespace."""

    pid: int
    uid: int
    gid: int


def find() -> Address:
    """The agent that this process is to use.

    MTCKPT_AGENT_SOCKET names a service's socket; MTCKPT_RUNTIME_DIR an own agent's directory; with
    neither, a service at /run/mtckpt if there is one that may be used, else this user's own: the
    one that has this user's memory, from wherever it was started.
    """
    if sys.platform == "win32" or not hasattr(socket, "AF_UNIX"):
        raise UnsupportedPlatform("the node agent needs unix sockets", state="nothing was done")
    if chosen := os.environ.get("MTCKPT_AGENT_SOCKET"):
        return Address(os.path.dirname(os.path.abspath(chosen)), service=True)
    if not os.environ.get("MTCKPT_RUNTIME_DIR"):
        service = Address(SERVICE_DIRECTORY, service=True)
        if os.access(service.socket_path, os.R_OK | os.W_OK):
            return service
        other = Address(holding.noted(protocol.ram_base()))
        if other.directory and _listens(other):
            return other
    return Address(os.path.abspath(protocol.runtime_dir()))


def _listens(own: Address) -> bool:
    """Whether an agent is there; the note that says so may be old, and the place another's now."""
    with contextlib.suppress(AccessDenied, OSError):
        is_ours = os.lstat(own.directory).st_uid == os.geteuid()
        return is_ours and answers(own.socket_path, 1.0)
    return False


def make_directory(path: str) -> None:
    """Make the directory of an own agent, 0700, or check that the one there is ours alone.

    Raises AccessDenied, with what to do, for a link, a foreign owner or one that others can write.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # a umask may have taken our own rights as well
    except FileExistsError:
        pass  # made before, or by another rank just now: the checks below are the same
    except OSError as error:
        raise _refused(path, f"cannot be made: {error.strerror}") from error
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise _refused(
            path, "is not a directory" if not stat.S_ISLNK(info.st_mode) else "is a link"
        )
    if info.st_uid != os.geteuid():
        raise _refused(path, f"belongs to user {info.st_uid}, not to {os.geteuid()}")
    if info.st_mode & 0o022:
        raise _refused(path, f"can be written by others (mode {stat.S_IMODE(info.st_mode):04o})")


def _refused(path: str, why: str) -> AccessDenied:
    return AccessDenied(
        f"the agent's directory {why}",
        state="no agent was started",
        actions=[
            f"remove {path}, or make it yours alone: chown {os.geteuid()} and chmod 700",
            "or set MTCKPT_RUNTIME_DIR to a directory of yours",
        ],
        path=path,
    )


@contextlib.contextmanager
def _named(path: str) -> Iterator[str]:
    """A name for a socket's path that fits sockaddr_un: long ones go through /proc/self/fd."""
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def connect(path: str, timeout_s: float) -> socket.socket:
    """A connection to the agent. OSError if there is none; TimeoutError if it does not accept."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(timeout_s, 0.001))
        with _named(path) as name:
            deadline_s = time.monotonic() + timeout_s
            while (code := connection.connect_ex(name)) != 0:
                if code != errno.EAGAIN:
                    raise OSError(code, os.strerror(code), path)
                if time.monotonic() >= deadline_s:  # it is there, and its backlog stays full
                    raise TimeoutError(f"{path} does not accept connections")
                time.sleep(_POLL_S)
    except BaseException:
        connection.close()
        raise
    return connection


def bind(path: str, mode: int = 0o600) -> socket.socket:
    """Bind and listen at ``path``, in place of a socket that nobody listens on any more.

    The caller holds the lock and has found that nobody answers.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise _refused(os.path.dirname(path), f"has a {os.path.basename(path)} of another kind")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _named(path) as name:
            # A connection made between bind and chmod would be of the directory's owner or root.
            listener.bind(name)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def answers(path: str, timeout_s: float) -> bool:
    """Whether an agent listens there. One that is stopped or busy does."""
    try:
        connect(path, timeout_s).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except TimeoutError:
        return True
    except PermissionError as error:
        raise AccessDenied(
            f"may not connect to the agent: {error.strerror}", path=path, state="nothing was done"
        ) from error
    return True


def open_private(path: str, flags: int) -> int:
    """A descriptor of a file that is ours alone to read and write, whatever the umask. OSError."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(PermissionError):  # somebody else's, who has let us in
        os.fchmod(fd, 0o600)
    return fd


@contextlib.contextmanager
def locked(address: Address, timeout_s: float) -> Iterator[None]:
    """Held by whoever starts an agent in this directory, and by one that is leaving."""
    fd = open_private(address.lock_path, os.O_RDWR)
    try:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline_s:
                    raise AgentUnavailable(
                        "another process has been starting the agent for too long",
                        state="nothing was done",
                        actions=[f"see who holds it: fuser {address.lock_path}"],
                        socket=address.socket_path,
                        timeout_s=timeout_s,
                    ) from error
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def peer_of(connection: socket.socket) -> Peer:
    """Who connected, or who listens: the kernel noted it at connect() or listen()."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return Peer(*_PEER.unpack(raw))


def trusted_uids(path: str) -> set[int]:
    """Users whose agent we talk to: ourselves, root, and, where the directory was chosen or is that
    of services, its owner if nobody else can write to it: the user that a service runs as.

    The directory of an own agent may lie in /tmp, where anybody can make it before us.
    """
    uids = {os.geteuid(), 0}
    chosen = os.environ.get("MTCKPT_AGENT_SOCKET") or os.environ.get("MTCKPT_RUNTIME_DIR")
    if not chosen and os.path.dirname(path) != SERVICE_DIRECTORY:
        return uids
    try:
        info = os.lstat(os.path.dirname(path))
    except OSError:
        return uids
    if stat.S_ISDIR(info.st_mode) and not info.st_mode & 0o022:
        uids.add(info.st_uid)
    return uids
