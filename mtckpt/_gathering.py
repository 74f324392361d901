"""What all nodes of a job hold of a run: looked at once on each, told to every rank.

Knows which places are of one node and which of all, and what another node's places are called
here. Does not choose among steps: every rank is told the same, so all choose alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _holdings, _inventory, _restore
from mtckpt._delivery import Place
from mtckpt._handle import stage_of_tier
from mtckpt._handshake import same_place
from mtckpt._holdings import Holdings, holdings_of
from mtckpt.agent import protocol
from mtckpt.agent.peer_client import PeerClient
from mtckpt.errors import CheckpointError
from mtckpt.tiers.peer import PeerTier

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress
    from mtckpt._inventory import Inventory
    from mtckpt._run import Run

__all__ = ["Gathered", "gather", "meet_again", "report_damage", "survey"]


logger = logging.getLogger(__name__)

# A peer that is silent for so long is passed over.
_PEER_TIMEOUT_S = 10.0
_PEER_STREAMS = 4
_MAX_AT_ONCE = 32


class _Told(msgspec.Struct, frozen=True, array_like=True):
    """What the first rank of a node found in some places; ``silent`` has those that are mute."""

    holdings: tuple[Holdings, ...]
    silent: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Peer:
    """Whose a place is, and what its own node calls it."""

    address: PeerAddress
    secret: str
    label: str


@dataclass(slots=True)
class Gathered:
    """``places`` by label, fastest first; ``silent`` ones with the reason; ``absent`` are places
    of nodes that the job no longer has.

    ``holdings`` of all of them come in the same order on every rank, whatever each of them calls
    the places. ``inventories`` are of what this process has looked at itself.
    """

    run_key: str
    places: dict[str, Place] = field(default_factory=dict)
    holdings: list[Holdings] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    inventories: dict[str, Inventory] = field(default_factory=dict)
    peers: dict[str, _Peer] = field(default_factory=dict)

    def add_peer(self, run: Run, label: str, peer: _Peer) -> Place:
        """A place of another node, called ``label`` here."""
        self.peers[label] = peer
        tier = _peer_tier(run, peer, self.run_key)
        node = f"{peer.address.host}:{peer.address.control_port}"
        place = Place(label, tier, mapped=False, near=False, streams=_PEER_STREAMS, node=node)
        self.places[label] = place
        return place

    def called_here(self, run: Run, rank: int, label: str) -> str | None:
        """What the place is called here that the node of a rank calls ``label``; None if it was
        not looked into."""
        if rank in run.members.node:
            return label
        address = next(node.address for node in _nodes(run) if rank in node.ranks)
        for name, peer in self.peers.items():
            if peer.label == label and same_place(peer.address, address):
                return name
        return None

    def close(self) -> None:
        """Let go of other nodes."""
        for label in self.peers:
            self.places[label].tier.close()


def report_damage(run: Run, gathered: Gathered, label: str, key: str, reason: str) -> None:
    """Tell the agent whose place it is: it looks itself, and heals what it can. Raises
    AgentUnavailable."""
    peer = gathered.peers.get(label)
    if peer is None:
        run.session.call("damage", protocol.Damage(label, key, reason), protocol.Done)
        return
    client = PeerClient(peer.address, run.key, bytes.fromhex(peer.secret))
    try:
        message = protocol.Damage(peer.label, key, reason)
        client.call("damage", message, protocol.Done, _PEER_TIMEOUT_S)
    finally:
        client.close()


def meet_again(run: Run) -> None:
    """Have an agent on every node of the job, and learn where each is reached by now. All ranks
    call it. Raises what ``Run.join`` does."""
    nodes = _nodes(run)
    if nodes:
        node_of = {rank: str(at) for at, node in enumerate(nodes) for rank in node.ranks}
        run.join_nodes([node_of[rank] for rank in range(run.members.world_size)])


def gather(
    run: Run,
    step: int | str,
    places: Sequence[Place],
    other: tuple[Sequence[Place], str] | None = None,
) -> Gathered:
    """Look into this node's places, and learn what other nodes have in theirs. All ranks call it.

    Nodes of an earlier job are asked as well where the nodes of this one do not have all of
    ``step``. ``other`` has the places and the key of another run that is restored from. Raises
    RankTimeout. A place that does not answer is named in the result, whose ever it is.
    """
    found = Gathered(run.key)
    near = [place for place in places if place.near]
    far = [place for place in places if not place.near]
    _take_in_nodes(run, found, _look(run, found, near))
    if far:
        held = any(save.complete for save in _holdings.join(found.holdings).values())
        with run.hurrying(held):
            _take_in_shared(found, _look(run, found, far))
    if other is None and not _holdings.is_whole(found.holdings, step):
        _look_at_former(run, found)
    run.note(found.holdings)
    if other is None:
        return found
    found = Gathered(other[1])
    # What a name stands for is on each node a part of it; a place that was named is one for all.
    _take_in_nodes(run, found, _look(run, found, [p for p in other[0] if p in near], lend=True))
    _take_in_shared(found, _look(run, found, [p for p in other[0] if p not in near]))
    return found


def survey(run: Run) -> list[Inventory]:
    """What every tier has that answers, over all nodes of the job. One rank may call it alone."""
    inventories, _ = run.scan(run.places())
    found = list(inventories.values())
    joined = run.session.joined
    if joined is None:
        return found
    for node in joined.nodes:
        if run.members.rank not in node.ranks:
            tiers = {
                label: _peer_tier(run, _Peer(node.address, joined.secret, label), run.key)
                for label in _labels_of_nodes(run)
            }
            places = [Place(label, tier, mapped=False) for label, tier in tiers.items()]
            there, _ = _restore.scan_places(places, run.key, run.within)
            found += there.values()
            for tier in tiers.values():
                tier.close()
    return _inventory.merged(found)


def _labels_of_nodes(run: Run) -> list[str]:
    """Tiers of which each node has its own."""
    return ["ram", *(label for label in run.labels if stage_of_tier(label) != "durable")]


def _look(
    run: Run, found: Gathered, places: Sequence[Place], *, lend: bool = False
) -> dict[int, _Told]:
    """What the first rank of each node found, by that rank. ``lend``: of another run, which other
    nodes may read from then on."""
    found.places.update({place.label: place for place in places})
    told = None
    if run.members.rank == run.members.node[0]:
        inventories, silent = _restore.scan_places(places, found.run_key, run.within)
        found.inventories.update(inventories)
        told = _Told(tuple(map(holdings_of, inventories.values())), silent)
        if run.members.world_size == 1:
            return {0: told}
        if lend and run.session.joined is not None and any(each.saves for each in told.holdings):
            _lend(run, found.run_key)
    answers = run.exchange("holdings", msgspec.to_builtins(told), patient=True)
    return {
        rank: msgspec.convert(answer, _Told)
        for rank, answer in enumerate(answers)
        if answer is not None
    }


def _lend(run: Run, run_key: str) -> None:
    try:
        run.session.call("lend", protocol.Lend(run.session.holder, run_key), protocol.Done)
    except CheckpointError as error:
        # They find out when they read: what they need may be elsewhere as well.
        logger.warning("run %s: other nodes cannot read %s here: %s", run.key, run_key, error.what)


def _take_in_shared(found: Gathered, told: Mapping[int, _Told]) -> None:
    """Places that are the same for all nodes: what the first that could look into one has seen."""
    seen: dict[str, Holdings] = {}
    for each in told.values():
        for holdings in each.holdings:
            seen.setdefault(holdings.label, holdings)
        for label, why in each.silent.items():
            found.silent.setdefault(label, why)
    found.holdings += seen.values()


def _take_in_nodes(run: Run, found: Gathered, told: Mapping[int, _Told]) -> None:
    """Places of which each node has its own. Those of others are read through their agents."""
    peers: list[tuple[str, _Peer]] = []
    joined = run.session.joined
    address_of = {rank: node.address for node in _nodes(run) for rank in node.ranks}
    names = Counter(_name_of(node.address) for node in _nodes(run))
    for rank, each in told.items():
        prefix = ""
        if rank != run.members.node[0]:
            name = _name_of(address_of[rank])
            prefix = f"peers-{name}-" if names[name] < 2 else f"peers-{name}-{rank}-"
        found.silent.update({prefix + label: why for label, why in each.silent.items()})
        for holdings in each.holdings:
            label = prefix + holdings.label
            if prefix and joined is not None:
                peer = _Peer(address_of[rank], joined.secret, holdings.label)
                peers.append((label, peer))
            found.holdings.append(msgspec.structs.replace(holdings, label=label))
    for label, peer in sorted(peers, key=lambda named: named[1].label != "ram"):
        found.add_peer(run, label, peer)


def _name_of(address: PeerAddress) -> str:
    return address.name or address.host


def _peer_tier(run: Run, peer: _Peer, reads: str) -> PeerTier:
    timeout_s = min(run.timeout_s, _PEER_TIMEOUT_S)
    secret = bytes.fromhex(peer.secret)
    where = peer.address
    return PeerTier(where, run.key, secret, place=peer.label, reads=reads, timeout_s=timeout_s)


def _nodes(run: Run) -> Sequence[protocol.NodeOfRun]:
    joined = run.session.joined
    return [] if joined is None else joined.nodes


# -- nodes that the job no longer has --------------------------------------------------------------


def _look_at_former(run: Run, found: Gathered) -> None:
    """Nodes that had the run before and are not of this job may be there still, with what they had.

    The first rank that knows of one looks, since nobody of that node can. One that does not answer
    is passed over: it may have gone for good.
    """
    former = _former(run)
    if not former:
        return
    stores = {label: p for label, p in found.places.items() if stage_of_tier(label) == "durable"}
    for label in stores:
        del found.places[label]
    named = [each for nodes in former.values() for peers in nodes for each in peers.items()]
    places = {
        label: found.add_peer(run, label, peer)
        for label, peer in sorted(named, key=lambda each: each[1].label != "ram")
    }
    found.places.update(stores)  # which come last
    mine = former.get(run.members.rank, ())
    told = _look_at_each(run, [[places[label] for label in peers] for peers in mine])
    answers = run.exchange("former", msgspec.to_builtins(told), patient=True)
    for each in (msgspec.convert(answer, _Told) for answer in answers):
        found.holdings += each.holdings
        found.absent.update(each.silent)


def _look_at_each(run: Run, nodes: Sequence[Sequence[Place]]) -> _Told:
    """What nodes have that may be gone: side by side, and all of them within ``timeout_s``, since
    other ranks wait for the answer."""
    answers: list[_Told] = []
    num_threads = min(len(nodes), _MAX_AT_ONCE)

    def look(number: int) -> None:
        for node in nodes[number::num_threads]:
            answers.append(_look_at_one(run, node))  # noqa: PERF401 - heard before the next

    # Left behind where they wait for a node that is dark.
    threads = []
    for number in range(num_threads):
        work = functools.partial(look, number)
        thread = threading.Thread(target=work, name="mtckpt-former", daemon=True)
        with contextlib.suppress(RuntimeError):  # none to be had: these count as silent
            thread.start()
            threads.append(thread)
    deadline_s = time.monotonic() + run.timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    told = list(answers)
    heard = {label for each in told for label in (*each.silent, *(h.label for h in each.holdings))}
    late = {
        node[0].label: f"did not answer within {run.timeout_s:.1f} s"
        for node in nodes
        if heard.isdisjoint(place.label for place in node)
    }
    silent = {label: why for each in told for label, why in each.silent.items()}
    return _Told(tuple(h for each in told for h in each.holdings), {**silent, **late})


def _look_at_one(run: Run, places: Sequence[Place]) -> _Told:
    told = _Told((), {})
    for place in places:
        inventories, silent = _restore.scan_places([place], run.key, run.within)
        more = tuple(map(holdings_of, inventories.values()))
        told = _Told((*told.holdings, *more), {**told.silent, **silent})
        if silent:
            break  # its other places are read through the same agent
    return told


def _former(run: Run) -> dict[int, list[dict[str, _Peer]]]:
    """Places of nodes of earlier starts of the job, node by node, by the rank that is to look."""
    known: list[protocol.Others] = []
    if run.members.rank == run.members.node[0] and run.session.opened is not None:
        known = run.session.opened.others
    answers = run.exchange("former", msgspec.to_builtins(known))
    seen = [node.address for node in _nodes(run)]
    former: dict[int, list[dict[str, _Peer]]] = {}
    told = [msgspec.convert(answer, list[protocol.Others]) for answer in answers]
    # A node that was in several of them knows the secret of the last, which comes first.
    for age in range(max(map(len, told))):
        for rank, others, address in [
            (rank, each[age], node.address)
            for rank, each in enumerate(told)
            for node in (each[age].nodes if age < len(each) else ())
        ]:
            if not any(same_place(address, each) for each in seen):
                seen.append(address)
                name = f"peers-{_name_of(address)}-former{len(seen)}"
                peers = {
                    f"{name}-{label}": _Peer(address, others.secret, label)
                    for label in _labels_of_nodes(run)
                }
                former.setdefault(rank, []).append(peers)
    return former
