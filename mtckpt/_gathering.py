"""What all nodes of a job hold of a run: looked at once on each, told to every rank.

Knows which places are of one node and which of all, and what another node's places are called
here. Does not choose among steps: every rank is told the same, so all choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _holdings, _restore
from mtckpt._delivery import Place
from mtckpt._holdings import Holdings, holdings_of
from mtckpt.tiers.peer import PeerTier

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._run import Run
    from mtckpt.agent import protocol

__all__ = ["Gathered", "gather"]


# A peer that is silent for so long is passed over.
_PEER_TIMEOUT_S = 10.0


class _Told(msgspec.Struct, frozen=True, array_like=True):
    """What the first rank of a node found in some places; ``silent`` has those that are mute."""

    holdings: tuple[Holdings, ...]
    silent: dict[str, str]


@dataclass(slots=True)
class Gathered:
    """``places`` by label, fastest first; ``silent`` ones with the reason.

    ``holdings`` of all of them come in the same order on every rank, whatever each of them calls
    the places. ``inventories`` are of what this process has looked at itself.
    """

    run_key: str
    places: dict[str, Place] = field(default_factory=dict)
    holdings: list[Holdings] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    inventories: dict[str, Inventory] = field(default_factory=dict)


def gather(
    run: Run, places: Sequence[Place], other: tuple[Sequence[Place], str] | None = None
) -> Gathered:
    """Look into this node's places, and learn what other nodes have in theirs. All ranks call it.

    ``other`` has the places and the key of another run that is restored from. Raises RankTimeout. A
    place that does not answer is named in the result, whose ever it is.
    """
    found = Gathered(run.key)
    near = [place for place in places if place.near]
    far = [place for place in places if not place.near]
    _take_in_nodes(run, found, _look(run, found, near))
    if far:
        held = any(save.complete for save in _holdings.join(found.holdings).values())
        with run.hurrying(held):
            _take_in_shared(found, _look(run, found, far))
    run.note(found.holdings)
    if other is None:
        return found
    found = Gathered(other[1])
    _take_in_shared(found, _look(run, found, other[0]))
    return found


def _look(run: Run, found: Gathered, places: Sequence[Place]) -> dict[int, _Told]:
    """What the first rank of each node found, by that rank."""
    found.places.update({place.label: place for place in places})
    told = None
    if run.members.rank == run.members.node[0]:
        inventories, silent = _restore.scan_places(places, found.run_key, run.within)
        found.inventories.update(inventories)
        told = _Told(tuple(map(holdings_of, inventories.values())), silent)
        if run.members.world_size == 1:
            return {0: told}
    answers = run.exchange("holdings", msgspec.to_builtins(told), patient=True)
    return {
        rank: msgspec.convert(answer, _Told)
        for rank, answer in enumerate(answers)
        if answer is not None
    }


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
    peers: list[Place] = []
    for rank, each in told.items():
        is_own = rank == run.members.node[0]
        names = {holdings.label for holdings in each.holdings} | each.silent.keys()
        called = {label: label if is_own else _called(run, rank, label) for label in names}
        found.silent.update({called[label]: why for label, why in each.silent.items()})
        for holdings in each.holdings:
            if not is_own:
                peers.append(_peer(run, rank, holdings.label))
            found.holdings.append(msgspec.structs.replace(holdings, label=called[holdings.label]))
    peers.sort(key=lambda place: not place.label.endswith("-ram"))
    found.places.update({place.label: place for place in peers})


def _called(run: Run, rank: int, label: str) -> str:
    """What the place of the node of a rank is called on other nodes."""
    node = _node_of(run, rank)
    names = [each.address.name for each in _nodes(run)]
    name = node.address.name or node.address.host
    return f"peers-{name}-{label}" if names.count(name) < 2 else f"peers-{name}-{rank}-{label}"


def _peer(run: Run, rank: int, label: str) -> Place:
    joined = run.session.joined
    assert joined is not None
    tier = PeerTier(
        _node_of(run, rank).address,
        run.key,
        bytes.fromhex(joined.secret),
        place=label,
        timeout_s=min(run.timeout_s, _PEER_TIMEOUT_S),
    )
    return Place(_called(run, rank, label), tier, mapped=False, near=False)


def _node_of(run: Run, rank: int) -> protocol.NodeOfRun:
    return next(node for node in _nodes(run) if rank in node.ranks)


def _nodes(run: Run) -> Sequence[protocol.NodeOfRun]:
    joined = run.session.joined
    return [] if joined is None else joined.nodes
