"""Brings staged saves to the slower tiers of a run, and reports what failed.

One task a tier and run: scan it once, then the newest owed save. Knows what is retried and what is
reported. Does not copy: data processes do, and a disk that hangs holds up its own task only. Does
not delete either (``keeping``).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest
from mtckpt.agent import protocol, queue, work
from mtckpt.agent.keeping import Keeper
from mtckpt.agent.saves import RAM, SaveState, TierState, describe_failure
from mtckpt.agent.tools import until
from mtckpt.errors import CheckpointError, CommitConflict, Damaged, TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mtckpt.agent.copies import Copies
    from mtckpt.agent.healing import Healer
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools
    from mtckpt.agent.work import TierRef

__all__ = ["SMALL_TIMEOUT_S", "Flusher"]

logger = logging.getLogger(__name__)

MAX_HEALS = 3
# What somebody waits for is put so quickly, or later.
SMALL_TIMEOUT_S = 5.0


class Flusher:
    """What is done for slower tiers; one for the agent, the state is the run's."""

    def __init__(self, tools: Tools, ring: Ring, healer: Healer, copies: Copies) -> None:
        self._tools = tools
        self._copies = copies
        self._ring = ring
        self._healer = healer
        self._keeper = Keeper(tools, ring, healer)
        self._stopping = False

    def start(self, run: RunState) -> None:
        """See that every tier of the run has its task, and that none lets a new start wait."""
        for tier in run.tiers.values():
            tier.retry.set()
            if tier.task is None or tier.task.done():
                tier.task = self._tools.start(
                    self._serve(run, tier), f"flush {run.key} to {tier.label}"
                )

    def look_again(self, run: RunState, tier: TierState) -> None:
        """Other nodes have said something of a tier: this one may let go of what it kept so far."""
        self._keeper.look_again(run, tier)

    async def put_now(self, tiers: list[TierState], key: str, data: bytes) -> dict[str, str]:
        """Write a small file to tiers; what does not answer at once is owed it. Label -> reason."""

        async def put(tier: TierState) -> None:
            if not tier.scanned:
                raise TierUnavailable(tier.problem or "did not answer yet", tier=tier.label)
            stored = self._tools.call(work.PutSmall(tier.ref, key, data), work.Stored)
            try:
                # Who asks waits no longer. The data process is not given up for that: it may have
                # its hands full.
                await asyncio.wait_for(stored, SMALL_TIMEOUT_S)
            except asyncio.TimeoutError as error:
                why = f"did not take it within {SMALL_TIMEOUT_S:g} s"
                raise TierUnavailable(why, tier=tier.label) from error

        tiers = [tier for tier in tiers if not tier.is_peers]  # each node writes it to its own
        results = await asyncio.gather(*(put(tier) for tier in tiers), return_exceptions=True)
        owed = {}
        for tier, result in zip(tiers, results, strict=True):
            if isinstance(result, CheckpointError):
                owed[tier.label] = describe_failure(result)
                tier.small_owed[key] = data
                tier.wake.set()
            elif isinstance(result, BaseException):
                raise result
        return owed

    def stop(self) -> None:
        """Begin nothing more; what is under way ends."""
        self._stopping = self._keeper.stopping = True

    async def _serve(self, run: RunState, tier: TierState) -> None:
        while not run.gone and not self._stopping:
            tier.wake.clear()
            tier.retry.clear()
            try:
                if tier.ref.access.withheld:
                    raise TierUnavailable(
                        "no credentials were left to this agent: a Checkpointer brings them",
                        tier=tier.label,
                    )
                if not tier.scanned:
                    await self._scan(run, tier)
                await self._store_small(run, tier)
                await self._complete(run, tier)
                if tier.is_peers:
                    self._copies.look(run, tier)
                worked = await self._flush_next(run, tier)
            except CheckpointError as error:
                await self._wait_after(run, tier, error)
                continue
            if not worked:
                await tier.wake.wait()

    async def _scan(self, run: RunState, tier: TierState) -> None:
        if tier.is_peers:  # who has what is found by offering it: what is there is not sent again
            run.note_scan(tier.label, work.RunScan(run.key))
            return
        scanned = await self._tools.call(work.Scan(tier.ref, run.key), work.Scanned)
        self._answered(run, tier)
        here = [found for found in scanned.runs if found.run_key == run.key]
        found = here[0] if here else work.RunScan(run.key)
        run.note_scan(tier.label, found)
        tier.small_owed |= small_files_lacking(run, found)

    async def _complete(self, run: RunState, tier: TierState) -> None:
        """Commit what an agent that died had brought to a store, all but that."""
        for save in [s for s in run.saves.values() if tier.label in s.uncommitted]:
            if not save.is_complete(tier.label):
                continue
            command = work.Complete(tier.ref, run.key, str(save.name))
            try:
                async with run.lock(save, tier.label):
                    done = await self._tools.call(command, work.Completed)
            except CommitConflict as error:
                run.drop_copy(save, tier.label)
                await self._failed(run, tier, save, error)
                continue
            if done.weak:
                save.weak.add(tier.label)
            if done.complete:
                save.uncommitted.discard(tier.label)
                run.reach(save, tier.stage)
                run.touch(save)

    async def _store_small(self, run: RunState, tier: TierState) -> None:
        """Incarnations and metrics that this tier could not take before."""
        for key, data in list(tier.small_owed.items()):
            await self._tools.call(work.PutSmall(tier.ref, key, data), work.Stored)
            tier.small_owed.pop(key, None)

    # -- one save --------------------------------------------------------------------------------

    async def _flush_next(self, run: RunState, tier: TierState) -> bool:
        if tier.is_store:
            self._add_best(run, tier)
        saves = run.flushable(tier)
        wanted = self._healer.wanted(run, tier) if saves and tier.is_store else set()
        pick = queue.pick_flush(tier.label, saves, wanted)
        if pick is None:
            return False
        for name in pick.superseded:
            self._ring.supersede(run, run.saves[name], tier.label)
            run.touch(run.saves[name])
        save = run.saves[pick.name]
        source = run.source_for(save, tier.label) or run.ram
        save.writing.add(tier.label)
        started_s = time.monotonic()
        try:
            with run.reading(save):
                async with run.lock(save, tier.label):
                    copied_bytes = await self._copy(run, tier, save, source)
        except CheckpointError as error:
            save.writing.discard(tier.label)
            if not tier.is_peers:
                # Retention looks after what it may have left, if no later try completes it.
                save.ranks.setdefault(tier.label, set())
            if _doubts(run, source, error) and run.source_for(save, tier.label) is not None:
                return True  # from there, at once
            if queue.is_owed(error):
                raise
            await self._failed(run, tier, save, error)
            return True
        finally:
            save.writing.discard(tier.label)
            tier.done_bytes = tier.total_bytes = 0
            run.touch(save)
        elapsed_s = max(time.monotonic() - started_s, 1e-6)
        tier.bytes_per_s = copied_bytes / elapsed_s
        self._answered(run, tier)
        self._arrived(run, tier, save, copied_bytes, elapsed_s)
        if tier.is_peers:
            return True  # other nodes let go of what they hold
        self._keeper.start(run, tier, save)
        return True

    def _base(self, run: RunState, tier: TierState) -> str:
        """The newest save in a store: rules let it go last."""
        held = [s for s in run.saves.values() if s.is_complete(tier.label) and s.save_id]
        return str(max(held, key=lambda s: s.order).name) if held else ""

    def _add_best(self, run: RunState, tier: TierState) -> None:
        """The best of all goes to a store that keeps it, due or not, while it can be had."""
        for name in self._healer.best(run, tier):
            save = run.saves[name]
            known = tier.label in save.due or tier.label in save.failed
            if known or save.is_complete(tier.label) or run.source_for(save, tier.label) is None:
                continue
            save.due.add(tier.label)
            save.superseded.discard(tier.label)
            run.touch(save)

    async def bring(
        self, run: RunState, tier: TierState, save: SaveState, ranks: Collection[int]
    ) -> bool:
        """These parts of a save that are here, of others' the copies: nobody else has them, nor
        brings them. True if the tier has all of it now. Raises what the tier says."""
        async with run.lock(save, tier.label):
            scanned = await self._tools.call(work.Scan(tier.ref, run.key), work.Scanned)
            there = save.ranks.setdefault(tier.label, set()).copy()
            for each in [entry for found in scanned.runs for entry in found.saves]:
                if each.save == str(save.name):
                    # As it was captured: a copy that is here may leave something out.
                    there.update(each.ranks)
                    save.shard_bytes.update(zip(each.ranks, each.shard_bytes, strict=False))
            here = (save.guests | save.ranks.get(RAM, set())).intersection(ranks)
            with run.reading(save):
                await self._copy_ranks(run, tier, save, run.ram, sorted(here - there))
            save.ranks.setdefault(tier.label, set()).update(there)  # it may be looked at meanwhile
        if save.is_complete(tier.label) and tier.label not in save.uncommitted:
            run.reach(save, tier.stage)
        run.touch(save)
        return here <= save.ranks.get(tier.label, set())

    async def _copy(self, run: RunState, tier: TierState, save: SaveState, source: TierRef) -> int:
        if tier.is_peers:
            return await self._copies.copy(run, tier, save)
        ranks = sorted(save.ranks.get(source.label, ()))
        return await self._copy_ranks(run, tier, save, source, ranks)

    async def _copy_ranks(
        self,
        run: RunState,
        tier: TierState,
        save: SaveState,
        source: TierRef,
        ranks: Sequence[int],
    ) -> int:
        tier.total_bytes, tier.done_bytes = save.size_bytes, 0
        before_bytes = reused_bytes = 0

        def progress(news: work.Progress) -> None:
            tier.done_bytes = before_bytes + news.done_bytes

        base = self._base(run, tier) if tier.config.reuse else ""
        for rank in ranks:
            command = work.Flush(
                run.key,
                str(save.name),
                rank,
                source,
                tier.ref,
                incarnation=max(run.begun, default=0) if rank == ranks[0] else 0,
                is_last=rank == ranks[-1],
                base=base,
                reused_bytes=reused_bytes,
                parts=run.layout is not None,
            )
            flushed = await self._tools.call(command, work.Flushed, save.size_bytes, progress)
            save.ranks.setdefault(tier.label, set()).add(rank)
            before_bytes += flushed.copied_bytes
            reused_bytes += flushed.reused_bytes
            run.counters["reused_bytes"] += flushed.reused_bytes
            if flushed.weak:
                save.weak.add(tier.label)
            # A listing may lag behind what was stored: it is looked at again then.
            if tier.is_store and rank == ranks[-1] and not flushed.complete:
                save.uncommitted.add(tier.label)
            else:
                save.uncommitted.discard(tier.label)
        if save.reported:
            key, data = metrics_file(run, save)
            await self._tools.call(work.PutSmall(tier.ref, key, data), work.Stored)
        return before_bytes

    def _arrived(
        self, run: RunState, tier: TierState, save: SaveState, size_bytes: int, elapsed_s: float
    ) -> None:
        save.owed_why.pop(tier.label, None)
        save.damaged.discard(tier.label)
        run.counters["flushed"] += 1
        self._tools.count("save_flushed", tier.label)
        self._tools.count("bytes", tier.label, size_bytes)
        # Discharged for good: what retention deletes later is not owed again.
        save.due.discard(tier.label)
        if save.is_complete(tier.label) and tier.label not in save.uncommitted:
            run.reach(save, tier.stage)
        self._tools.events.emit(
            "save.flushed",
            run=run.run,
            step=save.name.step,
            tier=tier.label,
            bytes=size_bytes,
            seconds=round(elapsed_s, 4),
        )
        run.touch(save)

    # -- failures --------------------------------------------------------------------------------

    def _answered(self, run: RunState, tier: TierState) -> None:
        if tier.problem:
            logger.info("run %s: %s answers again", run.key, tier.label)
            self._tools.events.emit("tier.answers", run=run.run, tier=tier.label)
        tier.problem, tier.attempts, tier.owed_since_s = "", 0, None

    async def _wait_after(self, run: RunState, tier: TierState, error: CheckpointError) -> None:
        """Owed: told once a change, tried again later; what is owed for too long has failed."""
        now_s = time.monotonic()
        owed = [save for save in run.saves.values() if tier.label in save.owed]
        if not queue.is_owed(error):
            for save in owed:
                await self._failed(run, tier, save, error)
        elif (
            tier.owed_since_s is not None and now_s - tier.owed_since_s > self._tools.limits.owed_s
        ):
            for save in owed:
                await self._failed(run, tier, save, error)
            tier.owed_since_s = now_s
        else:
            tier.owed_since_s = tier.owed_since_s or now_s
            for save in owed:
                save.owed_why[tier.label] = describe_failure(error)
                run.touch(save)
        if not tier.problem:
            logger.warning("run %s: %s: %s; tried again", run.key, tier.label, error.what)
            self._tools.events.emit(
                "tier.owed", run=run.run, tier=tier.label, reason=describe_failure(error)
            )
        tier.problem = describe_failure(error)
        tier.attempts += 1
        run.counters["retries"] += 1
        pause_s = queue.backoff_s(tier.attempts, random.random())
        await until(tier.retry, pause_s)

    async def _failed(
        self, run: RunState, tier: TierState, save: SaveState, error: CheckpointError
    ) -> None:
        """Reported once, with this save; a later save tries again."""
        if isinstance(error, Damaged):
            # The source: another tier may have a good copy to heal it from.
            label = str(error.details.get("tier", RAM))
            label = label if label in run.tiers and label != tier.label else RAM
            save.damaged.add(label)
            save.heals += 1
            if save.heals <= MAX_HEALS and await self._healer.heal_save(run, save, label):
                return
        save.failed[tier.label] = protocol.error_to_wire(error)
        save.owed_why.pop(tier.label, None)
        tier.problem = describe_failure(error)
        run.counters["failed"] += 1
        self._tools.count("save_failed", tier.label)
        logger.warning(
            "run %s: step %d did not reach %s: %s", run.key, save.name.step, tier.label, error.what
        )
        self._tools.events.emit(
            "save.failed",
            run=run.run,
            step=save.name.step,
            tier=tier.label,
            reason=describe_failure(error),
        )
        run.touch(save)


