"""``mtckpt status``, ``rm`` and ``agent``: what goes through the node agent."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import (
    confirmed,
    json_option,
    print_json,
    print_line,
    print_removed,
    print_table,
    reporting,
)
from mtckpt.cli._target import agent_status, closed_run, directories_of
from mtckpt.errors import AgentUnavailable, StepNotFound, UsageError

if TYPE_CHECKING:
    from mtckpt.agent.protocol import AgentStatus, RunStatus, TierStatus

__all__ = ["agent", "rm", "status"]

_WATCH_S = 1.0
_STOPPED_S = 10.0
_REMOVE_TIMEOUT_S = 300.0


@click.command(short_help="Show what each tier holds and owes.")
@click.argument("run", required=False)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@json_option
@reporting
def status(run: str | None, watch: bool, as_json: bool) -> int:
    """Show what each tier of each run holds and owes, as the agent of this node sees it.

    Exit status 1 if a tier has a problem.
    """
    if watch and as_json:
        raise UsageError("--watch and --json exclude each other", state="nothing was asked")
    while True:
        found = agent_status()
        runs = _runs(found, run)
        if watch and sys.stdout.isatty():
            click.clear()
        if as_json:
            print_json(_status_object(found, runs))
        else:
            _print_status(found, runs)
        if not watch:
            return _output.WRONG if any(t.problem for r in runs for t in r.tiers) else _output.FINE
        sys.stdout.flush()
        time.sleep(_WATCH_S)


def _runs(found: AgentStatus | None, run: str | None) -> list[RunStatus]:
    """The runs asked for. Raises StepNotFound for a name that the agent does not know."""
    from mtckpt._manifest import run_key

    runs = list(found.runs) if found is not None else []
    if run is None:
        return runs
    named = [known for known in runs if known.run == run]
    if not named and (closed := closed_run(run)):
        places = [f"{tier.path.rstrip('/')}/{run_key(run)}" for tier in closed[0].tiers]
        raise StepNotFound(
            f"{run} is closed: no agent holds it any more",
            state="nothing was done",
            actions=[
                f"see what is left of it: mtckpt ls {run}",
                f"let its older steps go: mtckpt prune {run} --keep 3",
                *(f"or delete all of it: {_deletion(place)}" for place in places),
            ],
            run=run,
        )
    if not named:
        why = "the agent of this node does not know it" if found else "no agent runs on this node"
        raise StepNotFound(
            f"no run {run!r}: {why}",
            state="nothing was done",
            actions=[
                f"runs that it knows: {', '.join(known.run for known in runs) or 'none'}",
                *directories_of(run),
            ],
            run=run,
        )
    return named


def _deletion(place: str) -> str:
    return f"{place}, with the store's own tools" if "://" in place else f"rm -r {place}"


def _status_object(found: AgentStatus | None, runs: list[RunStatus]) -> dict[str, Any]:
    import msgspec

    if found is None:
        return {"agent": None, "runs": []}
    facts = msgspec.to_builtins(found)
    del facts["runs"]
    facts["protocol"] = facts.pop("version")
    return {"agent": facts, "runs": msgspec.to_builtins(runs)}


def _print_status(found: AgentStatus | None, runs: list[RunStatus]) -> None:
    if found is None:
        print_line("no agent runs on this node; the first Checkpointer starts one")
        return
    bounded = f"; bounded by {found.bounded_by}" if found.bounded_by else ""
    print_line(
        f"agent {found.pid} on {found.host}: {found.mode}, mtckpt {found.mtckpt},"
        f" up {_age(found.uptime_s)}{bounded}"
    )
    if found.draining:
        print_line(f"nothing new is taken: {found.draining}")
    if not runs:
        print_line("no runs")
    for run in runs:
        owner = f"process {run.owner_pid}" if run.owner_alive else "nobody"
        print_line(f"\n{run.run}: incarnation {run.incarnation}, owned by {owner}")
        rows = [_tier_row(tier) for tier in run.tiers]
        print_table(("tier", "newest", "age", "steps", "size", "owes", "", "path"), rows, " rrrr")
        slots = [
            f"{slot.state} {slot.step if slot.step is not None else ''}".strip()
            for slot in run.slots
        ]
        if slots:
            print_line(f"slots: {', '.join(slots)}")
        if run.counters:
            print_line("counts: " + ", ".join(f"{k} {v}" for k, v in sorted(run.counters.items())))


def _tier_row(tier: TierStatus) -> tuple[object, ...]:
    from mtckpt._handle import size_text

    doing = tier.problem or (f"nothing is deleted: {tier.not_deleted}" if tier.not_deleted else "")
    doing = doing or ("commits there are not atomic (weak)" if tier.weak else "")
    if not doing and tier.total_bytes > tier.done_bytes:
        share = 100 * tier.done_bytes // tier.total_bytes
        doing = f"{share} % at {size_text(tier.bytes_per_s)}/s"
    return (
        tier.label,
        "-" if tier.newest_step is None else tier.newest_step,
        "-" if tier.newest_age_s is None else _age(tier.newest_age_s),
        len(tier.steps),
        size_text(tier.size_bytes),
        ", ".join(f"step {step}" for step in tier.owed) or "nothing",
        doing,
        tier.path,
    )


def _age(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.0f} s"


@click.command(short_help="Delete a run, or one step of it.")
@click.argument("run")
@click.option("--step", type=int, help="Only this step. Default: the whole run.")
@click.option("--tier", "tiers", multiple=True, help="Only this tier (ram, disk, ...); repeatable.")
@click.option(
    "--beside",
    "disk_path",
    type=click.Path(),
    help="Only the slots that containers which are gone have left beside this Disk.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@reporting
def rm(
    run: str,
    step: int | None,
    tiers: tuple[str, ...],
    disk_path: str | None,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete a run, or one step of it, from all of its tiers: RAM slots and files on disk.

    With the whole run goes what containers that are gone have left of it beside its disks.

    Exit status 1 if something was kept since it is in use.
    """
    from mtckpt._places import is_location
    from mtckpt.cli._beside import remove_left

    if is_location(run) or "://" in run:
        raise UsageError(
            f"rm takes the name of a run, and {run} is a place",
            state="nothing was removed",
            actions=(f"a directory that no job uses can be deleted: rm -r {run}",),
        )
    if disk_path is not None:
        if step is not None or tiers:
            raise UsageError(
                "--beside goes with neither --step nor --tier", state="nothing was removed"
            )
        return remove_left(run, disk_path, yes=yes, as_json=as_json)
    known = _runs(_agent_that_knows(run), run)[0]
    unknown = set(tiers) - {tier.label for tier in known.tiers}
    if unknown:
        raise UsageError(
            f"the run has no tier {', '.join(sorted(unknown))}",
            state="nothing was removed",
            actions=[f"tiers that it has: {', '.join(tier.label for tier in known.tiers)}"],
        )
    if not yes and not _confirmed(known, step, tiers, as_json=as_json):
        print_line("nothing was removed", err=True)
        return _output.WRONG
    return _remove(known, step, tiers, as_json=as_json)


