"""One call of a Checkpointer at a time, of those that change it, whichever threads make them.

Knows who has the turn and what for. Does not know what the calls do. Does not promise an order
among those that wait.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mtckpt.errors import UsageError, WaitTimeout

__all__ = ["Turns", "in_turn"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="_Taker")


@dataclass(frozen=True, slots=True)
class _Turn:
    thread: int
    call: str
    ended: threading.Event


class Turns:
    """See the module."""

    def __init__(self) -> None:
        self._taken: dict[str, _Turn] = {}  # the one that is being had, under "now"

    def take(
        self,
        call: str,
        timeout_s: float,
        work: Callable[[], _R],
        instead: Callable[[str], _R] | None = None,
    ) -> _R:
        """Do ``work`` for ``call`` once no other thread's does; ``instead``, which is told why, if
        that is not within ``timeout_s``.

        Raises UsageError for one that comes from within another, as a signal handler's may;
        WaitTimeout where there is no ``instead``.
        """
        deadline_s = time.monotonic() + timeout_s
        mine = _Turn(threading.get_ident(), call, threading.Event())
        # A signal handler may raise between any two instructions. So whose turn it is stands in one
        # place, which one call sets; and it is ended twice, in case that happens amid the first.
        try:
            try:
                while (other := self._taken.setdefault("now", mine)) is not mine:
                    if other.thread == mine.thread:
                        raise _within(call, other.call)
                    left_s = deadline_s - time.monotonic()
                    if left_s > 0:
                        other.ended.wait(left_s)
                    elif instead is not None:
                        return instead(f"{other.call}() of another thread has not ended")
                    else:
                        raise _too_late(call, other.call, timeout_s)
                return work()
            finally:
                self._end(mine)
        finally:
            self._end(mine)

    def _end(self, mine: _Turn) -> None:
        if self._taken.get("now") is mine:
            del self._taken["now"]
        mine.ended.set()


def _within(call: str, other: str) -> UsageError:
    return UsageError(
        f"{call}() was called from within {other}() of the same Checkpointer",
        state="nothing was done",
        actions=(
            "in a signal handler, set a flag, and look at it in the loop",
            "a state that is made by a callable must not save, restore or close meanwhile",
        ),
    )


def _too_late(call: str, other: str, timeout_s: float) -> WaitTimeout:
    return WaitTimeout(
        f"{call}() waited for {other}() of another thread, which has not ended",
        stage="",
        timeout_s=timeout_s,
        state="nothing was done",
        actions=("save, restore and close from one thread, or from each in its turn",),
    )


class _Taker(Protocol):
    _turns: Turns
    _timeout_s: float

    def _check_alive(self) -> None: ...


def in_turn(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method that takes its turn, of an object that is alive when it is called."""

    @functools.wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._check_alive()
        work = functools.partial(method, self, *args, **kwargs)
        return self._turns.take(method.__name__, self._timeout_s, work)

    return call
