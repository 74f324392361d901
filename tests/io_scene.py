"""One agent and one writer at a time, whose files are made to fail, and what was promised to it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_checks import ram_root
from small_writer import KEEP, Nursery, Writer, whole_steps

__all__ = ["LONG_S", "MAX_ATTEMPTS", "SHORT_S", "Scene", "temporaries", "wait_for"]

# Above this a save may be tried anew without anybody having told of a failure.
MAX_ATTEMPTS = 3
# How long a save is given while its tier fails for good, and how long afterwards.
SHORT_S, LONG_S = 1.0, 30.0


@dataclass(slots=True)
class Scene:
    """One agent and one writer at a time, and what the writer was promised."""

    nursery: Nursery
    tmp_path: Path
    ram_dir: Path
    runtime_dir: Path
    rng: random.Random
    step: int = 0
    local: int = 0
    num: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    # Directories that a failure for good has left, since it kept them from being removed too.
    left: set[Path] = field(default_factory=set)

    @property
    def disk(self) -> Path:
        return self.tmp_path / "disk"

    def root(self, tier: str) -> str:
        return str(self.disk if tier == "disk" else self.ram_dir)

    def writer(self, **options: Any) -> Writer:
        """A fresh writer that has restored what it must, and has two steps on disk."""
        self.num += 1
        writer = self.nursery.start()
        writer.do("open", self.num, str(self.disk))
        restored = writer.do("restore")
        assert not restored["bad"], restored
        assert restored["step"] >= self.local, restored
        self.step = restored["step"]
        for _ in range(KEEP + 1):
            self.save(writer)
        return writer

    def save(self, writer: Writer, wait_s: float = LONG_S) -> dict[str, Any]:
        """The next step, and how it ended."""
        self.step += 1
        ended: dict[str, Any] = writer.do("attempt", self.step, wait_s)
        if "local" in ended["reached"]:
            self.local = self.step
        return ended

    def save_again(self, writer: Writer) -> None:
        """The tier is well: one of the next saves is acknowledged there, the first but for errors
        that are still to be told."""
        endings = []
        for _ in range(MAX_ATTEMPTS):
            endings.append(self.save(writer))
            if "local" in endings[-1]["reached"]:
                return
        raise AssertionError(endings)

    def check_disk(self, *, unreadable: bool = False) -> None:
        """What was acknowledged is there, and two steps at least. ``unreadable``: what the device
        would not read is set aside until it is written anew; then it is in memory."""
        steps = whole_steps(self.disk)
        there = {*steps, *(whole_steps(ram_root()) if unreadable else ())}
        assert self.local in there or max(there) > self.local, (self.local, there)
        assert len(steps) >= KEEP, (self.local, steps)

    def temporaries(self) -> list[str]:
        return temporaries(self.disk, self.ram_dir)

    def pid_of(self, victim: str, writer: Writer) -> int:
        if victim == "writer":
            return writer.pid
        agent = int((self.runtime_dir / "agent.pid").read_text())
        found = (pid for pid in children_of(agent) if has_open(pid, self.root(victim)))
        return next(found)

    def end(self, writer: Writer) -> None:
        writer.kill()
        self.nursery.wait(writer)


def temporaries(*roots: Path) -> list[str]:
    """Files that a put has not given their name yet, or has left; others may go meanwhile."""
    return [
        os.path.join(home, name)
        for root in roots
        for home, _, names in os.walk(root)
        for name in names
        if name.startswith(".tmp")
    ]


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def has_open(pid: int, root: str) -> bool:
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            if f"{os.readlink(fd)}/".startswith(f"{root}/"):
                return True
    return False


def wait_for(what: Callable[[], bool], name: str, scene: Scene) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not what():
        if time.monotonic() > deadline_s:
            there = "\n".join(sorted(str(path) for path in scene.disk.rglob("*")))
            raise AssertionError(f"{name}\n{there}")
        time.sleep(0.005)
