"""Places in memory: a node's RAM, its disk, or a store, as dictionaries that can fail.

Knows files, slots and the order in which the data processes change them; a change can be cut off
between any two steps. Knows no bytes of tensors: a shard's data says which save it is of, and
whether it is a copy that leaves something out. Does not know who asks, or what for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from xxhash import xxh3_64_digest

from mtckpt import _manifest, _shard
from mtckpt._manifest import Record, ShardEntry
from mtckpt.errors import AlreadyExists, FormatError, ObjectNotFound, ShortRead, TierUnavailable
from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Survives

__all__ = [
    "DATA_BYTES",
    "TABLE_BYTES",
    "Directory",
    "File",
    "SlotFiles",
    "are_alike",
    "content_of",
    "is_sound",
    "thin_content_of",
    "thinned",
]

DATA_BYTES = 64
TABLE_BYTES = _shard.TABLE_HEADER.size
_inodes = itertools.count(1000)


@dataclass(eq=False, slots=True)
class File:
    """A file that keeps its identity when it is renamed."""

    content: bytes
    inode: int = field(default_factory=lambda: next(_inodes))


@dataclass(eq=False, slots=True)
class SlotFiles:
    """What there is of one slot."""

    data: File | None = None
    table: File | None = None
    record: File | None = None


def content_of(save_id: str, rank: int) -> bytes:
    """The bytes of the shard of a rank, which no other shard has."""
    return f"{save_id}/{rank}".ljust(DATA_BYTES).encode()


def thin_content_of(save_id: str, rank: int) -> bytes:
    """Those of a copy of it that leaves out what other shards have too."""
    return f"{save_id}/{rank} in part".ljust(DATA_BYTES).encode()


def are_alike(record: Record, rank: int) -> bool:
    """Whether another rank has captured what this record's one has, beside what is its own: that of
    the same place on its node. The plan's digest ends in the number of ranks on a node."""
    _, _, number = record.plan_digest.rpartition("/")
    return number.isdigit() and rank % int(number) == record.rank % int(number)


def thinned(record: Record) -> tuple[bytes, bytes, bytes]:
    """The files of a copy without what other shards have too: data, table, record."""
    data = thin_content_of(record.save_id, record.rank)
    entry = shard_entry(data, record.save_id)
    thin = msgspec.structs.replace(record, shard=entry, left_out=DATA_BYTES)
    return data, table_of(data, record.save_id), _manifest.encode_sealed(thin)


def table_of(data: bytes, save_id: str = "") -> bytes:
    """The digest table of some data; with the word that names its save, once it is finished."""
    word = _manifest.generation_of(save_id) if save_id else 0
    head = xxh3_64_digest(data).ljust(_shard.GENERATION_OFFSET, b"\0")
    return (head + word.to_bytes(8, "little")).ljust(TABLE_BYTES, b"\0")


def shard_entry(data: bytes, save_id: str) -> ShardEntry:
    """What a record says of these files."""
    digest = _shard.table_digest(table_of(data, save_id))
    return ShardEntry(len(data), 0, "", digest, _shard.CHUNK_BYTES)


def is_sound(record: Record, data: bytes, table: bytes) -> bool:
    """Whether three files are of one save, and as they were captured."""
    return (
        _shard.table_digest(table) == record.shard.table_digest
        and _shard.generation_in(table) == _manifest.generation_of(record.save_id)
        and len(data) == record.shard.size_bytes
        and table[:8] == xxh3_64_digest(data)
    )


def parsed(file: File | None) -> Record | None:
    """The record in a file, if it is one."""
    if file is None:
        return None
    try:
        return _manifest.decode_sealed(file.content, Record)
    except FormatError:
        return None


class Directory:
    """A tier, and what its owner keeps beside the objects: slots, and hidden files by run.

    ``problem`` is the error of every call while it is set.
    """

    survives = Survives.PROCESS

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects: dict[str, File] = {}
        self.slots: dict[str, dict[str, SlotFiles]] = {}
        self.hidden: dict[tuple[str, str], bytes] = {}
        self.problem: str = ""

    def __repr__(self) -> str:
        return f"Directory({self.name!r}, {len(self.objects)} objects)"

    def check(self) -> None:
        """Raise TierUnavailable if nothing can be done here now."""
        if self.problem:
            raise TierUnavailable(self.problem, tier=self.name, os_error=self.problem)

    def clear(self) -> None:
        """All of it is gone."""
        self.objects.clear()
        self.slots.clear()
        self.hidden.clear()

    # -- a tier ----------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.check()
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        return iter([ObjectInfo(key, len(self.objects[key].content)) for key in keys])

    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.file(key).content))

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        content = self.file(key).content[offset : offset + len(out)]
        if len(content) < len(out):
            raise ShortRead(
                f"{key} ends early",
                tier=self.name,
                key=key,
                offset=offset,
                wanted_bytes=len(out),
                got_bytes=len(content),
            )
        out[:] = content

    def put(self, key: str, source: Source) -> PutResult:
        self.check()
        if key in self.objects:
            raise AlreadyExists(f"{key} is there already", tier=self.name, key=key)
        content = bytes(source.read(0, source.size_bytes))
        self.objects[key] = File(content)
        return PutResult(len(content))

    def delete(self, key: str) -> None:
        self.check()
        self.objects.pop(key, None)

    def lease(self, key: str) -> File:
        """What lies under a key here may become another save's, as in any directory."""
        return self.file(key)

    def close(self) -> None:
        return None

    def file(self, key: str) -> File:
        """The file under a key. Raises ObjectNotFound."""
        self.check()
        found = self.objects.get(key)
        if found is None:
            raise ObjectNotFound(f"no {key}", tier=self.name, key=key)
        return found
