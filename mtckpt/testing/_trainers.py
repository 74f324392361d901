"""Trainers of a simulated job: the shipped session, saver and restore, over places in memory.

Knows how a rank's process puts the package's parts together, as ``Checkpointer`` does, and how a
shard gets into a slot step by step. The state that it saves is which save and rank it is of.
Decides nothing that the package decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mtckpt import _manifest, _restorer, _run, _save, _saver, _session
from mtckpt._handle import Restored, Save, stage_of_tier
from mtckpt._manifest import Record
from mtckpt._pieces import Recipe
from mtckpt._schedule import Ram
from mtckpt.agent import protocol
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import (
    CaptureFailed,
    CheckpointError,
    RankTimeout,
    UnsupportedState,
    UsageError,
)
from mtckpt.testing._devices import (
    DATA_BYTES,
    TABLE_BYTES,
    File,
    SlotFiles,
    content_of,
    shard_entry,
    table_of,
)
from mtckpt.testing._settings import RUN, Settings
from mtckpt.testing._virtual import Time
from mtckpt.testing.cluster import Node, Process, World

if TYPE_CHECKING:
    import asyncio

__all__ = ["Group", "Rank"]


class Group:
    """What joins the ranks of one job. ``member`` makes the group of one rank."""

    def __init__(self, world: World, world_size: int) -> None:
        self.world = world
        self.world_size = world_size
        self._given: dict[int, dict[int, bytes]] = {}
        self._come: dict[int, asyncio.Future[None]] = {}

    def member(self, rank: int) -> Member:
        return Member(self, rank)

    def meet(self, turn: int, rank: int, value: bytes, timeout_s: float) -> list[bytes]:
        fiber = self.world.loop.fiber
        assert fiber is not None
        fiber.sleep(self.world.delay_s())
        given = self._given.setdefault(turn, {})
        come = self._come.setdefault(turn, self.world.loop.create_future())
        given[rank] = value
        if len(given) == self.world_size and not come.done():
            come.set_result(None)
        fiber.pause(come, timeout_s)
        missing = [rank for rank in range(self.world_size) if rank not in given]
        if missing:
            raise RankTimeout(f"ranks {missing} did not come", rank=missing[0], ranks=missing)
        return [given[rank] for rank in range(self.world_size)]


class Member:
    """See ``_coordination.Group``."""

    def __init__(self, group: Group, rank: int) -> None:
        self.rank = rank
        self.world_size = group.world_size
        self._group = group
        self._turn = 0

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        del stage
        turn, self._turn = self._turn, self._turn + 1
        return self._group.meet(turn, self.rank, value, timeout_s)


# -- capturing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """As much of a layout as the saver looks at."""

    size_bytes: int = DATA_BYTES
    table_bytes: int = TABLE_BYTES


@dataclass(frozen=True, slots=True)
class Plan:
    digest: str
    layout: Layout = Layout()
    recipe: Recipe = field(default_factory=lambda: Recipe((), "", {}, [], {}, True))


@dataclass(frozen=True, slots=True)
class Captured:
    plan: Plan


class Planner:
    """In the place of the planner: ``state`` has the digest of a plan, or what cannot be saved."""

    members: Any = None

    def prepare(self, state: Any, adapters: Sequence[Any]) -> Captured:
        del adapters
        if state == "bad":
            raise UnsupportedState("this cannot be saved", path="")
        return Captured(Plan(str(state)))


@dataclass(slots=True)
class Mapped:
    """A slot as a process has mapped it: its files, whatever they are called by now."""

    grant: protocol.SlotGrant
    data: File
    table: File


class Ring:
    """In the place of ``_save.SlotRing``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._slots: dict[int, Mapped] = {}

    def held(self) -> dict[str, int]:
        return {slot.grant.slot_id: inode for inode, slot in self._slots.items()}

    def adopt(self, grant: protocol.SlotGrant, layout: Any) -> Mapped:
        del layout
        slot = self._slots.get(grant.inode)
        if slot is None:
            files = self._process.node.ram.slots.get(RUN, {}).get(grant.slot_id, SlotFiles())
            data, table = files.data, files.table
            if data is None or table is None or data.inode != grant.inode:
                raise CaptureFailed("the slot is not the one that was granted", tier="ram")
            slot = self._slots[grant.inode] = Mapped(grant, data, table)
        slot.grant = grant
        return slot

    def write(self, grant: protocol.SlotGrant, work: Callable[[], None]) -> None:
        """Nothing: the shard is written at once."""

    def withhold(self, grant: protocol.SlotGrant) -> bool:
        del grant
        return False  # there are no devices

    def withheld(self) -> list[str]:
        return []

    def has(self, size: tuple[int, int]) -> bool:
        del size
        return bool(self._slots)

    def fits(self, grant: protocol.SlotGrant, layout: Any) -> bool:
        del layout
        return grant.inode in self._slots

    def clear(self) -> None:
        self._slots.clear()


class Written:
    """A shard that was written at once."""

    is_captured = True
    is_done = True

    def finish(self) -> None:
        """Nothing is left."""


