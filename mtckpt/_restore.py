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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mtckpt import _inventory, _manifest, _state
from mtckpt._delivery import Attempt, Delivery, Loaded, Place, Within, describe
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
    from mtckpt._manifest import Record, SaveEntry, SaveName
    from mtckpt.capture.base import Engine

__all__ = ["Attempt", "Candidate", "Place", "RestorePlan", "plan_restore", "restore_from"]

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


# -- one save into live state ----------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """A restore that happened. ``record`` is of the save; ``sources`` has bytes by tier."""

    name: SaveName
    record: Record
    state: Any
    sources: dict[str, int]


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
    keys = _inventory.shard_keys(run_key, candidate.name, 0)
    reasons: list[str] = []
    loaded, usable = _open(candidate, places, inventories, keys, within, attempt.bad, reasons)
    placing, resolve = _match(loaded, state, adapters, partial=partial, rename=rename)
    delivery = Delivery(loaded, keys[0], placing.addresses, engine, within, attempt, progress)
    delivery.run(usable, reasons, last_resort=last)
    return _finish(candidate, loaded, placing, state, resolve, delivery.by_label)


def _open(
    candidate: Candidate,
    places: Mapping[str, Place],
    inventories: Mapping[str, Inventory],
    keys: tuple[str, str, str],
    within: Within,
    bad: list[tuple[str, str, str]],
    reasons: list[str],
) -> tuple[Loaded, list[Place]]:
    """The shard's description, and the places whose small files agree with it."""
    loaded: Loaded | None = None
    usable: list[Place] = []
    for label in candidate.sources:
        place = places[label]
        record = inventories[label].saves[candidate.name].records[0]
        look = functools.partial(describe, place, keys, record)
        try:
            found = within(label, look, record.shard.data_start)
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
    return Outcome(candidate.name, loaded.record, state, sources)


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
