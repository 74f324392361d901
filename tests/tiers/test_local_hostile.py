"""What somebody else may have put into the directory of a tier: refused, never followed."""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtckpt import errors
from mtckpt.testing.tier_suite import in_forks
from mtckpt.tiers import BytesSource, LocalTier, read_all
from mtckpt.tiers._rooted import temporary_name

AT_FDCWD = -100
RENAME_EXCHANGE = 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def tier(root: Path) -> Iterator[LocalTier]:
    tier = LocalTier(root)
    yield tier
    tier.close()


def verbs(tier: LocalTier, key: str) -> list[Callable[[], object]]:
    return [
        lambda: tier.put(key, BytesSource(b"x")),
        lambda: tier.read_into(key, memoryview(bytearray(1))),
        lambda: tier.stat(key),
        lambda: tier.delete(key),
        lambda: tier.lease(key),
        lambda: tier.quarantine(key, "test"),
    ]


def assert_refused(tier: LocalTier, key: str, text: str) -> None:
    for call in verbs(tier, key):
        with pytest.raises(errors.AccessDenied, match=text) as raised:
            call()
        assert (raised.value.details["tier"], raised.value.details["key"]) == ("disk", key)
        assert raised.value.actions


def plant_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def plant_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("absent"))


def plant_fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # The path of a socket may have 107 bytes only.
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("plant", "text"),
    [
        (plant_link, "symbolic link"),
        (plant_dangling_link, "symbolic link"),
        (plant_fifo, "FIFO"),
        (plant_socket, "socket"),
    ],
)
def test_what_is_no_file_is_refused_and_not_listed(
    tier: LocalTier,
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[Path, Path], None],
    text: str,
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    tier.put("run/good", BytesSource(b"x"))
    plant(root / "run" / "bad", outside)
    assert_refused(tier, "run/bad", text)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert [info.key for info in tier.list()] == ["run/good"]
    assert len(caplog.records) == 1, "said once, not at every listing"
    assert outside.read_bytes() == b"secret"
    assert sorted(os.listdir(root / "run")) == ["bad", "good"]


@pytest.mark.root
def test_a_device_is_not_opened(tier: LocalTier, root: Path) -> None:
    tier.put("run/good", BytesSource(b"x"))
    os.mknod(root / "run" / "bad", 0o600 | 0o020000, os.makedev(1, 5))
    assert_refused(tier, "run/bad", "a device")


