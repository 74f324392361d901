"""Opening the place that a command names: a directory or a store, with its cap on bytes.

Knows how a ``TierRef`` becomes a tier, and which of its bytes are capped. Does not know commands,
and keeps nothing open by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mtckpt._access import open_store
from mtckpt._run_files import RunFiles
from mtckpt._source import Place
from mtckpt.agent.queue import Limits
from mtckpt.errors import UsageError
from mtckpt.tiers.base import Survives
from mtckpt.tiers.local import LocalTier

if TYPE_CHECKING:
    from mtckpt.agent import work
    from mtckpt.tiers.base import Tier

__all__ = ["close_place", "open_place", "without_cap"]


def open_place(ref: work.TierRef) -> tuple[Place, RunFiles | None]:
    """The tier, and where it is a directory the hidden files of its runs."""
    if ref.kind == "store":
        ref.access.use_environment()
        timeout_s = Limits.from_environment().call_timeout_s
        store = open_store(
            ref.path,
            ref.access,
            name=ref.label or ref.kind,
            timeout_s=timeout_s,
            max_bytes_per_s=ref.bytes_per_s or None,
        )
        return Place(store, store), None
    if ref.kind == "peers":
        raise UsageError("that is no place of this node", state="nothing was done")
    in_memory = ref.kind == "ram"
    local = LocalTier(
        ref.path,
        name=ref.label or ref.kind,
        survives=Survives.PROCESS if in_memory else Survives.PROCESS | Survives.POWER,
        sync=not in_memory,
        group_access=ref.group_access,
    )
    files = RunFiles(local, group_access=ref.group_access)
    return Place(local, _through(local, ref), in_memory), files


def without_cap(ref: work.TierRef) -> work.TierRef:
    """For what is fetched: somebody waits for it, and does not train meanwhile."""
    return msgspec.structs.replace(ref, bytes_per_s=0)


def _through(tier: Tier, ref: work.TierRef) -> Tier:
    if not ref.bytes_per_s:
        return tier
    from mtckpt.tiers.wrappers import ThrottledTier

    return ThrottledTier(tier, bytes_per_s=ref.bytes_per_s)


def close_place(place: Place, files: RunFiles | None) -> None:
    place.through.close()
    place.tier.close()
    if files is not None:
        files.close()
