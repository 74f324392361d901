"""What a tier is: two attributes and six blocking methods, bytes in and bytes out.

A tier knows keys and bytes. It does not know steps, shards, records or frameworks, holds no
retry loop and no rate limit (those are wrappers with the same members), and promises nothing
about an object it did not finish storing, except that nobody ever sees it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mtckpt.errors import ShortRead, UsageError

__all__ = [
    "BytesSource",
    "FillingSource",
    "ObjectInfo",
    "PutResult",
    "Source",
    "Survives",
    "Tier",
    "check_key",
    "read_all",
]

MAX_KEY_BYTES = 512
_COMPONENT = re.compile(r"[a-z0-9_=-][a-z0-9_.=-]{0,199}")


class Survives(enum.Flag):
    """The losses that data in a tier outlives; a set, since a disk and a peer differ in kind."""

    PROCESS = enum.auto()
    POWER = enum.auto()
    NODE = enum.auto()
    CLUSTER = enum.auto()


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object that is completely stored."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a put achieved. ``atomic`` is False for a store that can only check, then write.

    ``copied_bytes`` of ``size_bytes`` were not sent: the tier had them, and copied them by itself.
    """

    size_bytes: int
    atomic: bool = True
    copied_bytes: int = 0


@runtime_checkable
class Source(Protocol):
    """The bytes of one object, asked for in blocks.

    A tier requests every byte of ``[0, size_bytes)`` exactly once an attempt, in blocks of its own
    size, in any order and from several threads. A source that verifies raises ``Damaged`` from
    ``read``, and the put then leaves nothing behind. A view stays valid until the same thread asks
    for another one, or the put returns: a tier is done with a block, or has copied it, before it
    asks for the next.
    """

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, size_bytes: int) -> memoryview: ...


@runtime_checkable
class FillingSource(Source, Protocol):
    """A source that can as well put all of its bytes into memory that it is given.

    A tier in memory gives it the pages of the object; what ``read`` may raise, ``fill`` may.
    """

    def fill(self, out: memoryview) -> None: ...


class BytesSource:
    """A source over bytes that are in memory already."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data).cast("B")

    @property
    def size_bytes(self) -> int:
        return len(self._view)

    def read(self, offset: int, size_bytes: int) -> memoryview:
        return self._view[offset : offset + size_bytes]


class Tier(Protocol):
    """A place that keeps objects. All methods block and may be called from many threads.

    ``name`` is the short label in errors, metrics and logs ("ram", "disk", "peers", "store");
    ``survives`` is what its data outlives.
    """

    name: str
    survives: Survives

    def put(self, key: str, source: Source) -> PutResult:
        """Create ``key`` with all bytes of ``source``; never replaces.

        The key appears whole or not at all, for readers and after any crash. When this returns,
        the bytes are as durable as the tier gets. No reference to the source is kept.

        Raises:
            AlreadyExists: the key is there; its object is unchanged.
            TierFull, TierReadOnly, AccessDenied, TierUnavailable: nothing was stored.
        """

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Fill ``out`` from byte ``offset`` on. The caller owns ``out``.

        Raises:
            ObjectNotFound: the tier answered no.
            ShortRead: fewer bytes are there; ``out`` is then undefined.
            TierUnavailable: the tier did not answer.
        """

    def stat(self, key: str) -> ObjectInfo:
        """Size of the object. Raises ObjectNotFound or TierUnavailable."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, sorted; half-written ones never show."""

    def delete(self, key: str) -> None:
        """Remove the object. Idempotent: deleting what is not there succeeds."""

    def close(self) -> None:
        """Release descriptors, sockets and threads. Idempotent."""


def check_key(key: str) -> str:
    """Return ``key`` if it is one: components of ``[a-z0-9_.=-]``, none starting with a dot.

    Keys are the only strings that become paths, and they are never taken from a checkpoint.
    """
    if len(key) > MAX_KEY_BYTES or not key or not all(map(_COMPONENT.fullmatch, key.split("/"))):
        raise UsageError(f"not a valid key: {key[:80]!r}", state="nothing was done")
    return key


def read_all(tier: Tier, key: str, *, max_bytes: int) -> bytes:
    """The whole of a small object, refused above ``max_bytes`` before anything is allocated."""
    size_bytes = tier.stat(key).size_bytes
    if size_bytes > max_bytes:
        raise ShortRead(
            "object is larger than anything of its kind can be",
            tier=tier.name,
            key=key,
            wanted_bytes=max_bytes,
            got_bytes=size_bytes,
        )
    out = bytearray(size_bytes)
    tier.read_into(key, memoryview(out))
    return bytes(out)
