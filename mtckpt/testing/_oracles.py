"""What must hold whatever happens: the promises of the package, looked at from outside.

Knows what ranks were told about their saves, what nodes have lost since, and what a restore gave.
Does not know how any of it came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtckpt import _holdings, _inventory, _manifest
from mtckpt._manifest import Incarnation
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM
from mtckpt.errors import StepDisagreement
from mtckpt.testing._settings import RUN

if TYPE_CHECKING:
    from mtckpt._handle import Restored, Save
    from mtckpt.testing._restores import Read
    from mtckpt.testing._trainers import Rank
    from mtckpt.testing.cluster import Node, World

__all__ = ["Oracles", "Violation"]

Order = tuple[int, int]
Line = list[tuple[int, int | None]]
# Within this time all ranks hear that a save is whole, while nothing goes wrong.
PROMPT_S = 1.0
# So long may an agent take to answer, or to be started, beyond what a save may stall training.
ANSWERED_S = 2.0


class Violation(Exception):
    """A promise was broken."""


@dataclass(slots=True)
class Known:
    """One save, as all of its ranks were told about it. ``places`` are incarnations of memory."""

    save_id: str
    order: Order
    began_s: float
    world_size: int
    came_s: float = 0.0  # when the last rank had captured its part
    nodes: list[Node] = field(default_factory=list)
    handles: list[tuple[int, Save]] = field(default_factory=list)
    closed: bool = False  # by some rank, so that memory may have been freed
    left: bool = False  # by ranks whose job is over, so that nobody waits for what comes of it
    found: bool = False  # by a later start: what agents did with it since, no rank was told
    bad: set[tuple[Node | None, str]] = field(default_factory=set)  # where a copy was damaged
    gone: set[Node] = field(default_factory=set)  # nodes that had brought their parts elsewhere

    def all_captured(self) -> bool:
        """Whether all ranks have captured their parts."""
        captured = {rank for rank, save in self.handles if "captured" in save.reached}
        return len(captured) == self.world_size

    def stages(self) -> set[str]:
        """What any rank was told."""
        return set().union(*(handle.reached for _, handle in self.handles))


class Oracles:
    """Hears of everything that ranks do, and raises Violation where it must not be. ``keep``: so
    many saves stay on a disk."""

    def __init__(self, world: World, keep: int) -> None:
        self._world = world
        self._keep = keep
        self._saves: dict[str, Known] = {}
        self._left: set[int] = set()
        self._begun: dict[int, Incarnation] = {}
        self._lost_s: dict[tuple[Node, str], float] = {}
        # Where users went back to, as long as no start that went on from there has told of itself.
        self._turned: list[Order] = []
        self._has_turned = False
        self.num_restores = 0
        self.num_acknowledged = 0

    # -- told ------------------------------------------------------------------------------------

    def lost(self, node: Node, *what: str) -> None:
        """Memory or disk of a node is gone."""
        for each in what:
            self._lost_s[node, each] = self._world.loop.time()

    def drained(self, node: Node) -> None:
        """A node is gone that had said it may be: some other one, or the store, has its parts."""
        self.lost(node, "disk")
        for known in self._saves.values():
            if node in known.nodes:
                known.nodes.remove(node)
                known.nodes += [each for each in self._world.nodes if not each.lost]
                known.gone.add(node)

    def saved(self, rank: Rank, save: Save) -> None:
        """A rank has called ``save``."""
        self._world.note(f"rank {rank.rank} on {rank.node.name}: {save!r}")
        incarnation = rank.run.incarnation
        if incarnation is None:
            return
        if incarnation.number not in self._begun:
            self._turned.clear()
        self._begun[incarnation.number] = incarnation
        known = self._saves.get(save.id)
        if known is None:
            order = (incarnation.number, save.step)
            now_s, world_size = self._world.loop.time(), rank.run.members.world_size
            known = self._saves[save.id] = Known(save.id, order, now_s, world_size)
        known.left |= rank.process.pid in self._left
        known.came_s = self._world.loop.time()
        known.nodes.append(rank.node)
        known.handles.append((rank.rank, save))

    def stalled(self, rank: Rank, step: int, for_s: float) -> None:
        """Training has waited for a save of a rank, which was not the first one of its start."""
        if for_s > rank.settings.max_stall_s + ANSWERED_S:
            raise Violation(f"step {step} stalled rank {rank.rank} for {for_s:.1f} s")

    def left(self, ranks: Iterable[Rank]) -> None:
        """Ranks go on though their job is over: what they save is of no branch."""
        self._left.update(rank.process.pid for rank in ranks)
        handles = {id(save) for rank in ranks for save in rank.saves}
        for known in self._saves.values():
            known.left |= any(id(save) in handles for _, save in known.handles) and not (
                known.stages() - {"captured"}
            )

    def closed(self, rank: Rank) -> None:
        """A rank has closed the run: what is safe elsewhere is not kept in memory any more."""
        for known in self._saves.values():
            known.closed |= known.found or any(handle in rank.saves for _, handle in known.handles)

    def damaged(self, node: Node | None, place: str, save: str) -> None:
        """A copy of some shard of a save was changed there: of this name, as files have it."""
        for known in self._saves.values():
            if _is_named(known, save):
                known.bad.add((node, place))

    def restored(self, rank: Rank, restored: Restored, read: Read | None, asked: int | str) -> None:
        """A rank has restored ``asked``."""
        self._world.note(f"rank {rank.rank} on {rank.node.name}: {restored!r}")
        self.num_restores += 1
        if asked not in ("latest", restored.step):
            raise Violation(f"rank {rank.rank} asked for {asked} and got {restored.step}")
        if not restored:
            return
        assert read is not None
        if len(set(read.save_ids.values())) != 1 or len(read.save_ids) != read.world_size:
            raise Violation(f"rank {rank.rank} restored a mixture: {read.save_ids}")
        if restored.id != read.save_ids[0]:
            raise Violation(f"rank {rank.rank} was told of another save than it read")
        if restored.id in self._saves:
            self._saves[restored.id].found = True
        if asked != "latest" or rank.num_restores > 1:
            self._turned.append((restored._incarnation, restored.step or 0))
            self._has_turned = True

    # -- checks ----------------------------------------------------------------------------------

    def newest_steps(self) -> list[int]:
        """Some that were saved last, oldest first."""
        line = _manifest.newest_line(self._begun.values())
        return sorted({k.order[1] for k in self._saves.values() if _is_on(line, k.order)})[-3:]

    def required(self) -> Order | None:
        """The newest save that was acknowledged at a stage that has outlived everything so far."""
        kept = [self._required(line) for line in self._lines()]
        return None if None in kept else min(filter(None, kept))

    def _lines(self) -> list[Line]:
        """What counts: agents may know of a start of which no rank has told yet."""
        begun, number = list(self._begun.values()), max(self._begun, default=0) + 1
        later = [_start_from(parent, number) for parent in self._turned]
        return [_manifest.newest_line([*begun, *each]) for each in ([], *([one] for one in later))]

    def _required(self, line: Line) -> Order | None:
        on_line = [known for known in self._saves.values() if _is_on(line, known.order)]
        # What is abandoned by now was newer once, and memory was taken for it.
        there = list(self._saves.values()) if self._has_turned else on_line
        staged = max((known.order for known in there if "staged" in known.stages()), default=None)
        copied = [
            known.order
            for known in there
            if known.found or known.stages() & {"replicated", "durable"}
        ]
        whole = [known.order for known in there if known.found or known.all_captured()]
        kept = [
            known.order
            for known in on_line
            if not known.left
            and self._survives(
                known,
                in_memory=known.order == staged,
                in_copies=known.order == max(copied, default=None),
                on_disk=sum(order > known.order for order in whole) < self._keep,
            )
        ]
        return max(kept, default=None)

    def _survives(self, known: Known, *, in_memory: bool, in_copies: bool, on_disk: bool) -> bool:
        """``in_memory``: no newer one was there, for which its memory may have been taken; nor,
        ``in_copies``, that of its copies. ``on_disk``: it may not have been deleted for newer ones.
        """
        stages = known.stages()
        if "durable" in stages and (None, "store") not in known.bad:
            return True
        if in_copies and "replicated" in stages and not known.closed and self._num_lost(known) <= 1:
            return True
        needed = {"staged": "ram", "local": "disk"}
        if known.closed and any(each.bad for each in self._saves.values()):
            in_memory = False  # it was freed for a copy that had been good
        # What was brought elsewhere is in memory or in the store, unless memory was freed before.
        if not in_memory or (known.gone and ((None, "store") in known.bad or known.closed)):
            del needed["staged"]
        if known.gone or not on_disk:
            del needed["local"]
        return any(
            stage in stages
            and not any(
                self._lost_s.get((node, needed[stage]), -1.0) >= known.began_s
                or (node, needed[stage]) in known.bad
                for node in known.nodes
            )
            for stage in needed
        )

    def _num_lost(self, known: Known) -> int:
        """Memories that are gone since a save began, or have something wrong of it."""
        lost = {
            node
            for (node, what), at_s in self._lost_s.items()
            if what == "ram" and at_s >= known.began_s
        }
        return len(lost | known.gone | {node for node, what in known.bad if what == "ram"})

    def check_restored(self, results: dict[int, Restored], *, strict: Order | None) -> None:
        """All ranks of a job have restored: the same, and as new as ``strict`` at least."""
        steps = {(r._incarnation, r.step) if r else None for r in results.values()}
        if len(steps) > 1:
            raise Violation(f"ranks restored different saves: {steps}")
        (found,) = steps
        if strict is not None and (found is None or found < strict):
            raise Violation(f"{strict} was acknowledged and survives, restored was {found}")

    def check_committed(self, since_s: float) -> None:
        """Nothing went wrong since then, and ranks were asked for the same: what all of them
        captured is whole, and soon told to be."""
        now_s = self._world.loop.time()
        for known in self._saves.values():
            if known.began_s < since_s or not known.all_captured():
                continue
            off = {rank: save.skipped for rank, save in known.handles if _is_called_off(save)}
            if off:
                raise Violation(f"{known.order}: called off for nothing: {off}")
            open_ = [rank for rank, save in known.handles if "staged" not in save.reached]
            if open_ and now_s - known.came_s > PROMPT_S:
                raise Violation(f"{known.order}: ranks {open_} do not hear that it is whole")

    def check_agreement(self, nodes: Iterable[Node]) -> None:
        """No save is both: whole for one, and called off for another."""
        lines = self._lines() if self._has_turned else []
        for known in self._saves.values():
            if not all(_is_on(line, known.order) for line in lines):
                continue  # given up: whether it had been whole, nobody asks any more
            whole = [rank for rank, save in known.handles if "staged" in save.reached]
            off = [rank for rank, save in known.handles if _is_called_off(save)]
            if whole and off:
                raise Violation(f"{known.order}: staged for {whole}, called off for {off}")
        runs = {
            node: run
            for node in nodes
            if node.agent is not None and (run := node.agent.registry.runs.get(RUN)) is not None
        }
        newest = max((run.incarnation for run in runs.values()), default=0)
        told: dict[str, dict[str, list[str]]] = {}
        for node, run in runs.items():
            for name, save in run.saves.items():
                if save.name.incarnation < newest:
                    continue  # a node that had no part in what goes on since may not have heard
                by = told.setdefault(name, {"staged": [], "off": []})
                if "staged" in save.stages:
                    by["staged"].append(node.name)
                if save.called_off:
                    by["off"].append(node.name)
        for name, by in told.items():
            if self._has_lost(name):
                continue  # it was whole, and is not any more
            if by["staged"] and by["off"]:
                raise Violation(f"{name}: staged at {by['staged']}, called off at {by['off']}")

    def _has_lost(self, name: str) -> bool:
        """Whether a node has lost its memory since a save of that name began."""
        return any(
            self._lost_s.get((node, "ram"), -1.0) >= known.began_s
            for known in self._saves.values()
            if _is_named(known, name)
            for node in known.nodes
        )

    def check_commits(self, nodes: Iterable[Node]) -> None:
        """Never two different complete saves of one step and incarnation."""
        inventories = [
            _inventory.scan(place, RUN)
            for node in nodes
            for place in (node.ram, node.disk)
            if not place.problem
        ]
        inventories.append(_inventory.scan(self._world.store, RUN))
        seen: dict[Order, str] = {}
        for name, joined in _holdings.join(
            [_holdings.holdings_of(each) for each in inventories]
        ).items():
            if not joined.complete:
                continue
            order = (name.incarnation, name.step)
            if seen.setdefault(order, joined.whole[0]) != joined.whole[0]:
                raise Violation(f"two commits of {order}: {seen[order]}, {joined.whole[0]}")

    def check_settled(self, nodes: Iterable[Node]) -> list[str]:
        """What is still owed, held or under way although nothing is in its way."""
        return [
            f"{node.name}: {what}"
            for node in nodes
            if node.agent is not None and (run := node.agent.registry.runs.get(RUN)) is not None
            for what in _unsettled(run)
        ]

    def count(self) -> None:
        self.num_acknowledged = sum(bool(k.stages() - {"captured"}) for k in self._saves.values())


def _unsettled(run: Any) -> Iterator[str]:
    living = {owner.holder for owner in run.living()}
    for slot in run.slots.values():
        if slot.state is SlotState.CAPTURING and slot.holder not in living:
            yield f"slot {slot.slot_id} of rank {slot.rank} is held by nobody that lives"
        if slot.save and slot.save not in run.saves:
            yield f"slot {slot.slot_id} is of a save that is not known"
    for tier in run.tiers.values():
        if tier.small_owed:
            yield f"{tier.label} is owed {list(tier.small_owed)}"
        if tier.to_keep:
            yield f"{tier.label} has {tier.to_keep} saves to look at"
    for save in run.saves.values():
        if save.writing or save.readers or save.recycling:
            yield f"{save.name} is {save.writing or save.readers or 'recycled'}"
        if save.is_open:
            yield f"{save.name} is neither whole nor called off"
        for label in save.owed:
            if run.source_for(save, label) is not None:
                yield f"{save.name} is owed to {label}"


def _is_on(line: Line, order: Order) -> bool:
    return any(order[0] == at and (limit is None or order[1] <= limit) for at, limit in line)


def _start_from(parent: Order, number: int) -> Incarnation:
    return Incarnation(_manifest.FORMAT_VERSION, RUN, number, "", parent, "", 0)


def _is_named(known: Known, name: str) -> bool:
    return name.endswith(known.save_id.replace("-", "")[:12])


def _is_called_off(save: Save) -> bool:
    """Whether this rank was told that nobody has it. Doubt is another matter: it is kept then."""
    if save.skipped:
        return True
    error = save._failed.get(RAM)
    return isinstance(error, StepDisagreement)
