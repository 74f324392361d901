"""The order in which a put reaches the medium, and what is left when it is cut short."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from small_writer import Nursery, WriterGone
from syscall_tracer import Call, Tracer, why_not

from mtckpt.errors import AlreadyExists
from mtckpt.testing import CrashPoint
from mtckpt.tiers import BytesSource, LocalTier, _rooted, read_all

ROOT = Path(__file__).resolve().parents[2]

PUT = """
import sys
from mtckpt.tiers import BytesSource, LocalTier, PutResult
from mtckpt import errors

tier = LocalTier(sys.argv[1])
try:
    print(tier.put("run/1/a", BytesSource(bytes(5000))).atomic)
except errors.TierUnavailable as error:
    print("unavailable", error.details["os_error"])
print(*[info.key for info in tier.list()])
"""

# Planted bugs: each drops one thing, and the check below must notice.
NO_DIRECTORY_SYNC = (
    "from mtckpt.tiers._rooted import Root\nRoot.sync_directories = lambda *_: None\n"
)
NO_PARENT_SYNC = """
from mtckpt.tiers._rooted import Root
whole = Root.sync_directories
Root.sync_directories = lambda self, fds, key: whole(self, fds[-1:], key)
"""
NO_FILE_SYNC = "from mtckpt.tiers import _put\n_put.full_sync = lambda fd: None\n"
LATE_FILE_SYNC = """
from mtckpt.tiers import _put
late, publish = [], _put.Put._publish
import os
_put.full_sync = lambda fd: None
def published(self, keep_fd):
    atomic = publish(self, keep_fd)
    os.fsync(keep_fd)
    return atomic
_put.Put._publish = published
"""


def run_put(root: Path, *prefix: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", planted + PUT, str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def traced_put(root: Path, planted: str = "") -> list[str]:
    """The calls that matter, in order: "sync PATH" or "link PATH"."""
    log = root.with_name("trace")
    calls = "trace=fsync,fdatasync,linkat"
    done = run_put(root, "strace", "-f", "-y", "-o", str(log), "-e", calls, planted=planted)
    assert done.stdout.split() == ["True", "run/1/a"], done.stderr
    events = []
    for line in log.read_text().splitlines():
        if found := re.search(r"f(?:data)?sync\(\d+<([^>]*)>\) += 0", line):
            events.append(f"sync {found[1].removesuffix(' (deleted)')}")
        elif re.search(r"linkat\(.*\) += 0", line):
            events.append("link")
    return events


def missing_syncs(events: list[str], root: Path) -> list[str]:
    """What a power cut right after the put could still undo."""
    link = events.index("link")
    before, after = events[:link], events[link:]
    wrong = []
    if not any(re.fullmatch(rf"sync {root}/run/1/\.tmp-[\w-]+", event) for event in before):
        wrong.append("file before link")
    wrong += [
        f"{directory} after link"
        for directory in ("run/1", "run", "")
        if f"sync {root / directory}" not in after
    ]
    if f"sync {root.parent}" not in events:
        wrong.append("parent of the root")
    return wrong


@pytest.mark.strace
def test_everything_is_synced_in_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert missing_syncs(traced_put(root), root) == []


@pytest.mark.strace
@pytest.mark.parametrize(
    ("planted", "missed"),
    [
        (NO_DIRECTORY_SYNC, ["run/1 after link", "run after link", " after link"]),
        (NO_PARENT_SYNC, ["run after link", " after link"]),
        (NO_FILE_SYNC, ["file before link"]),
        (LATE_FILE_SYNC, ["file before link"]),
    ],
    ids=["no-directory-sync", "no-parent-sync", "no-file-sync", "late-file-sync"],
)
def test_the_check_notices_what_is_dropped(tmp_path: Path, planted: str, missed: list[str]) -> None:
    root = tmp_path / "root"
    assert missing_syncs(traced_put(root, planted), root) == missed


@pytest.mark.strace
@pytest.mark.parametrize("nth", [2, 3, 4, 5])
def test_a_failed_fsync_is_reported_and_not_tried_again(tmp_path: Path, nth: int) -> None:
    """The first fsync is of the root's parent; then file, directory, its parent and the root."""
    root = tmp_path / "root"
    log = tmp_path / "trace"
    fault = f"inject=fsync:error=EIO:when={nth}"
    done = run_put(root, "strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync", "-e", fault)
    assert done.stdout.split() == ["unavailable", "EIO"], done.stderr
    synced = re.findall(r"fsync\(\d+<([^>]*)>\)", log.read_text())
    assert len(synced) == nth
    assert len(set(synced)) == nth
    assert os.listdir(root) == []
    assert run_put(root).stdout.split() == ["True", "run/1/a"]


@pytest.mark.strace
def test_a_root_whose_parent_cannot_be_synced_is_not_opened(tmp_path: Path) -> None:
    done = run_put(tmp_path / "root", "strace", "-f", "-o", "/dev/null",
                   "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1")  # fmt: skip
    assert "TierUnavailable" in done.stderr


