"""Work that may hang: done in a thread that is waited for in bounded time.

Knows threads. Does not know what the work is. Nothing can end a thread that hangs: it is left
behind, and what it finds after all is thrown away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Leave", "NoThread", "in_time"]

_T = TypeVar("_T")


class NoThread(Exception):
    """No thread is to be had, as where a limit of processes is reached. Nothing was done."""


def in_time(work: Callable[[], _T], timeout_s: float, *, name: str) -> list[_T]:
    """What ``work`` returns, alone in a list; nothing where it takes longer. Raises what it raises,
    and NoThread."""
    found: list[_T] = []
    failure: list[BaseException] = []
    left: list[bool] = []

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised by the caller below
            failure.append(error)
        else:
            if not left:
                found.append(result)

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        try:
            thread.start()
        except RuntimeError as error:
            raise NoThread(str(error)) from error
        thread.join(timeout_s)
    except BaseException:
        # An interrupt. Its traceback may be kept, and would keep a lease that was found.
        left.append(True)
        found.clear()
        raise
    left.append(True)
    if failure:
        raise failure[0]
    return found[:1]


class Leave:
    """Leave for work in another thread to write to memory of somebody else's, until it is ended."""

    def __init__(self) -> None:
        self._ended = False
        self._running = threading.Lock()

    def check(self) -> None:
        """Raise where there is no leave any more: the work calls it again and again."""
        if self._ended:
            raise InterruptedError("nobody waits for this any more")

    def run(self, work: Callable[[], _T]) -> _T:
        """Do the work. Raises InterruptedError."""
        with self._running:
            self.check()
            return work()

    def end(self, timeout_s: float) -> None:
        """Let the work write no more, and wait until it has ended. One that hangs for longer may
        still write the piece that it has in hand."""
        self._ended = True
        if self._running.acquire(timeout=timeout_s):
            self._running.release()
