"""The save pipeline: state -> plan -> slot, and the files of a captured shard.

Knows how a state becomes the bytes of a shard in a slot that the agent granted. Does not know
when a save is due or what becomes of it afterwards. A capture that fails leaves the slot without
its generation word, which makes it garbage; the previous save is in another slot.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from xxhash import xxh3_128

from mtckpt import _pieces, _shard, _state
from mtckpt._manifest import ArrayEntry
from mtckpt._pieces import ALONE, Members, Recipe
from mtckpt._probe import tier_label
from mtckpt.capture.base import Engine, Span, span_of
from mtckpt.capture.collector import collector_paused
from mtckpt.capture.memory import Mapping as MemoryMapping
from mtckpt.capture.memory import map_file
from mtckpt.errors import CaptureFailed, CheckpointError, TierUnavailable, UnsupportedState

if TYPE_CHECKING:
    import struct

    from mtckpt._shard import ShardLayout
    from mtckpt._state import ArraySpec, Node, StateAdapter
    from mtckpt.agent.protocol import SlotGrant

    _Groups = list[tuple[StateAdapter, list[int] | None]]

__all__ = ["Captured", "HeldSlot", "Identity", "Plan", "Planner", "SlotRing"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which save this is."""

    run: str
    step: int
    incarnation: int
    incarnation_id: str
    save_id: str
    rank: int = 0
    world_size: int = 1


@dataclass(slots=True)
class Plan:
    """Where every leaf of one structure lies in the shard. Valid while ``fingerprint`` holds.

    ``owners`` and ``paths`` go with the leaves, ``ties`` too: the leaf whose bytes a leaf has. All
    else is about the pieces of ``recipe``: ``stored`` has the index of the piece behind each tensor
    of the file, in file order. ``sources`` are where the pieces lay, ``in_order`` those in it.
    """

    root: Node
    layout: ShardLayout
    owners: list[StateAdapter]
    paths: list[str]
    ties: dict[int, int]
    recipe: Recipe
    groups: _Groups
    stored: list[int]
    spans: list[Span]
    same_as: dict[int, int]
    fingerprint: list[object]
    arrays_json: msgspec.Raw
    structure_json: msgspec.Raw
    digest: str
    roots: struct.Struct
    sources: list[int]
    in_order: list[int]

    def lie_at(self, sources: list[int]) -> None:
        """Note where the pieces lie."""
        self.sources, self.in_order = sources, [sources[i] for i in self.stored]


@dataclass(slots=True)
class Captured:
    """The leaves of one state, ready to be copied.

    ``keep`` holds the arrays and host copies alive: many a ``state_dict()`` makes tensors anew, and
    an address says nothing about who still owns it.
    """

    plan: Plan
    sources: list[int]
    plain: list[Any]
    keep: object


class Planner:
    """Turns states into plans, and keeps the last one for as long as it fits exactly.

    ``members`` may be set anew, before the first state is seen.
    """

    def __init__(self, members: Members = ALONE) -> None:
        self.members = members
        self._plan: Plan | None = None

    @collector_paused()
    def prepare(self, state: Any, adapters: Sequence[StateAdapter]) -> Captured:
        """Take ``state`` apart by the kept plan, or by a new one if anything about it changed.

        Raises UnsupportedState with the path of what cannot be saved.
        """
        plan = self._plan
        if plan is not None:
            arrays: list[Any] = []
            plain: list[Any] = []
            if _state.refill(plan.root, state, adapters, arrays, plain):
                captured = self._by_plan(plan, arrays, plain)
                if captured is not None:
                    return captured
        return self._by_new_plan(state, adapters)

    def _by_plan(self, plan: Plan, leaves: list[Any], plain: list[Any]) -> Captured | None:
        arrays = _pieces.gather(plan.recipe, plan.owners, leaves)
        if arrays is None:
            return None
        fingerprint = _fingerprint(plan.groups, arrays)
        if fingerprint != plan.fingerprint:
            return None
        try:
            addresses, keep = _addresses(plan.groups, arrays, fingerprint)
        except UnsupportedState:
            return None  # a new plan knows the paths, and says which leaf it is
        # What other ranks store for this one too has no address here, and may be tied differently.
        unknown = not plan.recipe.is_plain
        if addresses != plan.sources or _has_copies(keep):
            # Other memory than last time: the same leaves may be tied differently now. Where a leaf
            # was copied, the same address proves nothing: a copy that was freed left it behind.
            unknown = True
        if unknown:
            if plan.ties != _ties_of(plan.recipe, addresses, keep, plan.owners, leaves, plan.paths):
                return None
            plan.lie_at(addresses)
        return Captured(plan, plan.in_order, plain, (keep, arrays))

    def _by_new_plan(self, state: Any, adapters: Sequence[StateAdapter]) -> Captured:
        for adapter in adapters:
            adapter.survey(state)
        flat = _state.flatten(state, adapters)
        self._plan, keep = make_plan(flat, self.members)
        return Captured(self._plan, self._plan.in_order, flat.plain, keep)


