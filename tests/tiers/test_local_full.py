"""No room, no right to write, no descriptors: an error of ours, and what was there is unchanged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier, _put, read_all

ROOT = Path(__file__).resolve().parents[2]

# Runs with a mount namespace of its own. Every capacity is tried with room looked up first, found
# out by fallocate, and found out by writing, each through the page cache and past it.
FULL = """
import os, subprocess, sys
from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier, _put, read_all

place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=700", "tmpfs", place], check=True)
data = os.urandom(2 << 20)
look = _put.free_bytes_at
fallocate = os.posix_fallocate

def unsupported(*_):
    raise OSError(95, "not supported")

full = stored = 0
for turn in range(24):
    filler_bytes = turn * (4 << 20) // 24
    for how in ("look", "fallocate", "write"):
        _put.free_bytes_at = look if how == "look" else lambda fd: None
        os.posix_fallocate = unsupported if how == "write" else fallocate
        for direct_io in ("never", "auto"):
            root = os.path.join(place, f"root{turn}{how}{direct_io}")
            tier = LocalTier(root, sync=True, direct_io=direct_io)
            tier.put("run/small", BytesSource(b"precious"))
            with open(os.path.join(place, "filler"), "wb") as file:
                fallocate(file.fileno(), 0, filler_bytes + 1)
            try:
                tier.put("run/large", BytesSource(data))
                stored += 1
                assert read_all(tier, "run/large", max_bytes=len(data)) == data
            except errors.TierFull as error:
                full += 1
                assert error.details["needed_bytes"] == len(data), error
                assert error.details["free_bytes"] < len(data), error
                assert f"{len(data)} bytes needed" in str(error), error
                assert [info.key for info in tier.list()] == ["run/small"]
                assert sorted(os.listdir(os.path.join(root, "run"))) == ["small"]
            assert read_all(tier, "run/small", max_bytes=99) == b"precious"
            for info in list(tier.list()):
                tier.delete(info.key)
            os.unlink(os.path.join(place, "filler"))
            tier.close()
            os.rmdir(root)
print(full, stored)
"""

INODES = """
import os, subprocess, sys
from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier

place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=8,mode=700", "tmpfs", place], check=True)
tier = LocalTier(place)
try:
    for count in range(10):
        tier.put(f"run/{count}", BytesSource(b"x"))
except errors.TierFull as error:
    assert "df -i" in str(error), error
    assert len(list(tier.list())) == count > 2
    print("full")
"""

READ_ONLY = """
import subprocess, sys
from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier, read_all

place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", place], check=True)
tier = LocalTier(place)
tier.put("run/a", BytesSource(b"x"))
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
for call in (
    lambda: tier.put("run/b", BytesSource(b"x")),
    lambda: tier.put("new/b", BytesSource(b"x")),
    lambda: tier.delete("run/a"),
    lambda: tier.quarantine("run/a", "test"),
):
    try:
        call()
    except errors.TierReadOnly as error:
        assert place in str(error), error
        print(type(error).__name__)
assert read_all(tier, "run/a", max_bytes=1) == b"x"
assert [info.key for info in LocalTier(place).list()] == ["run/a"]
"""

MOUNTED_OVER = """
import subprocess, sys
from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier

place = sys.argv[1]
tier = LocalTier(place)
tier.put("a", BytesSource(b"x"))
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", place], check=True)
try:
    list(tier.list())
except errors.TierUnavailable as error:
    print(type(error).__name__)
subprocess.run(["umount", place], check=True)
assert [info.key for info in tier.list()] == ["a"]
"""


def run(code: str, place: Path, *prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    return done.stdout


def in_namespace(code: str, place: Path) -> str:
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(place)],
        capture_output=True,
        timeout=20,
        check=False,
    )
    if tried.returncode:
        pytest.skip("may not mount, not even in a namespace of its own")
    return run(code, place, "unshare", "-m", "--propagation", "private")


@pytest.mark.root
def test_a_full_file_system_at_every_capacity(tmp_path: Path) -> None:
    full, stored = map(int, in_namespace(FULL, tmp_path).split())
    assert full + stored == 24 * 6
    assert full >= 60
    assert stored >= 60


@pytest.mark.root
def test_no_inodes_left(tmp_path: Path) -> None:
    assert in_namespace(INODES, tmp_path) == "full\n"


@pytest.mark.root
def test_a_mount_that_turned_read_only(tmp_path: Path) -> None:
    assert in_namespace(READ_ONLY, tmp_path).split() == ["TierReadOnly"] * 4


@pytest.mark.root
def test_a_file_system_mounted_over_the_root(tmp_path: Path) -> None:
    assert in_namespace(MOUNTED_OVER, tmp_path).split() == ["TierUnavailable"]


LIMITS = """
import resource, sys
from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier

