"""Leases and exclusive holds between processes, and a reader while the owner recycles."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtckpt import errors
from mtckpt._held import Mapped
from mtckpt.tiers import BytesSource, LocalTier, Survives

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys
from mtckpt.tiers import LocalTier

tier = LocalTier(sys.argv[1])
with getattr(tier, sys.argv[2])("run/a"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "root")
    tier.put("run/a", BytesSource(b"abc"))
    return tier


@contextlib.contextmanager
def held_elsewhere(tier: LocalTier, how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds ``run/a`` until its input ends or it is killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tier.path_of("x").parent), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        yield child
    finally:
        child.kill()
        child.communicate(timeout=20)


def may_recycle(tier: LocalTier) -> bool:
    with tier.try_exclusive("run/a") as fd:
        return fd is not None


def test_a_lease_of_another_process_holds_off_the_owner_until_it_dies(tier: LocalTier) -> None:
    assert may_recycle(tier)
    with held_elsewhere(tier, "lease") as child:
        assert not may_recycle(tier)
        with tier.lease("run/a"):
            pass  # Readers do not hold off one another.
        assert not may_recycle(tier)
        child.kill()
        child.wait(20)
        assert may_recycle(tier)


def test_a_lease_ends_though_an_error_still_refers_to_the_mapped_bytes(tier: LocalTier) -> None:
    lease = tier.lease("run/a")
    mapped = Mapped(lease.fd, lease.size_bytes)
    part_of_a_traceback = mapped.window(0, 2)
    mapped.close()
    lease.close()
    assert may_recycle(tier)
    assert bytes(part_of_a_traceback) == b"ab"


def test_a_forked_child_gives_back_nothing_of_its_parent(tier: LocalTier) -> None:
    lease = tier.lease("run/a")
    child = os.fork()
    if child == 0:
        lease.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not may_recycle(tier)
    lease.close()
    assert may_recycle(tier)


def test_an_owner_in_another_process_holds_off_readers_for_a_bounded_time(tier: LocalTier) -> None:
    with held_elsewhere(tier, "try_exclusive") as child:
        start = time.monotonic()
        with pytest.raises(errors.TierUnavailable, match="held exclusively") as raised:
            tier.lease("run/a", timeout_s=0.1)
        assert 0.1 <= time.monotonic() - start < 5
        assert raised.value.details["key"] == "run/a"
        assert not may_recycle(tier)
        child.kill()
        child.wait(20)
        tier.lease("run/a").close()


def test_what_is_not_there_cannot_be_leased(tier: LocalTier) -> None:
    for call in (lambda: tier.lease("run/b"), lambda: tier.try_exclusive("run/b").__enter__()):
        with pytest.raises(errors.ObjectNotFound):
            call()


def test_a_forgotten_lease_is_given_back(tier: LocalTier) -> None:
    lease = tier.lease("run/a")
    assert not may_recycle(tier)
    del lease
    assert may_recycle(tier)


def test_a_lease_goes_on_in_a_closed_tier(tier: LocalTier, tmp_path: Path) -> None:
    with tier.lease("run/a") as lease:
        tier.close()
        assert os.pread(lease.fd, 9, 0) == b"abc"
        assert not may_recycle(LocalTier(tmp_path / "root"))


@pytest.mark.parametrize("put_again", [True, False])
def test_what_was_recycled_between_open_and_flock_is_not_leased(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, put_again: bool
) -> None:
    whole = fcntl.flock
    slot = tier.path_of("run/a").with_name(".slot")

    def recycled_first(fd: int, operation: int) -> None:
        if not slot.exists():
            tier.path_of("run/a").rename(slot)
            if put_again:
                tier.put("run/a", BytesSource(b"healed"))
        whole(fd, operation)

    monkeypatch.setattr(fcntl, "flock", recycled_first)
    if put_again:
        with tier.lease("run/a") as lease:
            assert os.pread(lease.fd, 9, 0) == b"healed"
            assert lease.size_bytes == 6
    else:
        with pytest.raises(errors.ObjectNotFound):
            tier.lease("run/a")


def test_a_reader_never_sees_a_recycled_inode(ram_dir: Path) -> None:
    """The owner turns the file of one key into that of the next, as slots are, under a reader."""
    tier = LocalTier(ram_dir / "root", name="ram", survives=Survives.PROCESS, sync=False)
    size_bytes = 1 << 16
    tier.put("a", BytesSource(bytes(size_bytes)))
    tier.put("b", BytesSource(bytes([1]) * size_bytes))
    stop = threading.Event()
    recycled = busy = 0

    def recycle() -> None:
        nonlocal recycled, busy
        generation = 2
        hidden = tier.path_of("a").with_name(".slot")
        while not stop.is_set():
            key = "ab"[generation % 2]
            with tier.try_exclusive(key) as fd:
                if fd is None:
                    busy += 1
                    continue
                os.rename(tier.path_of(key), hidden)
            with open(hidden, "r+b", buffering=0) as file:
                file.write(bytes([generation % 251]) * size_bytes)
            os.rename(hidden, tier.path_of(key))
            recycled += 1
            generation += 1

    owner = threading.Thread(target=recycle, daemon=True)
    owner.start()
    read = 0
    end = time.monotonic() + 40
    try:
        while read < 60 or recycled < 60:
            assert time.monotonic() < end, "too slow to prove anything"
            for key in "ab":
                with contextlib.suppress(errors.ObjectNotFound), tier.lease(key) as lease:
                    first = os.pread(lease.fd, size_bytes, 0)
                    assert len(set(first)) == 1
                    assert os.pread(lease.fd, size_bytes, 0) == first
                    read += 1
    finally:
        stop.set()
        owner.join(10)
