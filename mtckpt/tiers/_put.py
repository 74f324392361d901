"""One put into a directory: temporary file, room, bytes, fsync, link, fsync of the directories.

It knows the order in which these must happen and what is undone when one fails. It does not know
listing, reading or leases. What it links is whole and, with sync, on the medium; a process killed
anywhere leaves at most a temporary file, or a second name of a whole object.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mtckpt._crash import crash_point
from mtckpt.tiers._blocks import Writer
from mtckpt.tiers._os_errors import free_bytes_at, tier_full
from mtckpt.tiers._rooted import FILE_FLAGS, Root, full_sync, let_go, temporary_name
from mtckpt.tiers.base import FillingSource, PutResult, Source

if sys.platform != "win32":
    import fcntl

__all__ = ["DirectIo", "Put"]

DirectIo = Literal["auto", "never", "always"]

DIRECT_BYTES = 1 << 20
# A directory that a concurrent delete removes again and again; each turn needs a new race.
MAX_RACES = 64
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(slots=True)
class Put:
    """All that one put needs to remember. Used once."""

    root: Root
    key: str
    source: Source
    direct_io: DirectIo
    in_memory: bool = False
    size_bytes: int = field(init=False)
    name: str = field(init=False)
    temporary: str = field(init=False, default="")
    fds: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.size_bytes = self.source.size_bytes
        self.name = self.key.rpartition("/")[2]

    def run(self, root_fd: int) -> PutResult:
        """Store the object, or raise with nothing stored."""
        with contextlib.ExitStack() as stack:
            fd = self._begin(stack, root_fd)
            try:
                with self._filled(fd) as keep_fd:
                    atomic = self._publish(keep_fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(self.temporary, dir_fd=self.fds[-1])
                self._remove_empty()
                raise
        return PutResult(self.size_bytes, atomic)

    def _begin(self, stack: contextlib.ExitStack, root_fd: int) -> int:
        """Directories and a new temporary file in the last one."""
        last: OSError = FileNotFoundError(errno.ENOENT, "the directory keeps being removed")
        for _ in range(MAX_RACES):
            with contextlib.ExitStack() as attempt:
                try:
                    parts = self.key.split("/")[:-1]
                    self.fds = attempt.enter_context(
                        self.root.directory(root_fd, parts, self.key, create=True)
                    )
                    self._refuse_taken()
                    fd = self._new_temporary()
                except NotADirectoryError as error:
                    raise self.root.taken(self.key, "would lie inside an object") from error
                except (FileNotFoundError, BlockingIOError) as error:
                    last = error  # A delete removed the directory, or a sweep took the file.
                except PermissionError as error:
                    # In a group, a directory that another user makes opens up a moment later.
                    if not self.root.group_access:
                        raise self.root.error(error, self.key, "create") from error
                    last = error
                    time.sleep(0.001)
                except OSError as error:
                    self._remove_empty()
                    raise self.root.error(error, self.key, "create", self.size_bytes) from error
                else:
                    stack.push(attempt.pop_all())
                    return fd
        raise self.root.error(last, self.key, "create") from last

    def _remove_empty(self) -> None:
        """Remove the directories that were made for nothing, so that a full tier does not fill up
        with them; another put that is just entering one makes it again."""
        parts = self.key.split("/")[: max(0, len(self.fds) - 1)]
        for depth in range(len(parts) - 1, -1, -1):
            try:
                os.rmdir(parts[depth], dir_fd=self.fds[depth])
            except OSError:
                return

    def _refuse_taken(self) -> None:
        try:
            info = os.lstat(self.name, dir_fd=self.fds[-1])
        except FileNotFoundError:
            return
        if stat.S_ISDIR(info.st_mode):
            raise self.root.taken(self.key, "is a directory of other objects")
        self.root.check_file(info, self.key)
        self._taken()

    def _taken(self) -> None:
        # Whoever put it may not have synced the directory yet, and the caller may rely on it now.
        self.root.sync_directories(self.fds, self.key)
        raise self.root.taken(self.key)

    def _new_temporary(self) -> int:
        self.temporary = temporary_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | FILE_FLAGS
        mode = 0o660 if self.root.group_access else 0o600
        fd = os.open(self.temporary, flags, mode, dir_fd=self.fds[-1])
        try:
            if self.root.group_access:
                os.fchmod(fd, mode)  # The umask may have taken the group's bits.
            self._hold(fd)
        except BaseException:
            let_go(fd)
            with contextlib.suppress(OSError):
                os.unlink(self.temporary, dir_fd=self.fds[-1])
            raise
        return fd

    def _hold(self, fd: int) -> None:
        """Mark the file as in flight, so that a sweep by another process leaves it alone."""
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return  # No locks on this file system: then its owner must sweep before others put.
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "swept before it was held")

    @contextlib.contextmanager
    def _filled(self, fd: int) -> Iterator[int]:
        """Write, sync and close the file; a copy of its descriptor keeps it held meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                with self._mapped("open"):
                    keep_fd = os.dup(fd)
                stack.callback(let_go, keep_fd)
                crash_point("put.created")
                self._fill(fd)
            except BaseException:
                let_go(fd)
                raise
            with self._mapped("close"):
                os.close(fd)
            yield keep_fd

    def _fill(self, fd: int) -> None:
        self._reserve(fd)
        if self.in_memory and isinstance(self.source, FillingSource) and self.size_bytes:
            self._receive(fd, self.source)
            return
        direct_fd = self._open_direct()
        try:
            Writer(
                source=self.source,
                size_bytes=self.size_bytes,
                fd=fd,
                direct_fd=direct_fd,
                insist=self.direct_io == "always",
                fail=lambda error: self.root.error(error, self.key, "write", self.size_bytes),
            ).run()
        except BaseException:
            if direct_fd >= 0:
                let_go(direct_fd)
            raise
        if direct_fd >= 0:
            with self._mapped("close"):
                os.close(direct_fd)
        crash_point("put.written")
        if self.root.sync:
            # Once only: after a failed fsync the kernel calls the lost pages clean.
            with self._mapped("sync"):
                full_sync(fd)
        crash_point("put.synced")

    def _receive(self, fd: int, source: FillingSource) -> None:
        """Let the source write to the pages themselves, which are there: they were reserved."""
        with self._mapped("map"):
            pages = mmap.mmap(fd, self.size_bytes)
        view = memoryview(pages)
        try:
            source.fill(view)
        finally:
            view.release()
            with contextlib.suppress(BufferError):
                pages.close()  # A traceback can still hold a slice; the mapping then goes with it.
        crash_point("put.written")

    def _reserve(self, fd: int) -> None:
        """Take all the room now: no space is an error here, and never a SIGBUS in a mapping."""
        if not self.size_bytes:
            return
        free_bytes = free_bytes_at(fd)
        if free_bytes is not None and free_bytes < self.size_bytes:
            # Said before trying: ext4 would hand out all that is left first, also the log's share.
            raise tier_full(
                tier=self.root.tier,
                key=self.key,
                place=str(self.root.path),
                needed_bytes=self.size_bytes,
                free_bytes=free_bytes,
            )
        allocate = getattr(os, "posix_fallocate", None)
        if allocate is None:
            return
        try:
            allocate(fd, 0, self.size_bytes)
        except OSError as error:
            if error.errno in _NO_FALLOCATE:
                return
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)  # So that the free space in the message is the real one.
            raise self.root.error(error, self.key, "reserve", self.size_bytes) from error

    def _open_direct(self) -> int:
        flag = getattr(os, "O_DIRECT", 0)
        wanted = self.direct_io == "always" or (
            self.direct_io == "auto" and self.root.sync and self.size_bytes >= DIRECT_BYTES
        )
        if not wanted or not flag:
            return -1
        try:
            return os.open(self.temporary, os.O_WRONLY | flag | FILE_FLAGS, dir_fd=self.fds[-1])
        except OSError as error:
            if error.errno in _NO_DIRECT and self.direct_io == "auto":
                return -1
            raise self.root.error(error, self.key, "open") from error

    def _publish(self, keep_fd: int) -> bool:
        """Give the file its name. Returns whether the file system made that atomic."""
        dir_fd = self.fds[-1]
        atomic = True
        try:
            os.link(
                self.temporary,
                self.name,
                src_dir_fd=dir_fd,
                dst_dir_fd=dir_fd,
                follow_symlinks=False,
            )
        except FileExistsError:
            self._taken()
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise self.root.error(error, self.key, "link") from error
            atomic = False
            self._rename()
        try:
            crash_point("put.linked")
            if atomic:
                with self._mapped("unlink"):
                    os.unlink(self.temporary, dir_fd=dir_fd)
            crash_point("put.unlinked")
            self.root.sync_directories(self.fds, self.key)
        except BaseException:
            self._withdraw(keep_fd)
            raise
        crash_point("put.done")
        return atomic

    def _rename(self) -> None:
        """Without hard links: look, then rename. Two puts at the same moment may both win."""
        self._refuse_taken()
        with self._mapped("rename"):
            os.rename(self.temporary, self.name, src_dir_fd=self.fds[-1], dst_dir_fd=self.fds[-1])

    def _withdraw(self, keep_fd: int) -> None:
        """Take back a name that was given, if it is still the name of our file."""
        with contextlib.suppress(OSError):
            there = os.lstat(self.name, dir_fd=self.fds[-1])
            if os.path.samestat(there, os.fstat(keep_fd)):
                os.unlink(self.name, dir_fd=self.fds[-1])

    @contextlib.contextmanager
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.root.error(error, self.key, doing, self.size_bytes) from error
