"""Tiers around tiers: retry, throttling, metering, deadlines. The eight members, and ``inner``.

They know verbs, keys, sizes, time and our errors. They do not know what kind of tier is inside, and
add nothing to what it promises: ``name`` and ``survives`` are those of the inner tier. From outside
in, the usual order is metering, retry, deadline, throttling.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from mtckpt.errors import AlreadyExists, TierUnavailable
from mtckpt.tiers._deadline import CHUNK_BYTES, DeadlineTier
from mtckpt.tiers._pacing import Bucket
from mtckpt.tiers.base import ObjectInfo, PutResult

if TYPE_CHECKING:
    from mtckpt.tiers.base import Source, Tier

__all__ = [
    "DeadlineTier",
    "MeteredTier",
    "RetryingTier",
    "ThrottledTier",
    "VerbCounts",
    "same_bytes",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Confirm = Callable[["Tier", str, "Source"], bool]


def same_bytes(tier: Tier, key: str, source: Source) -> bool:
    """Whether the object is the source, byte for byte: reads the whole of it back."""
    offset = 0
    while offset < source.size_bytes:
        chunk = bytearray(min(CHUNK_BYTES, source.size_bytes - offset))
        tier.read_into(key, memoryview(chunk), offset)
        if chunk != source.read(offset, len(chunk)):
            return False
        offset += len(chunk)
    return True


class RetryingTier:
    """Tries again what the inner tier did not answer: ``TierUnavailable``, and nothing else.

    A put that was not answered may have been carried out. When a later attempt of the same put then
    finds ``AlreadyExists``, the object may be ours or somebody else's, so it counts as stored only
    if its size is right *and* ``confirm(inner, key, source)`` says so; without ``confirm`` the
    caller gets ``AlreadyExists``. ``same_bytes`` is a confirm that proves it by reading; one that
    compares a digest or trusts a key that nobody else writes is cheaper. ``AlreadyExists`` at the
    first attempt is always somebody else's.

    Args:
        attempts: calls of the inner tier at most, the first one included.
        deadline_s: no attempt starts later than this after the call began. One that has started is
            not cut short: that is ``DeadlineTier``, inside this one.
        first_delay_s, max_delay_s: the delay doubles from one to the other, times 0.5 to 1.5.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        attempts: int = 5,
        deadline_s: float = 60.0,
        first_delay_s: float = 0.1,
        max_delay_s: float = 5.0,
        confirm: Confirm | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self._attempts = attempts
        self._deadline_s = deadline_s
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._confirm = confirm
        self._sleep = sleep
        self._clock = clock
        import random  # Here, since it costs milliseconds and most processes retry nothing.

        self._random = random.Random(seed)

    def put(self, key: str, source: Source) -> PutResult:
        """Store, again if there was no answer; see the class for who owns what is there then."""
        tried = 0

        def attempt() -> PutResult:
            nonlocal tried
            tried += 1
            try:
                return self.inner.put(key, source)
            except AlreadyExists:
                if tried == 1 or not self._is_ours(key, source):
                    raise
                return PutResult(source.size_bytes)

        return self._retry("put", key, attempt)

    def _is_ours(self, key: str, source: Source) -> bool:
        if self._confirm is None or self.inner.stat(key).size_bytes != source.size_bytes:
            return False
        return self._confirm(self.inner, key, source)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Read, from the start again if there was no answer."""
        self._retry("read_into", key, lambda: self.inner.read_into(key, out, offset))

    def stat(self, key: str) -> ObjectInfo:
        """Look up, again if there was no answer."""
        return self._retry("stat", key, lambda: self.inner.stat(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List; a listing that breaks off is taken up again after the last key it gave."""
        first = self._retry("list", None, lambda: self.inner.list(prefix))
        return self._resumed(first, prefix)

    def _resumed(self, entries: Iterator[ObjectInfo], prefix: str) -> Iterator[ObjectInfo]:
        last = ""

        def following() -> ObjectInfo | None:
            nonlocal entries
            try:
                return next((entry for entry in entries if entry.key > last), None)
            except TierUnavailable:
                entries = self.inner.list(prefix)
                raise

        while (entry := self._retry("list", None, following)) is not None:
            last = entry.key
            yield entry

    def delete(self, key: str) -> None:
        """Delete, again if there was no answer."""
        self._retry("delete", key, lambda: self.inner.delete(key))

    def close(self) -> None:
        """Close the inner tier."""
        self.inner.close()

    def _retry(self, verb: str, key: str | None, attempt: Callable[[], T]) -> T:
        start = self._clock()
        delay_s = self._first_delay_s
        for tried in range(1, self._attempts + 1):
            try:
                return attempt()
            except TierUnavailable as error:
                wait_s = min(delay_s, self._max_delay_s) * (0.5 + self._random.random())
                elapsed_s = self._clock() - start
                if tried == self._attempts or elapsed_s + wait_s > self._deadline_s:
                    raise TierUnavailable(
                        f"{verb} gave up after {tried} attempts: {error.what}",
                        actions=error.actions,
                        tier=self.name,
                        key=key,
                        attempts=tried,
                        elapsed_s=round(elapsed_s, 3),
                        timeout_s=self._deadline_s,
                    ) from error
                logger.info("%s: %s of %s is tried again: %s", self.name, verb, key, error.what)
                self._sleep(wait_s)
                delay_s *= 2
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True)
class _ThrottledSource:
    inner: Source
    bucket: Bucket

    @property
    def size_bytes(self) -> int:
        return self.inner.size_bytes

    def read(self, offset: int, size_bytes: int) -> memoryview:
        self.bucket.take(size_bytes)
        return self.inner.read(offset, size_bytes)


