"""What a tier holds of a run, read from its records: saves, incarnations, later metrics.

Knows keys (``run/save/file``) and how records are joined into saves. Reads small files only; the
bytes of shards are checked elsewhere. Never believes a name: a record that says another step,
save or rank than the place it lies in is a problem of that save, not a save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from xxhash import xxh3_128_hexdigest

from mtckpt import _commit, _manifest, _shard
from mtckpt._manifest import Incarnation, Manifest, Metrics, Record, SaveEntry, SaveName
from mtckpt._shard import ShardLayout, Table
from mtckpt.errors import (
    CheckpointError,
    Damaged,
    FormatError,
    ObjectNotFound,
    RunLocked,
    ShortRead,
    TierUnavailable,
)
from mtckpt.tiers.base import ObjectInfo, Tier, read_all

__all__ = [
    "Inventory",
    "check_identity",
    "check_newest",
    "check_record",
    "has_leases",
    "incarnation_key",
    "incarnation_line",
    "line_of",
    "merged",
    "read_manifest",
    "read_record",
    "save_key",
    "scan",
    "scan_save",
    "shard_keys",
]


# Requests under way at once where a tier is asked for many small objects.
_READERS = 16


@dataclass(slots=True)
class Inventory:
    """One tier's saves of one run, by name, and the incarnations it knows."""

    tier: str
    saves: dict[SaveName, SaveEntry] = field(default_factory=dict)
    incarnations: list[Incarnation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def has_leases(tier: Tier) -> bool:
    """Whether what lies under a key may be recycled by its owner, unless a reader has a lease.

    Elsewhere a key that was listed stays what it was: it need not be looked up before it is read.
    """
    return hasattr(tier, "lease")


def save_key(run_key: str, name: SaveName, file: str) -> str:
    return f"{run_key}/{name}/{file}"


def read_manifest(tier: Tier, run_key: str, name: SaveName) -> Manifest | None:
    """What the manifest of a save says; None where there is none. Raises FormatError, TierError."""
    key = save_key(run_key, name, _manifest.MANIFEST_FILE)
    try:
        data = read_all(tier, key, max_bytes=_manifest.MAX_SMALL_BYTES)
    except ObjectNotFound:
        return None
    return _manifest.decode_sealed(data, Manifest)


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
    return _collect(tier, f"{run_key}/", label)


def merged(inventories: Iterable[Inventory]) -> list[Inventory]:
    """Inventories of one tier, of which each node has its own, as one."""
    found: dict[str, Inventory] = {}
    for inventory in inventories:
        tier = found.setdefault(inventory.tier, Inventory(inventory.tier))
        tier.incarnations += inventory.incarnations
        tier.problems += inventory.problems
        for name, save in inventory.saves.items():
            whole = tier.saves.setdefault(name, SaveEntry(name, inventory.tier))
            whole.records.update(save.records)
            whole.digests.update(save.digests)
            whole.problems += save.problems
            whole.metrics.update(save.metrics)
            whole.has_manifest |= save.has_manifest
            whole.committed |= save.committed
    return list(found.values())


def scan_save(
    tier: Tier, run_key: str, name: SaveName, known: Mapping[str, bytes] = MappingProxyType({})
) -> SaveEntry:
    """One save, read like ``scan`` does. One that is not there at all has no records.

    ``known`` has the bytes of records, by key, that the caller has just stored there.
    """
    found = _collect(tier, f"{run_key}/{name}/", None, known).saves
    return found.get(name) or SaveEntry(name, tier.name)


def _collect(
    tier: Tier,
    prefix: str,
    label: str | None,
    known: Mapping[str, bytes] = MappingProxyType({}),
) -> Inventory:
    inventory = Inventory(label or tier.name)
    sizes: dict[tuple[SaveName, str], int] = {}
    records: list[tuple[SaveName, int, ObjectInfo]] = []
    committed: set[tuple[int, int] | None] = set()
    for info in tier.list(prefix):
        parts = info.key.split("/")
        if len(parts) == 2 and _manifest.parse_incarnation_file(parts[1]) is not None:
            _read_incarnation(tier, info.key, inventory)
        if len(parts) == 3 and parts[1] == "commit":
            committed.add(_manifest.parse_commit_file(parts[2]))
        if len(parts) != 3 or (name := SaveName.parse(parts[1])) is None:
            continue
        sizes[name, parts[2]] = info.size_bytes
        save = inventory.saves.setdefault(name, SaveEntry(name, inventory.tier))
        if (rank := _manifest.parse_record_file(parts[2])) is not None:
            records.append((name, rank, info))
        elif parts[2] == _manifest.MANIFEST_FILE:
            save.has_manifest = True
        elif parts[2].startswith("metrics-"):
            _read_metrics(tier, info.key, save)
    contents = _contents(tier, [info for _, _, info in records], known)
    for (name, rank, info), content in zip(records, contents, strict=True):
        _read_record(info.key, content, rank, inventory.saves[name], sizes)
    for save in inventory.saves.values():
        save.committed = (save.name.step, save.name.incarnation) in committed
    _settle_conflicts(tier, prefix.partition("/")[0], inventory)
    return inventory


def _contents(
    tier: Tier, infos: list[ObjectInfo], known: Mapping[str, bytes]
) -> Iterator[bytes | CheckpointError]:
    """The bytes of records, or what there is instead; several at a time where each takes a while.

    Raises any other error of a tier that does not answer.
    """

    def read(info: ObjectInfo) -> bytes | CheckpointError:
        if len(there := known.get(info.key, b"")) == info.size_bytes:
            return there
        try:
            if has_leases(tier) or info.size_bytes > _manifest.MAX_RECORD_BYTES:
                return read_all(tier, info.key, max_bytes=_manifest.MAX_RECORD_BYTES)
            out = bytearray(info.size_bytes)
            tier.read_into(info.key, memoryview(out))
            return bytes(out)
        except (ObjectNotFound, FormatError, ShortRead, TierUnavailable) as error:
            return error

    if has_leases(tier) or len(infos) < 2:
        yield from map(read, infos)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_READERS, "mtckpt-records") as executor:
        yield from executor.map(read, infos)