def _doubts(run: RunState, source: TierRef, error: CheckpointError) -> bool:
    """Whether a disk that a save was to come from may be why it did not. It is no source then until
    it has been looked at again."""
    disk = run.tiers.get(source.label)
    silent = error.details.get("verb") == "Flush"  # a process that waited for either
    if disk is None or isinstance(error, Damaged):
        return False
    if not silent and error.details.get("tier") != source.label:
        return False
    disk.scanned = False
    disk.wake.set()
    return True


def small_files_lacking(run: RunState, found: work.RunScan) -> dict[str, bytes]:
    """Starts of the run and reported metrics that a tier could not take while an earlier agent
    lived, by key."""
    there = {(incarnation.number, incarnation.id) for incarnation in found.incarnations}
    owed = {
        _inventory.incarnation_key(run.key, incarnation): _manifest.encode_sealed(incarnation)
        for incarnation in run.begun.values()
        if (incarnation.number, incarnation.id) not in there
    }
    for entry in found.saves:
        save = run.saves.get(entry.save)
        if save is not None and save.reported and entry.ranks and entry.metrics != save.metrics:
            key, data = metrics_file(run, save)
            owed[key] = data
    return owed


def metrics_file(run: RunState, save: SaveState) -> tuple[str, bytes]:
    """Key and bytes of the metrics that were reported after a save."""
    from xxhash import xxh3_64_hexdigest

    value = _manifest.Metrics(
        _manifest.FORMAT_VERSION, save.name.step, save.save_id, dict(save.metrics)
    )
    data = _manifest.encode_sealed(value)
    return _inventory.save_key(run.key, save.name, f"metrics-{xxh3_64_hexdigest(data)}.json"), data
