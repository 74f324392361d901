"""What a copy engine does: bytes from live memory to their place in a slot, digested on the way.

Knows addresses and chunks. Does not know frameworks, files or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Engine", "Move"]


@dataclass(frozen=True, slots=True)
class Move:
    """``size_bytes`` from ``source`` to ``target`` (addresses); its digests start at ``chunk``."""

    source: int
    target: int
    size_bytes: int
    chunk: int


class Engine(Protocol):
    """Moves bytes by its own threads, with the interpreter lock released."""

    def capture(self, moves: Sequence[Move], digests: memoryview) -> None:
        """Copy every move and write the XXH3-64 of each 256 KiB of its *source* to ``digests``.

        The digest is of what the state held, taken before the copy: a copy that went wrong shows.
        """

    def verify(self, moves: Sequence[Move], digests: memoryview) -> set[int]:
        """Indexes of the moves whose *source* does not match ``digests``; copies nothing."""

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy every move, without digests."""
