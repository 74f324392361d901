"""``mtckpt explain``: where a restore would take each shard from, and why from nowhere else.

Reads records, headers and digest tables, as a restore does before it reads tensors: what is wrong
with the bytes of those is seen by ``verify --read-data``. Reads other nodes' places through their
agents, where this user may know the secret of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, print_table, reporting
from mtckpt.cli._target import agent_status, find
from mtckpt.errors import (
    CheckpointError,
    FormatError,
    NoHealthyStep,
    StepNotFound,
    TierError,
    UsageError,
)

if TYPE_CHECKING:
    from mtckpt._choice import Candidate
    from mtckpt._delivery import Place
    from mtckpt._handshake import PeerAddress
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import SaveName
    from mtckpt.cli._target import Found

__all__ = ["explain"]

_PEER_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Shard:
    """One rank's: the place it comes from, and the reason for each other place. ``left_out``: how
    much of it is taken from other shards, since this is a copy made without that."""

    rank: int
    size_bytes: int = 0
    source: str = ""
    left_out: int = 0
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Looked:
    """Places of one run, fastest first, with what each has; ``silent`` ones with the reason."""

    run: str
    run_key: str
    places: list[Place] = field(default_factory=list)
    inventories: dict[str, Inventory] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    damaged: bool = False


@click.command(short_help="Say where a restore would read, and why not elsewhere.")
@click.argument("target")
@click.option("--step", type=click.IntRange(min=0), help="A number. Default: the newest step.")
@json_option
@reporting
def explain(target: str, step: int | None, as_json: bool) -> int:
    """Say where a restore would take each shard from, and why not from anywhere else.

    "4 GiB elsewhere": a copy that leaves out what other shards of the step have too, byte for byte.
    What is large comes from up to four other nodes side by side: from the one that is named, and
    from those that are said to bring some of it.
    Exit status 1 if a place is silent or damaged, or no step can be restored.
    """
    with find(target) as found:
        looked = _look(found, target)
        try:
            candidate, shards, passed_over = _choose(looked, "latest" if step is None else step)
        finally:
            for place in looked.places:
                if not place.near:
                    place.tier.close()
        notes = list(found.notes)
    if as_json:
        print_json(_object(looked, candidate, shards, passed_over, notes))
    else:
        _print(looked, candidate, shards, passed_over, notes)
    return _output.WRONG if looked.silent or looked.damaged else _output.FINE


def _look(found: Found, target: str) -> Looked:
    from mtckpt import _inventory
    from mtckpt._delivery import Place

    if len(found.runs) > 1:
        raise UsageError(
            f"{target} holds {len(found.runs)} runs",
            state="nothing was read",
            actions=[f"name one: {target.rstrip('/')}/{run}" for run in list(found.runs)[:10]],
        )
    for run, there in found.runs.items():
        looked = Looked(run, there[0].run_key)
        own = [Place(place.label, place.tier, mapped=False) for place in there]
        near = [place for place in own if not place.label.startswith("store")]
        looked.places = [*near, *_peers(looked, near), *(p for p in own if p not in near)]
        for place in looked.places:
            try:
                held = _inventory.scan(place.tier, looked.run_key, label=place.label)
            except CheckpointError as error:
                looked.silent[place.label] = error.what
            else:
                looked.inventories[place.label] = held
        return looked
    raise StepNotFound(f"{target} holds no run", state="nothing was read")


def _peers(looked: Looked, own: Sequence[Place]) -> Iterator[Place]:
    """Places of the other nodes that the agent of this one knows of, if this user may ask them."""
    from mtckpt._delivery import Place
    from mtckpt.agent.peers import others_kept
    from mtckpt.tiers.peer import PeerTier

    status = agent_status()
    ram = next((place for place in own if place.label == "ram"), None)
    if status is None or ram is None:
        return
    run = next((run for run in status.runs if run.run == looked.run), None)
    path = next((tier.path for tier in run.tiers if tier.label == "ram"), None) if run else None
    known = others_kept(path, looked.run_key, status.agent_id) if path else []
    # A node that was in several starts of the job knows the secret of the last.
    others: dict[tuple[str, int], tuple[PeerAddress, str]] = {}
    for each in known:
        for node in each.nodes:
            where = node.address.host, node.address.control_port
            others.setdefault(where, (node.address, each.secret))
    for label in [place.label for place in own]:
        for number, (address, secret) in enumerate(others.values(), 1):
            tier = PeerTier(
                address,
                looked.run_key,
                bytes.fromhex(secret),
                place=label,
                timeout_s=_PEER_TIMEOUT_S,
            )
            name = f"peers-{address.name or address.host}-{number}-{label}"
            yield Place(name, tier, mapped=False, near=False)


def _choose(looked: Looked, step: Any) -> tuple[Candidate, list[Shard], dict[str, str]]:
    """The save that a restore would take. Raises NoHealthyStep, StepNotFound."""
    from mtckpt._choice import plan_restore
    from mtckpt._holdings import holdings_of

    held = [holdings_of(inventory) for inventory in looked.inventories.values()]
    plan = plan_restore(held, step)
    passed_over = dict(plan.skipped)
    for candidate in plan.candidates:
        shards = [_shard(looked, candidate, rank) for rank in sorted(candidate.sources)]
        lacking = [shard for shard in shards if not shard.source]
        if not lacking:
            return candidate, shards, passed_over
        passed_over[f"step {candidate.name.step}"] = "; ".join(
            f"rank {shard.rank}: {label}: {why}"
            for shard in lacking[:8]
            for label, why in shard.rejected.items()
        )
    silent = {f"tier {label}": why for label, why in looked.silent.items()}
    reasons = [f"{what}: {why}" for what, why in {**passed_over, **silent}.items()]
    if not reasons:
        raise StepNotFound("nothing is saved there", state="nothing was read")
    raise NoHealthyStep(
        f"run {looked.run} has no step that can be restored",
        state="nothing was changed",
        actions=[f"know that {reason}" for reason in reasons[:20]],
        reasons=tuple(reasons),
    )


def _shard(looked: Looked, candidate: Candidate, rank: int) -> Shard:
    """Look at every place, as a restore does, but also at those that it would not need."""
    from mtckpt import _inventory
    from mtckpt._delivery import describe
    from mtckpt._striped import STRIPED_BYTES

    shard = Shard(rank)
    keys = _inventory.shard_keys(looked.run_key, candidate.name, rank)
    for place in looked.places:
        label = place.label
        if label not in candidate.sources[rank]:
            shard.rejected[label] = _why_absent(looked, label, candidate.name, rank)
            continue
        record = looked.inventories[label].saves[candidate.name].records[rank]
        try:
            describe(place, keys, record)
        except (FormatError, TierError) as error:
            shard.rejected[label] = error.what
            looked.damaged = True
            continue
        if shard.source:
            size_bytes = record.shard.size_bytes
            shares = _is_peers(label) and _is_peers(shard.source) and size_bytes >= STRIPED_BYTES
            shard.rejected[label] = (
                f"brings some of it, beside {shard.source}"
                if shares
                else f"not needed: {shard.source} comes first"
            )
        else:
            shard.source, shard.size_bytes = label, record.shard.size_bytes
            shard.left_out = record.left_out
    return shard


def _is_peers(label: str) -> bool:
    return label.startswith("peers-")


def _why_absent(looked: Looked, label: str, name: SaveName, rank: int) -> str:
    from mtckpt import _manifest

    if label in looked.silent:
        return f"did not answer: {looked.silent[label]}"
    save = looked.inventories[label].saves.get(name)
    if save is None:
        return "does not have this step"
    if save.aborted:
        return f"called off: {save.aborted}"
    own = _manifest.record_file(rank)
    problem = next((problem for problem in save.problems if own in problem), None)
    if problem is not None:
        looked.damaged = True
        return problem
    if rank in save.records:
        return "its record is of another plan"
    return "has no record of this rank"


# -- telling ---------------------------------------------------------------------------------------


def _object(
    looked: Looked,
    candidate: Candidate,
    shards: Sequence[Shard],
    passed_over: Mapping[str, str],
    notes: Sequence[str],
) -> dict[str, Any]:
    return {
        "run": looked.run,
        "step": candidate.name.step,
        "incarnation": candidate.name.incarnation,
        "id": candidate.whole[0],
        "size_bytes": candidate.size_bytes,
        "shards": [
            {
                "rank": shard.rank,
                "size_bytes": shard.size_bytes,
                "source": shard.source,
                "left_out_bytes": shard.left_out,
                "rejected": [
                    {"tier": label, "reason": why} for label, why in shard.rejected.items()
                ],
            }
            for shard in shards
        ],
        "passed_over": dict(passed_over),
        "silent": dict(looked.silent),
        "notes": list(notes),
    }


def _print(
    looked: Looked,
    candidate: Candidate,
    shards: Sequence[Shard],
    passed_over: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    from mtckpt._handle import size_text

    for note in notes:
        print_line(f"note: {note}")
    for label, why in looked.silent.items():
        print_line(f"tier {label} did not answer: {why}")
    for what, why in passed_over.items():
        print_line(f"passed over {what}: {why}")
    name = candidate.name
    print_line(
        f"{looked.run}: step {name.step} of incarnation {name.incarnation},"
        f" {size_text(candidate.size_bytes)} in {len(shards)} shard(s)"
    )
    rows = [
        (
            shard.rank,
            size_text(shard.size_bytes),
            shard.source + (f", {size_text(shard.left_out)} elsewhere" if shard.left_out else ""),
            "; ".join(f"{label}: {why}" for label, why in shard.rejected.items()),
        )
        for shard in shards
    ]
    print_table(("rank", "size", "from", "why not elsewhere"), rows, "rr  ")
