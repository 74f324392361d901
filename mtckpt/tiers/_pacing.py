"""How fast a store is asked: one back-off for all threads, one cap for all bytes, one deadline.

It knows time, chance and counts. It does not know what is asked, nor of whom.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Backoff", "Bucket", "Deadline"]

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 10.0


class Deadline:
    """The end of one call, on the monotonic clock."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end_s = clock() + timeout_s

    def extend(self, extra_s: float) -> None:
        """Time that was spent keeping within a cap is not held against the store."""
        self.timeout_s += extra_s
        self._end_s += extra_s

    @property
    def left_s(self) -> float:
        return self._end_s - self._clock()

    @property
    def elapsed_s(self) -> float:
        return self.timeout_s - self.left_s


class Bucket:
    """Tokens that come at a steady rate. Debt is allowed: whoever takes too many sleeps it off.

    ``take`` returns how long it slept.
    """

    def __init__(
        self,
        bytes_per_s: float,
        burst_bytes: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._left_bytes = burst_bytes
        self._seen_s = clock()

    def take(self, size_bytes: int) -> float:
        with self._lock:
            now_s = self._clock()
            refill_bytes = (now_s - self._seen_s) * self._bytes_per_s
            self._left_bytes = min(self._burst_bytes, self._left_bytes + refill_bytes) - size_bytes
            self._seen_s = now_s
            wait_s = -self._left_bytes / self._bytes_per_s
        if wait_s > 0:
            self._sleep(wait_s)
        return max(0.0, wait_s)


class Backoff:
    """Nobody asks a store that said "slow down" until its pause is over, whichever thread heard it.

    Every refusal doubles the pause, every success halves it, and until it has come to nothing one
    request is in flight at a time: it tells for all whether there is more to be had. Chance spreads
    the machines that come back. Failures that say nothing of load (a reset connection) pause only
    the thread that met them.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        import random  # Here, since it costs milliseconds and most processes ask no store.

        self._sleep = sleep
        self._clock = clock
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._delay_s = 0.0
        self._until_s = 0.0
        self._one_asks = False

    @contextlib.contextmanager
    def turn(self, deadline: Deadline) -> Iterator[None]:
        """Wait until it may be asked, not beyond the deadline. The block makes the request, and
        says ``throttled`` or ``went_well`` of it."""
        alone = self._wait(deadline)
        try:
            yield
        finally:
            if alone:
                with self._changed:
                    self._one_asks = False
                    self._changed.notify_all()

    def _wait(self, deadline: Deadline) -> bool:
        with self._changed:
            while self._delay_s and deadline.left_s > 0:
                wait_s = self._until_s - self._clock()
                if wait_s <= 0 and not self._one_asks:
                    self._one_asks = True
                    return True
                wait_s = wait_s if wait_s > 0 else deadline.left_s
                self._changed.wait(max(0.001, min(wait_s, deadline.left_s)))
        return False

    def went_well(self) -> None:
        """A request was answered."""
        if self._delay_s:
            with self._changed:
                self._delay_s = self._delay_s / 2 if self._delay_s > FIRST_DELAY_S else 0.0
                self._changed.notify_all()

    def throttled(self) -> None:
        """The store asked for a pause: all threads keep it."""
        with self._changed:
            now_s = self._clock()
            if now_s < self._until_s:
                return  # Asked before the pause began: this answer says nothing new.
            self._delay_s = min(MAX_DELAY_S, max(FIRST_DELAY_S, self._delay_s * 2))
            self._until_s = now_s + self._delay_s * (0.5 + self._random.random())

    def pause_left_s(self) -> float:
        """How long the pause of all lasts yet."""
        with self._changed:
            return max(0.0, self._until_s - self._clock())

    def pause(self, tried: int, deadline: Deadline) -> bool:
        """Pause this thread before its next attempt; False if no time would be left after it."""
        with self._changed:
            chance = 0.5 + self._random.random()
        wait_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(tried - 1, 10)) * chance
        if wait_s >= deadline.left_s:
            return False
        self._sleep(wait_s)
        return True
