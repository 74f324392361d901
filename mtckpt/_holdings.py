"""What places hold of a run, as a few words for each save, and what they hold together. Pure.

Knows the commit rule over places: a save is complete when the records that its plan names are
there, wherever each of them lies. Does not read anything, and holds nothing for each tensor: what
is said here is small enough to be told to every rank of a job.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from mtckpt._manifest import Incarnation, SaveName

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import Record, SaveEntry

__all__ = ["HeldSave", "Holdings", "Joined", "Part", "holdings_of", "is_whole", "join", "whole_of"]

_MAX_REASON_CHARS = 300
_MAX_NAMED = 8


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Records of one save, in one place, that are parts of the same whole.

    ``ranges`` has the ranks as ``(first, stop)``. ``every`` is what rank 0 carries on.
    """

    save_id: str
    world_size: int
    plan_digest: str
    ranges: tuple[tuple[int, int], ...]
    size_bytes: int = 0
    every: int = 0

    @property
    def whole(self) -> tuple[str, int, str]:
        """Equal for parts that belong together."""
        return self.save_id, self.world_size, self.plan_digest

    def ranks(self) -> Iterable[int]:
        for first, stop in self.ranges:
            yield from range(first, stop)


class HeldSave(msgspec.Struct, frozen=True, array_like=True):
    """One save as one place has it. ``unfinished``: see ``SaveEntry``."""

    save: str
    parts: tuple[Part, ...] = ()
    problem: str = ""
    aborted: str = ""
    unfinished: bool = False
    metrics: dict[str, float] = {}


class Holdings(msgspec.Struct, frozen=True, array_like=True):
    """Everything that the place of this label has of a run."""

    label: str
    saves: tuple[HeldSave, ...] = ()
    incarnations: tuple[Incarnation, ...] = ()


@dataclass(slots=True)
class Joined:
    """One save as all places together have it.

    ``whole`` is what its records have alike: id, number of ranks, digest of the plan. ``sources``
    has the places of each rank's record, in the order in which places were given. ``reasons`` says
    what keeps it from being used, ``lost`` that there once was more of it, or may have been.
    """

    name: SaveName
    whole: tuple[str, int, str] = ("", 0, "")
    sources: dict[int, tuple[str, ...]] = field(default_factory=dict)
    size_bytes: int = 0
    every: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    lost: bool = False

    @property
    def complete(self) -> bool:
        """The commit rule, over all places."""
        return 0 < self.whole[1] == len(self.sources)


def holdings_of(inventory: Inventory) -> Holdings:
    """An inventory without its records."""
    return Holdings(
        inventory.tier,
        tuple(map(_held, inventory.saves.values())),
        tuple(inventory.incarnations),
    )


def _held(save: SaveEntry) -> HeldSave:
    wholes: dict[tuple[str, int, str], list[Record]] = {}
    for rank in sorted(save.records):
        wholes.setdefault(whole_of(save.records[rank]), []).append(save.records[rank])
    return HeldSave(
        str(save.name),
        tuple(_part(whole, records) for whole, records in wholes.items()),
        save.problems[0][:_MAX_REASON_CHARS] if save.problems else "",
        save.aborted[:_MAX_REASON_CHARS],
        save.unfinished,
        save.metrics,
    )


def whole_of(record: Record) -> tuple[str, int, str]:
    """What a record has alike with the other records of its save."""
    return record.save_id, record.world_size, record.plan_digest


def _part(whole: tuple[str, int, str], records: Sequence[Record]) -> Part:
    ranges: list[tuple[int, int]] = []
    for record in records:
        if record.rank >= record.world_size:
            continue
        if ranges and ranges[-1][1] == record.rank:
            ranges[-1] = (ranges[-1][0], record.rank + 1)
        else:
            ranges.append((record.rank, record.rank + 1))
    size_bytes = sum(record.shard.size_bytes for record in records)
    every = records[0].every if records[0].rank == 0 else 0
    return Part(*whole, tuple(ranges), size_bytes, every)


def join(holdings: Sequence[Holdings]) -> dict[SaveName, Joined]:
    """Every save of any of these places, as they have it together; fastest places come first.

    Records of one save that disagree about its id, its number of ranks or its plan are no parts of
    one whole: the whole that is complete counts, else the one that has the most ranks.
    """
    found: dict[SaveName, list[tuple[str, HeldSave]]] = {}
    for place in holdings:
        for held in place.saves:
            name = SaveName.parse(held.save)
            if name is not None:
                found.setdefault(name, []).append((place.label, held))
    return {name: _joined(name, held) for name, held in found.items()}


def is_whole(holdings: Sequence[Holdings], step: int | str) -> bool:
    """Whether the places have all of a step, or, where it is no number, of the newest save."""
    saves = join(holdings)
    if isinstance(step, int):
        return any(save.complete for name, save in saves.items() if name.step == step)
    newest = max(saves, key=lambda name: (name.incarnation, name.step), default=None)
    return newest is not None and saves[newest].complete


def _joined(name: SaveName, places: Sequence[tuple[str, HeldSave]]) -> Joined:
    joined = Joined(name)
    wholes: dict[tuple[str, int, str], list[tuple[str, Part]]] = {}
    for label, held in places:
        joined.metrics.update(held.metrics)
        joined.lost |= not held.unfinished
        if held.aborted:
            joined.reasons.append(f"{label}: called off: {held.aborted}")
            continue
        if held.problem:
            joined.reasons.append(f"{label}: {held.problem}")
        for part in held.parts:
            wholes.setdefault(part.whole, []).append((label, part))
    if not wholes:
        if not joined.reasons:
            joined.reasons.append(f"no record is in {_named(label for label, _ in places)}")
        return joined
    sources_of = {whole: _sources(parts) for whole, parts in wholes.items()}
    chosen = max(
        wholes, key=lambda whole: (len(sources_of[whole]) == whole[1], len(sources_of[whole]))
    )
    parts = wholes.pop(chosen)
    joined.whole, joined.sources = chosen, sources_of[chosen]
    joined.size_bytes = _size_of(parts)
    joined.every = max(part.every for _, part in parts)
    for others in wholes.values():
        joined.reasons += [
            f"{label}: records of ranks {_some(part.ranks())} are of another plan than those in"
            f" {_named(label for label, _ in parts)}"
            for label, part in others
        ]
    if not joined.complete:
        lacking = _some(rank for rank in range(chosen[1]) if rank not in joined.sources)
        where = _named(label for label, _ in places)
        joined.reasons.append(f"records of ranks {lacking} are missing from {where}")
    return joined


def _sources(parts: Sequence[tuple[str, Part]]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for label, part in parts:
        for rank in part.ranks():
            found[rank] = (*found.get(rank, ()), label)
    return found


def _size_of(parts: Sequence[tuple[str, Part]]) -> int:
    """Bytes of one copy of each shard; where places overlap, as if their shards were alike."""
    seen: set[int] = set()
    size_bytes = 0
    for _, part in parts:
        ranks = set(part.ranks())
        size_bytes += part.size_bytes * len(ranks - seen) // max(1, len(ranks))
        seen |= ranks
    return size_bytes


def _some(ranks: Iterable[int]) -> list[int]:
    return list(itertools.islice(ranks, _MAX_NAMED))


def _named(labels: Iterable[str]) -> str:
    names = list(dict.fromkeys(labels))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
