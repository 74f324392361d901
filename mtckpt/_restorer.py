"""One restore: look into every tier, choose a step, try its sources, fall back, say what happened.

Knows what an unanswered or damaged tier means for the answer. The bytes are moved in ``_restore``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mtckpt import _foreign, _inventory, _restore, _retention, errors
from mtckpt._choice import Candidate, RestorePlan, line_below, plan_restore
from mtckpt._copies import Shards
from mtckpt._gathering import Gathered, gather, meet_again, report_damage
from mtckpt._handle import Restored, stage_of_tier
from mtckpt._progress import progress
from mtckpt._schedule import Disk
from mtckpt.adapters import active_adapters
from mtckpt.errors import (
    CheckpointError,
    FormatError,
    NoHealthyStep,
    RestoreFailed,
    RestoreUnavailable,
    StateMismatch,
    StepNotFound,
)

if TYPE_CHECKING:
    from mtckpt._manifest import Record
    from mtckpt._run import Run
    from mtckpt.capture.base import Engine

__all__ = ["go_on", "go_on_below", "records_of", "restore"]

logger = logging.getLogger(__name__)


def restore(
    run: Run,
    engine: Engine,
    state: Any,
    step: int | Literal["latest", "best"],
    source: str | os.PathLike[str] | None,
    partial: bool,
    rename: Callable[[str], str | None] | None,
    *,
    looks_again: bool = False,
) -> Restored:
    """See ``Checkpointer.restore``. ``looks_again``: somebody was silent at the first look."""
    with run.together("look", _elsewhere):
        places = run.places()
        other = None if source is None else run.source(source, places)
    gathered = gather(run, step, places, other)
    if not looks_again:
        _warn_of_new_disks(run, gathered)
    try:
        restored = _restore_newest(
            run, gathered, engine, state, step, source, partial, rename, is_last=looks_again
        )
    finally:
        gathered.close()
    if restored is None:
        meet_again(run)
        return restore(run, engine, state, step, source, partial, rename, looks_again=True)
    return restored


def _restore_newest(
    run: Run,
    gathered: Gathered,
    engine: Engine,
    state: Any,
    step: int | Literal["latest", "best"],
    source: str | os.PathLike[str] | None,
    partial: bool,
    rename: Callable[[str], str | None] | None,
    *,
    is_last: bool,
) -> Restored | None:
    """Try one save after the other, newest first.

    None where one could not be read because somebody did not answer, who may at another look: an
    agent that was killed is soon replaced, and starting from an older step gives up the newer ones
    for good. ``is_last``: there is no other look.
    """
    plan = _plan(run, gathered, step)
    skipped = {**plan.skipped, **_mute(gathered.absent)}
    candidates = plan.candidates
    if not candidates and source is not None:
        raise _no_source(gathered, source)
    if not candidates:
        _warn_of_foreign(run)
        return Restored(None, state, skipped=skipped)
    skipped.update(_mute(gathered.silent))
    scope = _scope(run, engine, gathered, candidates)
    attempt = _restore.Attempt()
    for candidate in candidates:
        step_at, size_bytes = candidate.name.step, candidate.size_bytes
        try:
            with progress("restore", total_bytes=size_bytes, run=run.name, step=step_at) as show:
                if source is None:
                    candidate = _brought_near(run, gathered, candidate, scope, show, partial)
                outcome = _restore.restore_from(
                    candidate, scope, state, partial=partial, rename=rename, attempt=attempt,
                    last=candidate.name == candidates[-1].name, progress=show,
                )  # fmt: skip
        except (NoHealthyStep, FormatError) as error:
            if _was_silence(run, attempt):
                if not is_last:
                    return None
                logger.warning("run %s: step %d is passed over: %s", run.name, step_at, error.what)
            skipped[f"step {step_at}"] = error.what
            continue
        except StateMismatch as error:
            if not attempt.touched:
                raise
            # Part of a newer step was placed before its damage was found, and the older one has
            # another structure.
            raise _undefined(skipped, error) from error
        except RestoreFailed as error:
            if attempt.touched and error.details.get("live_state") == "unchanged":
                raise _undefined(skipped, error) from error
            raise
        finally:
            if source is None:
                _report_damage(run, gathered, attempt.bad)
            attempt.bad.clear()
        skipped.update(_mute(attempt.silent))
        return _restored(run, outcome, skipped)
    nothing = _no_healthy_step(skipped)
    if attempt.touched:
        raise _undefined(skipped, nothing) from nothing
    raise nothing


def go_on(run: Run, restored: Restored, source: str | os.PathLike[str] | None) -> None:
    """Have the next save go on from what was restored; from nothing, if that is of another run."""
    run.is_restored = run.is_restored or source is None
    if not restored:
        return
    has_own = run.parent is not None or run.incarnation is not None
    if source is not None and has_own and run.group.rank == 0:
        logger.warning(
            "run %s: restore(source=...) came after this run had a step of its own, so the next"
            " save begins anew: that step and all before are abandoned, and deleted first. To go on"
            " from them, call restore(source=...) first, and restore() after it",
            run.name,
        )
    run.restart(None if source else (restored._incarnation, restored.step or 0))


def go_on_below(run: Run, step: int) -> None:
    """Have the next save, of ``step``, go on from all steps below it, whichever was restored; anew
    where there is none. All ranks call it."""
    with run.together("look", _elsewhere):
        places = run.places()
    with contextlib.closing(gather(run, "latest", places)) as gathered:
        parent = line_below(gathered.holdings, step)
    run.is_restored = parent is not None
    run.restart(parent)


def _was_silence(run: Run, attempt: _restore.Attempt) -> bool:
    """Whether some rank had no answer, and live state is as it was on all. All ranks call it."""
    told = run.exchange("silent", [bool(attempt.silent), attempt.touched])
    return any(silent for silent, _ in told) and not any(touched for _, touched in told)


def records_of(
    run: Run,
    engine: Engine,
    step: int | Literal["latest", "best"],
    source: str | None = None,
) -> dict[int, Record]:
    """What the save that ``restore`` would take says of itself, by rank; all ranks call it.

    Raises what ``Checkpointer.restore`` does, and StepNotFound where there is no step.
    """
    run.join()
    with run.meeting():
        found = _records_of(run, engine, step, source)
        if found is None:
            meet_again(run)
            found = _records_of(run, engine, step, source, is_last=True)
        assert found is not None  # at the last look
        return found


def _records_of(
    run: Run,
    engine: Engine,
    step: int | Literal["latest", "best"],
    source: str | None,
    *,
    is_last: bool = False,
) -> dict[int, Record] | None:
    """None where somebody did not answer who may at another look, as in ``_restore_newest``."""
    with run.together("look", _elsewhere):
        places = run.places()
        other = None if source is None else run.source(source, places)
    with contextlib.closing(gather(run, step, places, other)) as gathered:
        candidates = _plan(run, gathered, step).candidates
        failure: CheckpointError = StepNotFound(
            f"no tier has a step of run {run.name}", step=step, state="live state unchanged"
        )
        for candidate in candidates:
            scope = _scope(run, engine, gathered, candidates)
            attempt = _restore.Attempt()
            shards = Shards(candidate, scope, attempt)
            try:
                with scope.together("describe"):
                    return {rank: shards.record(rank) for rank in sorted(candidate.sources)}
            except (NoHealthyStep, FormatError) as error:
                failure = error
                if _was_silence(run, attempt) and not is_last:
                    return None
    raise failure


def _scope(
    run: Run, engine: Engine, gathered: Gathered, candidates: Sequence[Candidate]
) -> _restore.Scope:
    reading_s = max(_reading_s(run, candidate) for candidate in candidates)
    return _restore.Scope(
        gathered.run_key,
        gathered.places,
        gathered.inventories,
        active_adapters(),
        engine,
        run.within,
        run.group.rank,
        lambda stage: run.together(stage, _elsewhere, reading_s),
    )


def _plan(run: Run, gathered: Gathered, step: int | Literal["latest", "best"]) -> RestorePlan:
    """What may be restored. Raises where nothing may although there is, or may be, something."""
    best = _retention.best_of([tier.keep for tier in run.tiers])
    silent = gathered.silent
    try:
        plan = plan_restore(gathered.holdings, step, best=best, fastest=gathered.places)
    except StepNotFound as error:
        if silent:
            raise _unavailable(silent) from error
        raise
    if not plan.candidates and silent:
        raise _unavailable(silent)
    if not plan.candidates and (plan.lost or (plan.skipped and step != "latest")):
        raise _no_healthy_step({**plan.skipped, **_mute(gathered.absent)})
    return plan


def _warn_of_new_disks(run: Run, gathered: Gathered) -> None:
    """Every start of a run is noted in every tier. A disk without any may be new, or one that is
    not mounted: which of them nobody but the user can say."""
    others = [each for each in gathered.holdings if each.incarnations]
    if not others or run.group.rank != run.members.node[0]:
        return  # who looked into this node's places says so
    for label, tier in zip(run.labels, run.tiers, strict=True):
        found = gathered.inventories.get(label)
        if isinstance(tier, Disk) and not (
            label in gathered.silent or (found and found.incarnations)
        ):
            logger.warning(
                "run %s: %s at %s has nothing of this run, and %s has: right for a new disk or"
                " node; else see whether it is mounted",
                run.name, label, tier.place, ", ".join(sorted({each.label for each in others})),
            )  # fmt: skip


def _warn_of_foreign(run: Run) -> None:
    """Who comes from another library may name its directory, and would train anew in silence."""
    if run.group.rank != run.members.node[0]:
        return
    for place in [tier.place for tier in run.tiers if isinstance(tier, Disk)]:
        for hint in _foreign.hints(place) or _foreign.hints(os.path.join(place, run.key)):
            logger.warning("run %s begins at step 0, and %s", run.name, hint)


def _unavailable(silent: Mapping[str, str]) -> RestoreUnavailable:
    """What was asked for is not where could be looked, and may be where could not."""
    return RestoreUnavailable(
        "; ".join(f"{label}: {why}" for label, why in silent.items()),
        tiers=", ".join(silent),
        state="live state unchanged",
        actions=("repair or leave out the tier, then restart",),
    )


def _mute(places: Mapping[str, str]) -> dict[str, str]:
    return {f"tier {label}": why for label, why in places.items()}


def _reading_s(run: Run, candidate: Candidate) -> float:
    """How long a rank may read: all of a save from where it has to come from, or, where that was
    damaged, one shard from any other place."""
    first = {there[0] for there in candidate.sources.values()}
    share_bytes = candidate.size_bytes // len(candidate.sources)
    return max(
        *(run.reading_s(label, candidate.size_bytes) for label in first),
        *(run.reading_s(label, share_bytes) for label in candidate.labels()),
    )


def _elsewhere(rank: int, name: str, text: str) -> CheckpointError:
    """An error that stopped another rank, as this one raises it."""
    kind: type[CheckpointError] = getattr(errors, name, errors.RestoreError)
    return kind(f"rank {rank}: {text}", rank=rank)


def _brought_near(
    run: Run,
    gathered: Gathered,
    candidate: Candidate,
    scope: _restore.Scope,
    show: Callable[[int], None],
    partial: bool,
) -> Candidate:
    """What only a store has of a save, in a tier of one node each as well: it is read from the
    store once, and the next restart is from there. All ranks call it; one that restores in part
    brings nothing.

    A rank's shard goes to the node of that rank; to one of them where there are fewer ranks now.
    """
    alone = len(run.members.node) == run.members.world_size
    far = {
        rank: min(there)
        for rank, there in candidate.sources.items()
        if all(stage_of_tier(label) == "durable" for label in there)
    }
    if not far or (alone and len(far) < len(candidate.sources)):
        return candidate
    own = [rank for rank in far if rank % run.members.world_size in run.members.node]
    with scope.together("bring"):
        label = _fetched(run, candidate, scope, own, show) if own and not partial else ""
    at = [label] if alone else run.exchange("brought", label)
    sources, fetched = dict(candidate.sources), {}
    for rank, store in far.items():
        number = rank % run.members.world_size
        there = at[0 if alone else number]
        if there and (near := gathered.called_here(run, number, there)):
            sources[rank] = (near, *candidate.sources[rank])
            fetched[rank] = store
    return dataclasses.replace(candidate, sources=sources, fetched=fetched)


def _fetched(
    run: Run,
    candidate: Candidate,
    scope: _restore.Scope,
    ranks: Sequence[int],
    show: Callable[[int], None],
) -> str:
    """The tier of this node that has these ranks' shards now; "" if the store still has to do."""
    label = run.fetch(candidate.name, ranks, show)
    if label is None or label not in scope.places:
        return ""
    tier = scope.places[label].tier
    look = functools.partial(_inventory.scan_save, tier, run.key, candidate.name)
    try:
        save = run.within(label, look)
    except CheckpointError as error:
        logger.info("run %s: %s is not looked at: %s", run.name, label, error.what)
        return ""
    return label if save.records.keys() >= {*ranks} else ""


