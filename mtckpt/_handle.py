"""What the user gets back about saves.

Knows values only: nothing here reads a file, asks an agent or waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One save that exists somewhere.

    ``tiers`` are the names of those that hold it, ``stages`` what that is worth, ``size_bytes`` the
    size of its shards in one tier. ``damaged`` has one line a fault; it is empty for a save that
    can be restored as far as its records tell.
    """

    step: int
    id: str
    tiers: tuple[str, ...] = ()
    stages: frozenset[str] = frozenset()
    size_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
