"""The restore pipeline: inventories -> plan -> verified bytes in host memory -> live state.

Knows how to choose a step, where each tensor's bytes come from, and in which order things may be
touched: names, shapes and types are compared and every byte is verified before the first live
byte changes. Does not know frameworks; what goes where is ``_placing``.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from mtckpt import _inventory, _manifest, _shard, _state
from mtckpt._dtypes import DTYPES
from mtckpt._placing import Placing, Stored, rename_tree, settle
from mtckpt._shard import ShardLayout, Table
from mtckpt._state import ArraySpec, StateAdapter
from mtckpt.capture.base import Engine, Move, Span
from mtckpt.capture.collector import collector_paused
from mtckpt.capture.memory import Mapping as MemoryMapping
from mtckpt.capture.memory import anonymous, map_file
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
    from mtckpt.tiers import LocalTier

__all__ = ["Candidate", "Place", "RestorePlan", "plan_restore", "restore_from"]

logger = logging.getLogger(__name__)


class Within(Protocol):
    """Runs a look into a tier in bounded time; the more bytes it is about, the longer."""

    def __call__(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A tier to read from. ``mapped``: its files may be mapped (tmpfs); others are read."""

    label: str
    tier: LocalTier
    mapped: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """One save that may be restored, and the tiers that have all of it, fastest first."""

    name: SaveName
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to try, in order, and what was passed over with the reason."""

    candidates: tuple[Candidate, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


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
    line = _manifest.newest_line(_inventory.all_incarnations(inventories))
    found: dict[SaveName, list[str]] = {}
    problems: dict[SaveName, list[str]] = {}
    metrics: dict[SaveName, dict[str, float]] = {}
    for inventory in inventories:
        for name, save in inventory.saves.items():
            metrics.setdefault(name, {}).update(save.metrics)
            if save.complete and not save.aborted:
                found.setdefault(name, []).append(inventory.tier)
            else:
                problems.setdefault(name, []).append(f"{inventory.tier}: {why_unusable(save)}")
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
    skipped = {
        f"step {name.step}": "; ".join(lines)
        for name, lines in sorted(problems.items(), reverse=True)
        if name not in found
        and (not line or _manifest.on_line(name, line))
        and (step == "latest" or name.step == step)
        and (not chosen or name.step >= chosen[0].step)
    }
    return RestorePlan(tuple(Candidate(n, tuple(found[n])) for n in chosen), skipped)


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


# -- one shard in host memory ------------------------------------------------------------------------


@dataclass(slots=True)
class _Loaded:
    """A shard's description, read from the first source whose small files are sound."""

    record: Record
    layout: ShardLayout
    table: Table
    entries: list[ArrayEntry]


class _Bytes:
    """Where each verified tensor lies: mapped tmpfs pages or staging memory."""

    def __init__(self) -> None:
        self.address: dict[int, int] = {}
        self.keep: list[Any] = []
        self.by_label: dict[str, int] = {}

    def add(self, more: _Bytes) -> None:
        """Take in what another source had."""
        self.address.update(more.address)
        self.keep += more.keep
        for label, size_bytes in more.by_label.items():
            self.by_label[label] = self.by_label.get(label, 0) + size_bytes


def _describe(place: Place, keys: tuple[str, str, str], record: Record) -> _Loaded:
    data_key, table_key, _ = keys
    prefix = bytearray(8)
    place.tier.read_into(data_key, memoryview(prefix))
    file_bytes = place.tier.stat(data_key).size_bytes
    header = bytearray(_shard.header_length(bytes(prefix), file_bytes))
    place.tier.read_into(data_key, memoryview(header))
    layout = _shard.parse_layout(bytes(header), file_bytes)
    table_size = place.tier.stat(table_key).size_bytes
    if table_size != layout.table_bytes:
        raise Damaged("digest table has another size than the shard needs", key=table_key)
    table_bytes = bytearray(table_size)
    place.tier.read_into(table_key, memoryview(table_bytes))
    if _shard.table_digest(bytes(table_bytes)) != record.shard.table_digest:
        raise Damaged("digest table is not the one the record names", key=table_key)
    table = Table.parse(memoryview(table_bytes), layout)
    entries = record.array_entries()
    names = layout.by_name()
    for entry in entries:
        if entry.same_as is None:
            tensor = names.get(stored_name(entry))
            dtype = DTYPES.get(entry.dtype)
            if (
                tensor is None
                or dtype is None
                or (
                    tensor.code != dtype.stored_code
                    or tensor.shape != dtype.stored_shape(entry.shape)
                )
            ):
                raise Damaged("record and shard header disagree", key=data_key, leaf=entry.path)
    return _Loaded(record, layout, table, entries)


