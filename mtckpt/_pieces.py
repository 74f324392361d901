"""Which bytes of a state this rank stores: its own, its boxes, its share of what others hold too.

Knows leaves, boxes and the ranks of this node. Does not know files. It talks to nobody: each rank
decides by the same rule from what it knows of the array alone, and together they store every byte
once for each node (``share_of``). The rank of a record is not the rank of a leaf: what is global
may come back to any rank, what is private comes back to the one that had it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from mtckpt._boxes import Box, share_of, spread_of, whole
from mtckpt._dtypes import size_bytes_of
from mtckpt._state import ArraySpec, Part
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from mtckpt._state import Flat, StateAdapter

__all__ = ["ALONE", "Members", "Piece", "Recipe", "divide", "gather", "replicas_of", "shared_bytes"]


@dataclass(frozen=True, slots=True)
class Members:
    """This rank, how many there are, and which of them are on this node.

    ``spread`` are the ranks of all nodes, node by node in the order of placement's ring, where
    nodes divide what they hold alike so that ``1 + copies`` of them store each byte; empty where
    every node stores all that its ranks hold.
    """

    rank: int = 0
    world_size: int = 1
    node: tuple[int, ...] = (0,)
    spread: tuple[tuple[int, ...], ...] = ()
    copies: int = 0


ALONE = Members()


class Piece(NamedTuple):
    """One array of the shard: leaf ``leaf``, or the rows ``rows`` of part ``part`` of it.

    ``part`` may be OWN or WHOLE too. ``spec`` is of what is stored; ``holders`` and ``held`` say
    what the part was when the plan was made, and are compared at every save. ``ranks`` are those
    that the array is spread over, None where all are.
    """

    leaf: int
    spec: ArraySpec
    part: int = -1
    rows: tuple[int, int] | None = None
    held: ArraySpec | None = None
    holders: tuple[int, ...] = ()
    ranks: tuple[int, ...] | None = None
    alike: str = ""


# Values of ``Piece.part`` that name no part: a leaf of this rank's own, and one that is replicated.
OWN, WHOLE = -1, -2


@dataclass(frozen=True, slots=True)
class Recipe:
    """The pieces of a plan. One of each leaf comes first, in the order of the leaves.

    ``agreed`` is the digest of what all ranks of the job have to have alike. ``replicas`` are the
    leaves that are replicated and their ranks, ``seen`` what they looked like, and ``empty`` stands
    for those of which this rank has no share.
    """

    pieces: tuple[Piece, ...]
    agreed: str
    replicas: dict[int, tuple[int, ...]]
    seen: list[object]
    empty: dict[int, Any]
    is_plain: bool


def replicas_of(flat: Flat, members: Members) -> dict[int, tuple[int, ...]]:
    """The leaves that are replicated whole, and the ranks that hold each; alone there are none."""
    if members.world_size == 1:
        return {}
    everybody = tuple(range(members.world_size))
    return {
        leaf: ranks or everybody
        for leaf, ranks in flat.replicas.items()
        if flat.owners[leaf].parts(flat.arrays[leaf], flat.paths[leaf]) is None
    }


def divide(flat: Flat, specs: Sequence[ArraySpec], members: Members) -> Recipe:
    """Decide what this rank stores of every leaf. Raises UnsupportedState as adapters do.

    By each leaf alone: which of them are tied is this rank's own business, and others may hold the
    same arrays in memory of their own.
    """
    firsts: list[Piece] = []
    others: list[Piece] = []
    shared: list[tuple[str, str, tuple[int, ...]]] = []
    replicas = replicas_of(flat, members)
    empty: dict[int, Any] = {}
    crowds = _Crowds(members)
    for leaf, (owner, array, path) in enumerate(
        zip(flat.owners, flat.arrays, flat.paths, strict=True)
    ):
        whole_of_it = leaf in replicas
        parts = (
            [_replica(specs[leaf], array, replicas[leaf])]
            if whole_of_it
            else owner.parts(array, path)
        )
        if parts is None:
            firsts.append(Piece(leaf, specs[leaf]))
            continue
        ranks = crowds.spread_over(parts)
        if ranks is None:
            spec = parts[0].spec
            shared.append((path, spec.dtype, spec.whole_shape))
        pieces = [piece._replace(ranks=ranks) for piece in _pieces_of(leaf, path, parts, crowds)]
        if whole_of_it:
            pieces = [piece._replace(part=WHOLE) for piece in pieces]
            if not pieces[0].spec.size_bytes:
                empty[leaf] = _nothing(owner, pieces[0].spec)
        firsts.append(pieces[0])
        others += pieces[1:]
    return Recipe(
        (*firsts, *others),
        xxh3_128_hexdigest(msgspec.json.encode([*sorted(shared), *_layout(members)])),
        replicas,
        _look(flat.owners, flat.arrays, replicas),
        empty,
        all(piece.part == OWN for piece in firsts),
    )


def shared_bytes(recipe: Recipe, members: Members) -> int:
    """How much of what this rank stores is of arrays that ranks of other nodes hold too."""
    here = set(members.node)
    pieces = recipe.pieces
    return sum(piece.spec.size_bytes for piece in pieces if not here.issuperset(piece.holders))


def _layout(members: Members) -> list[object]:
    """How shared bytes are divided among nodes, which all ranks have to believe alike."""
    return [("spread", members.copies, members.spread)] if members.spread else []


def _replica(spec: ArraySpec, array: Any, ranks: tuple[int, ...]) -> Part:
    """What is replicated, as the one box of a global array."""
    box = whole(spec.shape)
    held = ArraySpec(spec.dtype, spec.shape, spec.framework, box.offsets, spec.shape)
    return Part(held, array, ranks)


def _nothing(owner: StateAdapter, spec: ArraySpec) -> Any:
    """An empty array, whatever kind the whole one is of: no elements make up no random key."""
    plain = spec._replace(framework=spec.framework.partition(".")[0])
    return owner.finished(owner.new(plain)[0], plain)


def _look(
    owners: Sequence[StateAdapter], arrays: Sequence[Any], leaves: Iterable[int]
) -> list[object]:
    """Fingerprints of some leaves, by adapter."""
    by_owner: dict[int, tuple[StateAdapter, list[Any]]] = {}
    for leaf in leaves:
        owner = owners[leaf]
        by_owner.setdefault(id(owner), (owner, []))[1].append(arrays[leaf])
    return [owner.fingerprint(values) for owner, values in by_owner.values()]


class _Crowd(NamedTuple):
    """The ranks that hold one part: whether this one is of them, which are on this node, and where
    nodes share it out, node by node."""

    has_this: bool
    here: list[int]
    nodes: list[list[int]]
    alike: str


class _Crowds:
    """Groups of ranks as this one sees them, each worked out once for however many arrays: there
    may be thousands of either."""

    def __init__(self, members: Members) -> None:
        self.members = members
        # By the tuple itself and not by its value, which takes as long to compare as to work out.
        self._known: dict[int, tuple[tuple[int, ...], _Crowd]] = {}
        self._spread: dict[tuple[int, ...], tuple[object, tuple[int, ...] | None]] = {}

    def of(self, holders: tuple[int, ...]) -> _Crowd:
        """What there is to know of the ranks that hold a part."""
        found = self._known.get(id(holders))
        if found is None:
            members, ranks = self.members, frozenset(holders)
            nodes = [[rank for rank in node if rank in ranks] for node in members.spread]
            near = frozenset(members.node)
            alike = xxh3_64_hexdigest(msgspec.json.encode(sorted(holders)))[:8]
            crowd = _Crowd(
                members.rank in ranks,
                [rank for rank in holders if rank in near],
                [node for node in nodes if node],
                alike if len(holders) > 1 else "",
            )
            found = self._known[id(holders)] = holders, crowd
        return found[1]

    def spread_over(self, parts: Sequence[Part]) -> tuple[int, ...] | None:
        """The ranks that have a part in a global array; None for all of the job."""
        groups = [part.sharers or part.holders for part in parts]
        key = tuple(map(id, groups))
        if key not in self._spread:
            ranks = {self.members.rank}.union(*groups)
            everybody = len(ranks) == self.members.world_size
            self._spread[key] = groups, None if everybody else tuple(sorted(ranks))
        return self._spread[key][1]


def _pieces_of(leaf: int, name: str, parts: Sequence[Part], crowds: _Crowds) -> list[Piece]:
    """Each box once, and of those that others of this node hold as well this rank's share."""
    pieces: list[Piece] = []
    known: set[Box] = set()
    for number, part in enumerate(parts):
        spec = part.spec
        box = Box(spec.offsets or (), spec.shape)
        if box in known:
            continue
        known.add(box)
        crowd = crowds.of(part.holders)
        for share in _shares(spec, name, crowd, crowds.members):
            piece = Piece(leaf, spec, number, None, spec, part.holders, None, crowd.alike)
            if share != whole(spec.shape):
                rows = (share.offsets[0], share.offsets[0] + share.shape[0])
                offsets = (box.offsets[0] + rows[0], *box.offsets[1:])
                stored = ArraySpec(
                    spec.dtype, share.shape, spec.framework, offsets, spec.global_shape
                )
                piece = piece._replace(spec=stored, rows=rows)
            pieces.append(piece)
    full = [piece for piece in pieces if piece.spec.size_bytes]
    return full or pieces[:1]


