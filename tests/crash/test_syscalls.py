"""SIGKILL before every system call that others can see: of a writer, the agent, its processes.

Each call is numbered over all threads of its process. `make test` takes a sample of the numbers,
the torture versions take all of them. Of the agent and its processes only calls count that change
something for others: a kill before a call finds what one before the next change finds. A writer
also changes what it has mapped, between any two calls, so there every call counts.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from small_writer import KEEP, Nursery, Writer, WriterGone, whole_steps
from syscall_tracer import Tracer, why_not

pytestmark = [
    pytest.mark.strace,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "processes can be traced"),
]

# Processes of the agent, by the tier that each works for; "" is the one that decides.
VICTIMS = ("", "ram", "disk")


@dataclass(slots=True)
class Story:
    """What was promised so far, and what must therefore be there."""

    nursery: Nursery
    tmp_path: Path
    ram_dir: Path
    runtime_dir: Path
    rng: random.Random
    num: int = 0
    run: int = 0
    staged: int = 0
    local: int = 0
    started: int = 0
    num_local: int = 0
    saved_by: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    killed_at: list[str] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        return self.tmp_path / f"disk-{self.run}"

    def begin(self) -> None:
        """Another run: a process that opens a run reads something of every start there ever was."""
        self.run += 1
        self.staged = self.local = self.started = self.num_local = 0
        self.saved_by.clear()

    def start(self) -> Writer:
        """A fresh process."""
        self.num += 1
        return self.nursery.start()

    def resume(self) -> tuple[Writer, int]:
        """A fresh process that has opened the run and restored what must be there; its step."""
        writer = self.start()
        writer.do("open", self.num, str(self.disk), None, KEEP, "", f"run-{self.run}")
        restored = writer.do("restore")
        self.check(restored)
        return writer, restored["step"]

    def check(self, restored: dict[str, object]) -> None:
        step, num = int(str(restored["step"])), int(str(restored["num"]))
        told = f"{restored}, staged {self.staged}, local {self.local}, {self.killed_at[-3:]}"
        assert not restored["bad"], told
        assert max(self.staged, self.local) <= step <= self.started, told
        assert self.saved_by.get(step, num) == num, told
        self.saved_by = {s: n for s, n in self.saved_by.items() if s <= step}
        self.staged = self.started = step
        self.local = min(self.local, step)
        self.counts["restored"] += 1

    def end(self, writer: Writer) -> None:
        writer.kill()
        self.nursery.wait(writer)

    def learn(self, writer: Writer) -> None:
        """Take in what a writer was promised."""
        for what, step, _ in writer.said():
            if what == "saving":
                self.started = step
            else:
                self.saved_by[step] = self.num
                self.counts[what] += 1
                if what == "staged":
                    self.staged = step
                else:
                    self.local = step
                    self.num_local += 1
        writer.log.unlink(missing_ok=True)

    def check_disk(self) -> None:
        """Nothing torn is offered, and nothing went before two newer ones were there."""
        steps = whole_steps(self.disk)
        told = f"{steps}, local {self.local}, {self.killed_at[-3:]}"
        assert max(steps, default=0) >= self.local, told
        assert self.saved_by.get(self.local, 0) == steps.get(
            self.local, self.saved_by.get(self.local, 0)
        ), told
        assert len(steps) >= min(KEEP, self.num_local), told

    def pid_of(self, victim: str) -> int:
        """The agent's process of a tier, or the agent itself; 0 if it does not run."""
        agent = agent_pid(self.runtime_dir)
        if not victim or not agent:
            return agent
        root = str(self.ram_dir if victim == "ram" else self.disk)
        for child in children_of(agent):
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{child}/fd"):
                    if f"{os.readlink(f'/proc/{child}/fd/{fd}')}/".startswith(f"{root}/"):
                        return child
        return 0

    def kept(self) -> bool:
        """Whether retention has done what the last save let it do."""
        run_dir = next((p for p in self.disk.glob("*") if p.is_dir()), self.disk)
        return len([*run_dir.glob("step-*")]) <= KEEP