def stored_name(entry: ArrayEntry) -> str:
    """The tensor's name in the file: its path, with the offsets of a box."""
    if entry.offsets is None:
        return entry.path
    return f"{entry.path}@{','.join(map(str, entry.offsets))}"


def _fetch(
    place: Place, key: str, loaded: _Loaded, wanted: Sequence[int], engine: Engine
) -> tuple[list[int], _Bytes]:
    """Bring tensors ``wanted`` (numbers in file order) in and verify them; the bad ones first.

    Runs in a thread that may be given up: it touches nothing but what it returns.
    """
    layout = loaded.layout
    out = _Bytes()
    with place.tier.lease(key) as lease:
        if lease.size_bytes != layout.size_bytes:
            raise Damaged("shard has another size", key=key, tier=place.label)
        if place.mapped:
            memory = map_file(lease.fd, lease.size_bytes, writable=False)
            # A mapping keeps the open file that it was made of, and with it the lease: these pages
            # cannot be recycled under the copy, though the descriptor is closed below.
            out.keep.append(memory)
            base = memory.address
        else:
            memory = _staged(place, key, layout, wanted)
            out.keep.append(memory)
            base = memory.address
        spans = [
            Span(t.start, t.size_bytes, t.first_chunk) for t in (layout.tensors[i] for i in wanted)
        ]
        bad = {wanted[i] for i in engine.verify(base, spans, loaded.table.digests)}
        for number, span in zip(wanted, spans, strict=True):
            if number not in bad:
                out.address[number] = base + span.start
                out.by_label[place.label] = out.by_label.get(place.label, 0) + span.size_bytes
    return sorted(bad), out


def _staged(place: Place, key: str, layout: ShardLayout, wanted: Sequence[int]) -> MemoryMapping:
    """Read the wanted part of a shard into fresh memory, at the offsets of the file."""
    memory = anonymous(layout.size_bytes)
    tensors = [layout.tensors[i] for i in wanted if layout.tensors[i].size_bytes]
    view = memory.view if memory.size_bytes else memoryview(b"")
    start = stop = 0
    for tensor in tensors:
        if tensor.start > stop + _shard.CHUNK_BYTES:
            if stop > start:
                place.tier.read_into(key, view[start:stop], start)
            start = tensor.start
        if stop <= start:
            start = tensor.start
        stop = tensor.start + tensor.size_bytes
    if stop > start:
        place.tier.read_into(key, view[start:stop], start)
    return memory


# -- one save into live state ------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """A restore that happened. ``record`` is of the save; ``bad`` what was found damaged."""

    name: SaveName
    record: Record
    state: Any
    sources: dict[str, int]
    bad: list[tuple[str, str, str]]


