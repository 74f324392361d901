"""The bytes of one object, which stay the same while they are held: mapped, in blocks, by ranges.

Knows leases, files and tiers that have none, and objects that are put together from others. Does
not know what the bytes are, and checks nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mtckpt._inventory import has_leases
from mtckpt.errors import Damaged, ShortRead
from mtckpt.tiers._os_errors import tier_error
from mtckpt.tiers.local import LocalTier

if TYPE_CHECKING:
    from mtckpt.tiers.base import Tier
    from mtckpt.tiers.local import Lease

__all__ = [
    "Blocks",
    "Composed",
    "Held",
    "Mapped",
    "Part",
    "Place",
    "Ranged",
    "Ranges",
    "Reader",
    "hold",
    "open_bytes",
]

ALIGN_BYTES = 4096
# Requests under way at once while a shard is read back from where each takes a while.
RANGE_THREADS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A tier. ``through`` is what puts go through: the tier itself, or a wrapper of it.

    ``in_memory``: it is a tmpfs, so its files are mapped; others are read in blocks, since a disk
    that fails would end a reader of a mapping with SIGBUS. ``is_peer``: another node's, from which
    several streams bring more than one.
    """

    tier: Tier
    through: Tier
    in_memory: bool = False
    is_peer: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is a directory: with files that are leased, and set aside when damaged."""
        return isinstance(self.tier, LocalTier)

    @property
    def local(self) -> LocalTier:
        """The tier, where it is a directory."""
        assert isinstance(self.tier, LocalTier)
        return self.tier


# -- the bytes of one object -----------------------------------------------------------------------


class Held:
    """One object whose bytes stay the same until ``close``. Made by ``hold``."""

    def __init__(self, tier: Tier, key: str, size_bytes: int, lease: Lease | None) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self._tier = tier
        self._lease = lease

    @property
    def block_bytes(self) -> int:
        """How much to ask for at once: of what is no file, as much as goes in several requests."""
        return 64 << 20 if self._lease is None else 4 << 20

    @property
    def fd(self) -> int:
        """The leased descriptor, of a tier in a directory."""
        assert self._lease is not None
        return self._lease.fd

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill ``out`` from ``offset`` on; see ``Tier.read_into``."""
        if self._lease is None:
            self._tier.read_into(self.key, out, offset)
            return
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._lease.fd, [out[done:]], offset + done)
            except OSError as error:
                raise tier_error(
                    error, doing="read", tier=self._tier.name, key=self.key, place=self.key
                ) from error
            if not got:
                raise ShortRead(
                    f"{self.key} ends early",
                    tier=self._tier.name,
                    key=self.key,
                    offset=offset + done,
                    wanted_bytes=len(out),
                    got_bytes=done,
                )
            done += got

    def window(self, start: int, stop: int) -> memoryview:
        """A range in memory of its own."""
        out = memoryview(bytearray(stop - start))
        self.read_into(out, start)
        return out

    def close(self) -> None:
        """Give the lease back, if there is one. Idempotent."""
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(tier: Tier, key: str) -> Held:
    """The object under a lease where its file could be recycled; elsewhere a key never changes."""
    if has_leases(tier):
        lease: Lease = tier.lease(key)  # type: ignore[attr-defined]  # that is what was asked
        return Held(tier, key, lease.size_bytes, lease)
    return Held(tier, key, tier.stat(key).size_bytes, None)


class Reader(Protocol):
    """The bytes of one object, a window at a time, by ``num_threads`` threads or fewer."""

    num_threads: int

    def window(self, start: int, stop: int) -> memoryview: ...


class Ranged(Protocol):
    """Bytes that are asked for by range, by any number of threads."""

    def read_into(self, out: memoryview, offset: int) -> None: ...


class Part(NamedTuple):
    """``size_bytes`` bytes from ``start`` on are those of ``held`` from ``there`` on."""

    start: int
    size_bytes: int
    held: Ranged
    there: int