def _agent_that_knows(run: str) -> AgentStatus | None:
    """The running agent's status; one is started if none runs, since it finds what RAM holds."""
    from mtckpt._manifest import run_key
    from mtckpt.agent.client import agent_client
    from mtckpt.agent.protocol import Changes
    from mtckpt.agent.spawn import ensure_agent

    found = agent_status()
    if found is not None:
        return found
    ensure_agent()
    with agent_client() as client, contextlib.suppress(AgentUnavailable):
        # Unlike /status this waits until the new agent has looked at what an earlier one left.
        client.call(f"/v1/runs/{run_key(run)}/changes?since=0&timeout_s=0", None, Changes)
    return agent_status()


def _confirmed(
    known: RunStatus, step: int | None, tiers: tuple[str, ...], *, as_json: bool
) -> bool:
    from mtckpt._handle import size_text

    what = f"step {step}" if step is not None else "all steps"
    lines = [f"delete {what} of {known.run} from:"]
    for tier in known.tiers:
        if not tiers or tier.label in tiers:
            held = f"{len(tier.steps)} steps, {size_text(tier.size_bytes)}"
            lines.append(f"  {tier.label:<8}{tier.path} ({held})")
    return confirmed(lines, as_json=as_json)


def _remove(known: RunStatus, step: int | None, tiers: tuple[str, ...], *, as_json: bool) -> int:
    from mtckpt._manifest import run_key
    from mtckpt.agent.client import agent_client
    from mtckpt.agent.protocol import Remove, Removed
    from mtckpt.cli._beside import delete_left

    with agent_client() as client:
        path = f"/v1/runs/{run_key(known.run)}/rm"
        answer = client.call(path, Remove(step, list(tiers)), Removed, _REMOVE_TIMEOUT_S)
    if step is not None and not answer.removed and not answer.kept:
        raise StepNotFound(
            f"no tier has step {step} of {known.run}",
            state="nothing was removed",
            step=step,
            run=known.run,
        )
    removed, kept = list(answer.removed), list(answer.kept)
    if step is None and not kept and (not tiers or "ram" in tiers):
        for tier in known.tiers:
            if tier.kind == "disk":
                more, also_kept = delete_left(run_key(known.run), tier.path)
                removed, kept = removed + more, kept + also_kept
    return print_removed(known.run, removed, kept, as_json=as_json)