@collector_paused()
def restore_from(
    candidate: Candidate,
    places: Mapping[str, Place],
    inventories: Mapping[str, Inventory],
    run_key: str,
    state: Any,
    adapters: Sequence[StateAdapter],
    engine: Engine,
    within: Within,
    *,
    partial: bool,
    rename: Callable[[str], str | None] | None,
    bad: list[tuple[str, str, str]],
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Restore one save. ``bad`` collects ``(tier label, key, reason)`` of damaged copies.

    Raises:
        StateMismatch: the template differs; live state is unchanged.
        NoHealthyStep: no source, alone or together, has every byte; live state is unchanged.
    """
    keys = _inventory.shard_keys(run_key, candidate.name, 0)
    reasons: list[str] = []
    loaded, usable = _open(candidate, places, inventories, keys, within, bad, reasons)
    placing, resolve = _match(loaded, state, adapters, partial=partial, rename=rename)
    number_of = {stored_name(e): i for i, e in enumerate(loaded.entries) if e.same_as is None}
    order = {number_of[t.name]: n for n, t in enumerate(loaded.layout.tensors)}
    wanted = sorted({order[fill.index] for fill in placing.fills})
    brought = _bring(loaded, usable, keys[0], wanted, engine, within, bad, reasons)
    progress(sum(brought.by_label.values()))
    return _place(candidate, loaded, placing, resolve, brought, order, engine, bad)


def _open(
    candidate: Candidate,
    places: Mapping[str, Place],
    inventories: Mapping[str, Inventory],
    keys: tuple[str, str, str],
    within: Within,
    bad: list[tuple[str, str, str]],
    reasons: list[str],
) -> tuple[_Loaded, list[Place]]:
    """The shard's description, and the places whose small files agree with it."""
    loaded: _Loaded | None = None
    usable: list[Place] = []
    for label in candidate.sources:
        place = places[label]
        record = inventories[label].saves[candidate.name].records[0]
        describe = functools.partial(_describe, place, keys, record)
        try:
            found = within(label, describe, record.shard.data_start)
        except (FormatError, TierError) as error:
            bad.append((label, getattr(error, "key", None) or keys[0], error.what))
            reasons.append(f"{label}: {error.what}")
            continue
        if loaded is not None and found.record.shard != loaded.record.shard:
            reasons.append(f"{label}: another shard than {usable[0].label} has")
            continue
        loaded = loaded or found
        usable.append(place)
    if loaded is None:
        raise NoHealthyStep("; ".join(reasons), step=candidate.name.step)
    return loaded, usable


def _bring(
    loaded: _Loaded,
    usable: Sequence[Place],
    key: str,
    wanted: Sequence[int],
    engine: Engine,
    within: Within,
    bad: list[tuple[str, str, str]],
    reasons: list[str],
) -> _Bytes:
    """Every wanted tensor in host memory, verified; what one place has damaged, the next gives."""
    brought = _Bytes()
    for place in usable:
        if not wanted:
            break
        fetch = functools.partial(_fetch, place, key, loaded, wanted, engine)
        try:
            left, found = within(place.label, fetch, loaded.layout.size_bytes)
        except (FormatError, TierError) as error:
            reasons.append(f"{place.label}: {error.what}")
            bad.append((place.label, key, error.what))
            continue
        brought.add(found)
        if left:
            names = ", ".join(loaded.layout.tensors[i].name[:80] for i in left[:3])
            reason = f"{len(left)} tensors differ from their digests ({names})"
            reasons.append(f"{place.label}: {reason}")
            bad.append((place.label, key, reason))
        wanted = left
    if wanted:
        raise NoHealthyStep("; ".join(reasons), step=loaded.record.step)
    return brought


def _match(
    loaded: _Loaded,
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
    stored = [
        Stored(
            entry.path,
            ArraySpec(entry.dtype, entry.shape, entry.framework, entry.offsets, entry.global_shape),
            index if entry.same_as is None else entry.same_as,
        )
        for index, entry in enumerate(loaded.entries)
    ]
    if rename is not None:
        root, stored = rename_tree(root, stored, [], rename)
    placing = Placing(stored, plain, adapters, partial=partial)
    resolved = placing.match(state, root)
    placing.raise_diff(record.step)
    return placing, resolved


def _place(
    candidate: Candidate,
    loaded: _Loaded,
    placing: Placing,
    resolved: Any,
    brought: _Bytes,
    order: Mapping[int, int],
    engine: Engine,
    bad: list[tuple[str, str, str]],
) -> Outcome:
    """The only part that changes live state: every byte is here and verified."""
    engine.copy(
        [
            Move(brought.address[order[fill.index]], fill.address, fill.size_bytes)
            for fill in placing.fills
        ]
    )
    try:
        for action in placing.finish:
            action()
        state = settle(resolved)
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
    return Outcome(candidate.name, loaded.record, state, brought.by_label, bad)


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
