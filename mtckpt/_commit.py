"""The marker of a save in an object store: one key for a step, created once, by one writer.

Knows the marker's key and what it says. It is the fact that a save is complete, cached, like a
manifest: its absence hides nothing and its presence vouches for nothing. What it adds is a winner
where two jobs write one step of one incarnation under one prefix, since a store has no lock. Does
not know shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_128_hexdigest

from mtckpt import _manifest
from mtckpt._manifest import Commit, Manifest, SaveName
from mtckpt.errors import AlreadyExists, CommitConflict, FormatError, ObjectNotFound
from mtckpt.tiers.base import BytesSource, read_all

if TYPE_CHECKING:
    from mtckpt.tiers.base import Tier

__all__ = ["marker_key", "put_marker", "read_marker", "withdraw_marker"]


def marker_key(run_key: str, name: SaveName) -> str:
    return f"{run_key}/{_manifest.commit_file(name.step, name.incarnation)}"


def put_marker(tier: Tier, run_key: str, name: SaveName, manifest_data: bytes) -> bool:
    """Commit a save whose records are all there; True if the store made that atomic.

    Raises CommitConflict if another save of this step was committed first.
    """
    manifest = _manifest.decode_sealed(manifest_data, Manifest)
    marker = Commit(
        _manifest.FORMAT_VERSION,
        manifest.run,
        manifest.step,
        manifest.incarnation,
        manifest.save_id,
        xxh3_128_hexdigest(manifest_data),
    )
    key = marker_key(run_key, name)
    try:
        atomic = tier.put(key, BytesSource(_manifest.encode_sealed(marker))).atomic
    except AlreadyExists:
        # Of a try before this one, of the agent before this one, or of another job.
        atomic = True
    else:
        if atomic:
            return True
    there = read_marker(tier, run_key, name)
    if there is not None and there.save_id != marker.save_id:
        raise CommitConflict(
            f"step {name.step} was committed by another job, as another save",
            tier=tier.name,
            key=key,
            step=name.step,
            incarnation=name.incarnation,
            save_id=marker.save_id,
            other_save_id=there.save_id,
        )
    return atomic


def read_marker(tier: Tier, run_key: str, name: SaveName) -> Commit | None:
    """What the marker of this step says; None where there is none that can be read."""
    try:
        data = read_all(tier, marker_key(run_key, name), max_bytes=_manifest.MAX_SMALL_BYTES)
        return _manifest.decode_sealed(data, Commit)
    except (ObjectNotFound, FormatError):
        return None


def withdraw_marker(tier: Tier, run_key: str, name: SaveName) -> None:
    """Delete the marker, if it is this save's."""
    there = read_marker(tier, run_key, name)
    if there is not None and there.name == name:
        tier.delete(marker_key(run_key, name))
