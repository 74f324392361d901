"""What the agent knows of a run: owners, slots, saves and where each stands, tiers.

Plain state, kept consistent by small methods that never wait. Does not move bytes, does not talk,
does not decide (``queue``). All of it can be found again by reading the tiers: an agent that dies
takes nothing along that anybody was promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from mtckpt._inventory import line_of
from mtckpt._manifest import Incarnation, SaveName
from mtckpt.agent import protocol, work
from mtckpt.agent.owners import uptime_s
from mtckpt.agent.queue import SaveFacts, SlotState
from mtckpt.agent.saves import RAM, Line, Plan, SaveState, Slot, TierState
from mtckpt.errors import AgentUnavailable, RunLocked

if TYPE_CHECKING:
    from mtckpt.agent.links import Link
    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.work import TierRef

__all__ = ["RunState"]

# Saves that lie nowhere any more. Whatever is done for a save looks at all that are known.
MAX_KEPT_CHANGES = 200
PARTNER_PATIENCE_S = 60.0  # of slots, with partners that do not answer


@dataclass(eq=False)
class RunState:
    """All of one run on this node."""

    run: str
    key: str
    ram: TierRef
    tiers: dict[str, TierState] = field(default_factory=dict)
    owners: dict[int, Owner] = field(default_factory=dict)
    layout: Layout | None = None  # of a job on several nodes
    secret: str = ""
    # The start of the job, by its secret, that copies were given back in, and their placement told.
    given_back_in: str | None = None
    placement_told_in: str | None = None
    links: dict[int, Link] = field(default_factory=dict)
    draining: str = ""  # why nothing new is begun here
    drained: bool = False  # what was here is elsewhere: of anything later nobody would know
    # How often something in this node's memory did not verify, and so with other nodes, by number.
    failures: int = 0
    troubles: Counter[int] = field(default_factory=Counter)
    leaving: set[int] = field(default_factory=set)  # other nodes that are about to go
    fenced: dict[str, Owner] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    saves: dict[str, SaveState] = field(default_factory=dict)
    incarnations: dict[int, Incarnation] = field(default_factory=dict)
    begun: dict[int, Incarnation] = field(default_factory=dict)  # here; others were found
    plans: dict[str, tuple[Plan, int]] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    finished: list[str] = field(default_factory=list)
    # What an agent before this one had noted: whose shards are copies, and what was restored from.
    noted_guests: dict[str, list[int]] = field(default_factory=dict)
    noted_chosen: set[str] = field(default_factory=set)
    noted_diverged: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    token: str = ""
    closing: bool = False
    gone: bool = False
    doubted: bool = False  # what it has in RAM may not be what is there
    creator_uid: int = -1
    admitted: set[int] = field(default_factory=set)  # users who knew its token
    settling: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    chores: asyncio.Task[None] | None = None
    unsettled: list[Owner] = field(default_factory=list)  # dead, and their slots are still theirs
    left_s: float = field(default_factory=uptime_s)  # when its last owner left, or it was found
    scrubbed_s: float = field(default_factory=lambda: time.monotonic())
    begun_s: float = 0.0  # when the incarnation did
    allocating: int = 0
    emptying: bool = False  # its memory: nothing is made in it, and no copies are taken
    seq: int = 0
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    sealing: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # While somebody has one, or waits for it: there are as many as there ever were saves.
    _locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(
        default_factory=WeakValueDictionary
    )

    # -- who -------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        return max(self.incarnations, default=0)

    def living(self) -> list[Owner]:
        return [o for o in (*self.owners.values(), *self.fenced.values()) if not o.dead]

    def owner_of(self, holder: str) -> Owner:
        """The owner with this holder. Raises RunLocked if it is fenced, AgentUnavailable if it has
        not opened the run with this agent: it does so then, and says which slots are its own."""
        for owner in self.owners.values():
            if owner.holder == holder:
                if owner.absent:
                    raise self._unopened()
                owner.heard_s = time.monotonic()
                return owner
        if holder not in self.fenced and not any(not o.dead for o in self.owners.values()):
            raise self._unopened()
        raise self.locked_out(holder)

    def _unopened(self) -> AgentUnavailable:
        return AgentUnavailable(
            "this agent does not know who asks", actions=["open the run again"], run=self.run
        )

    def locked_out(self, holder: str) -> RunLocked:
        """Why a holder may not speak for the run any more."""
        current = next(iter(self.owners.values()), None)
        what = "this process does not own the run; it may have been closed"
        return RunLocked(
            "another process has taken this run over" if self.fenced.get(holder) else what,
            state="saves of this process are refused; what it saved before is kept",
            actions=["end this process, or open the run again in a new Checkpointer"],
            run=self.run,
            owner_pid=current.pid if current else 0,
            owner_host=current.host if current else "",
        )

    def ahead_of(self, order: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Ranks that have come further in an incarnation, and to which step, as far as it is known
        here."""
        incarnation, step = order
        for number, link in self.links.items():
            if self.layout and link.incarnation == incarnation and link.last_step > step:
                yield from ((rank, link.last_step) for rank in self.layout.nodes[number].ranks)
        for owner in self.owners.values():
            if owner.incarnation == incarnation and owner.last_step > step:
                yield owner.rank, owner.last_step

    # -- news ------------------------------------------------------------------------------------

    def touch(self, save: SaveState | None = None) -> None:
        """Something changed: long polls return, tiers look for work."""
        self.seq += 1
        if save is not None:
            save.seq = self.seq
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
        for tier in self.tiers.values():
            tier.wake.set()

    def reach(self, save: SaveState, stage: str | None) -> bool:
        """Add a stage; True if it is new."""
        if stage is None or stage in save.stages:
            return False
        save.stages.append(stage)
        return True

    def has_news(self, since: int, holder: str) -> bool:
        """Whether ``changes`` has anything for that holder. Threads of trainers wake up for it."""
        if self.seq <= since:
            return False
        owner = next((o for o in self.owners.values() if o.holder == holder), None)
        return owner is None or owner.absent or any(self._changed(since, owner.incarnation))

    def _changed(self, since: int, incarnation: int | None) -> Iterator[protocol.SaveChange]:
        """What is said of saves and was not before ``since``: much of what touches one is not."""
        for save in self.saves.values():
            if save.seq > since and incarnation in (None, save.name.incarnation):
                change = save.change()
                if change != save.said:
                    self.seq += 1
                    save.said, save.said_seq = change, self.seq
                if save.said_seq > since:
                    yield change

    def changes(self, since: int, holder: str) -> protocol.Changes:
        """What changed after ``since``, of the incarnation of that holder. Raises AgentUnavailable
        as ``owner_of`` does: ``since`` would be a number of the agent before this one."""
        owner = next((o for o in self.owners.values() if o.holder == holder), None)
        if owner is not None and owner.absent:
            raise self._unopened()
        fenced = None
        if owner is None and holder:
            fenced = protocol.error_to_wire(self.locked_out(holder))
            owner = self.fenced.get(holder)
        if since > self.seq:  # a number of the agent before this one
            since = 0
        changed = list(self._changed(since, owner.incarnation if owner else None))
        return protocol.Changes(self.seq, changed, fenced)

    # -- saves and slots -------------------------------------------------------------------------

    def facts(self) -> list[SaveFacts]:
        """Saves that are in RAM, whole or in part, and what their slots are needed for."""
        line, partners = self.line(), self._partners()
        held = [save for save in self.saves.values() if save.ranks.get(RAM)]
        return [self._slot_facts(save, line, partners) for save in held]

    def _slot_facts(self, save: SaveState, line: Line, partners: list[str]) -> SaveFacts:
        """A store that can have it from a disk does not need its slot. From a disk that only waits
        for it that is not sure: a newer save may take its place there."""
        owed = frozenset(
            label
            for label in save.owed
            if not save.remains and not (self.tiers[label].is_store and self._disks_with(save))
        )
        # Partners have it, or took it from an agent before this one as far as can be known.
        copied = any(t in save.ranks or (save.inherited and t in save.due) for t in partners)
        if not save.is_on(line):  # abandoned: it is wanted by nobody
            owed, copied = frozenset(), False
        return save.facts(has_source=save.is_staged, owed=owed, line=line, copied=copied)

    def _partners(self) -> list[str]:
        """Tiers of copies on other nodes that slots wait for: not those that have been silent for
        long, or refused the newest. A node alone has none to wait for."""
        peers = [tier for tier in self.tiers.values() if tier.is_peers]
        now_s = time.monotonic()
        if self.layout is None or not peers or not self._is_patient(now_s):
            return []
        newest = self.newest_staged()
        refused = newest.failures() if newest else {}
        return [
            t.label
            for t in peers
            if t.label not in refused and now_s - (t.owed_since_s or now_s) < PARTNER_PATIENCE_S
        ]

    def outlived(self) -> list[SaveState]:
        """Saves older than the newest that outlives any one node; where none does by itself, than
        the newest that is whole."""
        line, keeps = self.line(), any(tier.is_peers for tier in self.tiers.values())
        held = [
            save.worth(line)
            for save in self.saves.values()
            if save.is_replicated or (not keeps and save.is_staged)
        ]
        newest = max(held, default=None)
        return [s for s in self.saves.values() if newest is not None and s.worth(line) < newest]

    def note_leaving(self, number: int, leaving: bool) -> None:
        """Another node is about to go, or is not: copies that could go nowhere can be tried."""
        if leaving != (number in self.leaving):
            self.leaving ^= {number}
            self.touch()
            for tier in self.tiers.values():
                tier.retry.set()

    def _is_patient(self, now_s: float) -> bool:
        """Whether what is staged since the newest that other nodes have whole is not long so."""
        line, outlived = self.line(), set(self.outlived())
        since_s = [
            max(save.began_s, self.begun_s)
            for save in self.saves.values()
            if "staged" in save.stages
            and save not in outlived
            and not save.is_replicated
            and save.is_on(line)
        ]
        return now_s - min(since_s, default=now_s) < PARTNER_PATIENCE_S

    def flushable(self, tier: TierState) -> list[SaveFacts]:
        """Saves that are due in a tier, as it looks at them: it can be given some of them now."""
        label = tier.label
        due = [s for s in self.saves.values() if s.ranks and label in s.due | s.writing]
        line = self.line() if due else []
        return [
            s.facts(has_source=bool(self.source_for(s, label)), owed=s.owed, line=line) for s in due
        ]

    def source_for(self, save: SaveState, label: str) -> TierRef | None:
        """Where a tier is given a save from: a store from a disk, so that no slot waits for it."""
        disk = self._from_disk(save, label)
        if disk is not None and save.is_complete(disk.label):
            return disk.ref
        return self.ram if disk is None and save.is_staged else None

    def _from_disk(self, save: SaveState, label: str) -> TierState | None:
        """The disk that a store gets a save from: one that has it, else one that it comes to."""
        if not self.tiers[label].is_store:
            return None
        due = [d for d in self.disks() if d.label in save.owed and not d.problem]
        return next(iter(self._disks_with(save) + due), None)

    def disks(self) -> list[TierState]:
        return [tier for tier in self.tiers.values() if tier.config.kind == "disk"]

    def _disks_with(self, save: SaveState) -> list[TierState]:
        """Those that are known to have it: one that has stopped answering may not."""
        return [
            disk
            for disk in self.disks()
            if disk.scanned and save.is_complete(disk.label) and not save.is_damaged(disk.label)
        ]

    def newest_staged(self) -> SaveState | None:
        """Of those on the line; one that is abandoned only where RAM has nothing else."""
        line = self.line()
        staged = [s for s in self.saves.values() if s.is_complete(RAM)]
        return max(staged, key=lambda s: s.worth(line), default=None)

    def line(self) -> Line:
        """Which saves count, back from the newest incarnation; empty while none is known."""
        return line_of([save.name for save in self.saves.values()], self.incarnations.values())

    def save_at(self, incarnation: int, step: int) -> SaveState | None:
        for save in self.saves.values():
            if (save.name.incarnation, save.name.step) == (incarnation, step):
                return save
        return None

    def ring(self, owner: Owner, plan: Plan) -> list[Slot]:
        """Slots that one owner has or can get in this shape; not what others still write to."""
        return [
            s
            for s in self.slots.values()
            if s.fits(plan)
            and (
                s.state is SlotState.FREE
                or s.holder == owner.holder
                or (s.save and s.rank == owner.rank)
            )
        ]

    def doubt_others(self, owner: Owner, held: list[str] | None) -> None:
        """An owner says which slots it is writing to: it may never have heard of its others."""
        if held is None:
            return
        for slot in self.slots.values():
            if slot.state is SlotState.CAPTURING and slot.holder == owner.holder:
                slot.doubtful = slot.doubtful or slot.slot_id not in held

    def drop_copy(self, save: SaveState, label: str) -> None:
        """A save is not in a tier any more; forgotten once it is in none."""
        save.forget_copy(label)
        if label == RAM:
            for slot in [s for s in self.slots.values() if s.save == str(save.name)]:
                del self.slots[slot.slot_id]
        self.forget_old()

    def drop_tier(self, label: str) -> None:
        """A slower tier is none of the run's any more, with all that was known of it."""
        task = self.tiers.pop(label).task
        if task is not None:
            task.cancel()
        for save in self.saves.values():
            save.forget_copy(label)
            save.failed.pop(label, None)
            save.owed_why.pop(label, None)

    def drop_shard(self, save: SaveState, slot_id: str, rank: int) -> None:
        """One rank's part of a save is not in RAM any more."""
        self.slots.pop(slot_id, None)
        (ranks := save.ranks.get(RAM, set())).discard(rank)
        if not ranks:
            self.drop_copy(save, RAM)
        self._note_remains()  # nobody takes it for a part that never came

    def open_saves(self, incarnation: int) -> list[SaveState]:
        """Saves of an incarnation that not all ranks have sealed yet."""
        return [s for s in self.saves.values() if s.name.incarnation == incarnation and s.is_open]

    def forget_old(self) -> None:
        """Saves that lie nowhere are kept for a while, for whoever asks what became of them."""
        nowhere = [s for s in self.saves.values() if s.is_nowhere(self.incarnation)]
        for save in sorted(nowhere, key=lambda s: s.seq)[:-MAX_KEPT_CHANGES]:
            del self.saves[str(save.name)]

    def lock(self, save: SaveState, label: str) -> asyncio.Lock:
        """Held around everything that changes one save in one tier."""
        return self._locks.setdefault((str(save.name), label), asyncio.Lock())

    @contextlib.contextmanager
    def reading(self, save: SaveState) -> Iterator[None]:
        """While this is held the save's slot is not recycled."""
        save.readers += 1
        try:
            yield
        finally:
            save.readers -= 1

    def note_scan(self, label: str, scan: work.RunScan) -> None:
        """Take in what a tier holds. Saves that it no longer has lose that copy."""
        found = set()
        for entry in scan.saves:
            name = SaveName.parse(entry.save)
            if name is None or entry.aborted:
                continue
            if not entry.ranks:
                if label != RAM and not entry.problems:
                    # What a kill left of a flush or of a deletion: retention lets it go.
                    found.add(entry.save)
                    remains = self.saves.setdefault(entry.save, SaveState(name, ""))
                    remains.ranks.setdefault(label, set())
                continue
            found.add(entry.save)
            save = self.saves.get(entry.save)
            if save is None:
                save = self.saves[entry.save] = SaveState(
                    name, entry.save_id, entry.incarnation_id, entry.world_size, entry.size_bytes
                )
                save.seen_at = entry.saved_at_s or save.seen_at
            save.note_found(entry)
            save.chosen |= entry.save in self.noted_chosen
            save.diverged = save.diverged or self.noted_diverged.get(entry.save, {})
            own = set(entry.ranks)
            if label == RAM:
                save.guests = own & {*self.noted_guests.get(entry.save, ()), *entry.thin}
                own -= save.guests
            if own:
                save.ranks[label] = own
            save.found = True
            save.seq = self.seq + 1  # whoever asks a new agent is told where it stands
            if entry.problems:
                save.damaged.add(label)
            if label == RAM:
                save.inherited = True
                save.due |= set(entry.due) & self.tiers.keys() if own else set()
                if save.is_complete(RAM):
                    self.reach(save, "staged")
                continue
            tier = self.tiers[label]
            if tier.is_store and not entry.committed:
                save.uncommitted.add(label)
            elif not (tier.is_store or tier.known):  # else stores may have let it go since then
                stores = {t.label for t in self.tiers.values() if t.is_store}
                save.due |= set(entry.due) & stores
            if save.is_complete(label) and label not in save.uncommitted:
                self.reach(save, tier.stage)
        for save in list(self.saves.values()):
            if label in save.ranks and str(save.name) not in found and not save.writing:
                self.drop_copy(save, label)
        again = label != RAM and self.tiers[label].known
        if label != RAM:
            self.tiers[label].scanned = self.tiers[label].known = True
        for incarnation in scan.incarnations:
            known = self.incarnations.get(incarnation.number)
            if known is None or known.id < incarnation.id:
                self.incarnations[incarnation.number] = incarnation
            if label == RAM:
                self.begun[incarnation.number] = incarnation
        self.discharge(only=label if again else "")
        self.touch()

    def discharge(self, *, scanned: bool = True, only: str = "") -> None:
        """Find out what is owed to nobody any more, once more is known of what lies where.
        ``scanned``: of tiers themselves, or of ``only`` that one, again. What others say must not
        end a backlog that is wanted."""
        self._note_remains()
        for tier in self.tiers.values():
            if tier.scanned:
                self._discharge(tier.label, scanned=scanned and only in ("", tier.label))

    def _note_remains(self) -> None:
        """Slots are recycled rank by rank. Ranks that all have a newer step finished this one: what
        some lack of it is not still to come."""
        newest: dict[int, int] = {}
        for save in self.saves.values():
            if save.is_complete(RAM):
                number, step = save.order
                newest[number] = max(step, newest.get(number, step))
        for save in self.saves.values():
            older = save.name.step < newest.get(save.name.incarnation, save.name.step)
            save.remains = older and save.in_part(RAM)

    def _is_lost(self, save: SaveState, label: str) -> bool:
        """Whether what is left of a save is nowhere whole that the tier could get it from."""
        if not save.remains or not all(disk.scanned for disk in self.disks()):
            return False
        return not (self.tiers[label].is_store and self._disks_with(save))

    def _discharge(self, label: str, *, scanned: bool) -> None:
        """What a tier does not have and has a newer save than, it had or left out on purpose."""
        due = [save for save in self.saves.values() if label in save.due]
        line = self.line() if due else []
        held = [s.worth(line) for s in self.saves.values() if due and s.is_complete(label)]
        for save in due:
            # What this start saved beside a later one of the job, the tier refuses, and says so.
            rival = save.name.incarnation == max(self.begun, default=0) and not save.is_on(line)
            older = scanned and held and save.worth(line) < max(held) and not rival
            if save.is_complete(label):
                save.due.discard(label)
            elif label in save.owed and (older or self._is_lost(save, label)):
                save.superseded.add(label)
                save.seq = self.seq + 1  # whoever waits for it has to hear that it is in vain

    def all_guests(self) -> dict[str, list[int]]:
        """By the name of their save: ranks whose shards are here as copies for other nodes."""
        return {name: sorted(s.guests) for name, s in self.saves.items() if s.guests}
