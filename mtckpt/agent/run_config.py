"""Where a run's bytes lie and who owns it: what commands name, and what is kept for the next agent.

Plain structs. Nothing here moves bytes, talks or decides.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mtckpt._access import Access
from mtckpt.agent.protocol import TierConfig

__all__ = ["RUN_CONFIG_VERSION", "Owner", "RunConfig", "ServedRun", "TierRef"]

RUN_CONFIG_VERSION = 1


class TierRef(msgspec.Struct, frozen=True):
    """A tier by its place. ``label`` is the name in its errors; ``bytes_per_s`` 0 is no limit."""

    kind: Literal["ram", "disk", "peers", "store"]
    path: str
    group_access: bool = False
    label: str = ""
    bytes_per_s: int = 0
    access: Access = Access()


class Owner(msgspec.Struct, frozen=True):
    """One Checkpointer of a run, as the next agent needs to know it."""

    holder: str
    rank: int
    pid: int
    start_ticks: int
    incarnation: int = 0
    world_size: int = 1
    parent_pid: int = 0


class RunConfig(msgspec.Struct, frozen=True):
    """What an agent must know of a run to go on where another stopped. Kept in the RAM tier.

    ``extra`` belongs to the control process alone.
    """

    run: str
    run_key: str
    tiers: list[TierConfig] = []
    owners: list[Owner] = []
    incarnation: int = 0
    incarnation_id: str = ""
    extra: dict[str, Any] = {}
    version: int = RUN_CONFIG_VERSION


class ServedRun(msgspec.Struct, frozen=True):
    """What other nodes may read of a run if they know its secret (hexadecimal): these places.

    ``lent`` are other runs there that they may read too: their user asked for that on this node.
    """

    run_key: str
    secret: str
    places: list[TierRef] = []
    lent: list[str] = []

    def __repr__(self) -> str:
        return f"ServedRun({self.run_key!r}, ...)"
