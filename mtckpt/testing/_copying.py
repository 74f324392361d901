"""What a copy of a simulated shard is made of: its files, as they were captured or without a part.

Knows when three files are a shard, and what a copy may leave out. Moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest
from mtckpt._inventory import shard_keys
from mtckpt._manifest import Record
from mtckpt.errors import Damaged, FormatError, TierUnavailable
from mtckpt.testing._devices import are_alike, content_of, is_sound, parsed

if TYPE_CHECKING:
    from mtckpt._manifest import SaveName
    from mtckpt.testing._devices import Directory

__all__ = ["Files", "has_alike", "sound_files", "whole_files", "why_damaged"]

Files = tuple[bytes, bytes, bytes]


def sound_files(place: Directory, run_key: str, name: SaveName, rank: int) -> Files:
    """Data, table and record. Raises ObjectNotFound, Damaged."""
    data, table, record = (place.file(key).content for key in shard_keys(run_key, name, rank))
    if reason := why_damaged(place, run_key, name, rank):
        raise Damaged(reason, tier=place.name, key=shard_keys(run_key, name, rank)[0])
    return data, table, record


def has_alike(
    place: Directory, run_key: str, name: SaveName, rank: int, beside: Collection[int], files: Files
) -> bool:
    """Whether a copy may leave out what one of these ranks has captured here."""
    record = _manifest.decode_sealed(files[2], Record)
    return not record.left_out and any(
        other != rank
        and are_alike(record, other)
        and parsed(place.objects.get(shard_keys(run_key, name, other)[2])) is not None
        for other in beside
    )


def whole_files(
    source: Directory, target: Directory, run_key: str, name: SaveName, rank: int
) -> Files | None:
    """A shard as it was captured, by the record and the table that are here, where its copy over
    there leaves something out; None where that is whole. Raises TierUnavailable."""
    keys = shard_keys(run_key, name, rank)
    if not _manifest.decode_sealed(source.file(keys[2]).content, Record).left_out:
        return None
    own, table = parsed(target.objects.get(keys[2])), target.objects.get(keys[1])
    if own is None or table is None or own.left_out:
        raise TierUnavailable("what is here does not say what was left out", tier="peers")
    others = [shard_keys(run_key, name, r)[2] for r in range(own.world_size) if are_alike(own, r)]
    records = [record for key in others if (record := parsed(source.objects.get(key)))]
    if not any(
        not record.left_out and not why_damaged(source, run_key, name, record.rank)
        for record in records
    ):
        raise TierUnavailable("what was left out is not over there", tier="peers")
    return content_of(own.save_id, rank), table.content, target.objects[keys[2]].content


def why_damaged(place: Directory, run_key: str, name: SaveName, rank: int) -> str:
    """What is wrong with a shard here; empty if nothing is."""
    keys = shard_keys(run_key, name, rank)
    missing = [key for key in keys if key not in place.objects]
    if missing:
        return f"{missing[0]} is not there"
    try:
        record = _manifest.decode_sealed(place.objects[keys[2]].content, Record)
        _inventory.check_record(record, name, rank)
    except FormatError as error:
        return error.what
    data, table = (place.objects[key].content for key in keys[:2])
    return "" if is_sound(record, data, table) else f"{keys[0]} differs from its digest"
