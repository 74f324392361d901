"""Users who go back to an older step: where a job starts, or amid it, as where a loss explodes.

Knows when, and which steps may be asked for. Draws from numbers of its own, so that all other
stories are what they are without it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mtckpt.testing._oracles import Oracles
    from mtckpt.testing.cluster import World

__all__ = ["Return", "Returns"]

Asked = int | Literal["latest"]


class Return:
    """What all ranks of a job restore: at its start, and once more before its ``at``-th save."""

    def __init__(self, returns: Returns, first: Asked, at: int) -> None:
        self.first = first
        self.at = at
        self._returns = returns
        self._again: Asked | None = None

    def again(self) -> Asked:
        """What is restored amid the job: the same for whichever rank asks."""
        if self._again is None:
            self._again = self._returns.some_step()
        return self._again


class Returns:
    """See the module. There are any in one story of six."""

    def __init__(self, world: World, oracles: Oracles) -> None:
        self._oracles = oracles
        self._draw = random.Random(f"returns of {world.seed}")
        self._some = self._draw.random() < 0.17

    def of_job(self) -> Return:
        """Those of a job that starts now."""
        if not self._some:
            return Return(self, "latest", -1)
        first = self.some_step() if self._draw.random() < 0.4 else "latest"
        return Return(self, first, self._draw.choice((-1, 1, 2, 3)))

    def some_step(self) -> Asked:
        """One of the newest that were saved, or whichever is there."""
        steps = self._oracles.newest_steps()
        return self._draw.choice(["latest", *steps])
