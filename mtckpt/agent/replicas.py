"""Whether what ranks hold alike is alike: compared by the lead once all parts of a save are there.

Knows, of each save, two digests a rank and group of holders; asks for more only where those differ.
What differs is told, and kept with the save: it is never the only one that rules leave. Which copy
is right nobody knows here, so nothing is healed, and each rank gets back what its node has.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _twins
from mtckpt.agent import work
from mtckpt.errors import CheckpointError, ObjectNotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mtckpt._twins import Divergence, Twins
    from mtckpt.agent.peers import Peers
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.saves import SaveState
    from mtckpt.agent.tools import Tools

__all__ = ["AskRoots", "Replicas"]

logger = logging.getLogger(__name__)

CALL_S = 10.0
# Copies that are looked at array by array, and leaves that are told of, for one save.
MAX_ASKED = 8
MAX_TOLD = 8


class AskRoots(msgspec.Struct, frozen=True):
    """From the lead: the roots of what a rank has stored. ``boxes`` as in ``_twins.twins_of``."""

    save: str
    rank: int
    boxes: str


class Replicas:
    """See the module. One for the agent, the state is the run's."""

    def __init__(
        self, tools: Tools, peers: Peers, write_config: Callable[[RunState], Awaitable[None]]
    ) -> None:
        self._tools = tools
        self._write_config = write_config
        self._peers = peers
        peers.verbs["roots"] = (AskRoots, self.told)

    def look(self, run: RunState, save: SaveState) -> None:
        """A save is whole: are the copies in it equal? What differs is found in the background."""
        is_told = run.layout is not None and not run.layout.is_lead
        if is_told or save.compared or "staged" not in save.stages:
            return
        save.compared = True
        for boxes, roots in all_twins(save).items():
            if len(roots) > 1:
                what = f"comparing replicas of {save.name}"
                self._tools.start(self._find(run, save, boxes, list(roots.values())), what)

    async def told(self, run: RunState, message: AskRoots) -> work.Roots:
        """What a rank of this node has stored."""
        save = run.saves.get(message.save)
        if save is None:
            raise ObjectNotFound("this node has nothing of that save", key=message.save[:100])
        command = work.ReadRoots(run.ram, run.key, str(save.name), message.rank, message.boxes)
        return await self._tools.call(command, work.Roots)

    async def _find(
        self, run: RunState, save: SaveState, boxes: str, copies: list[list[int]]
    ) -> None:
        """Which leaves they are; if a slot is another save's by now, only whose."""
        asked = [AskRoots(str(save.name), ranks[0], boxes) for ranks in copies[:MAX_ASKED]]
        try:
            answers = await asyncio.gather(*(self._ask(run, each) for each in asked))
            held = zip(map(tuple, copies), (answer.leaves for answer in answers), strict=False)
            found = _twins.compare(held)
        except CheckpointError as error:
            logger.info("run %s: which replicas differ is not known: %s", run.key, error.what)
            found = []
        groups = tuple(map(tuple, copies))
        for divergence in found or [_twins.Divergence("replicated arrays", groups)]:
            self._note(run, save, divergence)
        run.touch(save)
        await self._write_config(run)  # the next agent has no word of the others to compare

    async def _ask(self, run: RunState, message: AskRoots) -> work.Roots:
        layout = run.layout
        number = layout.node_of(message.rank) if layout else None
        if layout is None or number is None or number == layout.here:
            return await self.told(run, message)
        where = msgspec.structs.replace(layout.nodes[number].address, agent_id="")
        client = self._peers.client(run.key, where)
        return await asyncio.to_thread(client.call, "roots", message, work.Roots, CALL_S)

    def _note(self, run: RunState, save: SaveState, divergence: Divergence) -> None:
        run.counters["diverged"] += 1
        self._tools.count("replicas_diverged")
        if len(save.diverged) < MAX_TOLD:
            known = any(
                divergence.leaf in other.diverged
                for other in run.saves.values()
                if other.name.incarnation == save.name.incarnation
            )
            save.diverged[divergence.leaf] = divergence.ranks
            # They stay apart from then on: a warning when that begins is enough.
            level = logging.INFO if known else logging.WARNING
            logger.log(level, "run %s: step %d: %s", run.key, save.name.step, divergence)
            self._tools.events.emit(
                "replica.divergence",
                run=run.run,
                step=save.name.step,
                leaf=divergence.leaf,
                ranks=divergence.ranks,
                groups=divergence.groups,
            )


def all_twins(save: SaveState) -> Twins:
    """Of this node's ranks, and of those of other nodes that have told of theirs."""
    found: Twins = {}
    for twins in [save.twins, *(news.twins for news in save.told)]:
        for boxes, roots in twins.items():
            for digest, ranks in roots.items():
                found.setdefault(boxes, {}).setdefault(digest, []).extend(ranks)
    return found
