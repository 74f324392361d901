"""For testing tiers, ours and yours: the suite every tier must pass, and faults to put around one.

``TierSuite`` needs pytest, and hypothesis for one of its tests; nothing else here does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtckpt.testing.faults import CrashPoint, Fault, FaultyTier, Injected

if TYPE_CHECKING:
    from mtckpt.testing.tier_suite import TierSuite

__all__ = ["CrashPoint", "Fault", "FaultyTier", "Injected", "TierSuite"]


def __getattr__(name: str) -> object:
    if name != "TierSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # Before the import: asserts of the suite then say what differed, as those of a test do.
    pytest.register_assert_rewrite("mtckpt.testing.tier_suite")
    from mtckpt.testing.tier_suite import TierSuite

    return TierSuite
