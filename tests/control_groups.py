"""Control groups that a test makes for itself, of either version, and takes away again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

_MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")


class ControlGroup:
    """One cgroup. ``wrap`` is what a command is started through to be in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    @property
    def wrap(self) -> tuple[str, ...]:
        text = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ("sh", "-c", text, str(self.path))

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self.path / "cgroup.procs").read_text().split()}

    def limit_memory(self, size_bytes: int) -> None:
        name = next(name for name in _MEMORY_FILES if (self.path / name).exists())
        (self.path / name).write_text(str(size_bytes))
        with contextlib.suppress(OSError):  # no swap to run away to, where there is any
            (self.path / "memory.swap.max").write_text("0")

    def num_oom_kills(self) -> int:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                for line in (self.path / name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0

    def kill(self, timeout_s: float = 20.0) -> None:
        """End everything in it, as the end of a container or of a job step does."""
        deadline_s = time.monotonic() + timeout_s
        while pids := self.pids():
            try:
                (self.path / "cgroup.kill").write_text("1")
            except OSError:  # version 1 has no such file
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline_s, f"still there: {self.pids()}"
            time.sleep(0.02)

    def remove(self) -> None:
        self.kill()
        for _ in range(100):
            try:
                self.path.rmdir()
            except OSError:  # what has just ended is not counted out yet
                time.sleep(0.02)
            else:
                return


def make_group(*, memory: bool = False) -> ControlGroup:
    """A new cgroup, or a skip with the reason."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind not in ("cgroup", "cgroup2"):
            continue
        controllers = options.split(",")
        if kind == "cgroup" and ("memory" if memory else "pids") not in controllers:
            continue
        try:
            group = ControlGroup(Path(mount) / f"mtk-{os.getpid()}-{os.urandom(3).hex()}")
        except OSError:
            continue
        if not memory or any((group.path / name).exists() for name in _MEMORY_FILES):
            return group
        group.remove()
    pytest.skip(f"no cgroup{' with a memory limit' if memory else ''} can be made here")
