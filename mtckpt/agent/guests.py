"""Copies of other nodes' parts in this node's memory: taken when offered, kept, and let go.

Knows which shards here are guests: they are read by whoever needs them, counted as memory, noted
for the next agent before the first byte comes, and never made into slots. Their owner offers them;
this node decides whether there is room, and lets them go once a newer save is on other nodes whole.
Does not decide who holds what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Rank, SaveName, Uuid
from mtckpt.agent import work
from mtckpt.agent.protocol import Done
from mtckpt.agent.queue import backoff_s
from mtckpt.agent.run_config import PULLING
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.errors import AgentUnavailable, CheckpointError, FormatError, NodeDraining, TierFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Set

    from mtckpt.agent.peers import Peers
    from mtckpt.agent.runs import RunState
    from mtckpt.agent.tools import Tools

__all__ = ["Guests", "Lost", "Offer", "Taken"]

logger = logging.getLogger(__name__)

MAX_WAIT_S = 10.0
CALL_S = 5.0
MAX_RANKS = 4096
_GUESTS = "guests"


class Offer(msgspec.Struct, frozen=True):
    """From the agent of a node to one that is to hold copies: its shards of a save, to be pulled.

    Asked again until they are there. ``node`` is its number in the layout, ``address`` where it is
    now; an answer comes within ``wait_s``. ``leaving``: that node is about to go.
    """

    node: int
    address: PeerAddress
    save: str
    save_id: Uuid
    ranks: list[Rank]
    wait_s: float = 0.0
    leaving: bool = False


class Lost(msgspec.Struct, frozen=True):
    """From an agent that held copies to the one whose shards they are of: they are gone."""

    save: str
    ranks: list[int]


class Taken(msgspec.Struct, frozen=True):
    """How far a copy is. ``boot_id``, once all of it is there and was verified: of the memory that
    it is in. ``failures``: how often something in that memory did not verify any more. ``agent_id``
    is of the agent that says so: another one does not know what has become of that memory."""

    done_bytes: int
    total_bytes: int
    boot_id: str = ""
    failures: int = 0
    agent_id: str = ""


@dataclass(slots=True, eq=False)
class _Pull:
    """Some shards on their way."""

    task: asyncio.Task[None]
    total_bytes: int = 0
    done: dict[int, int] = field(default_factory=dict)


# What one start of a job offers of one save.
_Key = tuple[str, str, int, tuple[int, ...], str]


def _key_of(run: RunState, offer: Offer) -> _Key:
    return run.key, offer.save, offer.node, tuple(sorted(set(offer.ranks))), run.secret


class Guests:
    """See the module. One for the agent, the state is the run's.

    ``follow`` is told where a node is now that offers something, ``arrived`` what this node has of
    its own ranks again.
    """

    def __init__(
        self,
        tools: Tools,
        peers: Peers,
        boot_id: str,
        follow: Callable[[RunState, int, PeerAddress], Awaitable[None]],
        write_config: Callable[[RunState], Awaitable[None]],
        arrived: Callable[[RunState, SaveState, frozenset[int], str], None],
        agent_id: str = "",
    ) -> None:
        self._agent_id = agent_id
        self._tools = tools
        self._peers = peers
        self._boot_id = boot_id
        self._follow = follow
        self._write_config = write_config
        self._arrived = arrived
        self._under_way: dict[_Key, _Pull] = {}
        self._unnoted: set[tuple[str, int]] = set()  # nodes of which the next agent is to hear
        peers.verbs["pull"] = (Offer, self.offered)

    async def offered(self, run: RunState, offer: Offer) -> Taken:
        """How far the copy is; the first who asks sets it going. Raises what it ended with, and
        NodeDraining where copies are given away and not taken: ``has_own`` of it says whether they
        are copies of what this node has as its own, and still brings away."""
        name, ranks = SaveName.parse(offer.save), sorted(set(offer.ranks))
        layout = run.layout
        if layout is None or not 0 <= offer.node < len(layout.nodes) or offer.node == layout.here:
            raise AgentUnavailable("this agent does not work together with that node")
        if name is None or not ranks or ranks[0] < 0 or len(ranks) > MAX_RANKS:
            raise FormatError("not an offer of shards", state="nothing was pulled")
        if offer.leaving != (offer.node in run.leaving):
            self._unnoted.add((run.key, offer.node))
        run.note_leaving(offer.node, offer.leaving)
        if run.draining:
            save = run.saves.get(offer.save)
            own: set[int] = set()
            if save is not None and not save.handed and not run.drained:
                own = save.ranks.get(RAM, set())
            has_own = own >= {*ranks}
            raise NodeDraining(run.draining, state="nothing was pulled", has_own=has_own)
        await self._follow(run, offer.node, offer.address)
        if (run.key, offer.node) in self._unnoted:  # the next agent keeps what it gives away, too
            await self._write_config(run)
            self._unnoted.discard((run.key, offer.node))
        key = _key_of(run, offer)
        pull = self._under_way.get(key)
        if pull is None:
            save = run.saves.setdefault(offer.save, SaveState(name, offer.save_id))
            task = self._tools.start(
                self._take(run, save, offer, ranks), f"copies of {offer.save} of node {offer.node}"
            )
            pull = self._under_way[key] = _Pull(task)
        await asyncio.wait([pull.task], timeout=min(max(offer.wait_s, 0.0), MAX_WAIT_S))
        done_bytes = sum(pull.done.values())
        if not pull.task.done():
            return Taken(done_bytes, max(pull.total_bytes, done_bytes))
        self._under_way.pop(key, None)
        pull.task.result()
        if not self._has(run, offer):
            raise AgentUnavailable("what was taken is gone again: offer it anew", save=offer.save)
        return Taken(done_bytes, done_bytes, self._boot_id, run.failures, self._agent_id)

    def _has(self, run: RunState, offer: Offer) -> bool:
        save = run.saves.get(offer.save)
        return save is not None and save.guests | save.ranks.get(RAM, set()) >= set(offer.ranks)

    async def _take(self, run: RunState, save: SaveState, offer: Offer, ranks: list[int]) -> None:
        await self.let_go(run)
        async with run.lock(save, _GUESTS):
            with run.reading(save):  # memory is not freed meanwhile
                if run.gone or run.emptying:
                    raise AgentUnavailable("the run goes from the memory of this node")
                await self._take_all(run, save, offer, ranks)

    async def _take_all(
        self, run: RunState, save: SaveState, offer: Offer, ranks: list[int]
    ) -> None:
        new = [rank for rank in ranks if rank not in save.guests | save.ranks.get(RAM, set())]
        # Noted first: an agent that finds them must not take them for slots of its own ranks.
        save.guests.update(new)
        try:
            await self._write_config(run)
            for rank in ranks:
                if rank in save.guests:
                    await self._pull(run, save, rank, offer)
        except CheckpointError as error:
            if await self._delete(run, save, new):
                save.guests.difference_update(new)
            with contextlib.suppress(TierFull):  # as before: what is not there is nobody's
                await self._write_config(run)
            if isinstance(error, TierFull):
                raise _without_room(error, self._peers_name(run)) from error
            raise
        if layout := run.layout:
            await self._take_back(run, save, save.guests.intersection(layout.own))
        run.counters["guests"] += len(new)
        self._tools.events.emit(
            "copies.taken", run=run.run, step=save.name.step, node=offer.node, shards=len(new)
        )
        run.touch(save)

    async def _take_back(self, run: RunState, save: SaveState, ranks: Set[int]) -> None:
        """Parts of this node's own ranks, which it had lost, are no guests: slots, as after a save.
        But for what leaves out what it had captured beside, which is good for reading only."""
        if not ranks:
            return
        command = work.Scan(run.ram, run.key, repair=False)
        scanned = await self._tools.call(command, work.Scanned)
        for entry in [entry for scan in scanned.runs for entry in scan.saves]:
            if entry.save == str(save.name) and (whole := ranks & {*entry.ranks} - {*entry.thin}):
                save.note_found(entry)
                save.due |= {*entry.due} & run.tiers.keys()  # an owner that is lost may owe it
                self._arrived(run, save, frozenset(whole), RAM)
                await self._write_config(run)

    async def _pull(self, run: RunState, save: SaveState, rank: int, offer: Offer) -> None:
        def progress(news: work.Progress) -> None:
            pull = self._under_way.get(_key_of(run, offer))
            if pull is not None:
                pull.done[rank] = news.done_bytes
                pull.total_bytes = max(pull.total_bytes, news.total_bytes)

        where = msgspec.structs.replace(offer.address, agent_id="")
        done = await self._tools.call(
            _pull_of(run, save, rank, where), work.Flushed, save.size_bytes, progress
        )
        run.counters["pulled_bytes"] += done.copied_bytes
        run.counters["left_out_bytes"] += done.reused_bytes
        if done.reread_bytes:
            run.counters["reread_bytes"] += done.reread_bytes
            logger.warning(
                "run %s: %d bytes of %s came damaged from %s, and were asked for again",
                run.key, done.reread_bytes, save.name, offer.address,
            )  # fmt: skip
        self._tools.count("bytes", "peers", done.copied_bytes)

    # -- looking after them ----------------------------------------------------------------------

    async def scrub(self, run: RunState) -> None:
        """Read every guest once."""
        for save in [s for s in run.saves.values() if s.guests]:
            for rank in sorted(save.guests):
                await self._check(run, save, rank)

    async def reported(self, run: RunState, save: SaveState, rank: int) -> None:
        """A reader met a bad copy, or says so."""
        if rank in save.guests:
            await self._check(run, save, rank)

    async def _check(self, run: RunState, save: SaveState, rank: int) -> None:
        """A guest that is damaged is taken anew from its owner, or is one no more."""
        async with run.lock(save, _GUESTS):
            if run.gone or rank not in save.guests:
                return
            verify = work.Verify(run.ram, run.key, str(save.name), rank)
            with run.reading(save):
                verified = await self._tools.call(verify, work.Verified, save.size_bytes)
            if not verified.damaged:
                return
            run.counters["damaged"] += 1
            run.failures += 1
            bad = verified.damaged[0]
            logger.warning("run %s: copy %s: %s", run.key, bad.key, bad.reason)
            owner = run.layout.node_of(rank) if run.layout else None
            try:
                if run.layout is None or owner in (None, run.layout.here):
                    raise AgentUnavailable("its owner is not known")
                where = msgspec.structs.replace(run.layout.nodes[owner].address, agent_id="")
                pull = _pull_of(run, save, rank, where)
                await self._tools.call(pull, work.Flushed, save.size_bytes)
                run.counters["healed"] += 1
            except CheckpointError as error:
                logger.warning("run %s: and it cannot be had again: %s", run.key, error.what)
                if await self._delete(run, save, [rank]):
                    save.guests.discard(rank)
                    await self._write_config(run)
                    self._lost(run, save, rank)
        run.touch(save)

    def _lost(self, run: RunState, save: SaveState, rank: int) -> None:
        """A copy that was acknowledged is there no more: its owner is to offer it anew."""
        self._tools.events.emit("copies.lost", run=run.run, step=save.name.step, rank=rank)
        owner = run.layout.node_of(rank) if run.layout else None
        if run.layout is not None and owner not in (None, run.layout.here):
            what = f"telling node {owner} of a copy"
            self._tools.start(self._tell_lost(run, save, rank, owner), what)

    async def _tell_lost(self, run: RunState, save: SaveState, rank: int, owner: int) -> None:
        """Told again until the owner has heard it, or has offered it, or the job is another."""
        secret, attempt = run.secret, 0
        message = Lost(str(save.name), [rank])
        while not run.gone and (layout := run.layout) and run.secret == secret:
            where = msgspec.structs.replace(layout.nodes[owner].address, agent_id="")
            try:
                client = self._peers.client(run.key, where)
                await asyncio.to_thread(client.call, "lost", message, Done, CALL_S)
                return
            except CheckpointError as error:
                attempt += 1
                logger.info("run %s: node %d is told later: %s", run.key, owner, error.what)
                await asyncio.sleep(backoff_s(attempt, random.random()))
            if rank in save.guests:
                return

    # -- letting go ------------------------------------------------------------------------------

    async def let_go(self, run: RunState) -> None:
        """Delete guests of saves that a newer one has outlived."""
        for save in [s for s in run.outlived() if s.guests]:
            if run.lock(save, _GUESTS).locked():
                continue  # on their way in, or out
            async with run.lock(save, _GUESTS):
                gone = sorted(save.guests)
                if not await self._delete(run, save, gone):
                    continue  # somebody reads one: later
                save.guests.difference_update(gone)
                run.discharge(scanned=False)  # it may have been whole with them, and with them only
                run.forget_old()
                run.touch()
                await self._write_config(run)

    async def _delete(self, run: RunState, save: SaveState, ranks: list[int]) -> bool:
        """False if a reader has one of them; nothing was deleted then."""
        try:
            command = work.Delete(run.ram, run.key, str(save.name), ranks=ranks)
            return not (await self._tools.call(command, work.Deleted)).busy
        except CheckpointError as error:
            logger.warning("run %s: copies of %s stay: %s", run.key, save.name, error.what)
            return False

    def _peers_name(self, run: RunState) -> str:
        layout = run.layout
        return str(layout.nodes[layout.here].address) if layout else "the other node"


def _pull_of(run: RunState, save: SaveState, rank: int, where: PeerAddress) -> work.Pull:
    """A copy that leaves out what this node's own ranks have captured."""
    beside = sorted(save.ranks.get(RAM, ()))
    name = str(save.name)
    return work.Pull(PULLING, run.key, name, rank, where, run.secret, run.ram, beside)


def _without_room(error: TierFull, where: str) -> TierFull:
    """The same arithmetic, for whoever is on another node."""
    return TierFull(
        f"{where} has no room for copies of other nodes: {error.what}",
        state="nothing was copied; the save is in the memory of its own node",
        actions=[
            *(action for action in error.actions if "leave" not in action),
            "leave copies out: Peers() keeps those of 2 saves in the memory of other nodes",
        ],
        **{**error.details, "tier": "peers"},
    )
