"""What an agent notes of a run in its files, for the next one on its node.

Knows what is left out: secrets. Does not write it, nor read it (``registry``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from mtckpt.agent import owners, work
from mtckpt.agent.owners import Owner, boot_id

if TYPE_CHECKING:
    from mtckpt.agent.nodes import Layout
    from mtckpt.agent.protocol import TierConfig
    from mtckpt.agent.runs import RunState

__all__ = ["config_of", "leaving_of", "left_s_of", "owner_of_note"]


def config_of(run: RunState) -> work.RunConfig:
    """What the next agent needs to know."""
    living = [_noted(o) for o in run.owners.values() if not o.dead]
    newest = run.incarnations.get(run.incarnation)
    return work.RunConfig(
        run.run,
        run.key,
        [_without_secrets(tier.config) for tier in run.tiers.values()],
        living,
        run.incarnation,
        newest.id if newest else "",
        {
            "left_s": run.left_s,
            "boot_id": boot_id(),
            "closing": run.closing,
            "token": run.token,
            "uid": run.creator_uid,
            "admitted": sorted(run.admitted),
            "unseen": [o.holder for o in run.owners.values() if not o.seen],
            "rank_here": min(run.layout.own) if run.layout else None,
            "failures": run.failures,
            "leaving": _agents(run.layout, run.leaving) if run.layout else [],
            "guests": run.all_guests(),
            "diverged": {name: s.diverged for name, s in run.saves.items() if s.diverged},
            "chosen": sorted(name for name, save in run.saves.items() if save.chosen),
            "fenced": msgspec.to_builtins([_noted(o) for o in run.fenced.values()]),
        },
    )


def left_s_of(config: work.RunConfig, now_s: float) -> float:
    """Since when nobody has had a run, as an agent before has noted: seconds after the start of
    this machine, so of another start, from which a disk has slots, they say nothing. Where somebody
    had it to the last, its agent and it have just died."""
    extra = config.extra
    if config.owners or not boot_id() or extra.get("boot_id") != boot_id():
        return now_s
    return min(now_s, float(extra.get("left_s") or now_s))


def leaving_of(layout: Layout, extra: Mapping[str, Any]) -> set[int]:
    """The other nodes that were about to go. One where another agent is by now is not: it stays."""
    noted = extra.get("leaving") or ()
    others = set(range(len(layout.nodes))) - {layout.here}
    return {number for number in others if _agents(layout, [number])[0] in noted}


def _agents(layout: Layout, numbers: Iterable[int]) -> list[str]:
    return [layout.nodes[number].address.agent_id for number in sorted(numbers)]


def _without_secrets(config: TierConfig) -> TierConfig:
    """What the next agent is told in a file; the rest comes with the next Checkpointer."""
    return msgspec.structs.replace(config, access=config.access.to_note())


def _noted(owner: Owner) -> work.Owner:
    return work.Owner(
        owner.holder,
        owner.rank,
        owner.pid,
        owner.start_ticks,
        owner.incarnation,
        owner.world_size,
        owner.parent_pid,
    )


def owner_of_note(noted: work.Owner, run: RunState, host: str) -> Owner:
    """The owner that was noted, as far as it is a process of this machine."""
    pidfd = owners.open_pidfd(noted.pid, noted.start_ticks)
    return Owner(
        noted.holder,
        noted.rank,
        noted.pid,
        noted.start_ticks,
        noted.parent_pid,
        host,
        run.creator_uid,
        noted.world_size,
        noted.incarnation,
        pidfd=-1 if pidfd is None else pidfd,
        absent=True,
    )
