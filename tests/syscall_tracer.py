"""Counts the system calls of a running process, over all its threads; makes one the last or fail.

Like strace's ``inject``, with what strace lacks: one count for all threads (strace counts in each),
only calls on files below a directory, and a list of the calls. As a program it is the tracer: one
process with one thread, since ptrace answers only the thread that attached. Linux on x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "mmap": 9, "munmap": 11, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "dup": 32, "sendfile": 40, "socket": 41,
    "connect": 42, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "bind": 49,
    "listen": 50, "socketpair": 53, "clone": 56, "vfork": 58, "kill": 62, "fcntl": 72, "flock": 73,
    "fsync": 74, "fdatasync": 75, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84,
    "link": 86, "unlink": 87, "chmod": 90, "fchmod": 91, "getdents64": 217, "exit_group": 231,
    "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "fallocate": 285, "accept4": 288, "preadv": 295, "pwritev": 296, "renameat2": 316,
    "preadv2": 327, "pwritev2": 328, "clone3": 435,
}  # fmt: skip
READS = frozenset({"read", "pread64", "readv", "preadv", "preadv2"})
# Between two of these a process changes nothing that another one, or the disk, can see.
SEEN_OUTSIDE = frozenset(NUMBERS) - READS - {"getdents64"}
# What a tier's calls on its own files are; these are made to fail.
ON_FILES = frozenset({
    "openat", "mkdir", "mkdirat", "write", "pwrite64", "pwritev", "fallocate", "ftruncate",
    "fsync", "fdatasync", "close", "linkat", "renameat", "rename", "unlinkat", "unlink", "rmdir",
})  # fmt: skip

# Commands of fcntl that lock nothing: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC.
_OWN_FCNTL = frozenset({0, 1, 2, 3, 4, 1030})
_MAKING = os.O_CREAT | os.O_TRUNC  # O_TMPFILE is told by its own bit: the rest of it is O_DIRECTORY
_TMPFILE = 0o20000000

_PATH_FIRST = frozenset({"open", "mkdir", "rmdir", "unlink", "rename", "link", "chmod"})
_AT = frozenset({"openat", "mkdirat", "unlinkat", "renameat", "linkat", "renameat2"})
_NAMES = {number: name for name, number in NUMBERS.items()}

SEIZE, INTERRUPT, RESUME, LISTEN, CALL_INFO, POKE = 0x4206, 0x4207, 24, 0x4208, 0x420E, 6
OPTIONS = 1 | 8  # calls told apart from signals; new threads, not new processes, are traced too
CALL_STOP = signal.SIGTRAP | 0x80
EVENT_STOP = 128
WAIT_ALL = 0x40000000
ORIG_RAX, RAX = 15 * 8, 10 * 8
AT_FDCWD = -100


def why_not() -> str:
    """Why processes cannot be traced here; empty if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "needs Linux on x86-64"
    return "" if os.geteuid() == 0 else "needs root, to trace what is not a child"


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was counted; ``path`` is of its file, as far as that is known."""

    name: str
    path: str
    failed: bool = False
    changes: bool = True


class Tracer:
    """The tracing process, from the test's side.

    Args:
        pid: traced with all its threads, those to come too.
        kill: SIGKILL before the call of that number, from 1; 0 for never.
        fail: that call fails with ``error``, and ``times`` in all (0: for ever).
        below: only calls on files below this directory count.
        changing: only calls that change anything for others count, see ``_Program._changes``.
        along: killed at the same moment, before the process itself.
    """

    def __init__(
        self,
        pid: int,
        *,
        calls: frozenset[str] = SEEN_OUTSIDE,
        kill: int = 0,
        fail: int = 0,
        error: int = errno.EIO,
        times: int = 1,
        below: str = "",
        changing: bool = False,
        along: Sequence[int] = (),
    ) -> None:
        self.pid = pid
        spec = {"pid": pid, "calls": sorted(calls), "kill": kill, "fail": fail, "error": error,
                "times": times, "below": below, "changing": changing,
                "along": list(along)}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, json.dumps(spec)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 30.0)[0], "the tracer hangs"
        line = self._process.stdout.readline()
        if line != b"ready\n":
            self.stop()
            raise ProcessLookupError(f"could not trace {pid}: {line!r}")

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the traced process has, waited for so long."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> list[Call]:
        """Let the process go on untraced; the calls that were counted, in order."""
        for _ in range(60):
            # Again and again: one that comes right before a wait does not end that wait.
            self._process.send_signal(signal.SIGTERM)
            try:
                out = self._process.communicate(timeout=0.5)[0]
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            self._process.kill()
            self._process.communicate()
            raise TimeoutError(f"the tracer of {self.pid} does not end")
        lines = out.splitlines()
        return [Call(*words) for words in json.loads(lines[-1])] if lines else []

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()  # what it traces goes on: it was not told to end with its tracer
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


# -- the program -----------------------------------------------------------------------------------


class _CallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, for a call's entry."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64 * 2),
    )


class _Stopped(Exception):
    pass


class _Program:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.pid: int = spec["pid"]
        self.kill: int = spec["kill"]
        self.fail: int = spec["fail"]
        self.error: int = spec["error"]
        self.last = spec["fail"] + spec["times"] - 1 if spec["times"] else float("inf")
        self.below: str = spec["below"]
        self.changing: bool = spec["changing"]
        self.along: list[int] = spec["along"]
        self.wanted = {NUMBERS[name] for name in spec["calls"]}
        self.log: list[list[Any]] = []
        self.tids: set[int] = set()
        self.failing: dict[int, int] = {}
        self.waiting = False
        self.stopping = False
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.restype = ctypes.c_long
        self._ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._info = _CallInfo()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._stop)
        self._attach()
        os.write(1, b"ready\n")
        try:
            while self.tids:
                self._step()
        except _Stopped:
            pass
        # The kernel lets go of everything that is traced when this process ends.
        sys.stdout.write(json.dumps(self.log) + "\n")
        sys.stdout.flush()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self.waiting and not self.failing:
            raise _Stopped

    def _attach(self) -> None:
        while True:
            tids = {int(name) for name in os.listdir(f"/proc/{self.pid}/task")} - self.tids
            if not tids:
                break
            for tid in tids:
                self.tids.add(tid)
                if self._ptrace(SEIZE, tid, None, OPTIONS) == 0:
                    self._ptrace(INTERRUPT, tid, None, None)
        # Every thread stops once; only then does each of its calls count.
        for tid in list(self.tids):
            try:
                _, status = os.waitpid(tid, WAIT_ALL)
            except ChildProcessError:
                self.tids.discard(tid)
                continue
            self._take(tid, status)

    def _step(self) -> None:
        if self.stopping and not self.failing:
            raise _Stopped
        self.waiting = True
        try:
            tid, status = os.waitpid(-1, WAIT_ALL)
        except ChildProcessError:
            self.tids.clear()
            return
        finally:
            self.waiting = False
        self._take(tid, status)

    def _take(self, tid: int, status: int) -> None:
        if not os.WIFSTOPPED(status):
            self.tids.discard(tid)
            self.failing.pop(tid, None)
            return
        self.tids.add(tid)
        number, event = os.WSTOPSIG(status), status >> 16
        if number == CALL_STOP:
            self._call(tid)
            self._ptrace(RESUME, tid, None, None)
        elif event == EVENT_STOP and number != signal.SIGTRAP:
            self._ptrace(LISTEN, tid, None, None)  # stopped by a signal, and stays so
        else:
            self._ptrace(RESUME, tid, None, None if event else number)

    def _call(self, tid: int) -> None:
        size = ctypes.sizeof(self._info)
        if self._ptrace(CALL_INFO, tid, size, ctypes.addressof(self._info)) <= 0:
            return
        if self._info.op == 2:
            if (code := self.failing.pop(tid, 0)) != 0:
                self._ptrace(POKE, tid, RAX, (1 << 64) - code)
            return
        if self._info.op != 1 or self._info.number not in self.wanted:
            return
        name = _NAMES[self._info.number]
        path = self._path(tid, name)
        if self.below and not f"{path}/".startswith(f"{self.below}/"):
            return
        changes = self._changes(name)
        if self.changing and not changes:
            return
        self.log.append([name, path, False, changes])
        count = len(self.log)
        if count == self.kill:
            for pid in (*self.along, self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.fail and self.fail <= count <= self.last:
            self.log[-1][2] = True
            self.failing[tid] = self.error
            if name != "close":  # a close that fails has closed
                self._ptrace(POKE, tid, ORIG_RAX, (1 << 64) - 1)

    def _changes(self, name: str) -> bool:
        """Whether others, or the disk, can tell that the call was made.

        Not of a file that is opened and not made, and not of a descriptor that is closed without a
        lock on it, and was only read: a kill right after such a call finds what one right before it
        does. Sockets and pipes have somebody at the other end.
        """
        args = self._info.args
        if name in ("mmap", "munmap", "dup"):
            return False
        if name == "fcntl":
            return args[1] not in _OWN_FCNTL
        if name == "openat":
            return bool(args[2] & (_MAKING | _TMPFILE))
        if name == "close":
            return self._is_noticed(ctypes.c_int32(args[0]).value)
        return True

    def _is_noticed(self, fd: int) -> bool:
        """Whether anybody notices that this descriptor is closed."""
        try:
            target = os.readlink(f"/proc/{self.pid}/fd/{fd}")
            with open(f"/proc/{self.pid}/fdinfo/{fd}") as file:
                told = file.read()
        except OSError:
            return True
        flags = next(int(line.split()[1], 8) for line in told.splitlines() if "flags:" in line)
        return not target.startswith("/") or "lock:" in told or bool(flags & os.O_ACCMODE)

    def _path(self, tid: int, name: str) -> str:
        args = self._info.args
        if name in _PATH_FIRST:
            return self._text(tid, args[0])
        if name in ("mmap", "munmap", "socket", "clone", "vfork", "kill", "exit_group", "clone3"):
            return ""
        fd = ctypes.c_int32(args[0]).value
        base = ""
        if fd != AT_FDCWD:
            try:
                base = os.readlink(f"/proc/{self.pid}/fd/{fd}")
            except OSError:
                return ""
        return os.path.join(base, self._text(tid, args[1])) if name in _AT else base

    def _text(self, tid: int, address: int) -> str:
        try:
            with open(f"/proc/{tid}/mem", "rb", 0) as memory:
                data = os.pread(memory.fileno(), 256, address)
        except OSError:
            return ""
        return os.fsdecode(data.partition(b"\0")[0])


if __name__ == "__main__":
    _Program(json.loads(sys.argv[1])).run()
