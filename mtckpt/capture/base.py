"""What a copy engine does: bytes from live memory to their place in a slot, digested on the way.

Knows addresses and chunks. Does not know frameworks, files or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["Engine", "Move", "Span"]


class Span(NamedTuple):
    """One tensor's place in a shard: offset in the file, size, and its first chunk."""

    start: int
    size_bytes: int
    chunk: int


class Move(NamedTuple):
    """Bytes to copy from one address to another, as many ``times`` with steps in between."""

    source: int
    target: int
    size_bytes: int
    times: int = 1
    source_step: int = 0
    target_step: int = 0


class Engine(Protocol):
    """Moves bytes by its own threads, with the interpreter lock released."""

    def capture(
        self, sources: Sequence[int], spans: Sequence[Span], base: int, digests: memoryview
    ) -> None:
        """Copy ``sources[i]`` to ``base + spans[i].start`` for all i, and digest it.

        ``digests`` (u64 a chunk) gets the XXH3-64 of each 256 KiB of the *source*, taken before
        the copy: a copy that went wrong shows.
        """

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
    ) -> list[int]:
        """Read the spans of a file, check each chunk, and copy what is sound to its target.

        ``targets`` holds an address a span; 0 only checks. Returns the indexes of spans with a
        chunk that does not match or is not there; no such chunk reaches a target. ``progress`` is
        told, by any thread, of bytes that were read. Raises OSError as reading does.
        """

    def verify(self, base: int, spans: Sequence[Span], digests: memoryview) -> list[int]:
        """Indexes of the spans whose bytes at ``base + start`` do not match ``digests``."""

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy every move, without digests."""
