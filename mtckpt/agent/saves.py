"""What the agent knows of one save, of one slot, and of one slower tier of a run.

Plain state that never waits; ``runs`` keeps it consistent.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt._manifest import on_line
from mtckpt.agent.protocol import SaveChange, SlotGrant, TierConfig, WireError
from mtckpt.agent.queue import SaveFacts, SlotState
from mtckpt.agent.told import Told

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mtckpt._manifest import SaveName
    from mtckpt._twins import Twins
    from mtckpt.agent.findings import SaveScan
    from mtckpt.agent.work import SlotFiles, TierRef
    from mtckpt.errors import CheckpointError

__all__ = ["RAM", "Line", "Plan", "SaveState", "Slot", "TierState", "describe_failure", "new_id"]

RAM = "ram"
# Incarnations that the newest goes back to, each with the last step of it that counts.
Line = list[tuple[int, int | None]]
_STAGE_OF_KIND = {"disk": "local", "peers": "replicated", "store": "durable"}


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a slot."""

    shard_bytes: int
    table_bytes: int


@dataclass(slots=True, eq=False)
class Slot:
    """A slot, or a shard in RAM whose files can become one. ``save`` is set once it is sealed.

    ``doubtful``: CAPTURING as far as is known, and nobody may ever seal it (its agent restarted,
    or its seal failed); looked at when slots run short. ``refused``: its owner was told that the
    save failed, and does not seal it again.
    """

    slot_id: str
    state: SlotState
    shard_bytes: int
    table_bytes: int = 0
    inode: int = 0
    data_path: str = ""
    table_path: str = ""
    record_path: str = ""
    holder: str = ""
    rank: int = 0
    save: str = ""
    doubtful: bool = False
    refused: bool = False

    @staticmethod
    def of(files: SlotFiles, state: SlotState) -> Slot:
        """A slot whose files a data process has made."""
        return Slot(
            files.slot_id,
            state,
            files.shard_bytes,
            files.table_bytes,
            files.inode,
            files.data_path,
            files.table_path,
            files.record_path,
        )

    def grant(self) -> SlotGrant:
        return SlotGrant(
            self.slot_id, self.inode, self.data_path, self.table_path, self.record_path
        )

    def fits(self, plan: Plan) -> bool:
        """A shard that an earlier agent sealed has a table of a size not known before recycling."""
        return self.shard_bytes == plan.shard_bytes and self.table_bytes in (0, plan.table_bytes)


