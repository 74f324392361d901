"""Reading a shard where it lies, and comparing it with the digests of its capture on the way.

It knows the three files, leases, mappings and O_DIRECT. It does not know where bytes go. What it
hands out has been checked; what it cannot check it refuses.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mtckpt import _manifest, _shard
from mtckpt._inventory import check_identity, check_record, shard_keys
from mtckpt._manifest import Record, SaveName
from mtckpt.errors import Damaged, FormatError, ShortRead
from mtckpt.tiers._os_errors import tier_error
from mtckpt.tiers.base import read_all

if TYPE_CHECKING:
    from mtckpt._shard import ShardLayout, Table
    from mtckpt.tiers.base import Tier
    from mtckpt.tiers.local import Lease, LocalTier

__all__ = ["Blocks", "Mapped", "OpenShard", "Place", "Progress", "VerifyingSource", "open_shard"]

BLOCK_BYTES = 8 << 20
ALIGN_BYTES = 4096
Progress = Callable[[int], None]
_E = TypeVar("_E", bound=FormatError)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory tier. ``through`` is what puts go through: the tier itself, or a wrapper of it.

    ``in_memory``: it is a tmpfs, so its files are mapped; others are read in blocks, since a disk
    that fails would end a reader of a mapping with SIGBUS.
    """

    local: LocalTier
    through: Tier
    in_memory: bool


class Mapped:
    """The bytes of a tmpfs file, where they are. A fresh mapping costs some 3 % of a flush here."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._mapping = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
        self._view = memoryview(self._mapping)

    def window(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]

    def close(self) -> None:
        self._view.release()
        with contextlib.suppress(BufferError):
            # A traceback can still hold a slice; the mapping then goes with it.
            self._mapping.close()


class Blocks:
    """The bytes of a file, read into one buffer a thread: a window is good until the next one."""

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


class VerifyingSource:
    """The data file of a shard, each chunk compared with its digest when its block is asked for.

    A chunk is checked with the block in which it begins. Raises Damaged from ``read``, with tier
    and key. A block is valid until the same thread asks for the next one.
    """

    def __init__(
        self,
        reader: Mapped | Blocks,
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
        """Check every byte, in this thread and one more; nothing is kept."""
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

        other = threading.Thread(target=work, name="mtckpt-verify", daemon=True)
        if self.size_bytes > BLOCK_BYTES:
            other.start()
        work()
        if other.ident is not None:
            other.join()
        if failed:
            raise failed[0]


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
    tier = place.local
    with tier.lease(data_key) as lease:
        # The lease comes first: a slot that is not leased may be recycled between two reads.
        record, record_data = read_record(tier, record_key, name, rank)
        layout, table, table_data = read_identity(tier, record, lease, data_key, table_key)
        reader = (
            Mapped(lease.fd, lease.size_bytes)
            if place.in_memory
            else Blocks(lease.fd, lease.size_bytes, direct=cold)
        )
        try:
            data = VerifyingSource(
                reader, layout, table, tier=tier.name, key=data_key, progress=progress
            )
            yield OpenShard(record, record_data, table_data, layout, table, data)
        finally:
            reader.close()


def read_identity(
    tier: Tier, record: Record, lease: Lease, data_key: str, table_key: str
) -> tuple[ShardLayout, Table, bytes]:
    """Layout, table and the table's bytes of a leased shard whose files are of one save.

    Raises:
        FormatError: they are not, with tier and key of the file that is at odds with the record.
        ObjectNotFound, TierUnavailable: the table is gone, or the tier did not answer.
    """
    try:
        header = _shard.read_header(lease.fd, lease.size_bytes)
        # At most one tensor a byte of header: no table of a shard like this is larger.
        most = lease.size_bytes // _shard.CHUNK_BYTES + len(header)
        table_data = read_small(tier, table_key, _shard.TABLE_HEADER.size + 8 * most)
        layout, table = check_identity(record, header, lease.size_bytes, table_data)
    except FormatError as error:
        if "key" in error.details:
            raise
        key = table_key if error.details.get("kind") == "table" else data_key
        raise placed(error, tier.name, key) from error
    except OSError as error:
        raise tier_error(
            error, doing="read", tier=tier.name, key=data_key, place=data_key
        ) from error
    return layout, table, table_data


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