def _restored(run: Run, outcome: _restore.Outcome, skipped: dict[str, str]) -> Restored:
    record = outcome.record
    age_s = max(0.0, time.time() - record.saved_at_s)
    restored = Restored(
        record.step,
        outcome.state,
        sources=_by_tier(outcome.sources),
        skipped=dict(skipped.items()),
        id_=record.save_id,
    )
    restored._incarnation = record.incarnation
    restored._every = outcome.every
    restored._saved = (
        f"saved {age_s:.0f} s ago on {record.host} by incarnation {record.incarnation}; "
    )
    restored._must_read = outcome.replaced
    return restored


def _by_tier(sources: Mapping[str, int]) -> dict[str, int]:
    """Bytes by tier: all peers' places are one."""
    found: dict[str, int] = {}
    for label, size_bytes in sources.items():
        tier = "peers" if stage_of_tier(label) == "replicated" else label
        found[tier] = found.get(tier, 0) + size_bytes
    return found


def _report_damage(run: Run, gathered: Gathered, bad: Sequence[tuple[str, str, str]]) -> None:
    for label, key, reason in bad:
        logger.warning("run %s: %s of tier %s is damaged: %s", run.name, key, label, reason)
        with contextlib.suppress(CheckpointError):
            report_damage(run, gathered, label, key, reason)