def make_plan(flat: _state.Flat, members: Members) -> tuple[Plan, object]:
    """Lay out the pieces of ``flat``, tied leaves once, under the first path.

    Also gives what has to be kept for as long as the pieces are read: arrays and copies of them.
    """
    specs, seen = _specs(flat)
    recipe = _pieces.divide(flat, specs, members)
    arrays = _pieces.gather(recipe, flat.owners, flat.arrays)
    assert arrays is not None  # nothing has changed since
    groups = _groups([flat.owners[piece.leaf] for piece in recipe.pieces])
    paths = [flat.paths[piece.leaf] for piece in recipe.pieces]
    known = recipe.is_plain and None not in seen
    fingerprint = seen if known else _fingerprint(groups, arrays)
    addresses, keep = _addresses(groups, arrays, fingerprint, paths)
    ties = _ties_of(recipe, addresses, keep, flat.owners, flat.arrays, flat.paths)
    same_as = _same_as(recipe, ties)
    entries = [
        ArrayEntry(path, *piece.spec, same_as.get(i), piece.ranks, piece.alike)
        for i, (path, piece) in enumerate(zip(paths, recipe.pieces, strict=True))
    ]
    names = [entry.stored_name for entry in entries]
    own = [i for i in range(len(names)) if i not in same_as]
    layout = _shard.plan_layout(
        (names[i], recipe.pieces[i].spec.dtype, recipe.pieces[i].spec.shape) for i in own
    )
    index_of = {names[i]: i for i in own}
    arrays_json = msgspec.json.encode(entries)
    plan = Plan(
        root=flat.root,
        layout=layout,
        owners=flat.owners,
        paths=flat.paths,
        ties=ties,
        recipe=recipe,
        groups=groups,
        stored=[index_of[tensor.name] for tensor in layout.tensors],
        spans=[span_of(tensor[3:6]) for tensor in layout.tensors],  # start, size and first chunk
        same_as=same_as,
        fingerprint=fingerprint,
        arrays_json=msgspec.Raw(arrays_json),
        structure_json=msgspec.Raw(msgspec.json.encode(_state.node_to_json(flat.root))),
        digest=recipe.agreed if members.world_size > 1 else xxh3_128(arrays_json).hexdigest(),
        roots=_shard.root_pieces(layout),
        sources=[],
        in_order=[],
    )
    plan.lie_at(addresses)
    return plan, (keep, arrays)


def _specs(flat: _state.Flat) -> tuple[list[ArraySpec], list[object]]:
    """Of all leaves, and by adapter the fingerprints of its own where they came with that."""
    specs: dict[int, ArraySpec] = {}
    seen = []
    for adapter, indexes in _groups(flat.owners):
        these = range(len(flat.arrays)) if indexes is None else indexes
        arrays = flat.arrays if indexes is None else [flat.arrays[i] for i in these]
        found, fingerprint = adapter.specs(arrays, [flat.paths[i] for i in these])
        specs.update(zip(these, found, strict=True))
        seen.append(fingerprint)
    return [specs[i] for i in range(len(specs))], seen


def _same_as(recipe: Recipe, ties: dict[int, int]) -> dict[int, int]:
    """Piece -> the piece whose bytes it has: the same part of the leaf that its own is tied to.

    Of two tied leaves that are small this rank may store one and another rank the other.
    """
    if recipe.is_plain or not ties:
        return dict(ties)
    pieces_of: dict[int, dict[object, int]] = {}
    for i, piece in enumerate(recipe.pieces):
        what = piece.part, piece.spec.offsets, piece.spec.shape
        pieces_of.setdefault(piece.leaf, {})[what] = i
    return {
        piece: twin
        for leaf, first in ties.items()
        for what, piece in pieces_of[leaf].items()
        if (twin := pieces_of[first].get(what)) is not None
    }


def _groups(owners: Sequence[StateAdapter]) -> _Groups:
    """The pieces of each adapter; None stands for all of them, the common case."""
    distinct = list(dict.fromkeys(map(id, owners)))
    if len(distinct) <= 1:
        return [(owners[0], None)] if owners else []
    by_id = {id(owner): owner for owner in owners}
    return [
        (by_id[key], [i for i, owner in enumerate(owners) if id(owner) == key]) for key in distinct
    ]


