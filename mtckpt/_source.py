"""Reading a shard where it lies, and comparing it with the digests of its capture on the way.

It knows the three files. It does not know where bytes go. What it hands out has been checked; what
it cannot check it refuses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mtckpt import _manifest, _shard
from mtckpt._held import Place, Ranges, open_bytes
from mtckpt._inventory import check_identity, check_record, shard_keys
from mtckpt._manifest import Record, SaveName
from mtckpt.errors import Damaged, FormatError, ShortRead
from mtckpt.tiers._blocks import in_threads
from mtckpt.tiers._os_errors import tier_error
from mtckpt.tiers.base import Tier, read_all

if TYPE_CHECKING:
    from mtckpt._held import Held, Ranged, Reader
    from mtckpt._shard import ShardLayout, Table

__all__ = ["ArrivingSource", "OpenShard", "Place", "Progress", "VerifyingSource", "open_shard"]

BLOCK_BYTES = 8 << 20
# Connections that one shard comes over from a peer; what one request brings is still in the
# processor's cache when it is compared.
STREAMS = 4
ARRIVING_BYTES = 2 << 20
# How often bytes that differ from their digest are asked for again: what was lost on the way is
# right the next time, what is damaged at its source is not.
REREADS = 2
Progress = Callable[[int], None]
_E = TypeVar("_E", bound=FormatError)


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
        in_threads(num_others + 1, lambda _: work())
        if failed:
            raise failed[0]


class ArrivingSource(VerifyingSource):
    """The data file of a shard that comes from a peer: it can be received where it is to lie.

    ``reread_bytes`` were asked for again, since they had not come as they were sent.
    """

    def __init__(self, held: Ranged, layout: ShardLayout, table: Table, **rest: Any) -> None:
        super().__init__(Ranges(held), layout, table, **rest)
        self.held = held
        self.reread_bytes = 0

    def of(self, held: Ranged, layout: ShardLayout, table: Table) -> ArrivingSource:
        """Another shard, out of what arrives of this one."""
        at: dict[str, Any] = {
            "tier": self._tier, "key": self._key, "progress": self._progress
        }  # fmt: skip
        return ArrivingSource(held, layout, table, **at)

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
        self.held.read_into(out[start:stop], start)
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
                self.held.read_into(out[start:end], start)
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
