"""EIO and ENOSPC at every call on a tier's files, once and for good; tiers that really are full.

Each call that one process makes below the directory of a tier is made to fail: of the agent's
process for the disk, of the one for RAM, of the writer. `make test` takes a sample of the calls.
No room is met only by calls that change something: no file system refuses to open or to close what
is there for want of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _isolation
import pytest
from block_image import run
from io_scene import LONG_S, MAX_ATTEMPTS, SHORT_S, Scene, temporaries, wait_for
from small_writer import KEEP, Nursery, Writer, WriterError, whole_steps
from syscall_tracer import ON_FILES, READS, Call, Tracer, why_not

traced = pytest.mark.skipif(bool(why_not()), reason=why_not() or "processes can be traced")

# A process, the tier whose files it fails on, and the calls.
VICTIMS = {
    "disk": ("disk", "disk", ON_FILES),
    "reads of disk": ("disk", "disk", READS),
    "ram": ("ram", "ram", ON_FILES),
    "writer": ("writer", "ram", ON_FILES),
}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


@pytest.fixture
def scene(
    runtime_dir: Path, ram_dir: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "2.0")
    nursery = Nursery(tmp_path)
    scene = Scene(nursery, tmp_path, ram_dir, runtime_dir, random.Random(seed))
    try:
        yield scene
    finally:
        nursery.close()
        print(dict(scene.counts))
        with contextlib.suppress(OSError):
            print((runtime_dir / "agent.log").read_text()[-4000:])


# -- a call that fails -----------------------------------------------------------------------------


def calls_of_a_save(scene: Scene, writer: Writer, victim: str) -> list[Call]:
    """What a process does on the files of a tier for one save, with its retention."""
    process, tier, names = VICTIMS[victim]
    pid = scene.pid_of(process, writer)
    with Tracer(pid, calls=names, below=scene.root(tier)) as tracer:
        assert "local" in scene.save(writer)["reached"]
        wait_for(lambda: kept(scene), "retention", scene)
        time.sleep(0.05)
        return tracer.stop()


def kept(scene: Scene) -> bool:
    """Whether retention has done what it may."""
    return len({*scene.disk.glob("*/step-*")} - scene.left) <= KEEP


def fail_at(
    scene: Scene, writer: Writer, victim: str, number: int, name: str, *, for_good: bool
) -> None:
    """One save under which that call fails, and the saves after it.

    For ENOSPC the number counts only calls that change something.
    """
    process, tier, names = VICTIMS[victim]
    pid = scene.pid_of(process, writer)
    told = f"{victim} {number} {name} {'for good' if for_good else 'once'}"
    before = set(scene.temporaries())
    with Tracer(
        pid,
        calls=names,
        below=scene.root(tier),
        fail=number,
        error=ERRORS[name],
        changing=name == "ENOSPC",
        times=0 if for_good else 1,
    ) as tracer:
        ended = scene.save(writer, SHORT_S if for_good else LONG_S)
        if "local" in ended["reached"]:
            # Reading back or retention may meet the fault; that goes on with the next save.
            deadline_s = time.monotonic() + 0.2
            while not kept(scene) and time.monotonic() < deadline_s:
                time.sleep(0.005)
        calls = tracer.stop()
    failed = [call for call in calls if call.failed]
    print(told, failed[:1], ended)
    scene.counts["failed" if failed else "not reached"] += 1
    for error in ended["errors"]:
        scene.counts[error] += 1
    check_ending(ended, failed, for_good=for_good)
    check_synced_once(calls)
    scene.check_disk(unreadable=any(call.name in READS for call in failed))
    scene.save_again(writer)
    scene.check_disk()
    scene.save_again(writer)  # the second newer one, which what a failure left has to wait for
    # What cannot be opened cannot be emptied and removed either.
    undone = {"unlinkat", "rmdir", "openat"} if for_good else {"unlinkat", "rmdir"}
    if not undone & {call.name for call in failed}:
        left = set(scene.temporaries()) - before
        assert not left, (told, failed[:3], left)
        wait_for(lambda: kept(scene), f"retention goes on: {told}, {failed[:3]}", scene)
    else:
        scene.left |= {
            path
            for path in scene.disk.glob("*/step-*")
            if not [*path.glob("*.json")] or temporaries(path)
        }


def check_ending(ended: dict[str, Any], failed: list[Call], *, for_good: bool) -> None:
    """A save that did not arrive says so, with the error of the tier."""
    if "local" in ended["reached"]:
        return
    if not failed:  # the machine is so slow that it had not come to that call: the wait is short
        assert for_good, ended
        assert ended["errors"] == ["WaitTimeout"], ended
        return
    assert ended["errors"], ended
    known = {"SaveFailed", "CaptureFailed", "TierFull", "TierUnavailable", "WaitTimeout", "Damaged"}
    assert ended["errors"][0] in known, ended
    if ended["errors"][0] == "WaitTimeout" and for_good and ended["where"] == "local":
        assert "(" in ended["text"], f"what is owed is said: {ended}"


def check_synced_once(calls: list[Call]) -> None:
    """A file is not synced again: after a failed fsync the kernel calls the lost pages clean."""
    for place, call in enumerate(calls):
        if call.failed and call.name in ("fsync", "fdatasync") and ".tmp-" in call.path:
            again = [c for c in calls[place + 1 :] if c.name == call.name and c.path == call.path]
            assert not again, (call, again)


def sweep(
    scene: Scene, victim: str, chosen: Callable[[list[Call]], list[tuple[int, str, bool]]]
) -> int:
    """How many calls there were to choose from."""
    writer = scene.writer()
    calls = calls_of_a_save(scene, writer, victim)
    print(victim, Counter(call.name for call in calls))
    assert len(calls) >= 3, calls
    for number, name, for_good in chosen(calls):
        fail_at(scene, writer, victim, number, name, for_good=for_good)
    scene.end(writer)
    # Whatever was left by then, a fresh process finds the newest step, and a fresh agent tidies up.
    os.kill(int((scene.runtime_dir / "agent.pid").read_text()), signal.SIGKILL)
    writer = scene.writer()
    scene.check_disk()
    scene.left.clear()
    wait_for(lambda: not scene.temporaries(), "temporaries are swept", scene)
    wait_for(lambda: kept(scene), "what was left is deleted", scene)
    scene.end(writer)
    return len(calls)


def errors_of(victim: str) -> list[str]:
    """No read needs room."""
    return ["EIO"] if VICTIMS[victim][2] is READS else [*ERRORS]


@traced
@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", VICTIMS)
def test_some_calls_fail(scene: Scene, victim: str) -> None:
    def chosen(calls: list[Call]) -> list[tuple[int, str, bool]]:
        # Opening and closing are most of the calls, and the least of what can go wrong.
        chosen = []
        for name in errors_of(victim):
            met = [call for call in calls if call.changes or name == "EIO"]
            most = [n for n, call in enumerate(met, 1) if call.name not in ("openat", "close")]
            for for_good in (False, True):
                numbers = most if most and scene.rng.random() < 0.75 else range(1, len(met) + 1)
                chosen.append((scene.rng.choice(numbers), name, for_good))
        return chosen

    sweep(scene, victim, chosen)
    assert scene.counts["failed"] >= 1


@traced
@pytest.mark.timeout(180)
def test_a_seal_that_finds_no_room_costs_its_save_only(scene: Scene) -> None:
    """The slot of the save goes back, or with a ring of two no later save would ever have one."""
    writer = scene.writer()
    pid = scene.pid_of("ram", writer)
    with Tracer(
        pid,
        calls=frozenset({"mkdirat"}),
        below=str(scene.ram_dir),
        fail=1,
        error=errno.ENOSPC,
        times=0,
    ) as tracer:
        ended = scene.save(writer)
        assert any(call.failed for call in tracer.stop())
    assert ended["where"] == "staged"
    assert ended["errors"] == ["SaveFailed", "TierFull"]
    told = scene.save(writer)
    assert told["where"] == "save"
    assert told["errors"] == ["SaveFailed", "TierFull"]
    assert "local" in scene.save(writer)["reached"]
    scene.end(writer)


@traced
@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("victim", VICTIMS)
def test_every_call_fails(scene: Scene, victim: str) -> None:
    def chosen(calls: list[Call]) -> list[tuple[int, str, bool]]:
        changing = sum(call.changes for call in calls)
        return [
            (number, name, for_good)
            for name in errors_of(victim)
            for number in range(1, (changing if name == "ENOSPC" else len(calls)) + 1)
            for for_good in (False, True)
        ]

    num_calls = sweep(scene, victim, chosen)
    assert scene.counts["failed"] >= max(num_calls, scene.counts["not reached"])


# -- a restore that cannot read --------------------------------------------------------------------


def step_dir(root: str | Path, step: int) -> str:
    """Where a step lies in a tier."""
    (found,) = Path(root).rglob(f"step-{step:012d}.*")
    return str(found)


def newcomer(scene: Scene) -> Writer:
    """A fresh process that has opened the run and not looked into it yet."""
    scene.num += 1
    writer = scene.nursery.start()
    writer.do("open", scene.num, str(scene.disk))
    return writer


def leave_disk_only(scene: Scene, writer: Writer) -> None:
    """What a reboot does to a node: processes and memory are gone."""
    scene.end(writer)
    _isolation.end_agent(scene.runtime_dir)
    for path in scene.ram_dir.iterdir():
        shutil.rmtree(path)


def start_over(scene: Scene, before: Path) -> None:
    """The disk as it was, and nothing else: no process, no memory, no other start of the run."""
    _isolation.end_agent(scene.runtime_dir)
    for path in (*scene.ram_dir.iterdir(), scene.disk):
        shutil.rmtree(path)
    shutil.copytree(before, scene.disk)


@traced
def test_what_ram_cannot_give_comes_from_disk(scene: Scene) -> None:
    scene.end(scene.writer())
    writer = newcomer(scene)
    with Tracer(
        writer.pid,
        calls=frozenset({"openat"}),
        below=step_dir(scene.ram_dir, scene.step),
        fail=1,
        times=0,
    ) as tracer:
        restored = writer.do("restore")
        assert any(call.failed for call in tracer.stop())
    assert (restored["step"], restored["bad"]) == (scene.step, "")
    assert "disk" in restored["sources"]
    scene.save_again(writer)
    scene.end(writer)


@traced
def test_what_disk_cannot_read_is_passed_over_for_an_older_step(scene: Scene) -> None:
    leave_disk_only(scene, scene.writer())
    writer = newcomer(scene)
    newest = step_dir(scene.disk, scene.step)
    with Tracer(writer.pid, calls=READS, below=newest, fail=1, times=0) as tracer:
        restored = writer.do("restore")
        assert any(call.failed for call in tracer.stop())
    assert (restored["step"], restored["bad"]) == (scene.step - 1, "")
    assert any(str(scene.step) in key for key in restored["skipped"]), restored
    scene.step = restored["step"]
    scene.local = 0  # on another branch from here on
    scene.save_again(writer)
    scene.end(writer)


@traced
@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_every_read_of_a_restore_fails(scene: Scene) -> None:
    leave_disk_only(scene, scene.writer())
    before = scene.tmp_path / "before"
    shutil.copytree(scene.disk, before)
    number, missed = 0, 0
    while missed < 3:
        number += 1
        for times in (1, 0):
            start_over(scene, before)
            writer = newcomer(scene)
            with Tracer(
                writer.pid, calls=READS, below=str(scene.disk), fail=number, times=times
            ) as tracer:
                restored, refused = {}, ""
                try:
                    restored = writer.do("restore")
                except WriterError as error:
                    refused = error.name
                failed = [call for call in tracer.stop() if call.failed]
            # A tier that does not answer at all is never taken for a fresh start.
            assert refused in ("", "RestoreUnavailable", "NoHealthyStep"), (refused, failed)
            if restored:
                assert not restored["bad"], restored
                assert restored["step"] >= scene.step - KEEP + 1, (restored, failed)
            assert restored or failed
            scene.counts["failed"] += bool(failed)
            missed = 0 if failed else missed + 1
            scene.end(writer)
    assert scene.counts["failed"] >= 4


# -- tiers that are full ---------------------------------------------------------------------------


@contextlib.contextmanager
def small_tmpfs(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs", place)
    try:
        yield place
    finally:
        run("umount", "-l", place)  # the agent still has it open


def save_into(scene: Scene, tier: str, number: int, options: str) -> Counter[str]:
    """Five saves with little room, then some with enough, then a fresh process; their errors."""
    counts: Counter[str] = Counter()
    with small_tmpfs(scene.tmp_path / f"{tier}-{number}", options) as place:
        disk = place / "disk" if tier == "disk" else scene.tmp_path / f"beside-{number}"
        words = [str(disk), str(place / "ram") if tier == "ram" else None, KEEP, "", f"r{number}"]
        writer = scene.nursery.start()
        endings: list[dict[str, Any]] = []
        local = step = 0
        with contextlib.suppress(WriterError):
            writer.do("open", number, *words)
            writer.do("restore")
        for step in range(1, 6):
            ended = writer.do("attempt", step, LONG_S)
            endings.append(ended)
            if "local" in ended["reached"]:
                local = step
            counts.update(ended["errors"])
            # An error of ours first; what the kernel said may stand behind it.
            ours = {"SaveFailed", "TierFull", "StageNotPlanned"}
            assert set(ended["errors"][:1]) <= ours, ended
            assert set(ended["errors"][1:]) <= {*ours, "OSError"}, ended
            steps = whole_steps(disk)
            assert max(steps, default=0) >= local, (options, steps, endings)
            assert len(steps) >= min(KEEP, sum("local" in e["reached"] for e in endings))
        counts["all five"] += local == 5 and all(not e["errors"] for e in endings)
        run("mount", "-o", "remount,size=64m,nr_inodes=1000", place)
        again: list[dict[str, Any]] = []
        while not again or "local" not in again[-1]["reached"]:
            step += 1
            again.append(writer.do("attempt", step, LONG_S))
            assert len(again) <= MAX_ATTEMPTS, (options, endings[-1], again)
        left = temporaries(place)
        assert not left, left
        writer.kill()
        assert scene.nursery.wait(writer) == -signal.SIGKILL  # and not SIGBUS
        writer = scene.nursery.start()
        writer.do("open", number + 1000, *words)
        restored = writer.do("restore")
        assert (restored["step"], restored["bad"]) == (step, ""), (restored, step)
        writer.do("close")
        scene.end(writer)
    return counts


def capacities(count: int) -> list[str]:
    """Options of tmpfs: three quarters by size up to what five saves need, the others by inodes."""
    by_inodes = count // 4
    by_size = count - by_inodes
    sizes = [f"size={(n + 1) * 1400 // by_size * 1024},nr_inodes=1000" for n in range(by_size)]
    return sizes + [f"size=64m,nr_inodes={4 + n * 40 // by_inodes}" for n in range(by_inodes)]


@pytest.mark.root
@pytest.mark.timeout(180)
@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_some_capacities(scene: Scene, tier: str) -> None:
    for number, options in enumerate(capacities(7)):
        scene.counts += save_into(scene, tier, number, options)
    assert scene.counts["TierFull"] >= 3
    assert scene.counts["all five"] >= 1


@pytest.mark.torture
@pytest.mark.root
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_two_hundred_capacities(scene: Scene, tier: str) -> None:
    options = capacities(200)
    # Most of a life here is waiting: four runs of one agent live side by side. It lets go of each
    # when that was closed, or it would have too many processes and directories in the end.
    with ThreadPoolExecutor(4) as lives:
        found = lives.map(lambda n: save_into(scene, tier, n, options[n]), range(200))
        scene.counts.update(sum(found, Counter()))
    assert scene.counts["TierFull"] >= 50
    assert scene.counts["all five"] >= 20
