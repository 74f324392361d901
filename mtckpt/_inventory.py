"""What a tier holds of a run, read from its records: saves, incarnations, later metrics.

Knows keys (``run/save/file``) and how records are joined into saves. Reads small files only; the
bytes of shards are checked elsewhere. Never believes a name: a record that says another step,
save or rank than the place it lies in is a problem of that save, not a save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mtckpt import _manifest
from mtckpt._manifest import Incarnation, Metrics, Record, SaveEntry, SaveName
from mtckpt.errors import FormatError, ObjectNotFound, ShortRead
from mtckpt.tiers.base import Tier, read_all

__all__ = ["Inventory", "incarnation_key", "save_key", "scan", "shard_keys"]


@dataclass(slots=True)
class Inventory:
    """One tier's saves of one run, by name, and the incarnations it knows."""

    tier: str
    saves: dict[SaveName, SaveEntry] = field(default_factory=dict)
    incarnations: list[Incarnation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def save_key(run_key: str, name: SaveName, file: str) -> str:
    return f"{run_key}/{name}/{file}"


def shard_keys(run_key: str, name: SaveName, rank: int) -> tuple[str, str, str]:
    """Data, table and record, in the order in which they are put: the record last."""
    return (
        save_key(run_key, name, _manifest.shard_file(rank)),
        save_key(run_key, name, _manifest.table_file(rank)),
        save_key(run_key, name, _manifest.record_file(rank)),
    )


def incarnation_key(run_key: str, incarnation: Incarnation) -> str:
    return f"{run_key}/{_manifest.incarnation_file(incarnation.number, incarnation.id)}"


def scan(tier: Tier, run_key: str, *, label: str | None = None) -> Inventory:
    """Read every record of a run. Damaged ones are listed as problems; TierError is the tier's."""
    inventory = Inventory(label or tier.name)
    sizes: dict[tuple[SaveName, str], int] = {}
    records: list[tuple[SaveName, int, str]] = []
    for info in tier.list(f"{run_key}/"):
        parts = info.key.split("/")
        if len(parts) == 2 and _manifest.parse_incarnation_file(parts[1]) is not None:
            _read_incarnation(tier, info.key, inventory)
        if len(parts) != 3 or (name := SaveName.parse(parts[1])) is None:
            continue
        sizes[name, parts[2]] = info.size_bytes
        inventory.saves.setdefault(name, SaveEntry(name, inventory.tier))
        if (rank := _manifest.parse_record_file(parts[2])) is not None:
            records.append((name, rank, info.key))
        elif parts[2].startswith("metrics-"):
            _read_metrics(tier, info.key, inventory.saves[name])
    for name, rank, key in records:
        _read_record(tier, key, rank, inventory.saves[name], sizes)
    return inventory


def _read_incarnation(tier: Tier, key: str, inventory: Inventory) -> None:
    try:
        data = read_all(tier, key, max_bytes=_manifest.MAX_SMALL_BYTES)
        inventory.incarnations.append(_manifest.decode_sealed(data, Incarnation))
    except ObjectNotFound:
        return
    except (FormatError, ShortRead) as error:
        inventory.problems.append(f"{key}: {error.what}")


def _read_metrics(tier: Tier, key: str, save: SaveEntry) -> None:
    try:
        data = read_all(tier, key, max_bytes=_manifest.MAX_SMALL_BYTES)
        save.metrics.update(_manifest.decode_sealed(data, Metrics).metrics)
    except ObjectNotFound:
        return
    except (FormatError, ShortRead) as error:
        save.problems.append(f"{key}: {error.what}")


def _read_record(
    tier: Tier,
    key: str,
    rank: int,
    save: SaveEntry,
    sizes: dict[tuple[SaveName, str], int],
) -> None:
    try:
        data = read_all(tier, key, max_bytes=_manifest.MAX_RECORD_BYTES)
        record = _manifest.decode_sealed(data, Record)
    except ObjectNotFound:
        return
    except (FormatError, ShortRead) as error:
        save.problems.append(f"{key}: {error.what}")
        return
    name = _manifest.save_name(record.step, record.incarnation, record.save_id)
    if name != save.name or record.rank != rank:
        save.problems.append(f"{key}: the record is of {name} rank {record.rank}")
        return
    size_bytes = sizes.get((name, _manifest.shard_file(rank)))
    if not record.aborted and size_bytes != record.shard.size_bytes:
        save.problems.append(
            f"{key}: shard has {size_bytes} bytes where the record says {record.shard.size_bytes}"
        )
        return
    save.records[rank] = record
    for metric, value in record.metrics.items():
        save.metrics.setdefault(metric, value)


def all_incarnations(inventories: Iterable[Inventory]) -> list[Incarnation]:
    """Every incarnation that any tier knows, once each."""
    found = {(i.number, i.id): i for inv in inventories for i in inv.incarnations}
    return [found[key] for key in sorted(found)]
