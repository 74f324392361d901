"""Which steps a restore may take, in which order, and where the shards of each are. Pure.

Knows what places hold together and the line of incarnations. Does not know what a step is wanted
for, and reads nothing: every rank of a job that is told the same chooses the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mtckpt import _holdings, _inventory, _manifest
from mtckpt.errors import StepNotFound

if TYPE_CHECKING:
    from mtckpt._holdings import Holdings, Joined
    from mtckpt._manifest import SaveName

__all__ = ["Candidate", "RestorePlan", "line_below", "plan_restore"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One save that may be restored. ``sources`` has each rank's places, fastest first.

    ``whole`` is what all its records have alike. ``every`` is the automatic interval that its rank
    0 carries on. ``fetched`` has the store from which a rank's first place has it, as of just now.
    """

    name: SaveName
    sources: Mapping[int, tuple[str, ...]]
    whole: tuple[str, int, str]
    size_bytes: int = 0
    every: int = 0
    fetched: Mapping[int, str] = field(default_factory=dict)

    def labels(self) -> set[str]:
        """Every place that has a part of it."""
        return set().union(*set(self.sources.values()))


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to try, in order, and what was passed over with the reason.

    ``lost``: something was passed over that had been a step, or may have been.
    """

    candidates: tuple[Candidate, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False


def plan_restore(
    holdings: Sequence[Holdings],
    step: int | Literal["latest", "best"],
    *,
    best: Callable[[Mapping[SaveName, Mapping[str, float]]], SaveName | None] | None = None,
    fastest: Iterable[str] = (),
) -> RestorePlan:
    """Decide which saves to try, newest first, from what the places hold together.

    ``fastest`` has the labels of places in the order in which they are to be read; without it they
    come in that of ``holdings``. Only saves on the incarnation line count for "latest" and
    "best"; a number takes the save of that step on the line, else of the newest incarnation.
    Raises StepNotFound for a number that no place has.
    """
    saves = _holdings.join(holdings)
    line = _line(saves, holdings)
    found = {name for name, save in saves.items() if save.complete}
    names = sorted(found, key=lambda name: (name.step, name.incarnation), reverse=True)
    counted = [name for name in names if not line or _manifest.on_line(name, line)]
    chosen = _chosen(saves, step, names, counted, best)
    passed_over = [
        name
        for name in sorted(saves.keys() - found, reverse=True)
        # A number means a save off the line too, where no other is meant.
        if (not line or _manifest.on_line(name, line) or (name.step == step and not chosen))
        and (step == "latest" or name.step == step)
        and (not chosen or name.step >= chosen[0].step)
    ]
    skipped = {f"step {name.step}": "; ".join(saves[name].reasons) for name in passed_over}
    lost = any(saves[name].lost for name in passed_over)
    if not isinstance(step, int) and names and not chosen:
        # Sound steps, and a later start that did not go on from them: no reason to begin from
        # nothing without a word.
        lost = True
        why = "abandoned by a later start that did not restore; restore(step={}) takes it"
        skipped.update({f"step {n.step}": why.format(n.step) for n in names})
    return RestorePlan(
        tuple(_candidate(saves[name], list(fastest)) for name in chosen), skipped, lost
    )


def line_below(holdings: Sequence[Holdings], step: int) -> tuple[int, int] | None:
    """What to go on from, (incarnation, step), so that of the line all below ``step`` stays on it;
    None where there is nothing."""
    saves = _holdings.join(holdings)
    line = _line(saves, holdings)
    is_any = any(name.step < step and _manifest.on_line(name, line) for name in saves)
    return (line[0][0], step - 1) if is_any else None


def _candidate(save: Joined, fastest: Sequence[str]) -> Candidate:
    sources: Mapping[int, tuple[str, ...]] = save.sources
    if fastest:
        alike = {there: tuple(sorted(there, key=fastest.index)) for there in set(sources.values())}
        sources = {rank: alike[there] for rank, there in sources.items()}
    return Candidate(save.name, sources, save.whole, save.size_bytes, save.every)


def _chosen(
    saves: Mapping[SaveName, Joined],
    step: int | Literal["latest", "best"],
    names: Sequence[SaveName],
    counted: Sequence[SaveName],
    best: Callable[[Mapping[SaveName, Mapping[str, float]]], SaveName | None] | None,
) -> list[SaveName]:
    """Of the complete saves ``names``, of which ``counted`` are on the line, those to try."""
    if isinstance(step, int):
        chosen = [n for n in counted if n.step == step] or [n for n in names if n.step == step]
        if not chosen and not any(name.step == step for name in saves):
            known = sorted({name.step for name in names})
            raise StepNotFound(
                f"no tier has step {step}",
                step=step,
                state="live state unchanged",
                actions=(f"steps that are there: {known[-20:]}",),
            )
        return chosen
    if step == "latest":
        return list(counted)
    pick = best({name: saves[name].metrics for name in counted}) if best else None
    if pick is None and counted:
        raise StepNotFound(
            "no step has the metric that KeepBest names"
            if best
            else "no tier has a KeepBest among its rules, so nothing says which step is best",
            step="best",
            state="live state unchanged",
            actions=("give metrics to save() or report(), and KeepBest to a tier's keep=",),
        )
    return [] if pick is None else [pick]


def _line(saves: Iterable[SaveName], holdings: Iterable[Holdings]) -> list[tuple[int, int | None]]:
    return _inventory.line_of(saves, _incarnations(holdings))


def _incarnations(holdings: Iterable[Holdings]) -> list[_manifest.Incarnation]:
    """Every incarnation that any place knows, once each."""
    found = {(i.number, i.id): i for each in holdings for i in each.incarnations}
    return [found[key] for key in sorted(found)]
