"""One call of a Checkpointer at a time, whichever threads make them.

Knows who has the turn and what for. Does not know what the calls do. Does not promise an order
among those that wait.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mtckpt.errors import UsageError, WaitTimeout

__all__ = ["Turns", "in_turn"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="_Taker")


class Turns:
    """See the module. A call waits ``timeout_s`` for another thread's at most."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._thread = 0
        self._call = ""

    @contextlib.contextmanager
    def take(self, call: str) -> Iterator[None]:
        """Have the turn for ``call``.

        Raises UsageError for one that comes from within another, as a signal handler's may;
        WaitTimeout where another thread's does not end.
        """
        me = threading.get_ident()
        if self._thread == me:
            raise UsageError(
                f"{call}() was called from within {self._call}() of the same Checkpointer",
                state="nothing was done",
                actions=("in a signal handler, set a flag, and look at it in the loop",),
            )
        if not self._lock.acquire(timeout=self._timeout_s):
            raise WaitTimeout(
                f"{call}() waited for {self._call}() of another thread, which has not ended",
                stage="",
                timeout_s=self._timeout_s,
                state="nothing was done",
                actions=("call a Checkpointer from one thread, or from each in its turn",),
            )
        try:
            self._thread, self._call = me, call
            yield
        finally:
            self._thread = 0
            self._lock.release()


class _Taker(Protocol):
    _turns: Turns

    def _check_alive(self) -> None: ...


def in_turn(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method that takes its turn, of an object that is alive when it is called."""

    @functools.wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._check_alive()
        with self._turns.take(method.__name__.lstrip("_")):
            return method(self, *args, **kwargs)

    return call
