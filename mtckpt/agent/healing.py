"""Reads saves back, replaces damaged copies by good ones, and looks over everything now and then.

Knows which copies of a save there are and which may be a source. Does not blame: the digest table
was written while the save was captured, so a copy either is that or it is not. A save with no good
copy left is named, never repaired from a guess.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import msgspec

from mtckpt._manifest import SaveName, parse_record_file
from mtckpt._retention import Held, KeepBest, decide, keep_from_wire, kept
from mtckpt.agent import queue, work
from mtckpt.agent.partners import partners_of
from mtckpt.agent.run_config import PULLING
from mtckpt.agent.saves import RAM, Line, SaveState, TierState
from mtckpt.errors import CheckpointError, Damaged, TierUnavailable

if TYPE_CHECKING:
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools
    from mtckpt.agent.work import TierRef

__all__ = ["Healer", "shard_named"]

logger = logging.getLogger(__name__)


class Healer:
    """What is done about damage; one for the agent, the state is the run's."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def verify_save(self, run: RunState, save: SaveState, label: str) -> bool:
        """Read a save back, heal it if need be; True if it is good there in the end."""
        for rank in sorted(save.ranks.get(label, ())):
            command = work.Verify(_ref(run, label), run.key, str(save.name), rank)
            with _held(run, save, label):
                verified = await self._tools.call(command, work.Verified, save.size_bytes)
            if str(save.name) not in run.saves or label not in save.ranks:
                return False
            if verified.damaged:
                await self.damaged(run, save, label, verified.damaged[0].reason)
                if not await self._heal(run, save, label, rank):
                    return False
        save.verified.add(label)
        if run.layout:
            run.touch(save)  # other nodes wait to hear that
        return True

    async def damaged(self, run: RunState, save: SaveState, label: str, reason: str) -> None:
        """Note a damaged copy: counted, told, and never counted as a good one again."""
        save.damaged.add(label)
        save.verified.discard(label)
        run.counters["damaged"] += 1
        run.failures += label == RAM
        self._tools.count("save_damaged", label)
        if run.layout:
            run.touch(save)
        logger.warning("run %s: step %d in %s: %s", run.key, save.name.step, label, reason)
        self._tools.events.emit(
            "save.damaged", run=run.run, step=save.name.step, tier=label, reason=reason
        )

    async def heal_save(self, run: RunState, save: SaveState, label: str) -> bool:
        """Replace every damaged shard of a save in one tier; True if all are good now."""
        healed = [
            await self._heal(run, save, label, rank) for rank in sorted(save.ranks.get(label, ()))
        ]
        return bool(healed) and all(healed)

    async def _heal(self, run: RunState, save: SaveState, label: str, rank: int) -> bool:
        for source in [RAM, *run.tiers]:
            if source == label or rank not in save.ranks.get(source, ()):
                continue
            try:
                with _held(run, save, label, source):
                    async with run.lock(save, label):
                        replaced = await self._replace(run, save, label, rank, source)
            except Damaged as error:
                if source not in save.damaged:
                    await self.damaged(run, save, source, error.what)
                continue
            except CheckpointError as error:
                logger.warning("run %s: %s cannot heal %s: %s", run.key, source, label, error.what)
                continue
            save.damaged.discard(label)
            run.counters["healed"] += 1
            self._tools.count("save_healed", label)
            self._tools.events.emit(
                "save.healed",
                run=run.run,
                step=save.name.step,
                tier=label,
                source=source,
                files=replaced,
            )
            run.touch(save)
            return True
        self._tools.events.emit(
            "save.unhealed", run=run.run, step=save.name.step, tier=label, rank=rank
        )
        return False

    async def _replace(
        self, run: RunState, save: SaveState, label: str, rank: int, source: str
    ) -> int:
        """Put good files of another tier in the place of bad ones; how many."""
        size_bytes = 3 * save.size_bytes
        if source == RAM or not run.tiers[source].is_peers:
            refs = _ref(run, label), _ref(run, source)
            heal = work.Heal(run.key, str(save.name), rank, *refs)
            return len((await self._tools.call(heal, work.Healed, size_bytes)).replaced)
        layout, secret = run.layout, run.secret
        if layout is None:
            raise TierUnavailable("no other node of this run is known", tier=source)
        failed: CheckpointError | None = None
        others = partners_of(layout, run.tiers[source].config.copies)
        for number in dict.fromkeys([*sorted(save.held_on), *others]):
            if run.layout is None or run.secret != secret:
                break  # the job has started anew, on other nodes
            where = msgspec.structs.replace(run.layout.nodes[number].address, agent_id="")
            pull = work.Pull(
                PULLING, run.key, str(save.name), rank, where, run.secret, _ref(run, label),
                mends=True,
            )  # fmt: skip
            try:
                return len((await self._tools.call(pull, work.Flushed, size_bytes)).rewritten)
            except CheckpointError as error:
                failed = error
        raise failed or TierUnavailable("no node has a copy", tier=source)

    async def reported(self, run: RunState, label: str, key: str, reason: str) -> None:
        """A reader met a bad copy. The key comes from outside: it names a save we know, or none."""
        found = shard_named(key)
        save = run.saves.get(found[0]) if found else None
        if found is None or save is None or found[1] not in save.ranks.get(label, ()):
            return
        if await self.verify_save(run, save, label):
            logger.info("run %s: step %d in %s is good: %s", run.key, save.name.step, label, reason)

    async def scrub(self, run: RunState) -> None:
        """Read every copy of every save once, but for those in a store, which does so itself."""
        run.scrubbed_s = time.monotonic()
        local = {RAM, *(t.label for t in run.tiers.values() if not (t.is_store or t.is_peers))}
        for save in sorted(run.saves.values(), key=lambda s: s.order, reverse=True):
            for label in sorted(local & save.ranks.keys()):
                if run.gone or str(save.name) not in run.saves or label in save.writing:
                    continue
                try:
                    await self.verify_save(run, save, label)
                except CheckpointError as error:
                    logger.info("run %s: %s is not scrubbed: %s", run.key, label, error.what)
        self._tools.count("scrubs")

    def not_kept(
        self, run: RunState, tier: TierState, *, as_if: SaveState | None = None
    ) -> list[str]:
        """Saves that the tier's rules let go, abandoned ones first, then oldest first.

        ``as_if``: what they would be, had this save been read back.
        """
        line = run.line()
        waiting = self._waiting_for_a_store(run) if not tier.is_store else set()
        held = [
            self._held(
                line,
                tier,
                save,
                verified=save is as_if or save.is_verified(tier.label),
                busy=bool(save.writing) or str(save.name) in waiting or _is_coming(run, tier, save),
            )
            for save in run.saves.values()
            if tier.label in save.ranks
        ]
        decisions = decide(held, keep_from_wire(tier.config.keep))
        gone = [save for save in held if decisions[save.name].delete]
        return [str(save.name) for save in sorted(gone, key=lambda s: (s.on_line, s.name))]

    def wanted(self, run: RunState, tier: TierState) -> set[str]:
        """Saves that a store keeps once it has them; everything where it has no rules."""
        line = run.line()
        held = [
            self._held(line, tier, save, complete=True)
            for save in run.saves.values()
            if save.is_complete(tier.label) or tier.label in save.owed
        ]
        return {str(name) for name in kept(held, keep_from_wire(tier.config.keep))}

    def best(self, run: RunState, tier: TierState) -> set[str]:
        """Saves that its rules keep for a metric, of all that lie anywhere."""
        rules = [rule for rule in keep_from_wire(tier.config.keep) if isinstance(rule, KeepBest)]
        line = run.line() if rules else []
        held = [
            self._held(line, tier, save, complete=any(map(save.is_complete, save.ranks)))
            for save in run.saves.values()
            if rules and save.metrics
        ]
        return {str(name) for rule in rules for name in kept(held, [rule], newest=False)}

    def _waiting_for_a_store(self, run: RunState) -> set[str]:
        """Saves that a disk holds on to, since a store is still to get them from there."""
        stores = [tier for tier in run.tiers.values() if tier.is_store]
        return {
            name
            for tier in stores
            for name in queue.backlog(tier.label, run.flushable(tier), self.wanted(run, tier))
        }

    def _held(self, line: Line, tier: TierState, save: SaveState, **facts: bool) -> Held:
        return Held(
            save.name,
            complete=facts.get("complete", save.is_complete(tier.label)),
            on_line=save.is_on(line),
            verified=facts.get("verified", False),
            damaged=save.is_damaged(tier.label),
            suspect=bool(save.diverged),
            busy=facts.get("busy", False),
            age_s=max(0.0, time.time() - save.seen_at),
            metrics=save.metrics,
        )


def _is_coming(run: RunState, tier: TierState, save: SaveState) -> bool:
    """Whether some of a save may be on its way to a store, from here or from another node."""
    if not tier.is_store or save.is_complete(tier.label):
        return False
    # What is let go has no records left; of what others send, ours may be there already.
    others = run.layout is not None and save.name.incarnation == run.incarnation
    return tier.label in save.owed or (others and bool(save.ranks[tier.label]))


def shard_named(key: str) -> tuple[str, int] | None:
    """Save and rank that the key of a file of a shard names; None if it is none."""
    parts = key.split("/")
    name = SaveName.parse(parts[1]) if len(parts) == 3 else None
    rank = parse_record_file(parts[-1].rpartition(".")[0] + ".json")
    return None if name is None or rank is None else (str(name), rank)


def _held(run: RunState, save: SaveState, *labels: str) -> AbstractContextManager[None]:
    """Keeps the slot from being recycled while RAM is one of the tiers that are read."""
    return run.reading(save) if RAM in labels else nullcontext()


def _ref(run: RunState, label: str) -> TierRef:
    return run.ram if label == RAM else run.tiers[label].ref
