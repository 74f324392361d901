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
from mtckpt.capture.driver import OUT_OF_MEMORY, CudaError
from mtckpt.capture.windows import ROW_WORDS

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver
    from mtckpt.capture.kernels import Kernels
    from mtckpt.capture.passing import HostCopy

__all__ = ["Bringer", "batches"]

_LIMITS_BYTES = (32 << 20, 4 << 20, 1 << 20)  # of a batch; the first that there is memory for
_ROW_BYTES = 256 << 10  # what a warp spreads at a time
_ALIGN_BYTES = 16
_BYTES_A_ROW = 256  # of a batch, for each row that it may have
_PLACES = 2

# Source, target and size of a piece, and where it lies in its batch.
_Piece = tuple[int, int, int, int]


def batches(moves: Sequence[Move], limit_bytes: int, max_rows: int) -> Iterator[list[_Piece]]:
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


class Bringer:
    """What moves to one device pass through; all of it is got before the first byte is moved.

    Where memory is short, it is less, and more batches. Raises CudaError as the device does.
    """

    def __init__(
        self, driver: Driver, ordinal: int, kernels: Kernels, moves: Sequence[Move]
    ) -> None:
        self._driver = driver
        self._ordinal = ordinal
        self._kernels = kernels
        self._moves = moves
        self._staging, self._rows = DeviceMemory(driver), DeviceMemory(driver)
        self._places = [(PinnedMemory(driver), PinnedMemory(driver)) for _ in range(_PLACES)]
        self._stream = 0
        self._done: list[int] = []
        self._limit_bytes, self._max_rows = 0, 0
        for limit_bytes in _LIMITS_BYTES:
            try:
                with driver.current(ordinal), driver.relaxed():
                    self._open(limit_bytes, limit_bytes // _BYTES_A_ROW)
                return
            except BaseException as error:
                # Whatever it is, nothing that was got before stays behind.
                self.close()
                if not (isinstance(error, CudaError) and error.code == OUT_OF_MEMORY):
                    raise
                if limit_bytes == _LIMITS_BYTES[-1]:
                    raise

    def _open(self, limit_bytes: int, max_rows: int) -> None:
        num_rows = sum(move.times * -(-move.size_bytes // _ROW_BYTES) for move in self._moves)
        size_bytes = sum(move.times * move.size_bytes for move in self._moves)
        self._limit_bytes = min(limit_bytes, size_bytes + _ALIGN_BYTES * num_rows)
        self._max_rows = max(1, min(max_rows, num_rows))
        room = self._limit_bytes + _ROW_BYTES + _ALIGN_BYTES
        table_bytes = 8 * ROW_WORDS * self._max_rows
        self._staging.hold(room)
        self._rows.hold(table_bytes)
        for pinned, table in self._places:
            pinned.hold(room)
            table.hold(table_bytes)
        self._stream = self._driver.stream("highest")
        for _ in range(_PLACES):
            self._done.append(self._driver.event())

    def bring(self, host_copy: HostCopy) -> None:
        """Copy every move from host memory to the device; ``host_copy`` gathers them."""
        driver, stream = self._driver, self._stream
        with driver.current(self._ordinal), driver.relaxed():
            for turn, batch in enumerate(batches(self._moves, self._limit_bytes, self._max_rows)):
                pinned, table = self._places[turn % _PLACES]
                driver.event_synchronize(self._done[turn % _PLACES])  # of the turn before the last
                host_copy(_joined(batch, pinned.address))
                words = np.array(
                    [
                        (self._staging.address + at, target, size_bytes, 0)
                        for _, target, size_bytes, at in batch
                    ],
                    np.uint64,
                )
                table.words(words.size)[:] = words.reshape(-1)
                driver.to_device(self._rows.address, table.address, words.nbytes, stream)
                size_bytes = batch[-1][3] + batch[-1][2]
                driver.to_device(self._staging.address, pinned.address, size_bytes, stream)
                self._kernels.gather(stream, self._rows.address, len(batch))
                driver.record(self._done[turn % _PLACES], stream)
            driver.synchronize(stream)

    def close(self) -> None:
        """Give all of it back, once nothing is under way."""
        driver = self._driver
        with driver.current(self._ordinal), driver.relaxed():
            if self._stream:
                driver.synchronize(self._stream)
                driver.destroy_stream(self._stream)
            for event in self._done:
                driver.destroy_event(event)
            self._stream, self._done = 0, []
            self._staging.free()
            self._rows.free()
            for pinned, table in self._places:
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