@click.group(short_help="Run the node agent, ask how it is, stop it.")
def agent() -> None:
    """Run the node agent as a service, ask how it is, empty its node, or stop it."""


@agent.command("run", short_help="Be the agent of this node until stopped.")
@click.option("--group", help="Serve the members of this group as well, not only this user.")
@click.option(
    "--runtime-dir",
    type=click.Path(file_okay=False),
    help="Where its socket, pid file and log lie. Default: MTCKPT_RUNTIME_DIR, else /run/mtckpt.",
)
@click.option(
    "--grace",
    "grace_s",
    type=float,
    help="Seconds from SIGTERM to its end: it drains meanwhile. Default: MTCKPT_GRACE_S, else 25.",
)
@json_option
@reporting
def agent_run(
    group: str | None, runtime_dir: str | None, grace_s: float | None, as_json: bool
) -> int:
    """Be the agent of this node until stopped: for systemd, Kubernetes or Slurm.

    Without a service, the first Checkpointer on a node starts an agent by itself.
    """
    from mtckpt.agent.life import run_service

    if grace_s is not None and not 0 <= grace_s <= 86400:
        raise UsageError("--grace must be 0 to 86400 seconds", state="nothing was started")
    code = run_service(runtime_dir, group, grace_s)
    if as_json:
        print_json({"exit_code": code})
    sys.stdout.flush()
    # Without the interpreter's own end: it would wait for threads that ask a node which is silent.
    os._exit(code)


@agent.command("health", short_help="Ask whether the agent answers.")
@click.option("--ready", is_flag=True, help="Also: it has read what an earlier agent left.")
@click.option("--timeout", "timeout_s", default=5.0, show_default=True, help="Seconds to wait.")
@json_option
@reporting
def agent_health(ready: bool, timeout_s: float, as_json: bool) -> int:
    """Ask whether the agent answers: for the probes of Kubernetes and other supervisors.

    Exit status 1 if it does not, or not yet. It says nothing of tiers: that is `mtckpt status`.
    """
    from mtckpt.agent.client import agent_client
    from mtckpt.agent.protocol import Done

    if not 0 < timeout_s <= 3600:
        raise UsageError("--timeout must be above 0, to 3600 seconds", state="nothing was asked")
    with agent_client(timeout_s) as client:
        detail = client.call("/readyz" if ready else "/healthz", None, Done).detail
    if as_json:
        print_json({"healthy": True, "detail": detail})
    else:
        print_line(detail)
    return _output.FINE


