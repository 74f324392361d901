"""Chunks that a save left as they lay in its slot: which, and whether they are still right.

Knows bits, digests and memory. Does not know slots or devices. A chunk whose digest is that of what
lies at its place already is not copied there again; before the save counts, the bytes that lie
there are looked at. Whoever has the time looks ahead, at what is likely to be left next time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mtckpt import _shard
from mtckpt.errors import Damaged
from mtckpt.tiers._blocks import in_threads

if TYPE_CHECKING:
    from mtckpt._shard import ShardLayout, StoredTensor

__all__ = ["Left", "Looked"]

# What a thread takes at a time.
_BLOCK_CHUNKS = 32
# More than fill the memory of a machine with many cores only wait for each other.
_MAX_THREADS = 16
_THREADS_AHEAD = 2
_BYTE_OF = [bytes(number >> bit & 1 for bit in range(8)) for number in range(256)]

_Block = tuple["StoredTensor", int, int]


class Looked:
    """What was found ahead of time in one slot, filled while it is read; ``over`` ends that.

    ``sound`` has a 1 for each chunk that had its digest in ``digests`` when it was looked at.
    """

    def __init__(self) -> None:
        self.over = False
        self.digests = memoryview(b"")
        self.sound = bytearray()

    def look(self, layout: ShardLayout, digests: memoryview, view: memoryview, bits: bytes) -> None:
        """Look at these chunks of the file ``view``, which somebody may be overwriting."""
        self.digests, self.sound = digests, bytearray(layout.num_chunks)

        def look(tensor: StoredTensor, first: int, last: int) -> None:
            if self.over:
                return
            try:
                _shard.check_chunks(tensor, digests, _bytes_of(view, tensor), first, last)
            except Damaged:
                return  # or changed meanwhile: at the seal it is looked at again
            begin = tensor.first_chunk
            self.sound[begin + first : begin + last] = b"\1" * (last - first)

        _in_threads(_blocks(layout, _flags(bits, layout.num_chunks)), look, _THREADS_AHEAD)


class Left:
    """The chunks that one capture left, a bit each from the lowest on; ``size_bytes`` in all."""

    def __init__(self, bits: bytes, looked: Looked | None = None) -> None:
        self.size_bytes = 0
        self._bits = bits
        self._looked = looked

    def __bool__(self) -> bool:
        return any(self._bits)

    def check(self, layout: ShardLayout, digests: memoryview, view: memoryview) -> None:
        """Look at them in the file ``view``, but for those that were looked at ahead of time.

        Raises Damaged for the first chunk that differs from its digest.
        """
        flags = _flags(self._bits, layout.num_chunks)
        self.size_bytes = sum(
            min(last * _shard.CHUNK_BYTES, tensor.size_bytes) - first * _shard.CHUNK_BYTES
            for tensor, first, last in _blocks(layout, flags)
        )
        if self._looked is not None:
            _take_out(flags, digests, self._looked)

        def check(tensor: StoredTensor, first: int, last: int) -> None:
            _shard.check_chunks(tensor, digests, _bytes_of(view, tensor), first, last)

        _in_threads(_blocks(layout, flags), check, min(_MAX_THREADS, os.cpu_count() or 1))


def _bytes_of(view: memoryview, tensor: StoredTensor) -> memoryview:
    return view[tensor.start : tensor.start + tensor.size_bytes]


def _flags(bits: bytes, num_chunks: int) -> bytearray:
    """A byte for each bit. Bits that cannot be of this shard stand for all chunks."""
    if len(bits) != -(-num_chunks // 8):
        return bytearray(b"\1") * num_chunks
    return bytearray().join(map(_BYTE_OF.__getitem__, bits))[:num_chunks]


def _take_out(flags: bytearray, digests: memoryview, looked: Looked) -> None:
    """What was looked at and is to have the digest that it had then."""
    if len(looked.sound) != len(flags):
        return
    for begin, end in _runs(looked.sound, 0, len(flags), len(flags)):
        if bytes(digests[begin:end]) == bytes(looked.digests[begin:end]):
            flags[begin:end] = bytes(end - begin)
            continue
        for chunk in range(begin, end):
            if digests[chunk] == looked.digests[chunk]:
                flags[chunk] = 0


def _runs(flags: bytearray, begin: int, stop: int, limit: int) -> Iterator[tuple[int, int]]:
    """Where flags are set one after the other, ``limit`` at most at a time."""
    while (begin := flags.find(1, begin, stop)) >= 0:
        last = min(begin + limit, stop)
        end = flags.find(0, begin, last)
        end = last if end < 0 else end
        yield begin, end
        begin = end


def _blocks(layout: ShardLayout, flags: bytearray) -> Iterator[_Block]:
    for tensor in layout.tensors:
        at = tensor.first_chunk
        for begin, end in _runs(flags, at, at + tensor.num_chunks, _BLOCK_CHUNKS):
            yield tensor, begin - at, end - at


def _in_threads(
    blocks: Iterable[_Block], work: Callable[[StoredTensor, int, int], None], num_threads: int
) -> None:
    todo: Sequence[_Block] = list(blocks)
    taken = iter(todo)
    failed: list[bool] = []

    def take(_: int) -> None:
        for block in taken:
            if failed:
                return
            try:
                work(*block)
            except BaseException:
                failed.append(True)
                raise

    in_threads(max(1, min(num_threads, len(todo))), take)
