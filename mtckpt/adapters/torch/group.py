"""The ranks of ``torch.distributed``, joined by the key-value store that it was started with.

Knows the store only: no collective is called, so it works beside any backend, a rank that hangs
does not take the others along, and who is missing can be said.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from mtckpt.errors import RankTimeout

__all__ = ["TorchGroup", "find_group"]

_PAUSE_S = (0.001, 0.1)
_numbers: dict[str, itertools.count[int]] = {}


class TorchGroup:
    """See ``Group``. ``name`` keeps apart what is exchanged for different runs."""

    def __init__(self, store: Any, rank: int, world_size: int, name: str) -> None:
        self.rank = rank
        self.world_size = world_size
        # All ranks open their runs in the same order: the n-th of a name here is the n-th there.
        number = next(_numbers.setdefault(name, itertools.count()))
        self._prefix = f"mtckpt/{name}/{number}"
        self._store = store
        self._turn = 0

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See ``Group.exchange``. What was exchanged before the last time is deleted."""
        turn, self._turn = self._turn, self._turn + 1
        deadline_s = time.monotonic() + timeout_s
        keys = [self._key(turn, rank) for rank in range(self.world_size)]
        try:
            self._store.set(keys[self.rank], value)
            pause_s, most_s = _PAUSE_S
            while not self._store.check(keys):
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, most_s)
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if not missing:
                values = [bytes(self._store.get(key)) for key in keys]
                # Everybody has come to this turn, so everybody has read the one before.
                if turn:
                    self._store.delete_key(self._key(turn - 1, self.rank))
                return values
        except RuntimeError as error:  # what torch's stores raise, whatever went wrong
            raise RankTimeout(
                f"{stage}: the store of torch.distributed does not answer: {error}",
                stage=stage,
                rank=self.rank,
            ) from error
        raise RankTimeout(
            f"{stage}: {_ranks(missing)} of {self.world_size} did not come"
            f" within {timeout_s:.1f} s",
            stage=stage,
            rank=missing[0],
            ranks=missing,
            timeout_s=round(timeout_s, 1),
        )

    def _key(self, turn: int, rank: int) -> str:
        return f"{self._prefix}/{turn}/{rank}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


def find_group(name: str) -> TorchGroup | None:
    """The job's group if ``torch.distributed`` has been started with several ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    store = dist.distributed_c10d._get_default_store()
    return TorchGroup(store, dist.get_rank(), dist.get_world_size(), name)