def _has_agent_for_what_is_left(cancel: bool) -> bool:
    """Start an agent where one that was killed has left something in memory, and have the next one
    know that the node stays."""
    import asyncio

    from mtckpt.agent.address import find
    from mtckpt.agent.drains import Note
    from mtckpt.agent.owners import boot_id
    from mtckpt.agent.protocol import ram_base
    from mtckpt.agent.roots import Roots
    from mtckpt.agent.spawn import ensure_agent

    directory = find().directory
    if cancel:
        Note(directory, boot_id()).remove()
        return False
    if not asyncio.run(Roots(directory, ram_base()).may_have_runs()):
        return False
    ensure_agent()
    return True


@agent.command("drain", short_help="Bring away what this node's memory holds.")
@click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds it may take."
)
@click.option("--cancel", is_flag=True, help="The node stays after all: take new work again.")
@json_option
@reporting
def agent_drain(timeout_s: float, cancel: bool, as_json: bool) -> int:
    """Say that this node is about to go away: what its memory holds is brought elsewhere.

    The newest step goes to every tier whatever its rhythm, and where a run keeps no copies, to the
    memory of another node; so does what is held here for nodes that are gone. Meanwhile and after,
    the agent serves what it has and begins nothing new: saves are called off with that reason.

    Where no agent runs, and one that was killed has left something, another one is started for it.
    Exit status 1 if the loss of this node would still take something along.
    """
    from mtckpt.agent.client import agent_client
    from mtckpt.agent.drains import Drain, Drained

    if not 0 <= timeout_s <= 86400:
        raise UsageError("--timeout must be 0 to 86400 seconds", state="nothing was drained")
    drained = Drained(True)
    is_there = agent_status() is not None or _has_agent_for_what_is_left(cancel)
    if is_there:
        with agent_client(timeout_s + 10.0) as client:
            drained = client.call("/v1/drain", Drain(timeout_s, cancel), Drained)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(drained))
        return _output.FINE if drained.safe else _output.WRONG
    for run in drained.runs:
        print_line(f"{run.run}: {run.detail}")
        for why in run.lacking:
            print_line(f"  {why}")
    said = "safe to go" if drained.safe else "not safe to go"
    if not is_there:
        said = "no agent ran: nothing is in memory that it could bring away"
    print_line("the node stays" if cancel else said)
    return _output.FINE if drained.safe else _output.WRONG


@agent.command("stop")
@click.option("--drain", is_flag=True, help="First finish what is owed to slower tiers.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to drain.")
@json_option
@reporting
def agent_stop(drain: bool, timeout_s: float, as_json: bool) -> int:
    """Stop the agent that this user's jobs use. What it holds stays: the next one goes on.

    The node stays: before that goes, `mtckpt agent drain`.
    """
    from mtckpt.agent.client import agent_client
    from mtckpt.agent.protocol import Done, Stop

    if not 0 <= timeout_s <= 86400:
        raise UsageError("--timeout must be 0 to 86400 seconds", state="nothing was stopped")
    before = agent_status()
    detail = "no agent ran"
    if before is not None:
        with agent_client(timeout_s + 10.0) as client:
            detail = client.call("/v1/stop", Stop(drain, timeout_s), Done).detail
        _wait_until_gone(before)
    if as_json:
        print_json({"stopped": before is not None, "detail": detail})
    else:
        print_line(f"stopped agent {before.pid}" if before else detail)
        if before and detail:
            print_line(detail)
    return _output.FINE


def _wait_until_gone(before: AgentStatus) -> None:
    deadline_s = time.monotonic() + _STOPPED_S
    while time.monotonic() < deadline_s:
        try:
            now = agent_status()
        except AgentUnavailable:
            now = None  # It closed the connection on its way out.
        if now is None or now.agent_id != before.agent_id:
            return
        time.sleep(0.05)
    raise AgentUnavailable(
        f"agent {before.pid} said that it stops, and still runs",
        actions=[f"look at it: ps -fp {before.pid}"],
        pid=before.pid,
        timeout_s=_STOPPED_S,
    )
