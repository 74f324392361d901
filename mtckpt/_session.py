"""One Checkpointer's conversation with the node agent.

Knows the agent's client, one thread that hands over captured slots (the courier) and one that
hears what became of them (the listener). Does not know state or tiers' contents. An agent that
goes away is started again and told what this process holds; what it had sealed lies in files.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from mtckpt._turns import Turns
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import ensure_agent
from mtckpt.capture.base import nothing
from mtckpt.errors import AgentTooOld, AgentUnavailable, CheckpointError, RunLocked

if TYPE_CHECKING:
    from mtckpt._handle import Save

__all__ = ["Session", "start_ticks"]

logger = logging.getLogger(__name__)

_LISTEN_S = 20.0
_RETRY_S = 0.5
_OPEN_RETRIES = 3
_CALL_RETRIES = 3
_REOPEN_PAUSE_S = 0.05
_T = TypeVar("_T")
_R = TypeVar("_R")


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/pid/stat; with the pid it names a process for good. 0 if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _ours(error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"{type(error).__name__}: {error}")


def _left_s(deadline_s: float) -> float:
    return max(0.1, deadline_s - time.monotonic())


class Session:
    """See the module. ``on_error`` is told each error that no call of the user's will raise."""

    def __init__(
        self,
        run: str,
        run_key: str,
        tiers: Sequence[protocol.TierConfig],
        ram_path: str,
        *,
        timeout_s: float,
        on_error: Callable[[Save, CheckpointError], None],
    ) -> None:
        self.run = run
        self.run_key = run_key
        self.tiers = list(tiers)
        self.ram_path = ram_path
        self.timeout_s = timeout_s
        self.holder = os.urandom(16).hex()
        self.pid = os.getpid()
        self.incarnation = 0
        self.rank = 0
        self.world_size = 1
        self.opened: protocol.Opened | None = None
        self.joined: protocol.Join | None = None  # of a job on several nodes
        self.fenced: RunLocked | None = None
        self.next_slot: protocol.SlotGrant | None = None
        self.called_off = 0  # saves that were handed over, and called off by whichever rank
        self.held: Callable[[], dict[str, int]] = dict
        self._on_error = on_error
        self._client: AgentClient | None = None
        self._opening = Turns()  # which an interrupt amid a call cannot leave taken
        self._saves: dict[str, Save] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._handing = threading.Lock()  # a job comes, or there is none: never both
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._closing = threading.Event()

    # -- connection ------------------------------------------------------------------------------

    def open(self) -> protocol.Opened:
        """Reach the agent, starting one if there is none, and open the run there."""
        return self._connected()[1]

    def _open(self, deadline_s: float) -> protocol.Opened:
        """Open the run. An agent that is just dying may still take a connection: tried again."""
        errors: list[AgentUnavailable] = []
        while True:
            try:
                return self._open_once(deadline_s)
            except AgentTooOld:
                raise
            except AgentUnavailable as error:
                is_late = time.monotonic() + _RETRY_S > deadline_s
                if is_late and errors:  # that no time was left is not what is the matter
                    raise errors[-1] from error
                errors.append(error)
                if is_late or len(errors) > _OPEN_RETRIES:
                    raise
                logger.info("run %s: %s; trying again", self.run, error.what)
                time.sleep(_REOPEN_PAUSE_S)

    def _open_once(self, deadline_s: float) -> protocol.Opened:
        client = AgentClient(ensure_agent(_left_s(deadline_s)), self.timeout_s)
        message = protocol.Open(
            protocol=protocol.PROTOCOL_VERSION,
            run=self.run,
            holder=self.holder,
            rank=self.rank,
            world_size=self.world_size,
            pid=self.pid,
            start_ticks=start_ticks(self.pid),
            parent_pid=os.getppid(),
            ram_path=self.ram_path,
            tiers=self.tiers,
            incarnation=self.incarnation,
            held=self._held(),
            token=os.environ.get("MTCKPT_TOKEN", ""),
            patience_s=_left_s(deadline_s),
        )
        path = f"/v1/runs/{self.run_key}"
        opened = client.call(f"{path}/open", message, protocol.Opened, _left_s(deadline_s))
        if self.joined is not None:  # which another agent may not have found in its memory
            client.call(f"{path}/join", self.joined, protocol.Done, _left_s(deadline_s))
        self._client = client
        if opened.unlooked:
            logger.warning(
                "run %s: slots that an earlier start may have on disk are passed over, and with"
                " them steps that may be newer than all others: %s",
                self.run, opened.unlooked,
            )  # fmt: skip
        return opened

    def _held(self) -> dict[str, int]:
        """Every slot that is ours: those that are mapped, and one granted and not yet mapped."""
        ahead = self.next_slot
        return {**self.held(), **({ahead.slot_id: ahead.inode} if ahead is not None else {})}

    def move_slots(self, ram_path: str) -> protocol.Opened:
        """Open again with slots in another directory."""
        deadline_s = time.monotonic() + self.timeout_s

        def move() -> protocol.Opened:
            before, self.ram_path = self.ram_path, ram_path
            try:
                self.opened = self._open(deadline_s)
            except BaseException:  # an interrupt as well: the next save moves again
                self.ram_path = before
                raise
            return self.opened

        return self._alone(deadline_s, move)

    def listen(self, towards: str) -> protocol.PeerAddress:
        """Where other nodes reach this one's agent, from now on. ``towards`` is where the ranks
        meet, "" if that is not known."""
        host = os.environ.get("MTCKPT_PEER_HOST", "")
        towards = towards or os.environ.get("MASTER_ADDR", "")
        message = protocol.Listen(self.holder, host, towards)
        return self.call("listen", message, protocol.PeerAddress)

    def join(self, nodes: protocol.Join) -> None:
        """Tell this node's agent of the others, now and whenever another agent has its place."""
        message = msgspec.structs.replace(nodes, holder=self.holder)
        self.call("join", message, protocol.Done)
        self.joined = message

    def call(
        self, verb: str, message: Any, reply_type: type[_T], timeout_s: float | None = None
    ) -> _T:
        """One call about this run. An agent that has gone is started again, a few times a call."""
        path = f"/v1/runs/{self.run_key}/{verb}"
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        client = self._connected(deadline_s)[0]
        for _ in range(_CALL_RETRIES):
            self._check_heeded(message)
            try:
                return client.call(path, message, reply_type, _left_s(deadline_s))
            except AgentUnavailable:
                if deadline_s - time.monotonic() < _RETRY_S or self._closing.is_set():
                    raise
            client = self._reopen(client, deadline_s)
        self._check_heeded(message)
        return client.call(path, message, reply_type, _left_s(deadline_s))

    def _check_heeded(self, message: Any) -> None:
        """Raises AgentTooOld for a seal that says what was left, where an agent that does not look
        at it has taken the place of one that would have."""
        if isinstance(message, protocol.Seal) and message.left and not self.checks_left:
            raise AgentTooOld(
                "an older node agent has taken this one's place, and does not check what was left",
                state="nothing was sealed; earlier saves are unchanged",
                run=self.run,
            )

    def _alone(self, deadline_s: float, work: Callable[[], _R]) -> _R:
        """One thread opens the run at a time, and none waits longer for it than its call may."""

        def late(_: str) -> NoReturn:
            raise AgentUnavailable(
                "the node agent does not answer: another thread waits for it", run=self.run
            )

        return self._opening.take("open", _left_s(deadline_s), work, late)

    def _connected(self, deadline_s: float | None = None) -> tuple[AgentClient, protocol.Opened]:
        """The client, and what the agent that it talks to answered when the run was opened."""
        until_s = time.monotonic() + self.timeout_s if deadline_s is None else deadline_s

        def connect() -> tuple[AgentClient, protocol.Opened]:
            if self.opened is None:
                self.opened = self._open(until_s)
            assert self._client is not None
            return self._client, self.opened

        return self._alone(until_s, connect)

    def status(self) -> protocol.AgentStatus:
        """The whole agent's status."""
        return self._connected()[0].call("/status", None, protocol.AgentStatus)

    def watch(self, save: Save) -> None:
        """Hear about ``save`` again, though it had been done with."""
        self._saves[save.id] = save

    def stop_listening(self) -> None:
        """No error of the agent's matters any more; the listener ends with its next answer."""
        self._closing.set()

    def _reopen(self, failed: AgentClient, deadline_s: float) -> AgentClient:
        def reopen() -> AgentClient:
            if self._client is failed:
                logger.warning("run %s: the node agent went away, starting another", self.run)
                self.opened = self._open(deadline_s)
                failed.close()
            assert self._client is not None
            return self._client

        return self._alone(deadline_s, reopen)

    # -- saves -----------------------------------------------------------------------------------

    def submit(
        self,
        seal: protocol.Seal,
        save: Save,
        after: Callable[[], None],
        finish: Callable[[], bytes | None] | None = None,
        taken: Callable[[], None] = nothing,
    ) -> None:
        """Hand a captured slot over, in the background. ``after`` runs once a next one is known.

        ``finish`` runs before, where not all bytes are in the slot yet; what it returns is
        ``Seal.left``, what it raises (CheckpointError) is told of the save, which is then not
        handed over; nor is one of which it returns None. ``taken`` runs first: an interrupt cannot
        come between it and what is done.
        """

        def job() -> None:
            taken()
            self._saves[save.id] = save
            self._seal(seal, save, after, finish)

        self._hand(job)

    @property
    def checks_left(self) -> bool:
        """Whether the agent looks at what a seal says was left in the slot."""
        return self.opened is not None and self.opened.checks_left

    def call_off(self, save: Save, reason: str) -> None:
        """Tell the agent, in the background if possible, that this rank takes no part in a save."""
        message = protocol.CallOff(self.holder, save.id, save.step, reason)

        def tell() -> None:
            try:
                self.call("calloff", message, protocol.Done)
            except CheckpointError as error:
                # The others then find out by their deadline.
                logger.warning("run %s: %s", self.run, error.what)

        try:
            self._hand(tell)
        except AgentUnavailable:  # there is no thread for it
            tell()

    def _seal(
        self,
        seal: protocol.Seal,
        save: Save,
        after: Callable[[], None],
        finish: Callable[[], bytes | None] | None,
    ) -> None:
        try:
            if finish is not None:
                if (left := finish()) is None:
                    return
                seal = msgspec.structs.replace(seal, left=left)
            sealed = self.call("seal", seal, protocol.Sealed)
        except Exception as error:  # noqa: BLE001 - told of the save, whatever it is
            if isinstance(error, AgentTooOld):
                self._give_up(seal, save)
            self._tell(save, failed={"ram": _ours(error)})
            return
        is_off = bool(sealed.called_off)
        if sealed.staged:
            self._tell(save, stages=("captured", "staged"))
        elif sealed.failed is not None:
            self._tell(save, failed={"ram": protocol.error_from_wire(sealed.failed)}, is_off=is_off)
        elif sealed.called_off:
            self._tell(save, skipped=sealed.called_off, is_off=is_off)
        self.next_slot = sealed.next_slot
        after()

    def _give_up(self, seal: protocol.Seal, save: Save) -> None:
        """The slot of what is not sealed goes back, and no other rank waits for it."""
        with contextlib.suppress(CheckpointError):  # the next save says what is the matter
            self.call("release", protocol.Release(self.holder, seal.slot_id), protocol.Done)
        if self.world_size > 1:
            self.call_off(save, "the node agent was replaced by an older one")

    def wait_idle(self, timeout_s: float) -> bool:
        """True once the courier has handed over everything."""
        return self._idle.wait(timeout_s)

    def _hand(self, job: Callable[[], None]) -> None:
        self.start()
        with self._handing:
            try:
                self._idle.clear()
                self._jobs.put(job)
            except BaseException:
                # An interrupt: whether or not the job is handed over, the courier says when it is
                # done with all that are.
                self._jobs.put(nothing)
                raise

    def start(self) -> None:
        """Have the threads that hand over and hear. Raises AgentUnavailable where there is none."""
        with self._starting:
            for work in (self._courier, self._listener)[len(self._threads) :]:
                name = f"mtckpt-{work.__name__.strip('_')}"
                unwanted: list[bool] = []
                begin = functools.partial(self._begin, work, unwanted)
                thread = threading.Thread(target=begin, name=name, daemon=True)
                before = list(self._threads)
                try:
                    self._threads.append(thread)
                    thread.start()
                except BaseException as error:
                    self._threads = before
                    unwanted.append(True)
                    if not isinstance(error, RuntimeError):
                        raise  # an interrupt, after which the thread may begin all the same
                    raise AgentUnavailable(
                        f"there is no thread to speak to the node agent: {error}",
                        actions=[
                            "see the limits of this process: ulimit -u, pids.max of its cgroup"
                        ],
                    ) from error

    def _begin(self, work: Callable[[], None], unwanted: Sequence[bool]) -> None:
        """``unwanted`` has something where an interrupt came: another thread is started then."""
        with self._starting:  # until that is known
            pass
        if not unwanted:
            work()

    def _courier(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # The loop must live: nobody else hands over what is captured after this.
                logger.exception("run %s: handing over failed", self.run)
            finally:
                with self._handing:
                    if self._jobs.empty():
                        self._idle.set()

    def _listener(self) -> None:
        heard: tuple[protocol.Opened | None, int] = None, 0
        while not self._closing.is_set():
            try:
                client, opened = self._connected()
                # Each agent counts from zero: what one has told is no place in another's count.
                since = heard[1] if heard[0] is opened else 0
                changes = self._changes(client, opened.agent_id, since)
            except Exception as error:  # noqa: BLE001 - whatever it is, it may pass
                # The loop must live: what is owed is reported when an agent answers again.
                logger.debug("listening to the agent: %s", error)
                heard = None, 0
                self._closing.wait(_RETRY_S)
                continue
            if changes is None:
                continue
            heard = opened, changes.seq
            if changes.fenced is not None:
                told = protocol.error_from_wire(changes.fenced)
                self.fenced = told if isinstance(told, RunLocked) else RunLocked(told.what)
            for change in changes.saves:
                self._take_in(change)

    def _changes(self, client: AgentClient, agent_id: str, since: int) -> protocol.Changes | None:
        """What happened after ``since``; None if another agent was started instead."""
        path = (
            f"/v1/runs/{self.run_key}/changes?since={since}&timeout_s={_LISTEN_S:.0f}"
            f"&holder={self.holder}&agent={agent_id}"
        )
        try:
            return client.call(path, None, protocol.Changes, _LISTEN_S + self.timeout_s)
        except AgentUnavailable:
            if self._closing.is_set():
                raise
            self._reopen(client, time.monotonic() + self.timeout_s)
            return None

    def _take_in(self, change: protocol.SaveChange) -> None:
        save = self._saves.get(change.save_id)
        if save is not None:
            self._tell(
                save,
                stages=change.stages,
                failed={
                    label: protocol.error_from_wire(wire) for label, wire in change.failed.items()
                },
                owed=change.owed,
                superseded=change.superseded,
                waiting=change.waiting,
                skipped=None if change.failed else change.called_off or None,
                weak=bool(change.weak),
                is_off=bool(change.called_off),
            )

    def _tell(self, save: Save, *, is_off: bool = False, **news: Any) -> None:
        if news.get("skipped") and not save.skipped:
            logger.warning(
                "run %s: the save of step %d was called off: %s",
                self.run, save.step, news["skipped"],
            )  # fmt: skip
        save._advance(**news, on_error=self._on_error)
        if save.done() and self._saves.pop(save.id, None) is not None and is_off:
            self.called_off += 1

    # -- end -------------------------------------------------------------------------------------

    def close(self, timeout_s: float, last: Callable[[], None] | None = None) -> None:
        """Stop both threads and drop the connections. What is under way goes on in the agent.

        ``last`` is done once the courier has handed over everything, however long that takes.
        """
        self._closing.set()
        if last is not None and self._threads:
            self._jobs.put(last)
        elif last is not None:
            last()
        self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        if self._client is not None:
            self._client.close()
