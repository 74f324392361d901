"""Which node holds copies of which node's bytes, what that costs, and what it survives. Pure.

Knows nodes, sizes and failure domains. Does not know files, agents or time: whoever has the same
facts decides the same. Copies are counted on other nodes, and bytes that several nodes capture
anyway are copies already.

The rule is a ring: nodes in the order of their domains, each held by the nodes that stand evenly
spaced from it. Every node then holds as many copies as any other, and a domain is survived, at all
levels at once, whenever any rule with that balance could survive it: when it has no more nodes than
``num_nodes - ceil(num_nodes / (1 + copies))``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mtckpt._boxes import seats_of
from mtckpt._survival import GIB, Levels, Node, Part, Survival, levels_of, ranges, survival_of
from mtckpt.errors import PlacementImpossible, UsageError

__all__ = [
    "Held",
    "Layout",
    "Placement",
    "choose_layout",
    "held_in",
    "memory_bytes",
    "place",
]

# A node where so many copies did not verify holds no others' copies while there are other nodes.
LEMON_FAILURES = 3
MAX_COPIES = 8


class Held(NamedTuple):
    """Bytes that the node of each of these ranks captures: a rank's own, or replicated ones."""

    ranks: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds what. ``nodes`` are in the order of the ring.

    ``partners`` are the names of the nodes that hold copies of a node's own bytes, by that node's
    ranks: names change when a node is replaced. ``warnings`` say what could not be had, ``notes``
    what else there is to know.
    """

    copies: int
    nodes: tuple[Node, ...]
    levels: Levels
    parts: tuple[Part, ...]
    partners: Mapping[tuple[int, ...], tuple[str, ...]]
    survival: Survival
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def pulled_by(self, name: str) -> list[tuple[str, tuple[int, ...], int]]:
        """What a node has to copy: ``(from which node, bytes of which ranks, how many)``."""
        return [
            (self.nodes[source].name, part.ranks, part.size_bytes)
            for part in self.parts
            for source, target in part.pulls
            if self.nodes[target].name == name
        ]

    def pulled_bytes(self) -> dict[str, int]:
        """How many bytes of others each node holds."""
        return dict(
            zip(
                (node.name for node in self.nodes), _loads(self.parts, len(self.nodes)), strict=True
            )
        )

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "copies": self.copies,
            **self.survival.as_json(),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "partners": {ranges(ranks): list(names) for ranks, names in self.partners.items()},
            "pulled_bytes": self.pulled_bytes(),
        }


def place(
    nodes: Sequence[Node],
    held: Sequence[Held],
    copies: int,
    *,
    before: Mapping[tuple[int, ...], tuple[str, ...]] | None = None,
    strict: bool = False,
) -> Placement:
    """Decide which nodes hold copies, so that all bytes are on ``1 + copies`` nodes.

    ``before`` are the partners of an earlier placement: what of it still holds stays, unless a new
    one survives more or is much better balanced. With ``strict``, PlacementImpossible is raised
    where the copies cannot be had, or cannot be spread so that any one domain may go; else that is
    a warning. Raises UsageError for ``copies`` that are none, and for nodes of one name.
    """
    if not 0 <= copies <= MAX_COPIES:
        raise UsageError(
            f"copies must be 0 to {MAX_COPIES}, not {copies}", state="nothing was placed"
        )
    ring, levels = _ring_of(nodes)
    parts = _parts(ring, held)
    healthy = [node.failures < LEMON_FAILURES and not node.leaving for node in ring]
    scene = _Scene(ring, levels, parts, min(copies, max(0, len(ring) - 1)), healthy)
    chosen = scene.placed(scene.fresh())
    if before and 2 * sum(node.ranks in before for node in ring) >= len(ring):
        kept = scene.placed(scene.kept(before, chosen.survival))
        if _is_as_good(kept, chosen):
            chosen = kept
    warnings = _warnings(scene, chosen, copies)
    if strict and warnings:
        raise PlacementImpossible(
            f"copies={copies} cannot be placed so that any one domain may be lost:"
            f" {'; '.join(warnings)}",
            copies=copies,
            warnings=tuple(warnings),
        )
    partners = {
        node.ranks: tuple(ring[partner].name for partner in chosen.partners[seat])
        for seat, node in enumerate(ring)
    }
    return Placement(
        copies,
        ring,
        levels,
        chosen.parts,
        partners,
        chosen.survival,
        tuple(warnings),
        tuple(_notes(scene)),
    )


def _ring_of(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], Levels]:
    """Nodes in the order of their domains, the widest first, then of their ranks."""
    nodes = sorted(nodes, key=lambda node: (node.ranks, node.name))
    levels = levels_of(nodes)
    wider = [levels.domains[level] for level in range(len(levels.names) - 1, 0, -1)]
    order = sorted(range(len(nodes)), key=lambda seat: [column[seat] for column in wider])
    ring = tuple(nodes[seat] for seat in order)
    domains = tuple(tuple(column[seat] for seat in order) for column in levels.domains)
    return ring, levels._replace(domains=domains)


def _parts(ring: Sequence[Node], held: Sequence[Held]) -> list[Part]:
    """Bytes by the nodes that capture them, as few parts as can be."""
    seat_of = {rank: seat for seat, node in enumerate(ring) for rank in node.ranks}
    found: dict[tuple[int, ...], tuple[set[int], int]] = {}
    for ranks, size_bytes in held:
        seats = tuple(sorted({seat_of[rank] for rank in ranks if rank in seat_of}))
        if not seats:
            raise UsageError(f"ranks {ranges(ranks)} are on no node", state="nothing was placed")
        known, sum_bytes = found.get(seats, (set(), 0))
        known.update(ranks)
        found[seats] = (known, sum_bytes + size_bytes)
    return [
        Part(tuple(sorted(ranks)), size_bytes, seats)
        for seats, (ranks, size_bytes) in sorted(found.items())
    ]


class _Placed(NamedTuple):
    partners: list[list[int]]
    parts: tuple[Part, ...]
    survival: Survival
    most_bytes: int


class _Scene(NamedTuple):
    """The facts of one decision; ``copies`` are no more than there are other nodes."""

    ring: tuple[Node, ...]
    levels: Levels
    parts: list[Part]
    copies: int
    healthy: list[bool]

    def fresh(self) -> list[list[int]]:
        """Partners of every seat by the rule of the ring; lemons are none."""
        num_seats = len(self.ring)
        wanted = [
            [other for other in seats_of(seat, num_seats, self.copies)[1:] if self.healthy[other]]
            for seat in range(num_seats)
        ]
        return self._completed(wanted)

    def kept(
        self, before: Mapping[tuple[int, ...], tuple[str, ...]], fresh: Survival
    ) -> list[list[int]]:
        """Partners as they were, where they still serve; others in the place of the rest."""
        seat_named = {node.name: seat for seat, node in enumerate(self.ring)}
        wanted: list[list[int]] = []
        for seat, node in enumerate(self.ring):
            known = [seat_named.get(name, seat) for name in before.get(node.ranks, ())]
            known = [other for other in dict.fromkeys(known) if other != seat]
            known = [other for other in known if self.healthy[other]][: self.copies]
            wanted.append(self._serving(seat, known, fresh))
        return self._completed(wanted)

    def _serving(self, seat: int, partners: list[int], fresh: Survival) -> list[int]:
        """All of them if no domain has more than it should; else those in domains of their own."""
        for name, column in zip(self.levels.names, self.levels.domains, strict=True):
            lacking = self.copies - len(partners)
            first_in = {column[other]: other for other in reversed([seat, *partners])}
            if len(first_in) + lacking <= fresh.any.get(name, 0):
                partners = [other for other in partners if first_in[column[other]] == other]
        return partners

    def _completed(self, wanted: list[list[int]]) -> list[list[int]]:
        """Add partners where some lack: in new domains first, then where the least lies."""
        own = [0] * len(self.ring)
        for part in self.parts:
            if len(part.captured) == 1:
                own[part.captured[0]] += part.size_bytes
        loads = [(0, 0)] * len(self.ring)

        def add(seat: int, other: int) -> None:
            size_bytes, number = loads[other]
            loads[other] = (size_bytes + own[seat], number + 1)

        for seat, partners in enumerate(wanted):
            for other in partners:
                add(seat, other)
        for seat, partners in enumerate(wanted):
            while len(partners) < self.copies:
                best = self._best(seat, partners, loads)
                partners.append(best)
                add(seat, best)
        return wanted

    def _best(self, seat: int, partners: list[int], loads: list[tuple[int, int]]) -> int:
        taken = {seat, *partners}
        known = [{column[other] for other in taken} for column in self.levels.domains[:0:-1]]
        columns = self.levels.domains[:0:-1]
        num_seats = len(self.ring)

        def rank(other: int) -> tuple[object, ...]:
            is_known = [column[other] in seen for column, seen in zip(columns, known, strict=True)]
            return (not self.healthy[other], is_known, loads[other], (other - seat) % num_seats)

        return min((other for other in range(num_seats) if other not in taken), key=rank)

    def placed(self, partners: list[list[int]]) -> _Placed:
        """What these partners hold, and what that survives."""
        parts = tuple(self._with_pulls(part, partners) for part in self.parts)
        loads = _loads(parts, len(self.ring))
        return _Placed(partners, parts, survival_of(self.levels, parts), max(loads, default=0))

    def _with_pulls(self, part: Part, partners: list[list[int]]) -> Part:
        if len(part.captured) == 1:
            (source,) = part.captured
            return part._replace(pulls=tuple((source, target) for target in partners[source]))
        edges = [(seat, other) for seat in part.captured for other in partners[seat]]
        pulls: list[tuple[int, int]] = []
        holders = list(part.captured)
        while len(pulls) < self.copies and not self._is_enough(holders):
            new = [edge for edge in edges if edge[1] not in holders]
            if not new:
                break
            pulls.append(max(new, key=lambda edge: self._gain(holders, edge[1])))
            holders.append(pulls[-1][1])
        return part._replace(pulls=tuple(pulls))

    def _is_enough(self, holders: Sequence[int]) -> bool:
        """True for ``1 + copies`` nodes, not all lemons, that no one domain has all of."""
        if len(holders) <= self.copies or not any(self.healthy[seat] for seat in holders):
            return len(holders) == len(self.ring)
        return all(
            len(set(column)) == 1 or len({column[seat] for seat in holders}) > 1
            for column in self.levels.domains
        )

    def _gain(self, holders: Sequence[int], other: int) -> list[bool]:
        """Whether one more holder is in a new domain, from the widest on."""
        return [
            column[other] not in {column[seat] for seat in holders}
            for column in reversed(self.levels.domains)
        ]


def _loads(parts: Sequence[Part], num_seats: int) -> list[int]:
    loads = [0] * num_seats
    for part in parts:
        for _, target in part.pulls:
            loads[target] += part.size_bytes
    return loads


def _is_as_good(kept: _Placed, fresh: _Placed) -> bool:
    """Whether the one that moves less survives as much, and burdens no node twice as much."""
    at_least = all(
        kept.survival.any[level] >= number for level, number in fresh.survival.any.items()
    )
    fewer = len(kept.survival.losses) <= len(fresh.survival.losses)
    return at_least and fewer and kept.most_bytes <= 2 * fresh.most_bytes


def _warnings(scene: _Scene, placed: _Placed, copies: int) -> list[str]:
    if not copies:
        return []
    warnings = []
    num_nodes = len(scene.ring)
    if scene.copies < copies:
        has = "there is" if num_nodes == 1 else "there are"
        warnings.append(f"copies={copies} needs {copies + 1} nodes, and {has} {num_nodes}")
    for loss in placed.survival.losses:
        if loss.level == "node":
            continue  # said by the line above: there is no other node
        level = scene.levels.names.index(loss.level)
        domain = scene.levels.titles[level].index(loss.domain)
        inside = scene.levels.domains[level].count(domain)
        where = "all nodes are" if inside == num_nodes else f"{inside} of {num_nodes} nodes are"
        warnings.append(
            f"{where} in {loss}: with it all copies of ranks {ranges(loss.ranks)} are lost"
            f" ({loss.size_bytes / GIB:.2f} GiB)"
        )
    holding = {target for part in placed.parts for _, target in part.pulls}
    lemons = sorted(scene.ring[seat].name for seat in holding if not scene.healthy[seat])
    if lemons:
        warnings.append(
            f"copies are on {', '.join(lemons)}, which should be avoided: too few other nodes"
        )
    return warnings


def _notes(scene: _Scene) -> list[str]:
    notes = [
        f"{kind} is not used: {name} has no label for it" for kind, name in scene.levels.unlabelled
    ]
    return notes + [
        f"{node.name} is avoided: {_why_avoided(node)}"
        for node, is_healthy in zip(scene.ring, scene.healthy, strict=True)
        if not is_healthy
    ]


def _why_avoided(node: Node) -> str:
    if node.leaving:
        return "it is about to go"
    return f"{node.failures} copies did not verify there"


# -- memory ---------------------------------------------------------------------------------------


def memory_bytes(own_bytes: int, slots: int, pulled_bytes: int) -> int:
    """Memory of a node: slots for its own shards, and others' copies.

    A copy stays until the next one is there, so that each takes its place twice: with equal nodes
    that is ``(slots + 2 x copies)`` times a node's shards.
    """
    return slots * own_bytes + 2 * pulled_bytes


class Layout(NamedTuple):
    """How nodes divide what they hold alike, and what a node needs for it; ``reason`` says why."""

    name: Literal["node", "spread"]
    needed_bytes: int
    fits: bool
    reason: str


def choose_layout(
    private_bytes: int,
    shared_bytes: int,
    num_nodes: int,
    *,
    copies: int,
    slots: int,
    room_bytes: int,
) -> Layout:
    """Layout "node" where it fits into a node's memory, else "spread".

    ``private_bytes`` are of one node's ranks alone, ``shared_bytes`` those that ``num_nodes`` nodes
    hold alike. With "node" each of them captures all of these; with "spread" they share them out,
    and each byte is captured by ``1 + copies``. Partners copy in both what they have not captured
    themselves.
    """
    fewer = min(copies, num_nodes - 1)
    held, lacking = _parts_of_spread(num_nodes, fewer)
    part_bytes = -(-shared_bytes // num_nodes)
    needed = {
        "node": memory_bytes(private_bytes + shared_bytes, slots, private_bytes * fewer),
        "spread": memory_bytes(
            private_bytes + held * part_bytes, slots, private_bytes * fewer + lacking * part_bytes
        ),
    }
    if needed["node"] <= room_bytes or needed["spread"] >= needed["node"]:
        fits = needed["node"] <= room_bytes
        reason = f"each node captures all that its ranks need: {_of(needed['node'], room_bytes)}"
        return Layout("node", needed["node"], fits, reason)
    reason = (
        f"what {num_nodes} nodes hold alike is captured by {1 + fewer} of them, byte by byte: all"
        f" of it on each would take {_of(needed['node'], room_bytes)}, this"
        f" {needed['spread'] / GIB:.2f} GiB"
    )
    return Layout("spread", needed["spread"], needed["spread"] <= room_bytes, reason)


@functools.lru_cache(maxsize=64)
def _parts_of_spread(num_nodes: int, copies: int) -> tuple[int, int]:
    """Of as many parts as there are nodes: how many a node captures at most, and how many of those
    of other nodes, which it holds copies of, it does not."""
    seats = [set[int]() for _ in range(num_nodes)]
    for part in range(num_nodes):
        for seat in seats_of(part, num_nodes, copies):
            seats[seat].add(part)
    lacking = [0] * num_nodes
    for seat in range(num_nodes):
        for partner in seats_of(seat, num_nodes, copies)[1:]:
            lacking[partner] += len(seats[seat] - seats[partner])
    return max(map(len, seats)), max(lacking)


def held_in(
    layout: Literal["node", "spread"],
    nodes: Sequence[Node],
    private_bytes: int,
    shared_bytes: int,
    copies: int = 0,
) -> list[Held]:
    """What a save leaves on equal nodes, before a copy is made; ``shared_bytes`` all hold alike."""
    ring, _ = _ring_of(nodes)
    held = [Held(node.ranks, private_bytes) for node in ring] if private_bytes else []
    if not shared_bytes or not ring:
        return held
    if layout == "node":
        return [*held, Held(tuple(rank for node in ring for rank in node.ranks), shared_bytes)]
    for seat in range(len(ring)):
        first, stop = (shared_bytes * at // len(ring) for at in (seat, seat + 1))
        ranks = [rank for at in seats_of(seat, len(ring), copies) for rank in ring[at].ranks]
        held.append(Held(tuple(ranks), stop - first))
    return held


def _of(needed_bytes: int, room_bytes: int) -> str:
    return f"{needed_bytes / GIB:.2f} GiB of {room_bytes / GIB:.2f} GiB"
