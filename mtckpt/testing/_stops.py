"""Processes of a simulated job that are stopped, and go on as if nothing had been: SIGSTOP.

Knows which of them, and for how long. Draws from numbers of its own, so that all other stories are
what they are without it.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtckpt.testing.cluster import Agent, Process, World
    from mtckpt.testing.simulation import Job

__all__ = ["Stops"]


class Stops:
    """See the module. ``some``: there are any in this story, as in one of six."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._draw = random.Random(f"stops of {world.seed}")
        self.some = self._draw.random() < 0.17
        self._stopped: list[Agent | Process] = []
        self._stopped_s = -1.0

    async def befall(self, job: Job) -> None:
        """Agents and ranks of a job, one after the other, at random moments."""
        for _ in range(self._draw.choice((0, 1, 1, 2))):
            await asyncio.sleep(self._draw.random() * self._draw.choice((0.3, 1.0, 3.0)))
            process: Agent | Process | None = self._draw.choice(job.ranks).process
            if self._draw.random() < 0.6:
                process = self._draw.choice(job.nodes).agent
            if process is None or process.dead or process in self._stopped:
                continue
            self.world.note(f"{process} is stopped")
            self._stopped.append(process)
            process.stop()
            stay_s = self._draw.choice((0.5, 5.0, 12.0, 30.0))
            self.world.loop.call_later(stay_s, self._go_on, process)

    def _go_on(self, process: Agent | Process) -> None:
        if process in self._stopped:
            self._stopped.remove(process)
            self._stopped_s = self.world.loop.time()
            self.world.note(f"{process} goes on")
            process.go_on()

    def none(self, since_s: float) -> bool:
        """Whether no process has been stopped since then."""
        return self._stopped_s < since_s and not self._stopped

    def end_all(self) -> None:
        """All of them go on."""
        for process in list(self._stopped):
            self._go_on(process)
