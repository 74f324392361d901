"""A node that is about to go away: what it has is brought elsewhere, and nothing new is taken.

Knows what "safe to go" means: the newest step that is whole, and what is held here for other nodes,
are where the loss of this node does not reach: with other nodes that stay, or in a store. The same
for a command, a supervisor's hook and SIGTERM. Once that was said, an agent that is started where
this one was killed holds to it. Does not move bytes (``flushing``, ``copies``), and does not end
the agent (``life``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mtckpt._survival import ranges
from mtckpt.agent import drains
from mtckpt.agent.saves import RAM, SaveState, describe_failure
from mtckpt.agent.tools import until
from mtckpt.errors import CheckpointError, NodeDraining, TierUnavailable

if TYPE_CHECKING:
    from mtckpt._events import EventStream
    from mtckpt.agent.copies import Copies
    from mtckpt.agent.flushing import Flusher
    from mtckpt.agent.runs import RunState

__all__ = ["Drainer"]

logger = logging.getLogger(__name__)

_POLL_S = 0.05
# So long other nodes get to say that they have what is held here, before it goes to slower tiers.
_PATIENCE_S = 5.0
# One that is dark must not take up the time of the others: it is asked again after them.
_CALLS_S = (5.0, 15.0)


class Drainer:
    """See the module. One for the agent; ``reason`` is empty while the node is to stay. ``ready``
    is set once it is known what is here, but for what lies in the directories of ``unread``, which
    ``reread`` tries again.
    """

    def __init__(
        self,
        runs: dict[str, RunState],
        ready: asyncio.Event,
        unread: Mapping[str, CheckpointError],
        reread: Callable[[], asyncio.Task[None]],
        copies: Copies,
        flusher: Flusher,
        events: EventStream,
        note: drains.Note,
    ) -> None:
        self._runs = runs
        self._ready = ready
        self._unread = unread
        self._reread = reread
        self._copies = copies
        self._flusher = flusher
        self._events = events
        self._note = note
        self.reason = note.read()

    def refuse(self) -> None:
        """Raises NodeDraining where something new would be begun here."""
        if self.reason:
            raise NodeDraining(self.reason, state="nothing was done")

    def cancel(self) -> None:
        """The node stays. Others use it again as they hear of that: when it offers them copies, as
        it does at once."""
        self.reason = ""
        self._note.remove()
        for run in self._runs.values():
            run.draining, run.drained = "", False
            for save in run.saves.values():
                save.handed = False
            for tier in [tier for tier in run.tiers.values() if tier.is_peers]:
                newest = run.newest_staged()
                if newest is not None and tier.label in newest.ranks:
                    self._copies.offer_again(run, tier, newest)
                tier.retry.set()
            run.touch()
        self._events.emit("node.stays")

    def adopt(self, run: RunState) -> None:
        """A run that an agent before this one had, which may have said that the node goes."""
        run.draining, run.drained = self.reason, bool(self.reason)

    def end(self) -> None:
        """The agent ends in good order: the next one here begins anew."""
        self._note.remove()

    async def drain(self, timeout_s: float, reason: str, *, ends: bool = False) -> drains.Drained:
        """Bring what is here elsewhere, as far as ``timeout_s`` goes; how far that was. ``ends``:
        it is the agent that goes, and the node may stay."""
        deadline_s = time.monotonic() + timeout_s
        self.reason = reason
        self._note.remove()
        self._events.emit("node.drains", reason=reason, seconds=round(timeout_s, 1))
        if await until(self._ready, timeout_s):  # what is here may still be looked for
            left_s = max(0.0, deadline_s - time.monotonic())
            await asyncio.wait([self._reread()], timeout=left_s)  # none is left half read
        runs = [run for run in self._runs.values() if not run.gone]
        unknown = [
            drains.DrainedRun(root, None, [], False, f"what is left there is not known: {why.what}")
            for root, why in self._unread.items()
        ]
        for run in runs:
            run.draining = reason
            run.touch()
        told = await asyncio.gather(*(self._drain(run, deadline_s) for run in runs))
        told += unknown
        drained = drains.Drained(self._ready.is_set() and all(each.safe for each in told), told)
        for each in told:
            level = logging.INFO if each.safe else logging.WARNING
            said = "; ".join([each.detail, *each.lacking])
            logger.log(level, "run %s is drained: %s", each.run, said)
        if drained.safe and not ends and self.reason == reason:  # else it was taken back
            self._note.write(reason)
        self._events.emit("node.drained", safe=drained.safe)
        return drained

    async def _drain(self, run: RunState, deadline_s: float) -> drains.DrainedRun:
        """What nobody else has goes to other nodes, beside what tiers of the run bring away."""
        handover = _Handover(run, self._copies, self._flusher)
        handing = [
            self._start(work, deadline_s, handover)
            for work in (handover.of_guests(), handover.of_copied())
        ]
        wanted: set[str] = set()
        doubted: set[str] = set()
        while run.draining:
            newest = _newest(run)
            if newest is not None and str(newest.name) not in wanted:
                wanted.add(str(newest.name))
                newest.want_in(run.tiers)
                # With this node's parts alone no store has a step: the others bring theirs, too.
                newest.wanted |= {label for label, tier in run.tiers.items() if tier.is_store}
                run.touch(newest)
                handing.append(self._start(handover.of_own(newest), deadline_s, handover))
            for save in handover.in_doubt():
                if str(save.name) not in doubted:
                    doubted.add(str(save.name))
                    handing.append(self._start(handover.of_doubted(save), deadline_s, handover))
            coming = run.settling or run.sealing.locked() or self._coming(run)
            if not (coming or self._owed(run, handover)) or time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(_POLL_S)  # many things end it: seals, flushes, failures, copies
        run.drained = bool(run.draining)  # it may have been taken back meanwhile
        await asyncio.gather(*handing)
        return handover.told()

    def _start(
        self, work: Coroutine[Any, Any, None], deadline_s: float, handover: _Handover
    ) -> asyncio.Task[None]:
        async def bounded() -> None:
            try:
                await asyncio.wait_for(work, max(0.01, deadline_s - time.monotonic()))
            except asyncio.TimeoutError:
                handover.problems.append("another node did not take all of it in time")

        return asyncio.get_running_loop().create_task(bounded())

    def _coming(self, run: RunState) -> bool:
        """Whether ranks, here or on other nodes, are still to seal a save that is begun here."""
        return any(save.ranks.get(RAM) for save in run.open_saves(run.incarnation))

    def _owed(self, run: RunState, handover: _Handover) -> bool:
        """Whether a tier may still get something; other nodes do not where all of them go."""
        alone = not handover.staying()
        return any(
            run.source_for(save, label) and not (run.tiers[label].is_peers and alone)
            for save in run.saves.values()
            for label in save.owed & run.tiers.keys()
        )


def _newest(run: RunState) -> SaveState | None:
    """The newest step that is whole in memory; where none is, what is on a disk, since that goes
    with the node if it is one of its own."""
    staged = run.newest_staged()
    if staged is not None:
        return staged
    line = run.line()
    found = [save for save in run.saves.values() if _disks_with(run, save)]
    whole = [s for s in found if any(map(s.is_complete, _disks_with(run, s)))]
    return max(whole or found, key=lambda save: save.worth(line), default=None)


def _disks_with(run: RunState, save: SaveState) -> list[str]:
    disks = [label for label, tier in run.tiers.items() if tier.config.kind == "disk"]
    return [label for label in disks if save.ranks.get(label)]


class _Handover:
    """What one run has here that other nodes are to have. ``holders`` have, by save, said so, and
    ``untaken`` says why none has. ``problems`` are what is nowhere else."""

    def __init__(self, run: RunState, copies: Copies, flusher: Flusher) -> None:
        self._run = run
        self._copies = copies
        self._flusher = flusher
        self.problems: list[str] = []
        self.holders: dict[str, str] = {}
        self.untaken: dict[str, str] = {}
        self.brought: set[str] = set()

    def staying(self) -> list[int]:
        """The other nodes that are not to go as well, those first that placement would choose."""
        return self._copies.candidates(self._run) if self._run.layout is not None else []

    async def of_own(self, save: SaveState) -> None:
        """This node's parts of a save: to those that hold copies already, while they are there,
        else to another node, also where the run keeps no copies."""
        staying = self.staying()
        ranks = sorted(save.ranks.get(RAM, ()))
        if not ranks or not staying:
            return
        first = [number for number in sorted(save.held_on) if number in staying]
        # Before it is taken: who takes it may go as well, and must not count on this node then.
        save.handed = save.offered = True
        where, why = await self._give(save, ranks, first, self._run.secret)
        if where:
            self.holders[str(save.name)] = where
        else:
            save.handed = False
            self.untaken[str(save.name)] = why

    def in_doubt(self) -> list[SaveState]:
        """Saves of which this node has its parts, newer than the newest that is whole as far as it
        knows: the others have not said so yet, or were asked by an earlier start of the job."""
        run, newest = self._run, self._run.newest_staged()
        own, line = run.layout.own if run.layout is not None else None, run.line()

        def may_be_whole(save: SaveState) -> bool:
            here = save.ranks.get(RAM)
            if not here or save.called_off or save.remains or save.is_complete(RAM):
                return False
            finished = save.name.incarnation < run.incarnation or (own is not None and own <= here)
            return "staged" in save.stages or (save.is_open and finished)

        return [
            save
            for save in run.saves.values()
            if may_be_whole(save) and (newest is None or save.worth(line) > newest.worth(line))
        ]

    async def of_doubted(self, save: SaveState) -> None:
        """This node's parts of one of them: to another node, else to the tiers."""
        name = str(save.name)
        await self.of_own(save)
        ranks = save.ranks.get(RAM, set())
        if name in self.holders or not ranks:
            return
        brought, lacking = await self._bring(save, ranks)
        if brought:
            self.brought.add(name)
        self.untaken[name] = "; ".join([self.untaken.get(name, "none stays"), *lacking])

    async def of_copied(self) -> None:
        """This node's parts of the newest step that is on other nodes whole, likewise: what came
        after it may have been lost with a node that is gone, and with it the copies of these."""
        run = self._run
        outlived = run.outlived()
        for save in [s for s in run.saves.values() if s.is_replicated and s not in outlived]:
            if save is not run.newest_staged():
                await self.of_own(save)
                if str(save.name) in self.holders:
                    continue
                brought, lacking = await self._bring(save, save.ranks.get(RAM, set()))
                if lacking and not brought:
                    self._note(save, save.ranks.get(RAM, set()), "; ".join(lacking))

    async def of_guests(self) -> None:
        """What is held here for other nodes: to its owner, where that lacks it, else to any; where
        none takes it, to the tiers of the run, with this node's own parts of the same save."""
        run = self._run
        outlived = run.outlived()
        saves = [s for s in run.saves.values() if s.guests and s not in outlived]
        for save in sorted(saves, key=lambda s: s.order, reverse=True):
            owners: dict[int | None, list[int]] = {}
            secret, layout = run.secret, run.layout
            for rank in sorted(save.guests):
                owner = layout.node_of(rank) if layout else None
                owners.setdefault(owner, []).append(rank)
            for owner, ranks in owners.items():
                # Where that goes as well, it says whether it has them: it brings them away itself.
                first = [] if layout is None or owner in (None, layout.here) else [owner]
                await self._of_guest(save, ranks, first, secret)

    async def _of_guest(
        self, save: SaveState, ranks: list[int], first: list[int], secret: str
    ) -> None:
        giving = asyncio.ensure_future(self._give(save, ranks, first, secret))
        try:
            await asyncio.wait([giving], timeout=_PATIENCE_S)
            if giving.done() and giving.result()[0]:
                return
            brought, lacking = await self._bring(save, save.ranks.get(RAM, set()) | {*ranks})
            where, why = await giving
            if not where and not brought:
                self._note(save, ranks, "; ".join([why, *lacking]))
        finally:
            giving.cancel()

    async def _bring(self, save: SaveState, ranks: set[int]) -> tuple[bool, list[str]]:
        """To all disks and stores, side by side: one that hangs must not hold up the others.
        Whether a store has it then, and why some do not."""
        tiers = [tier for tier in self._run.tiers.values() if not tier.is_peers]
        bringing = (self._flusher.bring(self._run, tier, save, ranks) for tier in tiers)
        brought, lacking = False, []
        for tier, done in zip(
            tiers, await asyncio.gather(*bringing, return_exceptions=True), strict=True
        ):
            if isinstance(done, CheckpointError):
                lacking.append(f"{tier.label}: {describe_failure(done)}")
            elif isinstance(done, BaseException):
                raise done
            else:
                brought |= done and tier.is_store
        return brought, lacking

    def _note(self, save: SaveState, ranks: Iterable[int], why: str) -> None:
        self.problems.append(f"step {save.name.step} of ranks {ranges(ranks)}: {why}")

    async def _give(
        self, save: SaveState, ranks: list[int], first: list[int], secret: str
    ) -> tuple[str, str]:
        """To the first node that takes it, or has it as its own: which one, or why none.

        Nodes are known by numbers of one start of the job, those of ``first`` by that of this
        ``secret``. Where it is started anew meanwhile, its nodes are asked instead.
        """
        while True:
            if self._run.secret != secret:
                first, secret = [], self._run.secret
            where, why = await self._give_to(save, ranks, [*first, *self.staying()])
            if where or self._run.secret == secret:
                return where, why

    async def _give_to(
        self, save: SaveState, ranks: list[int], numbers: Iterable[int]
    ) -> tuple[str, str]:
        run, why = self._run, "no other node stays"
        layout, secret = run.layout, run.secret
        left = list(dict.fromkeys(numbers))
        for call_s in _CALLS_S:
            for number in tuple(left):
                if layout is None or run.secret != secret:
                    return "", why
                try:
                    await self._copies.hand_over(run, save, ranks, number, call_s)
                except CheckpointError as error:
                    why = describe_failure(error)
                    if not isinstance(error, TierUnavailable):
                        left.remove(number)
                    if not error.details.get("has_own"):
                        continue  # else it is theirs, and they bring it away
                return str(layout.nodes[number].address), ""
        return "", why

    def told(self) -> drains.DrainedRun:
        """Where the newest step is, and whether the loss of this node takes something along."""
        run = self._run
        untaken = "its other nodes have not said whether it is whole, and none took these parts"
        problems = self.problems + [
            f"step {each.name.step}: {untaken}: {self.untaken.get(str(each.name), 'none stays')}"
            for each in self.in_doubt()
            if str(each.name) not in self.holders.keys() | self.brought
        ]
        save = _newest(run)
        if save is None:
            detail = "nothing that is whole is in memory here"
            return drains.DrainedRun(run.run, None, [], not problems, detail, problems)
        own = save.ranks.get(RAM) or set().union(
            *map(save.ranks.__getitem__, _disks_with(run, save))
        )
        has = {label for label in run.tiers if own and own <= save.ranks.get(label, set())}
        safe_in = [f"in {label}" for label in sorted(has) if run.tiers[label].is_store]
        if holder := self.holders.get(str(save.name)):
            safe_in.append(f"in the memory of {holder}")
        disks = [label for label in _disks_with(run, save) if label in has]
        else_in = [f"on {label}, which is gone if that is a disk of this node" for label in disks]
        where = ", ".join(safe_in + else_in) or "in the memory of this node and nowhere else"
        lacking = [
            f"{label}: {save.owed_why.get(label, 'not in time')}"
            for label in sorted(save.owed & run.tiers.keys())
            if run.source_for(save, label) is not None
        ]
        if why := self.untaken.get(str(save.name)):
            lacking.append(f"in the memory of no other node: {why}")
        lacking += [f"{label}: {error.what}" for label, error in sorted(save.failures().items())]
        return drains.DrainedRun(
            run.run,
            save.name.step,
            list(save.stages),
            bool(safe_in) and not problems,
            f"step {save.name.step} is {where}",
            [*lacking, *problems],
        )
