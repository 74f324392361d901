"""Moving the bytes of one file: blocks, two threads, and O_DIRECT where memory allows it.

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

__all__ = ["ALIGN_BYTES", "BLOCK_BYTES", "Writer", "in_two_threads", "read_blocks"]

ALIGN_BYTES = 4096
BLOCK_BYTES = 8 << 20
TWO_THREADS_BYTES = 2 * BLOCK_BYTES
READ_TWO_THREADS_BYTES = 8 << 20

Fail = Callable[[OSError], TierError]


def in_two_threads(work: Callable[[], None]) -> None:
    """Run ``work`` here and in one more thread; the first error wins, after both have ended.

    The wait has no deadline of its own: nothing can end a thread inside a stuck device. A deadline
    is what ``DeadlineTier`` is for.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
            errors.append(error)

    other = threading.Thread(target=guarded, name="mtckpt-blocks", daemon=True)
    other.start()
    guarded()
    other.join()
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
        if self.size_bytes >= TWO_THREADS_BYTES:
            in_two_threads(self._work)
        else:
            self._work()

    def _work(self) -> None:
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
    if len(out) < READ_TWO_THREADS_BYTES:
        return _read(fd, out, offset, fail)
    starts = itertools.count(0, BLOCK_BYTES)
    counts: list[int] = []

    def work() -> None:
        for start in iter(lambda: next(starts), None):
            if start >= len(out):
                return
            counts.append(_read(fd, out[start : start + BLOCK_BYTES], offset + start, fail))

    in_two_threads(work)
    return sum(counts)
