"""The files of runs in a RAM root that are no objects of its tier: hidden ones, and whole runs.

It knows how to open what a trainer wrote without being led astray, what the agent notes for the
next one (a run's configuration, ``RUN/.run.json``, and its secret, ``RUN/.join.json``), and how a
run is wiped. Both are their user's alone, in a service too: nobody of the group may say them in its
place. It does not know what a slot is or what those files say.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtckpt import _manifest
from mtckpt._crash import crash_point
from mtckpt._manifest import SaveName
from mtckpt.errors import Damaged, ObjectNotFound, UsageError
from mtckpt.tiers._rooted import FILE_FLAGS, Root, temporary_name
from mtckpt.tiers.base import check_key

if TYPE_CHECKING:
    from mtckpt.tiers.local import LocalTier

__all__ = ["RunFiles", "is_directory", "is_there", "size_bytes_at", "unlink"]

CONFIG_FILE = ".run.json"
SECRET_FILE = ".join.json"


class RunFiles:
    """Everything below the root of ``tier``, hidden files too. All calls block."""

    def __init__(self, tier: LocalTier, *, group_access: bool = False) -> None:
        self.path = tier.path_of("x").parent
        self._mode = 0o660 if group_access else 0o600
        self._root = Root(
            self.path, tier=tier.name, sync=False, group_access=group_access, read_only=False
        )
        if tier.name == "ram":
            with self._root.using() as root_fd:
                _close_to_others(root_fd)

    def close(self) -> None:
        """Release the root. Idempotent."""
        self._root.close()

    # -- runs ------------------------------------------------------------------------------------

    def run_keys(self) -> list[str]:
        """Every run that has anything here, also one without a single save."""
        with self._root.using() as root_fd, self._root.errors(None, "list"):
            names = sorted(os.listdir(root_fd))
            return [name for name in names if is_directory(name, root_fd) and _is_key(name)]

    def wipe(self, run_key: str) -> int:
        """Delete everything of a run: records first, so that no save is ever offered by half."""
        freed_bytes = 0
        with contextlib.suppress(ObjectNotFound):
            for name in self.save_names(run_key):
                with self.directory(run_key, name) as save_fd:
                    for file in filter(_manifest.is_record_file, os.listdir(save_fd)):
                        freed_bytes += unlink(file, save_fd)
            crash_point("wipe.records")
            with self.directory(run_key) as run_fd:
                for name in os.listdir(run_fd):
                    if not is_directory(name, run_fd):
                        freed_bytes += unlink(name, run_fd)
                        continue
                    freed_bytes += self._empty(run_key, name)
                    _drop(name, run_fd)
            with self._root.using(writing=True) as root_fd, contextlib.suppress(OSError):
                os.rmdir(run_key, dir_fd=root_fd)  # Somebody may have begun the run anew.
        return freed_bytes

    def _empty(self, run_key: str, *names: str) -> int:
        """Delete what is in a directory; of a shard that is on its way here the record first."""
        freed_bytes = 0
        with self.directory(run_key, *names) as fd:
            for name in sorted(os.listdir(fd)):
                if is_directory(name, fd):
                    freed_bytes += self._empty(run_key, *names, name)
                    _drop(name, fd)
                else:
                    freed_bytes += unlink(name, fd)
        return freed_bytes

    def write_config(self, run_key: str, data: bytes) -> None:
        """Replace the run's configuration, whole or not at all."""
        self._replace(run_key, CONFIG_FILE, data)

    def read_config(self, run_key: str) -> bytes:
        """The run's configuration. Raises ObjectNotFound; Damaged if somebody else may have
        written it, or could have."""
        return self._read_own(run_key, CONFIG_FILE)

    def write_secret(self, run_key: str, data: bytes) -> None:
        """Replace what only the agent's own user may read of the run, whole or not at all."""
        self._replace(run_key, SECRET_FILE, data)

    def read_secret(self, run_key: str) -> bytes:
        """What ``write_secret`` wrote. Raises ObjectNotFound; Damaged if others could read it."""
        return self._read_own(run_key, SECRET_FILE)

    def _read_own(self, run_key: str, name: str) -> bytes:
        with self.directory(run_key) as run_fd:
            try:
                fd = os.open(name, os.O_RDONLY | FILE_FLAGS, dir_fd=run_fd)
            except PermissionError as error:
                raise Damaged(f"{name} is another user's: it is not used") from error
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise Damaged(f"{name} is a symbolic link: it is not used") from error
            try:
                info = os.fstat(fd)
                private = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o077
                if not private or info.st_uid != os.geteuid():
                    raise Damaged(f"{name} is not this user's alone: it is not used")
                if info.st_size > _manifest.MAX_SMALL_BYTES:
                    raise Damaged(f"{name} is larger than any can be", got_bytes=info.st_size)
                with os.fdopen(fd, "rb", closefd=False) as file:
                    return file.read(_manifest.MAX_SMALL_BYTES)
            finally:
                os.close(fd)

    def _replace(self, run_key: str, name: str, data: bytes) -> None:
        temporary = temporary_name()
        with self.directory(run_key, create=True) as run_fd:
            _close_to_others(run_fd)
            fd = self.create(temporary, run_fd, 0o600)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                crash_point("config.written")
                os.rename(temporary, name, src_dir_fd=run_fd, dst_dir_fd=run_fd)
            except BaseException:
                unlink(temporary, run_fd)
                raise

    # -- opening ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def directory(self, run_key: str, *names: str, create: bool = False) -> Iterator[int]:
        """A directory of a run; OSErrors of the block as errors of ours."""
        check_key(run_key)
        parts = [run_key, *names]
        with (
            self._root.using(writing=True) as root_fd,
            self._root.errors("/".join(parts), "change"),
            self._root.directory(root_fd, parts, run_key, create=create) as fds,
        ):
            yield fds[-1]

    def save_names(self, run_key: str) -> list[str]:
        try:
            with self.directory(run_key) as run_fd:
                return [name for name in sorted(os.listdir(run_fd)) if SaveName.parse(name)]
        except ObjectNotFound:
            return []

    def drop_empty(self, run_key: str) -> list[str]:
        """Remove the directories of saves that have nothing in them: a deletion was killed last."""
        dropped = []
        with contextlib.suppress(ObjectNotFound), self.directory(run_key) as run_fd:
            for name in filter(SaveName.parse, os.listdir(run_fd)):
                with contextlib.suppress(OSError):  # Refused, as it should be, while it has a file.
                    os.rmdir(name, dir_fd=run_fd)
                    dropped.append(f"{name} is gone: it was empty")
        return dropped

    def create(self, name: str, dir_fd: int, mode: int | None = None) -> int:
        mode = self._mode if mode is None else mode
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | FILE_FLAGS
        fd = os.open(name, flags, mode, dir_fd=dir_fd)
        os.fchmod(fd, mode)  # The umask may have taken the group's bits.
        return fd

    def open(self, dir_fd: int, name: str, *, writable: bool = False) -> int:
        """A file that a trainer wrote, opened for reading: regular, with one name, never a link.

        Damaged, not a refusal of the tier, where its owner let nobody else read it: one file of one
        run must not end a look at all of them.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(name, access | FILE_FLAGS, dir_fd=dir_fd)
        except PermissionError as error:
            raise Damaged(f"{name} may not be read by the agent: {error.strerror}") from error
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            os.close(fd)
            raise self._root.unsafe(self.path / name, name, "is not a file with one name")
        if info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) != self._mode:
            os.fchmod(fd, self._mode)  # A record is written under the trainer's umask.
        return fd

    def read(self, dir_fd: int, name: str, max_bytes: int) -> bytes:
        fd = self.open(dir_fd, name)
        with os.fdopen(fd, "rb") as file:
            if (size_bytes := os.fstat(fd).st_size) > max_bytes:
                raise Damaged(f"{name} is larger than any can be", got_bytes=size_bytes)
            return file.read(size_bytes)


def _close_to_others(dir_fd: int) -> None:
    """A directory that a service's group may enter, and nobody but us writes to: trainers write
    below ``RUN/.slots`` only. Else one of them could put a run, or what is noted of one, in the
    place of another's."""
    info = os.fstat(dir_fd)
    if info.st_mode & 0o020 and info.st_uid == os.geteuid():
        os.fchmod(dir_fd, stat.S_IMODE(info.st_mode) & ~0o020)


def is_there(name: str, dir_fd: int) -> bool:
    return size_bytes_at(name, dir_fd) >= 0


def size_bytes_at(name: str, dir_fd: int) -> int:
    """Size of a file, -1 if it is not there."""
    try:
        return os.lstat(name, dir_fd=dir_fd).st_size
    except FileNotFoundError:
        return -1


def unlink(name: str, dir_fd: int) -> int:
    """Delete a file that may not be there; the bytes that it had."""
    size_bytes = size_bytes_at(name, dir_fd)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)
    return max(size_bytes, 0)


def is_directory(name: str, dir_fd: int) -> bool:
    return stat.S_ISDIR(os.lstat(name, dir_fd=dir_fd).st_mode)


def _drop(name: str, dir_fd: int) -> None:
    """Remove a directory that was emptied. On NFS and FUSE what somebody still has open or mapped
    is there under another name until it is closed: then an empty directory stays."""
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _is_key(name: str) -> bool:
    try:
        return bool(check_key(name))
    except UsageError:
        return False
