"""Saves of several tiers, told as the steps of a run; what numbers and metrics of steps may be."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mtckpt import _holdings, _inventory, _manifest
from mtckpt._handle import Step, stage_of_tier, stages_together
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._inventory import Inventory
    from mtckpt._manifest import SaveEntry

__all__ = ["list_steps", "metrics_of", "step_number"]

logger = logging.getLogger(__name__)


def step_number(step: Any, *, least: int = 0, words: str = "") -> int:
    """A step as an int, whatever kind of integer it is: NumPy's, or a tensor of one element.

    ``words`` is what the caller takes besides, for the message.

    Raises UsageError for everything else: what is no step must never pass for "the newest one".
    And for one that is lower than ``least``, the highest that was offered: it would not be newest.
    """
    try:
        number = operator.index(step)
    except (TypeError, ValueError, RuntimeError):  # the last two are of tensors
        number = -1
    if isinstance(step, bool) or not 0 <= number < _manifest.MAX_STEP:
        raise UsageError(
            f"step must be {words}an integer from 0 to {_manifest.MAX_STEP - 1:,}, not {step!r}",
            state="nothing was done",
        )
    if number < least:
        raise UsageError(
            f"step {number} comes after step {least}, and the newest step is the highest",
            step=number,
            state="nothing was saved",
            actions=(
                "count steps over all passes through the data, from restored.next_step on",
                "to go back on purpose, restore(step=...)",
                "threads get their turns in any order: save from one",
            ),
        )
    return number


def metrics_of(step: int, metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics of a step as numbers that a record can hold; those that are none are left out.

    A loss that has become NaN must not cost the save. Raises UsageError for what is no number.
    """
    found = {}
    if not isinstance(metrics, Mapping | None):
        raise UsageError(
            f"metrics={metrics!r:.80}: must be a dict of names and numbers",
            state="nothing was written",
        )
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # the last one is a tensor's
            raise UsageError(
                f"metric {name!r} of step {step} must be a number, not {value!r:.80}",
                state="nothing was written",
            ) from error
        if not isinstance(name, str):
            raise UsageError(f"the name of a metric must be a text, not {name!r:.80}")
        if math.isfinite(number):
            found[name] = number
        else:
            logger.warning("metric %s of step %d is %s: it is not kept", name, step, number)
    return found


def list_steps(inventories: Iterable[Inventory], *, unfinished: bool = False) -> list[Step]:
    """The saves of several inventories as steps, oldest first: those that are whole or damaged.

    With ``unfinished`` those too of which some parts lie there: in the making, or called off.
    """
    inventories = list(inventories)
    line = _inventory.incarnation_line(inventories)
    joined = _holdings.join([_holdings.holdings_of(each) for each in inventories])
    names = sorted({name for inv in inventories for name in inv.saves})
    steps = []
    for name in names:
        entries = [inv.saves[name] for inv in inventories if name in inv.saves]
        whole = joined[name]
        tiers, stages = _reached(entries, whole)
        damaged = tuple(problem for entry in entries for problem in entry.problems)
        if not (tiers or damaged or unfinished):
            continue
        metrics: dict[str, float] = {}
        for entry in entries:
            metrics.update(entry.metrics)
        steps.append(
            Step(
                step=name.step,
                id=whole.whole[0] if whole.complete else name.short_id,
                tiers=tiers,
                stages=tuple(sorted(stages, reverse=True)),
                size_bytes=max([whole.size_bytes, *(e.size_bytes for e in entries)]),
                metrics=metrics,
                damaged=damaged,
                incarnation=name.incarnation,
                abandoned=bool(line) and not _manifest.on_line(name, line),
            )
        )
    return steps


def _reached(
    entries: Sequence[SaveEntry], whole: _holdings.Joined
) -> tuple[tuple[str, ...], set[str]]:
    """The tiers that have a save, and the stages that it has reached in them.

    Where no tier has all of it, those that have it together.
    """
    complete = [entry.tier for entry in entries if entry.complete and not entry.aborted]
    if complete or not whole.complete:
        return tuple(complete), {stage_of_tier(tier) for tier in complete}
    together = dict.fromkeys(tier for there in whole.sources.values() for tier in there)
    of_ranks = {frozenset(map(stage_of_tier, there)) for there in whole.sources.values()}
    return tuple(together), stages_together(of_ranks)