def _shares(spec: ArraySpec, name: str, crowd: _Crowd, members: Members) -> list[Box]:
    """What this rank stores of a box that it holds, as boxes of that box; one may be empty."""
    if not crowd.has_this:
        return [whole(spec.shape)]
    size_bytes = size_bytes_of(spec.dtype, spec.shape)
    if members.spread:
        nothing = [Box((0,) * len(spec.shape), (0, *spec.shape[1:]))]
        found = spread_of(spec.shape, size_bytes, name, crowd.nodes, members.rank, members.copies)
        return found or nothing
    here = crowd.here
    return [share_of(spec.shape, size_bytes, name, here.index(members.rank), len(here))]


def gather(recipe: Recipe, owners: Sequence[StateAdapter], arrays: list[Any]) -> list[Any] | None:
    """The arrays that the pieces are of, in their order; None if they are others than planned.

    That arrays of this rank's own still are what they were is not looked at here.
    """
    if recipe.is_plain:
        return arrays
    if _look(owners, arrays, recipe.replicas) != recipe.seen:
        return None
    found: list[Any] = []
    parts_of: dict[int, Sequence[Part] | None] = {}
    for piece in recipe.pieces:
        leaf, array, rows = piece.leaf, arrays[piece.leaf], piece.rows
        if piece.part >= 0:
            if leaf not in parts_of:
                try:
                    parts_of[leaf] = owners[leaf].parts(array, "")
                except UnsupportedState:
                    return None  # a new plan knows the path, and says which leaf it is
            parts = parts_of[leaf]
            if parts is None or piece.part >= len(parts):
                return None
            part = parts[piece.part]
            if (part.spec, part.holders) != (piece.held, piece.holders):
                return None
            array = part.array
        if rows is not None:
            empty = recipe.empty.get(leaf)
            array = owners[leaf].rows(array, *rows) if empty is None else empty
        found.append(array)
    return found
