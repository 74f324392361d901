"""One rank's shard, opened for reading: description checked first, every byte when it is read.

Knows the three files of a shard and what they say of one another. Does not know how shards join
into arrays, nor which save is wanted. A lease is held until ``close``, so the bytes stay the
ones that were described.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from mtckpt import _inventory, _shard
from mtckpt._dtypes import DTYPES
from mtckpt._held import hold
from mtckpt._shard import CHUNK_BYTES
from mtckpt._source import placed, read_identity
from mtckpt.errors import Damaged, FormatError, FormatTooNew

if TYPE_CHECKING:
    from mtckpt._held import Held
    from mtckpt._manifest import ArrayEntry, Record, SaveName
    from mtckpt._places import Place
    from mtckpt._shard import ShardLayout, StoredTensor, Table

__all__ = ["OpenShard", "check_box", "open_shard"]


@dataclass(slots=True)
class OpenShard:
    """Made by ``open_shard``. ``tensors`` goes with ``entries``, tied ones share one."""

    record: Record
    layout: ShardLayout
    table: Table
    entries: list[ArrayEntry]
    tensors: list[StoredTensor]
    key: str
    tier: str
    held: Held

    def read(
        self,
        tensor: StoredTensor,
        out: memoryview | None = None,
        first_chunk: int = 0,
        stop_chunk: int | None = None,
    ) -> None:
        """Read and verify a tensor or some chunks of it, into ``out`` if they are wanted.

        Raises Damaged with the key.
        """
        base = first_chunk * CHUNK_BYTES
        end = tensor.size_bytes
        if stop_chunk is not None:
            end = min(end, stop_chunk * CHUNK_BYTES)
        block_bytes = self.held.block_bytes  # whole chunks
        scratch = memoryview(bytearray(min(block_bytes, end - base) if out is None else 0))
        digests = self.table.digests
        for start in range(base, end, block_bytes):
            stop = min(start + block_bytes, end)
            view = scratch[: stop - start] if out is None else out[start - base : stop - base]
            self.held.read_into(view, tensor.start + start)
            for begin in range(start, stop, CHUNK_BYTES):
                chunk = tensor.first_chunk + begin // CHUNK_BYTES
                piece = view[begin - start : begin - start + CHUNK_BYTES]
                if xxh3_64_intdigest(piece) != digests[chunk]:
                    raise Damaged(
                        "bytes differ from their digest",
                        tensor=tensor.name[:200],
                        chunk=begin // CHUNK_BYTES,
                        offset=tensor.start + begin,
                        tier=self.tier,
                        key=self.key,
                        step=self.record.step,
                        state="nothing of this tensor was handed out",
                    )

    def close(self) -> None:
        """Let go of the shard. Idempotent."""
        self.held.close()


def open_shard(place: Place, name: SaveName, record: Record) -> OpenShard:
    """Take the lease, then check header, digest table and record against one another.

    Raises:
        ObjectNotFound: the save went away.
        FormatError: something does not fit, with the file's key.
    """
    data_key, table_key, record_key = _inventory.shard_keys(place.run_key, name, record.rank)
    held = hold(place.tier, data_key)
    try:
        layout, table, _ = read_identity(place.tier, record, held, data_key, table_key)
        try:
            entries, tensors = _match(layout, table, record)
        except FormatError as error:
            raise placed(error, place.label, record_key) from error
        return OpenShard(record, layout, table, entries, tensors, data_key, place.label, held)
    except BaseException:
        held.close()
        raise


def _match(
    layout: ShardLayout, table: Table, record: Record
) -> tuple[list[ArrayEntry], list[StoredTensor]]:
    """The record's entries and their tensors. Raises FormatError where the two disagree."""
    entries = record.array_entries()
    if _shard.root_digests(layout, table.digests) != record.root_bytes():
        raise Damaged("roots do not match the digest table")
    by_name = layout.by_name()
    tensors = []
    for entry in entries:
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise FormatTooNew(f"leaf of unknown type {entry.dtype[:40]!r}", leaf=entry.path)
        check_box(entry)
        twin = entry if entry.same_as is None else entries[entry.same_as]
        tensor = by_name.get(twin.stored_name)
        if (
            tensor is None
            or twin.same_as is not None
            or (entry.dtype, entry.shape) != (twin.dtype, twin.shape)
            or (tensor.code, tensor.shape) != (dtype.stored_code, dtype.stored_shape(entry.shape))
        ):
            raise Damaged("record and shard header disagree", leaf=entry.path[:200])
        tensors.append(tensor)
    return entries, tensors


def check_box(entry: ArrayEntry) -> None:
    """Raise Damaged for a box that does not lie within its array."""
    if entry.offsets is None and entry.global_shape is None:
        return
    offsets, whole = entry.offsets or (), entry.global_shape or ()
    if not len(offsets) == len(whole) == len(entry.shape) or any(
        offset < 0 or offset + size > total
        for offset, size, total in zip(offsets, entry.shape, whole, strict=True)
    ):
        raise Damaged("a box does not lie within its array", leaf=entry.path[:200])
