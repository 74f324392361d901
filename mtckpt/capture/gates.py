"""Captures that go on during training, and who has to let them pass before values may change.

Knows events and addresses. Does not know frameworks: an adapter says which addresses nobody changes
without waiting here first (``guard``), and waits (``open_gates``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtckpt.errors import CaptureStuck

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

__all__ = [
    "Gate",
    "close",
    "guard",
    "is_wanted",
    "late_addresses",
    "open_gates",
    "open_one",
    "want",
]

_HOLD_S = 600.0
_POLL_S = 0.0002

_lock = threading.Lock()
_open: list[Gate] = []
_guards: list[Callable[[], set[int]]] = []
_wanted = False


class Gate:
    """The event after which one device's values have been taken."""

    def __init__(self, driver: Driver, ordinal: int, event: int) -> None:
        self._driver = driver
        self.ordinal = ordinal
        self._event = event

    def hold(self, stream: int) -> None:
        """What is put on the stream from now on waits until the values have been taken.

        A stream that captures a graph would take the wait into the graph, where the event means
        nothing later: the host waits instead. Raises CaptureStuck if they are not taken in time.
        """
        driver = self._driver
        with driver.current(self.ordinal), driver.relaxed():
            if not driver.capturing(stream):
                driver.wait(stream, self._event)
                return
            deadline_s = time.monotonic() + _HOLD_S
            while not driver.event_done(self._event):
                if time.monotonic() > deadline_s:
                    raise CaptureStuck(
                        f"device {self.ordinal} has not taken the values before they change",
                        stage="captured",
                    )
                time.sleep(_POLL_S)


def want() -> None:
    """Some run of this process captures during training: optimizers in states are to be guarded."""
    global _wanted
    _wanted = True


def is_wanted() -> bool:
    """True if guards are to be set."""
    return _wanted


def guard(addresses: Callable[[], set[int]]) -> None:
    """Take this one's word for which addresses are changed only after ``open_gates`` were held."""
    if addresses not in _guards:
        _guards.append(addresses)


def late_addresses() -> set[int]:
    """Addresses whose values may be taken after ``save()`` has returned."""
    return set().union(*(addresses() for addresses in _guards))


def open_one(gate: Gate) -> None:
    """Values are being taken from now on; until ``close``."""
    with _lock:
        _open.append(gate)


def close(gate: Gate) -> None:
    """They have been taken. Closing one twice is nothing."""
    with _lock:
        if gate in _open:
            _open.remove(gate)


def open_gates() -> list[Gate]:
    """Those that whoever changes guarded values has to hold on the stream that does it."""
    return list(_open)


def _forget() -> None:
    """In a fork: no device takes anything of it, and the thread that had the lock is not there."""
    global _lock
    _lock = threading.Lock()
    _open.clear()


os.register_at_fork(after_in_child=_forget)