def test_a_directory_that_is_a_link_is_not_entered(
    tier: LocalTier, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (outside / "a").write_bytes(b"secret")
    (root / "run").symlink_to(outside)
    assert_refused(tier, "run/a", "symbolic link")
    assert_refused(tier, "run/b", "symbolic link")
    assert list(tier.list()) == []
    assert os.listdir(outside) == ["a"]


def test_a_hard_link_is_refused(tier: LocalTier, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    outside.chmod(0o600)
    os.link(outside, root / "bad")
    for call in (
        lambda: tier.read_into("bad", memoryview(bytearray(1))),
        lambda: tier.lease("bad"),
    ):
        with pytest.raises(errors.AccessDenied, match=r"2 names \(hard links\)"):
            call()


def test_the_second_name_that_a_crash_left_is_no_hard_link(tier: LocalTier, root: Path) -> None:
    tier.put("run/a", BytesSource(b"abc"))
    os.link(root / "run" / "a", root / "run" / temporary_name())
    assert read_all(tier, "run/a", max_bytes=3) == b"abc"
    with tier.lease("run/a"):
        pass
    assert [info.key for info in tier.list()] == ["run/a"]
    assert tier.sweep_temporaries() == 1
    assert os.listdir(root / "run") == ["a"]
    assert read_all(tier, "run/a", max_bytes=3) == b"abc"


@pytest.mark.root
def test_what_another_user_owns_is_refused(tier: LocalTier, root: Path) -> None:
    tier.put("file", BytesSource(b"x"))
    tier.put("directory/a", BytesSource(b"x"))
    os.chown(root / "file", 4001, 4001)
    assert_refused(tier, "file", "belongs to user 4001")
    assert [info.key for info in tier.list()] == ["directory/a"]
    os.chown(root / "directory", 4001, 4001)
    assert_refused(tier, "directory/a", "belongs to user 4001")
    with pytest.raises(errors.AccessDenied):
        list(tier.list())  # It could not look: that must not read as nothing there.
    reader = LocalTier(root, read_only=True)
    assert [info.key for info in reader.list()] == ["directory/a", "file"]


def test_what_others_can_write_is_refused(tier: LocalTier, root: Path) -> None:
    tier.put("run/a", BytesSource(b"x"))
    (root / "run" / "a").chmod(0o666)
    assert_refused(tier, "run/a", "written by everybody")
    (root / "run" / "a").chmod(0o620)
    assert_refused(tier, "run/a", "written by its group")
    (root / "run" / "a").chmod(0o644)
    (root / "run").chmod(0o777)
    assert_refused(tier, "run/a", "written by everybody")


# -- the root itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "who", "action"),
    [
        (0o777, "everybody", "chmod go-w {root}"),
        (0o1777, "everybody", "use a directory of your own in it, as {root}/checkpoints"),
        (0o770, "its group", "chmod go-w {root}"),
    ],
)
def test_a_root_that_others_can_write_is_refused(
    root: Path, mode: int, who: str, action: str
) -> None:
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(errors.AccessDenied, match=f"written by {who}") as raised:
        LocalTier(root)
    assert action.format(root=root) in str(raised.value)


@pytest.mark.root
def test_a_root_of_another_user_is_refused(root: Path) -> None:
    root.mkdir(mode=0o700)
    os.chown(root, 4001, 4001)
    with pytest.raises(errors.AccessDenied, match="belongs to user 4001"):
        LocalTier(root)


def test_a_root_that_is_no_directory_is_refused(root: Path) -> None:
    root.write_bytes(b"")
    with pytest.raises(errors.AccessDenied, match="is a file, not a directory"):
        LocalTier(root)


@pytest.mark.root
def test_a_link_in_place_of_the_root_is_followed_only_if_it_is_ours(
    root: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    root.symlink_to(target)
    LocalTier(root).put("a", BytesSource(b"x"))
    assert os.listdir(target) == ["a"]
    os.chown(root, 4001, 4001, follow_symlinks=False)
    with pytest.raises(errors.AccessDenied, match="symbolic link of user 4001"):
        LocalTier(root)


def test_a_root_that_was_replaced_is_unavailable(tier: LocalTier, root: Path) -> None:
    tier.put("a", BytesSource(b"x"))
    calls = [*verbs(tier, "a"), lambda: list(tier.list()), tier.sweep_temporaries]
    aside = root.with_name("aside")
    root.rename(aside)
    for call in calls:
        with pytest.raises(errors.TierUnavailable, match="is gone"):
            call()
    root.mkdir(mode=0o700)
    for call in calls:
        with pytest.raises(errors.TierUnavailable, match="another directory"):
            call()
    root.rmdir()
    aside.rename(root)
    assert tier.stat("a").size_bytes == 1


def test_a_closed_tier_refuses_everything(tier: LocalTier) -> None:
    tier.close()
    for call in [*verbs(tier, "a"), lambda: tier.list(), tier.sweep_temporaries]:
        with pytest.raises(errors.UsageError, match="closed"):
            call()


def test_read_only_creates_and_changes_nothing(root: Path) -> None:
    with pytest.raises(errors.TierUnavailable):
        LocalTier(root, read_only=True)
    assert not root.exists()
    LocalTier(root).put("a", BytesSource(b"x"))
    tier = LocalTier(root, read_only=True)
    assert read_all(tier, "a", max_bytes=1) == b"x"
    with tier.lease("a") as lease:
        assert lease.size_bytes == 1
    for call in (
        lambda: tier.put("b", BytesSource(b"x")),
        lambda: tier.delete("a"),
        lambda: tier.quarantine("a", "x"),
        lambda: tier.try_exclusive("a").__enter__(),
    ):
        with pytest.raises(errors.TierReadOnly):
            call()


# -- users and groups ------------------------------------------------------------------------------


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that other users can reach, unlike ``tmp_path``."""
    path = tempfile.mkdtemp(prefix="mtckpt-test-")
    os.chmod(path, 0o755)
    yield Path(path)
    shutil.rmtree(path)


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    os.umask(0o077)


@pytest.mark.root
def test_members_of_a_group_share_a_tier_and_others_do_not(open_place: Path) -> None:
    root = open_place / "root"
    root.mkdir()
    os.chown(root, 4000, 5000)
    root.chmod(0o2770)

    def first() -> None:
        become(4001, 5000)
        LocalTier(root, group_access=True).put("run/a", BytesSource(b"from 4001"))

    def second() -> None:
        become(4002, 5000)
        tier = LocalTier(root, group_access=True)
        assert read_all(tier, "run/a", max_bytes=99) == b"from 4001"
        tier.put("run/b", BytesSource(b"x"))
        with tier.try_exclusive("run/a") as fd:
            assert fd is not None
        tier.delete("run/a")

    def stranger() -> None:
        become(4003, 5001)
        LocalTier(root, group_access=True)

    def alone() -> None:
        become(4002, 5000)
        LocalTier(root)  # Without group_access a group's directory is not safe.

    assert in_forks(first) == [""]
    assert in_forks(second) == [""]
    assert in_forks(stranger) == ["AccessDenied"]
    assert in_forks(alone) == ["AccessDenied"]
    assert (root / "run" / "b").stat().st_gid == 5000


@pytest.mark.root
def test_what_may_not_be_read_is_access_denied(open_place: Path) -> None:
    root = open_place / "root"
    LocalTier(root).put("run/a", BytesSource(b"x"))
    root.chmod(0o755)

    def reader() -> None:
        become(4001, 5000)
        tier = LocalTier(root, read_only=True)
        with pytest.raises(errors.AccessDenied):
            tier.stat("run/a")
        with pytest.raises(errors.AccessDenied):
            list(tier.list())

    assert in_forks(reader) == [""]


# -- swapped between look and use ------------------------------------------------------------------


def exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    names = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


def swap_while(first: Path, second: Path, work: Callable[[], bool], swaps: int) -> None:
    """Exchange two names all the time, so often at least, until ``work`` has seen enough."""
    stop = threading.Event()
    done = 0

    def swap() -> None:
        nonlocal done
        while not stop.is_set():
            exchange(first, second)
            done += 1
        if done % 2:
            exchange(first, second)

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    end = time.monotonic() + 40 + swaps / 50
    try:
        while not work() or done < swaps:
            assert time.monotonic() < end, "too slow to prove anything"
    finally:
        stop.set()
        thread.join(10)


def check_swaps(tier: LocalTier, root: Path, outside: Path, swaps: int) -> None:
    outside.mkdir(mode=0o700)
    for name in ("a", "b"):
        (outside / name).write_bytes(b"secret")
    tier.put("run/a", BytesSource(b"public"))
    link = root.with_name("link")
    link.symlink_to(outside)
    outcomes: set[str] = set()

    def work() -> bool:
        out = bytearray(6)
        for call in (
            lambda: tier.read_into("run/a", memoryview(out)),
            lambda: tier.put("run/c", BytesSource(b"leak")),
            lambda: tier.delete("run/b"),
            lambda: tier.delete("run/c"),
            lambda: [*tier.list()],
        ):
            try:
                call()
                outcomes.add("done")
            except errors.TierError as error:
                outcomes.add(type(error).__name__)
        assert out in (bytes(6), b"public")
        return {"done", "AccessDenied"} <= outcomes

    swap_while(root / "run", link, work, swaps)
    assert outcomes <= {"done", "AccessDenied", "AlreadyExists"}
    assert sorted(os.listdir(outside)) == ["a", "b"]
    assert (outside / "b").read_bytes() == b"secret"


def test_a_directory_swapped_for_a_link_leads_nowhere(
    tier: LocalTier, root: Path, tmp_path: Path
) -> None:
    check_swaps(tier, root, tmp_path / "outside", 300)


@pytest.mark.torture
@pytest.mark.timeout(300)
def test_a_directory_swapped_for_a_link_leads_nowhere_for_long(
    tier: LocalTier, root: Path, tmp_path: Path
) -> None:
    check_swaps(tier, root, tmp_path / "outside", 10_000)


def test_a_file_swapped_for_a_link_is_not_followed(
    tier: LocalTier, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    tier.put("run/a", BytesSource(b"public"))
    link = root / "run" / ".link"
    link.symlink_to(outside)
    reads = refused = 0

    def work() -> bool:
        nonlocal reads, refused
        out = bytearray(6)
        try:
            tier.read_into("run/a", memoryview(out))
            assert out == b"public"
            with tier.lease("run/a") as lease:
                assert os.pread(lease.fd, 6, 0) == b"public"
            reads += 1
        except errors.AccessDenied:
            refused += 1
        return reads > 10 and refused > 10

    swap_while(root / "run" / "a", link, work, 300)
