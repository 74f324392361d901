"""A job on a simulated cluster, with faults at random moments: one seed is one story.

    python -m mtckpt.testing.simulation 1234        tells the story of a seed
    python -m mtckpt.testing.simulation 1 1000      runs so many from the first on
    python -m mtckpt.testing.simulation 1 1000 2    the same in two processes

With ``--partners`` they are other stories: with copies on other nodes, and with bytes that change.

Knows what a job does and what may befall it. ``run_seed`` raises where a promise was broken, or
where what is owed is not settled once the faults have stopped. The same seed is the same story.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt.errors import CheckpointError, NoHealthyStep, RunLocked, SaveFailed
from mtckpt.testing._faults import Faults
from mtckpt.testing._launchers import Launcher
from mtckpt.testing._names import Collected, names_of
from mtckpt.testing._oracles import Oracles, Violation
from mtckpt.testing._returns import Returns
from mtckpt.testing._settings import Settings
from mtckpt.testing._stops import Stops
from mtckpt.testing._trainers import Group, Rank
from mtckpt.testing._virtual import Stuck
from mtckpt.testing.cluster import Chances, Node, World

if TYPE_CHECKING:
    from mtckpt._handle import Restored, Save
    from mtckpt.testing._restores import Read

__all__ = ["Story", "run_seed", "run_seeds"]

JOB_S = 200.0
SETTLE_S = 400.0
SAVE_S = 120.0
UNHEARD_S = 20.0
PATIENT_SAVES = 40
MORE_STEPS = 20  # of ranks that nobody ends
SEEDS_AT_ONCE = 250
PARTNERS = "--partners"


@dataclass(slots=True)
class Story:
    """What came of a seed."""

    seed: int
    jobs: int = 0
    restores: int = 0
    acknowledged: int = 0
    faults: list[str] = field(default_factory=list)
    virtual_s: float = 0.0


class Job:
    """Ranks on some nodes, from their start to the last one's end."""

    def __init__(self, drama: Drama, nodes: list[Node], per_node: int) -> None:
        self.drama = drama
        self.world = drama.world
        self.nodes = nodes
        size = len(nodes) * per_node
        group = Group(self.world, size)
        self.started_s = self.world.loop.time()
        self.results: dict[int, dict[int, Restored]] = {}  # by how often ranks have restored
        self.ranks = [
            Rank(nodes[rank // per_node], group, rank, drama.settings, self) for rank in range(size)
        ]

    # -- told by ranks ---------------------------------------------------------------------------

    def restored(self, rank: Rank, restored: Restored, read: Read | None, asked: int | str) -> None:
        oracles, results = self.drama.oracles, self.results.setdefault(rank.num_restores, {})
        oracles.restored(rank, restored, read, asked)
        results[rank.rank] = restored
        if len(results) == len(self.ranks):
            is_calm = asked == "latest" and self.drama.is_calm(self.nodes, self.started_s)
            oracles.check_restored(results, strict=oracles.required() if is_calm else None)

    def saved(self, rank: Rank, save: Save) -> None:
        self.drama.oracles.saved(rank, save)

    def stalled(self, rank: Rank, step: int, for_s: float) -> None:
        if not self.world.chances.late:
            self.drama.oracles.stalled(rank, step, for_s)

    def closed(self, rank: Rank) -> None:
        self.drama.oracles.closed(rank)

    # -- life ------------------------------------------------------------------------------------

    async def run(self, script: Callable[[Rank], None], *, alike: bool = True) -> bool:
        """True if all ranks came to their end. The others are killed as soon as one has failed.

        ``alike``: all ranks are to save the same steps, of the same state.
        """
        self.started_s = started_s = self.world.loop.time()
        for rank in self.ranks:
            rank.start(script)
        gone = [] if self.drama.is_final else self.drama.launcher.end_of_one()
        mains = {rank.main.done: rank for rank in self.ranks}
        waiting = set(mains)
        deadline_s = self.world.loop.time() + JOB_S
        failed = False
        while waiting and not failed and not any(each.done() for each in gone):
            done, _ = await asyncio.wait(
                [*waiting, *gone],
                timeout=deadline_s - self.world.loop.time(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                raise Violation(f"ranks {[mains[w].rank for w in waiting]} hang")
            waiting -= done
            failed = any(self._has_failed(mains[each]) for each in done if each in mains)
        killed = any(each.done() for each in gone)
        if alike and not failed and not killed and self.drama.is_undisturbed(started_s):
            self.drama.oracles.check_committed(started_s)
        if failed:
            await asyncio.sleep(self.world.random.random() * 2.0)  # until the launcher sees it
        self.drama.launcher.end(self.ranks, killed=killed)
        return not failed

    def _has_failed(self, rank: Rank) -> bool:
        error = rank.main.error
        if isinstance(error, (Violation, Exception)):
            raise error
        if isinstance(rank.error, NoHealthyStep) and self.drama.oracles.required() is None:
            return True  # what was saved is lost, and nobody starts anew without saying so
        if isinstance(rank.error, RunLocked) and rank.session.fenced is None:
            raise Violation(f"rank {rank.rank} gives way to one that nobody looks after")
        if rank.error is not None and rank.session.fenced is None and self.drama.is_final:
            raise Violation(f"rank {rank.rank} failed in peace: {rank.error}")
        return rank.error is not None or rank.process.dead


class Drama:
    """The story of one seed."""

    def __init__(self, seed: int, *, partners: bool = False) -> None:
        self.world = World(seed)
        self.partners = partners
        self.story = Story(seed)
        self.is_final = False
        draw = self.world.random
        self.num_nodes = draw.choice((1, 2, 2, 3))
        self.per_node = draw.choice((1, 1, 2))
        copies = draw.choice((0, 1, 1, 1)) if partners else 0
        if partners and draw.random() < 0.15:
            self.num_nodes, copies = 4, 2
        self.settings = Settings(
            has_disk=draw.random() < 0.8,
            has_store=draw.random() < 0.35,
            slots=draw.choice((2, 3)),
            disk_every=draw.choice((1, 1, 2)),
            store_every=draw.choice((1, 2, 3)),
            keep=draw.choice((2, 3)),
            copies=copies,
        )
        self.oracles = Oracles(self.world, self.settings.keep)
        self.rough = draw.random() < 0.7
        self.faults = Faults(self.world, self.oracles, partners=partners)
        self.launcher = Launcher(self.world, self.oracles)
        self.stops = Stops(self.world)
        self.returns = Returns(self.world, self.oracles)

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.world.nodes if not node.lost]

    def is_calm(self, nodes: list[Node], since_s: float) -> bool:
        """Whether everything that is there can be reached by a job on these nodes since then."""
        return (
            self.launcher.is_alone(since_s)
            and self.stops.none(since_s)
            and not self.world.blocked
            and not any(node.ram.problem or node.disk.problem for node in self.alive)
            and not self.world.store.problem
            and set(self.alive) <= set(nodes)
        )

    def is_undisturbed(self, since_s: float) -> bool:
        """Whether nothing has gone wrong since then, nor can go wrong."""
        return (
            self.faults.disturbed_s < since_s
            and self.launcher.is_alone(since_s)
            and self.stops.none(since_s)
            and self.world.chances == Chances()
            and not self.world.blocked
            and not any(p.problem for n in self.alive for p in (n.ram, n.disk))
            and not self.world.store.problem
        )

    async def play(self) -> None:
        """Jobs with faults, and then one in peace."""
        draw = self.world.random
        for _ in range(self.num_nodes):
            self._new_node()
        for _ in range(draw.choice((1, 2, 2, 3))):
            await self._job()
            self.oracles.check_agreement(self.alive)
            await asyncio.sleep(draw.choice((0.0, 0.1, 3.0)))
        self._make_peace()
        if self.partners:
            await asyncio.sleep(UNHEARD_S)  # what waits for an answer that was lost holds its slot
        await self._final()

    def _new_node(self) -> Node:
        return Node(self.world, f"n{len(self.world.nodes)}")

    def _nodes(self) -> list[Node]:
        """For the next job: those that are there, some new in the place of lost ones."""
        draw = self.world.random
        nodes = list(self.alive)
        while len(nodes) < self.num_nodes and draw.random() < 0.8:
            nodes.append(self._new_node())
        if not nodes:
            nodes.append(self._new_node())
        if draw.random() < 0.2:
            draw.shuffle(nodes)
        if len(nodes) > 1 and draw.random() < 0.15:
            nodes.pop()
        return nodes

    async def _job(self) -> None:
        draw = self.world.random
        self.story.jobs += 1
        per_node = self.per_node if draw.random() < 0.85 else 3 - self.per_node
        job = Job(self, self._nodes(), per_node)
        num_steps, step_s = draw.randint(2, 4), draw.choice((0.05, 0.2, 0.5))
        odd = {
            (draw.randrange(len(job.ranks)), draw.randrange(8)): draw.choice(("bad", "other", "no"))
            for _ in range(draw.choice((0, 0, 0, 1)))
        }
        stage = draw.choice(("", "staged", "local", "durable"))
        closes = draw.random() < 0.4
        goes_back = self.returns.of_job()

        def script(rank: Rank) -> None:
            step = rank.restore(goes_back.first).next_step
            for number in range(num_steps + MORE_STEPS):
                if number >= num_steps and not self.launcher.has_left(rank):
                    break
                rank.sleep(step_s * (0.5 + self.world.random.random()))
                if number == goes_back.at:
                    step = rank.restore(goes_back.again()).next_step
                state = odd.get((rank.rank, number), "plan")
                save = rank.save(step, state) if state != "no" else None
                step += 1
                if save is not None and stage:
                    with contextlib.suppress(CheckpointError):
                        save.wait(stage, timeout_s=10.0)  # type: ignore[arg-type]  # it stands in for the real one
            if closes:
                rank.close(30.0)

        self.world.note(f"job on {job.nodes}, {len(job.ranks)} ranks, {self.settings}")
        chaos = [self.world.loop.create_task(self.faults.befall(job))] if self.rough else []
        if self.stops.some:
            chaos.append(self.world.loop.create_task(self.stops.befall(job)))
        try:
            await job.run(script, alike=not odd)
        finally:
            for each in chaos:
                each.cancel()

    # -- peace -----------------------------------------------------------------------------------

    def _make_peace(self) -> None:
        self.world.note("peace")
        self.is_final = self.faults.over = True
        self.stops.end_all()
        self.launcher.end_all()
        self.world.chances = Chances()
        self.world.blocked.clear()
        for place in [self.world.store, *(p for n in self.alive for p in (n.ram, n.disk))]:
            place.problem = ""

    async def _final(self) -> None:
        """Everything works again: a job restores and saves, and all that is owed is settled."""
        nodes = list(self.alive) or [self._new_node()]
        job = Job(self, nodes, self.per_node)

        def script(rank: Rank) -> None:
            step, good = rank.restore().next_step, 0
            # Slots may wait for copies of what was saved before, for a while.
            last = step + (PATIENT_SAVES if self.partners else 2)
            while good < 3:
                rank.sleep(1.0)
                save = rank.save(step)
                with contextlib.suppress(SaveFailed):
                    if save is not None and not save.skipped:
                        save.wait("staged", timeout_s=SAVE_S)
                        good += 1
                if step - good >= last - 2:
                    raise Violation(f"step {step} was not saved in peace: {save!r}")
                step += 1
            rank.sleep(1.0)
            deadline_s = self.world.loop.time() + SETTLE_S
            while not all(save.done() for save in rank.saves):
                if self.world.loop.time() > deadline_s:
                    raise Violation(f"saves are not settled: {rank.saves}")
                rank.sleep(5.0)

        if not await job.run(script):
            if any(isinstance(rank.error, NoHealthyStep) for rank in job.ranks):
                return
            raise Violation("the last job failed")
        deadline_s = self.world.loop.time() + SETTLE_S
        while owed := self.oracles.check_settled(nodes):
            if self.world.loop.time() > deadline_s:
                raise Violation(f"not settled: {owed}")
            await asyncio.sleep(5.0)
        self.oracles.check_agreement(nodes)
        self.oracles.check_commits(nodes)


@contextlib.contextmanager
def _logged(world: World) -> Iterator[None]:
    logger = logging.getLogger("mtckpt")
    handler = Collected(world)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.ERROR if world.log is None else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        logger.setLevel(before[0])


def run_seed(
    seed: int, log: Callable[[str], None] | None = None, *, partners: bool = False
) -> Story:
    """Play the story of a seed, told line by line to ``log``. Raises Violation.

    ``partners``: another one, with copies on other nodes, and with bytes that change.
    """
    drama = Drama(seed, partners=partners)
    world = drama.world
    world.log = log
    with names_of(world).in_place(), _logged(world):
        try:
            world.loop.run_until_complete(drama.play())
            if world.problems:
                raise Violation("; ".join(world.problems[:5]))
        except (Violation, Stuck, CheckpointError) as error:
            raise Violation(f"seed {seed}: {error}") from error
        finally:
            drama.story.virtual_s = world.loop.time() - 1000.0
            world.close()
    drama.oracles.count()
    drama.story.faults = drama.faults.told
    drama.story.restores = drama.oracles.num_restores
    drama.story.acknowledged = drama.oracles.num_acknowledged
    return drama.story


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _broken(seed: int, *, partners: bool = False) -> str:
    """What broke in the story of a seed; empty if nothing did."""
    try:
        run_seed(seed, partners=partners)
    except Exception as error:  # noqa: BLE001 - the next seed is another story
        # Whatever it is: it is shown and counted, and the next seed is another story.
        return f"{type(error).__name__}: {error}"[:400].replace("\n", " ")
    return ""


def run_seeds(seeds: range, num_processes: int = 1, *, partners: bool = False) -> Iterator[str]:
    """What broke in the stories of many seeds that follow one another, in their order.

    Several processes take turns with some hundred seeds each.
    """
    if num_processes <= 1:
        yield from filter(None, (_broken(seed, partners=partners) for seed in seeds))
        return
    parts = [seeds[at : at + SEEDS_AT_ONCE] for at in range(0, len(seeds), SEEDS_AT_ONCE)]
    run = functools.partial(_run_elsewhere, partners=partners)
    with ThreadPoolExecutor(num_processes) as threads:
        for lines in threads.map(run, parts):
            yield from lines


def _run_elsewhere(seeds: range, *, partners: bool) -> list[str]:
    """What broke in the stories of these seeds, played in a process of their own."""
    command = [sys.executable, "-m", "mtckpt.testing.simulation", str(seeds[0]), str(len(seeds))]
    if partners:
        command.append(PARTNERS)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    *lines, last = done.stdout.splitlines() or [""]
    if f"{len(lines)} broken" not in last:
        lines.append(f"the process of seeds {seeds[0]} to {seeds[-1]} ended: {done.returncode}")
    return lines


def main(arguments: list[str]) -> int:
    """Tell one seed's story, or run many."""
    partners = PARTNERS in arguments
    arguments = [each for each in arguments if each != PARTNERS]
    first, count, num_processes = [*map(int, arguments), 1, 1][:3]
    if len(arguments) == 1:
        _say(str(run_seed(first, _say, partners=partners)))
        return 0
    started_s = time.perf_counter()
    num_broken = 0
    for what in run_seeds(range(first, first + count), num_processes, partners=partners):
        num_broken += 1
        _say(what)
    each_ms = 1000 * (time.perf_counter() - started_s) / count
    _say(f"{count} seeds, {each_ms:.1f} ms each, {num_broken} broken")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
