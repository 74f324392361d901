"""What is copied between a device and a slot: which chunks, in which pieces, through which memory.

Knows addresses, chunks and sizes, and decides. Does not move a byte.

A *row* is one digest chunk: where it lies on the device, where in the shard, its size and its
number. A *window* is a stretch of the shard that is moved in one copy, with the rows in it: small
arrays that lie one after the other in the shard are packed on the device and moved as one. Device
memory that windows pass through is the *arena*; a window has a place in it, and where there are
more windows than places, a place is used again once its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtckpt._shard import CHUNK_BYTES

if TYPE_CHECKING:
    from mtckpt.capture.base import Mode, Span

__all__ = [
    "ROW_WORDS",
    "WINDOW_BYTES",
    "Arena",
    "Rows",
    "Spread",
    "Window",
    "arena_of",
    "bits_of",
    "narrowed",
    "room_bytes",
    "windows",
]

ROW_WORDS = 4  # source, target, size, digest's number: what a kernel reads
WINDOW_BYTES = 32 << 20
_ALIGN_BYTES = 512
_GIB = 1 << 30
# Others' bytes between two rows of a window that are moved along: small arrays of the host's.
_GAP_BYTES = CHUNK_BYTES

Rows = np.ndarray[tuple[int, int], np.dtype[np.uint64]]


class Spread:
    """The chunks of some spans of a shard, made once for as long as the spans are the same."""

    def __init__(self, spans: Sequence[Span], chosen: Sequence[int]) -> None:
        self.chosen = list(chosen)
        table = np.array([spans[i] for i in self.chosen], np.int64).reshape(-1, 3)
        starts, sizes, chunks = table.T
        counts = -(-sizes // CHUNK_BYTES)
        self._which = np.repeat(np.arange(len(table)), counts)
        nth = np.arange(len(self._which)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._within = (nth * CHUNK_BYTES).astype(np.uint64)
        self.begins = (starts[self._which] + nth * CHUNK_BYTES).astype(np.uint64)
        self.sizes = np.minimum(sizes[self._which] - nth * CHUNK_BYTES, CHUNK_BYTES).astype(
            np.uint64
        )
        self.ends = self.begins + self.sizes
        self.numbers = (chunks[self._which] + nth).astype(np.uint64)

    def __len__(self) -> int:
        return len(self._which)

    def addresses(self, addresses: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Where each chunk lies, of spans that begin at ``addresses`` (one a chosen span).

        Those of a span that begins at 0 are at 0: nowhere.
        """
        starts = np.fromiter(addresses, np.uint64, len(self.chosen))[self._which]
        return np.where(starts == 0, np.uint64(0), starts + self._within)

    def spans_of(self, is_bad: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
        """The spans that have a chunk of which this is true."""
        return [self.chosen[i] for i in np.unique(self._which[is_bad])]

    def spans_between(self, first: int, stop: int) -> list[int]:
        """The spans that have a chunk among these rows."""
        return [self.chosen[i] for i in np.unique(self._which[first:stop])]


class Window(NamedTuple):
    """Rows ``first`` to ``stop``, which are all there is from ``begin`` to ``end`` in the shard."""

    first: int
    stop: int
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes to move, those between the rows included."""
        return self.end - self.begin


def windows(spread: Spread, limit_bytes: int, *, alone: bool) -> list[Window]:
    """Cut the rows, which are in the order of the shard, into windows.

    ``alone``: no other device writes to this shard, so that a window may cross a small gap.
    """
    begins, ends = spread.begins, spread.ends
    gap = _GAP_BYTES if alone else 0
    breaks = np.flatnonzero(begins[1:] > ends[:-1] + np.uint64(gap)) + 1
    found = []
    for run_first, run_stop in zip([0, *breaks], [*breaks, len(begins)], strict=True):
        first = int(run_first)
        while first < run_stop:
            limit = begins[first] + np.uint64(limit_bytes)
            stop = int(np.searchsorted(ends[:run_stop], limit, "right"))
            stop = max(stop, first + 1)
            found.append(Window(first, stop, int(begins[first]), int(ends[stop - 1])))
            first = stop
    return found


def narrowed(
    spread: Spread, cut: Sequence[Window], is_wanted: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> list[tuple[int, Window]]:
    """The stretches of windows that have the wanted rows, and the number of the window of each.

    ``is_wanted`` is about the rows of ``cut``, which follow each other. Stretches with little
    between them are one: what lies there is moved along.
    """
    rows = np.flatnonzero(is_wanted) + cut[0].first
    if not len(rows):
        return []
    which = np.searchsorted([window.first for window in cut], rows, "right") - 1
    begins, ends = spread.begins[rows], spread.ends[rows]
    is_break = (begins[1:] > ends[:-1] + np.uint64(_GAP_BYTES)) | (which[1:] != which[:-1])
    breaks = np.flatnonzero(is_break) + 1
    firsts, lasts = [0, *breaks], [*(breaks - 1), len(rows) - 1]
    return [
        (
            int(which[first]),
            Window(int(rows[first]), int(rows[last]) + 1, int(begins[first]), int(ends[last])),
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]


def bits_of(flags: bytearray) -> bytes:
    """A bit for each byte, set where that is not 0, from the lowest on."""
    return np.packbits(np.frombuffer(flags, np.bool_), bitorder="little").tobytes()


class Arena(NamedTuple):
    """Where in the arena each window lies, and how large the arena has to be.

    ``after[i]`` is the window that has to be copied before window ``i`` may be packed, or -1.
    ``num_kept`` windows, the last ones, have a place of their own until they are copied.
    """

    places: list[int]
    after: list[int]
    size_bytes: int
    num_kept: int


def arena_of(cut: Sequence[Window], room_bytes: int, ring: int = 2) -> Arena:
    """Places for as many of the last windows as fit; the others take turns in ``ring`` places.

    Row and place begin at the same distance from a multiple of 512, so that both are aligned or
    neither is. Needs ``ring`` times the largest window at least, and takes it.
    """
    sizes = [_placed(window) for window in cut]
    turn_bytes = max(sizes, default=0)
    kept = len(cut)
    if sum(sizes) > room_bytes:
        left = room_bytes - ring * turn_bytes
        kept = 0
        while kept < len(cut) and sizes[-1 - kept] <= left:
            left -= sizes[-1 - kept]
            kept += 1
    turning = len(cut) - kept
    places, after = [], []
    cursor = min(ring, turning) * turn_bytes
    size_bytes = cursor
    for i, window in enumerate(cut):
        shift = window.begin % _ALIGN_BYTES
        if i < turning:
            places.append(i % ring * turn_bytes + shift)
            after.append(i - ring if i >= ring else -1)
        else:
            places.append(cursor + shift)
            after.append(-1)
            cursor += sizes[i]
    return Arena(places, after, max(size_bytes, cursor), kept)


def _placed(window: Window) -> int:
    """What a window takes in the arena: it may begin anywhere in a block, and ends at its end."""
    needed = window.begin % _ALIGN_BYTES + window.size_bytes
    return -(-needed // _ALIGN_BYTES) * _ALIGN_BYTES


def room_bytes(mode: Mode, wanted_bytes: int, free_bytes: int, total_bytes: int) -> int:
    """Device memory that a snapshot may take, so that the user's next allocation does not fail.

    A twentieth of the device, and a GiB at least, is left alone. 0: all goes through a small ring.
    """
    if mode in ("blocking", "overlap"):
        return 0
    left = free_bytes - max(_GIB, total_bytes // 20)
    return max(0, min(wanted_bytes, left))
