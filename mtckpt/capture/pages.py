"""Fresh memory for arrays to be, whose pages the kernel is asked for before they are written to.

Knows blocks and pages. Does not know arrays. To get 1 GiB page by page, as it is written, takes the
kernel longer than filling it: so a thread asks for many at once while others plan what goes where.
A huge page may take a tenth of that; or, where the kernel has to make room for it, or a host has to
give it back to its guest, several times as much. Which of the two it is here is tried.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import time
import weakref
from typing import Any

from mtckpt.capture.memory import anonymous, populate, prefer_huge

__all__ = ["fresh"]

# Arrays share a block, and it goes when the last of them does: one that stays keeps no more.
_BLOCK_BYTES = 32 << 20
_ALIGN_BYTES = 64  # a line of the processor's caches
_HUGE_BYTES = 2 << 20
_SMALL_S = 0.0007  # what as many small pages take
_TRIES = 3  # blocks whose first page may take longer


class _Block:
    """Memory of which parts are handed out until it is full."""

    def __init__(self, size_bytes: int) -> None:
        # Huge pages begin at multiples of their size, and so does what is handed out.
        self._mapping = anonymous(size_bytes + _HUGE_BYTES, huge=False)
        self._first = self._next = _rounded(self._mapping.address, _HUGE_BYTES)
        self._end = self._mapping.address + self._mapping.size_bytes

    def part(self, size_bytes: int) -> memoryview | None:
        """So many bytes, which keep the block; None if there are not as many left."""
        if size_bytes > self._end - self._next:
            return None
        found: Any = (ctypes.c_char * size_bytes).from_address(self._next)
        found.block = self
        self._next = _rounded(self._next + size_bytes, _ALIGN_BYTES)
        return memoryview(found).cast("B")

    def populate(self) -> None:
        """Have pages for all that was handed out, huge ones if the first is had quickly."""
        global _huge_left
        begin = self._first
        if _huge_left > 0:
            prefer_huge(begin, self._end - begin)
            started_s = time.perf_counter()
            populate(begin, _HUGE_BYTES)
            if time.perf_counter() - started_s > _SMALL_S:
                _huge_left -= 1
                prefer_huge(begin, self._end - begin, huge=False)
            begin += _HUGE_BYTES
        # Few calls: after each of them this thread waits until others let go of the interpreter.
        for address in range(begin, self._next, _BLOCK_BYTES):
            populate(address, min(_BLOCK_BYTES, self._next - address))


_own = threading.local()  # each thread's last block, for as long as somebody uses it
_full: collections.deque[weakref.ref[_Block]] = collections.deque()
_worker: threading.Thread | None = None
_huge_left = _TRIES


def fresh(size_bytes: int) -> memoryview:
    """Memory for one array, aligned to 64 bytes; given back with the last view of its block."""
    global _worker
    last: weakref.ref[_Block] | None = getattr(_own, "last", None)
    block = None if last is None else last()
    part = None if block is None else block.part(size_bytes)
    if part is not None:
        return part
    if last is not None and block is not None:
        _full.append(last)
        # One that ends just now leaves it undone: then the pages come as they are written to.
        if _worker is None or not _worker.is_alive():
            _worker = threading.Thread(target=_populate, name="mtckpt-pages", daemon=True)
            with contextlib.suppress(RuntimeError):  # none to be had: the same then
                _worker.start()
    block = _Block(max(size_bytes, _BLOCK_BYTES))
    _own.last = weakref.ref(block)
    part = block.part(size_bytes)
    assert part is not None
    return part


def _populate() -> None:
    while _full:
        block = _full.popleft()()
        if block is not None:
            block.populate()
        del block


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
