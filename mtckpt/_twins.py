"""What several ranks hold alike and each has stored: whether the bytes are the same. Pure.

Knows records only: a record says which of its arrays other ranks hold too, and has a root digest of
each. Records of ranks that stored the same boxes of such arrays are compared by two digests a
group of holders; array by array only where those differ. Boxes that ranks have cut differently, as
nodes with different numbers of ranks do, are not compared. Does not know which copy is right.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_128_digest

from mtckpt import _shard
from mtckpt._dtypes import DTYPES
from mtckpt.errors import Damaged, FormatTooNew

if TYPE_CHECKING:
    from mtckpt._manifest import ArrayEntry, Record

__all__ = [
    "Alike",
    "Divergence",
    "Twins",
    "alike_in",
    "by_ranks",
    "compare",
    "divergences",
    "roots_of",
    "twins_of",
]

_ROOT_BYTES = 16
# By the digest of a record's arrays: of each rank of a node, for a plan or two.
_KNOWN: dict[bytes, dict[str, array[int]]] = {}
_MAX_KNOWN = 64
# Boxes that somebody else has stored too -> the roots of them -> who has those. By digests.
Twins = dict[str, dict[str, list[int]]]


class Divergence(NamedTuple):
    """Copies of ``leaf`` that are to be equal and are not. ``groups`` of ranks have equal ones."""

    leaf: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> list[int]:
        return sorted(rank for group in self.groups for rank in group)

    def __str__(self) -> str:
        said = [f"rank {g[0]}" if len(g) == 1 else f"ranks {', '.join(map(str, g[:8]))}"
                for g in self.groups]  # fmt: skip
        return f"copies of {self.leaf} differ: those of {' and of '.join(said)}"


class Alike(NamedTuple):
    """A box of an array that other ranks hold too: equal for all that have stored it."""

    group: str
    path: str
    dtype: str
    offsets: tuple[int, ...] | None
    shape: tuple[int, ...]
    global_shape: tuple[int, ...] | None


def alike_in(record: Record) -> dict[Alike, bytes]:
    """The boxes that a rank has stored of what others hold too, with their roots.

    Raises Damaged, FormatTooNew, UnsupportedState for a record that does not describe a shard.
    """
    if b'"alike"' not in bytes(record.arrays):
        return {}
    entries = _firsts(record)
    index_of = _index_of(entries)
    held = [entry for entry in entries if entry.alike and entry.shape and 0 not in entry.shape]
    roots = _roots(record, array("L", [index_of[entry.stored_name] for entry in held]))
    return {alike_of(entry): root for entry, root in zip(held, roots, strict=True)}


def alike_of(entry: ArrayEntry) -> Alike:
    """What of an entry is the same for all ranks that have stored the box."""
    return Alike(
        entry.alike, entry.path, entry.dtype, entry.offsets, entry.shape, entry.global_shape
    )


def _firsts(record: Record) -> list[ArrayEntry]:
    """The entries that have bytes of their own."""
    entries = [entry for entry in record.array_entries() if entry.same_as is None]
    if not {entry.dtype for entry in entries} <= DTYPES.keys():
        raise FormatTooNew("a leaf of unknown type", step=record.step)
    return entries


def _index_of(entries: Iterable[ArrayEntry]) -> dict[str, int]:
    """Where the tensors of entries come in the file, and so their roots in the record."""
    layout = _shard.plan_layout((e.stored_name, e.dtype, e.shape) for e in entries)
    return {tensor.name: i for i, tensor in enumerate(layout.tensors)}


def _stored(record: Record) -> dict[str, tuple[list[str], array[int]]]:
    """The arrays that other ranks hold too: their paths, and where their roots are in the record's;
    by the digest of what they are and of the group that holds them."""
    entries = _firsts(record)
    index_of = _index_of(entries)
    groups: dict[str, list[ArrayEntry]] = {}
    for entry in sorted(entries, key=operator.attrgetter("stored_name")):
        if entry.alike and 0 not in entry.shape:
            groups.setdefault(entry.alike, []).append(entry)
    found = {}
    for group, held in groups.items():
        named = [[e.path, e.dtype, e.offsets, e.shape, e.global_shape] for e in held]
        boxes = xxh3_64_hexdigest(msgspec.json.encode([group, named]))
        found[boxes] = [e.path for e in held], array("L", [index_of[e.stored_name] for e in held])
    return found


def _places(record: Record) -> dict[str, array[int]]:
    """Where the roots are. One save after the other has the same arrays, so that is kept."""
    key = xxh3_128_digest(record.arrays)
    found = _KNOWN.get(key)
    if found is None:
        is_alone = b'"alike"' not in bytes(record.arrays)
        found = {} if is_alone else {boxes: at for boxes, (_, at) in _stored(record).items()}
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = found
    return found


def _roots(record: Record, places: array[int]) -> list[bytes]:
    roots = record.root_bytes()
    if places and len(roots) < _ROOT_BYTES * (max(places) + 1):
        raise Damaged("the record has fewer roots than arrays", step=record.step)
    return [roots[_ROOT_BYTES * i : _ROOT_BYTES * (i + 1)] for i in places]


def twins_of(record: Record) -> dict[str, str]:
    """What one rank has stored of what others hold too: boxes -> roots, by digests of them.

    Raises Damaged, FormatTooNew, UnsupportedState for a record that does not describe a shard.
    """
    return {
        boxes: xxh3_64_hexdigest(b"".join(_roots(record, places)))
        for boxes, places in _places(record).items()
    }


def roots_of(record: Record, boxes: str) -> list[tuple[str, str]]:
    """Paths and roots of the arrays behind one key of ``twins_of``; the same paths on all ranks."""
    if boxes not in _places(record):
        return []
    paths, places = _stored(record)[boxes]
    return [(path, root.hex()) for path, root in zip(paths, _roots(record, places), strict=True)]


def by_ranks(found: Iterable[tuple[int, Mapping[str, str]]]) -> Twins:
    """What ranks have stored, put together."""
    twins: Twins = {}
    for rank, boxes in found:
        for key, roots in boxes.items():
            twins.setdefault(key, {}).setdefault(roots, []).append(rank)
    return twins


def compare(held: Iterable[tuple[tuple[int, ...], list[tuple[str, str]]]]) -> list[Divergence]:
    """Where ranks differ that have stored the same boxes; ranks of one entry have the same."""
    held = [each for each in held if each[1]]
    found: dict[str, Divergence] = {}
    for rows in zip(*(roots for _, roots in held), strict=False):
        leaf = rows[0][0]
        groups: dict[str, list[int]] = {}
        for (ranks, _), (_, root) in zip(held, rows, strict=True):
            groups.setdefault(root, []).extend(ranks)
        if len(groups) > 1:
            differing = tuple(tuple(sorted(group)) for group in groups.values())
            found.setdefault(leaf, Divergence(leaf, differing))
    return list(found.values())


def divergences(records: Mapping[int, Record]) -> list[Divergence]:
    """All of a save, from the records of its ranks."""
    twins = by_ranks((rank, twins_of(record)) for rank, record in sorted(records.items()))
    found: list[Divergence] = []
    for boxes, roots in twins.items():
        if len(roots) > 1:
            ranks = [tuple(each) for each in roots.values()]
            found += compare((each, roots_of(records[each[0]], boxes)) for each in ranks)
    return found
