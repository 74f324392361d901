"""The restore pipeline: inventories -> plan -> verified bytes in host memory -> live state.

Knows how to choose a step, where each tensor's bytes come from, and in which order things may be
touched: names, shapes and types are compared before the first live byte changes, and no byte
reaches live state that was not verified. Does not know frameworks; what goes where is ``_placing``.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from mtckpt import _inventory, _manifest, _state
from mtckpt._assembly import Assembly, Stores, assemble
from mtckpt._delivery import Attempt, Delivery, Loaded, Place, Within, describe, whole_wants
from mtckpt._placing import Placing, Stored, rename_tree, settle
from mtckpt._state import ArraySpec, StateAdapter
from mtckpt.capture.collector import collector_paused
from mtckpt.errors import (
    CheckpointError,
    Damaged,
    FormatError,
    NoHealthyStep,
    RestoreFailed,
    StateMismatch,
    StepNotFound,
    TierError,
)

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import ArrayEntry, Record, SaveEntry, SaveName
    from mtckpt.capture.base import Engine

__all__ = [
    "Attempt",
    "Candidate",
    "Place",
    "RestorePlan",
    "Scope",
    "plan_restore",
    "restore_from",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One save that may be restored, and the tiers that have all of it, fastest first.

    ``fetched``: the first has it from the last, a store, as of just now.
    """

    name: SaveName
    sources: tuple[str, ...]
    fetched: bool = False


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to try, in order, and what was passed over with the reason.

    ``lost``: something was passed over that had been a step, or may have been.
    """

    candidates: tuple[Candidate, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False


def plan_restore(
    inventories: Sequence[Inventory],
    step: int | Literal["latest", "best"],
    *,
    best: Callable[[Mapping[SaveName, Mapping[str, float]]], SaveName | None] | None = None,
) -> RestorePlan:
    """Decide which saves to try, newest first, from what the tiers hold. Pure.

    ``inventories`` come fastest first. Only saves on the incarnation line count for "latest" and
    "best"; a number takes the save of that step on the line, else of the newest incarnation.
    Raises StepNotFound for a number that no tier has.
    """
    line = _inventory.incarnation_line(inventories)
    found: dict[SaveName, list[str]] = {}
    problems: dict[SaveName, list[str]] = {}
    metrics: dict[SaveName, dict[str, float]] = {}
    lost: set[SaveName] = set()
    for inventory in inventories:
        for name, save in inventory.saves.items():
            metrics.setdefault(name, {}).update(save.metrics)
            if save.complete and not save.aborted:
                found.setdefault(name, []).append(inventory.tier)
            else:
                problems.setdefault(name, []).append(f"{inventory.tier}: {why_unusable(save)}")
                if not save.unfinished:
                    lost.add(name)
    names = sorted(found, key=lambda name: (name.step, name.incarnation), reverse=True)
    counted = [name for name in names if not line or _manifest.on_line(name, line)]
    if isinstance(step, int):
        chosen = [n for n in counted if n.step == step] or [n for n in names if n.step == step]
        if not chosen and not any(name.step == step for name in problems):
            known = sorted({name.step for name in names})
            raise StepNotFound(
                f"no tier has step {step}",
                step=step,
                state="live state unchanged",
                actions=(f"steps that are there: {known[-20:]}",),
            )
    elif step == "best":
        pick = best({name: metrics[name] for name in counted}) if best else None
        chosen = [pick] if pick is not None else []
        if not chosen and counted:
            raise StepNotFound(
                "no step has the metric that KeepBest names",
                step="best",
                state="live state unchanged",
                actions=("give metrics to save() or report(), and KeepBest to a tier's keep=",),
            )
    else:
        chosen = counted
    passed_over = [
        name
        for name in sorted(problems, reverse=True)
        if name not in found
        and (not line or _manifest.on_line(name, line))
        and (step == "latest" or name.step == step)
        and (not chosen or name.step >= chosen[0].step)
    ]
    return RestorePlan(
        tuple(Candidate(n, tuple(found[n])) for n in chosen),
        {f"step {name.step}": "; ".join(problems[name]) for name in passed_over},
        not lost.isdisjoint(passed_over),
    )


def why_unusable(save: SaveEntry) -> str:
    """One line on a save that is not complete."""
    if save.aborted:
        return f"called off: {save.aborted}"
    if save.problems:
        return save.problems[0]
    if not save.records:
        return "no record"
    wanted = next(iter(save.records.values())).world_size
    lacking = [rank for rank in range(wanted) if rank not in save.records]
    return f"records of ranks {lacking[:8]} are missing"


# -- one save into live state ----------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """A restore that happened. ``record`` is of the save; ``sources`` has bytes by tier.

    ``replaced``: some of ``state`` is new, and only there.
    ``every`` is the automatic interval that the save's rank 0 carries on.
    """

    name: SaveName
    record: Record
    state: Any
    sources: dict[str, int]
    replaced: bool
    every: int = 0


class Together(Protocol):
    """What the ranks of a job do at the same time: it succeeds on all of them or on none.

    Entered with the name of a stage; leaving it waits for all ranks. An error of this rank is
    raised as it is, one of another rank names that rank.
    """

    def __call__(self, stage: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Scope:
    """What a restore is about and how it reads: the same for every save that it tries.

    ``rank`` is this process's; ``together`` joins it with the others.
    """

    run_key: str
    places: Mapping[str, Place]
    inventories: Mapping[str, Inventory]
    adapters: Sequence[StateAdapter]
    engine: Engine
    within: Within
    rank: int = 0
    together: Together = lambda _: nullcontext()


@collector_paused()
def restore_from(
    candidate: Candidate,
    scope: Scope,
    state: Any,
    *,
    partial: bool,
    rename: Callable[[str], str | None] | None,
    attempt: Attempt,
    last: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Restore one save. ``last``: there is no other to try after it.

    Raises:
        StateMismatch: the template differs; nothing of this save was placed.
        NoHealthyStep: no source, alone or together, has every byte; ``attempt.touched`` says
            whether live state is as it was.
        RestoreFailed: live state is undefined.
    """
    with scope.together("match"):
        shards = _Shards(candidate, scope, attempt.bad)
        loaded = shards.open(shards.base)
        placing, resolve = _match(loaded, state, scope.adapters, partial=partial, rename=rename)
        wants, repeats = whole_wants(loaded, placing.addresses)
        parts = _join(placing, shards)
        parts[0].wants[shards.base] = wants + parts[0].wants.get(shards.base, [])
    fetching = _Fetching(scope, shards, attempt, progress)
    with scope.together("fetch"):
        if last and sum(len(part.wants) for part in parts) > 1:
            # One shard after the other is placed: that the last of them is sound is seen first.
            for part in parts:
                fetching.fetch(part, last=True, check_only=True)
        while len(parts) > 1:  # this one's scratch memory goes before the next needs some
            fetching.fetch(parts[0], last=last)
            fetching.place(parts.pop(0))
        fetching.fetch(parts[0], last=last)
    with scope.together("place"):
        fetching.place(parts.pop())
        attempt.touched |= bool(repeats)
        scope.engine.copy(repeats)
        outcome = _finish(candidate, loaded, placing, state, resolve, fetching.sources)
        outcome.every = shards.first_record.every
        return outcome


