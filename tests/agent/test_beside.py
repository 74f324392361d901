"""Directories of slots beside a disk: each agent has its own, and takes over what the dead left."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_maker import RUN, fill_slot, make_shard, put_shard, ram_place, slots_of

from mtckpt import _taken
from mtckpt._manifest import SaveName, record_file
from mtckpt._slots import BESIDE
from mtckpt._transfer import verify_shard
from mtckpt.agent import beside, holding, roots
from mtckpt.agent.holding import LOCK, Lock
from mtckpt.agent.roots import Roots
from mtckpt.errors import TierUnavailable

HERE, ELSEWHERE = ("11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555")


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / BESIDE)


def agent_with(place: str, runtime: Path, *runs: str, boot_id: str = HERE) -> tuple[Roots, Path]:
    """An agent that has these runs there."""
    runtime.mkdir()
    held = Roots(str(runtime), boot_id=boot_id)

    async def begin() -> str:
        own = await held.own(place)
        held.note(own)
        await held.take(own)
        return own

    own = Path(asyncio.run(begin()))
    for run in runs:
        (own / run).mkdir()
        (own / run / "file").write_text(str(runtime))
    return held, own


def sealed(own: Path, step: int, incarnation: int = 1, number: int = 0) -> None:
    """A save of its run is there, as far as a look at it goes."""
    save = own / "r" / str(SaveName(step, incarnation, f"{number:012d}"))
    save.mkdir()
    (save / record_file(0)).touch()


def ended(held: Roots) -> None:
    """Killed: nothing of its own doing happens any more, and the kernel lets go of its locks."""
    for lock in held._locks.values():
        assert lock is not None
        lock.close()
    held._locks.clear()


def test_agents_that_share_a_disk_have_directories_of_their_own(place: str, tmp_path: Path) -> None:
    first, one = agent_with(place, tmp_path / "a", "r")
    second, other = agent_with(place, tmp_path / "b", "s")
    assert one != other
    assert asyncio.run(first.own(place)) == str(one)
    # The next agent of that place goes on with what is its own.
    ended(first)
    again = Roots(str(tmp_path / "a"), boot_id=HERE)
    assert again.known() == ["", str(one)]
    assert asyncio.run(again.own(place)) == str(one)
    asyncio.run(second.close())
    assert (other / "s").is_dir()


def test_a_run_that_a_dead_agent_left_is_taken_over_and_nothing_else(
    place: str, tmp_path: Path
) -> None:
    dead, left = agent_with(place, tmp_path / "a", "r", "s")
    living, kept = agent_with(place, tmp_path / "b", "r")
    ended(dead)
    third, own = agent_with(place, tmp_path / "c")
    assert asyncio.run(third.take_over("r", place)) == str(own)
    assert (own / "r" / "file").read_text() == str(tmp_path / "a")
    assert os.listdir(kept / "r") == ["file"]
    assert os.listdir(left / "s") == ["file"]
    assert asyncio.run(third.take_over("t", place)) == ""
    assert asyncio.run(third.take_over("s", place)) == str(own)
    assert not left.exists()
    # What lives is never taken, and not even when there is nothing else.
    fourth, _ = agent_with(place, tmp_path / "d")
    assert asyncio.run(fourth.take_over("r", place)) == ""
    assert fourth.unlooked == {}  # it is another rank's
    assert asyncio.run(fourth.take_over("r", place, alone=True)) == ""
    assert f"{tmp_path / 'b'}, lives and has slots of it in {kept}" in fourth.unlooked["r"]
    assert f"{tmp_path / 'c'}, lives and has slots of it in {own}" in fourth.unlooked["r"]
    for held in (living, third, fourth):
        asyncio.run(held.close())
    assert sorted(os.listdir(place)) == sorted([kept.name, own.name])


def test_a_directory_that_is_just_made_may_be_tidied_away_by_who_looks_for_what_is_left(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that begin at the same time: it is nobody's until it is locked."""
    other, its_own = agent_with(place, tmp_path / "a", "r")
    dead, _ = agent_with(place, tmp_path / "b", "s")
    ended(dead)
    make, made = beside.make, []

    def and_look(*arguments: str) -> str:
        made.append(make(*arguments))
        if len(made) == 1:
            beside.tidy(place, str(its_own), HERE)
            assert not os.path.exists(made[0])
        return made[-1]

    monkeypatch.setattr(beside, "make", and_look)
    (tmp_path / "c").mkdir()
    third = Roots(str(tmp_path / "c"), boot_id=HERE)
    assert asyncio.run(third.take_over("s", place)) == made[1]
    assert not beside.take_over(place, "s", str(its_own), HERE).here
    for held in (other, third):
        asyncio.run(held.close())


