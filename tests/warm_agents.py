"""Agents that a test process starts, forked from one that has imported what an agent needs.

Most of what an agent's start takes is to import, and many hundred tests start one. From its first
line on it is the program that it always is. A fresh program is started all the same wherever it
would have another environment or inherit something else than the process it would be forked from,
wherever a trainer is a process of its own, and in tests that ask for ``fresh_agents``.

As a program this is the process that agents are forked from. It ends when the test process does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtckpt._crash import CRASH_VARIABLE
from mtckpt.agent import __main__ as program
from mtckpt.agent import life, spawn, status

__all__ = ["WarmAgents"]

# What an agent imports while it starts.
WARM = ("registry", "server", "tools", "verbs", "worker")
MAX_BYTES = 1 << 18
TIMEOUT_S = 60.0
# What a child has from the thread that starts it, as /proc tells it.
INHERITED = ("Umask", "Uid", "Gid", "Groups", "Sig", "Cap", "NoNew", "Seccomp", "Cpus_a", "Mems_a")
OF_OTHERS = ("SigQ", "SigPnd", "SigCgt")


class WarmAgents:
    """What ``mtckpt.agent.spawn`` has in place of the module ``subprocess``."""

    def __init__(self, born: Callable[[int, str], None]) -> None:
        self._born = born
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "mtckpt.agent"]
        self._environment = _others(spawn.child_environment(os.environ, spawn._package_parent()))
        self._like = (os.getpid(), self._command, self._environment, _inherited())
        self._really = subprocess.Popen
        self.module = types.SimpleNamespace(**{**vars(subprocess), "Popen": self._start})

    def close(self) -> None:
        """End the process that agents are forked from; agents go on."""
        if self._socket is not None and self._process is not None:
            self._socket.shutdown(socket.SHUT_RDWR)  # forks of this process have it as well
            self._socket.close()
            self._process.wait(TIMEOUT_S)

    def _start(self, command: Sequence[str], **options: Any) -> Any:
        """As ``Popen``; where it forks, the agent's first process has ended when this returns."""
        with self._lock:
            environment = options["env"]
            if CRASH_VARIABLE in environment or subprocess.Popen is not self._really:
                return subprocess.Popen(command, **options)
            if self._like != (os.getpid(), command[:3], _others(environment), _inherited()):
                return subprocess.Popen(command, **options)
            if self._socket is None:
                self._begin()
            code, pid = self._forked(command[3:], environment, options)
        if pid:
            self._born(pid, environment.get("MTCKPT_RUNTIME_DIR", ""))
        return types.SimpleNamespace(wait=lambda timeout_s: code)

    def _forked(
        self, arguments: Sequence[str], environment: dict[str, str], options: dict[str, Any]
    ) -> tuple[int, int]:
        assert self._socket is not None
        spec = {"arguments": arguments, "environment": environment}
        fds = [*options["pass_fds"], options["stderr"]]
        socket.send_fds(self._socket, [json.dumps(spec).encode()], fds)
        try:
            code, pid = json.loads(self._socket.recv(100))
        except TimeoutError:  # a late answer would be the next one's
            assert self._process is not None
            self._process.kill()
            raise
        return code, pid

    def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(TIMEOUT_S)
        with theirs:
            self._process = self._really(
                # The name is for those who look for agents by their command.
                [sys.executable, __file__, "mtckpt.agent", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=self._environment,
            )
        self._socket = ours


def _others(environment: dict[str, str]) -> dict[str, str]:
    """What the agent's imports, its interpreter and its libraries look at."""
    return {name: value for name, value in environment.items() if not name.startswith("MTCKPT_")}


def _inherited() -> object:
    thread = Path("/proc/thread-self")
    lines = (thread / "status").read_text().splitlines()
    return (
        [line for line in lines if line.startswith(INHERITED) and not line.startswith(OF_OTHERS)],
        Path("/proc/self/limits").read_text(),
        (thread / "cgroup").read_text(),
        sorted(os.readlink(name) for name in (thread / "ns").iterdir()),
        os.readlink(thread / "root"),
        (thread / "oom_score_adj").read_text(),
        os.getpriority(os.PRIO_PROCESS, 0),
    )


# -- the program -----------------------------------------------------------------------------------


def _become(arguments: list[str], environment: dict[str, str], fds: list[int], teller: int) -> None:
    """The agent's first process, as if it had been started for it. The second tells its pid."""
    run_own = life.run_own

    def told(fd: int, directory: str) -> int:
        os.write(teller, str(os.getpid()).encode())
        os.close(teller)
        life.run_own = run_own
        return run_own(fd, directory)

    life.run_own = told
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    status._STARTED_S = time.monotonic()
    listener, log = fds
    os.dup2(log, 2)
    os.close(log)
    arguments[arguments.index("--fd") + 1] = str(listener)
    code = program.main(arguments)
    sys.stderr.flush()
    # As the program does.
    os._exit(code)


def main(fd: int) -> None:
    with life._without_certificates():
        for name in WARM:
            importlib.import_module(f"mtckpt.agent.{name}")
    gc.freeze()
    requests = socket.socket(fileno=fd)
    while True:
        data, fds, _, _ = socket.recv_fds(requests, MAX_BYTES, 2)
        if not data:
            return
        assert len(os.listdir("/proc/self/task")) == 1
        reader, writer = os.pipe()
        if not (first := os.fork()):
            os.close(reader)
            requests.close()
            _become(fds=fds, teller=writer, **json.loads(data))
        for each in (*fds, writer):
            os.close(each)
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        pid = int(os.read(reader, 16) or b"0")
        os.close(reader)
        requests.send(json.dumps([code, pid]).encode())


if __name__ == "__main__":
    main(int(sys.argv[2]))
