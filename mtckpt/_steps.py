"""Saves of several tiers, told as the steps of a run. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest
from mtckpt._handle import Step, stage_of_tier

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory

__all__ = ["list_steps"]


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