def _no_source(gathered: Gathered, source: str | os.PathLike[str]) -> StepNotFound:
    """What somebody asked for by name is not there: no reason to start from nothing in silence."""
    return StepNotFound(
        f"no step of a run {gathered.run_key!r} in {', '.join(sorted(gathered.places))}, which is"
        f" what source={os.fspath(source)!r} names",
        source=os.fspath(source),
        state="live state unchanged",
        actions=(
            "give another run's name, for one in the tiers of this Checkpointer",
            "or the directory or URL of the run itself, which ends in the run's name",
            *_foreign.hints(source),
        ),
    )


def _undefined(skipped: Mapping[str, str], error: CheckpointError) -> RestoreFailed:
    """Live state holds verified bytes of a step whose others turned out to be damaged."""
    return RestoreFailed(
        f"{error.what}",
        reasons=tuple(f"{what}: {why}" for what, why in skipped.items()),
        live_state="undefined",
        state="live state is undefined: part of a damaged step was placed",
        actions=(
            "build model and optimizer anew before another restore or a start from nothing",
            "mtckpt verify --read-data shows every damaged file",
        ),
    )


def _no_healthy_step(skipped: Mapping[str, str]) -> NoHealthyStep:
    lines = "\n".join(f"  {what}: {why}" for what, why in skipped.items())
    return NoHealthyStep(
        f"steps exist and none of them is usable:\n{lines}\n ",
        reasons=tuple(f"{what}: {why}" for what, why in skipped.items()),
        state="live state unchanged",
        actions=(
            "mtckpt verify --read-data shows every damaged file",
            "start under another run name to begin again from nothing",
        ),
    )
