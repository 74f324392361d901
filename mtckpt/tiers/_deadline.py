"""A deadline around every call of a tier.

It knows threads, time and copies. It cannot end a call that is stuck inside a device: it leaves the
thread behind, and sees to it that nothing the thread does later can do harm.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from mtckpt.errors import TierUnavailable

if TYPE_CHECKING:
    from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Tier

__all__ = ["CHUNK_BYTES", "DeadlineTier"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 8 << 20


class _Revocable:
    """A source that hands out copies, and nothing more once its put was given up.

    A stuck write may go on after the caller has reused the memory it came from. With copies it can
    only store the right bytes late, or fail; never other bytes under this key.
    """

    def __init__(self, inner: Source) -> None:
        self._inner: Source | None = inner
        self._lock = threading.Lock()
        self._pool: list[mmap.mmap] = []
        self.size_bytes = inner.size_bytes

    def read(self, offset: int, size_bytes: int) -> memoryview:
        if not size_bytes:
            return memoryview(b"")
        with self._lock:
            if self._inner is None:
                raise TierUnavailable("the deadline of this put has passed")
            copy = memoryview(self._buffer(size_bytes))[:size_bytes]
            copy[:] = self._inner.read(offset, size_bytes)
        return copy

    def _buffer(self, size_bytes: int) -> mmap.mmap:
        """Memory that nobody has a view of: used again, since the first touch is what costs."""
        for buffer in self._pool:
            try:
                buffer.resize(len(buffer))  # Changes nothing, and is refused while there are views.
            except (BufferError, SystemError, ValueError, OSError):
                continue
            if len(buffer) >= size_bytes:
                return buffer
        self._pool.append(mmap.mmap(-1, size_bytes))  # Aligned, so that O_DIRECT still works.
        return self._pool[-1]

    def revoke(self) -> None:
        with self._lock:
            self._inner = None


class DeadlineTier:
    """Every call of the inner tier ends in time, or raises ``TierUnavailable`` naming it.

    Calls run in daemon threads, which never hold up the end of the process. A call that is given up
    may still be carried out later: a late put stores the right bytes or nothing, a late read
    touches no memory of the caller (both at the price of one copy). At most ``max_stuck`` threads
    are left behind; while that many are stuck, every call fails at once.

    Args:
        timeout_s: for each call, from its start; a listing is one call.
        min_bytes_per_s: the slowest rate that still counts as alive: put and read get the time that
            their bytes take at this rate on top. None: no extra time, whatever the size.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        timeout_s: float,
        min_bytes_per_s: float | None = None,
        max_stuck: int = 8,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self._timeout_s = timeout_s
        self._min_bytes_per_s = min_bytes_per_s
        self._max_stuck = max_stuck
        self._lock = threading.Lock()
        self._stuck = 0

    def put(self, key: str, source: Source) -> PutResult:
        """Store in time. After ``TierUnavailable`` the outcome is unknown."""
        revocable = _Revocable(source)
        try:
            return self._run(
                "put", key, lambda _: self.inner.put(key, revocable), source.size_bytes
            )
        finally:
            revocable.revoke()

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Read in time."""
        view = memoryview(out).cast("B")

        def work(hand_over: Callable[[memoryview], None]) -> None:
            # One that is being filled and the two that may be handed over at a time.
            buffers = itertools.cycle([bytearray(min(CHUNK_BYTES, len(view))) for _ in range(3)])
            for start in range(0, max(len(view), 1), CHUNK_BYTES):
                chunk = memoryview(next(buffers))[: len(view) - start]
                self.inner.read_into(key, chunk, offset + start)
                hand_over(chunk)

        start = 0
        for chunk in _Call(self, "read_into", key, len(view), work).chunks():
            view[start : start + len(chunk)] = chunk
            start += len(chunk)

    def stat(self, key: str) -> ObjectInfo:
        """Look up in time."""
        return self._run("stat", key, lambda _: self.inner.stat(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List in time; all of it is held in memory."""
        return iter(self._run("list", None, lambda _: [*self.inner.list(prefix)]))

    def delete(self, key: str) -> None:
        """Delete in time."""
        self._run("delete", key, lambda _: self.inner.delete(key))

    def close(self) -> None:
        """Close the inner tier, in time."""
        self._run("close", None, lambda _: self.inner.close())

    def _run(
        self,
        verb: str,
        key: str | None,
        work: Callable[[Callable[[memoryview], None]], T],
        size_bytes: int = 0,
    ) -> T:
        call = _Call(self, verb, key, size_bytes, work)
        for _ in call.chunks():
            pass
        return call.results[0]

    def deadline_s(self, size_bytes: int) -> float:
        """What a call that moves so many bytes may take."""
        extra_s = size_bytes / self._min_bytes_per_s if self._min_bytes_per_s else 0.0
        return self._timeout_s + extra_s

    def begin(self, verb: str, key: str | None) -> None:
        """Refuse a call while too many threads are stuck."""
        with self._lock:
            stuck = self._stuck
        if stuck >= self._max_stuck:
            raise TierUnavailable(
                f"{verb} was not tried: {stuck} earlier calls are stuck",
                tier=self.name,
                key=key,
                stuck=stuck,
                timeout_s=self._timeout_s,
            )

    def left_behind(self, change: int) -> None:
        """One stuck thread more or less."""
        with self._lock:
            self._stuck += change


