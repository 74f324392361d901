"""What a TARGET means: a location, or a run whose places this node's agent knows.

Reads directories and asks the agent for its status; starts no agent and writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtckpt.errors import AgentUnavailable, StepNotFound, TierError, UsageError

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._places import Place
    from mtckpt.agent.known_runs import KnownRun
    from mtckpt.agent.protocol import AgentStatus, RunStatus

__all__ = ["Found", "agent_status", "closed_run", "directories_of", "find", "parse_step"]

STATUS_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Found:
    """Runs by name, each with the places that hold it, fastest first. ``notes`` are for people.

    ``keep`` has the rules of tiers, by label, where the agent told them.
    """

    runs: dict[str, list[Place]] = field(default_factory=dict)
    keep: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, place: Place, inventory: Inventory | None = None) -> None:
        """Under the name that its records give, else under that of its directory."""
        self.runs.setdefault(_run_name(place, inventory or place.scan()), []).append(place)


@contextlib.contextmanager
def find(target: str | None, *, writable: bool = False) -> Iterator[Found]:
    """The places of a target, open for the block; of everything this node has for None.

    ``writable`` allows to delete there.
    """
    from mtckpt._places import is_location

    found = Found()
    try:
        if target is not None and ("://" in target or is_location(target)):
            _at_location(target, found, writable=writable)
        else:
            _of_run(target, found, writable=writable)
        yield found
    finally:
        for places in found.runs.values():
            for place in places:
                place.close()


def _at_location(location: str, found: Found, *, writable: bool) -> None:
    from mtckpt import _foreign, _probe
    from mtckpt._places import open_places

    for place in open_places(location, _probe.tier_label(location), writable=writable):
        found.add(place)
    if not found.runs:
        found.notes += _foreign.hints(location)


def _of_run(run: str | None, found: Found, *, writable: bool) -> None:
    from mtckpt._manifest import run_key

    status = agent_status()
    known: Sequence[RunStatus | KnownRun] = status.runs if status is not None else ()
    if status is None:
        _without_agent(run, found)
    if run is None and not known:
        found.notes.append("closed runs lie in their directories alone: mtckpt ls ./checkpoints")
    if run is not None and not any(run in (each.run, run_key(each.run)) for each in known):
        known = closed_run(run)
        if known:
            found.notes.append(f"{run} is closed: looked where its tiers were")
    for each in known:
        if run is None or run in (each.run, run_key(each.run)):
            for tier in each.tiers:
                where = f"{tier.path.rstrip('/')}/{run_key(each.run)}"
                _add(where, tier.label, each.run, found, writable=writable)
                found.keep[tier.label] = tier.keep
    if run is not None and not found.runs:
        raise _unknown(run, status, known)


def closed_run(run: str) -> list[KnownRun]:
    """Where a run was that no agent holds any more, if that was noted on this node."""
    from mtckpt._manifest import run_key
    from mtckpt.agent import known_runs
    from mtckpt.agent.address import find as find_agent

    noted = known_runs.read(find_agent().directory)
    return [each for each in noted if run in (each.run, run_key(each.run))]


def _unknown(
    run: str, status: AgentStatus | None, known: Sequence[RunStatus | KnownRun]
) -> StepNotFound:
    from mtckpt._manifest import run_key
    from mtckpt.agent.protocol import ram_base

    named = [each for each in known if run in (each.run, run_key(each.run))]
    places = [tier.path for each in named for tier in each.tiers]
    if places:
        return StepNotFound(
            f"run {run!r} has no step in its tiers",
            state="nothing was read",
            actions=[f"looked into {place}" for place in places],
            run=run,
        )
    actions = directories_of(run)
    if status is None:
        what = f"no agent runs on this node, and RAM has nothing of a run {run!r}"
        return StepNotFound(
            what, state="nothing was read", actions=actions, run=run, path=ram_base()
        )
    names = ", ".join(each.run for each in status.runs) or "none"
    return StepNotFound(
        f"the agent of this node does not know a run {run!r}",
        state="nothing was read",
        actions=[f"runs that it knows: {names}", *actions],
        run=run,
    )


def directories_of(name: str) -> list[str]:
    """What to do where no run has this name: it may be that of a directory, or of a run in one."""
    from mtckpt._manifest import run_key

    usual = (name, os.path.join("checkpoints", run_key(name)))
    there = [f"./{path}" for path in usual if os.path.isdir(path)]
    return [
        f"there is a directory, named with a /: mtckpt ls {shlex.quote(each)}" for each in there
    ] or ["the directory of a run can be named, with a /: mtckpt ls ./checkpoints/RUN"]


def _without_agent(run: str | None, found: Found) -> None:
    """Nobody to ask: what this user has in RAM can be seen all the same."""
    from mtckpt._manifest import run_key
    from mtckpt._places import open_places
    from mtckpt.agent.protocol import ram_base

    base = ram_base()
    found.notes.append(f"no agent runs on this node: looked only into {base}")
    if run is not None:
        _add(os.path.join(base, run_key(run)), "ram", run, found)
    elif os.path.isdir(base):
        for place in open_places(base, "ram"):
            found.add(place)


def _add(path: str, label: str, run: str, found: Found, *, writable: bool = False) -> None:
    from mtckpt._places import open_places

    if "://" not in path and not os.path.isdir(path):
        return
    try:
        found.runs.setdefault(run, []).extend(open_places(path, label, writable=writable))
    except TierError as error:
        found.notes.append(f"tier {label} could not be read: {error.what}")


def _run_name(place: Place, inventory: Inventory) -> str:
    for save in inventory.saves.values():
        for record in save.records.values():
            return record.run
    for incarnation in inventory.incarnations:
        return incarnation.run
    return place.name


def agent_status() -> AgentStatus | None:
    """What the agent of this node says, or None if none runs."""
    from mtckpt.agent.address import find as find_agent
    from mtckpt.agent.client import AgentClient
    from mtckpt.agent.protocol import AgentStatus

    path = find_agent().socket_path
    if not os.path.exists(path):
        return None
    with AgentClient(path, STATUS_TIMEOUT_S) as client:
        try:
            return client.call("/status", None, AgentStatus)
        except AgentUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                return None
            raise


def parse_step(text: str | None) -> int | str:
    """``--step``: a number, the id of a save, or "latest"."""
    if text is None:
        return "latest"
    if text.isdecimal() and len(text) <= 13 and text.isascii():
        return int(text)
    if not text:
        raise UsageError("--step is empty", state="nothing was read")
    return text