def test_what_another_host_left_is_taken_over_only_where_its_locks_would_be_seen(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    far, left = agent_with(place, tmp_path / "a", "r", boot_id=ELSEWHERE)
    ended(far)
    here, own = agent_with(place, tmp_path / "b")
    monkeypatch.setattr(beside, "_OF_ONE_MACHINE", frozenset())  # as on NFS
    assert asyncio.run(here.take_over("r", place)) == ""
    assert f"has left slots in {left}" in caplog.text
    assert os.listdir(left / "r") == ["file"]
    monkeypatch.undo()
    # An earlier start of this machine, on a disk that no other one has mounted.
    assert asyncio.run(here.take_over("r", place)) == str(own)
    asyncio.run(here.close())


def test_a_directory_that_has_nothing_left_goes_with_its_agent(place: str, tmp_path: Path) -> None:
    held, _ = agent_with(place, tmp_path / "a")
    asyncio.run(held.close())
    assert not os.path.exists(place)
    # That of one which was killed, with the next that is made there.
    killed, nothing = agent_with(place, tmp_path / "b")
    ended(killed)
    living, one = agent_with(place, tmp_path / "c")
    dead, left = agent_with(place, tmp_path / "d", "r")
    ended(dead)
    last, other = agent_with(place, tmp_path / "e")
    assert sorted(os.listdir(place)) == sorted([one.name, left.name, other.name])
    assert not nothing.exists()
    for held in (living, last):
        asyncio.run(held.close())


def test_what_somebody_else_could_have_put_there_is_not_looked_at(
    place: str, tmp_path: Path
) -> None:
    held, left = agent_with(place, tmp_path / "a", "r")
    ended(held)
    left.chmod(0o777)
    other, _ = agent_with(place, tmp_path / "b")
    assert asyncio.run(other.take_over("r", place)) == ""
    left.chmod(0o700)
    os.rename(left, tmp_path / "elsewhere")
    left.symlink_to(tmp_path / "elsewhere")
    assert asyncio.run(other.take_over("r", place)) == ""
    asyncio.run(other.close())


def test_a_disk_that_is_slow_to_wake_up_is_waited_for_and_one_that_hangs_is_not(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, _ = agent_with(place, tmp_path / "a", "r")
    ended(dead)
    here, own = agent_with(place, tmp_path / "b")
    has_left, awake = beside.has_left, threading.Event()

    def slow(*args: str) -> bool:
        awake.wait(20)
        return has_left(*args)

    monkeypatch.setattr(beside, "has_left", slow)
    assert asyncio.run(here.take_over("r", place, patience_s=1.0)) == ""
    assert "did not answer within 0.3 s" in here.unlooked["r"]
    threading.Timer(2 * roots.MIN_LOOK_S, awake.set).start()
    assert asyncio.run(here.take_over("r", place, patience_s=60.0)) == str(own)
    asyncio.run(here.close())


def test_an_agent_that_has_all_the_directories_it_may_passes_over_what_is_left(
    place: str, tmp_path: Path
) -> None:
    """A job starts all the same."""
    dead, _ = agent_with(place, tmp_path / "a", "r")
    ended(dead)
    here = Roots(str(tmp_path), boot_id=HERE)
    for number in range(roots.MAX_ROOTS):
        here.note(f"/there/{number}")
    for _ in range(2):
        assert asyncio.run(here.take_over("r", place)) == ""
    assert "RAM directories already" in here.unlooked["r"]
    assert len(os.listdir(place)) == 2  # however often
    asyncio.run(here.close())


def test_a_disk_that_hangs_for_days_keeps_few_threads_busy(
    place: str,
) -> None:
    """However often jobs are started there."""
    answers, asked = threading.Event(), threading.Semaphore(0)

    def look() -> bool:
        asked.release()
        return answers.wait(20)

    async def story() -> None:
        for _ in range(3 * roots.MAX_HANGING):
            with pytest.raises(TierUnavailable, match="not answer"):
                await roots.aside(look, place, 0.01)
        answers.set()
        for _ in range(roots.MAX_HANGING):
            assert asked.acquire(timeout=20)
        assert not asked.acquire(blocking=False)
        while roots._hanging[place]:  # noqa: ASYNC110 - a thread ends it
            await asyncio.sleep(0.01)
        assert await roots.aside(look, place)

    asyncio.run(story())


def test_of_several_that_are_left_the_run_goes_on_as_the_one_with_the_newest_save(
    place: str, tmp_path: Path
) -> None:
    dead = [agent_with(place, tmp_path / name, "r") for name in "ab"]
    paths = sorted(own for _, own in dead)
    for number, (path, incarnation) in enumerate(zip(paths, (1, 2), strict=True)):
        sealed(path, 10 - number, incarnation, number)
    for held, _ in dead:
        ended(held)
    here, own = agent_with(place, tmp_path / "c")
    assert asyncio.run(here.take_over("r", place)) == str(own)
    assert (own / "r" / str(SaveName(9, 2, f"{1:012d}"))).is_dir()
    (rest,) = (own / "r").glob(".taken-*")  # which is taken in when somebody looks
    assert (rest / str(SaveName(10, 1, f"{0:012d}"))).is_dir()
    assert os.listdir(place) == [own.name]
    asyncio.run(here.close())


def test_a_save_that_was_never_sealed_is_not_the_newest(place: str, tmp_path: Path) -> None:
    """Its agent was killed once the save had a directory, and before anything lay in it."""
    dead = [agent_with(place, tmp_path / name, "r") for name in "ab"]
    cut_off, whole = sorted(own for _, own in dead)
    sealed(cut_off, 5)
    (cut_off / "r" / str(SaveName(12, 1, f"{2:012d}"))).mkdir()
    sealed(whole, 10, number=1)
    for held, _ in dead:
        ended(held)
    here, own = agent_with(place, tmp_path / "c")
    assert asyncio.run(here.take_over("r", place)) == str(own)
    assert (own / "r" / str(SaveName(10, 1, f"{1:012d}"))).is_dir()
    assert "r" not in here.unlooked
    asyncio.run(here.close())


class Killed(BaseException):
    """Nothing more is done."""


def dies_at(number: int) -> Callable[[str], None]:
    """A crash point that ends the work when it is passed for this time."""
    left = [number]

    def crash_point(_: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return crash_point


def test_parts_that_several_dead_agents_have_are_brought_together_wherever_one_is_killed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three containers, a rank in each, and then one with all: it has what they had left."""
    shards = [make_shard(tmp_path, 20, rank, 3) for rank in range(3)]
    old = make_shard(tmp_path, 10, 1, 3)
    dead = [agent_with(place, tmp_path / name) for name in "abc"]
    for (_, own), shard in zip(dead, shards, strict=True):
        put_shard(own, shard)
    put_shard(dead[1][1], old)
    half = put_shard(dead[0][1], shards[1])  # how far another one came who was killed
    half.with_suffix(".json").unlink()
    slots = slots_of(ram_place(dead[2][1]))
    captured = make_shard(tmp_path, 30, 2, 3)
    for slot_id in ("full", "free"):
        slot = slots.allocate(RUN, slot_id, len(captured.data), len(captured.table))
        if slot_id == "full":
            fill_slot(slot, captured)
    for held, _ in dead:
        ended(held)
    before = tmp_path / "before"
    shutil.copytree(place, before)
    for number in itertools.count(1):
        shutil.rmtree(place)
        shutil.copytree(before, place)
        here, own = agent_with(place, tmp_path / f"here-{number}")
        assert asyncio.run(here.take_over(RUN, place)) == str(own)
        assert os.listdir(place) == [own.name]
        taken = ram_place(own)
        with monkeypatch.context() as patched:
            patched.setattr(_taken, "crash_point", dies_at(number))
            try:
                slots_of(taken).scan(RUN, repair=True)
            except Killed:
                was_killed = True
            else:
                was_killed = False
        found = [slot.record for slot in slots_of(taken).scan(RUN, repair=True).slots]
        assert [record.name for record in found if record] == [captured.name]
        for shard in (*shards, old):
            assert not verify_shard(taken, RUN, shard.name, shard.rank).damaged
        assert sorted(os.listdir(own / RUN)) == [
            ".slots",
            *sorted({str(s.name) for s in (old, shards[0])}),
        ]
        asyncio.run(here.close())
        if not was_killed:
            break
    assert number > 6


def test_a_directory_that_went_with_its_agent_is_none_for_the_next(
    place: str, tmp_path: Path
) -> None:
    before, empty = agent_with(place, tmp_path / "a")
    asyncio.run(before.close())
    dead, _ = agent_with(place, tmp_path / "b", "r")
    ended(dead)
    held = Roots(str(tmp_path / "a"), boot_id=HERE)
    assert asyncio.run(held.there(held.known())) == {}
    own = asyncio.run(held.take_over("r", place))
    assert own not in ("", str(empty))
    assert os.listdir(os.path.join(own, "r")) == ["file"]
    asyncio.run(held.close())


def test_what_is_left_is_named_and_deleted_where_nobody_can_have_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, own = agent_with(place, tmp_path / "a", "r", "s")
    living, its_own = agent_with(place, tmp_path / "b", "r")
    far, its = agent_with(place, tmp_path / "c", "s", boot_id=ELSEWHERE)
    save = own / "s" / str(SaveName(1, 1, "0" * 12))
    save.mkdir()
    (save / "data").write_bytes(bytes(5000))
    ended(dead)
    ended(far)
    monkeypatch.setattr(beside, "_OF_ONE_MACHINE", frozenset())  # as on NFS
    said = {(one.root, one.run_key): one.agent for one in beside.left(place, HERE)}
    assert said == {
        (str(own), "r"): "gone",
        (str(own), "s"): "gone",
        (str(its_own), "r"): "lives",
        (str(its), "s"): "unknown",
    }
    deleted, kept = beside.delete(place, "r", HERE)
    assert (deleted, len(kept)) == ([], 2)  # a job has that run
    deleted, kept = beside.delete(place, "s", HERE)
    assert [(one.root, one.size_bytes >= 5000) for one in deleted] == [(str(own), True)]
    assert [one.root for one in kept] == [str(its)]
    assert sorted(path.name for path in own.iterdir() if path.is_dir()) == ["r"]
    asyncio.run(living.close())
    ended(living)
    assert len(beside.delete(place, "r", HERE)[0]) == 2
    assert os.listdir(place) == [its.name]
    assert beside.delete(place, "r", HERE) == ([], [])


def test_what_another_agent_removes_amid_a_look_hides_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, _ = agent_with(place, tmp_path / "a", "r")
    ended(dead)
    here, own = agent_with(place, tmp_path / "b")
    listdir = os.listdir
    gone = f"{HERE}.0123456789abcdef"

    def before(path: str) -> list[str]:
        return [*listdir(path), gone] if path == place else listdir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", before)
        assert asyncio.run(here.take_over("r", place)) == str(own)
    asyncio.run(here.close())


def test_on_nfs_a_directory_goes_once_its_lock_has(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is removed while it is open is there under another name until it is closed."""
    flock, unlink, close = fcntl.flock, os.unlink, Lock.close
    stays: list[str] = []

    def as_nfs(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, operation)

    def rename(path: str) -> None:
        if not path.endswith(LOCK):
            return unlink(path)
        stays.append(os.path.join(os.path.dirname(path), ".nfs0001"))
        return os.rename(path, stays[-1])

    def closed(lock: Lock) -> None:
        close(lock)
        while stays:
            unlink(stays.pop())

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    held, _ = agent_with(place, tmp_path / "a")
    monkeypatch.setattr(os, "unlink", rename)
    monkeypatch.setattr(Lock, "close", closed)
    asyncio.run(held.close())
    assert not os.path.exists(place)


@pytest.mark.timeout(30)
def test_directories_on_disks_that_hang_are_let_go_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens a run waits for it."""
    held, both = Roots(str(tmp_path), boot_id=HERE), threading.Barrier(2)

    def leave(_: str) -> bool:
        both.wait(10)
        return True

    held.loaded = ["/one", "/other"]
    monkeypatch.setattr(roots, "_is_empty", leave)
    asyncio.run(held.let_go(()))
    assert held.loaded == []


def test_a_directory_that_is_let_go_of_amid_a_look_at_it_is_not_taken_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, own = agent_with(place, tmp_path / "a")
    (before,) = held._locks.values()
    assert before is not None
    own.rename(tmp_path / "away")
    own.mkdir(mode=0o700)  # made anew, by whoever

    def meanwhile(root: str) -> Lock | None:
        monkeypatch.undo()
        held._release(root)
        own.mkdir(mode=0o700, parents=True)
        return holding.lock(root)

    monkeypatch.setattr(roots, "lock", meanwhile)
    held._renew(str(own), before)
    assert held._locks == {}
    free = holding.lock(str(own))
    assert free is not None
    free.close()
