"""One stream of what happens in this process: progress, metrics, logs and /events subscribe to it.

Knows names, times and plain facts. Does not know who listens, and never waits for them. It
promises the last few hundred events to whoever comes late, and nothing of older ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Event", "EventStream", "events"]

logger = logging.getLogger(__name__)

# ``name`` and ``time`` (seconds since 1970, for people; never for order), ``seq``, then facts:
# run, step, tier, seconds, bytes, reason ...
Event = dict[str, Any]
HISTORY = 500


class EventStream:
    """Numbered events, kept for a while and handed to subscribers as they happen."""

    def __init__(self, history: int = HISTORY) -> None:
        self._kept: deque[Event] = deque(maxlen=history)
        self._subscribers: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()
        self._seq = 0

    def emit(self, name: str, **facts: Any) -> Event:
        """Add an event; facts that are None are left out."""
        kept = {key: value for key, value in facts.items() if value is not None}
        with self._lock:
            self._seq += 1
            event: Event = {"seq": self._seq, "time": round(time.time(), 3), "name": name, **kept}
            self._kept.append(event)
            subscribers = list(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                # A listener that fails (a closed terminal, a full queue) must not fail a save.
                logger.exception("a listener failed at event %s", name)
        return event

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``subscriber`` at each event, in the thread that emits; returns how to stop it."""
        with self._lock:
            self._subscribers.append(subscriber)

        def stop() -> None:
            with self._lock:
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)

        return stop

    def since(self, seq: int = 0) -> list[Event]:
        """The kept events after number ``seq``."""
        with self._lock:
            return [event for event in self._kept if event["seq"] > seq]


events = EventStream()
