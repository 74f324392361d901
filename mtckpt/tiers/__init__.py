"""Places that keep bytes under keys: the protocol, a directory, an object store, the wrappers."""

from __future__ import annotations

from mtckpt.tiers.base import (
    BytesSource,
    ObjectInfo,
    PutResult,
    Source,
    Survives,
    Tier,
    check_key,
    read_all,
)
from mtckpt.tiers.local import LocalTier
from mtckpt.tiers.object_store import ObjectStoreTier
from mtckpt.tiers.wrappers import DeadlineTier, MeteredTier, RetryingTier, ThrottledTier

__all__ = [
    "BytesSource",
    "DeadlineTier",
    "LocalTier",
    "MeteredTier",
    "ObjectInfo",
    "ObjectStoreTier",
    "PutResult",
    "RetryingTier",
    "Source",
    "Survives",
    "ThrottledTier",
    "Tier",
    "check_key",
    "read_all",
]