@dataclass(slots=True, eq=False)
class SaveState:
    """One save. ``ranks`` has, by tier label, the ranks whose records are there; none of them where
    only other files are. That is what this node can read, and may delete; what ranks of other nodes
    have is in ``told``, by node: at the lead what each said last, elsewhere what the lead did.

    ``guests`` are ranks whose shards are in RAM here as copies for other nodes; ``held_by`` has the
    boot ids of those that hold copies of this node's, ``held_agents`` the ids of their agents, and
    ``held_on`` the numbers of those that took them in this start of the job. ``wanted`` are stores
    that some node wants to have it before it goes."""

    name: SaveName
    save_id: str
    incarnation_id: str = ""
    world_size: int = 1
    size_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    reported: bool = False
    due: set[str] = field(default_factory=set)
    wanted: set[str] = field(default_factory=set)
    handed: bool = False  # this node goes, and has given its parts away, or is about to
    offered: bool = False  # likewise, once: who has taken them may find it whole, and be silent
    ranks: dict[str, set[int]] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    guests: set[int] = field(default_factory=set)
    held_by: set[str] = field(default_factory=set)
    held_agents: set[str] = field(default_factory=set)
    held_on: set[int] = field(default_factory=set)
    failed: dict[str, WireError] = field(default_factory=dict)
    owed_why: dict[str, str] = field(default_factory=dict)
    superseded: set[str] = field(default_factory=set)
    writing: set[str] = field(default_factory=set)
    uncommitted: set[str] = field(default_factory=set)
    weak: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    readers: int = 0
    heals: int = 0
    recycling: bool = False
    stages: list[str] = field(default_factory=list)
    called_off: str = ""
    plan_digest: str = ""
    disputed: bool = False  # ranks sealed parts of different plans
    remains: bool = False  # some ranks' slots were recycled before the agent started, others not
    inherited: bool = False  # an agent before this one had it in RAM, and may have had copies made
    found: bool = False  # by a scan: whether other nodes had it all is not for this one to say
    # Of what ranks hold alike: what those of this node have stored, and which leaves differ.
    twins: Twins = field(default_factory=dict)
    compared: bool = False
    diverged: dict[str, list[int]] = field(default_factory=dict)
    chosen: bool = False  # the job was restored from it, so all of it was there
    shard_bytes: dict[int, int] = field(default_factory=dict)  # by rank
    began_s: float = field(default_factory=lambda: time.monotonic())
    seq: int = 0
    # What trainers were told last, and the number from which on that is so.
    said: SaveChange | None = None
    said_seq: int = 0
    seen_at: float = field(default_factory=lambda: time.time())

    @property
    def order(self) -> tuple[int, int]:
        return (self.name.incarnation, self.name.step)

    def size_of(self, ranks: Iterable[int]) -> int:
        """Bytes of the shards of some ranks."""
        return sum(self.shard_bytes[rank] for rank in ranks)

    def note_found(self, entry: SaveScan) -> None:
        """What its records say, somewhere. RAM, which is read first, is right about metrics."""
        self.save_id = self.save_id or entry.save_id
        self.incarnation_id = self.incarnation_id or entry.incarnation_id
        self.world_size = entry.world_size or self.world_size
        self.size_bytes = max(self.size_bytes, entry.size_bytes)
        self.shard_bytes.update(zip(entry.ranks, entry.shard_bytes, strict=False))
        self.disputed |= not entry.complete and len(entry.ranks) == entry.world_size
        self.metrics = {**entry.metrics, **self.metrics}
        self.reported |= entry.reported
        self.plan_digest = self.plan_digest or entry.plan_digest

    def want_in(self, labels: Iterable[str]) -> None:
        """Tiers that are to get it; one that refused it before tries again."""
        for label in labels:
            self.due.add(label)
            self.superseded.discard(label)
            self.failed.pop(label, None)

    def also_want_in(self, labels: Collection[str]) -> None:
        """Stores that are to get it for the sake of a node that goes. What it has there already of
        this node's ranks is not brought again."""
        new = set(labels) - self.wanted
        self.wanted |= new
        own = self.ranks.get(RAM, set())
        self.want_in(label for label in new if not own <= self.ranks.get(label, set()))

    def forget_copy(self, label: str) -> None:
        """What is known of a copy of it that is no more."""
        self.ranks.pop(label, None)
        for known in (self.verified, self.damaged, self.uncommitted):
            known.discard(label)

    def is_complete(self, label: str) -> bool:
        """Whether all ranks have it there, those of other nodes on theirs; some are here."""
        return bool(self.ranks.get(label)) and self.is_whole(label)

    def is_whole(self, label: str) -> bool:
        """Whether all ranks have it there, on whatever node. Of what is called off parts may be
        left, and are no save."""
        if self.disputed or (label == RAM and self.called_off):
            return False
        if self.told.is_whole(label):
            return True
        here = self.ranks.get(label, set())
        if label == RAM and here:
            if self.chosen:
                return True
            here = here | self.guests  # copies are made of what was whole
        return _number_of(here, self.told.ranks(label)) >= self.world_size

    def is_verified(self, label: str) -> bool:
        """Whether all of it was read back there, by each node what it has."""
        if self.ranks.get(label) and label not in self.verified:
            return False
        if self.told.is_whole_and_read_back(label):
            return True
        here, far = self.ranks.get(label, set()), self.told.ranks_read_back(label)
        return _number_of(here, far) >= self.world_size

    def is_damaged(self, label: str) -> bool:
        """Whether some of it was found damaged there, on this node or another."""
        return label in self.damaged or self.told.is_damaged(label)

    def is_foreign(self, incarnation_id: str) -> bool:
        """Whether it is only known by name, of another incarnation of the same number."""
        return (
            not self.ranks and bool(self.incarnation_id) and self.incarnation_id != incarnation_id
        )

    def in_part(self, label: str) -> bool:
        """Whether some ranks have it there, on some node, and others do not."""
        somewhere = self.ranks.get(label) or self.told.ranks(label)
        return bool(somewhere) and not self.is_whole(label)

    @property
    def is_unsettled(self) -> bool:
        """Whether parts of it are in RAM, on some node, and it is neither known to have been whole
        nor called off."""
        was_whole = self.stages or self.chosen
        return self.in_part(RAM) and not (self.called_off or was_whole)

    @property
    def is_open(self) -> bool:
        """Whether other parts of it may still come."""
        return self.is_unsettled and not self.remains

    def is_nowhere(self, incarnation: int) -> bool:
        """Whether it lies nowhere any more. What other nodes have of one that goes on is no news:
        they do not say that it is gone. What was never touched has just come, and its parts are
        next. ``incarnation`` is the newest."""
        is_told = self.name.incarnation < incarnation or not self.stages
        there = self.ranks or self.guests or self.writing or (is_told and self.told.labels())
        return bool(self.seq) and not there

    def lacks(self, rank: int) -> bool:
        """Whether its part is not in RAM, as far as is known here."""
        return rank not in self.ranks.get(RAM, ()) and rank not in self.told.ranks(RAM)

    def lacking(self) -> list[int]:
        """All such ranks; to be asked where it matters which, as there may be many."""
        return [rank for rank in range(self.world_size) if self.lacks(rank)]

    def failures(self) -> dict[str, WireError]:
        """Why it does not reach some tiers: for all ranks, since one of them fails for all."""
        return {**self.told.failures(), **self.failed}

    def passed_over(self) -> set[str]:
        """Tiers that take a newer save instead, on some node and so on all."""
        return self.superseded.union(self.told.superseded())

    @property
    def owed(self) -> frozenset[str]:
        """Tiers that this save is to reach, and still may."""
        if not self.due:
            return frozenset()
        due = self.due - self.failures().keys() - self.passed_over()
        return frozenset(label for label in due if not self.is_complete(label))

    @property
    def is_staged(self) -> bool:
        return RAM in self.ranks and self.is_complete(RAM) and not self.recycling

    def note_twins(self, rank: int, twins: dict[str, str]) -> None:
        """What a rank of this node has stored of what others hold too."""
        for boxes, roots in twins.items():
            self.twins.setdefault(boxes, {}).setdefault(roots, []).append(rank)

    def is_on(self, line: Line) -> bool:
        """Whether no restore of an older step has abandoned it."""
        return not line or on_line(self.name, line)

    def worth(self, line: Line) -> tuple[bool, tuple[int, int]]:
        """See ``SaveFacts.worth``."""
        return (self.is_on(line), self.order)

    @property
    def is_replicated(self) -> bool:
        """Whether it outlives the loss of any one node."""
        return not {"replicated", "durable"}.isdisjoint(self.stages)

    def facts(
        self, *, has_source: bool, owed: frozenset[str], line: Line, copied: bool = False
    ) -> SaveFacts:
        return SaveFacts(
            str(self.name),
            self.order,
            has_source,
            owed,
            frozenset(self.writing),
            self.readers,
            copied=copied,
            replicated=self.is_replicated,
            on_line=self.is_on(line),
        )

    @property
    def apart_from_guests(self) -> list[int] | None:
        """The ranks to name where this node's own parts go and guests stay; None: all there is."""
        return sorted(self.ranks.get(RAM, set())) if self.guests else None

    def change(self) -> SaveChange:
        owed = self.owed
        return SaveChange(
            self.save_id,
            self.name.step,
            list(self.stages),
            self.failures(),
            {label: why for label, why in self.owed_why.items() if label in owed},
            sorted(self.passed_over()),
            [] if self.called_off else sorted(owed),
            self.called_off,
            sorted(self.weak),
        )


