"""Moves shards between places, checks them, heals them, deletes them.

It knows the three files of a shard and the order that keeps the commit rule true: data, table,
record when a shard appears, record first when a save goes. Whatever is copied is compared with the
digests of its capture while it passes, so a damaged copy never reaches a second place and nothing
is ever digested anew. It does not decide what is moved, and does not retry.

Everything blocks and releases the interpreter lock while bytes move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt import _commit, _inventory, _manifest, _reuse, _shard
from mtckpt._crash import crash_point
from mtckpt._held import open_bytes
from mtckpt._inventory import shard_keys
from mtckpt._manifest import Manifest, ManifestEntry, SaveName
from mtckpt._shard import verify_mapped
from mtckpt._source import (
    ArrivingSource,
    OpenShard,
    Place,
    Progress,
    VerifyingSource,
    open_shard,
)
from mtckpt.errors import (
    AlreadyExists,
    CheckpointError,
    CommitConflict,
    Damaged,
    FormatError,
    ObjectNotFound,
    ShortRead,
    TierUnavailable,
)
from mtckpt.tiers.base import BytesSource, read_all
from mtckpt.tiers.object_store import ObjectStoreTier

if TYPE_CHECKING:
    from mtckpt._reuse import Same
    from mtckpt.tiers.base import Source

__all__ = [
    "CopyResult",
    "Place",
    "VerifyResult",
    "VerifyingSource",
    "copy_shard",
    "delete_save",
    "heal_shard",
    "store_shard",
    "verify_mapped",
    "verify_shard",
    "write_manifest",
]

logger = logging.getLogger(__name__)


# -- copying -------------------------------------------------------------------------------------


@dataclass(slots=True)
class CopyResult:
    """``rewritten`` are keys that were there, damaged, and were set aside; ``record`` has the
    bytes of the record that was stored last, by its key. ``reused_bytes`` were copied inside the
    target, ``reread_bytes`` asked for again."""

    copied_bytes: int = 0
    reread_bytes: int = 0
    reused_bytes: int = 0
    rewritten: list[str] = field(default_factory=list)
    record: dict[str, bytes] = field(default_factory=dict)


def copy_shard(
    source: Place,
    target: Place,
    run_key: str,
    name: SaveName,
    rank: int,
    *,
    base: SaveName | None = None,
    progress: Progress | None = None,
) -> CopyResult:
    """Copy one shard, verified on the way, record last. What is there already and right is kept.

    ``base``: a save there whose shard has parts in common, for a store that copies by itself.
    Raises Damaged for the source, and what the target's ``put`` raises; what this call stored is
    then gone again.
    """
    with open_shard(source, run_key, name, rank, progress=progress) as shard:
        same = _reuse.same_parts(target.tier, run_key, base, rank, shard) if base else None
        return store_shard(shard, target, run_key, name, rank, same)


def store_shard(
    shard: OpenShard,
    target: Place,
    run_key: str,
    name: SaveName,
    rank: int,
    same: Same | None = None,
) -> CopyResult:
    """As ``copy_shard``, of a shard that is open. ``same``: what the target can copy by itself.

    A place of several nodes may be brought one shard by two: as it was captured, and as a copy that
    leaves something out. The one that is there stays. Raises TierUnavailable for a copy that leaves
    something out while the other one is on its way.
    """
    result = CopyResult()
    stored: list[str] = []
    data_key, table_key, record_key = shard_keys(run_key, name, rank)
    steps: list[tuple[str, Source, Callable[[], bool]]] = [
        (data_key, shard.data, lambda: _is_right(target, data_key, shard)),
        (table_key, BytesSource(shard.table_data), lambda: _same(target, table_key, shard)),
        (record_key, BytesSource(shard.record_data), lambda: _same(target, record_key, shard)),
    ]

    def may_replace() -> bool:
        return target.in_memory or _may_replace(target, run_key, name, rank, shard)

    try:
        for point, (key, content, is_right) in zip(("data", "table", "record"), steps, strict=True):
            at_hand = same if point == "data" else None
            if _put(target, key, content, is_right, may_replace, result, at_hand):
                stored.append(key)
            crash_point(f"flush.{point}")
        if shard.record.left_out and not target.in_memory:
            _check_stands(target, run_key, name, rank, shard)
    except _IsThere:
        return result
    except BaseException:
        _take_back(target, stored, record_key)
        raise
    result.record[record_key] = shard.record_data
    if isinstance(shard.data, ArrivingSource):
        result.reread_bytes = shard.data.reread_bytes
    return result


def _put(
    target: Place,
    key: str,
    content: Source,
    is_right: Callable[[], bool],
    may_replace: Callable[[], bool],
    result: CopyResult,
    same: Same | None,
) -> bool:
    """Store one object; False if it was there and right. A damaged one is set aside."""
    for _ in range(2):
        try:
            if same is not None and isinstance(target.tier, ObjectStoreTier):
                result.reused_bytes += target.tier.put_reusing(key, content, same).copied_bytes
            else:
                target.through.put(key, content)
        except AlreadyExists:
            if is_right():
                return False
            if not may_replace():
                raise _on_its_way(target, key) from None
            _set_aside(target, key, "differs from its digest")
            result.rewritten.append(key)
        else:
            result.copied_bytes += content.size_bytes
            return True
    # Somebody stores this key over and over; it is not there because of us.
    raise AlreadyExists(
        f"{key} was stored by somebody else, and not as it should be",
        tier=target.tier.name,
        key=key,
    )


def _set_aside(place: Place, key: str, reason: str) -> None:
    """Make room under the key of a damaged object, of which a good copy is at hand."""
    if not place.is_local:
        # Objects of a store cannot be renamed, only copied and deleted: nothing is kept of it.
        logger.warning("%s: %s is replaced: %s", place.tier.name, key, reason)
        place.tier.delete(key)
        return
    aside = place.local.quarantine(key, reason)
    if place.in_memory:
        # In RAM the damaged copy would take the room that its successor needs.
        place.local.drop_quarantined(aside)


def _is_right(target: Place, key: str, shard: OpenShard) -> bool:
    """Whether the data file that is there is this shard's, byte for byte by its digests."""
    try:
        with open_bytes(target, key, cold=True) as (held, reader):
            if held.size_bytes != shard.layout.size_bytes:
                return False
            VerifyingSource(
                reader, shard.layout, shard.table, tier=target.tier.name, key=key
            ).read_all()
        return True
    except (Damaged, ObjectNotFound):
        return False


