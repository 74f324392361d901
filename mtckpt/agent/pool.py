"""The control process's side of its data processes: one for each root of a tier, each replaceable.

It knows processes, deadlines and back-off. It does not know what commands mean. A command whose
process died is given again to the next one, a few times at most: each can be (``work`` says what is
answered then), and of a dead process nothing is under way any more. One whose process hangs is not:
that may still do what it was told, so it fails as ``TierUnavailable``, and whoever gave it decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import mtckpt
from mtckpt.agent import work
from mtckpt.agent.protocol import error_from_wire
from mtckpt.errors import CheckpointError, FormatError, TierUnavailable

if TYPE_CHECKING:
    from mtckpt._access import Access

__all__ = ["Pool", "Worker"]

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
STOP_TIMEOUT_S = 2.0
# How often one command is given to processes that die under it, and the back-off that it sits out.
MAX_ATTEMPTS = 4
MAX_PATIENCE_S = 1.0
# A wait that lasts so much longer than it should: this process was stopped meanwhile.
STOPPED_S = 1.0
OnProgress = Callable[[work.Progress], None]


@dataclass(slots=True)
class _Pending:
    """One command under way. ``last_s`` is when the process last said anything about it.

    ``stall_s`` is how long it may be silent while bytes are moving, ``timeout_s`` otherwise: where
    one step takes as long as there are bytes (reserving, syncing), and while it waits for its turn,
    which may take as long as what is under way before it.
    """

    reply: asyncio.Future[work.Result]
    on_progress: OnProgress | None
    timeout_s: float
    stall_s: float
    begun: bool = False
    moving: bool = False
    last_s: float = field(default_factory=time.monotonic)

    @property
    def silence_s(self) -> float:
        return min(self.timeout_s, self.stall_s) if self.moving else self.timeout_s

    def note(self, news: work.Progress) -> None:
        self.moving = news.is_start or 0 < news.done_bytes < news.total_bytes
        if self.on_progress is not None and not news.is_start:
            self.on_progress(news)


class _Process:
    """One running data process and what is under way in it."""

    def __init__(self, name: str, log: IO[bytes] | int) -> None:
        self.name = name
        self.pending: dict[int, _Pending] = {}
        self.heard_s = time.monotonic()
        self.gone = False
        # It ended by itself: not given up while it may still do what it was told.
        self.died = False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mtckpt.agent.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._sock = ours
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def begin(self) -> None:
        """Start to listen to it."""
        reader, self._writer = await asyncio.open_connection(
            sock=self._sock, limit=work.MAX_LINE_BYTES
        )
        self._reader = asyncio.create_task(self._read(reader), name=f"worker {self.name}")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        why = "ended"
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                self._take(work.decode_reply(line))
            self.died = not self.gone
        except OSError:
            why = "was killed"
            self.died = not self.gone
        except (ValueError, FormatError) as error:
            why = f"cannot be understood: {error}"
        finally:
            self.end(f"the data process of {self.name} {why}")

    def _take(self, reply: work.Reply) -> None:
        self.heard_s = time.monotonic()
        pending = self.pending.get(reply.id)
        if pending is None:
            return  # Its caller has given up.
        pending.last_s, pending.begun = self.heard_s, True
        if reply.begun:
            return
        if reply.progress is not None:
            pending.note(reply.progress)
            return
        del self.pending[reply.id]
        if pending.reply.done():
            return
        if reply.error is not None:
            pending.reply.set_exception(error_from_wire(reply.error))
        elif reply.result is not None:
            pending.reply.set_result(reply.result)

    def left_s(self, pending: _Pending) -> float:
        """How much longer one command may be silent; below zero where it is to be given up."""
        now_s = time.monotonic()
        if pending.begun:
            return pending.last_s + pending.silence_s - now_s
        # Those that it waits for may take as long as they may.
        others = [self.left_s(other) for other in self.pending.values() if other.begun]
        return max(max(pending.last_s, self.heard_s) + pending.silence_s - now_s, *others, 0.0)

    async def send(self, request: work.Request) -> None:
        """Hand a request over. ConnectionError if the process is not there any more."""
        if self._writer is None or self.gone:
            raise ConnectionResetError("the data process is gone")
        self._writer.write(work.encode_line(request))
        await self._writer.drain()

    def end(self, why: str) -> None:
        """Kill it, however it is; everything under way in it fails. Idempotent.

        One that hangs in a device cannot be killed yet. It is left to the kernel, which ends it
        when the device answers.
        """
        if self.gone:
            return
        self.gone = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        for pending in self.pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(TierUnavailable(why, tier=self.name))
        self.pending.clear()

    async def dead(self) -> None:
        """Wait until the kernel has ended every thread of a process that died: moments."""
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while not self.reaped() and time.monotonic() < deadline_s:  # noqa: ASYNC110 - not a child watcher's work
            await asyncio.sleep(0.001)

    async def closed(self) -> None:
        """Wait until nothing in this loop listens to it any more."""
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=STOP_TIMEOUT_S)
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def reaped(self) -> bool:
        """Whether the kernel has ended it; a zombie is collected by asking."""
        return self._process.poll() is not None


class Worker:
    """One place's data process, started when it is needed and replaced when it is of no use."""

    def __init__(self, name: str, *, log_path: str | os.PathLike[str] | None = None) -> None:
        self.name = name
        self.starts = 0
        self._log_path = log_path
        self._process: _Process | None = None
        self._abandoned: list[_Process] = []
        self._starting = asyncio.Lock()
        self._next_id = 0
        self._calls = 0
        self._failures = 0
        self._not_before_s = 0.0
        self._closed = False

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return self._calls > 0

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None or self._process.gone else self._process.pid

    async def call(
        self,
        command: work.Command,
        timeout_s: float,
        on_progress: OnProgress | None = None,
        *,
        stall_s: float | None = None,
    ) -> work.Result:
        """Have a command carried out. The deadline counts from the last progress, if there is any.

        ``stall_s``, if it is shorter, is the deadline from one progress to the next. A process that
        dies meanwhile is replaced, and the command given to the next one.

        Raises:
            TierUnavailable: no answer in time (the process is given up), or one process after
                another died.
            CheckpointError: whatever the command itself ended with.
        """
        self._calls += 1
        try:
            return await self._call(command, timeout_s, on_progress, stall_s)
        finally:
            self._calls -= 1

    async def _call(
        self,
        command: work.Command,
        timeout_s: float,
        on_progress: OnProgress | None,
        stall_s: float | None,
    ) -> work.Result:
        verb = type(command).__name__
        attempt = 1
        while True:
            process = await self._started(verb)
            reply: asyncio.Future[work.Result] = asyncio.get_running_loop().create_future()
            pending = _Pending(
                reply, on_progress, timeout_s, timeout_s if stall_s is None else stall_s
            )
            try:
                return await self._once(process, command, attempt > 1, pending)
            except TierUnavailable:
                if not process.died or self._closed or attempt == MAX_ATTEMPTS:
                    raise
            await process.dead()
            attempt += 1
            logger.info("%s: %s is given to another process", self.name, verb)

    async def _once(
        self,
        process: _Process,
        command: work.Command,
        again: bool,
        pending: _Pending,
    ) -> work.Result:
        self._next_id += 1
        request = work.Request(self._next_id, command, again)
        reply = pending.reply
        process.pending[request.id] = pending
        try:
            await self._sent(process, request, pending.timeout_s)
            result = await self._answered(process, pending, type(command).__name__)
        except CheckpointError:
            if not process.gone:
                self._failures = 0  # It answered: the process is well, whatever it said.
            raise
        finally:
            process.pending.pop(request.id, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # Looked at, so that nobody is told it never was.
        self._failures = 0
        return result

    async def _sent(self, process: _Process, request: work.Request, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(process.send(request), timeout_s)
        except asyncio.TimeoutError:
            raise self._gave_up(process, type(request.command).__name__, timeout_s) from None
        except OSError as error:
            process.died = process.died or not process.gone
            self._failed(process, f"the data process of {self.name} is gone")
            raise TierUnavailable(
                f"the data process of {self.name} is gone", tier=self.name
            ) from error

    async def _answered(self, process: _Process, pending: _Pending, verb: str) -> work.Result:
        while True:
            asked_s = time.monotonic()
            # What it says meanwhile may shorten the deadline.
            wait_s = max(min(process.left_s(pending), pending.stall_s), 0)
            done, _ = await asyncio.wait({pending.reply}, timeout=wait_s)
            if done:
                if process.gone:
                    self._failed(process, f"it ended during {verb}")
                return pending.reply.result()
            if time.monotonic() - asked_s > wait_s + STOPPED_S:
                pending.last_s = time.monotonic()  # We were stopped: what it said is still unread.
            if process.left_s(pending) <= 0:
                raise self._gave_up(process, verb, pending.silence_s)

    def _gave_up(self, process: _Process, verb: str, timeout_s: float) -> TierUnavailable:
        text = f"{self.name} did not answer {verb} within {timeout_s:g} s"
        self._failed(process, text)
        return TierUnavailable(
            text,
            state="what was under way there is tried again by a new process",
            actions=["look at the device or mount: dmesg, mtckpt doctor"],
            tier=self.name,
            verb=verb,
            timeout_s=timeout_s,
        )

    def _failed(self, process: _Process, why: str) -> None:
        """Give a process up; the next one starts no sooner than the back-off says."""
        if process is not self._process:
            return
        process.end(why)
        self._process = None
        self._abandoned.append(process)
        backoff_s = min(FIRST_BACKOFF_S * 2**self._failures, MAX_BACKOFF_S)
        self._failures = min(self._failures + 1, 16)
        self._not_before_s = time.monotonic() + backoff_s
        logger.warning("data process of %s (pid %d) given up: %s", self.name, process.pid, why)

    async def _started(self, verb: str) -> _Process:
        async with self._starting:
            if self._process is None or self._process.gone:
                await self._sit_out_backoff(verb)
            self._abandoned = [process for process in self._abandoned if not process.reaped()]
            if self._closed:
                raise TierUnavailable(f"{self.name} is closed", tier=self.name, verb=verb)
            if self._process is None:
                process = self._spawn()
                await process.begin()
                self.starts += 1
                self._process = process
            return self._process

    async def _sit_out_backoff(self, verb: str) -> None:
        """Before a start: wait a moment, or raise where it would be long."""
        if self._process is not None:
            self._failed(self._process, "it ended")
        wait_s = self._not_before_s - time.monotonic() if self._failures > 1 else 0.0
        if 0 < wait_s <= MAX_PATIENCE_S:
            await asyncio.sleep(wait_s)
        elif wait_s > 0:
            raise TierUnavailable(
                f"{self.name} has failed {self._failures} times; next try in {wait_s:.1f} s",
                tier=self.name,
                verb=verb,
                retry_in_s=round(wait_s, 3),
            )

    def _spawn(self) -> _Process:
        # In the loop's own thread, not in one that ends: the child is told when *that* dies.
        with contextlib.ExitStack() as stack:
            log: IO[bytes] | int = subprocess.DEVNULL
            try:
                if self._log_path is not None:
                    log = stack.enter_context(Path(self._log_path).open("ab"))
                return _Process(self.name, log)
            except OSError as error:
                raise TierUnavailable(
                    f"no data process for {self.name} could be started: {error}", tier=self.name
                ) from error

    async def close(self) -> None:
        """End the process and collect it. Idempotent."""
        self._closed = True
        if self._process is not None:
            process, self._process = self._process, None
            process.end(f"{self.name} is closed")
            await process.closed()
            self._abandoned.append(process)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self._abandoned and time.monotonic() < deadline_s:
            self._abandoned = [process for process in self._abandoned if not process.reaped()]
            await asyncio.sleep(0.005 if self._abandoned else 0)


class Pool:
    """A worker for every root of a tier that was named, until nobody has a use for it."""

    def __init__(self, *, log_path: str | os.PathLike[str] | None = None) -> None:
        self._log_path = log_path
        self._workers: dict[tuple[str, Access], Worker] = {}

    def worker(self, ref: work.TierRef) -> Worker:
        """The worker of this root, not started yet if nothing was asked of it.

        Each set of credentials has a process of its own: they are in its environment.
        """
        place = (ref.path, ref.access)
        worker = self._workers.get(place)
        if worker is None:
            worker = Worker(ref.label or ref.kind, log_path=self._log_path)
            self._workers[place] = worker
        return worker

    def pids(self) -> list[int]:
        """Of all data processes that run now."""
        return [worker.pid for worker in self._workers.values() if worker.pid is not None]

    async def call(
        self,
        command: work.Command,
        timeout_s: float,
        on_progress: OnProgress | None = None,
        *,
        stall_s: float | None = None,
    ) -> work.Result:
        """Have a command carried out by the worker of its place; see ``Worker.call``."""
        place = work.place_of(command)
        if place is None:
            raise ValueError("a Ping is for one worker: pool.worker(ref).call(Ping())")
        worker = self.worker(place)
        return await worker.call(command, timeout_s, on_progress, stall_s=stall_s)

    async def forget(self, place: work.TierRef) -> None:
        """End the worker of a place; what it was doing fails as unavailable."""
        worker = self._workers.pop((place.path, place.access), None)
        if worker is not None:
            await worker.close()

    async def keep(self, places: Iterable[work.TierRef]) -> None:
        """End the workers of all other places of which nobody waits for anything."""
        kept = {(place.path, place.access) for place in places}
        idle = [at for at, each in self._workers.items() if at not in kept and not each.is_busy]
        await asyncio.gather(*(self._workers.pop(at).close() for at in idle))

    async def close(self) -> None:
        """End all of them. Idempotent."""
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))


def _environment() -> dict[str, str]:
    """This environment, in which the package is found even where it is not installed."""
    parent = str(Path(mtckpt.__file__).parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [parent, *paths]))}
