"""Virtual time: an event loop whose clock jumps ahead, and blocking code that shares it.

Everything runs one at a time, in an order that nothing but the seed decides: coroutines in the
loop, and blocking code in fibers, which have a stack of their own. Knows nothing of what runs in
it. The names that blocking code is given for ``time`` and ``threading`` are here too.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from greenlet import greenlet

__all__ = ["Fiber", "FiberKilled", "Loop", "Stuck", "Threads", "Time", "ends"]

EPOCH_S = 1_700_000_000.0
_LONG_AGO_S = 1000.0


class Stuck(Exception):
    """Nothing is left to happen, and somebody still waits."""


class FiberKilled(BaseException):
    """Thrown into the blocking code of a process that is killed."""


class Loop(asyncio.base_events.BaseEventLoop):
    """See the module. ``run_in_executor`` calls at once; a coroutine that comes back is run."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = _LONG_AGO_S
        self._soon: deque[asyncio.Handle] = deque()
        self._ready = self._soon  # where the base class puts what it is told by threads
        self._stopping = False
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self.fiber: Fiber | None = None
        self.watched: dict[int, Callable[[], None]] = {}
        self.on_watch: Callable[[int], None] | None = None

    def time(self) -> float:
        return self._now_s

    # A story is some thousand turns of this, so the parts of it that are run most are lean.

    def _run_once(self) -> None:
        """One turn: time goes on to what is next, and all is called whose time has come."""
        timers, ready = self._timers, self._soon
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                raise Stuck("nothing is left to happen")
            self._now_s = max(self._now_s, timers[0][0])
        self._now_s += 1e-6  # code takes time as well
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def call_soon(  # type: ignore[override]  # any callable, as there
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # any callable, as there
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def _write_to_self(self) -> None:
        return None

    def add_reader(  # type: ignore[override]  # it stands in for the real one
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """``watched`` has what to call when the process of this descriptor ends."""
        context = contextvars.copy_context()
        self.watched[fd] = lambda: context.run(callback, *args)
        if self.on_watch is not None:
            self.on_watch(fd)

    def remove_reader(self, fd: Any) -> bool:
        return self.watched.pop(fd, None) is not None

    def run_in_executor(  # type: ignore[override]  # it stands in for the real one
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        del executor
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - handed to who waits, as an executor does
            future.set_exception(error)
            return future
        if asyncio.iscoroutine(result):
            future.cancel()
            return self.create_task(result)
        future.set_result(result)
        return future


# -- fibers ----------------------------------------------------------------------------------------


class Fiber:
    """Blocking code. ``wait`` is how it blocks: for a coroutine that runs in the loop meanwhile.

    ``context`` is that of whatever the fiber has awaited; ``owner`` anything of the caller's.
    """

    def __init__(
        self, loop: Loop, target: Callable[[], None], context: contextvars.Context, owner: Any
    ) -> None:
        self.owner = owner
        self.context = context
        self.error: BaseException | None = None
        self.done = loop.create_future()
        self._loop = loop
        self._target = target
        self._killed = False
        self._outbox: Coroutine[Any, Any, Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stack: greenlet
        loop.call_soon(self._start)

    def _start(self) -> None:
        if self._killed:
            self._end()
        else:
            self._stack = greenlet(self._run)  # whose parent is what runs here: the loop
            self._turn()

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:  # noqa: BLE001 - looked at by whoever started it
            self.error = error

    def _turn(self) -> None:
        """Run the fiber until it waits for something, and start that."""
        self._outbox = self._timer = None
        before, self._loop.fiber = self._loop.fiber, self
        self._stack.switch()
        self._loop.fiber = before
        if self._timer is not None:
            return
        if self._outbox is None:
            self._end()
            return
        self._task = self.context.run(self._loop.create_task, self._outbox)
        self._task.add_done_callback(lambda _: self._turn())

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Called by the fiber itself: the coroutine's result."""
        if self._killed:
            coroutine.close()
            raise FiberKilled
        self._outbox = coroutine
        assert self._stack.parent is not None
        self._stack.parent.switch()
        if self._killed:
            raise FiberKilled
        assert self._task is not None
        if self._task.cancelled():
            raise FiberKilled
        return self._task.result()

    def sleep(self, pause_s: float) -> None:
        """Called by the fiber itself: nothing happens in it for so long."""
        if self._killed:
            raise FiberKilled
        self._timer = self._loop.call_later(pause_s, self._turn)
        assert self._stack.parent is not None
        self._stack.parent.switch()
        if self._killed:
            raise FiberKilled

    def kill(self) -> None:
        """End it where it is: it raises FiberKilled there. Not from the fiber itself."""
        self._killed = True
        if self._timer is not None:
            self._timer.cancel()
            self._loop.call_soon(self._turn)
        elif self._task is not None:
            self._task.cancel()


# -- names for blocking code -----------------------------------------------------------------------


class Time:
    """In the place of ``time``."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def clock_gettime(self, clock: int) -> float:
        del clock
        return self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()

    perf_counter = monotonic

    def time(self) -> float:
        return EPOCH_S + self._loop.time()

    def sleep(self, pause_s: float) -> None:
        fiber = self._loop.fiber
        assert fiber is not None
        fiber.sleep(pause_s)


class Threads:
    """In the place of ``threading``, and of ``queue`` too. ``spawn(target)`` starts a fiber."""

    def __init__(self, loop: Loop, spawn: Callable[[Callable[[], None]], Fiber]) -> None:
        class Event(_Event):
            def __init__(self) -> None:
                super().__init__(loop)

        class Lock(_Lock):
            def __init__(self) -> None:
                super().__init__(loop)

        class Condition(_Condition):
            def __init__(self) -> None:
                super().__init__(loop)

        class Thread(_Thread):
            def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
                del name, daemon
                super().__init__(loop, spawn, target)

        class SimpleQueue(_Queue):
            def __init__(self) -> None:
                super().__init__(loop)

            def __class_getitem__(cls, _: object) -> type:
                return cls

        self.Event = Event
        self.Lock = Lock
        self.Condition = Condition
        self.Thread = Thread
        self.SimpleQueue = SimpleQueue
        self._loop = loop

    def current_thread(self) -> object:
        return self._loop.fiber


class _Waiters:
    """Futures of those that wait for something to be said."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._futures: list[asyncio.Future[None]] = []

    def _tell(self) -> None:
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)

    def _pause(self, timeout_s: float | None) -> bool:
        """Until it is said, or for so long. True if it was."""
        future = self._loop.create_future()
        self._futures.append(future)
        fiber = self._loop.fiber
        assert fiber is not None
        return bool(fiber.wait(ends(future, timeout_s)))


async def ends(future: asyncio.Future[Any], timeout_s: float | None) -> bool:
    """Wait for it, for so long at most. True if it is done; it goes on if it is not."""
    if future.done():
        return True
    loop = asyncio.get_running_loop()
    told = loop.create_future()

    def tell(_: object) -> None:
        if not told.done():
            told.set_result(None)

    timer = None if timeout_s is None else loop.call_later(max(0.0, timeout_s), tell, None)
    future.add_done_callback(tell)
    try:
        await told
    finally:
        future.remove_done_callback(tell)
        if timer is not None:
            timer.cancel()
    return future.done()


class _Event(_Waiters):
    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._tell()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            self._pause(timeout)
        return self._is_set


class _Lock(_Waiters):
    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        deadline_s = None if timeout < 0 else self._loop.time() + timeout
        while self._held:
            left_s = None if deadline_s is None else deadline_s - self._loop.time()
            if not blocking or (left_s is not None and left_s <= 0):
                return False
            self._pause(left_s)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False
        self._tell()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Condition(_Waiters):
    """Fibers take turns only where they wait, so there is nothing to lock."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, timeout: float | None = None) -> bool:
        return self._pause(timeout)

    def notify_all(self) -> None:
        self._tell()


class _Thread:
    def __init__(
        self,
        loop: Loop,
        spawn: Callable[[Callable[[], None]], Fiber],
        target: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._spawn = spawn
        self._target = target
        self._fiber: Fiber | None = None

    def start(self) -> None:
        self._fiber = self._spawn(self._target)

    def join(self, timeout: float | None = None) -> None:
        fiber, here = self._fiber, self._loop.fiber
        if fiber is not None and here is not None and not fiber.done.done():
            here.wait(ends(asyncio.shield(fiber.done), timeout))


class _Queue(_Waiters):
    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._tell()

    def get(self) -> Any:
        while not self._items:
            self._pause(None)
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items
