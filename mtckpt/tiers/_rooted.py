"""Opening things below one directory without ever being led out of it.

It knows descriptors, owners, modes and link counts, and refuses what is not plainly ours: symbolic
links, FIFOs, devices, foreign owners, hard links. It does not know what the bytes are. It does not
promise safety from a process of the same user, nor from root: nothing could.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    ObjectNotFound,
    TierError,
    TierReadOnly,
    TierUnavailable,
    UnsupportedPlatform,
    UsageError,
)
from mtckpt.tiers._os_errors import free_bytes_at, tier_error

__all__ = ["TEMPORARY", "Root", "full_sync", "is_of_this_host", "let_go", "temporary_name"]

TEMPORARY = ".tmp-"

# Zero where the platform lacks a flag: opening then relies on the checks of fstat alone.
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | _CLOEXEC
# O_NONBLOCK: a FIFO swapped in after the check must not hold the caller for ever.
FILE_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | _CLOEXEC
)


@functools.cache
def _host() -> str:
    """This machine in eight characters, the same after a reboot."""
    machine = b""
    with contextlib.suppress(OSError), open("/etc/machine-id", "rb") as file:
        machine = file.read()
    node = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return f"{zlib.crc32(os.fsencode(node) + machine):08x}"


def temporary_name() -> str:
    """A new name for a file that is being written; it tells on which host."""
    return f"{TEMPORARY}{_host()}-{os.urandom(8).hex()}"


def is_of_this_host(name: str) -> bool:
    """Whether a temporary file was made here, where its lock says whether its writer lives."""
    return name.startswith(f"{TEMPORARY}{_host()}-")


def full_sync(fd: int) -> None:
    """fsync that reaches the medium: on macOS plain fsync stops in the drive's cache."""
    try:
        import fcntl
    except ImportError:
        os.fsync(fd)
        return
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, full)


def let_go(fd: int) -> None:
    """Close what nothing was written through: an error of that tells of nothing that was asked."""
    with contextlib.suppress(OSError):
        os.close(fd)


