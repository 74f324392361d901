"""What the parts of the control process share: the data processes, deadlines, events, counters.

Knows how a command and a wait are given a deadline, and how an event is counted. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from mtckpt.agent import work
from mtckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mtckpt._events import EventStream
    from mtckpt.agent.queue import Limits

__all__ = ["DataProcesses", "Tools", "until"]

logger = logging.getLogger(__name__)

# What the data process has in hand between two words of progress: a block for each of its threads.
STALL_BYTES = 32 * 2**20
# To a store, parts that are on their way.
STORE_STALL_BYTES = 256 * 2**20
_T = TypeVar("_T")
OnProgress = Callable[[work.Progress], None]


class DataProcesses(Protocol):
    """The pool of data processes, as the control process uses it."""

    async def call(
        self,
        command: work.Command,
        *,
        timeout_s: float,
        on_progress: OnProgress | None = None,
        stall_s: float | None = None,
    ) -> work.Result:
        """Carry a command out. Raises CheckpointError; TierUnavailable when time is up.

        ``stall_s`` is how long it may be silent while its bytes are moving.
        """

    async def forget(self, place: work.TierRef) -> None:
        """End the data process of a place that nothing will be asked of any more."""

    async def keep(self, places: Iterable[work.TierRef]) -> None:
        """End those of all other places, but for one that somebody waits for."""

    async def close(self) -> None:
        """End all data processes; one that hangs is left to the kernel."""


async def until(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until an event is set, for so long at most. True if it is.

    Long polls come here whenever anything has changed: it makes no task of its own, as
    ``wait_for`` does before Python 3.12.
    """
    if sys.version_info >= (3, 11):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
    else:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(event.wait(), timeout_s)
    return event.is_set()


@dataclass(eq=False)
class Tools:
    """See the module."""

    pool: DataProcesses
    limits: Limits
    events: EventStream
    totals: Counter[tuple[str, str]] = field(default_factory=Counter)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def call(
        self,
        command: work.Command,
        reply_type: type[_T],
        size_bytes: int = 0,
        on_progress: OnProgress | None = None,
    ) -> _T:
        """Have a data process do it, within a time that fits its size."""
        place = work.place_of(command)
        store = place is not None and place.kind == "store"
        result = await self.pool.call(
            command,
            timeout_s=self.limits.deadline_s(size_bytes, store=store),
            on_progress=on_progress,
            stall_s=self.limits.deadline_s(
                STORE_STALL_BYTES if store else STALL_BYTES, store=store
            ),
        )
        if not isinstance(result, reply_type):
            raise CheckpointError(
                f"a data process answered {type(command).__name__} with {type(result).__name__}"
            )
        return cast(_T, result)

    def count(self, name: str, label: str = "", amount: int = 1) -> None:
        """Add to a counter of ``/metrics``."""
        self.totals[name, label] += amount

    def start(self, work_: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
        """Run something in the background; what it raises is logged, since nobody awaits it."""
        task = asyncio.get_running_loop().create_task(work_, name=what)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, CheckpointError):
                logger.warning("%s failed: %s", task.get_name(), error)
            else:
                logger.error("%s failed: %s", task.get_name(), error, exc_info=error)
