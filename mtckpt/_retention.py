"""Which saves a tier keeps: the user's rules, and what may be deleted under them. Pure.

Knows steps, incarnations, metrics and ages that it is given. Does not delete, and does not know
where a save lies. Whatever the rules say, a save goes only when at least two newer complete ones
are in the same tier and one of those was verified by reading it back from there.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from mtckpt._manifest import SaveName
from mtckpt._schedule import parse_every
from mtckpt.errors import UsageError

__all__ = [
    "Decision",
    "Held",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "best_of",
    "decide",
    "keep_from_wire",
    "keep_to_wire",
    "kept",
    "parse_keep",
]


@dataclass(frozen=True)
class KeepLast:
    """Keep the newest ``n`` steps, 2 or more: a newer one must be proven before an older goes."""

    n: int

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 2:
            raise UsageError(
                f"keep={self.n!r}: the last step can only go once a newer one was written and read"
                " back, and until then both are there: 2 are the least",
                state="nothing was done",
                actions=("use keep=2 or more",),
            )


@dataclass(frozen=True)
class KeepEvery:
    """Keep a step in every ``every`` steps, or in every ``"1h"``; for the last ``within`` only."""

    every: int | str
    within: str | None = None

    def __post_init__(self) -> None:
        parse_every(self.every, times=True)
        if self.within is not None and parse_every(self.within, times=True)[1] is None:
            raise UsageError(f"within={self.within!r}: must be a time", state="nothing was done")


@dataclass(frozen=True)
class KeepBest:
    """Keep the ``n`` steps with the best value of a metric."""

    n: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1 or self.mode not in ("min", "max"):
            raise UsageError(f"{self!r}: n is 1 or more, mode min or max", state="nothing was done")


Rule = KeepLast | KeepEvery | KeepBest


def parse_keep(keep: Any) -> tuple[Rule, ...]:
    """Rules of ``keep=``: an int, one rule or a sequence of them; None keeps everything."""
    if keep is None:
        return ()
    if isinstance(keep, int) and not isinstance(keep, bool):
        return (KeepLast(keep),)
    if isinstance(keep, (KeepLast, KeepEvery, KeepBest)):
        return (keep,)
    if isinstance(keep, (list, tuple)):
        return tuple(rule for item in keep for rule in parse_keep(item))
    raise UsageError(
        f"keep={keep!r}: must be an int, KeepLast, KeepEvery, KeepBest or a sequence of them",
        state="nothing was done",
    )


def keep_to_wire(keep: Any) -> list[dict[str, Any]]:
    """The rules as they travel to the agent."""
    wire: list[dict[str, Any]] = []
    for rule in parse_keep(keep):
        if isinstance(rule, KeepLast):
            wire.append({"last": rule.n})
        elif isinstance(rule, KeepBest):
            wire.append({"best": rule.n, "metric": rule.metric, "mode": rule.mode})
        else:
            steps, seconds = parse_every(rule.every, times=True)
            within_s = parse_every(rule.within, times=True)[1] if rule.within else None
            wire.append({"every": steps, "every_s": seconds, "within_s": within_s})
    return wire


def keep_from_wire(wire: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The rules that ``keep_to_wire`` wrote. Raises UsageError."""
    rules: list[Rule] = []
    for item in wire:
        if item.get("last") is not None:
            rules.append(KeepLast(item["last"]))
        elif item.get("best") is not None:
            rules.append(KeepBest(item["best"], str(item["metric"]), item.get("mode", "min")))
        else:
            every = item["every"] if item.get("every") else f"{item['every_s']}s"
            within = f"{item['within_s']}s" if item.get("within_s") else None
            rules.append(KeepEvery(every, within))
    return tuple(rules)


class Held(msgspec.Struct, frozen=True):
    """One save of one tier, as far as a rule may look at it. ``age_s`` is since it was written.

    ``suspect``: what ranks hold alike was not alike in it, so one of them holds wrong bytes.
    """

    name: SaveName
    complete: bool = True
    on_line: bool = True
    verified: bool = False
    damaged: bool = False
    suspect: bool = False
    busy: bool = False
    age_s: float = 0.0
    metrics: Mapping[str, float] | None = None


class Decision(msgspec.Struct, frozen=True):
    """What happens to a save and why, in one sentence."""

    delete: bool
    reason: str