def _same(target: Place, key: str, shard: OpenShard) -> bool:
    wanted = shard.table_data if key.endswith(".xxh3") else shard.record_data
    try:
        return read_all(target.tier, key, max_bytes=len(wanted)) == wanted
    except (ShortRead, ObjectNotFound):
        return False


class _IsThere(Exception):
    """Another node has brought the shard, in another form."""


def _may_replace(target: Place, run_key: str, name: SaveName, rank: int, shard: OpenShard) -> bool:
    """Whether an object of this shard that is there may go for this one's. Raises _IsThere for one
    of a shard that is sound. Two that replaced each other's files would leave a mixture."""
    if not verify_shard(target, run_key, name, rank).damaged:
        raise _IsThere
    return not shard.record.left_out


def _check_stands(target: Place, run_key: str, name: SaveName, rank: int, shard: OpenShard) -> None:
    """Raises TierUnavailable where another node has replaced a copy that leaves something out."""
    data_key, table_key, record_key = shard_keys(run_key, name, rank)
    try:
        stands = target.tier.stat(data_key).size_bytes == shard.layout.size_bytes
    except ObjectNotFound:
        stands = False
    if not (stands and _same(target, table_key, shard) and _same(target, record_key, shard)):
        raise _on_its_way(target, data_key)


def _on_its_way(target: Place, key: str) -> TierUnavailable:
    return TierUnavailable(
        "another node is bringing this part of the save, or has ended amid that",
        state="what that has brought is unchanged",
        tier=target.tier.name,
        key=key,
    )


