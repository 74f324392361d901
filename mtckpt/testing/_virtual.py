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
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from greenlet import greenlet

__all__ = ["Fiber", "FiberKilled", "Loop", "Stuck", "Threads", "Time", "ends"]

EPOCH_S = 1_700_000_000.0
_LONG_AGO_S = 1000.0


class Stuck(Exception):
    """Nothing is left to happen, and somebody still waits."""


class FiberKilled(BaseException):
    """Thrown into the blocking code of a process that is killed."""


class _Call:
    """One that is to come: as much of asyncio's ``TimerHandle`` as anybody looks at."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback: Callable[..., object], args: Any, context: Any) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context

    def cancel(self) -> None:
        self.callback = None

    def cancelled(self) -> bool:
        return self.callback is None


class Loop(asyncio.base_events.BaseEventLoop):
    """See the module. ``run_in_executor`` calls at once; a coroutine that comes back is run.

    ``on_task`` is told of every task that is made. ``keeps``, while somebody is stopped, says of
    each call whether it is kept for later: ``again`` has it made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = _LONG_AGO_S
        self._soon: deque[_Call] = deque()
        self._stopping = False
        self._timers: list[tuple[float, int, _Call]] = []
        self._num_timers = 0
        self.fiber: Fiber | None = None
        self.watched: dict[int, Callable[[], None]] = {}
        self.on_watch: Callable[[int], None] | None = None
        self.on_task: Callable[[asyncio.Task[Any]], None] | None = None
        self.keeps: Callable[[Any], bool] | None = None

    def time(self) -> float:
        return self._now_s

    # A story is some thousand turns of this, so the parts of it that are run most are lean.

    def _run_once(self) -> None:
        """One turn: time goes on to what is next, and all is called whose time has come."""
        timers, ready = self._timers, self._soon
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                raise Stuck("nothing is left to happen")
            self._now_s = max(self._now_s, timers[0][0])
        self._now_s += 1e-6  # code takes time as well
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            call = ready.popleft()
            if call.callback is None or (self.keeps is not None and self.keeps(call)):
                continue
            try:
                call.context.run(call.callback, *call.args)
            except Exception as error:  # noqa: BLE001 - the loop goes on, as any does
                self.call_exception_handler({"message": f"in {call.callback}", "exception": error})

    def call_soon(  # type: ignore[override]  # as much of a handle as anybody looks at
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Call:
        call = _Call(callback, args, context)
        self._soon.append(call)
        return call

    def again(self, calls: Iterable[_Call]) -> None:
        """Make calls that were kept for later."""
        self._soon.extend(calls)

    def call_later(  # type: ignore[override]  # as much of a handle as anybody looks at
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Call:
        call = _Call(callback, args, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (self._now_s + delay, self._num_timers, call))
        return call

    def call_at(  # type: ignore[override]  # as much of a handle as anybody looks at
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Call:
        call = _Call(callback, args, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, call))
        return call

    def create_task(  # type: ignore[override]  # any coroutine, as there
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name or "")
        if self.on_task is not None:
            self.on_task(task)
        return task

    def _write_to_self(self) -> None:
        return None

    def add_reader(  # type: ignore[override]  # it stands in for the real one
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """``watched`` has what to call when the process of this descriptor ends."""
        context = contextvars.copy_context()

        def tell() -> None:
            if self.keeps is None:
                context.run(callback, *args)
            else:
                self.call_soon(callback, *args, context=context)

        self.watched[fd] = tell
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
    """Blocking code, which blocks by ``sleep``, or by ``pause`` until something is done.

    ``owner`` is anything of the caller's.
    """

    def __init__(self, loop: Loop, target: Callable[[], None], owner: Any) -> None:
        self.owner = owner
        self.error: BaseException | None = None
        self.done = loop.create_future()
        self._loop = loop
        self._target = target
        self._killed = self._stopped = self._due = False
        self._timer: _Call | None = None
        self._awaited: asyncio.Future[Any] | None = None
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
        """Run the fiber until it waits for something."""
        self._due = self._stopped
        if self._stopped:
            return
        before, self._loop.fiber = self._loop.fiber, self
        self._stack.switch()
        self._loop.fiber = before
        if self._stack.dead:
            self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _woken(self, awaited: asyncio.Future[Any] | None = None) -> None:
        """The time has come, or what it waits for is done, whichever is first."""
        if awaited is None or awaited is self._awaited:
            self._turn()

    def _block(self, awaited: asyncio.Future[Any] | None, timeout_s: float | None) -> None:
        if self._killed:
            raise FiberKilled
        if timeout_s is not None:
            self._timer = self._loop.call_later(max(0.0, timeout_s), self._woken)
        if awaited is not None:
            self._awaited = awaited
            awaited.add_done_callback(self._woken)
        assert self._stack.parent is not None
        self._stack.parent.switch()
        self._unblock()
        if self._killed:
            raise FiberKilled

    def _unblock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._awaited is not None:
            self._awaited.remove_done_callback(self._woken)
        self._timer = self._awaited = None

    def sleep(self, pause_s: float) -> None:
        """Called by the fiber itself: nothing happens in it for so long."""
        self._block(None, pause_s)

    def pause(self, awaited: asyncio.Future[Any], timeout_s: float | None) -> bool:
        """Called by the fiber itself: until that is done, or for so long. True if it is done."""
        if not awaited.done():
            self._block(awaited, timeout_s)
        return awaited.done()

    def kill(self) -> None:
        """End it where it is: it raises FiberKilled there. Not from the fiber itself."""
        self._stopped = False
        blocked = self._timer is not None or self._awaited is not None
        if not self._killed and (blocked or self._due):
            self._unblock()
            self._loop.call_soon(self._turn)
        self._killed = True

    def stop(self) -> None:
        """Let nothing happen in it until ``go_on``. Not from the fiber itself."""
        self._stopped = True

    def go_on(self) -> None:
        """What it waited for may have come in the meantime."""
        self._stopped = False
        if self._due:
            self._loop.call_soon(self._turn_if_due)

    def _turn_if_due(self) -> None:
        if self._due:
            self._turn()


# -- names for blocking code -----------------------------------------------------------------------


class Time:
    """In the place of ``time``."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.monotonic = self.perf_counter = loop.time

    def clock_gettime(self, clock: int) -> float:
        del clock
        return self._loop.time()

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

    def get_ident(self) -> int:
        return id(self._loop.fiber)


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
        return fiber.pause(future, timeout_s)


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

    def is_alive(self) -> bool:
        return self._fiber is not None and not self._fiber.done.done()

    def join(self, timeout: float | None = None) -> None:
        fiber, here = self._fiber, self._loop.fiber
        if fiber is not None and here is not None and not fiber.done.done():
            here.pause(fiber.done, timeout)


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