class Root:
    """A directory, held open, and the only way to anything below it."""

    def __init__(
        self, path: Path, *, tier: str, sync: bool, group_access: bool, read_only: bool
    ) -> None:
        if os.open not in os.supports_dir_fd:
            raise UnsupportedPlatform(
                "this operating system cannot open files relative to a directory",
                state="nothing was done",
                actions=["use Linux or macOS, or a tier that is not a local directory"],
                tier=tier,
            )
        self.path = Path(os.path.abspath(path))
        self.tier = tier
        self.sync = sync
        self.group_access = group_access
        self.read_only = read_only
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._fd = -1
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            with self.errors(None, "open", missing=False):
                self._open()
            stack.pop_all()

    def _open(self) -> None:
        path = self._follow_own_link()
        created = not self.read_only and self._create(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | _DIRECTORY)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            kind = _kind(os.lstat(path).st_mode)
            raise self.unsafe(path, None, f"is {kind}, not a directory") from error
        if created and self.group_access:
            os.fchmod(self._fd, 0o2770)  # mkdir leaves out what the umask says, and the setgid bit
        self.gid = -1
        info = os.fstat(self._fd)
        self._check_root(info)
        self.gid = info.st_gid
        self._identity = (info.st_dev, info.st_ino)
        if self.sync and not self.read_only:
            self._sync_parent(path)

    def _follow_own_link(self) -> Path:
        """A root that is a link of our own is followed once; a link somebody else made is not."""
        try:
            info = os.lstat(self.path)
        except FileNotFoundError:
            return self.path
        if not stat.S_ISLNK(info.st_mode):
            return self.path
        if not self.read_only and info.st_uid not in (os.geteuid(), 0):
            raise self.unsafe(self.path, None, f"is a symbolic link of user {info.st_uid}")
        return Path(os.path.realpath(self.path))

    def _create(self, path: Path) -> bool:
        missing = []
        parent = path
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            mode = (0o770 if self.group_access else 0o700) if directory == path else 0o777
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, mode)
            if self.sync and directory != path:
                self._sync_parent(directory)
        return bool(missing)

    def _sync_parent(self, path: Path) -> None:
        """Make the entry of ``path`` durable, even if another process has made it just now."""
        try:
            fd = os.open(path.parent, os.O_RDONLY | _CLOEXEC)
        except PermissionError:
            return  # Not readable, so not ours: then we did not make the entry either.
        try:
            full_sync(fd)
        except OSError as error:
            # A read-only or odd parent (EROFS, EINVAL) holds an entry that was there before us.
            if error.errno not in (errno.EROFS, errno.EINVAL):
                raise
        finally:
            let_go(fd)

    def check_writable(self) -> None:
        """Refuse a directory, opened to be read, that could not be written to as one of ours."""
        self._check_root(os.fstat(self._fd), to_write=True)

    def _check_root(self, info: os.stat_result, *, to_write: bool = False) -> None:
        if self.read_only and not to_write:
            return
        if not self._is_ours(info) and not (
            self.group_access and info.st_gid in (os.getegid(), *os.getgroups())
        ):
            raise self.unsafe(
                self.path, None, f"belongs to user {info.st_uid}", f"run as user {info.st_uid}"
            )
        self._check_mode(info, self.path, None)

    def _is_ours(self, info: os.stat_result) -> bool:
        if info.st_uid in (os.geteuid(), 0):
            return True
        return self.group_access and info.st_gid == self.gid

    def _check_mode(self, info: os.stat_result, path: Path, key: str | None) -> None:
        forbidden = 0o002 if self.group_access else 0o022
        if info.st_mode & forbidden:
            who = "everybody" if info.st_mode & 0o002 else "its group"
            mode = stat.S_IMODE(info.st_mode)
            narrower = f"chmod {'o-w' if self.group_access else 'go-w'} {path}"
            if mode & stat.S_ISVTX:  # everybody's, as /tmp, and to stay so
                narrower = f"use a directory of your own in it, as {path / 'checkpoints'}"
            raise self.unsafe(path, key, f"can be written by {who} (mode {mode:04o})", narrower)

    def unsafe(self, path: Path, key: str | None, why: str, *actions: str) -> AccessDenied:
        """The refusal of something that is not plainly ours."""
        return AccessDenied(
            f"{path} {why}: not safe to use",
            state="nothing was read or written there",
            actions=[*actions, f"look who made it (ls -la {path.parent}), then remove or chown it"],
            tier=self.tier,
            key=key,
        )

    def error(
        self, error: OSError, key: str | None, doing: str, needed_bytes: int = 0
    ) -> TierError:
        """``error`` as one of ours, with this root's place and free space in it."""
        free_bytes = None
        if error.errno == errno.ENOSPC and self._fd >= 0:
            free_bytes = free_bytes_at(self._fd)
        return tier_error(
            error,
            doing=doing,
            tier=self.tier,
            key=key,
            place=str(self.path),
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )

    @contextlib.contextmanager
    def using(self, *, writing: bool = False) -> Iterator[int]:
        """The root's descriptor, which stays open for as long as the block runs."""
        with self._lock:
            if self._closed:
                raise UsageError(f"the tier at {self.path} is closed", tier=self.tier)
            self._users += 1
        try:
            self._check_still_there()
            if writing and self.read_only:
                raise TierReadOnly(
                    f"{self.path} was opened for reading only",
                    state="nothing was changed",
                    tier=self.tier,
                )
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def is_there(self) -> bool:
        """Whether the root's path still leads to the directory that was opened."""
        try:
            self._check_still_there()
        except TierUnavailable:
            return False
        return True

    def _check_still_there(self) -> None:
        """An unmounted or replaced root must not look like an empty tier."""
        try:
            info = os.stat(self.path)
        except OSError as error:
            raise TierUnavailable(
                f"{self.path} is gone: {error.strerror}",
                actions=["mount or restore it, then open the tier again"],
                tier=self.tier,
            ) from error
        if (info.st_dev, info.st_ino) != self._identity:
            raise TierUnavailable(
                f"{self.path} is another directory than the one that was opened",
                actions=["mount what was there before, or open the tier again"],
                tier=self.tier,
            )

    def close(self) -> None:
        """Give up the descriptor once no call uses it any more."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # A tier that nobody closed must not keep a descriptor for the life of a training job. At
        # the end of the interpreter what this needs may be gone, and the kernel closes all.
        if getattr(self, "_fd", -1) >= 0 and not is_ending():
            let_go(self._fd)

    def _close_if_unused(self) -> None:
        if self._closed and not self._users and self._fd >= 0:
            let_go(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def directory(
        self, root_fd: int, parts: Sequence[str], key: str | None, *, create: bool = False
    ) -> Iterator[list[int]]:
        """Descriptors of the root and of every directory on the way to ``parts``.

        Raises:
            FileNotFoundError: one of them is not there (any more).
            NotADirectoryError: an object has the name of one of them.
        """
        # Not dup: copies share one position, and two threads listing at once would skip entries.
        fds = [os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=root_fd)]
        try:
            for depth, part in enumerate(parts):
                if create:
                    self._make_directory(part, fds[-1])
                fds.append(self._enter(part, fds[-1], self.path.joinpath(*parts[: depth + 1]), key))
            yield fds
        finally:
            for fd in fds:
                let_go(fd)

    def _make_directory(self, name: str, parent_fd: int) -> None:
        try:
            os.mkdir(name, 0o770 if self.group_access else 0o700, dir_fd=parent_fd)
        except FileExistsError:
            return
        if self.group_access:
            fd = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent_fd)
            try:
                os.fchmod(fd, 0o2770)
            finally:
                let_go(fd)

    def _enter(self, name: str, parent_fd: int, path: Path, key: str | None) -> int:
        try:
            fd = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            mode = os.lstat(name, dir_fd=parent_fd).st_mode
            if stat.S_ISREG(mode):
                raise NotADirectoryError(errno.ENOTDIR, "an object, not a directory") from error
            raise self.unsafe(path, key, f"is {_kind(mode)}") from error
        try:
            info = os.fstat(fd)
            if not self.read_only:
                if not self._is_ours(info):
                    raise self.unsafe(path, key, f"belongs to user {info.st_uid}")
                self._check_mode(info, path, key)
        except BaseException:
            let_go(fd)
            raise
        return fd

    def check_file(
        self, info: os.stat_result, key: str, *, dir_fd: int = -1, file_fd: int = -1
    ) -> None:
        """Refuse what is not a regular file of ours with one name.

        ``dir_fd`` and ``file_fd`` are given where the number of names matters: a crash between
        link and unlink leaves a second one, which is ours and not a planted one.
        """
        path = self.path / key
        if stat.S_ISDIR(info.st_mode):
            raise ObjectNotFound(f"{key} is a directory, not an object", tier=self.tier, key=key)
        if not stat.S_ISREG(info.st_mode):
            raise self.unsafe(path, key, f"is {_kind(info.st_mode)}")
        if self.read_only:
            return
        if not self._is_ours(info):
            raise self.unsafe(path, key, f"belongs to user {info.st_uid}")
        self._check_mode(info, path, key)
        if dir_fd >= 0 and info.st_nlink > 1 and not _only_temporaries(dir_fd, file_fd, info):
            raise self.unsafe(path, key, f"has {info.st_nlink} names (hard links)")

    def open_file(
        self, dir_fd: int, key: str, *, flags: int = os.O_RDONLY
    ) -> tuple[int, os.stat_result]:
        """Open the object ``key`` in its directory, checked before and after."""
        name = key.rpartition("/")[2]
        # The look before keeps a device from being opened at all; the one after is what counts.
        self.check_file(os.lstat(name, dir_fd=dir_fd), key)
        fd = os.open(name, flags | FILE_FLAGS, dir_fd=dir_fd)
        try:
            info = os.fstat(fd)
            self.check_file(info, key, dir_fd=dir_fd, file_fd=fd)
        except BaseException:
            let_go(fd)
            raise
        return fd, info

    def sync_directories(self, fds: Sequence[int], key: str | None) -> None:
        """Make what was linked, made or removed in these directories durable, innermost first.

        A put gives all of them up to the root, not only new ones: another process may have made
        one a moment ago and not have synced its entry yet.
        """
        if not self.sync:
            return
        for fd in reversed(fds):
            try:
                full_sync(fd)
            except OSError as error:
                raise self.error(error, key, "sync a directory") from error

    @contextlib.contextmanager
    def errors(self, key: str | None, doing: str, *, missing: bool = True) -> Iterator[None]:
        """OSErrors of the block as errors of ours; ``missing``: what is not there is no object."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if not missing:
                raise self.error(error, key, doing) from error
            raise ObjectNotFound(f"no object {key}", tier=self.tier, key=key) from error
        except OSError as error:
            raise self.error(error, key, doing) from error

    def taken(self, key: str, why: str = "is there already") -> AlreadyExists:
        """The refusal to replace anything."""
        return AlreadyExists(
            f"{key} {why}", state="it is unchanged, and nothing was stored", tier=self.tier, key=key
        )


def _kind(mode: int) -> str:
    for is_kind, text in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    ):
        if is_kind(mode):
            return text
    return "a device"


def _only_temporaries(dir_fd: int, file_fd: int, info: os.stat_result) -> bool:
    """Whether every further name of the inode is a put's temporary one in the same directory."""
    with os.scandir(dir_fd) as entries:
        twins = sum(
            entry.name.startswith(TEMPORARY) and entry.inode() == info.st_ino for entry in entries
        )
    # The put may have finished while we looked: then there is one name now.
    return info.st_nlink - twins == 1 or os.fstat(file_fd).st_nlink == 1
