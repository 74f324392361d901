"""Directories of slots beside a disk: each agent has its own, and takes over what the dead left."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from mtckpt._manifest import SaveName, record_file
from mtckpt._slots import BESIDE
from mtckpt.agent import beside, roots
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
    assert asyncio.run(again.known()) == [str(one)]
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
    assert asyncio.run(here.take_over("r", place)) == ""
    assert "RAM directories already" in here.unlooked["r"]
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


def test_of_several_that_are_left_the_one_with_the_newest_save_is_taken_over(
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
    assert (paths[0] / "r").is_dir()
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


def test_other_ranks_parts_that_another_dead_agent_has_are_spoken_of(
    place: str, tmp_path: Path
) -> None:
    """Two containers, a rank in each, and then one with both: it has one of the directories."""
    dead = [agent_with(place, tmp_path / name, "r") for name in "abc"]
    for (held, own), step in zip(dead, (20, 20, 10), strict=True):
        sealed(own, step)
        ended(held)
    here, _ = agent_with(place, tmp_path / "d")
    assert asyncio.run(here.take_over("r", place))
    (left,) = (own for _, own in dead[:2] if (own / "r").is_dir())
    assert f"agent that is gone has left parts of it in {left} as well" in here.unlooked["r"]
    asyncio.run(here.close())


def test_a_directory_that_went_with_its_agent_is_none_for_the_next(
    place: str, tmp_path: Path
) -> None:
    before, empty = agent_with(place, tmp_path / "a")
    asyncio.run(before.close())
    dead, _ = agent_with(place, tmp_path / "b", "r")
    ended(dead)
    held = Roots(str(tmp_path / "a"), boot_id=HERE)
    assert asyncio.run(held.known()) == []
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