class _Call(Generic[T]):
    """One call in a thread of its own, that may hand over chunks before it ends."""

    def __init__(
        self,
        tier: DeadlineTier,
        verb: str,
        key: str | None,
        size_bytes: int,
        work: Callable[[Callable[[memoryview], None]], T],
    ) -> None:
        tier.begin(verb, key)
        self._tier = tier
        self._verb = verb
        self._key = key
        self._timeout_s = tier.deadline_s(size_bytes)
        self._deadline = time.monotonic() + self._timeout_s
        self._work = work
        self._chunks: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(2)
        self._lock = threading.Lock()
        self._ended = self._given_up = False
        self._errors: list[BaseException] = []
        self.results: list[T] = []
        name = f"mtckpt-{tier.name}-{verb}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as error:
            raise TierUnavailable(f"{verb} was not tried: {error}", tier=tier.name) from error

    def chunks(self) -> Iterator[memoryview]:
        """What the call hands over, until it ends; then its error, if it raised one."""
        while (chunk := self._next()) is not None:
            yield chunk
            self._room.release()
        if self._errors:
            raise self._errors[0]

    def _next(self) -> memoryview | None:
        try:
            return self._chunks.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            with self._lock:
                self._given_up = not self._ended
                if self._given_up:
                    self._tier.left_behind(+1)
            raise TierUnavailable(
                f"{self._verb} did not end within {self._timeout_s:g} s",
                state="it goes on in the background, and its outcome is unknown",
                actions=["see whether the device or mount answers, e.g. with `ls`, and `dmesg`"],
                tier=self._tier.name,
                key=self._key,
                timeout_s=self._timeout_s,
            ) from None

    def _run(self) -> None:
        try:
            self.results.append(self._work(self._hand_over))
        except BaseException as error:  # noqa: BLE001  (raised again by chunks(), or logged here)
            self._errors.append(error)
        with self._lock:
            self._ended = True
            given_up = self._given_up
        self._chunks.put(None)
        if given_up:
            self._tier.left_behind(-1)
            outcome = repr(self._errors[0]) if self._errors else "success"
            logger.info("a %s of %s ended late: %s", self._verb, self._key, outcome)

    def _hand_over(self, chunk: memoryview) -> None:
        # One that is being used and one that waits; more would hold the whole object in memory.
        if not self._room.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            raise TierUnavailable("nobody takes what was read", tier=self._tier.name, key=self._key)
        self._chunks.put(chunk)
