"""Requests of one tier to its store: paced, in time, tried again where that can help.

It knows kinds of answers, deadlines and the one back-off that all threads share. It does not know
what a request does: whoever asks says what to call, and deals with "it is there already".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from mtckpt.tiers._pacing import Backoff, Bucket, Deadline
from mtckpt.tiers._store import Kind, Refused, error_of

if TYPE_CHECKING:
    from mtckpt.errors import TierError

__all__ = ["Counts", "Requests", "Rules"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = frozenset({Kind.THROTTLED, Kind.UNREACHABLE, Kind.CORRUPTED})


@dataclass(frozen=True, slots=True)
class Rules:
    """How long things may take; see ``ObjectStoreTier``."""

    timeout_s: float
    stall_s: float
    min_bytes_per_s: float


@dataclass(slots=True)
class Counts:
    """Requests made so far: all of them, and those that followed a failed one."""

    requests: int = 0
    again: int = 0
    throttled: int = 0


@dataclass(slots=True)
class Requests:
    """Makes the requests of a tier. Thread-safe."""

    tier: str
    place: str
    rules: Rules
    renew: Callable[[], bool]
    bucket: Bucket | None = None
    backoff: Backoff = field(default_factory=Backoff)
    counts: Counts = field(default_factory=Counts)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def deadline(self, size_bytes: int = 0) -> Deadline:
        """The end of a call that moves so many bytes."""
        return Deadline(self.rules.timeout_s + size_bytes / self.rules.min_bytes_per_s)

    def make(
        self,
        what: str,
        key: str | None,
        deadline: Deadline,
        request: Callable[[float], T],
        *,
        size_bytes: int = 0,
    ) -> T:
        """``request(timeout_s)``, until it is answered. Raises an error of ours, made by the table.

        An answer that is final comes at once; what may help is tried again until the deadline.
        """
        try:
            return self.ask(what, key, deadline, request, size_bytes=size_bytes)
        except Refused as refused:
            error = self.error(refused, what, key, deadline)
        raise error

    def ask(
        self,
        what: str,
        key: str | None,
        deadline: Deadline,
        request: Callable[[float], T],
        *,
        size_bytes: int = 0,
        again: Callable[[Refused], None] = lambda _: None,
    ) -> T:
        """Like ``make``, with the last answer as it came. ``again`` hears why it is asked again."""
        renewed = False
        tried = 0
        while True:
            tried += 1
            last = self._once(deadline, request, size_bytes, tried)
            if not isinstance(last, Refused):
                return last
            if last.kind is Kind.EXPIRED and not renewed:
                renewed = self.renew()
                if renewed:
                    logger.info("%s: credentials are read again", self.tier)
                    continue
            if last.kind not in _AGAIN:
                raise last
            if last.kind is Kind.THROTTLED:
                # The pause of all comes first; there is no second one for this thread.
                if self.backoff.pause_left_s() >= deadline.left_s:
                    raise last
            elif not self.backoff.pause(tried, deadline):
                raise last
            again(last)
            logger.info("%s: %s of %s is tried again: %s", self.tier, what, key, last.said)

    def _once(
        self, deadline: Deadline, request: Callable[[float], T], size_bytes: int, tried: int
    ) -> T | Refused:
        with self.backoff.turn(deadline):
            if deadline.left_s <= 0:
                return Refused(Kind.THROTTLED, "503: the pause it asked for outlasts the time left")
            if size_bytes and self.bucket is not None:
                deadline.extend(self.bucket.take(size_bytes))
            self._count(tried)
            # One attempt gets what its bytes may take, and never what is left for all of them, so
            # that a connection that went dead leaves time for another.
            limit_s = self.rules.stall_s + size_bytes / self.rules.min_bytes_per_s
            try:
                result = request(max(0.05, min(limit_s, deadline.left_s)))
            except Refused as refused:
                if refused.kind is Kind.THROTTLED:
                    self.backoff.throttled()
                    with self._lock:
                        self.counts.throttled += 1
                return refused
            self.backoff.went_well()
            return result

    def error(self, refused: Refused, what: str, key: str | None, deadline: Deadline) -> TierError:
        """The error of ours for the last answer to ``what``."""
        timed_out = refused.kind in _AGAIN
        return error_of(
            refused,
            f"{self.place} did not {what}: {refused.said or refused.kind.value}",
            tier=self.tier,
            key=key,
            status=refused.status,
            elapsed_s=round(deadline.elapsed_s, 3) if timed_out else None,
            timeout_s=round(deadline.timeout_s, 3) if timed_out else None,
        )

    def _count(self, tried: int) -> None:
        with self._lock:
            self.counts.requests += 1
            self.counts.again += tried > 1
