"""What a trainer can ask about a run, one method a message.

Knows who may ask, and the order in which an answer and what it promises come: whatever the next
agent would need is in a file before the reply is sent. Does not read requests (``server``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from hmac import compare_digest
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _inventory, _manifest
from mtckpt._manifest import Incarnation
from mtckpt.agent import known_runs, owners, protocol, work
from mtckpt.agent.borrowing import lent
from mtckpt.agent.flushing import SMALL_TIMEOUT_S, metrics_file
from mtckpt.agent.freeing import why_kept
from mtckpt.agent.healing import shard_named
from mtckpt.agent.owners import Claim, Owner, Verdict
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.errors import (
    AccessDenied,
    AgentTooOld,
    CheckpointError,
    RunLocked,
    UsageError,
)
from mtckpt.tiers.base import check_key

if TYPE_CHECKING:
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.work import TierRef

__all__ = ["Caller", "Verbs"]

logger = logging.getLogger(__name__)

_CLAIM_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of a connection. ``pidfd`` belongs to whoever handles the request."""

    pid: int
    uid: int
    pidfd: int | None = None


class Verbs:
    """See the module."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tools = registry.tools
        self._ring = registry.ring
        registry.peers.verbs["damage"] = (protocol.Damage, self.damage)

    # -- opening ---------------------------------------------------------------------------------

    async def open(self, caller: Caller, key: str, message: protocol.Open) -> protocol.Opened:
        """A Checkpointer comes, or comes back. Raises RunLocked while somebody else has the run,
        NodeDraining where none may come any more."""
        if message.protocol > protocol.PROTOCOL_VERSION:
            raise AgentTooOld(
                "the node agent is older than this process",
                state="nothing was done",
                agent_version=protocol.PROTOCOL_VERSION,
                wanted_version=message.protocol,
            )
        if _manifest.run_key(message.run) != key:
            raise UsageError("the run's name and its key differ", state="nothing was done", key=key)
        if self._registry.service and caller.uid not in (0, os.geteuid()):
            message = msgspec.structs.replace(message, tiers=[*map(lent, message.tiers)])
        self._refuse_new(self._registry.runs.get(key), message)
        while True:
            run = await self._registry.run_for(key, message)
            async with run.opening:
                self._refuse_new(run, message)  # the node may be about to go by now
                if not run.gone:
                    return await self._open(run, caller, message)

    def _refuse_new(self, run: RunState | None, message: protocol.Open) -> None:
        if run is None or all(owner.holder != message.holder for owner in run.living()):
            self._registry.drainer.refuse()

    async def _open(self, run: RunState, caller: Caller, message: protocol.Open) -> protocol.Opened:
        """Under ``run.opening``."""
        self._admit(run, caller, message)
        # While nobody was there, memory may have been emptied by whoever tidies up.
        run.doubted |= bool(run.slots or run.saves) and not run.living()
        await self._registry.freer.look_again(run)
        fenced_pid = await self._claim(run, caller, message)
        owner = run.owners[message.rank]
        run.closing = False
        self._registry.set_tiers(run, message.tiers)
        await self._registry.try_config(run)
        known_runs.note(self._registry.directory, run.run, [t.config for t in run.tiers.values()])
        self._registry.flusher.start(run)
        finished, run.finished = run.finished, []
        self._tools.events.emit(
            "run.opened", run=run.run, pid=owner.pid, rank=owner.rank, fenced_pid=fenced_pid or None
        )
        return protocol.Opened(
            protocol.PROTOCOL_VERSION,
            self._registry.agent_id,
            self._registry.boot_id,
            os.getpid(),
            run.ram.path,
            finished,
            fenced_pid,
            self._registry.peers.others(run),
            checks_left=True,
            unlooked=self._registry.held.unlooked.pop(run.key, ""),
            highest=run.incarnation,
        )

    def _admit(self, run: RunState, caller: Caller, message: protocol.Open) -> None:
        """A service lets in who made the run, or knows its token. An own agent has one user."""
        digest = hashlib.sha256(message.token.encode()).hexdigest() if message.token else ""
        if run.creator_uid < 0:
            run.creator_uid, run.token = caller.uid, digest
            return
        if self.may_speak(run, caller.uid):
            return
        if not run.token or not compare_digest(run.token, digest):
            raise AccessDenied(
                "this run belongs to another user",
                state="nothing was done",
                actions=["set MTCKPT_TOKEN to the token that the run was started with"],
                tier=RAM,
                run=run.run,
            )
        run.admitted.add(caller.uid)

    def may_speak(self, run: RunState, uid: int) -> bool:
        """Whether a user may say anything about a run, or hear of it."""
        ours = (run.creator_uid, 0, os.geteuid())
        return not self._registry.service or uid in ours or uid in run.admitted

    async def _claim(self, run: RunState, caller: Caller, message: protocol.Open) -> int:
        """Make the caller the owner of its rank; the pid of another owner that was fenced, or 0."""
        new = self._owner_from(caller, message)
        claim = Claim(new.holder, new.pid, new.start_ticks)
        started_s = time.monotonic()
        while (old := run.owners.get(message.rank)) is not None:
            if old.dead:
                await self._registry.settled(run, old)
                continue
            waited_s = time.monotonic() - started_s
            patience_s = self._tools.limits.takeover_s
            verdict = owners.judge(old, old.process(), claim, waited_s, patience_s)
            if verdict is Verdict.REOPEN:
                self._come_back(run, old, new, message)
                await self._registry.resolve(run)
                return 0
            if verdict is Verdict.FENCE:
                await self._fence(run, old, new)
                self._own(run, new, message)
                return old.pid if old.pid != new.pid else 0
            if verdict is Verdict.REFUSE:
                new.close()
                raise _locked(run, old)
            await asyncio.sleep(_CLAIM_POLL_S)
        self._own(run, new, message)
        return 0

    def _owner_from(self, caller: Caller, message: protocol.Open) -> Owner:
        """Facts as this agent sees them; the message's for one of another namespace."""
        process = owners.read_process(caller.pid)
        pidfd = caller.pidfd
        if pidfd is not None:
            pidfd = os.dup(pidfd)
        elif process is not None:
            pidfd = owners.open_pidfd(process.pid, process.start_ticks)
        return Owner(
            message.holder,
            message.rank,
            process.pid if process else message.pid,
            process.start_ticks if process else message.start_ticks,
            process.parent_pid if process else message.parent_pid,
            self._registry.host,
            caller.uid,
            message.world_size,
            message.incarnation,
            pidfd=-1 if pidfd is None else pidfd,
            seen=process is not None,
        )

    def _own(self, run: RunState, owner: Owner, message: protocol.Open) -> None:
        run.owners[owner.rank] = owner
        self._hold(run, owner, message)
        self._registry.watch(run, owner)

    def _come_back(self, run: RunState, old: Owner, new: Owner, message: protocol.Open) -> None:
        """The same Checkpointer: after this agent was started, or a connection was lost."""
        new.close()
        old.absent = False
        old.incarnation = max(old.incarnation, message.incarnation)
        self._hold(run, old, message)

    def _hold(self, run: RunState, owner: Owner, message: protocol.Open) -> None:
        """Slots that an agent before this one gave to this Checkpointer are still its own."""
        inodes = set(message.held.values())
        for slot in run.slots.values():
            if slot.doubtful and slot.inode in inodes and slot.state is not SlotState.COMMITTED:
                slot.state, slot.holder, slot.rank = SlotState.CAPTURING, owner.holder, owner.rank

    async def _fence(self, run: RunState, old: Owner, new: Owner) -> None:
        old.fenced_by = new.pid
        run.owners.pop(old.rank, None)
        run.fenced[old.holder] = old
        run.counters["fenced"] += 1
        logger.warning("run %s: process %d is fenced by %d", run.key, old.pid, new.pid)
        self._tools.events.emit("run.fenced", run=run.run, pid=old.pid, by_pid=new.pid)
        run.touch()
        if old.is_same(Claim("", new.pid, new.start_ticks)):
            # An older Checkpointer of the same process: its files lose their names, so whatever it
            # still writes is nobody's; waiting for the process to die would leak a slot a time.
            await self._ring.give_up(run, old)

    # -- incarnations ----------------------------------------------------------------------------

    async def begin(self, run: RunState, message: protocol.Begin) -> protocol.Begun:
        """Start an incarnation: its file is in every tier that answers before this returns."""
        owner = run.owner_of(message.holder)
        await self._registry.wait_scanned(run, SMALL_TIMEOUT_S)
        run.owner_of(message.holder)
        known = run.incarnations.get(message.number)
        if known is None or known.id != message.id:
            if message.number <= run.incarnation:
                raise RunLocked(
                    f"incarnation {run.incarnation} of this run is known already",
                    state="nothing was written",
                    actions=["restore again: the newest step may be another one now"],
                    run=run.run,
                    owner_pid=owner.pid,
                    owner_host=owner.host,
                    number=message.number,
                    highest=run.incarnation,
                )
            known = Incarnation(
                _manifest.FORMAT_VERSION,
                run.run,
                message.number,
                message.id,
                message.parent,
                message.host or owner.host,
                message.pid or owner.pid,
            )
        before = run.incarnations.get(message.number)
        run.incarnations[message.number] = known
        key, data = _inventory.incarnation_key(run.key, known), _manifest.encode_sealed(known)
        try:
            await self._tools.call(work.PutSmall(run.ram, key, data), work.Stored)
        except CheckpointError:
            # It did not start: the trainer asks again, perhaps under another id.
            if before is None and run.incarnations.get(message.number) is known:
                del run.incarnations[message.number]
            raise
        run.begun[message.number] = known
        run.begun_s = time.monotonic()
        owner.incarnation, owner.incarnation_id = message.number, message.id
        owner.last_step = -1
        more = [o for o in run.owners.values() if o.rank >= owner.world_size]
        # Ranks that the job had more before, left behind by a launcher that was killed; or, where
        # that is true of this one itself, those that the next job has more.
        for old in more if not owners.is_left(owner, owner.process()) else ():
            if old.incarnation < message.number:
                await self._fence(run, old, owner)
        # One that is left behind by an earlier start of the job is none of its ranks.
        own = [o for o in run.owners.values() if o.incarnation in (0, message.number)]
        if len([o for o in own if not o.dead]) >= owner.world_size:
            self._registry.links.leave(run)  # all of them are on this node now
        await self._registry.agreement.begun(run, message.number, message.parent)
        await self._registry.write_config(run)
        owed = await self._registry.flusher.put_now(list(run.tiers.values()), key, data)
        run.touch()
        return protocol.Begun(owed)

    # -- other nodes -----------------------------------------------------------------------------

    async def listen(self, run: RunState, message: protocol.Listen) -> protocol.PeerAddress:
        """Agents of other nodes may find this one from here on."""
        run.owner_of(message.holder)
        return await self._registry.peers.listen(message)

    async def join(self, run: RunState, message: protocol.Join) -> protocol.Done:
        """The nodes of a run, as each of its ranks says them."""
        async with self._registry.peers.joining:
            owner = run.owner_of(message.holder)  # another start's may have taken its place
            done = await self._registry.peers.join(run, owner, message)
            self._registry.links.join(run, owner.rank)
        await self._registry.write_config(run)
        return done

    async def lend(self, run: RunState, message: protocol.Lend) -> protocol.Done:
        """Who may not open a run here does not have it read by others either."""
        owner = run.owner_of(message.holder)
        source = self._registry.runs.get(message.run_key)
        allowed = (owner.uid, 0) if source is None else (source.creator_uid, 0)
        if self._registry.service and (source is None or owner.uid not in allowed):
            raise AccessDenied(
                "this run belongs to another user", state="nothing was lent", run=message.run_key
            )
        await self._registry.peers.lend(run, check_key(message.run_key))
        return protocol.Done()

    # -- saves -----------------------------------------------------------------------------------

    async def want_slots(self, run: RunState, message: protocol.WantSlots) -> protocol.Slots:
        owner = run.owner_of(message.holder)
        if run.doubted:
            await self._registry.freer.look_again(run)
            await self._registry.write_config(run)
        return await self._ring.want(run, owner, message)

    async def seal(self, run: RunState, message: protocol.Seal) -> protocol.Sealed:
        """The save is RAM's when this returns; slower tiers follow by themselves."""
        owner = run.owner_of(message.holder)
        name, why_not = await self._ring.seal(run, owner, message)
        if why_not:
            call_off = protocol.CallOff(message.holder, message.save_id, message.step, why_not)
            await self._registry.agreement.declined(run, owner, call_off)
            return protocol.Sealed("", staged=False, called_off=why_not)
        await self._registry.agreement.sealed(run, owner)
        next_slot = await self._ring.next_for(run, owner)
        save = run.saves.get(name)
        if save is None:
            return protocol.Sealed(name, next_slot)
        self._registry.replicas.look(run, save)
        return protocol.Sealed(
            name, next_slot, "staged" in save.stages, save.called_off, save.failures().get(RAM)
        )

    async def call_off(self, run: RunState, message: protocol.CallOff) -> protocol.Done:
        """A rank does not take part in a save: nobody does."""
        owner = run.owner_of(message.holder)
        await self._registry.agreement.declined(run, owner, message)
        return protocol.Done()

    async def release(self, run: RunState, message: protocol.Release) -> protocol.Done:
        await self._ring.release(run, run.owner_of(message.holder), message.slot_id)
        run.doubted = True  # why nothing was captured is not said
        return protocol.Done()

    async def report(self, run: RunState, message: protocol.Report) -> protocol.Done:
        """Metrics that became known after the save go beside it, in every tier that has it."""
        owner = run.owner_of(message.holder)
        save = run.save_at(owner.incarnation, message.step)
        if save is None:
            raise UsageError(
                f"step {message.step} was not saved in this incarnation",
                state="nothing was written",
                step=message.step,
                run=run.run,
            )
        save.metrics.update(message.metrics)
        save.reported = True
        key, data = metrics_file(run, save)
        if RAM in save.ranks:
            await self._tools.call(work.PutSmall(run.ram, key, data), work.Stored)
        tiers = [tier for label, tier in run.tiers.items() if label in save.ranks]
        owed = await self._registry.flusher.put_now(tiers, key, data)
        run.touch()  # it may be the best now, which a store wants
        return protocol.Done(", ".join(f"{label}: {why}" for label, why in owed.items()))

    async def damage(self, run: RunState, message: protocol.Damage) -> protocol.Done:
        """Looked into in the background; the reader goes on with another copy."""
        self._tools.start(
            self._registry.healer.reported(run, message.tier, message.key, message.reason),
            f"damage in {message.tier}",
        )
        found = shard_named(message.key)
        if message.tier == RAM and found and found[0] in run.saves:
            guest = self._registry.guests.reported(run, run.saves[found[0]], found[1])
            self._tools.start(guest, "damage in a copy")
        return protocol.Done()

    async def flush(self, run: RunState, message: protocol.Flush) -> protocol.Done:
        """Make the newest staged save due everywhere; a tier that refused it before tries again."""
        owner = run.owner_of(message.holder)
        # What somebody has removed meanwhile is to be brought there again, while it can be.
        for disk in run.disks():
            disk.scanned = False
            disk.wake.set()
        await self._registry.wait_scanned(run, SMALL_TIMEOUT_S)
        staged = run.newest_staged()
        # Other ranks may not have sealed their parts of the newest one yet.
        coming = [s for s in run.open_saves(owner.incarnation) if not s.lacks(owner.rank)]
        save = max([*coming, *([staged] if staged else [])], key=lambda s: s.order, default=None)
        if save is None:
            return protocol.Done("nothing is staged")
        save.want_in(run.tiers)
        save.said = None  # who asks for it waits for what it may have been told before
        run.touch(save)
        return protocol.Done(str(save.name))

    async def fetch(self, run: RunState, message: protocol.Fetch) -> protocol.Fetched:
        """A save comes from a store to this node, and the answer says how far it is."""
        run.owner_of(message.holder)
        await self._registry.wait_scanned(run, SMALL_TIMEOUT_S)
        return await self._registry.fetcher.fetch(run, message)

    async def close(self, run: RunState, message: protocol.Close) -> protocol.Closed:
        """The holder is gone for good; what is owed goes on, then RAM is freed if it may be."""
        owner = next((o for o in run.living() if o.holder == message.holder), None)
        if owner is None:
            return protocol.Closed()
        if not owner.fenced_by:
            run.closing = message.free_ram
        await self._registry.leave(run, owner, min(message.wait_s, SMALL_TIMEOUT_S))
        return protocol.Closed(why_kept(run))

    # -- removing --------------------------------------------------------------------------------

    async def remove(self, run: RunState, message: protocol.Remove) -> protocol.Removed:
        """Delete one step or all of a run, from the tiers named or from all."""
        living = [o for o in run.owners.values() if not o.dead]
        if living and message.step is None:
            raise _locked(run, living[0])
        # An agent that has just started does not know yet what the slower tiers hold.
        await self._registry.wait_scanned(run, SMALL_TIMEOUT_S)
        # What other nodes hold is removed there.
        own = [*(label for label, tier in run.tiers.items() if not tier.is_peers), RAM]
        labels = message.tiers or own
        removed: list[str] = []
        kept: list[str] = []
        for label in labels:
            if label not in own:
                raise UsageError(f"the run has no tier {label!r} here", state="nothing was removed")
            ref = run.ram if label == RAM else run.tiers[label].ref
            for save in [s for s in run.saves.values() if _is_in(s, label)]:
                if message.step in (None, save.name.step):
                    why = await self._remove_one(run, save, label, ref)
                    (kept if why else removed).append(f"{label}: {save.name}{why}")
        if message.step is None and RAM in labels and not kept:
            async with run.opening:
                living = [o for o in run.owners.values() if not o.dead]
                if living:  # it came while the other tiers were looked at
                    raise _locked(run, living[0])
                await self._registry.freer.wipe(run)
            if set(labels) == set(own):
                known_runs.forget(self._registry.directory, run.run)
        return protocol.Removed(removed, kept)

    async def _remove_one(self, run: RunState, save: SaveState, label: str, ref: TierRef) -> str:
        if label == RAM and (save.recycling or save.writing or save.readers):
            return " is in use"
        save.due.discard(label)
        async with run.lock(save, label):
            command = work.Delete(ref, run.key, str(save.name))
            if (await self._tools.call(command, work.Deleted)).busy:
                return " is being read"
        if label == RAM:
            save.guests.clear()
        run.drop_copy(save, label)
        run.touch(save)
        return ""


def _is_in(save: SaveState, label: str) -> bool:
    return label in save.ranks or (label == RAM and bool(save.guests))


def _locked(run: RunState, owner: Owner) -> RunLocked:
    return RunLocked(
        f"process {owner.pid} on {owner.host} owns this run and is alive",
        state="nothing was done",
        actions=[
            f"end it: kill {owner.pid}",
            "or give this job another run name",
        ],
        run=run.run,
        owner_pid=owner.pid,
        owner_host=owner.host,
    )
