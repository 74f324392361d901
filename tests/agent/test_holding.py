"""One agent has a directory of slots, though jobs of its user look for it at different places."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import logging
import os
import resource
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from mtckpt.agent import address, protocol, roots
from mtckpt.agent.holding import Lock, noted
from mtckpt.agent.roots import MAX_ROOTS, Roots, aside
from mtckpt.errors import AgentUnavailable, TierUnavailable, UsageError


@pytest.fixture
def root(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of this user, and no word of where the agent is."""
    monkeypatch.delenv("MTCKPT_RUNTIME_DIR")
    monkeypatch.setattr(roots, "WAIT_S", 0.1)
    monkeypatch.setattr(address, "SERVICE_DIRECTORY", str(runtime_dir / "none"))
    path = Path(protocol.ram_base())
    path.mkdir(mode=0o700)
    return path


def test_two_agents_never_have_the_same_memory(root: Path) -> None:
    first, second = Roots("/run/first"), Roots("/run/second")
    asyncio.run(first.take(str(root)))
    with pytest.raises(AgentUnavailable, match="at /run/first, has the memory") as raised:
        asyncio.run(second.take(str(root)))
    assert "MTCKPT_RUNTIME_DIR=/run/first" in raised.value.actions[0]
    asyncio.run(first.close())
    asyncio.run(second.take(str(root)))
    assert noted(str(root)) == "/run/second"
    asyncio.run(second.close())
    assert list(root.iterdir()) == []


def test_a_directory_on_nfs_is_locked_by_a_file_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of NFS turns flock into a lock of bytes, and refuses what is open for reading."""
    flock = fcntl.flock

    def as_nfs(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    first, second = Roots("/run/first"), Roots("/run/second")
    asyncio.run(first.take(str(root)))
    with pytest.raises(AgentUnavailable, match="at /run/first, has the memory"):
        asyncio.run(second.take(str(root)))
    asyncio.run(first.close())
    asyncio.run(second.take(str(root)))
    asyncio.run(second.close())


def test_memory_that_was_made_anew_is_the_agents_again(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = Roots("/run/first"), Roots("/run/second"), Roots("/run/third")
    asyncio.run(first.take(str(root)))
    shutil.rmtree(root)
    asyncio.run(first.renew())
    root.mkdir()
    asyncio.run(first.renew())
    with pytest.raises(AgentUnavailable):
        asyncio.run(second.take(str(root)))
    shutil.rmtree(root)
    root.mkdir()
    asyncio.run(third.take(str(root)))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(first.renew())
    assert len(caplog.records) == 1  # told once, and not every second
    for each in (first, third):
        asyncio.run(each.close())


def test_who_has_no_descriptor_left_has_no_directory(root: Path) -> None:
    """Another agent may have it: that no file could be opened says nothing of that."""
    first, second = Roots("/run/first"), Roots("/run/second")
    asyncio.run(first.take(str(root)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
    try:
        with pytest.raises(TierUnavailable, match="Too many open files"):
            second._try(str(root))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(last)
    asyncio.run(first.close())


def test_a_disk_that_hangs_keeps_one_thread_busy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, answers, asked = Roots("/run/first"), threading.Event(), threading.Semaphore(0)
    asyncio.run(held.take(str(root)))
    is_of = Lock.is_of

    def hanging(lock: Lock, path: str) -> bool:
        asked.release()
        return answers.wait(20) and is_of(lock, path)

    with monkeypatch.context() as patched:
        patched.setattr(roots, "RENEW_S", 0.01)
        patched.setattr(Lock, "is_of", hanging)
        asyncio.run(held.renew())
        assert asked.acquire(timeout=20)
        for _ in range(3):
            asyncio.run(held.renew())
        assert not asked.acquire(blocking=False)
        answers.set()
    while held._looking:
        threading.Event().wait(0.01)
    asyncio.run(held.close())


def test_a_disk_that_hangs_keeps_no_other_directory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, next_one = Roots("/run/first"), Roots("/run/next")
    answers, release = threading.Event(), Roots._release

    def hanging(roots: Roots, path: str) -> None:
        if path == str(tmp_path):
            answers.wait(20)
        release(roots, path)

    async def story() -> None:
        await held.take(str(tmp_path))
        await held.take(str(root))
        monkeypatch.setattr(Roots, "_release", hanging)
        monkeypatch.setattr(roots, "WAIT_S", 4.0)
        ending = asyncio.create_task(held.close())
        await next_one.take(str(root))
        answers.set()
        await ending
        await next_one.close()

    asyncio.run(story())


def test_a_look_that_comes_back_late_lets_go_of_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then a run may have been opened there."""
    held, answers, scandir = Roots("/run/first"), threading.Event(), os.scandir

    def hanging(path: str) -> Any:
        answers.wait(20)
        return scandir(path)

    async def story() -> None:
        await held.take(str(root))
        held.loaded.append(str(root))
        with monkeypatch.context() as patched:
            patched.setattr(roots, "aside", functools.partial(aside, timeout_s=0.01))
            patched.setattr(os, "scandir", hanging)
            await held.let_go(())
            answers.set()
            for look in [t for t in threading.enumerate() if t.name == f"mtckpt-{root}"]:
                look.join(20)
        assert held.loaded == [str(root)]
        with pytest.raises(AgentUnavailable, match="has the memory"):
            await Roots("/run/other").take(str(root))
        await held.close()

    monkeypatch.setattr(roots, "WAIT_S", 0.1)
    asyncio.run(story())


def test_directories_where_nothing_is_any_more_make_room_for_others(
    runtime_dir: Path, tmp_path: Path
) -> None:
    held = Roots(str(runtime_dir))

    async def use(path: Path) -> None:
        os.mkdir(path, 0o700)
        held.note(str(path))
        await held.take(str(path))
        held.loaded.append(str(path))

    async def story() -> None:
        for number in range(MAX_ROOTS):
            await use(tmp_path / str(number))
        (tmp_path / "0" / "run").mkdir()
        (tmp_path / "0" / "run" / "file").touch()
        shutil.rmtree(tmp_path / "1")
        with pytest.raises(UsageError, match="64 RAM directories"):
            await use(tmp_path / "more")
        await held.let_go({str(tmp_path / "2")})
        assert held.loaded == [str(tmp_path / "0"), str(tmp_path / "2")]
        held.note(str(tmp_path / "more"))
        other = Roots("/run/other")
        await other.take(str(tmp_path / "3"))
        await other.close()
        again = Roots(str(runtime_dir), "/nowhere")
        names = ("0", "2", "more")
        assert again.known() == ["/nowhere", *(str(tmp_path / name) for name in names)]
        (tmp_path / "more").mkdir(exist_ok=True)
        assert [*await again.there(again.known())] == again.known()[1:]
        await held.close()

    asyncio.run(story())


def test_a_job_finds_the_agent_that_has_its_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from a login session; the job that comes next is none of one."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    there = address.find()
    address.make_directory(there.directory)
    held = Roots(there.directory)
    asyncio.run(held.take(str(root)))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    own = address.find()
    assert own != there  # nobody listens
    with address.bind(there.socket_path):
        assert address.find() == there
        for bad in (b"relative\0path", os.fsencode(root / ".agent" / "is a file")):
            (root / ".agent").write_bytes(bad)
            assert address.find() == own
    asyncio.run(held.close())
