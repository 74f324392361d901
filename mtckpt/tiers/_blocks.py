"""Moving the bytes of one file: blocks, a few threads, and O_DIRECT where memory allows it.

It knows descriptors, sources and views. It does not know keys, directories or what an errno means:
OSErrors of its own calls go through the ``fail`` that it is given, those of a source pass
unchanged. It promises nothing about durability; the caller syncs.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt.errors import TierError

if TYPE_CHECKING:
    from mtckpt.tiers.base import Source

__all__ = ["ALIGN_BYTES", "BLOCK_BYTES", "Writer", "in_threads", "read_blocks"]

ALIGN_BYTES = 4096
BLOCK_BYTES = 8 << 20
# Measured on ext4 with room reserved: three keep the device busy while one is in the source.
WRITE_THREADS = 3
READ_THREADS = 2
THREADED_READ_BYTES = 8 << 20

Fail = Callable[[OSError], TierError]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` here and the rest in threads; the first error wins, after all have ended.

    The wait has no deadline of its own: nothing can end a thread inside a stuck device. A deadline
    is what ``DeadlineTier`` is for.
    """
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
            errors.append(error)

    threads = []
    here = [0]
    for index in range(1, count):
        thread = threading.Thread(target=guarded, args=(index,), name="mtckpt-blocks", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            here.append(index)  # No thread to be had: slower, not an error.
        else:
            threads.append(thread)
    for index in here:
        guarded(index)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@dataclass(slots=True)
class Writer:
    """Writes all bytes of a source to a file, in whatever order the threads come by."""

    source: Source
    size_bytes: int
    fd: int
    direct_fd: int  # -1: everything goes through the page cache
    insist: bool  # direct_io="always": a block that cannot go direct is an error
    fail: Fail
    _offsets: itertools.count[int] = field(
        init=False, default_factory=lambda: itertools.count(0, BLOCK_BYTES)
    )
    _stopped: bool = field(init=False, default=False)

    def run(self) -> None:
        """Write everything, or raise with some of it written."""
        blocks = -(-self.size_bytes // BLOCK_BYTES)
        in_threads(max(1, min(WRITE_THREADS, blocks)), self._work)

    def _work(self, _: int) -> None:
        try:
            for offset in iter(lambda: next(self._offsets), None):
                if self._stopped or offset >= self.size_bytes:
                    return
                self._block(offset, min(BLOCK_BYTES, self.size_bytes - offset))
        except BaseException:
            self._stopped = True  # The other thread need not write the rest of a dead file.
            raise

    def _block(self, offset: int, size_bytes: int) -> None:
        view = memoryview(self.source.read(offset, size_bytes)).cast("B")
        if len(view) != size_bytes:
            raise ValueError(
                f"source.read({offset}, {size_bytes}) returned {len(view)} bytes: a source gives"
                " what it is asked for, or raises"
            )
        whole_bytes = size_bytes - size_bytes % ALIGN_BYTES
        done_bytes = 0
        if self.direct_fd >= 0 and whole_bytes:
            done_bytes = self._direct(view[:whole_bytes], offset)
        _write(self.fd, view[done_bytes:], offset + done_bytes, self.fail)

    def _direct(self, view: memoryview, offset: int) -> int:
        """Bytes that went past the page cache: all of them, or fewer when the kernel refuses."""
        done_bytes = 0
        while done_bytes < len(view):
            try:
                done_bytes += os.pwrite(self.direct_fd, view[done_bytes:], offset + done_bytes)
            except OSError as error:
                if error.errno != errno.EINVAL or self.insist:
                    raise self.fail(error) from error
                # Memory, offset or file system does not suit O_DIRECT. The page cache takes all.
                break
        return done_bytes


def _write(fd: int, view: memoryview, offset: int, fail: Fail) -> None:
    done_bytes = 0
    while done_bytes < len(view):
        try:
            done_bytes += os.pwrite(fd, view[done_bytes:], offset + done_bytes)
        except OSError as error:
            raise fail(error) from error


def _read(fd: int, view: memoryview, offset: int, fail: Fail) -> int:
    done_bytes = 0
    while done_bytes < len(view):
        try:
            got_bytes = os.preadv(fd, [view[done_bytes:]], offset + done_bytes)
        except OSError as error:
            raise fail(error) from error
        if not got_bytes:
            break
        done_bytes += got_bytes
    return done_bytes


def read_blocks(fd: int, out: memoryview, offset: int, fail: Fail) -> int:
    """Fill ``out`` from ``offset`` on; the bytes got up to the end of the file."""
    if len(out) < THREADED_READ_BYTES:
        return _read(fd, out, offset, fail)
    counts = [0] * READ_THREADS
    # One contiguous part each: with blocks in turn the kernel's read-ahead loses its way, which
    # made a cold read slower than one thread does it.
    part_bytes = -(-len(out) // (READ_THREADS * ALIGN_BYTES)) * ALIGN_BYTES

    def work(index: int) -> None:
        start = index * part_bytes
        part = out[start : start + part_bytes]
        for begin in range(0, len(part), BLOCK_BYTES):
            block = part[begin : begin + BLOCK_BYTES]
            counts[index] += _read(fd, block, offset + start + begin, fail)

    in_threads(READ_THREADS, work)
    return sum(counts)
