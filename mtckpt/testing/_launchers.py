"""What starts the ranks of simulated jobs, and may be killed itself: its ranks live on then.

Knows which ranks of a job stay, and for how long, beside those of the next one. Draws from numbers
of its own, so that all other stories are what they are without it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from mtckpt.testing._oracles import Oracles
    from mtckpt.testing._trainers import Rank
    from mtckpt.testing.cluster import World

__all__ = ["Launcher"]


class Launcher:
    """See the module. ``dies``: in some stories. ``left_s``: when a rank last lived that nobody
    looks after."""

    def __init__(self, world: World, oracles: Oracles) -> None:
        self.world = world
        self.left_s = -1.0
        self._oracles = oracles
        self._draw = random.Random(f"launchers of {world.seed}")
        self.dies = self._draw.random() < 0.15
        self._left: list[Rank] = []

    def end_of_one(self) -> list[asyncio.Future[None]]:
        """What is done when the launcher of a job that starts now is killed, if it is."""
        if not self.dies or self._draw.random() < 0.4:
            return []
        gone = self.world.loop.create_future()
        after_s = self._draw.random() * self._draw.choice((0.5, 2.0, 6.0))
        self.world.loop.call_later(after_s, self._kill, gone)
        return [gone]

    def _kill(self, gone: asyncio.Future[None]) -> None:
        if not gone.done():
            gone.set_result(None)

    def end(self, ranks: Iterable[Rank], *, killed: bool) -> None:
        """A job is over. ``killed``: its launcher was, so that nobody ends the ranks.

        One that opens the run later would be taken for one that was started by nobody.
        """
        for rank in ranks:
            if not killed or not rank.has_opened or self._draw.random() < 0.3:
                rank.process.kill()
        left = [rank for rank in ranks if not rank.process.dead]
        if not left:
            return
        self.world.note(f"ranks {[rank.rank for rank in left]} are left behind")
        self._oracles.left(left)
        self._left += left
        for rank in left:
            rank.process.parent_pid = self.world.number()  # who looks after orphans
            stay_s = self._draw.random() * self._draw.choice((0.5, 5.0, 30.0))
            self.world.loop.call_later(stay_s, self._end, rank)
            if self._draw.random() < 0.4:  # it goes on once another one has its place
                rank.process.stop()
                self.world.loop.call_later(stay_s * self._draw.random(), rank.process.go_on)

    def _end(self, rank: Rank) -> None:
        rank.process.kill()
        self.left_s = self.world.loop.time()

    def has_left(self, rank: Rank) -> bool:
        """Whether nobody looks after a rank any more."""
        return rank in self._left

    def is_alone(self, since_s: float) -> bool:
        """Whether no rank that was left behind has lived since then."""
        return self.left_s < since_s and all(rank.process.dead for rank in self._left)

    def end_all(self) -> None:
        """Whoever was left behind ends."""
        for rank in self._left:
            self._end(rank)