def _take_back(target: Place, stored: list[str], record_key: str) -> None:
    for key in reversed(stored):
        try:
            if not target.in_memory and _stands(target, record_key):
                return  # another node has brought the shard, too, and counts on what is there
            target.tier.delete(key)
        except CheckpointError as error:
            # The first error is the one to report. Without its record this is no shard.
            logger.warning("could not take back %s: %s", key, error.what)


@dataclass(frozen=True, slots=True)
class Completed:
    """A save whose records are all there. ``atomic``: no other save of its step can be as well."""

    atomic: bool = True


def write_manifest(
    place: Place,
    run_key: str,
    name: SaveName,
    known: Mapping[str, bytes] | None = None,
    *,
    reused_bytes: int = 0,
    parts: bool = False,
) -> Completed | None:
    """Cache the fact that a save is complete, in a store with its marker; None if it is not (yet).

    ``known`` are records that need not be read back, since they were stored just now;
    ``reused_bytes`` were copied inside the store for it, which is noted for people. ``parts``: the
    save is whole, but other parts of it lie on other nodes; that it was is known here then,
    whatever becomes of those. Raises CommitConflict where another save of this step was committed;
    this one is withdrawn then.
    """
    save = _inventory.scan_save(place.tier, run_key, name, known or {})
    if save.aborted or not (save.complete or (parts and save.records)):
        return None
    entries = [
        ManifestEntry(rank, record.shard.size_bytes, save.digests[rank])
        for rank, record in sorted(save.records.items())
    ]
    first = next(iter(save.records.values()))
    manifest = Manifest(
        _manifest.FORMAT_VERSION,
        first.run,
        first.step,
        first.incarnation,
        first.save_id,
        first.world_size,
        entries,
        save.metrics,
        reused_bytes,
    )
    key = _inventory.save_key(run_key, name, _manifest.MANIFEST_FILE)
    data = _manifest.encode_sealed(manifest)
    try:
        place.through.put(key, BytesSource(data))
    except AlreadyExists:  # Another rank's flush has written it.
        if not place.is_local:
            data = read_all(place.tier, key, max_bytes=_manifest.MAX_SMALL_BYTES)
    crash_point("flush.manifest")
    if place.is_local or not save.complete:
        return Completed() if save.complete else None
    try:
        atomic = _commit.put_marker(place.tier, run_key, name, data)
    except CommitConflict:
        try:
            delete_save(place, run_key, name)
        except CheckpointError as error:
            # Who lost is to know that it did. What stays is not committed, so it does not count.
            logger.warning("%s stays in %s: %s", name, place.tier.name, error.what)
        raise
    crash_point("flush.marker")
    return Completed(atomic)


# -- checking, healing, deleting -----------------------------------------------------------------


@dataclass(slots=True)
class VerifyResult:
    """``damaged`` maps keys to what is wrong with them; empty means healthy."""

    read_bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


def verify_shard(
    place: Place,
    run_key: str,
    name: SaveName,
    rank: int,
    *,
    read_data: bool = True,
    progress: Progress | None = None,
) -> VerifyResult:
    """Read a shard back, from the device and not from the page cache where that can be.

    Raises what the tier says when it does not answer; damage is the result, not an error.
    """
    result = VerifyResult()
    data_key, table_key, record_key = shard_keys(run_key, name, rank)
    missing = [key for key in (data_key, table_key, record_key) if not _stands(place, key)]
    if missing:
        result.damaged = dict.fromkeys(missing, "is not there")
        return result
    try:
        with open_shard(place, run_key, name, rank, progress=progress, cold=True) as shard:
            if shard.record.root_bytes() != _shard.root_digests(shard.layout, shard.table.digests):
                raise Damaged("record has other roots than its table", key=record_key)
            if read_data:
                shard.data.read_all()
            result.read_bytes = len(shard.record_data) + len(shard.table_data)
            result.read_bytes += shard.data.size_bytes if read_data else 0
    except ObjectNotFound as error:
        result.damaged[str(error.details.get("key", data_key))] = "went away while it was read"
    except FormatError as error:
        result.damaged[str(error.details.get("key", data_key))] = error.what
    except TierUnavailable as error:
        if error.details.get("os_error") != "EIO":
            raise
        result.damaged[str(error.details.get("key", data_key))] = "the device cannot read it (EIO)"
    return result