class _Fetching:
    """What one save's shards have delivered so far; ``sources`` has bytes by tier."""

    def __init__(
        self, scope: Scope, shards: _Shards, attempt: Attempt, progress: Callable[[int], None]
    ) -> None:
        self.sources: dict[str, int] = {}
        self._scope = scope
        self._shards = shards
        self._attempt = attempt
        self._progress = progress
        self._deliveries: list[Delivery] = []
        self._before_bytes = 0

    def fetch(self, part: Assembly, *, last: bool, check_only: bool = False) -> None:
        """Get every byte of a part here. Raises NoHealthyStep; see ``Delivery.fetch``."""
        shards = self._shards
        for rank, wants in part.wants.items():
            told = functools.partial(self._told, self._before_bytes)
            delivery = Delivery(
                shards.open(rank), shards.keys(rank)[0], wants, self._scope.engine,
                self._scope.within, self._attempt, told,
            )  # fmt: skip
            delivery.fetch(
                shards.usable[rank], shards.reasons, last_resort=last, check_only=check_only
            )
            if not check_only:
                self._deliveries.append(delivery)
                self._before_bytes += sum(delivery.by_label.values())

    def _told(self, before_bytes: int, size_bytes: int) -> None:
        self._progress(before_bytes + size_bytes)

    def place(self, part: Assembly) -> None:
        """Move what was fetched to where it is wanted."""
        for delivery in self._deliveries:
            delivery.finish()
            for label, size_bytes in delivery.by_label.items():
                self.sources[label] = self.sources.get(label, 0) + size_bytes
        self._deliveries = []
        self._attempt.touched |= bool(part.moves)
        self._scope.engine.copy(part.moves)


def _join(placing: Placing, shards: _Shards) -> list[Assembly]:
    """What of which shards the wanted boxes are made of; nothing is looked at where none is."""
    if not placing.boxes:
        return [Assembly()]
    stores = Stores(shards.entries(), shards.base)
    return assemble(placing.boxes, shards.base, stores, shards.open)


