"""Directories that a test process has for itself, and the end of every process that used them.

An agent is found by MTCKPT_RUNTIME_DIR and keeps its slots in MTCKPT_RAM_DIR. With both set to
directories of its own, a test process shares no agent and no slot with another one or with the
user's own runs. Sweeping kills what still runs there, with SIGKILL: a test may have stopped it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "mtk-"
# A unix socket's path has at most 107 bytes; this leaves room for the socket's name.
_MAX_PATH_BYTES = 60
_SHM = Path("/dev/shm")
_DEATH_TIMEOUT_S = 10.0
_MAX_SWEEPS = 5
# The agents whose /proc/PID/environ does not tell their MTCKPT_RUNTIME_DIR, and that.
_FORKED: dict[int, str] = {}


@dataclass(frozen=True, slots=True)
class Places:
    """Where one agent lives: its socket and pid file, and its RAM slots."""

    runtime: Path
    ram: Path

    def environment(self) -> dict[str, str]:
        return {"MTCKPT_RUNTIME_DIR": str(self.runtime), "MTCKPT_RAM_DIR": str(self.ram)}


def make_places() -> Places:
    """Make two empty directories, named after this process so that ``sweep_dead`` can find them."""
    prefix = f"{_PREFIX}{os.getpid()}-"
    runtime = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    assert len(os.fsencode(runtime)) <= _MAX_PATH_BYTES
    ram = Path(tempfile.mkdtemp(prefix=prefix, dir=_SHM if _SHM.is_dir() else None))
    return Places(runtime, ram)


def sweep(places: Places) -> None:
    """Kill the agent and whatever else was started with these places, then remove them."""
    end_all(places.runtime)
    shutil.rmtree(places.runtime, ignore_errors=True)
    shutil.rmtree(places.ram, ignore_errors=True)


def end_all(runtime: Path) -> None:
    """Kill the agent and whatever else was started with this directory, until there is nothing."""
    for _ in range(_MAX_SWEEPS):  # what is killed may have been starting something
        pids = {*_agent_pids(runtime), *_pids_with_runtime(runtime)}
        if not (pids := pids - {os.getpid(), os.getppid()}):
            break
        _kill(pids)


def end_agent(runtime: Path) -> None:
    """Kill the agent and its data processes, and wait until they have ended.

    Who has opened a run would start another one: such a process has to be killed before.
    """
    agents = {*_agent_pids(runtime)}
    for agent in agents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGSTOP)  # it starts no other data process meanwhile
    _kill({*agents, *(child for agent in agents for child in _children(agent))})


def sweep_dead() -> None:
    """Sweep what earlier test processes left that were killed before they could do it."""
    for runtime in Path("/tmp").glob(f"{_PREFIX}[0-9]*-*"):
        with contextlib.suppress(OSError):
            if runtime.stat().st_uid == os.getuid() and not _is_alive(_owner(runtime)):
                sweep(Places(runtime, runtime))
    for ram in _SHM.glob(f"{_PREFIX}[0-9]*-*"):
        with contextlib.suppress(OSError):
            if ram.stat().st_uid == os.getuid() and not _is_alive(_owner(ram)):
                shutil.rmtree(ram, ignore_errors=True)


def _owner(directory: Path) -> int:
    return int(directory.name.removeprefix(_PREFIX).partition("-")[0])


def _agent_pids(runtime: Path) -> Iterator[int]:
    """The process that the pid file names, if that process is one of ours: pids are reused."""
    try:
        pid = int((runtime / "agent.pid").read_text().split()[0])
        if b"mtckpt" in Path(f"/proc/{pid}/cmdline").read_bytes() and _is_alive(pid):
            yield pid
    except (OSError, ValueError, IndexError):
        return  # no agent, or it is gone


def forked(pid: int, runtime: str) -> None:
    """There is an agent whose environment /proc does not show."""
    _FORKED[pid] = runtime


def _forked_with(runtime: Path) -> Iterator[int]:
    for pid, of in [*_FORKED.items()]:
        if of == str(runtime):
            with contextlib.suppress(OSError):  # it has ended, and another may have its pid
                if b"warm_agents" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield pid


def _children(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, children.read_text().split())


def _pids_with_runtime(runtime: Path) -> Iterator[int]:
    """Processes started with this directory in their environment: data processes, trainers."""
    yield from (pid for pid in _forked_with(runtime) if _is_alive(pid))
    needle = b"MTCKPT_RUNTIME_DIR=" + os.fsencode(runtime)
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if needle in environ.read_bytes().split(b"\0"):
                pid = int(environ.parent.name)
                if _is_alive(pid):
                    yield pid
        except OSError:
            continue  # not ours to read, or gone meanwhile


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _DEATH_TIMEOUT_S
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not: it holds nothing, its parent has yet to look."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}
