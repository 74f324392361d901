"""A shard's description, and what is wanted of it: which chunks, and where they are to be.

Knows places, records, headers and digest tables. Reads no tensor, and knows no tree or framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mtckpt import _shard
from mtckpt._dtypes import DTYPES
from mtckpt._shard import ShardLayout, Table
from mtckpt.capture.base import Move, Span, span_of
from mtckpt.errors import Damaged

if TYPE_CHECKING:
    from mtckpt._manifest import ArrayEntry, Record
    from mtckpt.tiers import Tier

__all__ = ["Copy", "Loaded", "Place", "Want", "describe", "whole_wants"]


@dataclass(frozen=True, slots=True)
class Place:
    """A tier to read from. ``mapped``: its files may be mapped (tmpfs); others are read.

    ``near``: it is of this node, so that a look into it costs nothing that others pay for.
    ``streams``: how many threads read what is large, where one does not use what the way there has.
    ``node``: whose it is, if another node's.
    """

    label: str
    tier: Tier
    mapped: bool
    near: bool = True
    streams: int = 1
    node: str = ""


@dataclass(slots=True)
class Loaded:
    """A shard's description, read from the first source whose small files are sound.

    ``numbers`` has for each entry the number, in file order, of the tensor whose bytes it has.
    """

    record: Record
    layout: ShardLayout
    table: Table
    entries: list[ArrayEntry]
    numbers: list[int]

    def is_same(self, one: int, other: int) -> bool:
        """True if two entries of one size have the same bytes, by the digests of all chunks."""
        tensors = (self.layout.tensors[self.numbers[index]] for index in (one, other))
        first, second = (
            self.table.digests[tensor.first_chunk : tensor.first_chunk + tensor.num_chunks]
            for tensor in tensors
        )
        return first == second


class Copy(NamedTuple):
    """A shard in one place."""

    place: Place
    key: str
    loaded: Loaded


def describe(place: Place, keys: tuple[str, str, str], record: Record) -> Loaded:
    data_key, table_key, _ = keys
    prefix = bytearray(8)
    place.tier.read_into(data_key, memoryview(prefix))
    file_bytes = place.tier.stat(data_key).size_bytes
    header = bytearray(_shard.header_length(bytes(prefix), file_bytes))
    place.tier.read_into(data_key, memoryview(header))
    layout = _shard.parse_layout(bytes(header), file_bytes)
    table_size = place.tier.stat(table_key).size_bytes
    if table_size != layout.table_bytes:
        raise Damaged("digest table has another size than the shard needs", key=table_key)
    table_bytes = bytearray(table_size)
    place.tier.read_into(table_key, memoryview(table_bytes))
    if _shard.table_digest(bytes(table_bytes)) != record.shard.table_digest:
        raise Damaged("digest table is not the one the record names", key=table_key)
    table = Table.parse(memoryview(table_bytes), layout)
    entries = record.array_entries()
    return Loaded(record, layout, table, entries, _numbers(entries, layout, data_key))


def _numbers(entries: Sequence[ArrayEntry], layout: ShardLayout, key: str) -> list[int]:
    """Which tensor of the file each entry is. Raises Damaged where the two disagree."""
    tensors = layout.tensors
    number_of = {tensor.name: number for number, tensor in enumerate(tensors)}
    numbers = []
    for entry in entries:
        twin = entry if entry.same_as is None else entries[entry.same_as]
        number = number_of.get(twin.path if twin.offsets is None else twin.stored_name, -1)
        dtype = DTYPES.get(entry.dtype)
        if (
            number < 0
            or dtype is None
            or tensors[number].code != dtype.stored_code
            or tensors[number].shape != dtype.stored_shape(entry.shape)
            or (twin is not entry and (twin.same_as is not None or twin.dtype != entry.dtype))
        ):
            raise Damaged("record and shard header disagree", key=key, leaf=entry.path)
        numbers.append(number)
    return numbers


# -- what is wanted of one shard -------------------------------------------------------------------


class Want(NamedTuple):
    """Whole chunks of tensor ``number`` of the file, all of them or some, and where they are to be.

    ``span`` begins where one of the tensor's chunks does. ``cuts``: rows of it are wanted, not all;
    their sources count from its beginning, and ``address`` is 0.
    """

    number: int
    span: Span
    address: int
    cuts: Sequence[Move] = ()

    def moves(self, source: int) -> list[Move]:
        """How what is wanted gets to its place once the span lies at ``source``."""
        if not self.cuts:
            return [Move(source, self.address, self.span.size_bytes)]
        return [move._replace(source=source + move.source) for move in self.cuts]

    @property
    def targets(self) -> Sequence[int]:
        """Where anything of it is to be."""
        return [move.target for move in self.cuts] or [self.address]


# From its fields in order, as ``span_of``.
_want_of: Callable[[tuple[int, Span, int, tuple[()]]], Want] = functools.partial(
    tuple.__new__, Want
)


def whole_wants(
    loaded: Loaded, addresses: Sequence[tuple[int, int]]
) -> tuple[list[Want], list[Move]]:
    """Wants for ``(address, entry)`` of whole tensors, in the order of the file.

    What is wanted at several addresses is brought to one of them and copied on by the moves.
    """
    tensors, numbers = loaded.layout.tensors, loaded.numbers
    targets: dict[int, int] = {}
    repeats: list[Move] = []
    for address, index in addresses:
        number = numbers[index]
        if number in targets:
            repeats.append(Move(targets[number], address, tensors[number].size_bytes))
        elif tensors[number].size_bytes:
            targets[number] = address
    wants = []
    for number in sorted(targets):
        span = span_of(tensors[number][3:6])  # start, size and first chunk
        wants.append(_want_of((number, span, targets[number], ())))
    return wants, repeats
