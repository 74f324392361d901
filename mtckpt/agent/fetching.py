"""Brings a save back from a store to this node, so that the next restart is from its own memory.

Knows where it goes: RAM, or a disk where RAM has no room. Of a job on several nodes it is told
which ranks' shards. Bytes are compared with their digests on the way, by the same copy that brings
saves to a store. What is owed to disks, and to other nodes' memory, follows as after any save. Does
not restore: trainers read what has arrived like any other save.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtckpt._room import check_room
from mtckpt.agent import protocol, work
from mtckpt.agent.queue import SlotState
from mtckpt.agent.saves import RAM, SaveState, Slot, TierState
from mtckpt.errors import CheckpointError, ObjectNotFound, TierFull

if TYPE_CHECKING:
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools
    from mtckpt.agent.work import TierRef

__all__ = ["Fetcher"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Fetch:
    """One save on its way. The task returns the tier that it reached."""

    task: asyncio.Task[str]
    total_bytes: int = 0
    done_bytes: int = 0


_Key = tuple[str, str, frozenset[int]]


class Fetcher:
    """See the module. One for the agent, the state is the run's."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._under_way: dict[_Key, _Fetch] = {}

    async def fetch(self, run: RunState, message: protocol.Fetch) -> protocol.Fetched:
        """How far the save is; the first who asks sets it going. Raises what it ended with."""
        save = run.saves.get(message.save)
        ranks = frozenset(message.ranks or (range(save.world_size) if save else ()))
        key = (run.key, message.save, ranks)
        fetch = self._under_way.get(key)
        if fetch is None:
            stores = [t for t in run.tiers.values() if t.is_store]
            store = next((t for t in stores if save and save.is_complete(t.label)), None)
            if save is None or store is None:
                raise ObjectNotFound(
                    "no store that this agent looked into has that save", key=message.save
                )
            task = self._tools.start(self._bring(run, store, save, ranks), f"fetch {message.save}")
            fetch = self._under_way[key] = _Fetch(task)
        await asyncio.wait([fetch.task], timeout=min(message.wait_s, 10.0))
        if not fetch.task.done():
            return protocol.Fetched("", fetch.done_bytes, fetch.total_bytes)
        self._under_way.pop(key, None)
        return protocol.Fetched(fetch.task.result(), fetch.total_bytes, fetch.total_bytes)

    async def _bring(
        self, run: RunState, store: TierState, save: SaveState, ranks: frozenset[int]
    ) -> str:
        await self._look_for(run, store, save, ranks)
        fetch = self._under_way.get((run.key, str(save.name), ranks))
        if fetch is not None:
            fetch.total_bytes = save.size_of(ranks)
        disks = [tier for tier in run.tiers.values() if tier.config.kind == "disk"]
        places = [(RAM, run.ram), *((tier.label, tier.ref) for tier in disks)]
        full: TierFull | None = None
        for label, ref in places:
            if ranks <= save.ranks.get(label, set()):
                return label
            try:
                async with run.lock(save, label):
                    await self._copy(run, store, save, ranks, label, ref)
            except TierFull as error:
                full = error
                logger.info("run %s: %s is not fetched to %s: %s", run.key, save.name, label, error)
                continue
            self.arrived(run, save, ranks, label)
            return label
        assert full is not None  # RAM at least was tried
        raise full

    async def _look_for(
        self, run: RunState, store: TierState, save: SaveState, ranks: frozenset[int]
    ) -> None:
        """What other nodes brought to a store is known here by their word: the records say more."""
        if not ranks <= save.ranks.get(store.label, set()):
            scanned = await self._tools.call(work.Scan(store.ref, run.key), work.Scanned)
            found = next((scan for scan in scanned.runs if scan.run_key == run.key), None)
            run.note_scan(store.label, found or work.RunScan(run.key))
        if not ranks <= save.ranks.get(store.label, set()):
            raise ObjectNotFound("the store does not have all of that save", key=str(save.name))

    async def _copy(
        self,
        run: RunState,
        store: TierState,
        save: SaveState,
        ranks: frozenset[int],
        label: str,
        ref: TierRef,
    ) -> None:
        fetch = self._under_way.get((run.key, str(save.name), ranks))
        before_bytes = 0

        def progress(news: work.Progress) -> None:
            if fetch is not None:
                fetch.done_bytes = before_bytes + news.done_bytes

        is_new = label not in save.ranks and (label == RAM or run.tiers[label].scanned)
        if label == RAM:
            needed_bytes = save.size_of(ranks - save.ranks.get(RAM, set()))
            with contextlib.suppress(OSError):  # a directory that is gone is named by the copy
                check_room(ref.path, needed_bytes)
        try:
            for rank in sorted(ranks):
                command = work.Flush(
                    run.key, str(save.name), rank, store.ref, ref,
                    is_last=rank == max(ranks), parts=run.layout is not None,
                )  # fmt: skip
                done = await self._tools.call(command, work.Flushed, save.size_bytes, progress)
                before_bytes += done.copied_bytes
        except CheckpointError:
            if is_new:
                await self._take_back(run, save, ranks, label, ref)
            raise

    async def _take_back(
        self, run: RunState, save: SaveState, ranks: frozenset[int], label: str, ref: TierRef
    ) -> None:
        """The parts of some of these ranks are not what was asked for, and nobody would know of
        them."""
        try:
            own = sorted(ranks - save.guests) if label == RAM else sorted(ranks)
            alone = len(own) == save.world_size
            command = work.Delete(ref, run.key, str(save.name), ranks=None if alone else own)
            await self._tools.call(command, work.Deleted)
        except CheckpointError as error:
            # Why it was not fetched is what is told.
            logger.warning("run %s: %s stays in part in %s: %s", run.key, save.name, label, error)

    def arrived(self, run: RunState, save: SaveState, ranks: frozenset[int], label: str) -> None:
        """These parts are in one of this node's tiers, and to go on from there as after a save."""
        save.ranks.setdefault(label, set()).update(ranks)
        if label == RAM:
            save.remains = False
            save.guests -= ranks  # what was brought once more is this node's own
            here = {slot.rank for slot in run.slots.values() if slot.save == str(save.name)}
            for rank in save.ranks[RAM] - here:
                slot = Slot(os.urandom(6).hex(), SlotState.COMMITTED, save.shard_bytes[rank])
                slot.save, slot.rank = str(save.name), rank
                run.slots[slot.slot_id] = slot
            if save.is_complete(RAM):  # else once the job begins, which goes on from it
                run.reach(save, "staged")
            save.due |= {t.label for t in run.tiers.values() if not t.is_store}
        run.counters["fetched"] += 1
        self._tools.count("save_fetched", label)
        self._tools.events.emit("save.fetched", run=run.run, step=save.name.step, tier=label)
        run.touch(save)
