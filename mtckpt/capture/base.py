"""What a copy engine does: bytes from live memory to their place in a slot, digested on the way.

Knows addresses and chunks. Does not know frameworks, files or steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

__all__ = ["MODES", "NO_CUTS", "Capture", "Engine", "Mode", "Move", "Span", "nothing", "span_of"]

Mode = Literal["auto", "snapshot", "snapshot-overlap", "overlap", "blocking"]
MODES: tuple[Mode, ...] = ("auto", "snapshot", "snapshot-overlap", "overlap", "blocking")


class Span(NamedTuple):
    """One tensor's place in a shard: offset in the file, size, and its first chunk."""

    start: int
    size_bytes: int
    chunk: int


# From a tuple of its fields: calling the class takes three times as long.
span_of: Callable[[tuple[Any, ...]], Span] = functools.partial(tuple.__new__, Span)


class Move(NamedTuple):
    """Bytes to copy from one address to another, as many ``times`` with steps in between."""

    source: int
    target: int
    size_bytes: int
    times: int = 1
    source_step: int = 0
    target_step: int = 0


def nothing() -> None:
    """Who is told of something and does not mind."""


# What is taken out of spans of which not all is wanted: of none.
NO_CUTS: Mapping[int, Sequence[Move]] = MappingProxyType({})


class Capture(Protocol):
    """A capture whose values are those at the call; its bytes may still be on their way.

    ``is_captured``: any of the values may be changed now. ``is_done``: nothing is left to finish.
    """

    is_captured: bool
    is_done: bool

    def finish(self, digests: memoryview) -> bytes:
        """Wait until bytes and digests are all there; takes as long as the copy does.

        To be called once, with the digests that ``capture`` was given. Returns which chunks were
        left as they lay there, a bit each from the lowest on; empty if none was. Raises
        CaptureFailed.
        """


class Engine(Protocol):
    """Moves bytes by its own threads, with the interpreter lock released.

    Addresses of devices (``addresses.OnDevice``) may stand wherever sources or targets do.
    """

    def capture(
        self,
        sources: Sequence[int],
        spans: Sequence[Span],
        base: int,
        digests: memoryview,
        mode: Mode = "auto",
        *,
        is_known: bool = False,
    ) -> Capture:
        """Copy ``sources[i]`` to ``base + spans[i].start`` for all i, and digest it.

        ``digests`` (u64 a chunk) gets the XXH3-64 of each 256 KiB of the *source*, never of the
        copy: one that went wrong shows. ``mode`` says what memory of a device may be used.
        What lies on devices is there once ``finish`` of the result has returned.

        ``is_known``: ``digests`` are those of what lies at the places now. Chunks whose digests are
        the same need not be copied; the caller has to look at them there.
        """

    def register(self, address: int, size_bytes: int) -> None:
        """Told of memory that captures go to, so that devices can be made to know it."""

    def unregister(self, address: int) -> bool:
        """Told before that memory is unmapped; False if it must stay: a device is stuck."""

    def holds(self, address: int) -> bool:
        """True if a device may still write to the slot at this address, after an error."""

    def close(self) -> None:
        """Give back what devices hold for the engine; what one may still use stays as it is."""

    def settle(self, targets: Iterable[int]) -> None:
        """Before ``fetch`` and ``copy``: wait for what still uses memory that they are to write to.

        To be called by the thread that restores: which stream a framework works on is a matter of
        the thread that asks. Raises RestoreFailed if that does not end in time.
        """

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
        *,
        cuts: Mapping[int, Sequence[Move]] = NO_CUTS,
        whole: bool = False,
        placing: Callable[[], None] = nothing,
    ) -> list[int]:
        """Read the spans of a file, check each chunk, and copy what is sound to its target.

        ``cuts`` has the spans of which rows are wanted, not all: their sources count from the
        beginning of the span, whose own target is 0.

        ``whole``: copy nothing unless all of it is sound. ``placing`` is told before the first byte
        may be copied, by any thread, perhaps more than once.

        ``targets`` holds an address a span; 0 only checks. Returns the indexes of spans with a
        chunk that does not match or is not there; no such chunk reaches a target. ``progress`` is
        told, by any thread, of bytes that were read. Raises OSError as reading does.
        """

    def verify(self, base: int, spans: Sequence[Span], digests: memoryview) -> list[int]:
        """Indexes of the spans whose bytes at ``base + start`` do not match ``digests``."""

    def copy(self, moves: Sequence[Move], placing: Callable[[], None] = nothing) -> None:
        """Copy every move, without digests. ``placing`` is told before the first byte is.

        Raises RestoreFailed as a device does; of too little memory before anything was changed.
        """
