"""Which parts of a shard another save of its run has already, where a store can copy them itself.

Knows the digest tables of two shards. Equal layouts have equal offsets, so a range is the same if
all chunks that it touches have the same digests. Reads no data, and decides nothing about requests.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtckpt import _shard
from mtckpt._inventory import shard_keys
from mtckpt._source import read_record, read_small
from mtckpt.errors import FormatError, TierError

if TYPE_CHECKING:
    from mtckpt._manifest import SaveName
    from mtckpt._shard import ShardLayout, Table
    from mtckpt._source import OpenShard
    from mtckpt.tiers.base import Tier

__all__ = ["Same", "changed_ranges", "same_parts"]

logger = logging.getLogger(__name__)

Same = Callable[[int, int], "tuple[str, int] | None"]


def same_parts(
    tier: Tier, run_key: str, base: SaveName, rank: int, shard: OpenShard
) -> Same | None:
    """Says for a range of the shard's file where in ``tier`` its bytes are; None: nowhere known."""
    data_key, table_key, record_key = shard_keys(run_key, base, rank)
    try:
        record, _ = read_record(tier, record_key, base, rank)
        mine, other = shard.record.shard, record.shard
        if (mine.header_digest, mine.size_bytes) != (other.header_digest, other.size_bytes):
            return None
        table_data = read_small(tier, table_key, len(shard.table_data))
        if _shard.table_digest(table_data) != other.table_digest:
            return None
        table = _shard.Table.parse(table_data, shard.layout)
    except (FormatError, TierError) as error:
        # Whatever it is: the shard is sent whole then, which needs nobody else's.
        logger.info("%s: nothing of %s is used again: %s", tier.name, base, error.what)
        return None
    starts, stops = changed_ranges(shard.layout, shard.table, table)

    def same(start: int, stop: int) -> tuple[str, int] | None:
        after = bisect.bisect_right(stops, start)
        if after < len(starts) and starts[after] < stop:
            return None
        return data_key, start

    return same


def changed_ranges(layout: ShardLayout, table: Table, other: Table) -> tuple[list[int], list[int]]:
    """Starts and stops, in the file and in its order, of all chunks whose digests differ."""
    starts: list[int] = []
    stops: list[int] = []
    for tensor in layout.tensors:
        for begin in range(0, tensor.size_bytes, _shard.CHUNK_BYTES):
            chunk = tensor.first_chunk + begin // _shard.CHUNK_BYTES
            if table.digests[chunk] != other.digests[chunk]:
                starts.append(tensor.start + begin)
                stops.append(tensor.start + min(begin + _shard.CHUNK_BYTES, tensor.size_bytes))
    return starts, stops