def _fingerprint(groups: _Groups, arrays: list[Any]) -> list[object]:
    return [
        adapter.fingerprint(arrays if indexes is None else [arrays[i] for i in indexes])
        for adapter, indexes in groups
    ]


def _addresses(
    groups: _Groups,
    arrays: list[Any],
    fingerprint: Sequence[object],
    paths: Sequence[str] = (),
) -> tuple[list[int], object]:
    """Where the bytes lie; ``fingerprint`` is that of these very arrays."""
    addresses = [0] * len(arrays)
    kept = []
    for (adapter, indexes), known in zip(groups, fingerprint, strict=True):
        if indexes is None:
            return adapter.addresses(arrays, paths, known)
        own_paths = [paths[i] for i in indexes] if paths else ()
        found, keep = adapter.addresses([arrays[i] for i in indexes], own_paths, known)
        kept.append(keep)
        for index, address in zip(indexes, found, strict=True):
            addresses[index] = address
    return addresses, kept


def _has_copies(keep: object) -> bool:
    return isinstance(keep, (list, tuple)) and any(
        _has_copies(item) if isinstance(item, (list, tuple)) else True for item in keep
    )


def _ties_of(
    recipe: Recipe, addresses: Sequence[int], keep: object, owners: Sequence[StateAdapter],
    leaves: Sequence[Any], paths: Sequence[str],
) -> dict[int, int]:  # fmt: skip
    """See ``_ties``. None where each leaf is read where it lies itself, and none where another
    does: no two can be one."""
    if recipe.is_plain and not _has_copies(keep) and len(set(addresses)) == len(addresses):
        return {}
    return _ties(owners, leaves, paths, recipe.replicas)


def _ties(
    owners: Sequence[StateAdapter],
    arrays: Sequence[Any],
    paths: Sequence[str],
    replicas: Mapping[int, tuple[int, ...]],
) -> dict[int, int]:
    """Leaf -> the leaf whose bytes it has: the first path in sorted order of those tied.

    One that is replicated is divided among its ranks, so it is tied to those of the same ranks.
    """
    firsts: dict[object, int] = {}
    groups: dict[int, list[int]] = {}
    for i, (owner, array) in enumerate(zip(owners, arrays, strict=True)):
        identity = owner.identity(array)
        if identity is not None:
            first = firsts.setdefault((identity, replicas[i]) if i in replicas else identity, i)
            if first != i:
                groups.setdefault(first, [first]).append(i)
    ties = {}
    for group in groups.values():
        chosen = min(group, key=lambda i: paths[i])
        ties.update({i: chosen for i in group if i != chosen})
    return ties


# -- slots ---------------------------------------------------------------------------------------


class HeldSlot:
    """A slot of the agent's, mapped into this process, its pages faulted in."""

    def __init__(self, grant: SlotGrant, layout: ShardLayout) -> None:
        self.grant = grant
        self.in_memory = tier_label(grant.data_path) == "ram"
        self.data = _map(grant.data_path, grant.inode, layout.size_bytes)
        self.table = _map(grant.table_path, None, layout.table_bytes)
        self.data.populate()
        self.table.populate()


Within = Callable[..., Any]  # what it is given, done, in bounded time by bytes that it reads


def _at_once(work: Callable[[], Any], size_bytes: int = 0) -> Any:
    return work()


_left_mapped: list[HeldSlot] = []  # until the process ends


def _unmap(slots: dict[int, HeldSlot], engine: Engine) -> None:
    for slot in slots.values():
        if not engine.unregister(slot.data.address):
            _left_mapped.append(slot)  # noqa: PERF401 - one after the other
    slots.clear()


def _let_go(slots: dict[int, HeldSlot], engine: Engine, pid: int) -> None:
    """All that devices hold for a run that is over. In a fork that is all its parent's."""
    if pid == os.getpid():
        _unmap(slots, engine)
        engine.close()


