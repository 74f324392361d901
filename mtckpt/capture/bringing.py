"""From host memory that was checked there to device memory, in pieces that may be strided.

Knows the driver, moves and rows. Does not check anything: what comes from slower places, and boxes
of arrays that are laid out anew, were checked where they were read. Pieces are gathered in pinned
memory, copied as one, and spread on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtckpt.capture.base import Move
from mtckpt.capture.buffers import DeviceMemory, PinnedMemory
from mtckpt.capture.windows import ROW_WORDS

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver
    from mtckpt.capture.kernels import Kernels
    from mtckpt.capture.passing import HostCopy

__all__ = ["batches", "bring"]

_BATCH_BYTES = 32 << 20
_ROW_BYTES = 256 << 10  # what a warp spreads at a time
_ALIGN_BYTES = 16
_MAX_ROWS = 1 << 17
_PLACES = 2

# Source, target and size of a piece, and where it lies in its batch.
_Piece = tuple[int, int, int, int]


def batches(
    moves: Sequence[Move], limit_bytes: int = _BATCH_BYTES, max_rows: int = _MAX_ROWS
) -> Iterator[list[_Piece]]:
    """The moves as pieces, as many at a time as fit into ``limit_bytes`` and ``max_rows``.

    Each begins where its distance to a multiple of 16 is that of its target, so that both are
    aligned or neither is.
    """
    batch: list[_Piece] = []
    cursor = 0
    for source, target, size_bytes in _rows(moves):
        at = cursor + (target - cursor) % _ALIGN_BYTES
        if batch and (at + size_bytes > limit_bytes or len(batch) >= max_rows):
            yield batch
            batch, at = [], target % _ALIGN_BYTES
        batch.append((source, target, size_bytes, at))
        cursor = at + size_bytes
    if batch:
        yield batch


def _rows(moves: Sequence[Move]) -> Iterator[tuple[int, int, int]]:
    for source, target, size_bytes, times, source_step, target_step in moves:
        for turn in range(times):
            begin, goal = int(source) + turn * source_step, int(target) + turn * target_step
            for done in range(0, size_bytes, _ROW_BYTES):
                yield begin + done, goal + done, min(_ROW_BYTES, size_bytes - done)


def bring(
    driver: Driver,
    ordinal: int,
    kernels: Kernels,
    moves: Sequence[Move],
    host_copy: HostCopy,
) -> None:
    """Copy every move from host memory to one device. ``host_copy`` copies within host memory.

    Raises CudaError as the device does.
    """
    with driver.current(ordinal), driver.relaxed():
        stream = driver.stream("highest")
        done = [driver.event() for _ in range(_PLACES)]
        staging, rows = DeviceMemory(driver), DeviceMemory(driver)
        places = [(PinnedMemory(driver), PinnedMemory(driver)) for _ in range(_PLACES)]
        room = _BATCH_BYTES + _ROW_BYTES + _ALIGN_BYTES
        try:
            staging.hold(room)
            rows.hold(8 * ROW_WORDS * _MAX_ROWS)
            for turn, batch in enumerate(batches(moves)):
                pinned, table = places[turn % _PLACES]
                driver.event_synchronize(done[turn % _PLACES])  # of the turn before the last
                pinned.hold(room)
                host_copy(_joined(batch, pinned.address))
                words = np.array(
                    [
                        (staging.address + at, target, size_bytes, 0)
                        for _, target, size_bytes, at in batch
                    ],
                    np.uint64,
                )
                table.hold(max(words.nbytes, 8 * ROW_WORDS * 1024))
                table.words(words.size)[:] = words.reshape(-1)
                driver.to_device(rows.address, table.address, words.nbytes, stream)
                size_bytes = batch[-1][3] + batch[-1][2]
                driver.to_device(staging.address, pinned.address, size_bytes, stream)
                kernels.gather(stream, rows.address, len(batch))
                driver.record(done[turn % _PLACES], stream)
        finally:
            driver.synchronize(stream)
            driver.destroy_stream(stream)
            for event in done:
                driver.destroy_event(event)
            staging.free()
            rows.free()
            for pinned, table in places:
                pinned.free()
                table.free()


def _joined(batch: Sequence[_Piece], base: int) -> list[Move]:
    """The pieces as moves into the batch, neighbours as one."""
    found: list[Move] = []
    for source, _, size_bytes, at in batch:
        last = found[-1] if found else None
        if last is not None and (
            last.source + last.size_bytes == source and last.target + last.size_bytes == base + at
        ):
            found[-1] = Move(last.source, last.target, last.size_bytes + size_bytes)
        else:
            found.append(Move(source, base + at, size_bytes))
    return found