tier = LocalTier(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for size_bytes, direct_io in ((1 << 20, "auto"), (3 << 20, "auto"), (3 << 20, "never")):
    tier = LocalTier(sys.argv[1], direct_io=direct_io)
    try:
        tier.put(f"{size_bytes}", BytesSource(bytes(size_bytes)))
    except errors.TierFull as error:
        assert "ulimit -f" in str(error), error
        print(error.details["os_error"])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for files in range(3, 16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        tier.put(f"run/{files}", BytesSource(b"x"))
    except errors.TierUnavailable as error:
        assert "ulimit -n" in str(error), error
        failed = files
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(failed, *[info.key for info in tier.list()][:2])
assert len(list(tier.list())) == 1 + 15 - failed
assert tier.sweep_temporaries() == 0
"""


def test_limits_of_the_process(tmp_path: Path) -> None:
    first, second, last = run(LIMITS, tmp_path / "root").splitlines()
    assert (first, second) == ("EFBIG", "EFBIG")
    failed, *keys = last.split()
    assert 4 <= int(failed) <= 12
    assert keys[0] == "1048576"


KINDS: dict[int, type[errors.TierError]] = {
    errno.ENOSPC: errors.TierFull,
    errno.EDQUOT: errors.TierFull,
    errno.EFBIG: errors.TierFull,
    errno.EROFS: errors.TierReadOnly,
    errno.EACCES: errors.AccessDenied,
    errno.EPERM: errors.AccessDenied,
    errno.ELOOP: errors.AccessDenied,
    errno.ENAMETOOLONG: errors.TierError,
    errno.EIO: errors.TierUnavailable,
    errno.ENXIO: errors.TierUnavailable,
    errno.ENODEV: errors.TierUnavailable,
    errno.ESTALE: errors.TierUnavailable,
    errno.EMFILE: errors.TierUnavailable,
    errno.ENOMEM: errors.TierUnavailable,
}
CASES = [
    pytest.param(code, kind, call, id=f"{errno.errorcode[code]}-{call}")
    for code, kind in KINDS.items()
    for call in ("posix_fallocate", "dup", "pwrite", "fsync", "link", "unlink")
    # Refused links have a meaning of their own: see the test after this one.
    if (code, call) != (errno.EPERM, "link")
]


@pytest.mark.parametrize(("code", "kind", "call"), CASES)
def test_every_errno_has_an_error_of_ours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[errors.TierError],
    call: str,
) -> None:
    tier = LocalTier(tmp_path / "root")
    tier.put("run/before", BytesSource(b"precious"))
    real = getattr(os, call)
    failed: list[object] = []

    def fail(*args: object, **options: object) -> object:
        if not failed:
            failed.append(args)
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(errors.TierError) as raised:
            tier.put("run/a", BytesSource(b"0123456789"))
    assert type(raised.value) is kind
    assert (raised.value.details["tier"], raised.value.details["key"]) == ("disk", "run/a")
    assert isinstance(raised.value.__cause__, OSError)
    assert os.listdir(tmp_path / "root" / "run") == ["before"]
    tier.put("run/a", BytesSource(b"0123456789"))
    assert read_all(tier, "run/a", max_bytes=10) == b"0123456789"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_put_says_that_it_is_not_atomic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    tier = LocalTier(tmp_path / "root")
    assert not tier.put("run/a", BytesSource(b"first")).atomic
    with pytest.raises(errors.AlreadyExists):
        tier.put("run/a", BytesSource(b"second"))
    assert read_all(tier, "run/a", max_bytes=10) == b"first"
    assert os.listdir(tmp_path / "root" / "run") == ["a"]


def test_without_fallocate_and_direct_io_it_still_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    tier = LocalTier(tmp_path / "root")
    data = os.urandom((1 << 20) + 5)
    tier.put("a", BytesSource(data))
    assert read_all(tier, "a", max_bytes=len(data)) == data


def test_without_threads_it_still_stores_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    tier = LocalTier(tmp_path / "root")
    data = os.urandom((17 << 20) + 5)
    tier.put("a", BytesSource(data))
    assert read_all(tier, "a", max_bytes=len(data)) == data


def test_memory_that_is_not_aligned_goes_through_the_page_cache(tmp_path: Path) -> None:
    data = os.urandom((3 << 20) + 100)
    auto = LocalTier(tmp_path / "auto")
    for shift in (0, 1, 100):
        auto.put(f"{shift}", BytesSource(memoryview(data)[shift:]))
        assert read_all(auto, f"{shift}", max_bytes=len(data)) == data[shift:]
    always = LocalTier(tmp_path / "always", direct_io="always")
    with pytest.raises(errors.TierUnavailable) as raised:
        always.put("a", BytesSource(memoryview(data)[1:]))
    assert raised.value.details["os_error"] == "EINVAL"
    assert list(always.list()) == []


def test_no_room_is_said_before_any_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Huge:
        size_bytes = 1 << 60

        def read(self, offset: int, size_bytes: int) -> memoryview:
            raise AssertionError("nothing should be read")

    monkeypatch.setattr(_put, "free_bytes_at", lambda fd: 1000)
    with pytest.raises(errors.TierFull) as raised:
        LocalTier(tmp_path / "root").put("a", Huge())
    text = str(raised.value)
    assert f"{1 << 60} bytes needed - 1000 bytes free = {(1 << 60) - 1000} bytes short" in text
