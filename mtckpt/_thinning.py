"""Copies of shards that leave out what their holder has captured itself, and making them whole.

Knows shards that are open, and which boxes of arrays several ranks have stored alike. A thin copy
is a shard like any other: of what it leaves out it has empty boxes, as a rank has that stores no
share of an array, and readers find the bytes in the shards beside it. Boxes count as equal by their
root digests only. Does not know where shards lie, nor who is to hold copies.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _manifest, _shard
from mtckpt._held import Composed, Part
from mtckpt._manifest import ArrayEntry, ShardEntry
from mtckpt._shard import ShardLayout, Table
from mtckpt._source import ArrivingSource, OpenShard
from mtckpt._twins import Alike, alike_in, alike_of
from mtckpt.errors import Damaged

if TYPE_CHECKING:
    from mtckpt._held import Ranged
    from mtckpt._manifest import Record

__all__ = ["captured_in", "layout_in", "made_of", "thinned"]


def captured_in(records: Iterable[Record]) -> dict[Alike, bytes]:
    """What a node has captured of what others hold too, from the records of its ranks. Thin copies
    among them count for what they have."""
    return {box: root for record in records for box, root in alike_in(record).items()}


def thinned(shard: OpenShard, captured: Mapping[Alike, bytes]) -> OpenShard:
    """The shard without the boxes that have been captured beside it, with the same root digests;
    the shard itself where there are none. Raises Damaged where its record does not describe it."""
    record, data = shard.record, shard.data
    if not isinstance(data, ArrivingSource):
        return shard
    found = alike_in(record)
    left_out = {box for box, root in found.items() if captured.get(box) == root}
    if not left_out:
        return shard
    entries = record.array_entries()
    names = {e.stored_name for e in entries if e.same_as is None and alike_of(e) in left_out}
    entries = [_without(entry, entries, names) for entry in entries]
    layout = _shard.plan_layout(
        (entry.stored_name, entry.dtype, entry.shape) for entry in entries if entry.same_as is None
    )
    theirs = shard.layout.by_name()
    digests = array("Q")
    parts = []
    for tensor in layout.tensors:
        there = theirs.get(tensor.name)
        if there is None:
            raise Damaged("record and shard header disagree", leaf=tensor.name[:200])
        if tensor.name not in names:
            first = there.first_chunk
            digests.frombytes(shard.table.digests[first : first + there.num_chunks].tobytes())
            parts.append(Part(tensor.start, tensor.size_bytes, data.held, there.start))
    generation = _manifest.generation_of(record.save_id)
    table_data = Table.header(layout, generation) + digests.tobytes()
    table = Table.parse(table_data, layout)
    thin = msgspec.structs.replace(
        record,
        shard=ShardEntry(
            layout.size_bytes,
            layout.data_start,
            layout.header_digest_hex,
            _shard.table_digest(table_data),
            record.shard.chunk_bytes,
        ),
        roots=base64.b64encode(_shard.root_digests(layout, table.digests)).decode(),
        arrays=msgspec.Raw(msgspec.json.encode(entries)),
        left_out=record.left_out + sum(theirs[name].size_bytes for name in names),
    )
    return OpenShard(
        thin,
        _manifest.encode_sealed(thin),
        table_data,
        layout,
        table,
        data.of(Composed(layout.header, parts), layout, table),
    )


def _without(entry: ArrayEntry, entries: list[ArrayEntry], names: set[str]) -> ArrayEntry:
    """The entry; with an empty box where it, or what it is tied to, is left out."""
    twin = entry if entry.same_as is None else entries[entry.same_as]
    if twin.stored_name not in names:
        return entry
    return msgspec.structs.replace(entry, shape=(0, *entry.shape[1:]))


def layout_in(record: Record) -> ShardLayout:
    """How the file of a record is laid out, without a look at it. Raises Damaged where the record
    is of another file."""
    entries = [entry for entry in record.array_entries() if entry.same_as is None]
    layout = _shard.plan_layout((e.stored_name, e.dtype, e.shape) for e in entries)
    if layout.header_digest_hex != record.shard.header_digest:
        raise Damaged("record and shard header disagree", step=record.step, rank=record.rank)
    return layout


def made_of(layout: ShardLayout, table: Table, others: Iterable[tuple[Record, Ranged]]) -> Composed:
    """The bytes of a shard whose layout and table are sound, out of the tensors that shards of its
    save have, by name and root. Raises Damaged for a tensor that none of them has."""
    roots = _shard.root_digests(layout, table.digests)
    lacking = {
        (tensor.name, roots[16 * i : 16 * (i + 1)]): tensor
        for i, tensor in enumerate(layout.tensors)
        if tensor.size_bytes
    }
    parts = []
    for record, held in others:
        if not lacking:
            break
        theirs = record.root_bytes()
        for i, there in enumerate(layout_in(record).tensors):
            tensor = lacking.get((there.name, theirs[16 * i : 16 * (i + 1)]))
            if tensor is not None and tensor.size_bytes == there.size_bytes:
                del lacking[tensor.name, theirs[16 * i : 16 * (i + 1)]]
                parts.append(Part(tensor.start, tensor.size_bytes, held, there.start))
    for name, _ in lacking:
        raise Damaged("no shard over there has a tensor as it was captured", tensor=name[:200])
    return Composed(layout.header, sorted(parts, key=lambda part: part.start))
