"""The story of one run whose trainers and agents are killed, and what must hold after each kill.

A kill is drawn over a measured cycle of saving and flushing. At the drawn time everybody is frozen,
the files say what each process is at, and the victims get SIGKILL as they stand. Phases that are
too short to be met by chance are aimed at: everybody goes on and time is drawn again until the
phase is met, so that the kill falls anywhere in it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash_phases import (
    PHASES,
    RECORD,
    Look,
    agent_of,
    children_of,
    descriptors,
    files_below,
    freeze,
    is_alive,
    send,
)
from crash_worker import Life, Nursery, read_log

from mtckpt import _manifest

RUN = "killed"
KEEP, RING = 3, 3
# Who has to be among the victims for a kill to count in a phase.
PARTIES = {
    "capture": {"trainer"},
    "seal": {"trainer", "agent"},
    "flush": {"agent"},
    "commit": {"agent"},
    "retention": {"agent"},
}
FAULTS = {
    "trainer": {"trainer"},
    "group": {"trainer"},
    "agent": {"agent"},
    "both": {"trainer", "agent"},
}
MAX_DRAWS = 2_000
# Idle connections come and go, up to this many on either side.
MAX_SOCKETS = 5


def wait_for(what: Callable[[], object], name: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {name}"
        time.sleep(0.005)


def processes_of(runtime_dir: Path) -> list[int]:
    """Agents and data processes that use this directory; not the test, nor its nursery."""
    needle = b"MTCKPT_RUNTIME_DIR=" + os.fsencode(runtime_dir)
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (proc / "environ").read_bytes().split(b"\0"):
                line = (proc / "cmdline").read_bytes()
                if b"mtckpt.agent" in line and is_alive(int(proc.name)):
                    found.append(int(proc.name))
    return found


@dataclass(frozen=True, slots=True)
class Level:
    """What a run takes while its trainer has saved and waits, and nothing is owed."""

    slots: int
    ram_files: int
    disk_files: int
    processes: int
    runtime_files: tuple[str, ...]
    trainer: dict[str, int]
    agent: dict[str, int]
    workers: tuple[dict[str, int], ...]


@dataclass(slots=True)
class Story:
    """What was acknowledged, and what must come back after the next fault."""

    run_dir: Path
    ram_dir: Path
    runtime_dir: Path
    rng: random.Random
    nursery: Nursery
    look: Look = field(init=False)
    in_ram: int = 0
    on_disk: int = 0
    started: int = 0
    num_lives: int = 0
    cycle_s: float = 0.0
    life: Life | None = None
    pid: int = 0
    agent_died: bool = False
    num_read: int = 0
    saved_by: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.look = Look(_manifest.run_key(RUN), self.ram_dir, self.disk)

    @property
    def disk(self) -> Path:
        return self.run_dir / "disk"

    @property
    def kills(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)

    # -- lives -----------------------------------------------------------------------------------

    def begin(self, *, every: int = 1, max_steps: int = 100_000, hold: str = "") -> Life:
        """Start the next trainer."""
        self.num_lives += 1
        log = str(self.run_dir / f"{self.num_lives}.log")
        life = Life(RUN, str(self.disk), log, self.num_lives, every, max_steps, hold=hold)
        self.life, self.num_read, self.agent_died = life, 0, False
        self.pid = self.nursery.start(life)
        return life

    def log(self) -> list[list[str]]:
        assert self.life is not None
        return read_log(Path(self.life.log))

    def wait_lines(self, count: int, verb: str = "") -> None:
        """Until the trainer has logged so many lines more, of one kind or of any."""
        before = len(self.log())
        wait_for(
            lambda: sum(not verb or line[0] == verb for line in self.log()[before:]) >= count,
            f"{count} lines {verb} of life {self.num_lives} at\n{self.tell()}",
        )

    def end(self) -> int:
        """The trainer has ended: take in what it logged; its status."""
        status = self.nursery.wait(self.pid)
        self.learn()
        assert self.life is not None
        Path(self.life.log).unlink(missing_ok=True)
        self.life, self.pid = None, 0
        return status

    def learn(self) -> None:
        """Take in what the trainer has logged since, in its order; nothing may have failed."""
        lines = self.log()
        for verb, *words in lines[self.num_read :]:
            if verb == "restored":
                self._check_restored(words)
            elif verb == "start":
                self.started = int(words[0])
            elif verb in ("staged", "local"):
                self.in_ram = int(words[0])
                self.saved_by[self.in_ram] = self.num_lives
                self.counts[verb] += 1
                if verb == "local":
                    self.on_disk = self.in_ram
            elif verb not in ("captured", "done", "closed"):
                self.counts[verb] += 1
                self.lines.append(f"life {self.num_lives}: {verb} {' '.join(words)}")
                # A save may be called off while another agent starts, and for no other reason.
                assert verb == "skipped", self.tell()
                assert self.agent_died, self.tell()
        self.num_read = len(lines)

    def _check_restored(self, words: list[str]) -> None:
        step = 0 if words[0] == "None" else int(words[0])
        floor = max(self.in_ram, self.on_disk)
        self.lines.append(f"restored {' '.join(words)} (floor {floor}, started {self.started})")
        assert words[1] == "ok", self.tell()
        assert floor <= step <= self.started, self.tell()
        # The step as the life that was told of it had saved it, not one of an abandoned branch.
        assert self.saved_by.get(step, int(words[2])) == int(words[2]), self.tell()
        self.saved_by = {s: num for s, num in self.saved_by.items() if s <= step}
        self.counts["resumed"] += bool(step)
        self.in_ram, self.on_disk = min(self.in_ram, step), min(self.on_disk, step)

    # -- kills -----------------------------------------------------------------------------------

    def strike(self, fault: str, aim: str = "", *, early: bool = False) -> set[str]:
        """Kill at a drawn time, in the phase ``aim`` if one is given. The phases that were hit."""
        self.counts[fault] += 1
        hit: set[str] = set()
        if early:  # while it opens, restores, or begins
            time.sleep(self.rng.uniform(0.0, 0.08))
        else:
            self.wait_lines(self.rng.choice((1, 1, 2, 5)), "start")
        for _ in range(MAX_DRAWS):
            time.sleep(self.rng.uniform(0.0, self.cycle_s))
            agent = agent_of(self.runtime_dir)
            everybody = [self.pid, *([agent, *children_of(agent)] if agent else [])]
            freeze(everybody)
            step = max((int(w[1]) for w in self.log() if w[0] == "start"), default=0)
            seen = self.look.phases(self.num_lives, step)
            hit = {phase for phase in seen if PARTIES[phase] & FAULTS[fault]}
            if not aim or aim in hit:
                break
            send(everybody, signal.SIGCONT)
        else:
            raise AssertionError(f"{MAX_DRAWS} draws, and {aim} was not met")
        self.hits.update(hit)
        self.lines.append(f"life {self.num_lives}: {fault} at {sorted(seen)} of step {step}")
        self._kill(fault, agent, everybody)
        return hit

    def _kill(self, fault: str, agent: int, everybody: list[int]) -> None:
        """The victims die as they stand; whoever is left goes on."""
        if fault in ("agent", "both") and agent:
            self.look.remember()
            # The data processes with it, or by its death.
            victims = everybody[1:] if self.rng.random() < 0.5 else [agent]
        else:
            victims = []
        if fault == "group":
            os.killpg(self.pid, signal.SIGKILL)
        elif fault != "agent":
            victims.insert(self.rng.randint(0, len(victims)), self.pid)
        send(victims, signal.SIGKILL)
        if fault in ("agent", "both"):
            wait_for(lambda: not is_alive(agent), "the agent dies")
        send(everybody, signal.SIGCONT)
        if fault != "agent":
            assert self.end() == -signal.SIGKILL, self.tell()
            return
        self.agent_died = True
        # Training goes on, and saves are acknowledged again.
        self.wait_lines(2, "staged")
        self.learn()

    def wipe(self, where: str) -> None:
        """A tier goes away while nobody runs."""
        self.counts[f"{where} wiped"] += 1
        wait_for(self._is_quiet, "everything ends")
        if where == "ram":
            for path in self.ram_dir.iterdir():
                shutil.rmtree(path)
            self.in_ram = 0
        else:
            shutil.rmtree(self.disk, ignore_errors=True)
            self.on_disk = 0

    def _is_quiet(self) -> bool:
        """Nothing runs any more; an agent that a killed trainer was just starting is killed too."""
        send(processes_of(self.runtime_dir), signal.SIGKILL)
        return not processes_of(self.runtime_dir)

    def finish(self) -> None:
        """The trainer that is left, if one is, gets its end."""
        if self.pid:
            send([self.pid], signal.SIGKILL)
            self.end()

    def kill_held(self) -> None:
        """The trainer that ``level`` left waiting gets its end instead of closing."""
        (self.run_dir / "hold").unlink()
        self.finish()

    # -- measuring -------------------------------------------------------------------------------

    def measure(self) -> None:
        """How long a save takes, from its start until it is on disk and an older one is gone."""
        self.begin()
        wait_for(lambda: len(self._on_disk()) > KEEP - 1, "the disk has as many as it keeps")
        cycles_s = []
        for _ in range(10):
            self.wait_lines(1, "start")
            began_s, step = time.monotonic(), int(self.log()[-1][1])
            wait_for(lambda step=step: max(self._on_disk(), default=0) >= step, "it is on disk")  # type: ignore[misc]  # a default binds the step of this turn
            cycles_s.append(time.monotonic() - began_s)
        self.cycle_s = statistics.median(cycles_s)
        send([self.pid], signal.SIGKILL)
        self.end()

    def _on_disk(self) -> list[int]:
        saves = self.look.saves()
        return sorted(
            int(name.split("-")[1].split(".")[0]) for name in saves if RECORD in saves[name]
        )

    def level(self) -> Level:
        """A life that saves a few steps; what the run takes while it waits. Its trainer stays."""
        hold = self.run_dir / "hold"
        hold.touch()
        self.begin(max_steps=6, hold=str(hold))
        wait_for(lambda: self.log()[-1:] == [["done"]] or not is_alive(self.pid), "it saves")
        assert is_alive(self.pid), self.log()[-3:]
        self.learn()
        last = self._level()
        for _ in range(200):  # until retention has ended, and connections are idle
            time.sleep(0.05)
            level = self._level()
            if level == last and level.disk_files == KEEP * 4 and level.slots == RING:
                break
            last = level
        return last

    def _level(self) -> Level:
        agent = agent_of(self.runtime_dir)
        workers = children_of(agent)
        ram = [file for file in files_below(self.ram_dir) if "/.run.json" not in file]
        disk = [file for file in files_below(self.disk) if "incarnation-" not in file]
        return Level(
            sum(file.endswith(".safetensors") for file in ram),
            sum("incarnation-" not in file for file in ram),
            len(disk),
            len(processes_of(self.runtime_dir)),
            tuple(sorted(path.name for path in self.runtime_dir.iterdir())),
            dict(descriptors(self.pid)),
            dict(descriptors(agent)),
            tuple(sorted((dict(descriptors(pid)) for pid in workers), key=str)),
        )

    def close(self) -> None:
        """The trainer that ``level`` left waiting closes: nothing is left but steps on disk."""
        (self.run_dir / "hold").unlink()
        wait_for(lambda: self.log()[-1] == ["closed"] or not is_alive(self.pid), "it closes")
        assert self.log()[-1] == ["closed"], self.tell()
        assert self.end() == 0
        wait_for(lambda: not processes_of(self.runtime_dir), f"the agent leaves\n{self.tell()}")
        assert [f for f in files_below(self.ram_dir) if "/." not in f or ".slots" in f] == []
        for name, files in self.look.saves().items():
            assert files == {
                "rank-00000.safetensors",
                "rank-00000.xxh3",
                RECORD,
                "manifest.json",
            }, name
        assert len(self.look.saves()) == KEEP, sorted(self.look.saves())

    # -- telling ---------------------------------------------------------------------------------

    def table(self) -> str:
        """The kills, by fault and by phase."""
        faults = ", ".join(f"{fault} {self.counts[fault]}" for fault in FAULTS)
        phases = ", ".join(f"{phase} {self.hits[phase]}" for phase in PHASES)
        return f"{self.kills} kills ({faults}) over cycles of {self.cycle_s * 1e3:.1f} ms: {phases}"

    def tell(self) -> str:
        log = self.runtime_dir / "agent.log"
        tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        own = [" ".join(line) for line in self.log()[-8:]] if self.life is not None else []
        disk = [f"{name}: {sorted(files)}" for name, files in sorted(self.look.saves().items())]
        return "\n".join(
            [self.table(), str(dict(self.counts)), *self.lines[-30:], *own, *disk, tail]
        )


def shortfall(level: Level, before: Level) -> list[str]:
    """What a run takes now and did not before, line by line."""
    wrong = [
        f"{name}: {getattr(level, name)}, was {getattr(before, name)}"
        for name in ("slots", "ram_files", "disk_files", "processes", "runtime_files")
        if getattr(level, name) != getattr(before, name)
    ]
    pairs = [("trainer", level.trainer, before.trainer), ("agent", level.agent, before.agent)]
    assert len(level.workers) == len(before.workers)
    pairs += [
        ("data process", now, then) for now, then in zip(level.workers, before.workers, strict=True)
    ]
    for who, now, then in pairs:
        for kind in sorted({*now, *then}):
            # The log of each life has another name.
            if kind.endswith(".log") and "agent" not in kind:
                continue
            most = max(then.get(kind, 0), MAX_SOCKETS) if kind == "socket" else then.get(kind, 0)
            if now.get(kind, 0) > most:
                wrong.append(f"{who} has {now.get(kind, 0)} of {kind}, had {then.get(kind, 0)}")
    return wrong
