"""Where a run's bytes lie and who owns it: what commands name, and what is kept for the next agent.

Plain structs. Nothing here moves bytes, talks or decides.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mtckpt._access import Access
from mtckpt.agent.protocol import TierConfig
from mtckpt.errors import UsageError

__all__ = [
    "PULLING",
    "RUN_CONFIG_VERSION",
    "Owner",
    "RunConfig",
    "ServedRun",
    "TierRef",
    "ref_of",
]

RUN_CONFIG_VERSION = 1


class TierRef(msgspec.Struct, frozen=True):
    """A tier by its place. ``label`` is the name in its errors; ``bytes_per_s`` 0 is no limit."""

    kind: Literal["ram", "disk", "peers", "store"]
    path: str
    group_access: bool = False
    label: str = ""
    bytes_per_s: int = 0
    access: Access = Access()


# The data process that receives: one that waits for a network holds up nothing else.
PULLING = TierRef("peers", "pull", label="peers")


def ref_of(config: TierConfig, store_bytes_per_s: float, *, group_access: bool) -> TierRef:
    """Where a slower tier is that a job has named. Raises UsageError."""
    if config.kind == "disk":
        return TierRef("disk", config.path, group_access, config.label)
    if config.kind == "store":
        return TierRef(
            "store", config.path, label=config.label,
            bytes_per_s=int(store_bytes_per_s), access=config.access,
        )  # fmt: skip
    if config.kind == "peers":
        return msgspec.structs.replace(PULLING, label=config.label)
    raise UsageError(f"this agent knows no tier of kind {config.kind!r}")


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
