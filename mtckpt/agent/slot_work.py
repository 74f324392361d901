"""Commands about slots, and what comes of them: as ``work``, of which they are a part.

Nothing here moves bytes or decides anything.
"""

from __future__ import annotations

import msgspec

from mtckpt.agent.run_config import TierRef

__all__ = [
    "Allocate",
    "Free",
    "Freed",
    "LookAhead",
    "Looked",
    "Recycle",
    "Recycled",
    "SealSlot",
    "SealedSlot",
    "SlotFiles",
]


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """-> SlotFiles, or TierFull with nothing left behind. AlreadyExists: free that id first.
    Given again, it frees what the process that died had made of that id.

    The pages are reserved and charged to the agent, not faulted in: measured, that does not shorten
    the trainer's first capture, whose own page tables are what costs.
    """

    tier: TierRef
    run_key: str
    slot_id: str
    shard_bytes: int
    table_bytes: int


class SealSlot(msgspec.Struct, frozen=True, tag=True):
    """-> SealedSlot: the captured slot becomes the shard of ``rank`` in ``save``.

    ``verify`` reads all data (the owner is dead, or the agent was). Repeating a seal that
    succeeded is answered again. Damaged: the slot is freed and nothing is offered. AlreadyExists:
    another slot was sealed as this shard; both are unchanged. ObjectNotFound: no such slot.
    ``left`` as in ``protocol.Seal``: only these chunks are read, if nobody has looked ahead.
    """

    tier: TierRef
    run_key: str
    slot_id: str
    inode: int
    save: str
    rank: int
    verify: bool = False
    left: bytes = b""


class LookAhead(msgspec.Struct, frozen=True, tag=True):
    """-> Looked: which chunks of a slot that is given out have the digests in its table still.

    ``left`` are those to look at, a bit each: the next capture is likely to leave them as they are,
    and its seal need not read them then. That is known to this data process, until the next seal.
    """

    tier: TierRef
    run_key: str
    slot_id: str
    inode: int
    left: bytes


class Recycle(msgspec.Struct, frozen=True, tag=True):
    """-> Recycled: the shard stops being one and its files are slot ``slot_id``, not zeroed."""

    tier: TierRef
    run_key: str
    save: str
    rank: int
    slot_id: str


class Free(msgspec.Struct, frozen=True, tag=True):
    """-> Freed: the slot's files are gone. A slot that is not there is no error."""

    tier: TierRef
    run_key: str
    slot_id: str


class SlotFiles(msgspec.Struct, frozen=True, tag=True):
    """A slot and what a trainer opens. ``inode`` is the data file's; the record is empty."""

    slot_id: str
    inode: int
    data_path: str
    table_path: str
    record_path: str
    shard_bytes: int
    table_bytes: int


class SealedSlot(msgspec.Struct, frozen=True, tag=True):
    """What the record says. ``again``: it was sealed before. ``twins`` as in ``_twins``.
    ``left_bytes`` lay there before, and have been looked at."""

    save: str
    save_id: str
    step: int
    incarnation: int
    incarnation_id: str
    rank: int
    world_size: int
    size_bytes: int
    due: list[str] = []
    metrics: dict[str, float] = {}
    aborted: str = ""
    plan_digest: str = ""
    again: bool = False
    twins: dict[str, str] = {}
    left_bytes: int = 0


class Looked(msgspec.Struct, frozen=True, tag=True):
    """``sound`` counts the chunks."""

    sound: int = 0


class Recycled(msgspec.Struct, frozen=True, tag=True):
    """``files`` is None while a reader holds a lease; nothing was changed then."""

    files: SlotFiles | None


class Freed(msgspec.Struct, frozen=True, tag=True):
    freed_bytes: int
