"""Bugs to plant, one edit each, and the tests that are there to catch them.

Not a test file: ``test_planted_bugs`` plants them. ``text`` occurs exactly once in ``file``; a bug
whose text has gone is an error, so that the table ages with the code. Every test that ``caught_by``
names has to fail with the bug in, and to pass without it; few are named, and quick ones.
"""

from __future__ import annotations

import planted_in_agent as agent
import planted_in_devices as devices
import planted_in_format as format_
import planted_in_nodes as nodes
import planted_in_peers as peers
import planted_in_ranks as ranks
import planted_in_starts as starts
import planted_in_stores as stores
import planted_in_tiers as tiers
from planted_bug import Bug

__all__ = ["BUGS", "Bug"]

BUGS = (
    *format_.SHARD,
    *format_.RECORDS,
    *format_.INCARNATIONS,
    *format_.CAPTURE,
    *agent.SLOTS,
    *agent.ASKED,
    *agent.EMPTIED,
    *agent.FENCING,
    *agent.SECURITY,
    *agent.SCHEDULE,
    *agent.DEADLINES,
    *ranks.BOXES,
    *ranks.PLACEMENT,
    *ranks.NODES,
    *ranks.SHARES,
    *ranks.AGREEMENT,
    *peers.COPIES,
    *peers.TRANSFER,
    *peers.THIN,
    *peers.STRANGERS,
    *nodes.SAVES,
    *nodes.DECISIONS,
    *starts.LINE,
    *starts.GONE,
    *starts.ALIKE,
    *tiers.LOCAL_TIER,
    *tiers.TRANSFER,
    *tiers.RETENTION,
    *tiers.RESTORE,
    *stores.STORES,
    *devices.ORDER,
    *devices.LEFT,
    *devices.FAULTS,
)