def _stands(place: Place, key: str) -> bool:
    try:
        place.tier.stat(key)
    except ObjectNotFound:
        return False
    return True


def heal_shard(
    bad: Place,
    good: Place,
    run_key: str,
    name: SaveName,
    rank: int,
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Replace what is damaged in ``bad`` from ``good``; the keys that were.

    ``good`` is read to its end first. Raises Damaged, nothing changed, if it is damaged as well.
    """
    check = verify_shard(good, run_key, name, rank, progress=progress)
    for key, reason in check.damaged.items():
        raise Damaged(
            f"the copy to heal from is damaged: {reason}",
            state="nothing was changed",
            tier=good.tier.name,
            key=key,
        )
    found = verify_shard(bad, run_key, name, rank)
    for key in found.damaged:
        if not _stands(bad, key):
            continue
        _set_aside(bad, key, found.damaged[key])
    crash_point("heal.aside")
    # A table or record of another save makes its neighbours look right: this finds those too.
    rewritten = copy_shard(good, bad, run_key, name, rank).rewritten
    return sorted({*found.damaged, *rewritten})


def delete_save(
    place: Place,
    run_key: str,
    name: SaveName,
    *,
    records_only: bool = False,
    ranks: Collection[int] | None = None,
) -> tuple[bool, int]:
    """Delete a save, marker and records first: ``(busy, freed bytes)``; busy if it is leased.

    Killed anywhere, this leaves files that no record speaks for, and the next call ends it.
    ``records_only`` ends it there: nobody begins to read the save then, whoever does goes on.
    ``ranks``: only their shards go, and what others have of the save stays as it is.
    """
    keys = {info.key: info.size_bytes for info in place.tier.list(f"{run_key}/{name}/")}
    if ranks is not None:
        own = {key for rank in ranks for key in shard_keys(run_key, name, rank)}
        keys = {key: size_bytes for key, size_bytes in keys.items() if key in own}
    for key in keys:
        if key.endswith(".safetensors") and _is_leased(place, key):
            return True, 0
    if not place.is_local:
        _commit.withdraw_marker(place.tier, run_key, name)
    order = sorted(keys, key=lambda key: (_delete_rank(key), key))
    if records_only:
        order = [key for key in order if _delete_rank(key) == 0]
    for index, key in enumerate(order):
        place.tier.delete(key)
        crash_point(f"delete.{index}")
    freed_bytes = sum(keys[key] for key in order)
    for aside in place.local.quarantined() if place.is_local else ():
        if aside.key.startswith(f"{run_key}/{name}/") and (ranks is None or aside.key in own):
            place.local.drop_quarantined(aside)
            freed_bytes += aside.size_bytes
    if place.is_local and not records_only and ranks is None:
        place.local.drop_remains(f"{run_key}/{name}")
    return False, freed_bytes


def _delete_rank(key: str) -> int:
    """Records first. The manifest last: it shows that what a kill left was there in whole."""
    file = key.rpartition("/")[2]
    if _manifest.is_record_file(file):
        return 0
    if file == _manifest.MANIFEST_FILE:
        return 4
    return {"json": 1, "xxh3": 2}.get(file.rpartition(".")[2], 3)


def _is_leased(place: Place, key: str) -> bool:
    try_exclusive = getattr(place.tier, "try_exclusive", None)  # of a directory, or a view of one
    if try_exclusive is None:
        return False
    for pause_s in (0.01, 0.05, 0.0):
        try:
            with try_exclusive(key) as fd:
                if fd is not None:
                    return False
        except ObjectNotFound:
            return False
        time.sleep(pause_s)  # others that only look, as this does, hold it for a moment
    return True
