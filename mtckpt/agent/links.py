"""What agents of a run's nodes tell each other, and how it is brought: again until it was heard.

Knows who is told, what each was told last and who does not answer. What there is to tell is made in
``nodes``; what it means is decided in ``agreement``. Nothing waits for another node here: a node
that is silent owes its saves, and whoever waits for them is told by a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt._manifest import SaveName
from mtckpt.agent.nodes import (
    Heard,
    News,
    Tell,
    layout_of,
    moved,
    news_for_lead,
    news_for_nodes,
    nothing_of,
)
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.errors import AgentUnavailable, CheckpointError

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress
    from mtckpt.agent.agreement import Agreement
    from mtckpt.agent.flushing import Flusher
    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.peers import Peers
    from mtckpt.agent.replicas import Replicas
    from mtckpt.agent.ring import Ring
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Link", "Links"]

logger = logging.getLogger(__name__)

# Far below the size of a message; what is more goes in the next one.
MAX_TOLD = 500
_PAUSE_S = (0.05, 2.0)
# One word and its answer; what it sets going may free slots.
CALL_S = 5.0
MAX_CALLS = 32


@dataclass(slots=True, eq=False)
class Link:
    """What one node was told, by the name of the save, and where it is itself. ``wake`` is set when
    there may be something to tell it."""

    sent: dict[str, News] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    seq: int = -1
    agent_id: str = ""
    told_by: str = ""
    # The last save that all ranks of the node have come to.
    incarnation: int = 0
    last_step: int = -1
    failing_since_s: float | None = None
    problem: str = ""

    def forget(self) -> None:
        """Another agent is there now: it knows nothing."""
        self.sent.clear()
        self.seq = -1
        self.wake.set()


@dataclass(slots=True, eq=False)
class _Words:
    """What there is to tell of each save, made once for however many are told: with its number of
    when it had last changed. Good for one layout and incarnation."""

    layout: Layout
    incarnation: int
    made: dict[str, tuple[int, News | None]] = field(default_factory=dict)


class Links:
    """See the module. One for the agent, the state is the run's."""

    def __init__(
        self,
        tools: Tools,
        ring: Ring,
        agreement: Agreement,
        flusher: Flusher,
        replicas: Replicas,
        peers: Peers,
    ) -> None:
        self._tools = tools
        self._ring = ring
        self._agreement = agreement
        self._flusher = flusher
        self._replicas = replicas
        self._peers = peers
        self._words: dict[str, _Words] = {}
        self._threads = ThreadPoolExecutor(MAX_CALLS, "mtckpt-links")
        peers.verbs["tell"] = (Tell, self.hear)

    # -- who -------------------------------------------------------------------------------------

    def join(self, run: RunState, rank: int) -> None:
        """Be one of the nodes that the run has joined: the one of ``rank``. What others said when
        they were other nodes is forgotten."""
        join = self._peers.joined(run.key)
        if join is None or join.secret == run.secret:
            return
        self.leave(run)
        run.layout, run.secret = layout_of(join, rank), join.secret
        run.links = {number: Link() for number in run.layout.partners()}
        run.leaving, run.troubles = set(), Counter()
        for save in run.saves.values():
            save.told.clear()
            save.held_on.clear()
            save.wanted.clear()
            save.superseded -= {label for label, tier in run.tiers.items() if tier.is_peers}
            save.found = True
        for tier in [tier for tier in run.tiers.values() if tier.is_peers]:
            tier.attempts = 0  # what found no node among those before
            tier.retry.set()
        for number in run.links:
            self._tools.start(self._serve(run, number), f"telling node {number} of {run.key}")
        self._tools.start(self._watch(run, run.secret), f"watching news of {run.key}")

    async def note(self, run: RunState) -> None:
        """Note the nodes of a run for the next agent once more, where that has gone."""
        async with self._peers.joining:
            if join := self._peers.joined(run.key):
                await self._peers.replace(run, join)

    def leave(self, run: RunState) -> None:
        """Tell nobody any more. Idempotent."""
        self._words.pop(run.key, None)
        if run.layout is None:
            return
        for link in run.links.values():
            link.wake.set()  # for the last time
        run.layout, run.secret, run.links = None, "", {}
        run.touch()

    def is_behind(self, run: RunState) -> bool:
        """Whether another node waits for this one's word, and may still get it. The lead's only:
        what a node would have to say is in the lead's word that all is there."""
        if run.layout is None or not run.layout.is_lead:
            return False
        now_s = time.monotonic()
        return any(
            any(
                _weight(news) != _weight(link.sent.get(news.save)) for news in self._news(run, link)
            )
            for link in run.links.values()
            if link.failing_since_s is None
            or now_s - link.failing_since_s < self._tools.limits.rank_s
        )

    # -- telling ---------------------------------------------------------------------------------

    def _news(self, run: RunState, link: Link) -> list[News]:
        """What changed since the node was told, oldest first: a later step says that earlier ones
        are over."""
        layout = run.layout
        assert layout is not None
        fresh = sorted((s for s in run.saves.values() if s.seq > link.seq), key=lambda s: s.order)
        made = [self._word(run, layout, save) for save in fresh]
        for at, save in enumerate(fresh):
            is_old = save.name.incarnation < run.incarnation
            if made[at] is None and (is_old or not save.stages) and str(save.name) in link.sent:
                made[at] = nothing_of(save)  # what was told of it is not so any more
        return [news for news in made if news is not None and news != link.sent.get(news.save)]

    def _word(self, run: RunState, layout: Layout, save: SaveState) -> News | None:
        """What there is to tell of a save; at the lead that is the same for all nodes."""
        words = self._words.get(run.key)
        if words is None or (words.layout, words.incarnation) != (layout, run.incarnation):
            words = self._words[run.key] = _Words(layout, run.incarnation)
        name = str(save.name)
        seq, made = words.made.get(name, (-1, None))
        if seq != save.seq:
            if layout.is_lead:
                made = news_for_nodes(save)
            else:
                made = news_for_lead(save, layout, run.incarnation)
            if save.seq <= run.seq:  # else more may change under the same number
                words.made[name] = save.seq, made
        return made

    async def _watch(self, run: RunState, secret: str) -> None:
        """Wake those who tell other nodes when there is something new for them, and no earlier:
        things change as often as there are nodes, each of which would look for itself."""
        known: dict[str, News | None] = {}
        incarnation, seq = -1, -1
        while not run.gone and run.layout is not None and run.secret == secret:
            changed, layout = run.changed, run.layout
            if incarnation != run.incarnation:
                known, incarnation, seq = {}, run.incarnation, -1
            fresh = [(name, save) for name, save in run.saves.items() if save.seq > seq]
            found = {name: self._word(run, layout, save) for name, save in fresh}
            seq = run.seq
            if any(known.get(name) != news for name, news in found.items()):
                for link in run.links.values():
                    link.wake.set()
            known = {name: news for name, news in known.items() if name in run.saves}
            known.update(found)
            if (words := self._words.get(run.key)) is not None:
                words.made = {name: made for name, made in words.made.items() if name in run.saves}
            await changed.wait()
        if run.gone:
            self._words.pop(run.key, None)
        for link in run.links.values():
            link.wake.set()

    async def _serve(self, run: RunState, number: int) -> None:
        link, attempt, greeted = run.links[number], 0, False
        while not run.gone and run.links.get(number) is link:
            link.wake.clear()
            seq = run.seq
            news = self._news(run, link)
            if news or not greeted:
                part = news[:MAX_TOLD]
                try:
                    await self._tell(run, number, part)
                except CheckpointError as error:
                    self._failed(run, number, error)
                    attempt += 1
                    first_s, most_s = _PAUSE_S
                    pause_s = min(first_s * 2.0 ** min(attempt, 10), most_s)
                    await asyncio.sleep(pause_s * (0.5 + random.random()))
                    continue
                attempt, greeted = 0, True
                if len(part) < len(news) or link.seq < 0:
                    link.seq = max(link.seq, 0)
                    continue
            link.seq = seq
            known = run.saves
            link.sent = {name: news for name, news in link.sent.items() if name in known}
            await link.wake.wait()

    async def _tell(self, run: RunState, number: int, news: list[News]) -> None:
        link, layout, here = run.links[number], run.layout, self._peers.address
        assert layout is not None
        if here is None:
            raise AgentUnavailable("this agent does not listen to other nodes")
        where = layout.nodes[number].address
        # Whoever knows the secret: another agent may have that place by now.
        client = self._peers.client(run.key, msgspec.structs.replace(where, agent_id=""))
        message = Tell(layout.here, here, news)
        heard = await asyncio.get_running_loop().run_in_executor(
            self._threads, client.call, "tell", message, Heard, CALL_S
        )
        run.counters["told"] += 1
        if link.problem:
            logger.info("run %s: node %s answers again", run.key, where)
            self._tools.events.emit("node.answers", run=run.run, node=number)
        link.failing_since_s, link.problem = None, ""
        before, link.agent_id = link.agent_id, heard.agent_id
        if before and before != heard.agent_id:
            link.forget()
        link.sent.update((each.save, each) for each in news)

    def _failed(self, run: RunState, number: int, error: CheckpointError) -> None:
        link = run.links.get(number, Link())
        if link.failing_since_s is None:
            link.failing_since_s = time.monotonic()
        if not link.problem:
            logger.warning("run %s: node %d: %s; told again", run.key, number, error.what)
            self._tools.events.emit("node.silent", run=run.run, node=number, reason=error.what)
        link.problem = error.what

    # -- hearing ---------------------------------------------------------------------------------

    async def hear(self, run: RunState, message: Tell) -> Heard:
        """Take in what another node says."""
        link, here = run.links.get(message.node), self._peers.address
        if link is None or here is None:
            raise AgentUnavailable("this agent does not work together with that node")
        if link.told_by != message.address.agent_id:
            if link.told_by:
                link.forget()
                run.note_leaving(message.node, False)  # another agent has its place
            link.told_by = message.address.agent_id
            await self.follow(run, message.node, message.address)
        self._check_same(run, message.node, link)
        owed = _owed(run)
        before = {news.save: self._standing(run, news.save) for news in message.saves}
        heard = [save for news in message.saves if (save := self._take_in(run, message.node, news))]
        run.discharge(scanned=False)
        for save in sorted(heard, key=lambda s: s.order):
            news = save.told[message.node]
            # All ranks of the node have that. What is called off it may have heard from here.
            if news.parts and save.order > (link.incarnation, link.last_step):
                link.incarnation, link.last_step = save.order
            await self._agreement.heard(run, save, news)
            self._check_same(run, message.node, link)
            self._settle(run, save)
            self._replicas.look(run, save)
        run.discharge(scanned=False)
        # Nobody looks up for one part of many that are still to come.
        changed = [s for s in heard if self._standing(run, str(s.name)) != before[str(s.name)]]
        for save in changed:
            run.touch(save)
        if _owed(run) != owed:
            run.touch()
            changed = heard
        for label in {label for save in changed for label in save.ranks if label in run.tiers}:
            self._flusher.look_again(run, run.tiers[label])
        return Heard(here.agent_id)

    def _check_same(self, run: RunState, number: int, link: Link) -> None:
        """Raises AgentUnavailable if the job was started anew while what a node of the start before
        had said was heard: nodes have other numbers."""
        if run.links.get(number) is not link:
            raise AgentUnavailable("this node has joined another start of the job")

    async def follow(self, run: RunState, number: int, address: PeerAddress) -> None:
        """Another agent has the place of one that joined: it is spoken to where it is."""
        secret = run.secret
        async with self._peers.joining:
            layout, join = run.layout, self._peers.joined(run.key)
            if layout is None or join is None or not run.secret == join.secret == secret:
                return  # another start of the job has come meanwhile
            if join.nodes[number].address == address:
                return
            join = moved(join, number, address)
            await self._peers.replace(run, join)
            if run.secret == secret:
                run.layout = layout_of(join, join.nodes[layout.here].ranks[0])

    def _take_in(self, run: RunState, number: int, news: News) -> SaveState | None:
        name = SaveName.parse(news.save)
        if name is None:
            return None
        save = run.saves.get(news.save)
        if save is None:
            save = SaveState(name, news.save_id)
            # The agent before this one may have let go of what was whole for something newer.
            save.found = any(s.found and s.order > save.order for s in run.saves.values())
            run.saves[news.save] = save
        save.save_id = save.save_id or news.save_id
        save.incarnation_id = save.incarnation_id or news.incarnation_id
        save.world_size = max(save.world_size, news.world_size)
        save.plan_digest = save.plan_digest or news.plan_digest
        save.disputed |= news.plan_digest not in ("", save.plan_digest)
        if "staged" not in save.stages:  # what has had it since then may have let it go
            save.due |= set(news.due) & run.tiers.keys()
        save.also_want_in(set(news.wanted) & run.tiers.keys())
        save.told[number] = news
        save.diverged = news.diverged or save.diverged
        return save

    def _settle(self, run: RunState, save: SaveState) -> None:
        """What follows for this node where all nodes have their parts."""
        # Who still waits for it here is told also where this node has let go of its parts.
        whole = save.is_whole if save.name.incarnation == run.incarnation else save.is_complete
        if whole(RAM) and "staged" not in save.stages:
            save.failed.pop(RAM, None)
            self._ring.note_staged(run, save)
        for label, tier in run.tiers.items():
            if save.is_complete(label) and label not in save.uncommitted:
                run.reach(save, tier.stage)

    def _standing(self, run: RunState, name: str) -> object:
        """All of a save that anybody waits for: trainers, tiers, other nodes."""
        save, layout = run.saves.get(name), run.layout
        if save is None or layout is None:
            return None
        told = (
            news_for_nodes(save) if layout.is_lead else news_for_lead(save, layout, run.incarnation)
        )
        tiers = [(save.is_complete(t), save.is_verified(t), save.is_damaged(t)) for t in run.tiers]
        return save.change(), told, tiers, save.is_complete(RAM), save.diverged


def _owed(run: RunState) -> list[tuple[object, ...]]:
    """What tiers and slots may wait for, of all saves: it changes as more is known of one."""
    return [(save.remains, len(save.due), len(save.superseded)) for save in run.saves.values()]


def _weight(news: News | None) -> tuple[object, ...]:
    """What a node needs to hear before this one may go."""
    if news is None:
        return ([], [], {}, "")
    return (news.whole, news.superseded, news.failed, news.called_off)