class SlotRing:
    """The slots this process has mapped, by inode; an inode keeps its mapping over recycling.

    What they lie on may be a disk that hangs: it is looked at ``within`` bounded time.
    """

    def __init__(self, engine: Engine, within: Within = _at_once) -> None:
        self._engine = engine
        self._within = within
        self._slots: dict[int, HeldSlot] = {}
        self._size: tuple[int, int] = (0, 0)
        self._withheld: dict[str, int] = {}
        # Dropped with its Checkpointer that nobody closed: devices are told before it is unmapped.
        self._dropped = weakref.finalize(self, _let_go, self._slots, engine, os.getpid())
        self._dropped.atexit = False

    def held(self) -> dict[str, int]:
        """Slot id -> inode, for an agent that has started anew."""
        slots = list(self._slots.items())  # at once: another thread may be mapping a slot
        return {**{slot.grant.slot_id: inode for inode, slot in slots}, **self._withheld}

    def withhold(self, grant: SlotGrant) -> bool:
        """Never use a slot again that a device may still write to, nor one that a disk may still
        change, before it has; False if none does."""
        if grant.slot_id in self._withheld:
            return True
        slot = self._slots.get(grant.inode)
        if slot is None or not self._engine.holds(slot.data.address):
            return False
        self._withheld[grant.slot_id] = grant.inode
        return True

    def withheld(self) -> list[str]:
        """Ids of the slots that are not to be granted again while this process lives."""
        return list(self._withheld)

    def write(self, grant: SlotGrant, work: Callable[[], None]) -> None:
        """Do work on the files of a slot. One whose disk does not answer is not used until it has:
        what is left behind may still change it. Raises TierUnavailable, and what the work does."""
        slot = self._slots.get(grant.inode)
        if slot is None or slot.in_memory:
            work()
            return

        def tried() -> None:
            try:
                work()
            finally:
                self._withheld.pop(grant.slot_id, None)

        self._withheld[grant.slot_id] = grant.inode
        self._within(tried)

    def adopt(self, grant: SlotGrant, layout: ShardLayout) -> HeldSlot:
        """Map a granted slot, or find it mapped already; its pages are faulted in. Raises
        TierUnavailable where its disk does not answer."""
        size = (layout.size_bytes, layout.table_bytes)
        if size != self._size:
            self.clear()
            self._size = size
        slot = self._slots.get(grant.inode)
        if slot is None:
            held = functools.partial(HeldSlot, grant, layout)
            slot = self._slots[grant.inode] = self._within(held, layout.size_bytes)
        self._engine.register(slot.data.address, slot.data.size_bytes)
        slot.grant = grant
        return slot

    def has(self, size: tuple[int, int]) -> bool:
        """True if a slot of these sizes (shard, table) is mapped."""
        return bool(self._slots) and self._size == size

    def fits(self, grant: SlotGrant, layout: ShardLayout) -> bool:
        """True if a slot that was granted ahead of time is of the size needed now."""
        return self._size == (layout.size_bytes, layout.table_bytes) and grant.inode in self._slots

    def close(self) -> None:
        """Unmap all, and give back what devices hold for the engine. Idempotent."""
        self._dropped()

    def clear(self) -> None:
        """Unmap all of them, but for what a device that is stuck may still write to."""
        _unmap(self._slots, self._engine)


def _map(path: str, inode: int | None, size_bytes: int) -> MemoryMapping:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_size != size_bytes or (inode is not None and found.st_ino != inode):
            raise CaptureFailed(
                "the slot on disk is not the one the agent granted",
                stage="captured",
                tier="ram",
                path=path,
                state="nothing was written",
            )
        return map_file(fd, size_bytes, writable=True)
    except MemoryError as error:
        raise CaptureFailed(
            f"too little memory for a slot: {error}",
            stage="captured",
            tier="ram",
            needed_bytes=size_bytes,
        ) from error
    finally:
        os.close(fd)


def raise_capture_error(step: int, error: Exception) -> NoReturn:
    """Raise what a failed capture is: an error of ours as it is, one of somebody else's wrapped."""
    if type(error) is CaptureFailed and "step" not in error.details:
        # Where a state is taken apart nobody knows for which step.
        raise CaptureFailed(
            error.what, state=error.state, actions=error.actions, **error.details, step=step
        ) from error.__cause__
    if isinstance(error, CheckpointError):
        raise error
    raise CaptureFailed(
        f"the state of step {step} could not be read: {type(error).__name__}: {error}",
        stage="captured",
        step=step,
    ) from error


def why_called_off(step: int, grant: SlotGrant, error: Exception) -> str:
    """Why a failed capture costs one save and is no error: its slot does not answer, or was taken
    away, by whoever empties memory, or moves slots to a disk. Raises any other one."""
    if isinstance(error, TierUnavailable):
        return error.what
    cause = error.__cause__ if isinstance(error, CheckpointError) else error
    there = os.path.dirname(grant.data_path)
    if not isinstance(cause, FileNotFoundError) or not str(cause.filename).startswith(there):
        raise_capture_error(step, error)
    return "its place in memory was taken away"


def is_producer(state: Any) -> bool:
    """A callable that makes the state; a module is callable too, and is state itself."""
    return callable(state) and not hasattr(state, "state_dict") and not isinstance(state, Mapping)
