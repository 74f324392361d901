"""What a data process found in a tier, as it tells the control process: saves, slots, runs.

Facts from records and files. Nothing here reads them, and nothing is decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mtckpt._manifest import Incarnation

if TYPE_CHECKING:
    from mtckpt._manifest import SaveEntry
    from mtckpt._slots import SlotFinding

__all__ = ["Roots", "RunScan", "SaveScan", "SlotScan", "save_scan", "slot_scan"]


class Roots(msgspec.Struct, frozen=True, tag=True):
    """Paths and root digests, in one order on all ranks; none if that is not what is there."""

    leaves: list[tuple[str, str]] = []


class SaveScan(msgspec.Struct, frozen=True):
    """One save in one tier. No ranks: a directory without a record, no save (yet, or any more).

    ``committed``: a store has its marker. ``saved_at_s`` is the writer's clock: for a rule in hours
    and for people, never for order. ``shard_bytes`` is in the order of ``ranks``. ``thin`` are the
    ranks of which there is only a copy that leaves something out.
    """

    save: str
    step: int
    incarnation: int
    ranks: list[int] = []
    world_size: int = 0
    complete: bool = False
    size_bytes: int = 0
    save_id: str = ""
    incarnation_id: str = ""
    due: list[str] = []
    metrics: dict[str, float] = {}
    reported: bool = False
    problems: list[str] = []
    aborted: str = ""
    saved_at_s: float = 0.0
    committed: bool = False
    shard_bytes: list[int] = []
    plan_digest: str = ""
    thin: list[int] = []


class SlotScan(msgspec.Struct, frozen=True):
    """One slot in the slots' directory. ``save`` is set where the capture is finished: the record
    parses, fits the sizes, and the table carries its generation; the data was not read."""

    slot_id: str
    inode: int
    shard_bytes: int
    table_bytes: int
    generation: int = 0
    save: str = ""
    save_id: str = ""
    rank: int = -1
    step: int = -1
    incarnation: int = 0
    due: list[str] = []


class RunScan(msgspec.Struct, frozen=True):
    """One run in one tier. ``repaired`` has a line for each thing that a crash had left."""

    run_key: str
    saves: list[SaveScan] = []
    incarnations: list[Incarnation] = []
    slots: list[SlotScan] = []
    repaired: list[str] = []
    problems: list[str] = []


def slot_scan(finding: SlotFinding) -> SlotScan:
    """One slot, as it travels."""
    slot, record = finding.slot, finding.record
    scan = SlotScan(
        slot.slot_id, slot.inode, slot.shard_bytes, slot.table_bytes, finding.generation
    )
    if record is None:
        return scan
    return msgspec.structs.replace(
        scan,
        save=str(record.name),
        save_id=record.save_id,
        rank=record.rank,
        step=record.step,
        incarnation=record.incarnation,
        due=list(record.due),
    )


def save_scan(save: SaveEntry) -> SaveScan:
    """One save, as it travels."""
    scan = SaveScan(
        save=str(save.name),
        step=save.name.step,
        incarnation=save.name.incarnation,
        ranks=sorted(save.records),
        complete=save.complete,
        size_bytes=save.size_bytes,
        metrics=save.metrics,
        reported=save.reported,
        problems=save.problems,
        aborted=save.aborted,
        committed=save.committed,
    )
    if not save.records:
        return scan
    first = save.records[min(save.records)]
    return msgspec.structs.replace(
        scan,
        world_size=first.world_size,
        save_id=first.save_id,
        incarnation_id=first.incarnation_id,
        due=list(first.due),
        saved_at_s=first.saved_at_s,
        shard_bytes=[record.shard.size_bytes for _, record in sorted(save.records.items())],
        plan_digest=first.plan_digest,
        thin=[rank for rank, record in sorted(save.records.items()) if record.left_out],
    )
