"""The engine for host memory: memcpy and XXH3 in pieces of 256 KiB by a few threads.

A piece is in the second-level cache once it was copied, where its digest costs a quarter of the
copy; the other way round, the digest waits for memory and the copy does too. No OpenMP: a barrier
of somebody else's threads collapses as soon as one core is busy. Small arrays are captured one
after the other by the caller alone; at a microsecond each, handing them between threads would cost
more than that. They are fetched a buffer at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingOf
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from xxhash import xxh3_64_intdigest

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import NO_CUTS, Move, nothing
from mtckpt.capture.cuts import clipped, dealt
from mtckpt.capture.memory import Buffer, Mapping, anonymous, read_at, view_at

if TYPE_CHECKING:
    from mtckpt.capture.base import Capture, Mode, Span

__all__ = ["CpuEngine"]

_UNIT_BYTES = 32 * CHUNK_BYTES  # what a thread takes at a time
_BYTES_A_THREAD = _UNIT_BYTES
# What is read, digested and copied at a time: it stays in the second-level cache.
_BUFFER_BYTES = 2 * CHUNK_BYTES
# A small array: its index, offset in the file, size, chunk, and target.
_Piece = tuple[int, int, int, int, int]
_T = TypeVar("_T", bound="_Unit | _Cut | _Rows | _Window")
_chunk_at = (ctypes.c_char * CHUNK_BYTES).from_address
_copy = ctypes.memmove


class _Unit(NamedTuple):
    """A piece of one large array: whose it is, where it is, where it goes, its first chunk."""

    which: int
    source: int
    target: int
    size_bytes: int
    chunk: int


class _Cut(NamedTuple):
    """A piece of an array of which rows are wanted: whose it is, and where it is in the file.

    ``begin`` is where it begins in its span. ``moves`` has for each buffer what to take out of it.
    """

    which: int
    source: int
    begin: int
    size_bytes: int
    chunk: int
    moves: list[list[Move]]


class _Arrays:
    """Where the arrays of a capture lie and go, kept for the next one: making this takes as long.

    ``large`` has indexes. Of small ones there is a view over the source, its place in the shard
    and its chunk. A view is only ever used in a call that was handed its address and size, so it
    cannot outlive what it shows.
    """

    __slots__ = ("chunks", "end", "large", "places", "sources", "spans", "views")

    def __init__(self, sources: Sequence[int], spans: Sequence[Span]) -> None:
        self.sources = list(sources)
        self.spans = list(spans)
        self.large = [i for i, span in enumerate(spans) if span.size_bytes > CHUNK_BYTES]
        small = [i for i, span in enumerate(spans) if 0 < span.size_bytes <= CHUNK_BYTES]
        self.chunks = [spans[i].chunk for i in small]
        self.places = [slice(spans[i].start, spans[i].start + spans[i].size_bytes) for i in small]
        self.views = [view_at(sources[i], spans[i].size_bytes) for i in small]
        self.end = max((place.stop for place in self.places), default=0)


class _Rows(NamedTuple):
    """Rows that lie at equal distances, and how many bytes they have together."""

    move: Move
    size_bytes: int


class _Window(NamedTuple):
    """Small arrays that lie close together, and how many bytes they have."""

    pieces: list[_Piece]
    size_bytes: int


class _Done:
    """Everything was there when ``capture`` returned."""

    is_captured = True
    is_done = True

    def finish(self, digests: memoryview) -> bytes:
        """Nothing is left to do, and nothing was left as it was."""
        return b""


_DONE = _Done()


class CpuEngine:
    """See ``base.Engine``. ``max_threads`` bounds what one call uses, the caller included."""

    def __init__(self, max_threads: int = 4) -> None:
        self.max_threads = max_threads
        self._arrays = _Arrays([], [])

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
        del mode, is_known  # there is but one way: what is copied is read for its digest
        arrays = self._arrays
        if arrays.sources != sources or arrays.spans != spans:
            arrays = self._arrays = _Arrays(sources, spans)
        units: list[_Unit] = []
        for index in arrays.large:
            start, size_bytes, chunk = spans[index]
            units += _units(index, sources[index], base + start, size_bytes, chunk)
        self._run(units, lambda unit: _capture_unit(unit, digests), _bytes_of(units))
        if arrays.views:
            target = view_at(base, arrays.end)
            for chunk, place, view in zip(arrays.chunks, arrays.places, arrays.views, strict=True):
                target[place] = view
                digests[chunk] = xxh3_64_intdigest(view)
        return _DONE

    def register(self, address: int, size_bytes: int) -> None:
        """Nothing: the CPU knows all memory."""

    def unregister(self, address: int) -> bool:
        """Nothing: no copy goes on after its call."""
        return True

    def holds(self, address: int) -> bool:
        """See ``unregister``."""
        return False

    def verify(self, base: int, spans: Sequence[Span], digests: memoryview) -> list[int]:
        bad: set[int] = set()
        units: list[_Unit] = []
        small: list[tuple[int, Span]] = []
        for index, span in enumerate(spans):
            if span.size_bytes > CHUNK_BYTES:
                units += _units(index, base + span.start, 0, span.size_bytes, span.chunk)
            elif span.size_bytes:
                small.append((index, span))

        def check(unit: _Unit) -> None:
            if not _matches(unit, digests):
                bad.add(unit.which)

        self._run(units, check, _bytes_of(units))
        if small:
            view = view_at(base, max(s.start + s.size_bytes for _, s in small))
            for index, (start, size_bytes, chunk) in small:
                if xxh3_64_intdigest(view[start : start + size_bytes]) != digests[chunk]:
                    bad.add(index)
        return sorted(bad)

    def close(self) -> None:
        """Nothing is held."""

    def settle(self, targets: Iterable[int]) -> None:
        """Nothing: what uses memory of the host is done when a call returns."""

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
        *,
        cuts: MappingOf[int, Sequence[Move]] = NO_CUTS,
        whole: bool = False,
        placing: Callable[[], None] = nothing,
    ) -> list[int]:
        if whole and (found := self.fetch(fd, spans, [0] * len(spans), digests, _ignore)):
            return found
        if cuts or any(targets):
            placing()
        bad: set[int] = set()
        units: list[_Unit | _Cut] = []
        small: list[int] = []
        for index, span in enumerate(spans):
            if index in cuts:
                units += _cuts(index, span, cuts[index])
            elif span.size_bytes > CHUNK_BYTES:
                units += _units(index, span.start, targets[index], span.size_bytes, span.chunk)
            elif span.size_bytes:
                small.append(index)
        buffers = threading.local()

        def fetch(unit: _Unit | _Cut | _Window) -> None:
            if isinstance(unit, _Window):
                if not hasattr(buffers, "scattered"):
                    buffers.scattered = Buffer(_BUFFER_BYTES)
                bad.update(_fetch_window(fd, unit, buffers.scattered, digests))
            else:
                if not hasattr(buffers, "mapping"):
                    buffers.mapping = anonymous(_BUFFER_BYTES)
                at = fd, buffers.mapping, digests
                if not (
                    _fetch_cut(unit, *at) if isinstance(unit, _Cut) else _fetch_unit(unit, *at)
                ):
                    bad.add(unit.which)
            progress(unit.size_bytes)

        # The next window is put together while the bytes of another are read by another thread.
        all_units = itertools.chain(units, _windows(spans, targets, small))
        self._run(all_units, fetch, _bytes_of(spans))
        return sorted(bad)

    def copy(self, moves: Sequence[Move], placing: Callable[[], None] = nothing) -> None:
        if moves:
            placing()
        units: list[_Unit | _Rows] = []
        for source, target, size_bytes, count, source_step, target_step in moves:
            if count > 1:
                at_once = max(1, _UNIT_BYTES // size_bytes)
                for first in range(0, count, at_once):
                    from_, to = source + first * source_step, target + first * target_step
                    times = min(at_once, count - first)
                    move = Move(from_, to, size_bytes, times, source_step, target_step)
                    units.append(_Rows(move, times * size_bytes))
            elif size_bytes > CHUNK_BYTES:
                units += _units(0, source, target, size_bytes, 0)
            else:
                _copy(target, source, size_bytes)
        self._run(
            units,
            lambda unit: _copy_rows(unit.move) if isinstance(unit, _Rows) else _copy_unit(unit),
            _bytes_of(units),
        )

    def _run(self, units: Iterable[_T], work: Callable[[_T], None], total_bytes: int) -> None:
        """Let several threads, the caller among them, take the units one by one."""
        taken = iter(units)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def loop() -> None:
            try:
                while not failures:
                    with lock:
                        unit = next(taken, None)
                    if unit is None:
                        return
                    work(unit)
            except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
                failures.append(error)

        def beside(running: threading.Lock) -> None:
            with running:
                loop()

        others = _num_threads(total_bytes, self.max_threads) - 1
        locks = [threading.Lock() for _ in range(others)]
        threads = [
            threading.Thread(target=beside, args=(running,), name="mtckpt-copy", daemon=True)
            for running in locks
        ]
        try:
            for thread in threads:
                with contextlib.suppress(RuntimeError):  # none to be had: slower, not an error
                    thread.start()
            loop()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        except BaseException as error:
            # An interrupt. Whoever called lets go of all this memory, so each thread ends first,
            # with the piece that it has in hand; one that begins only now finds a failure. Up to
            # Python 3.12 a thread passes for ended once a join() of it was interrupted.
            failures.append(error)
            for running in locks:
                with running:
                    pass
            raise
        if failures:
            raise failures[0]


def _ignore(_: int) -> None:
    pass


def _bytes_of(units: Iterable[_Unit | _Rows | Span]) -> int:
    return sum([unit.size_bytes for unit in units])


def _num_threads(size_bytes: int, limit: int) -> int:
    """Two threads fill the memory bus of a small machine, four that of a large one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(limit, cores or 1, size_bytes // _BYTES_A_THREAD))


def _units(index: int, source: int, target: int, size_bytes: int, chunk: int) -> list[_Unit]:
    return [
        _Unit(
            index,
            source + begin,
            target and target + begin,  # an address of 0 is none, for every piece
            min(_UNIT_BYTES, size_bytes - begin),
            chunk + begin // CHUNK_BYTES,
        )
        for begin in range(0, size_bytes, _UNIT_BYTES)
    ]


def _capture_unit(unit: _Unit, digests: memoryview) -> None:
    _, source, target, size_bytes, chunk = unit
    full, rest = divmod(size_bytes, CHUNK_BYTES)
    for _ in range(full):
        _copy(target, source, CHUNK_BYTES)
        digests[chunk] = xxh3_64_intdigest(_chunk_at(source))
        source += CHUNK_BYTES
        target += CHUNK_BYTES
        chunk += 1
    if rest:
        _copy(target, source, rest)
        digests[chunk] = xxh3_64_intdigest(view_at(source, rest))


def _matches(unit: _Unit, digests: memoryview) -> bool:
    _, source, _, size_bytes, chunk = unit
    full, rest = divmod(size_bytes, CHUNK_BYTES)
    for _ in range(full):
        if xxh3_64_intdigest(_chunk_at(source)) != digests[chunk]:
            return False
        source += CHUNK_BYTES
        chunk += 1
    return not rest or xxh3_64_intdigest(view_at(source, rest)) == digests[chunk]


def _fetch_unit(unit: _Unit, fd: int, buffer: Mapping, digests: memoryview) -> bool:
    """Through the buffer: file, digest, target. A target of 0 is none."""
    _, offset, target, size_bytes, chunk = unit
    address, view = buffer.address, buffer.view
    sound = True
    done = 0
    while done < size_bytes:
        want = min(_BUFFER_BYTES, size_bytes - done)
        if read_at(fd, view[:want], offset + done) < want:
            return False
        for begin in range(0, want, CHUNK_BYTES):
            size = min(CHUNK_BYTES, want - begin)
            if xxh3_64_intdigest(view[begin : begin + size]) != digests[chunk]:
                sound = False
            elif target:
                _copy(target + done + begin, address + begin, size)
            chunk += 1
        done += want
    return sound


def _cuts(index: int, span: Span, moves: Sequence[Move]) -> Iterator[_Cut]:
    dealt_moves = dealt(moves, span.size_bytes, _BUFFER_BYTES)
    for begin in range(0, span.size_bytes, _UNIT_BYTES):
        first = begin // _BUFFER_BYTES
        yield _Cut(
            index,
            span.start + begin,
            begin,
            min(_UNIT_BYTES, span.size_bytes - begin),
            span.chunk + begin // CHUNK_BYTES,
            dealt_moves[first : first + _UNIT_BYTES // _BUFFER_BYTES],
        )


def _fetch_cut(cut: _Cut, fd: int, buffer: Mapping, digests: memoryview) -> bool:
    """Through the buffer: file, digests, then the rows, if all of the buffer is sound."""
    address, view, chunk = buffer.address, buffer.view, cut.chunk
    sound = True
    for done, moves in zip(range(0, cut.size_bytes, _BUFFER_BYTES), cut.moves, strict=True):
        want = min(_BUFFER_BYTES, cut.size_bytes - done)
        if read_at(fd, view[:want], cut.source + done) < want:
            return False
        is_sound = True
        for begin in range(0, want, CHUNK_BYTES):
            piece = view[begin : min(begin + CHUNK_BYTES, want)]
            is_sound = xxh3_64_intdigest(piece) == digests[chunk] and is_sound
            chunk += 1
        sound = sound and is_sound
        if is_sound:
            at = cut.begin + done
            for move in moves:
                for row in clipped(move, at, at + want):
                    _place(row._replace(source=row.source + address - at))
    return sound


def _windows(spans: Sequence[Span], targets: Sequence[int], small: list[int]) -> Iterator[_Window]:
    """The small ones in the order of the file, as many at a time as fit a buffer with their gaps.

    Made as they are taken.
    """
    small.sort(key=spans.__getitem__)
    pieces: list[_Piece] = []
    begin = total_bytes = 0
    for index in small:
        start, size_bytes, chunk = spans[index]
        if pieces and start + size_bytes - begin > _BUFFER_BYTES:
            yield _Window(pieces, total_bytes)
            pieces, total_bytes = [], 0
        if not pieces:
            begin = start
        pieces.append((index, start, size_bytes, chunk, targets[index]))
        total_bytes += size_bytes
    if pieces:
        yield _Window(pieces, total_bytes)


def _fetch_window(fd: int, window: _Window, buffer: Buffer, digests: memoryview) -> list[int]:
    """Small arrays that lie close together: one read, a digest each, one copy to their targets."""
    pieces = window.pieces
    first = pieces[0][1]
    view = buffer.view[: pieces[-1][1] + pieces[-1][2] - first]
    got = read_at(fd, view, first)
    bad = []
    sound = array("Q")  # targets and sizes of what lies without a gap up to ``done``
    done = 0
    for which, start, size_bytes, chunk, target in pieces:
        begin = start - first
        stop = begin + size_bytes
        if stop > got or xxh3_64_intdigest(view[begin:stop]) != digests[chunk]:
            bad.append(which)
        elif target:
            if begin != done:
                buffer.scatter(done - sum(sound[1::2]), sound)
                del sound[:]
            sound.append(target)
            sound.append(size_bytes)
            done = stop
    buffer.scatter(done - sum(sound[1::2]), sound)
    return bad


def _copy_unit(unit: _Unit) -> None:
    _copy(unit.target, unit.source, unit.size_bytes)


def _place(move: Move) -> None:
    if move.times > 1:
        _copy_rows(move)
    else:
        _copy(move.target, move.source, move.size_bytes)


def _copy_rows(move: Move) -> None:
    """By NumPy, which goes from row to row at the speed of C and without the interpreter lock."""
    import numpy as np

    source, target, size_bytes, times, source_step, target_step = move
    # As wide as everything divides by: rows of a few bytes are one element each.
    width = math.gcd(8, source, target, size_bytes, source_step, target_step)
    shape = times, size_bytes // width
    to, from_ = (
        np.ndarray(shape, f"u{width}", view_at(start, extent + size_bytes), 0, (step, width))
        for start, extent, step in (
            (target, (times - 1) * target_step, target_step),
            (source, (times - 1) * source_step, source_step),
        )
    )
    np.copyto(to, from_)
