"""The ranks of a job as threads of one process: a group for tests and simulations."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from mtckpt.errors import RankTimeout

__all__ = ["LocalGroup", "local_groups"]


class _Board:
    """What was given, by turn and rank."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.given: dict[int, dict[int, bytes]] = {}


class LocalGroup:
    """See ``Group``. Made by ``local_groups``, one for each thread."""

    def __init__(self, board: _Board, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._board = board
        self._turn = 0

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See ``Group.exchange``."""
        turn, self._turn = self._turn, self._turn + 1
        deadline_s = time.monotonic() + timeout_s
        with self._board.condition:
            given = self._board.given.setdefault(turn, {})
            given[self.rank] = value
            self._board.condition.notify_all()
            while len(given) < self.world_size:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    missing = [rank for rank in range(self.world_size) if rank not in given]
                    raise RankTimeout(
                        f"{stage}: ranks {missing} did not come within {timeout_s:.1f} s",
                        stage=stage,
                        rank=missing[0],
                        ranks=missing,
                        timeout_s=round(timeout_s, 1),
                    )
                self._board.condition.wait(left_s)
            return [given[rank] for rank in range(self.world_size)]


def local_groups(world_size: int) -> Sequence[LocalGroup]:
    """One group of so many ranks, by rank."""
    board = _Board()
    return [LocalGroup(board, rank, world_size) for rank in range(world_size)]