def decide(saves: Sequence[Held], rules: Sequence[Rule]) -> dict[SaveName, Decision]:
    """Decide for every save of a tier. No rules: everything is kept.

    A save is kept if any rule wants it. Abandoned ones (off the incarnation line) are wanted by
    none, and go once two newer ones, of the branch that replaced them, are here. Order is by
    incarnation and step; ages only serve rules in hours.

    The two newest that count are never deleted, nor is the newest that was verified: so what a
    deletion rests on is not deleted by the same decision.
    """
    counted = _counted(saves)
    wanted = _wanted(counted, rules)
    orders = [_order(save) for save in counted]
    verified = max((_order(save) for save in counted if save.verified), default=(-1, -1))
    result: dict[SaveName, Decision] = {}
    for save in saves:
        num_newer = len(orders) - bisect.bisect_right(orders, _order(save))
        if not rules:
            result[save.name] = Decision(False, "no rule: everything is kept")
        elif save.name in wanted:
            result[save.name] = Decision(False, wanted[save.name])
        elif save.busy:
            result[save.name] = Decision(False, "in use, or a store still waits for it")
        elif num_newer < 2:
            result[save.name] = Decision(False, "fewer than two newer complete saves are here")
        elif verified <= _order(save):
            result[save.name] = Decision(False, "no newer save was read back from here yet")
        elif not save.on_line:
            result[save.name] = Decision(True, "abandoned by a roll-back")
        elif not save.complete:
            result[save.name] = Decision(True, "never completed, and newer ones were")
        else:
            result[save.name] = Decision(True, "no rule wants it")
    return result


def kept(saves: Sequence[Held], rules: Sequence[Rule], *, newest: bool = True) -> set[SaveName]:
    """The saves that the rules want, were they all in one tier; all of them without a rule.

    ``newest``: the newest is always wanted.
    """
    counted = _counted(saves)
    if not rules:
        return {save.name for save in saves}
    wanted = {save.name for rule in rules for save in _kept_by(rule, counted)}
    return wanted | {save.name for save in counted[-1:] if newest}


def _counted(saves: Sequence[Held]) -> list[Held]:
    """Oldest first, those that stand for themselves."""
    return sorted((s for s in saves if s.complete and s.on_line and not s.damaged), key=_order)


def _order(save: Held) -> tuple[int, int]:
    # Off the line the step says nothing: an abandoned step 1000 is older than step 510 after it.
    return (save.name.incarnation, save.name.step)


def _wanted(counted: Sequence[Held], rules: Sequence[Rule]) -> dict[SaveName, str]:
    wanted: dict[SaveName, str] = {}
    if counted:
        wanted[counted[-1].name] = "the newest"
        sound = [save for save in counted if not save.suspect]
        if sound:
            wanted.setdefault(sound[-1].name, "the newest whose replicas are equal")
    for rule in rules:
        for save in _kept_by(rule, counted):
            wanted.setdefault(save.name, f"kept by {rule}")
    return wanted


def _kept_by(rule: Rule, counted: Sequence[Held]) -> Sequence[Held]:
    if isinstance(rule, KeepLast):
        return counted[-rule.n :]
    if isinstance(rule, KeepBest):
        scored = [s for s in counted if s.metrics and rule.metric in s.metrics]
        sign = 1.0 if rule.mode == "min" else -1.0
        # Of equal values the newer one; a value that is not a number is no value.
        scored = [
            s for s in scored if (s.metrics or {})[rule.metric] == (s.metrics or {})[rule.metric]
        ]
        scored.sort(key=lambda s: s.name, reverse=True)
        scored.sort(key=lambda s: sign * (s.metrics or {})[rule.metric])
        return scored[: rule.n]
    steps, seconds = parse_every(rule.every, times=True)
    within_s = parse_every(rule.within, times=True)[1] if rule.within else None
    fresh = [s for s in counted if within_s is None or s.age_s <= within_s]
    kept: list[Held] = []
    for save in fresh:  # oldest first: the first one of each stretch stays
        if not kept:
            kept.append(save)
        elif steps:
            if save.name.step // steps != kept[-1].name.step // steps:
                kept.append(save)
        elif kept[-1].age_s - save.age_s >= (seconds or 0.0):
            # Between two saves, not from now: what is kept today is what is kept tomorrow.
            kept.append(save)
    return kept


Best = Callable[[Mapping[SaveName, Mapping[str, float]]], SaveName | None]


def best_of(keeps: Sequence[Any]) -> Best | None:
    """How to pick the best save, by the first KeepBest among the tiers' rules; None without one."""
    rule = next((r for keep in keeps for r in parse_keep(keep) if isinstance(r, KeepBest)), None)
    if rule is None:
        return None
    chosen = KeepBest(1, rule.metric, rule.mode)

    def pick(metrics: Mapping[SaveName, Mapping[str, float]]) -> SaveName | None:
        held = [Held(name, metrics=values) for name, values in sorted(metrics.items())]
        best = _kept_by(chosen, held)
        return best[0].name if best else None

    return pick