@pytest.mark.strace
def test_an_error_of_close_is_not_lost(tmp_path: Path) -> None:
    """The bytes may be gone although fsync liked them: NFS tells at close."""
    planted = """
import os
close, dup, kept = os.close, os.dup, []
os.dup = lambda fd: kept.append(fd) or dup(fd)
def failing(fd):
    close(fd)
    if kept == [fd]:
        kept.append(-1)
        raise OSError(5, "Input/output error")
os.close = failing
"""
    done = run_put(tmp_path / "root", planted=planted)
    assert done.stdout.split() == ["unavailable", "EIO"], done.stderr
    assert os.listdir(tmp_path / "root") == []


@pytest.mark.parametrize(
    ("point", "stored", "leftovers"),
    [
        ("put.created", False, 1),
        ("put.written", False, 1),
        ("put.synced", False, 1),
        ("put.linked", True, 1),
        ("put.unlinked", True, 0),
        ("put.done", True, 0),
    ],
)
def test_killed_anywhere_an_object_is_whole_or_not_there(
    tmp_path: Path, point: str, stored: bool, leftovers: int
) -> None:
    root = tmp_path / "root"
    killed = subprocess.run(
        [sys.executable, "-c", PUT, str(root)],
        env={**CrashPoint(point).environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=50,
        check=False,
    )
    assert killed.returncode == -9
    tier = LocalTier(root)
    assert [info.key for info in tier.list()] == (["run/1/a"] if stored else [])
    if stored:
        assert read_all(tier, "run/1/a", max_bytes=5000) == bytes(5000)
    assert tier.sweep_temporaries() == leftovers
    assert tier.sweep_temporaries() == 0
    if stored:
        assert read_all(tier, "run/1/a", max_bytes=5000) == bytes(5000)
        with pytest.raises(AlreadyExists):
            tier.put("run/1/a", BytesSource(b"x"))
    else:
        tier.put("run/1/a", BytesSource(b"x"))


def test_a_key_that_is_taken_is_durable_when_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever put it may not have synced yet, and the caller may now rely on it."""
    tier = LocalTier(tmp_path / "root")
    tier.put("run/1/a", BytesSource(b"x"))
    synced = []
    whole = _rooted.full_sync

    def noted(fd: int) -> None:
        whole(fd)
        synced.append(os.fstat(fd).st_ino)

    with monkeypatch.context() as patch:
        patch.setattr(_rooted, "full_sync", noted)
        with pytest.raises(AlreadyExists):
            tier.put("run/1/a", BytesSource(b"x"))
    places = (tmp_path / "root" / below for below in ("run/1", "run", ""))
    assert synced == [place.stat().st_ino for place in places]


def test_a_sweep_leaves_a_put_in_flight_alone(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "root")
    swept = []

    class Sweeping:
        size_bytes = 10

        def read(self, offset: int, size_bytes: int) -> memoryview:
            swept.append(LocalTier(tmp_path / "root").sweep_temporaries())
            return memoryview(bytes(size_bytes))

    tier.put("run/a", Sweeping())
    assert swept == [0]
    assert tier.stat("run/a").size_bytes == 10


def test_a_sweep_leaves_what_another_host_may_be_writing(tmp_path: Path) -> None:
    """On a shared disk a lock may be known to one host only: there the age of the last write tells.

    Files of this host go at once when nobody holds them, so that a reboot frees their room.
    """
    tier = LocalTier(tmp_path / "root")
    tier.put("run/a", BytesSource(b"x"))
    directory = tmp_path / "root" / "run"
    ours = directory / _rooted.temporary_name()
    writing, dead, held = (directory / f".tmp-{n:08x}-{n:016x}" for n in (1, 2, 3))
    for path in (ours, writing, dead, held):
        path.write_bytes(b"half")
        path.chmod(0o600)
    two_hours_ago = time.time() - 7200.0
    for path in (dead, held):
        os.utime(path, (two_hours_ago, two_hours_ago))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert tier.sweep_temporaries() == 2
        assert sorted(path.name for path in directory.glob(".tmp-*")) == [writing.name, held.name]
    os.utime(writing, (two_hours_ago, two_hours_ago))
    assert tier.sweep_temporaries() == 2
    assert [path.name for path in directory.iterdir()] == ["a"]


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "processes can be traced")
def test_killed_before_every_syscall(tmp_path: Path, runtime_dir: Path) -> None:
    """SIGKILL before every call of the process, from the opening of the root to its closing."""
    nursery = Nursery(tmp_path)
    killed: list[Call] = []
    try:
        while len(killed) < 1000:
            root = tmp_path / f"{len(killed)}"
            writer = nursery.start()
            with Tracer(writer.pid, kill=len(killed) + 1) as tracer:
                with contextlib.suppress(WriterGone):
                    assert writer.do("put", str(root), "run/1/a", 5000)
                    break
                killed.append(tracer.stop()[-1])
            nursery.wait(writer)
            tier = LocalTier(root)
            for info in tier.list():
                assert read_all(tier, info.key, max_bytes=5000) == bytes(5000)
            tier.sweep_temporaries()
            hidden = [name for *_, files in os.walk(root) for name in files if name[0] == "."]
            assert hidden == [], killed[-1]
    finally:
        nursery.close()
    names = Counter(call.name for call in killed)
    print(names)
    assert names["fsync"] == 5  # as `missing_syncs` wants them
    assert names["linkat"] == 1
    assert names["unlinkat"] == 1