class Composed:
    """Bytes that lie in parts of several objects, or of one in another order; ``head`` comes first.

    The parts are in order and leave no gap.
    """

    def __init__(self, head: bytes, parts: Iterable[Part]) -> None:
        self._head = head
        self._parts: list[Part] = []
        for part in parts:
            last = self._parts[-1] if self._parts else None
            if last and last.held is part.held and last.there + last.size_bytes == part.there:
                self._parts[-1] = last._replace(size_bytes=last.size_bytes + part.size_bytes)
            elif part.size_bytes:
                self._parts.append(part)
        self._starts = [part.start for part in self._parts]

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill ``out`` from ``offset`` on."""
        stop = offset + len(out)
        head = self._head[offset:stop]
        out[: len(head)] = head
        number = max(0, bisect.bisect_right(self._starts, offset) - 1)
        for part in self._parts[number:]:
            first, last = max(part.start, offset), min(part.start + part.size_bytes, stop)
            if part.start >= stop:
                break
            if first < last:
                part.held.read_into(
                    out[first - offset : last - offset], part.there + first - part.start
                )


class Ranges:
    """The bytes of an object that is no file, asked for by range into one buffer a thread."""

    num_threads = RANGE_THREADS

    def __init__(self, held: Ranged) -> None:
        self._held = held
        self._own = threading.local()

    def window(self, start: int, stop: int) -> memoryview:
        buffer: bytearray | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < stop - start:
            buffer = self._own.buffer = bytearray(stop - start)
        view = memoryview(buffer)[: stop - start]
        self._held.read_into(view, start)
        return view

    def close(self) -> None:
        return None


class Mapped:
    """The bytes of a tmpfs file, where they are. A fresh mapping costs some 3 % of a flush here."""

    num_threads = 2

    def __init__(self, fd: int, size_bytes: int) -> None:
        # An empty file cannot be mapped; that it is one is found when it is compared.
        self._mapping = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ) if size_bytes else None
        self._view = memoryview(self._mapping or b"")

    def window(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]

    def close(self) -> None:
        self._view.release()
        with contextlib.suppress(BufferError):
            # A traceback can still hold a slice; the mapping then goes with it.
            if self._mapping is not None:
                self._mapping.close()


class Blocks:
    """The bytes of a file, read into one buffer a thread: a window is good until the next one."""

    num_threads = 2

    def __init__(self, fd: int, size_bytes: int, *, direct: bool = False) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._direct_fd = _open_direct(fd) if direct else -1
        self._own = threading.local()
        if direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def window(self, start: int, stop: int) -> memoryview:
        wanted_bytes = -(-(stop - start) // ALIGN_BYTES) * ALIGN_BYTES
        buffer: mmap.mmap | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < wanted_bytes:
            buffer = self._own.buffer = mmap.mmap(-1, max(wanted_bytes, ALIGN_BYTES))
        view = memoryview(buffer)
        got_bytes = 0
        while got_bytes < stop - start:
            # O_DIRECT wants whole pages; the file's end makes the last read short by itself.
            aligned = self._direct_fd >= 0 and (start + got_bytes) % ALIGN_BYTES == 0
            end = wanted_bytes if aligned else stop - start
            count = os.preadv(
                self._direct_fd if aligned else self._fd, [view[got_bytes:end]], start + got_bytes
            )
            if not count:
                raise Damaged("shard file ends early", offset=start + got_bytes)
            got_bytes += count
        return view[: stop - start]

    def close(self) -> None:
        fd, self._direct_fd = self._direct_fd, -1
        if fd >= 0:
            os.close(fd)


def _open_direct(fd: int) -> int:
    """The same file past the page cache; -1 where that cannot be."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError:
        return -1  # tmpfs and some network file systems; the cache was dropped instead.


@contextlib.contextmanager
def open_bytes(place: Place, key: str, *, cold: bool = False) -> Iterator[tuple[Held, Reader]]:
    """An object held, and the best way to read it here. ``cold``: not from the page cache."""
    with hold(place.tier, key) as held:
        reader: Mapped | Blocks | Ranges
        if not place.is_local:
            reader = Ranges(held)
        elif place.in_memory:
            reader = Mapped(held.fd, held.size_bytes)
        else:
            reader = Blocks(held.fd, held.size_bytes, direct=cold)
        try:
            yield held, reader
        finally:
            reader.close()
