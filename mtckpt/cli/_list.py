"""``mtckpt ls`` and ``mtckpt show``: what is saved, and what is in one save."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, print_table, reporting
from mtckpt.cli._target import find, parse_step
from mtckpt.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from mtckpt._handle import Step
    from mtckpt._load import Checkpoint
    from mtckpt._manifest import SaveName
    from mtckpt._places import Place
    from mtckpt.cli._target import Found

__all__ = ["ls", "show"]

_MAX_VALUE_CHARS = 70
_MAX_DIVERGENCES = 20


@click.command(short_help="List the steps of a run.")
@click.argument("target", required=False)
@click.option(
    "--all",
    "show_all",
    is_flag=True,
    help="Also list abandoned steps: those of a branch that was rolled back.",
)
@json_option
@reporting
def ls(target: str | None, show_all: bool, as_json: bool) -> int:
    """List the steps of a run, or of all runs that this node knows.

    Exit status 1 if a step is damaged.
    """
    from mtckpt._steps import list_steps

    with find(target) as found:
        listed = {
            run: [
                step
                for step in list_steps([place.scan() for place in places], unfinished=True)
                if show_all or not step.abandoned
            ]
            for run, places in sorted(found.runs.items())
        }
        notes = list(found.notes)
    damaged = any(step.damaged for steps in listed.values() for step in steps)
    if as_json:
        runs = [
            {"run": run, "steps": [_step_object(step) for step in steps]}
            for run, steps in listed.items()
        ]
        print_json({"runs": runs, "notes": notes})
    else:
        _print_runs(listed, notes)
    return _output.WRONG if damaged else _output.FINE


def _print_runs(listed: dict[str, list[Step]], notes: list[str]) -> None:
    from mtckpt._handle import size_text

    for note in notes:
        print_line(f"note: {note}")
    if not listed:
        print_line("no runs")
    for number, (run, steps) in enumerate(listed.items()):
        print_line(("\n" if number or notes else "") + run)
        rows = [
            (
                step.step,
                step.incarnation,
                _short(step.id),
                ", ".join(step.tiers) or "-",
                size_text(step.size_bytes),
                _state(step),
                " ".join(f"{name}={value:.6g}" for name, value in step.metrics.items()),
            )
            for step in steps
        ]
        head = ("step", "incarnation", "id", "tiers", "size", "state", "metrics")
        print_table(head, rows, "rr  r")


def _short(save_id: str) -> str:
    return save_id.replace("-", "")[:12]


def _state(step: Step) -> str:
    if step.damaged:
        more = f" (and {len(step.damaged) - 1} more)" if len(step.damaged) > 1 else ""
        return f"damaged: {step.damaged[0]}{more}"
    if not step.tiers:
        return "incomplete"
    return "abandoned" if step.abandoned else "ok"


def _step_object(step: Step) -> dict[str, Any]:
    return {
        "step": step.step,
        "incarnation": step.incarnation,
        "id": step.id,
        "tiers": list(step.tiers),
        "stages": list(step.stages),
        "size_bytes": step.size_bytes,
        "metrics": dict(step.metrics),
        "damaged": list(step.damaged),
        "complete": bool(step.tiers),
        "abandoned": step.abandoned,
    }


@click.command(short_help="Show what is in one step.")
@click.argument("target")
@click.option("--step", help="A number or a save's id. Default: the newest step.")
@json_option
@reporting
def show(target: str, step: str | None, as_json: bool) -> int:
    """Show what is in one step: tensors, plain values, where it lies and who wrote it."""
    with find(target) as found:
        checkpoint, tiers = open_one(found, target, step)
        with checkpoint:
            facts = _facts(checkpoint, tiers)
            places = [place for places in found.runs.values() for place in places]
            facts["divergences"] = _divergences(places, checkpoint.record.name)
            facts["reused_bytes"] = _reused_bytes(places, checkpoint.record.name)
    if as_json:
        print_json({**facts, "notes": found.notes})
        return _output.FINE
    for note in found.notes:
        print_line(f"note: {note}")
    _print_facts(facts)
    return _output.FINE


def open_one(
    found: Found, target: str, step: str | None, framework: str = "numpy"
) -> tuple[Checkpoint, list[str]]:
    """The save that ``step`` means of the one run of a target, and the tiers that hold it."""
    if len(found.runs) > 1:
        raise UsageError(
            f"{target} holds {len(found.runs)} runs",
            state="nothing was read",
            actions=[f"name one: {target.rstrip('/')}/{run}" for run in list(found.runs)[:10]],
        )
    places = [place for places in found.runs.values() for place in places]
    return _open(places, parse_step(step), framework)


def _open(
    places: list[Place], step: int | str, framework: str = "numpy"
) -> tuple[Checkpoint, list[str]]:
    """The save at the first place that has the newest one, and the tiers that hold it too."""
    from mtckpt._load import candidates, open_checkpoint
    from mtckpt.adapters import array_maker
    from mtckpt.errors import StepNotFound

    best: list[tuple[tuple[int, int], Place]] = []
    failed: CheckpointError = StepNotFound("nothing is saved there", state="nothing was read")
    for place in places:
        try:
            chosen = candidates(place.scan(), step)
        except StepNotFound as error:
            failed = error
            continue
        newest = next((save for save in chosen if save.complete), chosen[0])
        best.append(((newest.name.incarnation, newest.name.step), place))
    for _, place in sorted(best, key=lambda item: item[0], reverse=True):
        try:
            checkpoint = open_checkpoint(place, step, array_maker(framework))
        except CheckpointError as error:
            failed = error
            continue
        tiers = [
            other.label
            for other in places
            for save in other.scan().saves.values()
            if save.complete and any(r.save_id == checkpoint.id for r in save.records.values())
        ]
        return checkpoint, tiers
    raise failed


def _facts(checkpoint: Checkpoint, tiers: list[str]) -> dict[str, Any]:
    from mtckpt._dtypes import size_bytes_of
    from mtckpt._node import encode_plain

    record = checkpoint.record
    arrays = []
    for path in checkpoint:
        shape, dtype = checkpoint.shape(path), checkpoint.dtype(path)
        arrays.append(
            {
                "path": path,
                "dtype": dtype,
                "shape": list(shape),
                "size_bytes": size_bytes_of(dtype, shape),
                "same_as": checkpoint.same_as(path),
                "ranks": list(checkpoint.ranks(path)),
            }
        )
    return {
        "run": checkpoint.run,
        "step": checkpoint.step,
        "id": checkpoint.id,
        "incarnation": checkpoint.incarnation,
        "incarnation_id": record.incarnation_id,
        "tiers": tiers,
        "size_bytes": checkpoint.size_bytes,
        "num_ranks": record.world_size,
        "host": record.host,
        "writer": record.writer,
        "saved_at_s": record.saved_at_s or None,
        "metrics": dict(checkpoint.metrics),
        "arrays": arrays,
        "plain": {path: encode_plain(value) for path, value in checkpoint.plain.items()},
        "passed_over": list(checkpoint.skipped),
    }


def _divergences(places: list[Place], name: SaveName) -> list[dict[str, Any]]:
    """Leaves whose copies of several ranks differ, as far as their records are here."""
    from mtckpt import _twins

    records = {
        rank: record
        for place in reversed(places)
        for save in place.scan().saves.values()
        if save.name == name
        for rank, record in save.records.items()
    }
    try:
        divergences = _twins.divergences(records)
    except CheckpointError:
        return []  # a record that lies: ``verify`` is there to tell of that
    return [
        {"leaf": found.leaf, "ranks": found.ranks, "groups": found.groups, "text": str(found)}
        for found in divergences
    ]


def _reused_bytes(places: list[Place], name: SaveName) -> int:
    """What a store copied itself for a save. Only manifests say so, which may be missing."""
    from mtckpt import _inventory

    found = [0]
    for place in places:
        with contextlib.suppress(CheckpointError):  # ``verify`` is there to tell of damage
            manifest = _inventory.read_manifest(place.tier, place.run_key, name)
            found.append(manifest.reused_bytes if manifest else 0)
    return max(found)


def _print_facts(facts: dict[str, Any]) -> None:
    from mtckpt._handle import size_text

    saved_at_s = facts["saved_at_s"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at_s)) if saved_at_s else ""
    metrics = " ".join(f"{name}={value:.6g}" for name, value in facts["metrics"].items())
    reused_bytes = facts["reused_bytes"]
    reused = f"{size_text(reused_bytes)} were copied inside the store" if reused_bytes else ""
    for reason in facts["passed_over"]:
        print_line(f"passed over {reason}")
    for name, value in [
        ("run", facts["run"]),
        ("step", facts["step"]),
        ("id", facts["id"]),
        ("incarnation", f"{facts['incarnation']} ({facts['incarnation_id']})"),
        ("tiers", ", ".join(facts["tiers"])),
        ("size", f"{size_text(facts['size_bytes'])} in {facts['num_ranks']} shard(s)"),
        ("reused", reused),
        ("saved", " ".join(part for part in (when, "on", facts["host"]) if facts["host"] or when)),
        ("metrics", metrics),
    ]:
        if value != "":
            print_line(f"{name:<12}{value}")
    for divergence in facts["divergences"][:_MAX_DIVERGENCES]:
        print_line(f"ReplicaDivergence: {divergence['text']}")
    arrays = facts["arrays"]
    print_line(f"\n{len(arrays)} array(s)")
    rows = [
        (
            array["path"],
            array["dtype"],
            "x".join(map(str, array["shape"])) or "scalar",
            size_text(array["size_bytes"]),
            f"same as {array['same_as']}" if array["same_as"] else "",
        )
        for array in arrays
    ]
    print_table(("path", "type", "shape", "size", ""), rows, "   r")
    print_line(f"\n{len(facts['plain'])} plain value(s)")
    values = [(path, _shortened(value)) for path, value in facts["plain"].items()]
    print_table(("path", "value"), values)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."
