"""Which bytes of a state this rank stores: its own, its boxes, its share of what others hold too.

Knows leaves, boxes and the ranks of this node. Does not know files. It talks to nobody: each rank
decides by the same rule from what it knows of the array alone, and together they store every byte
once for each node (``share_of``). The rank of a record is not the rank of a leaf: what is global
may come back to any rank, what is private comes back to the one that had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from xxhash import xxh3_128_hexdigest

from mtckpt._boxes import Box, share_of, whole
from mtckpt._dtypes import size_bytes_of
from mtckpt._state import ArraySpec, Part
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from mtckpt._state import Flat, StateAdapter

__all__ = ["ALONE", "Members", "Piece", "Recipe", "divide", "gather"]


@dataclass(frozen=True, slots=True)
class Members:
    """This rank, how many there are, and which of them are on this node."""

    rank: int = 0
    world_size: int = 1
    node: tuple[int, ...] = (0,)


ALONE = Members()


class Piece(NamedTuple):
    """One array of the shard: leaf ``leaf``, or the rows ``rows`` of part ``part`` of it.

    ``spec`` is of what is stored; ``holders`` and ``held`` say what the part was when the plan was
    made, and are compared at every save. ``ranks`` are those that the array is spread over, None
    where all are.
    """

    leaf: int
    spec: ArraySpec
    part: int = -1
    rows: tuple[int, int] | None = None
    held: ArraySpec | None = None
    holders: tuple[int, ...] = ()
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The pieces of a plan. One of each leaf comes first, in the order of the leaves.

    ``replicas`` are the leaves that a ``Replicated`` holds, ``agreed`` is the digest of what all
    ranks of the job have to have alike.
    """

    pieces: tuple[Piece, ...]
    replicas: dict[int, tuple[int, ...]]
    agreed: str

    @property
    def is_plain(self) -> bool:
        """Every leaf is stored as it is."""
        return all(piece.part < 0 for piece in self.pieces)


def divide(
    flat: Flat, specs: Sequence[ArraySpec], ties: dict[int, int], members: Members
) -> Recipe:
    """Decide what this rank stores of every leaf. Raises UnsupportedState as adapters do."""
    everybody = tuple(range(members.world_size))
    replicas = {leaf: ranks or everybody for leaf, ranks in flat.replicas.items()}
    if members.world_size == 1:
        replicas = {}  # there is nobody else to hold it
    firsts: list[Piece] = []
    others: list[Piece] = []
    shared: list[tuple[str, str, tuple[int, ...]]] = []
    for leaf, (owner, array, path) in enumerate(
        zip(flat.owners, flat.arrays, flat.paths, strict=True)
    ):
        parts = _parts(owner, array, path, replicas.get(leaf))
        if parts is None:
            firsts.append(Piece(leaf, specs[leaf]))
            continue
        ranks = _spread_over(parts, members)
        if ranks is None:
            spec = parts[0].spec
            shared.append((path, spec.dtype, spec.whole_shape))
        name = flat.paths[ties.get(leaf, leaf)]
        pieces = [piece._replace(ranks=ranks) for piece in _pieces_of(leaf, name, parts, members)]
        firsts.append(pieces[0])
        others += pieces[1:]
    agreed = xxh3_128_hexdigest(msgspec.json.encode(sorted(shared)))
    return Recipe((*firsts, *others), replicas, agreed)


def _parts(
    owner: StateAdapter, array: Any, path: str, ranks: tuple[int, ...] | None
) -> Sequence[Part] | None:
    """The parts of a leaf: those of a global array, or the one part of what is replicated."""
    parts = owner.parts(array, path)
    if parts is not None or ranks is None:
        return parts
    spec = owner.spec(array, path)
    held = ArraySpec(spec.dtype, spec.shape, spec.framework, (0,) * len(spec.shape), spec.shape)
    return (Part(held, array, ranks),)


def _spread_over(parts: Sequence[Part], members: Members) -> tuple[int, ...] | None:
    """The ranks that have a part in a global array; None for all of the job."""
    ranks = {members.rank}
    for part in parts:
        ranks.update(part.sharers or part.holders)
    return None if len(ranks) == members.world_size else tuple(sorted(ranks))


def _pieces_of(leaf: int, name: str, parts: Sequence[Part], members: Members) -> list[Piece]:
    """Each box once, and of those that others of this node hold as well this rank's share."""
    pieces: list[Piece] = []
    known: set[Box] = set()
    for number, part in enumerate(parts):
        spec = part.spec
        box = Box(spec.offsets or (), spec.shape)
        if box in known:
            continue
        known.add(box)
        here = [rank for rank in part.holders if rank in members.node]
        share = whole(spec.shape)
        if members.rank in here:
            size_bytes = size_bytes_of(spec.dtype, spec.shape)
            share = share_of(spec.shape, size_bytes, name, here.index(members.rank), len(here))
        rows = None
        if share != whole(spec.shape):
            rows = (share.offsets[0], share.offsets[0] + share.shape[0])
            offsets = (box.offsets[0] + rows[0], *box.offsets[1:])
            spec = ArraySpec(spec.dtype, share.shape, spec.framework, offsets, spec.global_shape)
        pieces.append(Piece(leaf, spec, number, rows, part.spec, part.holders))
    full = [piece for piece in pieces if piece.spec.size_bytes]
    return full or pieces[:1]


def gather(recipe: Recipe, owners: Sequence[StateAdapter], arrays: list[Any]) -> list[Any] | None:
    """The arrays that the pieces are of, in their order; None if they are others than planned."""
    if recipe.is_plain:
        return arrays
    found: list[Any] = []
    parts_of: dict[int, Sequence[Part] | None] = {}
    for piece in recipe.pieces:
        leaf, array = piece.leaf, arrays[piece.leaf]
        if leaf not in parts_of:
            try:
                parts_of[leaf] = _parts(owners[leaf], array, "", recipe.replicas.get(leaf))
            except UnsupportedState:
                return None  # a new plan knows the path, and says which leaf it is
        parts = parts_of[leaf]
        if piece.part < 0:
            if parts is not None:
                return None
            found.append(array)
            continue
        if parts is None or piece.part >= len(parts):
            return None
        part = parts[piece.part]
        if (part.spec, part.holders) != (piece.held, piece.holders):
            return None
        array = part.array
        if piece.rows is not None:
            array = owners[leaf].rows(array, *piece.rows)
        found.append(array)
    return found