def _settle_conflicts(tier: Tier, run_key: str, inventory: Inventory) -> None:
    """Of two saves of one step and incarnation, by two jobs, the one that was committed counts."""
    by_step: dict[tuple[int, int], list[SaveEntry]] = {}
    for save in inventory.saves.values():
        if save.committed and save.complete:
            by_step.setdefault((save.name.step, save.name.incarnation), []).append(save)
    for twins in by_step.values():
        marker = _commit.read_marker(tier, run_key, twins[0].name) if len(twins) > 1 else None
        for save in twins:
            if marker is not None and marker.name != save.name:
                save.records.clear()
                save.problems.append("another save of this step was committed by another job")


def read_record(tier: Tier, run_key: str, name: SaveName, rank: int) -> Record:
    """One record, as ``scan`` reads them. Raises FormatError where it is not sound, TierError."""
    key = shard_keys(run_key, name, rank)[2]
    data = read_all(tier, key, max_bytes=_manifest.MAX_RECORD_BYTES)
    record = _manifest.decode_sealed(data, Record)
    check_record(record, name, rank)
    return record


def check_newest(tier: Tier, run_key: str, number: int) -> None:
    """Raise RunLocked if a later incarnation than ``number`` has begun: another job goes on then.

    Asked of a store, where the agents of two jobs meet only in what they write.
    """
    prefix = f"{run_key}/incarnation-"
    names = (info.key.rpartition("/")[2] for info in tier.list(prefix))
    highest = max((_manifest.parse_incarnation_file(name) or 0 for name in names), default=0)
    if highest > number:
        raise RunLocked(
            f"another job has begun incarnation {highest} of this run",
            state="nothing was stored; local tiers are unchanged",
            tier=tier.name,
            number=number,
            highest=highest,
        )


def check_record(record: Record, name: SaveName, rank: int) -> None:
    """Raise Damaged unless the record is of this save and rank, whatever its file is called."""
    said = record.name
    if said != name or record.rank != rank:
        raise Damaged(
            f"the record is of {said} rank {record.rank}", save=str(name), rank=rank, kind="record"
        )


def check_identity(
    record: Record, header: bytes, file_bytes: int, table_data: bytes
) -> tuple[ShardLayout, Table]:
    """Layout and table of a shard whose three files are of one save. The data is not looked at.

    Raises Damaged; its ``kind`` says which file is at odds with the record: "table" or "data".
    """
    check_digests(record, header, file_bytes, table_data)
    layout = _shard.parse_layout(header, file_bytes)
    return layout, Table.parse(table_data, layout)


