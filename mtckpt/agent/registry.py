"""All runs of this node: found in the RAM tiers at start, followed while owners live, let go of.

Knows which directories hold runs, which process owns what, and when nothing is left to do. What an
agent before this one left undone is in files; it is read here and goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

import msgspec

from mtckpt._slots import BESIDE
from mtckpt.agent import beside, drains, owners, protocol, work
from mtckpt.agent.agreement import Agreement
from mtckpt.agent.copies import Copies
from mtckpt.agent.draining import Drainer
from mtckpt.agent.fetching import Fetcher
from mtckpt.agent.flushing import Flusher
from mtckpt.agent.freeing import Freer, is_busy, is_elsewhere
from mtckpt.agent.guests import Guests
from mtckpt.agent.healing import Healer
from mtckpt.agent.leftovers import Leftovers, adopt_slots
from mtckpt.agent.links import Links
from mtckpt.agent.notes import config_of, leaving_of, left_s_of, owner_of_note
from mtckpt.agent.owners import Owner, boot_id
from mtckpt.agent.peers import SERVING, Peers
from mtckpt.agent.replicas import Replicas
from mtckpt.agent.ring import Ring
from mtckpt.agent.roots import Roots
from mtckpt.agent.run_config import PULLING, ref_of
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, TierState
from mtckpt.agent.tools import until
from mtckpt.agent.work import TierRef
from mtckpt.errors import AgentUnavailable, CheckpointError, TierUnavailable

if TYPE_CHECKING:
    from mtckpt.agent.protocol import TierConfig
    from mtckpt.agent.tools import Tools

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

# The holder of slots that an earlier agent gave to somebody.
UNSURE = "?"
_POLL_S = 0.05
# An agent that ends may take so long to let go of what it has.
LATE_S = 30.0
# What a start waits for, to find out whether what lies beside a disk is on that disk as well.
SCAN_S = 2.0


class Registry:
    """See the module. One for the agent."""

    def __init__(self, tools: Tools, directory: str, *, service: bool) -> None:
        self.tools = tools
        self.service = service
        self.ring = Ring(tools)
        self.leftovers = Leftovers(tools, self.ring)
        self.agreement = Agreement(tools, self.ring)
        self.healer = Healer(tools)
        self.fetcher = Fetcher(tools)
        self.runs: dict[str, RunState] = {}
        self.agent_id = os.urandom(8).hex()
        self.boot_id = boot_id()
        self.host = socket.gethostname()
        self.ready = asyncio.Event()
        self.peers = Peers(self)
        self.copies = Copies(tools, self.ring, self.peers)
        self.flusher = Flusher(tools, self.ring, self.healer, self.copies)
        self.unread: dict[str, CheckpointError] = {}  # directories of slots, and why
        note = drains.Note(directory, self.boot_id)
        found = (self.runs, self.ready, self.unread, self._reread)
        self.drainer = Drainer(*found, self.copies, self.flusher, tools.events, note)
        self.replicas = Replicas(tools, self.peers, self.write_config)
        self.links = Links(
            tools, self.ring, self.agreement, self.flusher, self.replicas, self.peers
        )
        self.freer = Freer(tools, self.runs, self.links, self.flusher, self.ring)
        self.guests = Guests(
            tools, self.peers, self.boot_id, self.links.follow, self.write_config,
            self.fetcher.arrived, self.agent_id,
        )  # fmt: skip
        self.directory = directory
        self.held = Roots(directory, protocol.ram_base(), self.boot_id)
        self._loading = asyncio.Lock()

    # -- finding runs ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Find what earlier agents of this directory left."""
        await self._load_roots(self.held.known())
        self.ready.set()
        if self.unread:
            self.tools.start(self._load_late(), "reading what was left, late")

    async def _load_late(self) -> None:
        """An agent that ends does so soon; a disk that hangs may answer after hours."""
        started_s = time.monotonic()
        while self.unread:
            waited_s = time.monotonic() - started_s
            await asyncio.sleep(max(LATE_S / 60, waited_s / 4))
            await self._reread()
            for root, why in list(self.unread.items()):
                # An agent that stays has it, and is to be asked.
                if isinstance(why, AgentUnavailable) and waited_s > LATE_S:
                    del self.unread[root]

    def _reread(self) -> asyncio.Task[None]:
        return self.tools.start(self._load_roots(list(self.unread)), "reading what was left")

    async def _load_roots(self, roots: list[str]) -> None:
        """As far as they are usable yet: an agent that ends still has its own."""
        there = await self.held.there(roots)
        for root in roots:
            try:
                if error := there.get(root):
                    raise error
                async with self._loading:
                    if root in there and root not in self.held.loaded:
                        await self._load_root(root)
                self.unread.pop(root, None)
            except CheckpointError as error:
                if root not in self.unread:
                    logger.warning("RAM tier %s is not usable: %s", root, error)
                self.unread[root] = error

    async def _load_root(self, root: str, only: work.RunConfig | None = None) -> None:
        """Take in every run of a RAM tier, or one more that has come, whose tiers are these. Raises
        what keeps it from being looked at: then that is done before anybody opens a run there, for
        what is there is never taken for nothing."""
        ram = self._ram_ref(root)
        with contextlib.suppress(TierUnavailable):  # there may be none yet: it is made then
            await self.held.take(root)
        configs = await self.tools.call(work.ReadRunConfigs(ram), work.RunConfigs)
        await self.held.take(root)  # from here on: what is half done there is nobody else's
        has_others = root not in self.held.loaded  # which nobody has taken in
        scan = work.Scan(ram, only.run_key if only and not has_others else None)
        scanned = await self.tools.call(scan, work.Scanned)
        for problem in configs.problems:
            logger.warning("RAM tier %s: %s", root, problem)
        by_key = {config.run_key: config for config in configs.configs}
        scans = {scan.run_key: scan for scan in scanned.runs}
        if only is not None:
            known = by_key.get(only.run_key, only)
            # No part is a copy for another node any more: what that had may have come along.
            extra = {**known.extra, "guests": {}}
            own = msgspec.structs.replace(known, tiers=only.tiers, extra=extra)
            by_key = {**(by_key if has_others else {}), only.run_key: own}
        for key in sorted({*by_key, *scans}):
            config, found = by_key.get(key) or work.RunConfig(key, key), scans.get(key)
            if not await self._makes_way(self.runs.get(key), found):
                continue
            run = RunState(config.run, key, ram)
            async with run.opening:  # nobody frees what may be here for nodes that are known last
                await self._adopt(run, config, found or work.RunScan(key))
                if key in configs.joins:
                    noted = config.extra.get("rank_here")
                    await self.peers.adopt(run, configs.joins[key], noted)
                    rank = self.peers.rank_here(key)
                    if noted is not None and rank is not None:  # else all were on this node
                        self.links.join(run, rank)
                        if run.layout is not None:
                            run.leaving = leaving_of(run.layout, config.extra)
                self.flusher.start(run)  # where there are no nodes, none is owed a copy
        if root not in self.held.loaded:
            self.held.loaded.append(root)

    async def _makes_way(self, known: RunState | None, found: work.RunScan | None) -> bool:
        """Whether a run that was found is taken in: what is known of it is none of its saves, as
        where a note has come late to memory that it had left."""
        if known is None:
            return True
        async with known.opening:  # who is just coming to it goes on with it
            has_any = known.slots or any(RAM in s.ranks or s.guests for s in known.saves.values())
            if has_any or not found or not found.saves or not all(o.absent for o in known.living()):
                return False
            await self.freer.wipe(known)
        return True

    async def _adopt(self, run: RunState, config: work.RunConfig, scan: work.RunScan) -> None:
        """One run as another agent left it: living owners are watched, dead ones settled."""
        self.drainer.adopt(run)
        self.set_tiers(run, config.tiers)
        extra = config.extra
        run.failures = int(extra.get("failures") or 0)
        run.noted_guests = dict(extra.get("guests") or {})
        run.noted_diverged = dict(extra.get("diverged") or {})
        run.noted_chosen = set(extra.get("chosen") or ())
        run.note_scan(RAM, scan)
        run.left_s = left_s_of(config, owners.uptime_s())
        run.closing = bool(extra.get("closing"))
        run.token = str(extra.get("token") or "")
        run.creator_uid = int(extra.get("uid", -1))
        run.admitted = set(extra.get("admitted") or ())
        for noted in config.owners:
            owner = owner_of_note(noted, run, self.host)
            if noted.holder in (extra.get("unseen") or ()):
                # Of another pid namespace: it comes back soon, or its silence is its death.
                owner.seen, owner.listened = False, True
            if owner.pidfd >= 0 or not owner.seen:
                run.owners[owner.rank] = owner
        for values in extra.get("fenced") or ():
            owner = owner_of_note(msgspec.convert(values, work.Owner), run, self.host)
            if owner.pidfd >= 0:
                owner.fenced_by = 1
                run.fenced[owner.holder] = owner
        # Who was given which slot is not in a file. With a living owner none is touched until it
        # comes back and says which are its own, or dies.
        adopt_slots(run, scan.slots, UNSURE)
        self.runs[run.key] = run
        for owner in run.living():
            self.watch(run, owner)
        await self.resolve(run)
        if not run.living():
            await self.try_config(run)
        self.tools.events.emit(
            "run.found", run=run.run, saves=len(run.saves), finished=len(run.finished)
        )

    async def resolve(self, run: RunState) -> None:
        """Settle slots of which nobody knew whose they are, once everybody has said so or died."""
        if any(owner.absent and not owner.dead for owner in run.owners.values()):
            return
        fenced = next((owner for owner in run.fenced.values() if not owner.dead), None)
        if fenced is not None:
            for slot in run.slots.values():
                if slot.holder == UNSURE:
                    slot.holder = fenced.holder
            return
        if not any(owner.holder == UNSURE for owner in run.unsettled):
            run.unsettled.append(Owner(UNSURE, 0, 0, 0, 0, self.host, incarnation=run.incarnation))
        await self._settle_slots(run)

    async def run_for(self, key: str, message: protocol.Open) -> RunState:
        """The run that is opened, known or new. Raises UsageError if its RAM lies elsewhere."""
        # A service keeps everybody's slots in its own directory; the reply says where.
        root = self.held.named("" if self.service else message.ram_path)
        if root not in self.held.loaded:  # one that hangs keeps no other run from being opened
            await self.held.check(root)
        async with self._loading:
            root = await self._root_for(key, root, message)
            run = self.runs.setdefault(key, RunState(message.run, key, self._ram_ref(root)))
            if run.ram.path != root:
                await self._move(run, root, message)
        return run

    async def _root_for(self, key: str, root: str, message: protocol.Open) -> str:
        """Where a run that is opened has its slots. What is left of it beside a disk, where the job
        before had too little memory, is taken in on the way."""
        if beside.is_asked(root):
            root = await self.held.own(root)
        if root not in self.held.loaded:
            await self.held.let_go({root, *(run.ram.path for run in self.runs.values())})
            self.held.note(root)
            await self._load_root(root)
        for tier in () if self.service else message.tiers:
            if tier.kind == "disk":
                await self._take_over(key, message, os.path.join(tier.path, BESIDE))
        return root

    async def _take_over(self, key: str, message: protocol.Open, place: str) -> None:
        """What agents that are gone have left of a run beside a disk, unless somebody is at work
        on it, or it is elsewhere."""
        run = self.runs.get(key)
        if run is None:
            alone = message.world_size == 1
            if own := await self.held.take_over(key, place, message.patience_s, alone=alone):
                # Its tiers are where this job says, not where a container before had them.
                await self._load_root(own, work.RunConfig(message.run, key, message.tiers))
            return
        if run.living() or os.path.dirname(run.ram.path) != place:
            return
        async with run.opening:  # nobody frees it meanwhile
            mine = "" if run.gone or run.living() else run.ram.path
            if mine and await self.held.take_over(key, place, message.patience_s, mine):
                await self.leftovers.take_in(run, UNSURE)
                await self.resolve(run)

    async def _move(self, run: RunState, root: str, message: protocol.Open) -> None:
        """RAM was elsewhere before: that goes, unless it has what no other tier has. Where somebody
        lives who has this rank it stays, and the place beside a disk, which nobody names, until its
        owners are gone: all ranks of a node have agreed on it."""
        others = (owner for owner in run.living() if owner.holder != message.holder)
        if any(owner.rank == message.rank for owner in others):
            return
        is_beside, goes_beside = beside.is_one(run.ram.path), beside.is_one(root)
        if run.settling:
            await asyncio.wait(list(run.settling.values()))  # what the dead had finished is sealed
        if not is_elsewhere(run):
            await self.wait_scanned(run, SCAN_S)
        async with run.opening:
            if run.gone or (is_beside and not goes_beside and run.living()):
                return
            if goes_beside:
                await self.agreement.outgrown(run, message.holder)
            if not await self.freer.move(run, self._ram_ref(root)) and not is_beside:
                self.freer.refuse_move(run, root)

    def _ram_ref(self, root: str) -> TierRef:
        return TierRef("ram", root, self.service, RAM)

    def set_tiers(self, run: RunState, configs: list[TierConfig]) -> None:
        """Take over what the newest owner says of its slower tiers."""
        for label in run.tiers.keys() - {config.label for config in configs}:
            run.drop_tier(label)
            for save in run.saves.values():
                save.due.discard(label)
        for config in configs:
            ref = ref_of(config, self.tools.limits.store_bytes_per_s, group_access=self.service)
            old = run.tiers.get(config.label)
            if old is not None and old.config.path == config.path:
                # Other credentials are another data process, and the same tier.
                before, old.config, old.ref, old.denied = old.ref, config, ref, ""
                if before.access.withheld:
                    _end_waiting(run, old)
                if before != ref:
                    self.tools.start(self._forget(before), f"ending {old.label} as it was")
                continue
            if old is not None:
                run.drop_tier(config.label)  # what is there under its name is to be seen
            run.tiers[config.label] = TierState(config.label, config, ref)
        run.touch()

    async def _forget(self, place: TierRef) -> None:
        """End a data process, unless another run reaches its place in the same way."""
        refs = [tier.ref for run in self.runs.values() for tier in run.tiers.values()]
        if place.kind == "store" and place not in refs:
            await self.tools.pool.forget(place)

    async def wait_scanned(self, run: RunState, timeout_s: float) -> None:
        """Wait until every tier has said what it holds, or that it cannot; at most so long."""
        deadline_s = time.monotonic() + timeout_s
        while any(not tier.scanned and not tier.problem for tier in run.tiers.values()):
            if (left_s := deadline_s - time.monotonic()) <= 0:
                return
            await until(run.changed, min(left_s, 0.1))

    async def write_config(self, run: RunState) -> None:
        """Note what the next agent needs. Raises TierError; the next slot is refused until then."""
        if run.gone:
            return
        try:
            await self.tools.call(work.WriteRunConfig(run.ram, config_of(run)), work.Stored)
        except CheckpointError:
            run.doubted = True
            raise

    async def try_config(self, run: RunState) -> None:
        """``write_config`` for what needs no room in memory, nor its word: to restore, to leave,
        and to go on where an agent before this one stopped."""
        try:
            await self.write_config(run)
        except CheckpointError as error:
            logger.warning("run %s: %s; it is noted before the next slot", run.key, error.what)

    # -- owners ----------------------------------------------------------------------------------

    def watch(self, run: RunState, owner: Owner) -> None:
        """Be told when the owner dies."""
        if owner.pidfd >= 0:
            asyncio.get_running_loop().add_reader(owner.pidfd, self._died, run, owner)

    def _died(self, run: RunState, owner: Owner) -> None:
        if owner.dead:
            return
        self._unwatch(owner)
        owner.dead = True
        self.tools.events.emit("owner.died", run=run.run, pid=owner.pid, rank=owner.rank)
        run.settling[owner.holder] = self.tools.start(
            self._settle(run, owner), f"settle {run.key} after {owner.pid}"
        )

    def _unwatch(self, owner: Owner) -> None:
        if owner.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(owner.pidfd)
        owner.close()

    async def _settle(self, run: RunState, owner: Owner) -> None:
        run.unsettled.append(owner)
        try:
            await self._settle_slots(run)
            await self.resolve(run)
            if owner not in run.unsettled:  # else a part of it may still be found
                await self.agreement.left(run, owner)
        finally:
            run.fenced.pop(owner.holder, None)
            if run.owners.get(owner.rank) is owner:
                del run.owners[owner.rank]
            run.settling.pop(owner.holder, None)
            run.left_s = owners.uptime_s()
        await self.try_config(run)
        run.touch()

    async def _settle_slots(self, run: RunState) -> None:
        """What dead owners left in slots; tried again where memory does not answer."""
        for owner in list(run.unsettled):
            try:
                await self.leftovers.settle(run, owner)
            except CheckpointError as error:
                logger.warning(
                    "run %s: slots of process %d: %s; looked at again",
                    run.key, owner.pid, error.what,
                )  # fmt: skip
            else:
                run.unsettled = [each for each in run.unsettled if each is not owner]

    async def settled(self, run: RunState, owner: Owner) -> None:
        """Wait until what a dead owner left is settled."""
        task = run.settling.get(owner.holder)
        if task is not None:
            await asyncio.wait([task])
        elif run.owners.get(owner.rank) is owner:
            del run.owners[owner.rank]

    async def leave(self, run: RunState, owner: Owner, wait_s: float) -> None:
        """An owner closed the run: like its death, but for the event; its RAM is freed.

        At most ``wait_s`` is waited for what still reads it; it is freed later then.
        """
        self._unwatch(owner)
        owner.dead = True
        await self._settle(run, owner)
        run.finished.clear()
        self.tools.events.emit("run.closed", run=run.run, pid=owner.pid)
        # What was closed is free when that is told, unless its retention takes long.
        deadline_s = time.monotonic() + (wait_s if run.closing else 0.0)
        while is_busy(run) and not run.living() and (left_s := deadline_s - time.monotonic()) > 0:
            await until(run.changed, min(left_s, 0.1))
        await self.freer.let_go(run)

    # -- letting go ------------------------------------------------------------------------------

    async def housekeeping(self) -> None:
        """Once a second or so: silent owners, old RAM, scrubs, listeners, idle data processes."""
        for run in self.runs.values():
            if run.chores is None or run.chores.done():  # memory that hangs keeps its own run alone
                run.chores = self.tools.start(self._look_after(run), f"looking after {run.key}")
        await self.held.renew()
        if self.ready.is_set():
            await self.tools.pool.keep(self._places())
        try:
            await self.peers.keep()
        except CheckpointError as error:
            logger.warning("other nodes cannot read here: %s", error)

    async def _look_after(self, run: RunState) -> None:
        now_s = time.monotonic()
        for owner in run.living():
            if owner.is_silent(now_s):
                self._died(run, owner)
        if now_s - run.scrubbed_s > self.tools.limits.scrub_s:
            run.scrubbed_s = now_s
            self.tools.start(self.healer.scrub(run), f"scrub {run.key}")
            self.tools.start(self.guests.scrub(run), f"scrub copies in {run.key}")
        try:
            await self._settle_slots(run)
            await self.agreement.overdue(run)
            await self.guests.let_go(run)
            await self.freer.let_go(run)
        except CheckpointError as error:
            logger.warning("run %s: RAM is not freed: %s", run.key, error)

    def _places(self) -> list[TierRef]:
        """All that a data process is there for."""
        ram = [self._ram_ref(root) for root in self.held.loaded]
        slower = [tier.ref for run in self.runs.values() for tier in run.tiers.values()]
        return [SERVING, PULLING, *ram, *slower]

    def is_idle(self) -> bool:
        """Nobody owns anything, nothing is owed, no RAM is held."""
        return self.ready.is_set() and not self.runs

    async def stop(self, drain_s: float) -> None:
        """Let what is being written end within the time; the rest is in the records."""
        self.flusher.stop()
        deadline_s = time.monotonic() + drain_s
        while time.monotonic() < deadline_s and any(  # noqa: ASYNC110 - many things end it
            save.writing for run in self.runs.values() for save in run.saves.values()
        ):
            await asyncio.sleep(_POLL_S)
        self.copies.close()


def _end_waiting(run: RunState, tier: TierState) -> None:
    """Credentials have come: what failed for want of them is owed again, and tried at once."""
    if tier.task is not None:
        tier.task.cancel()  # it was asleep; another one is started
        tier.task = None
    for save in run.saves.values():
        save.failed.pop(tier.label, None)
