"""How a data process gets a shard of another node's memory into this one's.

Knows the peer tier, what room a copy takes, and what it may leave out. Does not know who ordered
the copy, nor how long it is kept.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest, _shard, _thinning, _transfer
from mtckpt._held import hold
from mtckpt._inventory import shard_keys
from mtckpt._room import check_room
from mtckpt._source import (
    ArrivingSource,
    OpenShard,
    Place,
    Progress,
    open_shard,
    read_record,
    read_small,
)
from mtckpt.agent import work
from mtckpt.errors import CheckpointError, Damaged, FormatError, ObjectNotFound, TierUnavailable
from mtckpt.tiers.peer import PeerTier

if TYPE_CHECKING:
    from mtckpt._held import Held
    from mtckpt._manifest import Record, SaveName
    from mtckpt._transfer import CopyResult
    from mtckpt._twins import Alike
    from mtckpt.tiers.base import Tier

__all__ = ["receive"]

# What the ranks of this node have captured of a save: of as many saves as come side by side.
_CAPTURED: dict[tuple[str, str, str, tuple[int, ...]], dict[Alike, bytes]] = {}
_MAX_CAPTURED = 4
_CAPTURED_LOCK = threading.Lock()  # copies come in several threads


def receive(
    command: work.Pull, target: Place, name: SaveName, begin: Callable[[int], Progress]
) -> work.Flushed:
    """Carry out a Pull; see there. ``begin`` is told how many bytes will come, and gives what is
    told of those that have."""
    started_s = time.monotonic()
    tier = PeerTier(command.address, command.run_key, bytes.fromhex(command.secret))
    source = Place(tier, tier, is_peer=True)
    try:
        if command.mends:
            result, left_out = _mend(command, source, target, name, begin), 0
        else:
            result, left_out = _copy(command, source, target, name, begin)
    except ObjectNotFound as error:
        # Its memory may have been lost, or its agent not know yet what is in it.
        raise TierUnavailable(
            f"{command.address} does not have what it offers: {error.what}", tier=tier.name
        ) from error
    finally:
        tier.close()
    return work.Flushed(
        result.copied_bytes,
        round(time.monotonic() - started_s, 6),
        False,
        result.rewritten,
        reread_bytes=result.reread_bytes,
        reused_bytes=left_out,
    )


def _copy(
    command: work.Pull,
    source: Place,
    target: Place,
    name: SaveName,
    begin: Callable[[int], Progress],
) -> tuple[CopyResult, int]:
    """A copy for another node, and the bytes that it leaves out, since they were captured here."""
    meter: list[Progress] = []

    def progress(size_bytes: int) -> None:
        meter[0](size_bytes)

    at = command.run_key, name, command.rank
    with open_shard(source, *at, progress=progress) as shard:
        thin = _thinning.thinned(shard, _captured(command, target, name))
        if not _is_there(target, shard_keys(*at)):
            small_bytes = len(thin.table_data) + len(thin.record_data)
            check_room(command.target.path, thin.layout.size_bytes + small_bytes)
        meter.append(begin(thin.layout.size_bytes))
        result = _transfer.store_shard(thin, target, *at)
        return result, thin.record.left_out - shard.record.left_out


def _captured(command: work.Pull, target: Place, name: SaveName) -> dict[Alike, bytes]:
    key = (command.target.path, command.run_key, command.save, tuple(command.beside))
    with _CAPTURED_LOCK:
        captured = _CAPTURED.get(key)
    if captured is None:
        found = []
        for rank in command.beside:
            # What cannot be read is not counted on: it comes over the network.
            with contextlib.suppress(CheckpointError):
                found.append(_inventory.read_record(target.tier, command.run_key, name, rank))
        captured = _thinning.captured_in(found)
        with _CAPTURED_LOCK:
            while len(_CAPTURED) >= _MAX_CAPTURED:
                _CAPTURED.pop(next(iter(_CAPTURED)))
            _CAPTURED[key] = captured
    return captured


def _is_there(target: Place, keys: tuple[str, str, str]) -> bool:
    """Whether an earlier try has brought it, all but the answer."""
    try:
        target.tier.stat(keys[2])
    except ObjectNotFound:
        return False
    return True


# -- mending ---------------------------------------------------------------------------------------


def _mend(
    command: work.Pull,
    source: Place,
    target: Place,
    name: SaveName,
    begin: Callable[[int], Progress],
) -> CopyResult:
    """A shard of this node as it was captured: from its copy, where that leaves nothing out; else
    tensor by tensor from all that is over there, by the record and the table that are here."""
    at = command.run_key, name, command.rank
    with open_shard(source, *at) as copy:
        if not copy.record.left_out:
            begin(copy.layout.size_bytes)
            return _transfer.store_shard(copy, target, *at)
    try:
        record, record_data, table_data = _read_own(target.tier, *at)
        layout = _thinning.layout_in(record)
        table = _shard.Table.parse(table_data, layout)
    except (FormatError, ObjectNotFound) as error:
        # As Damaged it would be said of the copy, which is as good as it was.
        raise TierUnavailable(
            f"the copy leaves out what the damaged files here would have to say: {error.what}",
            tier=source.tier.name,
        ) from error
    with contextlib.ExitStack() as stack:
        composed = _thinning.made_of(layout, table, _shards_over_there(source, *at, stack))
        data = ArrivingSource(
            composed, layout, table, tier=source.tier.name, key=shard_keys(*at)[0],
            progress=begin(layout.size_bytes),
        )  # fmt: skip
        whole = OpenShard(record, record_data, table_data, layout, table, data)
        return _transfer.store_shard(whole, target, *at)


def _read_own(tier: Tier, run_key: str, name: SaveName, rank: int) -> tuple[Record, bytes, bytes]:
    """The record, as it lies there too, and the table. Raises FormatError, ObjectNotFound."""
    _, table_key, record_key = shard_keys(run_key, name, rank)
    record, record_data = read_record(tier, record_key, name, rank)
    table_data = read_small(tier, table_key, _thinning.layout_in(record).table_bytes)
    if _shard.table_digest(table_data) != record.shard.table_digest:
        raise Damaged("digest table is not the one of the record", key=table_key)
    return record, record_data, table_data


def _shards_over_there(
    source: Place, run_key: str, name: SaveName, first: int, stack: contextlib.ExitStack
) -> Iterator[tuple[Record, Held]]:
    """What a node has of a save: the shard of ``first``, then those of other ranks."""
    files = [info.key.rpartition("/")[2] for info in source.tier.list(f"{run_key}/{name}/")]
    ranks = {rank for rank in map(_manifest.parse_record_file, files) if rank is not None}
    for rank in sorted(ranks, key=lambda rank: (rank != first, rank)):
        record = _inventory.read_record(source.tier, run_key, name, rank)
        key = shard_keys(run_key, name, rank)[0]
        yield record, stack.enter_context(hold(source.tier, key))
