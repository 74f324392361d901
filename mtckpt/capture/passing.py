"""From a device to a slot that its driver does not know: through pinned memory, then by the host.

Knows the driver and copies. Does not know slots or captures. The driver could copy to any memory by
itself, through a small buffer of its own and with the caller waiting; here the next pieces cross
the bus while threads of the host take the one before them to its place.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtckpt.capture.base import Move
from mtckpt.capture.buffers import PinnedMemory
from mtckpt.capture.driver import giving_back

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

__all__ = ["Copy", "HostCopy", "Passage"]

_PLACES = 3  # one is emptied by the host while the others are under way

# Where to, where from, and how many bytes.
Copy = tuple[int, int, int]
# Copies within host memory.
HostCopy = Callable[[Sequence[Move]], None]


class Passage:
    """A ring of pinned memory. Call within ``current`` and ``relaxed`` of its device.

    ``wait`` returns once an event is done, or raises; nothing is taken out of a place before.
    """

    def __init__(self, driver: Driver, host_copy: HostCopy) -> None:
        self._driver = driver
        self._host_copy = host_copy
        self._places = [PinnedMemory(driver) for _ in range(_PLACES)]
        self._events = [driver.event() for _ in range(_PLACES)]
        self._turn = 0
        self._under_way: collections.deque[tuple[int, list[Move]]] = collections.deque()

    def forget(self) -> None:
        """What an earlier capture did not come to the end of is nobody's: nothing is under way."""
        self._under_way.clear()

    def put(self, copies: Sequence[Copy], stream: int, wait: Callable[[int], None]) -> None:
        """Let a device copy these behind what is on the stream, once there is a place."""
        if len(self._under_way) == _PLACES:
            self._take_out(wait)
        place = self._turn % _PLACES
        self._turn += 1
        pinned = self._places[place]
        pinned.hold(sum(size_bytes for _, _, size_bytes in copies))
        at, moves = pinned.address, []
        for target, source, size_bytes in copies:
            self._driver.to_host(at, source, size_bytes, stream)
            moves.append(Move(at, target, size_bytes))
            at += size_bytes
        self._driver.record(self._events[place], stream)
        self._under_way.append((self._events[place], moves))

    def finish(self, wait: Callable[[int], None]) -> None:
        """Return once all is where it belongs."""
        while self._under_way:
            self._take_out(wait)

    def _take_out(self, wait: Callable[[int], None]) -> None:
        event, moves = self._under_way.popleft()
        wait(event)
        self._host_copy(moves)

    def close(self) -> None:
        """Give back its memory. Nothing may be under way."""
        for event in self._events:
            with giving_back():
                self._driver.destroy_event(event)
        for pinned in self._places:
            with giving_back():
                pinned.free()
