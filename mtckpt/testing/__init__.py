"""For testing tiers, ours and yours: the suite every tier must pass, and faults to put around one.

``TierSuite`` needs pytest, and hypothesis for one of its tests; nothing else here does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mtckpt.testing.faults import CrashPoint, Fault, FaultyTier, Injected

if TYPE_CHECKING:
    from mtckpt.testing.tier_suite import TierSuite

__all__ = ["CrashPoint", "Fault", "FaultyTier", "Injected", "TierSuite"]

if "pytest" in sys.modules:
    # Before its import: asserts of the suite then say what differed, as those of a test do.
    sys.modules["pytest"].register_assert_rewrite("mtckpt.testing.tier_suite")


def __getattr__(name: str) -> object:
    if name != "TierSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtckpt.testing.tier_suite import TierSuite

    return TierSuite