def agent_pid(runtime_dir: Path) -> int:
    try:
        pid = int((runtime_dir / "agent.pid").read_text())
        return pid if b"mtckpt" in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
    except (OSError, ValueError):
        return 0


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def threads_of(pid: int) -> str:
    """What each thread of a process is at, as the kernel tells it."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0].decode()
            where = [(task / name).read_text().strip() for name in ("wchan", "syscall")]
            found.append(f"{task.name} {state} {where}")
    return "\n".join([f"threads of {pid}:", *found])


def wait_for(what: Callable[[], bool], name: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {name}"
        time.sleep(0.005)


@pytest.fixture
def story(
    runtime_dir: Path, ram_dir: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Story]:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "1.0")
    nursery = Nursery(tmp_path)
    story = Story(nursery, tmp_path, ram_dir, runtime_dir, random.Random(seed))
    try:
        yield story
    finally:
        nursery.close()
        print(dict(story.counts), *story.killed_at[-5:], sep="\n")
        with contextlib.suppress(OSError):
            print((runtime_dir / "agent.log").read_text()[-3000:])


def check_end(story: Story) -> None:
    """A last writer saves and closes: everything that the killed ones left is gone."""
    writer, step = story.resume()
    writer.do("saves", step + 1, step + 3)
    story.learn(writer)
    writer.do("close")
    story.end(writer)
    story.check_disk()
    wait_for(lambda: not agent_pid(story.runtime_dir), "the agent leaves")
    ram = [p for p in story.ram_dir.rglob("*") if p.is_file() and "step-" in str(p)]
    slots = [p for p in story.ram_dir.rglob("*") if p.is_file() and ".slots" in str(p)]
    assert not ram, ram
    assert not slots, slots
    assert story.kept(), [*story.disk.rglob("*")]
    names = {p.name for p in story.disk.rglob("*") if p.is_file()}
    odd = {n for n in names if not n.startswith(("rank-00000.", "manifest.json", "incarnation-"))}
    assert not odd, odd


# -- the writer ------------------------------------------------------------------------------------


def one_before(story: Story) -> list[object]:
    """A run with two steps and no process; the words with which a writer has a life in it."""
    story.begin()
    writer, _ = story.resume()
    writer.do("saves", 1, 2)
    story.learn(writer)
    story.end(writer)
    return ["life", story.num + 1, str(story.disk), f"run-{story.run}", 3]


def numbers_of_a_life(story: Story) -> int:
    """How many calls a whole life has: open, restore, three saves, close."""
    words = one_before(story)
    writer = story.start()
    with Tracer(writer.pid) as tracer:
        writer.do(*words)
        calls = tracer.stop()
    story.learn(writer)
    story.end(writer)
    names = Counter(call.name for call in calls)
    assert names["connect"] >= 1, names
    assert names["sendto"] + names["sendmsg"] >= 4, names
    return len(calls)


def kill_writer_at(story: Story, number: int) -> None:
    """One life that ends before its call of that number, and what the next one finds."""
    words = one_before(story)
    writer = story.start()
    with Tracer(writer.pid, kill=number) as tracer:
        gone = False
        try:
            writer.do(*words)
        except WriterGone:
            gone = True
        calls = tracer.stop()
    story.end(writer)
    if gone:
        story.counts["killed"] += 1
        story.killed_at.append(f"writer {number}: {calls[-1].name} {calls[-1].path}")
    story.learn(writer)
    writer, step = story.resume()
    story.check_disk()
    writer.do("save", step + 1)
    story.learn(writer)
    writer.do("close")
    story.end(writer)


def sample(story: Story, total: int, count: int) -> list[int]:
    """So many numbers up to ``total``, evenly spread, from a random one on."""
    stride = total / count
    offset = story.rng.random() * stride
    return [1 + int(offset + n * stride) for n in range(count)]


def sweep(story: Story, counted: str, total: int, kill_at: Callable[[int], None]) -> None:
    """Every number from 1 on, until several in a row were not reached: there are no more."""
    number = missed = 0
    while missed < 6:
        number += 1
        before = story.counts[counted]
        kill_at(number)
        missed = 0 if story.counts[counted] > before else missed + 1
    print(f"{story.counts[counted]} of {number} numbers were reached; {total} calls were counted")
    assert story.counts[counted] >= total // 2


@pytest.mark.timeout(180)
def test_writer_killed_before_some_syscalls(story: Story) -> None:
    total = numbers_of_a_life(story)
    for number in sample(story, total, 10):
        kill_writer_at(story, number)
    assert story.counts["killed"] >= 7
    check_end(story)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_writer_killed_before_every_syscall(story: Story) -> None:
    total = numbers_of_a_life(story)
    sweep(story, "killed", total, lambda number: kill_writer_at(story, number))
    check_end(story)


# -- the agent -------------------------------------------------------------------------------------


def numbers_of_a_save(story: Story, victim: str) -> int:
    """How many calls a process of the agent makes for a save, its flush and its retention."""
    writer, step = story.resume()
    writer.do("saves", step + 1, step + 3)
    wait_for(story.kept, "the steps before are deleted")
    with Tracer(story.pid_of(victim), changing=True) as tracer:
        writer.do("save", step + 4)
        wait_for(story.kept, "the oldest step is deleted")
        time.sleep(0.05)  # what comes after the deletion; more is no harm, less a smaller sweep
        calls = tracer.stop()
    names = Counter(call.name for call in calls)
    if victim == "disk":
        assert names["fsync"] >= 8, names
        assert names["linkat"] >= 4, names
        assert names["unlinkat"] >= 8, names
    elif victim == "ram":
        assert names["renameat"] + names["rename"] >= 5, names
    story.learn(writer)
    story.end(writer)
    return len(calls)


def is_killed(story: Story, tracer: Tracer) -> bool:
    """Whether the traced process was, before retention had come to its end."""
    slow: list[str] = []
    began_s = time.monotonic()

    def ends() -> bool:
        if not slow and time.monotonic() > began_s + 10.0:
            slow.append(threads_of(tracer.pid))
        return tracer.ended() or story.kept()

    try:
        wait_for(ends, "retention")
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *slow])) from None
    return tracer.ended(0.1)


def kill_everything_at(story: Story, victim: str, number: int) -> None:
    """A save under which that process, the agent and the writer are killed at the same moment.

    Nobody repairs anything before it is looked at.
    """
    writer, step = story.resume()
    writer.do("saves", step + 1, step + 3)
    along = [story.pid_of(""), writer.pid]
    with Tracer(story.pid_of(victim), kill=number, changing=True, along=along) as tracer:
        writer.send("save", step + 4)
        with contextlib.suppress(WriterGone):
            writer.answer()
        killed = is_killed(story, tracer)
        calls = tracer.stop()
    story.end(writer)
    story.learn(writer)
    if killed:
        story.counts[f"killed {victim}"] += 1
        story.killed_at.append(f"everything at {victim} {number}: {calls[-1]}")
    story.check_disk()


def kill_agent_at(story: Story, victim: str, number: int) -> None:
    """A save under which that process is killed; the writer goes on, and so does a fresh one."""
    writer, step = story.resume()
    writer.do("saves", step + 1, step + 3)
    pid = story.pid_of(victim)
    with Tracer(pid, kill=number, changing=True) as tracer:
        writer.send("save", step + 4)
        writer.answer()
        killed = is_killed(story, tracer)
        calls = tracer.stop()
    if killed:
        story.counts[f"killed {victim or 'agent'}"] += 1
        last = calls[-1] if calls else None
        story.killed_at.append(f"{victim or 'agent'} {number}: {last}")
    writer.do("save", step + 5)
    story.learn(writer)
    story.check_disk()
    if story.rng.random() < 0.3 and (agent := agent_pid(story.runtime_dir)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGKILL)
    story.end(writer)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", VICTIMS, ids=["agent", "ram", "disk"])
def test_agent_killed_before_some_syscalls(story: Story, victim: str) -> None:
    total = numbers_of_a_save(story, victim)
    for number in sample(story, total, 3):
        kill = kill_everything_at if victim and story.rng.random() < 0.7 else kill_agent_at
        kill(story, victim, number)
    assert story.counts[f"killed {victim or 'agent'}"] >= 1
    check_end(story)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("victim", VICTIMS, ids=["agent", "ram", "disk"])
def test_agent_killed_before_every_syscall(story: Story, victim: str) -> None:
    total = numbers_of_a_save(story, victim)
    sweep(
        story,
        f"killed {victim or 'agent'}",
        total,
        lambda number: kill_agent_at(story, victim, number),
    )
    check_end(story)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("victim", ["ram", "disk"])
def test_everything_killed_before_every_syscall(story: Story, victim: str) -> None:
    total = numbers_of_a_save(story, victim)
    sweep(
        story,
        f"killed {victim}",
        total,
        lambda number: kill_everything_at(story, victim, number),
    )
    check_end(story)