def begin(world: World) -> Callable[..., Written]:
    """In the place of ``_writing.Writing``, in its order, with time between its steps."""

    def write(
        captured: Captured,
        slot: Mapped,
        identity: _save.Identity,
        engine: Any,
        *,
        due: Sequence[str],
        metrics: Mapping[str, float],
        every: int,
        mode: str,
        may_leave: bool,
        write: Any,
    ) -> Written:
        del engine, mode, may_leave, write
        fiber = world.loop.fiber
        assert fiber is not None
        process: Process = fiber.owner
        data = content_of(identity.save_id, identity.rank)
        pause_s = world.random.random() * 0.02
        slot.table.content = table_of(b"")
        slot.data.content = data[: DATA_BYTES // 2] + slot.data.content[DATA_BYTES // 2 :]
        fiber.sleep(pause_s)
        slot.data.content = data
        record = Record(
            _manifest.FORMAT_VERSION,
            identity.run,
            identity.step,
            identity.incarnation,
            identity.incarnation_id,
            identity.save_id,
            identity.rank,
            identity.world_size,
            captured.plan.digest,
            shard_entry(data, identity.save_id),
            "",
            msgspec.Raw(b"[]"),
            msgspec.Raw(b"{}"),
            msgspec.Raw(b"[]"),
            host=process.node.name,
            saved_at_s=Time(world.loop).time(),
            every=every,
            metrics=dict(metrics),
            due=tuple(due),
        )
        slots = process.node.ram.slots.setdefault(RUN, {})
        files = slots.setdefault(slot.grant.slot_id, SlotFiles())
        files.record = File(_manifest.encode_sealed(record))
        fiber.sleep(pause_s / 2)
        slot.table.content = table_of(data, identity.save_id)
        return Written()

    return write


# -- a rank ----------------------------------------------------------------------------------------


class Rank:
    """One rank of a job. ``told`` hears what it did: its restore, and each of its saves."""

    def __init__(self, node: Node, group: Group, rank: int, settings: Settings, told: Any) -> None:
        self.world = node.world
        self.node = node
        self.rank = rank
        self.settings = settings
        self.told = told
        self.process = Process(node)
        self.error: CheckpointError | None = None
        self.saves: list[Save] = []
        self.closed = False
        self.num_restores = 0
        self._group = group
        self._script: Callable[[Rank], None] = lambda _: None

    @property
    def has_opened(self) -> bool:
        """Whether its agent knows it."""
        return hasattr(self, "session") and self.session.opened is not None

    def start(self, script: Callable[[Rank], None]) -> None:
        """Run ``script`` in the rank's process."""
        self._script = script
        self.main = self.process.spawn(self._run)

    def _run(self) -> None:
        try:
            self._open()
            self._script(self)
        except CheckpointError as error:
            if type(error) is UsageError:
                raise  # no script does what may not be done
            self.world.note(f"rank {self.rank} ends: {type(error).__name__}: {error.what}")
            self.error = error

    def _open(self) -> None:
        tiers = self.settings.tiers()
        configs = [
            protocol.tier_config(label, tier, [{"last": self.settings.keep}] if tier.keep else [])
            for label, tier in tiers
        ]
        self.session = _session.Session(
            RUN, RUN, configs, "", timeout_s=self.settings.timeout_s, on_error=lambda *_: None
        )
        self.session.pid = self.process.pid
        labels = [label for label, _ in tiers]
        member = self._group.member(self.rank)
        self.run = _run.Run(
            RUN, RUN, self.session, [t for _, t in tiers], labels, self.settings.timeout_s, member
        )
        self.saver = _saver.Saver(
            self.run,
            CpuEngine(),
            Ram(slots=self.settings.slots),
            insists=True,
        )
        ring = Ring(self.process)
        self.saver.ring = ring  # type: ignore[assignment]  # it stands in for the real one
        self.session.held = ring.held
        self.saver._planner = Planner()  # type: ignore[assignment]  # it stands in for the real one

    def restore(self, step: int | Literal["latest"] = "latest") -> Restored:
        """As ``Checkpointer.restore``."""
        self.run.join()
        self.session.open()
        self.saver.await_staged(self.settings.timeout_s / 2)
        state: dict[str, Any] = {}
        restored = _restorer.restore(
            self.run,
            None,  # type: ignore[arg-type]  # it stands in for the real one
            state,
            step,
            None,
            False,
            None,
        )
        _restorer.go_on(self.run, restored, None)
        if restored:
            self.saver.steps.clear()
        self.num_restores += 1
        self.told.restored(self, restored, state.get("read"), step)
        return restored

    def save(self, step: int, state: str = "plan") -> Save | None:
        """As ``Checkpointer.save``; None where the state could not be saved."""
        is_first = self.run.incarnation is None or not self.saver.ring.has((0, 0))
        started_s = self.world.loop.time()
        try:
            due, stall_s = self.settings.due(step), self.settings.max_stall_s
            if state == "plan":
                state = f"plan/{len(self.run.members.node)}"  # see ``are_alike``
            save = self.saver.save(step, state, {}, due, 0, stall_s)
        except CheckpointError as error:
            self.world.note(f"rank {self.rank} does not save {step}: {error.what}")
            if self.session.fenced is not None or type(error) is UsageError:
                raise
            return None
        finally:
            # The first one starts an incarnation with all ranks, and gets memory.
            if not is_first and self.process.stopped_s < started_s:
                self.told.stalled(self, step, self.world.loop.time() - started_s)
        self.saves.append(save)
        self.told.saved(self, save)
        return save

    def sleep(self, pause_s: float) -> None:
        """Train."""
        fiber = self.world.loop.fiber
        assert fiber is not None
        fiber.sleep(pause_s)

    def close(self, timeout_s: float) -> None:
        """As ``Checkpointer.close``: what was staged last goes to every tier."""
        session = self.session
        deadline_s = self.world.loop.time() + timeout_s
        session.wait_idle(timeout_s)
        last = self.saver.last
        if last is not None:
            last._plan({label: stage_of_tier(label) for label, _ in self.settings.tiers()})
            session.watch(last)
            session.call("flush", protocol.Flush(session.holder), protocol.Done)
            while not last.done() and self.world.loop.time() < deadline_s:
                last._pause(0.2)
        session.stop_listening()
        message = protocol.Close(session.holder, free_ram=True, wait_s=1.0)
        session.call("close", message, protocol.Done)
        self.told.closed(self)
        session.close(5.0)
        self.closed = True
