"""Reading a shard where it lies, and comparing it with the digests of its capture on the way.

It knows the three files and how bytes are had: from a leased file (mapped, or in blocks), or by
ranges from a tier that has no files. It does not know where bytes go. What it hands out has been
checked; what it cannot check it refuses.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mtckpt import _manifest, _shard
from mtckpt._inventory import check_identity, check_record, has_leases, shard_keys
from mtckpt._manifest import Record, SaveName
from mtckpt.errors import Damaged, FormatError, ShortRead
from mtckpt.tiers._blocks import in_threads
from mtckpt.tiers._os_errors import tier_error
from mtckpt.tiers.base import Tier, read_all
from mtckpt.tiers.local import LocalTier

if TYPE_CHECKING:
    from mtckpt._shard import ShardLayout, Table
    from mtckpt.tiers.local import Lease

__all__ = [
    "ArrivingSource",
    "Blocks",
    "Held",
    "Mapped",
    "OpenShard",
    "Place",
    "Progress",
    "Ranges",
    "VerifyingSource",
    "hold",
    "open_bytes",
    "open_shard",
]

BLOCK_BYTES = 8 << 20
ALIGN_BYTES = 4096
# Requests under way at once while a shard is read back from where each takes a while.
RANGE_THREADS = 8
# Connections that one shard comes over from a peer; what one request brings is still in the
# processor's cache when it is compared.
STREAMS = 4
ARRIVING_BYTES = 2 << 20
# How often bytes that differ from their digest are asked for again: what was lost on the way is
# right the next time, what is damaged at its source is not.
REREADS = 2
Progress = Callable[[int], None]
_E = TypeVar("_E", bound=FormatError)


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


class Ranges:
    """The bytes of an object that is no file, asked for by range into one buffer a thread."""

    num_threads = RANGE_THREADS

    def __init__(self, held: Held) -> None:
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


# -- a shard ---------------------------------------------------------------------------------------


class VerifyingSource:
    """The data file of a shard, each chunk compared with its digest when its block is asked for.

    A chunk is checked with the block in which it begins. Raises Damaged from ``read``, with tier
    and key. A block is valid until the same thread asks for the next one.
    """

    def __init__(
        self,
        reader: Reader,
        layout: ShardLayout,
        table: Table,
        *,
        tier: str,
        key: str,
        progress: Progress | None = None,
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._digests = table.digests
        self._tier = tier
        self._key = key
        self._progress = progress

    @property
    def size_bytes(self) -> int:
        return self._layout.size_bytes

    def read(self, offset: int, size_bytes: int) -> memoryview:
        stop = min(offset + size_bytes, self.size_bytes)
        try:
            window = self._reader.window(offset, min(stop + _shard.CHUNK_BYTES, self.size_bytes))
            _shard.check_range(self._layout, self._digests, window, offset, stop)
        except Damaged as error:
            raise placed(error, self._tier, self._key) from error
        except OSError as error:
            raise tier_error(
                error, doing="read", tier=self._tier, key=self._key, place=self._key
            ) from error
        if self._progress is not None:
            self._progress(stop - offset)
        return window[: stop - offset]

    def read_all(self) -> None:
        """Check every byte, in this thread and some more; nothing is kept."""
        blocks = iter(range(0, self.size_bytes, BLOCK_BYTES))
        lock = threading.Lock()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                while not failed:
                    with lock:
                        start = next(blocks, None)
                    if start is None:
                        return
                    self.read(start, BLOCK_BYTES)
            except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
                failed.append(error)

        num_others = min(self._reader.num_threads, -(-self.size_bytes // BLOCK_BYTES)) - 1
        others = [
            threading.Thread(target=work, name="mtckpt-verify", daemon=True)
            for _ in range(num_others)
        ]
        for other in others:
            other.start()
        work()
        for other in others:
            other.join()
        if failed:
            raise failed[0]


class ArrivingSource(VerifyingSource):
    """The data file of a shard that comes from a peer: it can be received where it is to lie.

    ``reread_bytes`` were asked for again, since they had not come as they were sent.
    """

    def __init__(self, held: Held, layout: ShardLayout, table: Table, **rest: Any) -> None:
        super().__init__(Ranges(held), layout, table, **rest)
        self._held = held
        self.reread_bytes = 0

    def fill(self, out: memoryview) -> None:
        """Receive all of it into ``out``, by several streams, each chunk compared as it comes.

        Raises Damaged for what stays different, and what the tier says.
        """
        starts = list(range(0, self.size_bytes, ARRIVING_BYTES))
        blocks = iter(starts)
        lock = threading.Lock()
        failed = threading.Event()

        def work(_: int) -> None:
            try:
                while not failed.is_set():
                    with lock:
                        start = next(blocks, None)
                    if start is None:
                        return
                    self._receive(out, start)
            except BaseException:
                failed.set()  # the other streams need not bring the rest
                raise

        in_threads(min(STREAMS, len(starts)), work)
        for start in starts[1:]:  # chunks that two requests have brought
            self._compare(out, start - _shard.CHUNK_BYTES, start)

    def _receive(self, out: memoryview, start: int) -> None:
        stop = min(start + ARRIVING_BYTES, self.size_bytes)
        self._held.read_into(out[start:stop], start)
        self._compare(out, start, stop if stop == self.size_bytes else stop - _shard.CHUNK_BYTES)
        if self._progress is not None:
            self._progress(stop - start)

    def _compare(self, out: memoryview, start: int, stop: int) -> None:
        """Compare the chunks that begin in a range, and ask again for what differs."""
        end = min(stop + _shard.CHUNK_BYTES, self.size_bytes)
        for left in range(REREADS, -1, -1):
            try:
                _shard.check_range(self._layout, self._digests, out[start:end], start, stop)
            except Damaged as error:
                if not left:
                    raise placed(error, self._tier, self._key) from error
                self.reread_bytes += end - start
                self._held.read_into(out[start:end], start)
            else:
                return


def placed(error: _E, tier: str, key: str) -> _E:
    """The same error with the place in it."""
    details: dict[str, Any] = {**error.details, "tier": tier, "key": key}
    return type(error)(error.what, state=error.state, actions=error.actions, **details)


@dataclass(slots=True)
class OpenShard:
    """A shard under a lease. ``data`` is checked as it is read; the two small files are checked."""

    record: Record
    record_data: bytes
    table_data: bytes
    layout: ShardLayout
    table: Table
    data: VerifyingSource


@contextlib.contextmanager
def open_shard(
    place: Place,
    run_key: str,
    name: SaveName,
    rank: int,
    *,
    progress: Progress | None = None,
    cold: bool = False,
) -> Iterator[OpenShard]:
    """Lease a shard and check that its files belong together. Raises Damaged, ObjectNotFound."""
    data_key, table_key, record_key = shard_keys(run_key, name, rank)
    tier = place.tier
    with open_bytes(place, data_key, cold=cold) as (held, reader):
        # The lease comes first: a slot that is not leased may be recycled between two reads.
        record, record_data = read_record(tier, record_key, name, rank)
        layout, table, table_data = read_identity(tier, record, held, data_key, table_key)
        at: dict[str, Any] = {"tier": tier.name, "key": data_key, "progress": progress}
        if place.is_peer:
            data: VerifyingSource = ArrivingSource(held, layout, table, **at)
        else:
            data = VerifyingSource(reader, layout, table, **at)
        yield OpenShard(record, record_data, table_data, layout, table, data)


def read_identity(
    tier: Tier, record: Record, held: Held, data_key: str, table_key: str
) -> tuple[ShardLayout, Table, bytes]:
    """Layout, table and the table's bytes of a shard that is held, whose files are of one save.

    Raises:
        FormatError: they are not, with tier and key of the file that is at odds with the record.
        ObjectNotFound, TierUnavailable: the table is gone, or the tier did not answer.
    """
    try:
        header = read_header(held, record)
        # At most one tensor a byte of header: no table of a shard like this is larger.
        most = held.size_bytes // _shard.CHUNK_BYTES + len(header)
        table_data = read_small(tier, table_key, _shard.TABLE_HEADER.size + 8 * most)
        layout, table = check_identity(record, header, held.size_bytes, table_data)
    except FormatError as error:
        if "key" in error.details:
            raise
        key = table_key if error.details.get("kind") == "table" else data_key
        raise placed(error, tier.name, key) from error
    return layout, table, table_data


def read_header(held: Held, record: Record) -> bytes:
    """Everything up to the data, by one read where the record knows how much that is."""
    likely_bytes = min(record.shard.data_start, held.size_bytes, _shard.MAX_HEADER_BYTES)
    header = held.window(0, max(likely_bytes, min(8, held.size_bytes)))
    length = _shard.header_length(bytes(header[:8]), held.size_bytes)
    return bytes(header if length == len(header) else held.window(0, length))


def read_small(tier: Tier, key: str, max_bytes: int) -> bytes:
    try:
        return read_all(tier, key, max_bytes=max_bytes)
    except ShortRead as error:
        raise Damaged(error.what, tier=tier.name, key=key) from error


def read_record(tier: Tier, key: str, name: SaveName, rank: int) -> tuple[Record, bytes]:
    data = read_small(tier, key, _manifest.MAX_RECORD_BYTES)
    try:
        record = _manifest.decode_sealed(data, Record)
        check_record(record, name, rank)
    except Damaged as error:
        raise placed(error, tier.name, key) from error
    return record, data