@dataclass(slots=True, eq=False)
class TierState:
    """A slower tier of a run. ``wake`` is set when there may be something to do for it, ``retry``
    when what failed is to be tried again at once. ``scanned``: what is there is known; ``known``:
    it was, and may be looked at again."""

    label: str
    config: TierConfig
    ref: TierRef
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    retry: asyncio.Event = field(default_factory=asyncio.Event)
    scanned: bool = False
    known: bool = False
    problem: str = ""
    attempts: int = 0
    owed_since_s: float | None = None
    bytes_per_s: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0
    small_owed: dict[str, bytes] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    to_keep: int = 0
    keeping: asyncio.Lock = field(default_factory=asyncio.Lock)
    again: asyncio.Task[None] | None = None
    looking: bool = False  # somebody waits to see what can go
    resting: bool = False  # nothing is done in it, so that who reads what goes can end
    undeleted: set[str] = field(default_factory=set)
    denied: str = ""  # why a store lets nothing be deleted

    @property
    def stage(self) -> str | None:
        return _STAGE_OF_KIND.get(self.config.kind)

    @property
    def is_store(self) -> bool:
        return self.config.kind == "store"

    @property
    def is_peers(self) -> bool:
        """Whether what it has is in the memory of other nodes, whose agents look after it."""
        return self.config.kind == "peers"


def _number_of(here: set[int], far: Collection[int]) -> int:
    """Ranks of either; the first are few."""
    return len(far) + sum(rank not in far for rank in here)


def describe_failure(error: CheckpointError) -> str:
    """An error in one line, for status and warnings."""
    return f"{type(error).__name__}: {error.what}"


def new_id() -> str:
    """The id of a slot: drawn, so that no two starts of an agent give the same."""
    return os.urandom(6).hex()
