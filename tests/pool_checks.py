"""What tests of data processes ask: a pool, commands carried out here, a sealed slot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from shard_maker import RUN, Shard, fill_slot

from mtckpt._slots import Slot
from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

T = TypeVar("T")


def with_pool(body: Callable[[Pool], Awaitable[T]], log_path: Path | None = None) -> T:
    async def run() -> T:
        pool = Pool(log_path=log_path)
        try:
            return await asyncio.wait_for(body(pool), 40)
        finally:
            await pool.close()

    return asyncio.run(run())


def carry(command: work.Command) -> work.Result:
    """In this process: what a command does does not depend on where it runs."""
    carrier = Carrier()
    try:
        return carrier.carry(command, lambda _: None)
    finally:
        carrier.close()


def slot_of(files: work.Result) -> Slot:
    assert isinstance(files, work.SlotFiles)
    return Slot(
        files.slot_id,
        files.inode,
        files.shard_bytes,
        files.table_bytes,
        files.data_path,
        files.table_path,
        files.record_path,
    )


def staged(ram: work.TierRef, shard: Shard) -> Slot:
    slot = slot_of(carry(work.Allocate(ram, RUN, "a", len(shard.data), len(shard.table))))
    fill_slot(slot, shard)
    carry(work.SealSlot(ram, RUN, "a", slot.inode, str(shard.name), shard.rank))
    return slot
