"""``mtckpt prune``: delete what rules let go, and say of every step what becomes of it and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, print_table, reporting
from mtckpt.cli._target import find
from mtckpt.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from mtckpt._manifest import SaveName
    from mtckpt._places import Place
    from mtckpt._retention import Rule
    from mtckpt.cli._target import Found

__all__ = ["prune"]


@dataclass(slots=True)
class Verdict:
    """What becomes of one save in one tier. ``done`` once it is deleted; ``problem`` if not."""

    run: str
    tier: str
    name: SaveName
    delete: bool
    reason: str
    size_bytes: int
    done: bool = False
    problem: str = ""


@click.command(short_help="Delete the steps that rules let go.")
@click.argument("target")
@click.option("--keep", type=int, help="Keep so many of the newest steps (2 or more).")
@click.option("--keep-every", help='Keep a step in so many steps, or in a time such as "1h".')
@click.option("--keep-best", help="Keep the best by a metric: N:METRIC or N:METRIC:max.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and why.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@reporting
def prune(
    target: str,
    keep: int | None,
    keep_every: str | None,
    keep_best: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete the steps that no rule keeps, from a directory, a store, or all slower tiers of a run.

    Without rules, those that the run was opened with count. The newest step is read back before
    anything is deleted, and two newer ones than the one that goes are always there. In a store,
    the data goes a minute after the records (MTCKPT_DELETE_GRACE_S), for readers to end.
    """
    rules = _rules(keep, keep_every, keep_best)
    with find(target, writable=not dry_run) as found:
        chosen = _places(found, rules)
        decided = [(place, _decide(run, place, own)) for run, place, own in chosen]
        verdicts = [verdict for _, here in decided for verdict in here]
        gone = [verdict for verdict in verdicts if verdict.delete]
        if gone and not dry_run:
            _confirm(gone, yes=yes, as_json=as_json)
            for place, here in decided:
                _carry_out(place, here)
    _say(verdicts, dry_run=dry_run, as_json=as_json)
    return _output.WRONG if any(v.problem for v in verdicts) else _output.FINE


def _rules(keep: int | None, keep_every: str | None, keep_best: str | None) -> tuple[Rule, ...]:
    from mtckpt._retention import KeepBest, KeepEvery, KeepLast

    rules: list[Rule] = []
    if keep is not None:
        rules.append(KeepLast(keep))
    if keep_every is not None:
        rules.append(KeepEvery(int(keep_every) if keep_every.isdecimal() else keep_every))
    if keep_best is not None:
        count, _, rest = keep_best.partition(":")
        metric, _, mode = rest.partition(":")
        if not count.isdecimal() or not metric:
            raise UsageError(
                f"--keep-best {keep_best!r}: must be N:METRIC or N:METRIC:max",
                state="nothing was deleted",
            )
        chosen = cast("Literal['min', 'max']", mode or "min")  # KeepBest refuses any other
        rules.append(KeepBest(int(count), metric, chosen))
    return tuple(rules)


def _places(found: Found, rules: tuple[Rule, ...]) -> list[tuple[str, Place, tuple[Rule, ...]]]:
    """Each slower tier with its rules. Raises UsageError where there are none to go by."""
    from mtckpt._retention import keep_from_wire

    chosen = []
    for run, places in sorted(found.runs.items()):
        for place in places:
            if place.label != "ram":  # Slots are recycled by their own rule.
                own = keep_from_wire(found.keep.get(place.label, []))
                chosen.append((run, place, rules or own))
    if not rules and not any(own for _, _, own in chosen):
        raise UsageError(
            "there is no rule to go by",
            state="nothing was deleted",
            actions=("give one: --keep 3",),
        )
    return chosen


def _decide(run: str, place: Place, rules: tuple[Rule, ...]) -> list[Verdict]:
    from mtckpt import _inventory
    from mtckpt._manifest import on_line
    from mtckpt._retention import Held, decide

    inventory = place.scan()
    line = _inventory.incarnation_line([inventory])
    now = time.time()
    newest = max((name.incarnation for name in inventory.saves), default=0)
    held = []
    for save in inventory.saves.values():
        record = next(iter(save.records.values()), None)
        held.append(
            Held(
                save.name,
                complete=save.complete and not save.aborted,
                on_line=not line or on_line(save.name, line),
                verified=True,  # the newest that counts is read back before anything goes
                damaged=bool(save.problems),
                # One that never was whole may be on its way, while its job goes on.
                busy=not (save.complete or save.has_manifest) and save.name.incarnation == newest,
                age_s=max(0.0, now - record.saved_at_s) if record else 0.0,
                metrics=save.metrics,
            )
        )
    decisions = decide(held, rules)
    return [
        Verdict(
            run,
            place.label,
            name,
            decision.delete,
            decision.reason,
            inventory.saves[name].size_bytes,
        )
        for name, decision in sorted(decisions.items())
    ]


