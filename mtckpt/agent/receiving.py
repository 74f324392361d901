"""How a data process gets a shard of another node's memory into this one's.

Knows the peer tier and what room a copy takes. Does not know who ordered the copy, nor how long it
is kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mtckpt import _inventory, _transfer
from mtckpt._room import check_room
from mtckpt._source import Place, Progress
from mtckpt.agent import work
from mtckpt.errors import ObjectNotFound, TierUnavailable
from mtckpt.tiers.peer import PeerTier

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtckpt._manifest import SaveName

__all__ = ["receive"]


def receive(
    command: work.Pull, target: Place, name: SaveName, begin: Callable[[int], Progress]
) -> work.Flushed:
    """Carry out a Pull; see there. ``begin`` is told how many bytes will come, and gives what is
    told of those that have."""
    started_s = time.monotonic()
    tier = PeerTier(command.address, command.run_key, bytes.fromhex(command.secret))
    source = Place(tier, tier, is_peer=True)
    try:
        keys = _inventory.shard_keys(command.run_key, name, command.rank)
        size_bytes = tier.stat(keys[0]).size_bytes
        if not _is_there(target, keys):
            check_room(command.target.path, sum(tier.stat(key).size_bytes for key in keys))
        result = _transfer.copy_shard(
            source, target, command.run_key, name, command.rank, progress=begin(size_bytes)
        )
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
    )


def _is_there(target: Place, keys: tuple[str, str, str]) -> bool:
    """Whether an earlier try has brought it, all but the answer."""
    try:
        target.tier.stat(keys[2])
    except ObjectNotFound:
        return False
    return True
