"""SIGKILL at random times: what was acknowledged comes back, whole, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash_worker import Life, Nursery, read_log

RUN = "killed"
# Each fault with its weight; the last two also take a tier away.
FAULTS = {"trainer": 4, "group": 3, "agent": 2, "both": 4, "ram wiped": 1, "disk wiped": 1}
MAX_RAM_SHARDS = 3


@pytest.fixture
def nursery(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.5")
    nursery = Nursery()
    yield nursery
    nursery.close()


@dataclass(slots=True)
class Story:
    """What was acknowledged, and what must come back after the next fault."""

    run_dir: Path
    ram_dir: Path
    runtime_dir: Path
    rng: random.Random
    in_ram: int = 0
    on_disk: int = 0
    started: int = 0
    saved_by: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        return self.run_dir / "disk"

    def life(self, num: int, **options: int) -> Life:
        return Life(RUN, str(self.disk), str(self.run_dir / f"{num}.log"), num, **options)

    def learn(self, life: Life) -> None:
        """Take in what a life has logged, in its order."""
        for verb, *words in read_log(Path(life.log)):
            if verb == "restored":
                self.check_restored(words)
            elif verb in ("start", "staged", "local"):
                step = int(words[0])
                if verb == "start":
                    self.started = step
                else:
                    self.in_ram = step
                    self.saved_by[step] = life.num
                    self.counts[verb] += 1
                if verb == "local":
                    self.on_disk = step
            elif verb == "failed":
                self.counts[f"{verb} {words[1]}"] += 1
                self.lines.append(f"life {life.num}: {verb} {' '.join(words)}")
            elif verb == "error":
                self.counts[verb] += 1
                self.lines.append(f"life {life.num}: {verb} {' '.join(words)}")
                assert "AgentUnavailable" in words[-1] or "AgentUnavailable" in self.lines[-1]

    def check_restored(self, words: list[str]) -> None:
        step = 0 if words[0] == "None" else int(words[0])
        floor = max(self.in_ram, self.on_disk)
        self.lines.append(f"restored {' '.join(words)} (floor {floor}, started {self.started})")
        assert words[1] == "ok", self.lines[-10:]
        assert floor <= step <= self.started, self.lines[-10:]
        # The step as the life that was told of it had saved it, not one of an abandoned branch.
        assert self.saved_by.get(step, int(words[2])) == int(words[2]), self.lines[-10:]
        self.saved_by = {s: num for s, num in self.saved_by.items() if s <= step}
        self.counts["resumed"] += bool(step)
        self.in_ram, self.on_disk = min(self.in_ram, step), min(self.on_disk, step)

    def is_quiet(self) -> bool:
        """Nothing runs any more; an agent that a killed trainer was just starting is killed too."""
        if agent := agent_pid(self.runtime_dir):
            kill(os.kill, agent)
        return not processes_of(self.runtime_dir)

    def strike(self, fault: str, pid: int, nursery: Nursery, life: Life) -> None:
        self.counts[fault] += 1
        agent = agent_pid(self.runtime_dir)
        if fault == "group":
            kill(os.killpg, pid)
        elif fault == "trainer":
            kill(os.kill, pid)
        elif fault == "agent":
            before = len(read_log(Path(life.log)))
            if agent:
                kill(os.kill, agent)
            # Training goes on, and saves are acknowledged again.
            deadline_s = time.monotonic() + 30.0
            while not any(line[0] == "staged" for line in read_log(Path(life.log))[before:]):
                assert time.monotonic() < deadline_s, read_log(Path(life.log))[-10:]
                time.sleep(0.01)
            kill(os.kill, pid)
        else:
            pids = [pid, agent] if self.rng.random() < 0.5 else [agent, pid]
            for each in filter(None, pids):
                kill(os.kill, each)
        status = nursery.wait(pid)
        self.learn(life)
        # A trainer whose agent was killed first may have ended by its error before its own turn.
        assert status == -signal.SIGKILL or (agent and self.counts["error"]), status
        if fault.endswith("wiped"):
            wait_for(self.is_quiet, "everything ends")
        if fault == "ram wiped":
            empty(self.ram_dir)
            self.in_ram = 0
        elif fault == "disk wiped":
            shutil.rmtree(self.disk, ignore_errors=True)
            self.on_disk = 0


def kill(how: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        how(pid, signal.SIGKILL)


def agent_pid(runtime_dir: Path) -> int:
    try:
        return int((runtime_dir / "agent.pid").read_text())
    except (OSError, ValueError):
        return 0


def processes_of(runtime_dir: Path) -> list[str]:
    """Agents and data processes that use this directory; not the test, nor its nursery."""
    needle = b"MTCKPT_RUNTIME_DIR=" + os.fsencode(runtime_dir)
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (proc / "environ").read_bytes().split(b"\0"):
                line = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "mtckpt.agent" in line or "mtckpt/agent" in line:
                    found.append(f"{proc.name} {line}")
    return found


def wait_for(what: Callable[[], bool], name: str, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {name}"
        time.sleep(0.02)


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)


def files_below(path: Path) -> list[str]:
    # os.walk passes over what the agent removes meanwhile.
    found = [Path(home) / name for home, _, names in os.walk(path) for name in names]
    return sorted(str(p.relative_to(path)) for p in found)


def wait_lines(life: Life, count: int) -> None:
    """Until the trainer has logged so much, however fast the machine is just now."""
    deadline_s = time.monotonic() + 30.0
    while len(lines := read_log(Path(life.log))) < count:
        assert time.monotonic() < deadline_s, f"life {life.num} is stuck: {lines[-3:]}"
        time.sleep(0.002)


def run_story(story: Story, nursery: Nursery, num_cycles: int, weighted: dict[str, int]) -> None:
    faults, weights = list(weighted), list(weighted.values())
    for num in range(1, num_cycles + 1):
        # Every fault comes up, however few cycles there are; after that they are drawn.
        drawn = story.rng.choices(faults, weights)[0]
        fault = faults[num - 1] if num <= len(faults) else drawn
        life = story.life(num, every=story.rng.choice((1, 1, 2)))
        pid = nursery.start(life)
        if fault == "agent" or story.rng.random() > 0.15:
            wait_lines(life, story.rng.choice((1, 2, 3, 5, 9, 14)))
            time.sleep(story.rng.uniform(0.0, 0.02))
        else:  # while it opens, restores, or begins
            time.sleep(story.rng.uniform(0.0, 0.08))
        story.strike(fault, pid, nursery, life)
        Path(life.log).unlink(missing_ok=True)


def check_end(story: Story, nursery: Nursery, num: int) -> None:
    """A last life saves, leaves the ring as large as it should be, and closes: nothing is left."""
    life = story.life(num, max_steps=8)
    pid = nursery.start(life)
    assert nursery.wait(pid) == 0, read_log(Path(life.log))[-3:]
    story.learn(life)
    assert read_log(Path(life.log))[-1] == ["closed"]
    wait_for(
        lambda: not [f for f in files_below(story.ram_dir) if f.endswith(".safetensors")],
        f"RAM is freed after close, there is {files_below(story.ram_dir)}",
    )
    saves = {path.rpartition("/")[0] for path in files_below(story.disk) if "step-" in path}
    assert 1 <= len(saves) <= 3 + 1, saves
    names = {path.rpartition("/")[2] for path in files_below(story.disk)}
    wanted = {"rank-00000.safetensors", "rank-00000.xxh3", "rank-00000.json", "manifest.json"}
    odd = {n for n in names - wanted if not n.startswith("incarnation-")}
    assert not odd, odd
    wait_for(
        lambda: not processes_of(story.runtime_dir),
        f"the agent leaves: {processes_of(story.runtime_dir)}",
    )
    assert not files_below(story.ram_dir) or all(
        "/.slots/" not in path and "step-" not in path for path in files_below(story.ram_dir)
    )


def tell(story: Story) -> str:
    log = story.runtime_dir / "agent.log"
    tail = log.read_text()[-3000:] if log.exists() else ""
    return "\n".join([str(dict(story.counts)), *story.lines[-40:], tail])


@pytest.fixture
def story(seed: int, tmp_path: Path, ram_dir: Path, runtime_dir: Path) -> Iterator[Story]:
    story = Story(tmp_path, ram_dir, runtime_dir, random.Random(seed))
    yield story
    print(tell(story))


def play(story: Story, nursery: Nursery, num_cycles: int, faults: dict[str, int]) -> None:
    run_story(story, nursery, num_cycles, faults)
    check_end(story, nursery, num_cycles + 1)


@pytest.mark.timeout(150)
def test_killed_at_random_times(story: Story, nursery: Nursery) -> None:
    play(story, nursery, 16, FAULTS)
    assert story.counts["resumed"] >= 6
    assert story.counts["staged"] >= 20
    assert story.counts["local"] >= 5


@pytest.mark.timeout(150)
def test_trainer_killed_at_random_times(story: Story, nursery: Nursery) -> None:
    """The agent lives on: what a dead trainer had captured it seals, and gives its slots out."""
    play(story, nursery, 60, {"trainer": 1, "group": 1})
    assert story.counts["resumed"] >= 40
    assert story.counts["staged"] >= 60


@pytest.mark.torture
@pytest.mark.timeout(14_400)
def test_killed_ten_thousand_times(story: Story, nursery: Nursery) -> None:
    play(story, nursery, 10_000, FAULTS)
    assert story.counts["resumed"] >= 7_000
