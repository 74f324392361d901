"""What all nodes of a job hold of a run: looked at once on each, told to every rank.

Knows which places are of one node and which of all, and what another node's places are called
here. Does not choose among steps: every rank is told the same, so all choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _holdings, _restore
from mtckpt._holdings import Holdings, holdings_of

if TYPE_CHECKING:
    from mtckpt._delivery import Place
    from mtckpt._inventory import Inventory
    from mtckpt._run import Run

__all__ = ["Gathered", "gather"]


class _Told(msgspec.Struct, frozen=True, array_like=True):
    """What the first rank of a node found in some places; ``silent`` has those that are mute."""

    holdings: tuple[Holdings, ...]
    silent: dict[str, str]


@dataclass(slots=True)
class Gathered:
    """``places`` by label, and what each holds, fastest first; ``silent`` ones with the reason.

    ``inventories`` are of what this process has looked at itself.
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
    far = [place for place in places if not place.near]
    _take_in(found, _look(run, found, [place for place in places if place.near]))
    if far:
        held = any(save.complete for save in _holdings.join(found.holdings).values())
        with run.hurrying(held):
            _take_in(found, _look(run, found, far))
    run.note(found.holdings)
    if other is None:
        return found
    found = Gathered(other[1])
    _take_in(found, _look(run, found, other[0]))
    return found


def _look(run: Run, found: Gathered, places: Sequence[Place]) -> list[_Told]:
    """What the first rank of every node found; this node's comes first."""
    found.places.update({place.label: place for place in places})
    told = None
    if run.members.rank == run.members.node[0]:
        inventories, silent = _restore.scan_places(places, found.run_key, run.within)
        found.inventories.update(inventories)
        told = _Told(tuple(map(holdings_of, inventories.values())), silent)
        if run.members.world_size == 1:
            return [told]
    answers = run.exchange("holdings", msgspec.to_builtins(told), patient=True)
    return [msgspec.convert(answer, _Told) for answer in answers if answer is not None]


def _take_in(found: Gathered, told: Sequence[_Told]) -> None:
    for each in told:
        found.holdings += each.holdings
        found.silent.update(each.silent)