def check_digests(record: Record, header: bytes, file_bytes: int, table_data: bytes) -> None:
    """As ``check_identity``, for a shard whose header nobody needs to understand now."""
    if _shard.table_digest(table_data) != record.shard.table_digest:
        raise Damaged("digest table is not the one of the record", kind="table")
    if file_bytes != record.shard.size_bytes or len(header) != record.shard.data_start:
        raise Damaged(
            "shard has another size than its record says",
            wanted_bytes=record.shard.size_bytes,
            got_bytes=file_bytes,
            kind="data",
        )
    # Before it is parsed: a flipped bit in it must not look like the format of a later version.
    if _shard.header_digest(header) != record.shard.header_digest:
        raise Damaged("shard header is not the one of the record", kind="data")
    if Table.parse(table_data).generation != _manifest.generation_of(record.save_id):
        raise Damaged("digest table is of another save", kind="table")


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
        save.reported = True
    except ObjectNotFound:
        return
    except (FormatError, ShortRead, TierUnavailable) as error:
        _note_unreadable(key, error, save)


def _read_record(
    key: str,
    content: bytes | CheckpointError,
    rank: int,
    save: SaveEntry,
    sizes: dict[tuple[SaveName, str], int],
) -> None:
    try:
        if isinstance(content, CheckpointError):
            raise content
        record = _manifest.decode_sealed(content, Record)
    except ObjectNotFound:
        return
    except (FormatError, ShortRead, TierUnavailable) as error:
        _note_unreadable(key, error, save)
        return
    try:
        check_record(record, save.name, rank)
    except Damaged as error:
        save.problems.append(f"{key}: {error.what}")
        return
    size_bytes = sizes.get((save.name, _manifest.shard_file(rank)))
    if not record.aborted and size_bytes != record.shard.size_bytes:
        there = "is gone" if size_bytes is None else f"has {size_bytes} bytes"
        said = f"{key}: its shard {there} where the record says {record.shard.size_bytes} bytes"
        save.problems.append(said)
        return
    save.records[rank] = record
    save.digests[rank] = xxh3_128_hexdigest(content)
    for metric, value in record.metrics.items():
        save.metrics.setdefault(metric, value)


def _note_unreadable(
    key: str, error: FormatError | ShortRead | TierUnavailable, save: SaveEntry
) -> None:
    """A problem of that save, also where the device cannot read the file: others it may well read.

    Raises any other error of a tier that does not answer.
    """
    if isinstance(error, TierUnavailable) and error.details.get("os_error") != "EIO":
        raise error
    save.problems.append(f"{key}: {error.what}")


def all_incarnations(inventories: Iterable[Inventory]) -> list[Incarnation]:
    """Every incarnation that any tier knows, once each."""
    found = {(i.number, i.id): i for inv in inventories for i in inv.incarnations}
    return [found[key] for key in sorted(found)]


def incarnation_line(inventories: Iterable[Inventory]) -> list[tuple[int, int | None]]:
    """``line_of`` what some tiers hold: files of incarnations may be lost or not copied along."""
    inventories = list(inventories)
    names = {name for inventory in inventories for name in inventory.saves}
    return line_of(names, all_incarnations(inventories))


def line_of(
    names: Iterable[SaveName], incarnations: Iterable[Incarnation]
) -> list[tuple[int, int | None]]:
    """The line of ``newest_line``, also through incarnations that only saves tell of.

    One of those is taken to go on from the one before it, at a step below its own first one: what
    an earlier one saved at those steps or later was abandoned.
    """
    known, names = list(incarnations), list(names)
    there = {incarnation.number for incarnation in known}
    lost = {name.incarnation for name in names} - there
    if not lost:
        return _manifest.newest_line(known)
    first: dict[int, int] = {}
    for name in names:
        first[name.incarnation] = min(name.step, first.get(name.incarnation, name.step))
    numbers = sorted(there | lost)
    for before, number in zip([None, *numbers], numbers, strict=False):
        if number in lost:
            parent = None if before is None else (before, first[number] - 1)
            known.append(Incarnation(_manifest.FORMAT_VERSION, "", number, "", parent))
    return _manifest.newest_line(known)
