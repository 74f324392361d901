"""A tier in a directory: RAM and disk are this one class with two roots, tmpfs or not.

It knows files, the order of fsyncs and flock leases. It does not know what the bytes are, and it
does not promise that the object of a ``put`` that raised is gone from a device that no longer
answers, only that no listing after a healthy start shows half an object.

Below the root: an object is a file of its key; ``.tmp-*`` is a put in flight or what a crash left
of one; ``.quarantine-*`` is an object set aside. No name that starts with a dot is ever listed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtckpt._crash import crash_point
from mtckpt.errors import AccessDenied, ObjectNotFound, ShortRead, TierUnavailable, UsageError
from mtckpt.tiers._blocks import read_blocks
from mtckpt.tiers._put import DirectIo, Put
from mtckpt.tiers._rooted import FILE_FLAGS, TEMPORARY, Root, is_of_this_host, let_go
from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Survives, check_key

if sys.platform != "win32":
    import fcntl

__all__ = ["Lease", "LocalTier", "Quarantined"]

_Entries = list[tuple[str, os.stat_result]]

logger = logging.getLogger(__name__)

QUARANTINE = ".quarantine-"
LEASE_TIMEOUT_S = 5.0
# An owner that recycles the same key over and over; each turn needs a new race.
MAX_RACES = 64
MAX_WARNINGS = 100
# A put of another host that has written nothing for so long is dead. One that is not fails as a
# typed error when it wants to show its file, and is tried again.
FOREIGN_AGE_S = 3600.0


class Lease:
    """A read-only descriptor of one object whose bytes cannot be recycled while it is open.

    It is a shared flock: the kernel drops it when the last process that holds it is gone. A child
    that was forked while its parent held it and died prolongs it, which is safe.
    """

    __slots__ = ("_fd", "_pid", "key", "size_bytes")

    def __init__(self, key: str, fd: int, size_bytes: int) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self._fd = fd
        self._pid = os.getpid()

    @property
    def fd(self) -> int:
        """The descriptor, good until ``close``."""
        if self._fd < 0:
            raise UsageError(f"the lease on {self.key} is closed")
        return self._fd

    def close(self) -> None:
        """Give the lease back. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if os.getpid() == self._pid:  # a forked child must not give back what is its parent's
            # Not by closing alone: a mapping has a copy of the descriptor, and lives for as long as
            # the traceback of an error refers to a slice of it.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
        let_go(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_ending():  # then what this needs may be gone, and the kernel closes all
            self.close()


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An object set aside by ``quarantine``. ``reason`` is shortened to what fits a file name."""

    key: str
    reason: str
    size_bytes: int
    path: Path


class LocalTier:
    """Objects as files below ``root``. See the module's text, and ``docs/tiers.md``.

    Args:
        root: made if it is not there. It stays open: its file system cannot be unmounted meanwhile.
        sync: fsync files and directories before a put or delete returns; False for tmpfs.
        group_access: 2770 and 0660 instead of 0700 and 0600, and members of the root's group are
            trusted.
        direct_io: write past the page cache: where it pays, never, or always (an error if not
            possible).
        read_only: never creates or changes anything, and reads what belongs to others too.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        name: str = "disk",
        survives: Survives = Survives.PROCESS | Survives.POWER,
        sync: bool = True,
        group_access: bool = False,
        direct_io: DirectIo = "auto",
        read_only: bool = False,
    ) -> None:
        self.name = name
        self.survives = survives
        self._sync = sync
        self._direct_io: DirectIo = direct_io
        self._warned: set[str] = set()
        self._root = Root(
            Path(root), tier=name, sync=sync, group_access=group_access, read_only=read_only
        )

    def __repr__(self) -> str:
        return f"LocalTier({str(self._root.path)!r}, name={self.name!r}, sync={self._sync})"

    def is_there(self) -> bool:
        """Whether the directory is the one that was opened: it may be unmounted, or removed."""
        return self._root.is_there()

    # -- the protocol ----------------------------------------------------------------------------

    def put(self, key: str, source: Source) -> PutResult:
        """Create ``key``; see ``Tier.put``."""
        check_key(key)
        with self._root.using(writing=True) as root_fd:
            in_memory = Survives.POWER not in self.survives
            return Put(self._root, key, source, self._direct_io, in_memory).run(root_fd)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Fill ``out``; see ``Tier.read_into``."""
        view = memoryview(out).cast("B")
        if view.readonly or offset < 0:
            raise UsageError(f"cannot read {key} into that", readonly=view.readonly, offset=offset)
        with self._below(check_key(key).split("/")[:-1], key, "open") as fds:
            fd, _ = self._root.open_file(fds[-1], key)
        try:
            got_bytes = read_blocks(fd, view, offset, lambda e: self._root.error(e, key, "read"))
        finally:
            let_go(fd)
        if got_bytes != len(view):
            raise ShortRead(
                f"{key} ends early",
                tier=self.name,
                key=key,
                offset=offset,
                wanted_bytes=len(view),
                got_bytes=got_bytes,
            )

    def stat(self, key: str) -> ObjectInfo:
        """Size of the object; see ``Tier.stat``."""
        parts = check_key(key).split("/")
        with self._below(parts[:-1], key, "look up") as fds:
            info = os.lstat(parts[-1], dir_fd=fds[-1])
            self._root.check_file(info, key)
        return ObjectInfo(key, info.st_size)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in order; see ``Tier.list``. One directory at a time is held in memory."""
        with self._root.using():
            pass  # A closed or vanished tier is reported here, not at the first object.
        return self._list((), prefix)

    def delete(self, key: str) -> None:
        """Remove ``key`` and the directories that are empty then; see ``Tier.delete``.

        A reader that holds the object open keeps its bytes until it closes.
        """
        parts = check_key(key).split("/")
        with (
            contextlib.suppress(ObjectNotFound),
            self._below(parts[:-1], key, "delete", writing=True) as fds,
        ):
            self._root.check_file(os.lstat(parts[-1], dir_fd=fds[-1]), key)
            os.unlink(parts[-1], dir_fd=fds[-1])
            crash_point("delete.unlinked")
            self._root.sync_directories(fds[-1:], key)
            self._remove_empty(fds, parts[:-1], key)

    def close(self) -> None:
        """Release the root. Calls in flight end normally. Idempotent."""
        self._root.close()

    # -- beyond the protocol ---------------------------------------------------------------------

    def path_of(self, key: str) -> Path:
        """Where the object is or would be."""
        return self._root.path / check_key(key)

    def lease(self, key: str, *, timeout_s: float = LEASE_TIMEOUT_S) -> Lease:
        """Open the object so that nobody recycles it meanwhile.

        Raises:
            ObjectNotFound: it is not there, or went away while the lease was being taken.
            TierUnavailable: somebody held it exclusively for ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            fd = self._open_locked(key, os.O_RDONLY, shared=True)
            if fd is not None:
                return Lease(key, fd, os.fstat(fd).st_size)
            if time.monotonic() >= deadline:
                raise TierUnavailable(
                    f"{key} is held exclusively by its owner",
                    tier=self.name,
                    key=key,
                    timeout_s=timeout_s,
                )
            time.sleep(0.001)

    @contextlib.contextmanager
    def try_exclusive(self, key: str) -> Iterator[int | None]:
        """A writable descriptor while nobody holds a lease; None at once if somebody does.

        For the owner, around recycling or deleting. Whoever asks for a lease meanwhile waits, then
        finds that the key is gone or names another file, so it must be moved inside the block.
        """
        with self._root.using(writing=True):
            fd = self._open_locked(key, os.O_RDWR, shared=False)
            try:
                yield fd
            finally:
                if fd is not None:
                    let_go(fd)

    def quarantine(self, key: str, reason: str) -> Quarantined:
        """Set a damaged object aside, atomically; the key is free afterwards."""
        parts = check_key(key).split("/")
        slug = re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-")[:24].rstrip("-") or "damaged"
        hidden = f"{QUARANTINE}{os.urandom(4).hex()}.{slug}.{parts[-1]}"
        with self._below(parts[:-1], key, "quarantine", writing=True) as fds:
            info = os.lstat(parts[-1], dir_fd=fds[-1])
            self._root.check_file(info, key)
            os.rename(parts[-1], hidden, src_dir_fd=fds[-1], dst_dir_fd=fds[-1])
            self._root.sync_directories(fds[-1:], key)
        path = self._root.path.joinpath(*parts[:-1], hidden)
        logger.warning("%s: %s set aside: %s (%s)", self.name, key, reason, path)
        return Quarantined(key, slug, info.st_size, path)

    def quarantined(self) -> Iterator[Quarantined]:
        """What was set aside and is still there."""
        for parts, name, info in self._hidden(QUARANTINE):
            _, slug, last = [*name.split(".", 3)[1:], "", ""][:3]
            path = self._root.path.joinpath(*parts, name)
            yield Quarantined("/".join((*parts, last)), slug, info.st_size, path)

    def drop_quarantined(self, item: Quarantined) -> None:
        """Delete for good what was set aside. Idempotent."""
        *parts, name = item.path.relative_to(self._root.path).parts
        check_key("/".join((*parts, "x")))
        if not name.startswith(QUARANTINE):
            raise UsageError(f"{item.path} was not set aside by this tier", tier=self.name)
        self._drop_hidden(parts, name, unless_held=False)

    def sweep_temporaries(self) -> int:
        """Remove what crashed puts left; the number of files removed.

        For the owner of the tier, at start. Puts in flight, of any process, are left alone, and
        those of other hosts until nothing was written for an hour. On a tier that syncs, every
        directory is synced as well: a put that was killed between showing its key and syncing the
        directory has then become as durable as its listing looks.
        """
        removed = 0
        for parts, name, _ in self._hidden(TEMPORARY):
            removed += self._drop_hidden(parts, name, unless_held=True)
        if self._sync:
            for parts, _ in self._walk(()):
                with (
                    contextlib.suppress(ObjectNotFound),
                    self._below(parts, None, "sync", writing=True) as fds,
                ):
                    self._root.sync_directories(fds[-1:], None)
        return removed

    def drop_remains(self, directory: str) -> None:
        """Remove what failed calls left of a directory that has no object, and the directory.

        Puts in flight are left alone, and then the directory too.
        """
        parts = check_key(directory).split("/")
        for name, info in self._scan(parts):
            if name.startswith(TEMPORARY) and stat.S_ISREG(info.st_mode):
                self._drop_hidden(parts, name, unless_held=True)
        with (
            contextlib.suppress(ObjectNotFound),
            self._below(parts, directory, "remove", writing=True) as fds,
        ):
            self._remove_empty(fds, parts, directory)

    # -- inside ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _below(
        self, parts: Sequence[str], key: str | None, doing: str, *, writing: bool = False
    ) -> Iterator[Sequence[int]]:
        """Descriptors of the directories ``parts``; OSErrors of the block as errors of ours."""
        with (
            self._root.using(writing=writing) as root_fd,
            self._root.errors(key, doing),
            self._root.directory(root_fd, parts, key) as fds,
        ):
            yield fds

    def _scan(self, parts: Sequence[str]) -> _Entries:
        """Names and facts of one directory; nothing if it has gone meanwhile."""
        found: _Entries = []
        with (
            contextlib.suppress(ObjectNotFound),
            self._below(parts, "/".join(parts) or None, "list") as fds,
            os.scandir(fds[-1]) as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
        return found

    def _list(self, parts: tuple[str, ...], prefix: str) -> Iterator[ObjectInfo]:
        def order(entry: tuple[str, os.stat_result]) -> str:
            # With the slash, "a/b" comes after "a.b" as it does in the order of whole keys.
            return entry[0] + "/" if stat.S_ISDIR(entry[1].st_mode) else entry[0]

        for name, info in sorted(self._scan(parts), key=order):
            key = "/".join((*parts, name))
            if name.startswith(".") or not _is_key(key):
                continue
            if not stat.S_ISDIR(info.st_mode):
                if key.startswith(prefix) and self._is_object(key, info):
                    yield ObjectInfo(key, info.st_size)
                elif prefix.startswith(f"{key}/"):
                    # A link in the place of a directory: to skip it would say "nothing there".
                    self._root.check_file(info, key)
            elif f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                yield from self._list((*parts, name), prefix)

    def _is_object(self, key: str, info: os.stat_result) -> bool:
        """Whether a file would be read. What would be refused is said once, not listed."""
        try:
            self._root.check_file(info, key)
        except AccessDenied as error:
            if key not in self._warned and len(self._warned) < MAX_WARNINGS:
                self._warned.add(key)
                logger.warning("not listed: %s", error.what)
            return False
        return True

    def _walk(self, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Entries]]:
        """Every directory that could hold objects, with what is in it; not what is not ours."""
        try:
            entries = self._scan(parts)
        except AccessDenied as error:
            if not parts:
                raise
            logger.warning("left alone: %s", error.what)  # somebody's; the others are looked at
            return
        yield parts, entries
        for name, info in entries:
            if stat.S_ISDIR(info.st_mode) and _is_key("/".join((*parts, name))):
                yield from self._walk((*parts, name))

    def _hidden(self, marker: str) -> Iterator[tuple[tuple[str, ...], str, os.stat_result]]:
        for parts, entries in self._walk(()):
            for name, info in sorted(entries):
                if name.startswith(marker) and stat.S_ISREG(info.st_mode):
                    yield parts, name, info

    def _drop_hidden(self, parts: Sequence[str], name: str, *, unless_held: bool) -> bool:
        """Unlink a file of ours that is no object; False if it is held or gone."""
        key = "/".join((*parts, name))
        with (
            contextlib.suppress(ObjectNotFound),
            self._below(parts, key, "remove", writing=True) as fds,
        ):
            if unless_held and _is_held(name, fds[-1]):
                return False
            os.unlink(name, dir_fd=fds[-1])
            self._root.sync_directories(fds[-1:], key)
            self._remove_empty(fds, parts, key)
            return True
        return False

    def _remove_empty(self, fds: Sequence[int], parts: Sequence[str], key: str | None) -> None:
        """Remove the directories of ``parts`` that are empty, innermost first; never the root."""
        for depth in range(len(parts) - 1, -1, -1):
            try:
                os.rmdir(parts[depth], dir_fd=fds[depth])
            except OSError:
                return  # Not empty, gone already, or not ours to remove: nobody needs it gone.
            self._root.sync_directories(fds[depth : depth + 1], key)

    def _open_locked(self, key: str, flags: int, *, shared: bool) -> int | None:
        """A descriptor whose flock we hold and that ``key`` still names; None if others hold it."""
        parts = check_key(key).split("/")
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        for _ in range(MAX_RACES):
            with self._below(parts[:-1], key, "lease") as fds:
                fd, info = self._root.open_file(fds[-1], key, flags=flags)
                try:
                    fcntl.flock(fd, kind | fcntl.LOCK_NB)
                    # Between open and flock the owner may have recycled the file under a new name.
                    there = os.lstat(parts[-1], dir_fd=fds[-1])
                    if os.path.samestat(there, info):
                        return fd
                    let_go(fd)
                except BlockingIOError:
                    let_go(fd)
                    return None
                except BaseException:
                    let_go(fd)
                    raise
        raise TierUnavailable(
            f"{key} is replaced faster than it can be opened", tier=self.name, key=key
        )


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except UsageError:
        return False
    return True


def _is_held(name: str, dir_fd: int) -> bool:
    """Whether a put of a live process has the temporary file, or one of another host may have it.

    A file system that several hosts have mounted need not pass locks on between them.
    """
    fd = os.open(name, os.O_RDWR | FILE_FLAGS, dir_fd=dir_fd)
    try:
        if _is_locked(fd):
            return True
        age_s = time.time() - os.fstat(fd).st_mtime
        return not is_of_this_host(name) and age_s < FOREIGN_AGE_S
    finally:
        let_go(fd)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # No locks here: the owner was told to sweep before anybody puts.
    return False