class _Shards:
    """The shards of one save, opened when they are needed.

    ``base`` is the rank whose private state this one takes: its own where the save has one, and
    else the one that ``rank`` is modulo the number of ranks that saved. ``usable`` has the places
    whose small files agree with the description, by rank.
    """

    def __init__(self, candidate: Candidate, scope: Scope, bad: list[tuple[str, str, str]]) -> None:
        self._candidate = candidate
        self._scope = scope
        self._bad = bad
        self._loaded: dict[int, Loaded] = {}
        self.usable: dict[int, list[Place]] = {}
        self.reasons: list[str] = []
        self._records = {
            label: scope.inventories[label].saves[candidate.name].records
            for label in candidate.sources
        }
        self.first_record = self._records[candidate.sources[0]][0]
        world_size = len(self._records[candidate.sources[0]])
        self.base = scope.rank % world_size
        if scope.rank >= world_size > 1:
            logger.warning(
                "step %d has %d ranks: rank %d takes the private state of rank %d",
                candidate.name.step, world_size, scope.rank, self.base,
            )  # fmt: skip

    def keys(self, rank: int) -> tuple[str, str, str]:
        return _inventory.shard_keys(self._scope.run_key, self._candidate.name, rank)

    def entries(self) -> dict[int, Sequence[ArrayEntry]]:
        """What every rank has, from the records of the first tier."""
        records = self._records[self._candidate.sources[0]]
        return {rank: record.array_entries() for rank, record in records.items()}

    def open(self, rank: int) -> Loaded:
        """A shard's description. Raises NoHealthyStep where no place has a sound one."""
        loaded = self._loaded.get(rank)
        if loaded is not None:
            return loaded
        keys, usable = self.keys(rank), self.usable.setdefault(rank, [])
        for label in self._candidate.sources:
            place, record = self._scope.places[label], self._records[label][rank]
            look = functools.partial(describe, place, keys, record)
            try:
                found: Loaded = self._scope.within(label, look, record.shard.data_start)
            except (FormatError, TierError) as error:
                self._bad.append((label, getattr(error, "key", None) or keys[0], error.what))
                self.reasons.append(f"{label}: {error.what}")
                continue
            if loaded is not None and found.record.shard != loaded.record.shard:
                self.reasons.append(f"{label}: another shard than {usable[0].label} has")
                continue
            loaded = loaded or found
            usable.append(place)
        if loaded is None:
            raise NoHealthyStep("; ".join(self.reasons), step=self._candidate.name.step)
        self._loaded[rank] = loaded
        return loaded


def _match(
    loaded: Loaded,
    state: Any,
    adapters: Sequence[StateAdapter],
    *,
    partial: bool,
    rename: Callable[[str], str | None] | None,
) -> tuple[Placing, Any]:
    record = loaded.record
    try:
        plain = [_state.decode_plain(v) for v in msgspec.json.decode(record.plain, type=list[Any])]
        tree = msgspec.json.decode(record.structure)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"record does not parse: {error}", step=record.step) from error
    root = _state.node_from_json(tree, len(loaded.entries), len(plain))
    stored = _stored(loaded.entries)
    if rename is not None:
        root, stored = rename_tree(root, stored, [], rename)
    placing = Placing(stored, plain, adapters, partial=partial)
    resolved = placing.match(state, root)
    placing.raise_diff(record.step)
    return placing, resolved


# From its fields in order: calling the class takes three times as long.
_stored_of: Callable[[tuple[str, ArraySpec, int]], Stored] = functools.partial(
    tuple.__new__, Stored
)


def _stored(entries: Sequence[ArrayEntry]) -> list[Stored]:
    """The arrays of a record; those of one type and shape share a spec."""
    specs: dict[tuple[Any, ...], ArraySpec] = {}
    stored = []
    for index, entry in enumerate(entries):
        kind = entry.dtype, entry.shape, entry.framework, entry.offsets, entry.global_shape
        spec = specs.get(kind)
        if spec is None:
            spec = specs[kind] = ArraySpec(*kind)
        bytes_of = index if entry.same_as is None else entry.same_as
        stored.append(_stored_of((entry.path, spec, bytes_of)))
    return stored


def _finish(
    candidate: Candidate,
    loaded: Loaded,
    placing: Placing,
    given: Any,
    resolved: Any,
    sources: dict[str, int],
) -> Outcome:
    """Every byte is in its place: the rest is the objects' own work."""
    try:
        for action in placing.finish:
            action()
        state = settle(resolved) if resolved is not given else given
    except StateMismatch:
        raise
    except Exception as error:
        # Whatever a user's load_state_dict raises: live state is part old, part new by now.
        raise RestoreFailed(
            f"load_state_dict failed: {type(error).__name__}: {error}",
            step=candidate.name.step,
            live_state="undefined",
            state="live state is undefined",
        ) from error
    if candidate.fetched:
        sources = {candidate.sources[-1]: sum(sources.values())}
    return Outcome(candidate.name, loaded.record, state, sources, placing.replaced)


def scan_places(
    places: Iterable[Place], run_key: str, within: Within
) -> tuple[dict[str, Inventory], dict[str, str]]:
    """Every place's inventory, and the places that did not answer with the reason."""
    inventories: dict[str, Inventory] = {}
    silent: dict[str, str] = {}
    for place in places:
        started_s = time.monotonic()
        try:
            inventories[place.label] = within(
                place.label,
                functools.partial(_inventory.scan, place.tier, run_key, label=place.label),
            )
        except CheckpointError as error:
            silent[place.label] = error.what
            logger.warning(
                "tier %s did not answer after %.1f s: %s",
                place.label,
                time.monotonic() - started_s,
                error.what,
            )
    return inventories, silent