class ThrottledTier:
    """At most ``bytes_per_s`` through put and read together, over all threads that share it.

    A block is paid for before it moves. ``burst_bytes`` may go through at once after a pause.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        bytes_per_s: float,
        burst_bytes: float = CHUNK_BYTES,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self._bucket = Bucket(bytes_per_s, burst_bytes, sleep, clock)

    def put(self, key: str, source: Source) -> PutResult:
        """Store, slowly."""
        return self.inner.put(key, _ThrottledSource(source, self._bucket))

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Read, slowly, in blocks."""
        view = memoryview(out).cast("B")
        for start in range(0, max(len(view), 1), CHUNK_BYTES):
            part = view[start : start + CHUNK_BYTES]
            self._bucket.take(len(part))
            self.inner.read_into(key, part, offset + start)

    def stat(self, key: str) -> ObjectInfo:
        """Look up."""
        return self.inner.stat(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List."""
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        """Delete."""
        self.inner.delete(key)

    def close(self) -> None:
        """Close the inner tier."""
        self.inner.close()


@dataclass(slots=True)
class VerbCounts:
    """What one verb has done so far. ``errors`` counts them by class name."""

    calls: int = 0
    size_bytes: int = 0
    elapsed_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class MeteredTier:
    """Counts calls, bytes, seconds and errors of every verb."""

    def __init__(self, inner: Tier, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, VerbCounts] = {}

    def snapshot(self) -> dict[str, VerbCounts]:
        """The counters of every verb that was called, as they are now."""
        with self._lock:
            return {
                verb: VerbCounts(c.calls, c.size_bytes, c.elapsed_s, Counter(c.errors))
                for verb, c in self._counts.items()
            }

    def put(self, key: str, source: Source) -> PutResult:
        """Store and count."""
        return self._count(
            "put", lambda: self.inner.put(key, source), lambda result: result.size_bytes
        )

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Read and count."""
        size_bytes = memoryview(out).nbytes
        self._count(
            "read_into", lambda: self.inner.read_into(key, out, offset), lambda _: size_bytes
        )

    def stat(self, key: str) -> ObjectInfo:
        """Look up and count."""
        return self._count("stat", lambda: self.inner.stat(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List and count: one call however many objects, with the time spent in all of them."""
        entries = self._count("list", lambda: self.inner.list(prefix))
        return self._metered(entries)

    def _metered(self, entries: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        while entry := self._count("list", lambda: next(entries, None), calls=0):
            yield entry

    def delete(self, key: str) -> None:
        """Delete and count."""
        self._count("delete", lambda: self.inner.delete(key))

    def close(self) -> None:
        """Close the inner tier."""
        self.inner.close()

    def _count(
        self,
        verb: str,
        call: Callable[[], T],
        moved: Callable[[T], int] = lambda _: 0,
        *,
        calls: int = 1,
    ) -> T:
        start_s = self._clock()
        size_bytes = 0
        failure: str | None = None
        try:
            result = call()
            size_bytes = moved(result)
            return result
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            elapsed_s = self._clock() - start_s
            with self._lock:
                counts = self._counts.setdefault(verb, VerbCounts())
                counts.calls += calls
                counts.size_bytes += size_bytes
                counts.elapsed_s += elapsed_s
                if failure:
                    counts.errors[failure] += 1
