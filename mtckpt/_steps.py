"""Saves of several tiers, told as the steps of a run; and what a step's number may be. Pure."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mtckpt import _inventory, _manifest
from mtckpt._handle import Step, stage_of_tier
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory

__all__ = ["list_steps", "step_number"]


def step_number(step: Any) -> int:
    """A step as an int, whatever kind of integer it is: NumPy's, or a tensor of one element.

    Raises UsageError for everything else: what is no step must never pass for "the newest one".
    """
    try:
        number = operator.index(step)
    except (TypeError, ValueError, RuntimeError):  # the last two are of tensors
        number = -1
    if isinstance(step, bool) or not 0 <= number < _manifest.MAX_STEP:
        raise UsageError(
            f"step must be an integer from 0 to {_manifest.MAX_STEP - 1:,}, not {step!r}",
            state="nothing was done",
        )
    return number


def list_steps(inventories: Iterable[Inventory]) -> list[Step]:
    """The saves of several inventories as steps, oldest first."""
    inventories = list(inventories)
    line = _inventory.incarnation_line(inventories)
    names = sorted({name for inv in inventories for name in inv.saves})
    steps = []
    for name in names:
        entries = [inv.saves[name] for inv in inventories if name in inv.saves]
        complete = [e for e in entries if e.complete and not e.aborted]
        record = next((e.records[r] for e in complete for r in e.records), None)
        metrics: dict[str, float] = {}
        for entry in entries:
            metrics.update(entry.metrics)
        stages = {stage_of_tier(e.tier) for e in complete}
        steps.append(
            Step(
                step=name.step,
                id=record.save_id if record else name.short_id,
                tiers=tuple(e.tier for e in complete),
                stages=tuple(sorted(stages, reverse=True)),
                size_bytes=max((e.size_bytes for e in entries), default=0),
                metrics=metrics,
                damaged=tuple(p for e in entries for p in e.problems),
                incarnation=name.incarnation,
                abandoned=bool(line) and not _manifest.on_line(name, line),
            )
        )
    return steps
