"""The engine for host memory: memcpy and XXH3 in pieces of 256 KiB by a few threads.

A piece stays in the second-level cache between digest and copy, so both cost little more than the
copy. No OpenMP: a barrier of somebody else's threads collapses as soon as one core is busy.
Small arrays are moved one after the other by the caller alone; at a microsecond each, handing them
between threads would cost more than moving them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move
from mtckpt.capture.memory import view_at

__all__ = ["CpuEngine"]

_UNIT_CHUNKS = 32  # what a thread takes at a time: 8 MiB
_chunk_at = (ctypes.c_char * CHUNK_BYTES).from_address
_copy = ctypes.memmove


def _threads_for(size_bytes: int, limit: int) -> int:
    """Two threads fill the memory bus of a small machine, four that of a large one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(limit, cores or 1, size_bytes // (8 * 1024 * 1024)))


class CpuEngine:
    """See ``base.Engine``. ``max_threads`` bounds what one call uses, the caller included."""

    def __init__(self, max_threads: int = 4) -> None:
        self.max_threads = max_threads
        self._views: dict[int, memoryview] = {}
        self._addresses: list[int] = []

    def capture(self, moves: Sequence[Move], digests: memoryview) -> None:
        large = [move for move in moves if move.size_bytes > CHUNK_BYTES]
        self._run(large, lambda unit: _capture_unit(unit, digests))
        views = self._source_views(moves)
        for move in moves:
            if move.size_bytes <= CHUNK_BYTES and move.size_bytes:
                digests[move.chunk] = xxh3_64_intdigest(views[move.source])
                _copy(move.target, move.source, move.size_bytes)

    def verify(self, moves: Sequence[Move], digests: memoryview) -> set[int]:
        bad: set[int] = set()

        def check(unit: tuple[int, int, int, int, int]) -> None:
            index, source, _, size_bytes, chunk = unit
            full, rest = divmod(size_bytes, CHUNK_BYTES)
            for _ in range(full):
                if xxh3_64_intdigest(_chunk_at(source)) != digests[chunk]:
                    bad.add(index)
                source += CHUNK_BYTES
                chunk += 1
            if rest and xxh3_64_intdigest(view_at(source, rest)) != digests[chunk]:
                bad.add(index)

        large = [(i, move) for i, move in enumerate(moves) if move.size_bytes > CHUNK_BYTES]
        self._run([move for _, move in large], check, [i for i, _ in large])
        for index, move in enumerate(moves):
            size_bytes = move.size_bytes
            if 0 < size_bytes <= CHUNK_BYTES and (
                xxh3_64_intdigest((ctypes.c_char * size_bytes).from_address(move.source))
                != digests[move.chunk]
            ):
                bad.add(index)
        return bad

    def copy(self, moves: Sequence[Move]) -> None:
        def unit_copy(unit: tuple[int, int, int, int, int]) -> None:
            _, source, target, size_bytes, _ = unit
            _copy(target, source, size_bytes)

        self._run([move for move in moves if move.size_bytes > CHUNK_BYTES], unit_copy)
        for move in moves:
            if move.size_bytes <= CHUNK_BYTES:
                _copy(move.target, move.source, move.size_bytes)

    def _source_views(self, moves: Sequence[Move]) -> dict[int, memoryview]:
        """Views over the small sources, kept while the addresses stay the same.

        A view costs as much as a digest. It is used only in a call that was given its address.
        """
        addresses = [move.source for move in moves]
        if addresses != self._addresses or any(
            move.size_bytes != len(self._views.get(move.source, b""))
            for move in moves
            if 0 < move.size_bytes <= CHUNK_BYTES
        ):
            self._views = {
                move.source: view_at(move.source, move.size_bytes)
                for move in moves
                if 0 < move.size_bytes <= CHUNK_BYTES
            }
            self._addresses = addresses
        return self._views

    def _run(
        self,
        moves: Sequence[Move],
        work: Callable[[tuple[int, int, int, int, int]], None],
        indexes: Sequence[int] | None = None,
    ) -> None:
        """Split large moves into units and let several threads, the caller among them, take them."""
        if not moves:
            return
        units = _units(moves, indexes or range(len(moves)))
        total = sum(move.size_bytes for move in moves)
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
            except BaseException as error:  # carried to the caller, who raises it
                failures.append(error)

        threads = [
            threading.Thread(target=loop, name="mtckpt-copy", daemon=True)
            for _ in range(_threads_for(total, self.max_threads) - 1)
        ]
        for thread in threads:
            thread.start()
        loop()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _units(
    moves: Sequence[Move], indexes: Sequence[int]
) -> list[tuple[int, int, int, int, int]]:
    """``(index, source, target, size_bytes, first chunk)``, at most 8 MiB each."""
    step = _UNIT_CHUNKS * CHUNK_BYTES
    return [
        (
            index,
            move.source + begin,
            move.target + begin,
            min(step, move.size_bytes - begin),
            move.chunk + begin // CHUNK_BYTES,
        )
        for index, move in zip(indexes, moves, strict=True)
        for begin in range(0, move.size_bytes, step)
    ]


def _capture_unit(unit: tuple[int, int, int, int, int], digests: memoryview) -> None:
    _, source, target, size_bytes, chunk = unit
    full, rest = divmod(size_bytes, CHUNK_BYTES)
    for _ in range(full):
        digests[chunk] = xxh3_64_intdigest(_chunk_at(source))
        _copy(target, source, CHUNK_BYTES)
        source += CHUNK_BYTES
        target += CHUNK_BYTES
        chunk += 1
    if rest:
        digests[chunk] = xxh3_64_intdigest(view_at(source, rest))
        _copy(target, source, rest)
