"""What befalls a simulated job: processes that die, nodes that go, cuts in the network, bit flips.

Knows how each of them is brought about, and tells the oracles what is lost by it. Draws which and
when from the world's seed.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtckpt.testing._devices import Directory
    from mtckpt.testing._oracles import Oracles
    from mtckpt.testing.cluster import Agent, Node, World
    from mtckpt.testing.simulation import Job

__all__ = ["Faults"]

DRAIN_S = 10.0


class Faults:
    """See the module. ``partners``: those too that only a story with copies bears. ``told`` has
    their names, and ``disturbed_s`` when the last one began or ended. ``over``: no more of them."""

    def __init__(self, world: World, oracles: Oracles, *, partners: bool) -> None:
        self.world = world
        self.oracles = oracles
        self.partners = partners
        self.over = False
        self._draw = random.Random(f"damage of {world.seed}")
        self._tries = 10
        self.told: list[str] = []
        self.disturbed_s = -1.0

    def _disturb(self) -> None:
        self.disturbed_s = self.world.loop.time()

    async def befall(self, job: Job) -> None:
        """A few of them, at random moments of a job."""
        draw = self.world.random
        for name in ("lost", "twice", "late", "died", "unanswered"):
            if draw.random() < 0.3:
                setattr(self.world.chances, name, draw.choice((0.01, 0.05, 0.2)))
        for _ in range(draw.choice((0, 1, 1, 2, 3))):
            await asyncio.sleep(draw.random() * draw.choice((0.3, 1.0, 3.0)))
            faults = [
                self._kill_agent,
                self._kill_agent,
                self._kill_rank,
                self._kill_ranks,
                self._lose_node,
                self._reboot_node,
                self._cut,
                self._mute,
            ]
            if self.partners:
                faults += [self._damage] * 3 + [self._drain_node, self._drain_nodes]
            fault = draw.choice(faults)
            self.told.append(fault.__name__.strip("_"))
            self.world.note(f"fault: {fault.__name__}")
            self._disturb()
            fault(job)

    def _kill_agent(self, job: Job) -> None:
        node = self.world.random.choice(job.nodes)
        if node.agent is not None:
            node.agent.kill()

    def _kill_rank(self, job: Job) -> None:
        self.world.random.choice(job.ranks).process.kill()

    def _kill_ranks(self, job: Job) -> None:
        for rank in job.ranks:
            rank.process.kill()

    def _lose_node(self, job: Job) -> None:
        node = self.world.random.choice(job.nodes)
        self.oracles.lost(node, "ram", "disk")
        node.lose()

    def _reboot_node(self, job: Job) -> None:
        node = self.world.random.choice(job.nodes)
        if not node.lost:
            self.oracles.lost(node, "ram")
            node.reboot()

    def _cut(self, job: Job) -> None:
        """The network between two nodes, in one direction or both, for a while."""
        draw = self.world.random
        if len(job.nodes) < 2:
            return
        one, other = draw.sample([node.name for node in job.nodes], 2)
        pairs = {(one, other)} | ({(other, one)} if draw.random() < 0.6 else set())
        self.world.blocked |= pairs
        self.world.loop.call_later(draw.choice((0.5, 5.0, 30.0)), self._mend, pairs)

    def _mend(self, pairs: set[tuple[str, str]]) -> None:
        self._disturb()
        self.world.blocked -= pairs

    def _mute(self, job: Job) -> None:
        """A disk or the store does not answer, for a while."""
        draw = self.world.random
        place = draw.choice([self.world.store, *(node.disk for node in job.nodes)])
        place.problem = "it does not answer"
        self.world.loop.call_later(draw.choice((0.5, 5.0, 30.0)), self._answer, place)

    def _damage(self, job: Job) -> None:
        """Some bytes of a shard change where they lie, at once or as soon as there is one."""
        self._damage_by(self.world.random)

    def _damage_by(self, draw: random.Random) -> None:
        places: list[tuple[Node | None, Directory]] = [(None, self.world.store)]
        for each in [node for node in self.world.nodes if not node.lost]:
            places += [(each, each.ram), (each, each.ram), (each, each.disk)]
        node, place = draw.choice(places)
        keys = sorted(key for key in place.objects if key.endswith(".safetensors"))
        if keys:
            key = draw.choice(keys)
            self._spoil(place, key)
            self.world.note(f"{key} in {place.name} of {node}")
            self.oracles.damaged(node, place.name, key.split("/")[1])
        elif not self.over and self._tries:
            self._tries -= 1
            self.world.loop.call_later(self._draw.random(), self._damage_later)

    def _damage_later(self) -> None:
        if not self.over:
            self._disturb()
            self._damage_by(self._draw)

    def _spoil(self, place: Directory, key: str) -> None:
        """A bit of it flips, or of its record or table, or somebody deletes one of the three."""
        which = self._draw.choice(("", "", ".json", ".xxh3"))
        key = key if not which else key.removesuffix(".safetensors") + which
        file = place.objects.get(key)
        if file is None or self._draw.random() < 0.3:
            self.world.note(f"deleted: {key}")
            place.objects.pop(key, None)
            return
        at = self._draw.randrange(len(file.content))
        content = file.content
        file.content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    def _drain_node(self, job: Job) -> None:
        """A node is about to go, and goes once it has said that nothing goes with it."""
        self._drain([self.world.random.choice(job.nodes)])

    def _drain_nodes(self, job: Job) -> None:
        """All of a job."""
        self._drain(job.nodes)

    def _drain(self, nodes: list[Node]) -> None:
        agents = [node.agent for node in nodes if node.agent is not None]
        self.world.loop.create_task(self._drained(agents))

    async def _drained(self, agents: list[Agent]) -> None:
        draining = [
            agent.start(agent.registry.drainer.drain(DRAIN_S, "the node goes")) for agent in agents
        ]
        await asyncio.gather(*draining, return_exceptions=True)
        self._disturb()
        for agent, task in zip(agents, draining, strict=True):
            node = agent.node
            if not task.cancelled() and task.result().safe:
                # Its agent may be killed before it goes: the next one there finds the note.
                if not node.lost and agent.registry.boot_id == node.boot_id:
                    self.oracles.drained(node)
                    node.lose()
            elif not agent.dead:
                agent.context.run(agent.registry.drainer.cancel)

    def _answer(self, place: object) -> None:
        self._disturb()
        place.problem = ""  # type: ignore[attr-defined]  # it stands in for the real one
