"""Which ranks make up the job. This version knows jobs of one rank and refuses the others.

Knows the environment that launchers set. Does not talk to anybody.
"""

from __future__ import annotations

import os

from mtckpt.errors import GroupMissing

__all__ = ["check_single"]


def check_single(group: object) -> None:
    """Raise GroupMissing for a job of several ranks: never N single runs under one name."""
    text = os.environ.get("WORLD_SIZE", "1")
    world_size = int(text) if text.isdigit() else 1
    if world_size > 1 or group is not None:
        raise GroupMissing(
            f"the launcher says that this job has {world_size} ranks, and this version of mtckpt"
            " saves jobs of one rank",
            world_size=world_size,
            state="nothing was done",
            actions=("run with one rank for now",),
        )