def _confirm(gone: Sequence[Verdict], *, yes: bool, as_json: bool) -> None:
    import sys

    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise UsageError(
            "nobody is there to be asked",
            state="nothing was deleted",
            actions=("add --yes, or look first: --dry-run",),
        )
    for verdict in gone:
        print_line(f"delete {verdict.tier} step {verdict.name.step}: {verdict.reason}")
    if not click.confirm("really?", default=False):
        raise UsageError("it was not confirmed", state="nothing was deleted")


def _carry_out(place: Place, all_here: Sequence[Verdict]) -> None:
    """Read the newest that stays back, then delete; what fails is noted, and nothing more goes."""
    from mtckpt import _inventory, _source, _transfer

    gone = [verdict for verdict in all_here if verdict.delete]
    if not gone:
        return  # and there may be no newest: no rule, or nothing complete
    where = _source.Place(place.tier, place.tier)
    try:
        _read_back(where, place, all_here)
        if not _inventory.has_leases(place.tier):
            gone = _after_readers(where, place, gone)
        for verdict in gone:
            busy, _ = _transfer.delete_save(where, place.run_key, verdict.name)
            verdict.done = not busy
            verdict.problem = "is being read" if busy else ""
    except CheckpointError as error:
        for verdict in gone:
            if not verdict.done:
                verdict.problem = verdict.problem or error.what


def _after_readers(where: Any, place: Place, gone: list[Verdict]) -> list[Verdict]:
    """Those of ``gone`` that can be deleted once whoever reads them in a store had time to end.

    Readers leave no trace there, but nobody begins to read what has no records.
    """
    from mtckpt import _transfer
    from mtckpt.agent.queue import Limits

    for verdict in gone:
        _transfer.delete_save(where, place.run_key, verdict.name, records_only=True)
    grace_s = Limits.from_environment().delete_grace_s
    click.echo(f"{len(gone)} steps are let go; readers have {grace_s:g} s to end", err=True)
    time.sleep(grace_s)
    there = place.scan().saves
    for verdict in gone:
        if verdict.name in there and there[verdict.name].records:
            verdict.problem = "it was stored again meanwhile"
    return [verdict for verdict in gone if not verdict.problem]


def _read_back(where: Any, place: Place, all_here: Sequence[Verdict]) -> None:
    from mtckpt import _transfer
    from mtckpt.errors import Damaged

    newest = max(
        (v.name for v in all_here if not v.delete and v.reason == "the newest"),
        key=lambda name: (name.incarnation, name.step),
    )
    for rank in place.scan().saves[newest].records:
        result = _transfer.verify_shard(where, place.run_key, newest, rank)
        for key, reason in result.damaged.items():
            raise Damaged(f"the newest step is damaged ({reason}): nothing was deleted", key=key)


def _say(verdicts: Sequence[Verdict], *, dry_run: bool, as_json: bool) -> None:
    from mtckpt._handle import size_text

    if as_json:
        rows = [
            {
                "run": v.run,
                "tier": v.tier,
                "step": v.name.step,
                "incarnation": v.name.incarnation,
                "save": str(v.name),
                "delete": v.delete,
                "reason": v.reason,
                "size_bytes": v.size_bytes,
                "deleted": v.done,
                "problem": v.problem,
            }
            for v in verdicts
        ]
        print_json({"dry_run": dry_run, "steps": rows})
        return
    table = [
        (
            v.tier,
            v.name.step,
            v.name.incarnation,
            _word(v, dry_run),
            size_text(v.size_bytes),
            v.reason,
        )
        for v in verdicts
    ]
    print_table(("tier", "step", "incarnation", "", "size", "why"), table, " rr r")
    total = sum(v.size_bytes for v in verdicts if v.delete)
    print_line(f"{sum(v.delete for v in verdicts)} of {len(verdicts)} steps, {size_text(total)}")


def _word(verdict: Verdict, dry_run: bool) -> str:
    if not verdict.delete:
        return "keep"
    if dry_run:
        return "would be deleted"
    return "deleted" if verdict.done else f"not deleted: {verdict.problem}"
