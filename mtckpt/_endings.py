"""Runs that their user did not close: closed when the process ends, or once they are dropped.

Knows how to close something in time, and that there may be nobody left to raise to. Does not know
what closing means.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from typing import ParamSpec, Protocol

from mtckpt.errors import CheckpointError

__all__ = ["EXIT_S", "close_at_exit", "close_dropped", "told_weakly"]

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")

EXIT_S = 30.0
# Where somebody has interrupted close(): they do not want to wait.
_AGAIN_S = 1.0
_DROPPED_S = 600.0

_closing: list[threading.Thread] = []


class Open(Protocol):
    """What is to be closed."""

    run: str
    _cut_off: bool  # close() was called, and interrupted

    def close(self, *, timeout_s: float) -> None:
        """Nothing if it was closed before. Raises CheckpointError."""


def told_weakly(method: Callable[_P, None]) -> Callable[_P, None]:
    """The method, for as long as its object lives: threads that tell it something keep nobody."""
    reference = weakref.WeakMethod(method)

    def tell(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if (told := reference()) is not None:
            told(*args, **kwargs)

    return tell


def close_at_exit(found: Open) -> None:
    """Close it when the process ends, if it is still there."""
    atexit.register(_close_if_there, weakref.ref(found))


def close_dropped(found: Open) -> None:
    """Close it in a thread of its own, which keeps it until then. For ``__del__``, which may be
    called anywhere: nothing is waited for here."""
    thread = threading.Thread(
        target=_close, args=(found, "after it was dropped", _DROPPED_S), name="mtckpt-close",
        daemon=True,
    )  # fmt: skip
    try:
        thread.start()
    except RuntimeError:
        return  # The interpreter is ending, and its agent goes on with what is owed.
    _closing[:] = [*(one for one in _closing if one.is_alive()), thread]


def _close_if_there(reference: weakref.ref[Open]) -> None:
    if (found := reference()) is not None:
        _close(found, "at exit", _AGAIN_S if found._cut_off else EXIT_S)


def _close(found: Open, when: str, timeout_s: float) -> None:
    try:
        found.close(timeout_s=timeout_s)
    except CheckpointError as error:
        # There is nobody left to raise to: the log and the agent's status have it.
        logger.warning("run %s: while closing %s: %s", found.run, when, error)


@atexit.register
def _end() -> None:
    for thread in _closing:
        thread.join(EXIT_S)
