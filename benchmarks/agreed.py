"""Ten thousand ranks on 1,250 nodes agree on a save, and each of them plans 1,000 tensors.

The node of rank 0 leads, and has more to do than any other: it is simulated with shipped code, its
agent and all eight of its ranks in this process, from the first words of the ranks to a save that
every node knows to be whole. What other nodes say is made by the code that says it, encoded as it
is on a wire; how they come to say it is not simulated. A rank's plan is made by the shipped adapter
from DTensors of a process group of that size, in which nothing is sent.

Seconds are of one core, of this process. Messages are counted for each of the other nodes, there
and back, for one save.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from benchmarks import measuring

RANKS = 10_000
PER_NODE = 8
TENSORS = 1000
STEPS = (1, 2)


def main() -> None:
    chosen = measuring.options(__doc__, rounds=0, ranks=0, tensors=0)
    rounds, tensors = chosen.rounds or 5, chosen.tensors or TENSORS
    num_ranks = (chosen.ranks or RANKS) // PER_NODE * PER_NODE
    agreed: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in agree(num_ranks).items():
            agreed.setdefault(name, []).append(value)
    messages = agreed.pop("messages")
    planned = {kind: _plan(kind, num_ranks, tensors, rounds) for kind in _KINDS}
    worst = [max(each) for each in zip(*(one["plan"] for one in planned.values()), strict=True)]
    facts = {"ranks": num_ranks, "nodes": num_ranks // PER_NODE, "tensors": tensors}
    # What each rank of the first node does at the start, they do at the same time elsewhere.
    started = [each / PER_NODE for each in agreed["start"]]
    whole = [sum(each) for each in zip(started, agreed["agree"], worst, strict=True)]
    measuring.row("agree and plan", whole, goal="value <= 2", **facts)
    goal = "value <= 4"
    measuring.row("messages a node, answers too", messages, unit="", goal=goal, **facts)
    measuring.row("the lead's node: start of the job, all its ranks", agreed["start"], **facts)
    measuring.row("the lead's node: a save", agreed["agree"], **facts)
    for kind, found in planned.items():
        for name, samples in found.items():
            measuring.row(f"a rank, {kind}: {name}", samples, **facts)
    restored = [_plan_restore(num_ranks) for _ in range(rounds)]
    measuring.row("a rank: plan of a restore, all nodes' holdings", restored, **facts)


# -- agreeing --------------------------------------------------------------------------------------


class Crowd:
    """The group of a job of which only the first node's ranks run here."""

    def __init__(self, world: Any, num_ranks: int) -> None:
        from mtckpt.testing._trainers import Group

        self._near = Group(world, PER_NODE)
        self.world_size = num_ranks
        self._far: dict[int, list[bytes]] = {}

    def member(self, rank: int) -> Member:
        return Member(self, self._near.member(rank))

    def others(self, turn: int, near: Sequence[bytes]) -> list[bytes]:
        """What the ranks of other nodes give: what those of this one do, and of their own nodes."""
        if turn not in self._far:
            told = [msgspec.json.decode(each) for each in near]
            self._far[turn] = [
                msgspec.json.encode(_as_elsewhere(told[rank % PER_NODE], rank // PER_NODE))
                for rank in range(PER_NODE, self.world_size)
            ]
        return self._far[turn]


class Member:
    """See ``_coordination.Group``."""

    def __init__(self, crowd: Crowd, near: Any) -> None:
        self.rank, self.world_size = near.rank, crowd.world_size
        self._crowd, self._near = crowd, near
        self._turn = itertools.count()

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        near = self._near.exchange(stage, value, timeout_s)
        return [*near, *self._crowd.others(next(self._turn), near)]


def _as_elsewhere(told: tuple[str, Any], node: int) -> tuple[str, Any]:
    """What a rank of another node would say at a stage."""
    stage, value = told
    if stage == "join":
        (boot_id, *place), agent_id, *rest = value
        return stage, [[f"{boot_id}-{node}", *place], f"{agent_id}-{node}", *rest]
    if stage == "listen":
        address, _, why = value
        return stage, [_moved(address, node), "", why]
    return stage, value


def _moved(address: dict[str, Any], node: int) -> dict[str, Any]:
    """Where another node's agent is."""
    more = {"host": f"10.{node // 62_500}.{node // 250 % 250}.{node % 250}", "name": f"n{node}"}
    more |= {key: f"{address[key]}-{node}" for key in ("boot_id", "agent_id")}
    return {**address, **more}


class Told:
    """What a simulated rank tells: nobody listens."""

    def restored(self, *_: Any) -> None: ...
    def saved(self, *_: Any) -> None: ...
    def stalled(self, *_: Any) -> None: ...


def agree(num_ranks: int) -> dict[str, float]:
    """Seconds of the start and of a save, and messages for each other node in that."""
    from mtckpt.agent import peers
    from mtckpt.testing._names import names_of
    from mtckpt.testing._settings import Settings
    from mtckpt.testing._trainers import Rank
    from mtckpt.testing.cluster import Node, World

    world = World(1)
    names = names_of(world)
    sent: list[str] = []
    names.put(peers, "PeerClient", _clients(sent))
    settings = Settings(has_disk=False, timeout_s=1000.0, max_stall_s=100.0)
    found: dict[str, float] = {}
    with names.in_place():
        node, crowd = Node(world, "n0"), Crowd(world, num_ranks)
        ranks = [Rank(node, crowd, rank, settings, Told()) for rank in range(PER_NODE)]  # type: ignore[arg-type]
        wanted = [world.loop.create_future() for _ in STEPS]
        begun = [0]

        def script(rank: Any) -> None:
            rank.restore()
            begun[0] += 1
            for number, step in enumerate(STEPS):
                rank.world.loop.fiber.pause(wanted[number], None)
                rank.save(step).wait("staged", timeout_s=100.0)

        async def play() -> None:
            started_s = time.process_time()
            for rank in ranks:
                rank.start(script)
            while begun[0] < PER_NODE:
                _look_for_errors(ranks)
                await _pause(0.1)
            await _pause(5.0)  # all nodes are greeted
            found["start"] = time.process_time() - started_s
            for number, step in enumerate(STEPS):
                sent.clear()
                started_s = time.process_time()
                wanted[number].set_result(None)
                heard = await _others_have(node, step)
                while not all(
                    len(rank.saves) > number and rank.saves[number].reached >= {"staged"}
                    for rank in ranks
                ):
                    _look_for_errors(ranks)
                    await _pause(0.1)
                await _pause(5.0)  # and all nodes are told
                found["agree"] = time.process_time() - started_s
                found["messages"] = 2.0 * (heard + len(sent)) / (num_ranks // PER_NODE - 1)

        gc.collect()
        try:
            world.loop.run_until_complete(play())
        finally:
            world.close()
    return found


def _look_for_errors(ranks: Sequence[Any]) -> None:
    for rank in ranks:
        if rank.error is not None or rank.main.error is not None:
            raise SystemExit(f"rank {rank.rank}: {rank.error or rank.main.error!r}")


async def _pause(pause_s: float) -> None:
    import asyncio

    await asyncio.sleep(pause_s)


async def _others_have(node: Any, step: int) -> int:
    """Every other node tells the lead, in the seconds after a save has begun, that it has its part;
    how many messages that took."""
    from mtckpt.agent import protocol
    from mtckpt.agent.nodes import Tell, news_for_lead
    from mtckpt.agent.saves import SaveState

    registry = node.agent.registry
    (run,) = registry.runs.values()
    while not (saves := [save for save in run.saves.values() if save.name.step == step]):
        await _pause(0.01)
    (mine,) = saves
    while len(mine.ranks.get("ram", ())) < PER_NODE:
        await _pause(0.01)
    type_, hear = registry.peers.verbs["tell"]
    made = []
    for number, other in enumerate(run.layout.nodes):
        if number != run.layout.here:
            layout = dataclasses.replace(run.layout, here=number)
            save = SaveState(mine.name, mine.save_id, mine.incarnation_id, mine.world_size)
            save.ranks, save.plan_digest, save.due = (
                {"ram": set(other.ranks)},
                mine.plan_digest,
                set(mine.due),
            )
            news = news_for_lead(save, layout, run.incarnation)
            assert news is not None
            made.append(protocol.encode(Tell(number, other.address, [news])))

    async def come(body: bytes) -> None:
        await hear(run, protocol.decode(body, type_))

    for body in made:
        node.world.loop.call_later(
            node.world.random.random() * 2.0, lambda body=body: node.agent.start(come(body))
        )
    return len(made)


def _clients(sent: list[str]) -> Callable[..., Any]:
    """In the place of what asks other nodes' agents: each has heard what it was told."""
    from mtckpt.agent import protocol
    from mtckpt.agent.nodes import Heard

    class Client:
        def __init__(self, address: Any, run_key: str, secret: bytes) -> None:
            self.address = address

        async def call(self, verb: str, message: Any, reply_type: Any, timeout_s: float) -> Any:
            protocol.encode(message)
            sent.append(verb)
            await _pause(0.001)
            return Heard(self.address.name)

        def close(self) -> None: ...

    return Client


# -- planning --------------------------------------------------------------------------------------


def _state(kind: str, num_ranks: int, tensors: int) -> dict[str, Any]:
    """Arrays of this rank, of a job of that size: ``kind`` says how they lie over its ranks."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    import mtckpt

    if kind == "replicated":
        return {f"t{i:04}": mtckpt.replicated(torch.zeros(16, 16)) for i in range(tensors)}
    if kind == "HSDP":
        mesh = init_device_mesh("cpu", (num_ranks // PER_NODE, PER_NODE))
        placements: list[Any] = [Replicate(), Shard(0)]
    else:
        mesh, placements = init_device_mesh("cpu", (num_ranks,)), [Shard(0)]
    return {
        f"t{i:04}": DTensor.from_local(torch.zeros(2, 16), mesh, placements, run_check=False)
        for i in range(tensors)
    }


_KINDS = ("FSDP", "HSDP", "replicated", "replicated, shared out")


def _plan(kind: str, num_ranks: int, tensors: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a new plan, and of one that is kept, for each round."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mtckpt._pieces import Members
    from mtckpt._save import Planner
    from mtckpt.adapters import active_adapters

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        layout, _, shared = kind.partition(", ")
        state = _state(layout, num_ranks, tensors)
        nodes = tuple(
            tuple(range(first, first + PER_NODE)) for first in range(0, num_ranks, PER_NODE)
        )
        members = Members(0, num_ranks, nodes[0])
        if shared:
            members = dataclasses.replace(members, spread=nodes, copies=1)
        found: dict[str, list[float]] = {"plan": [], "the same plan again": []}
        for _ in range(rounds):
            planner = Planner(members)
            gc.collect()
            for samples in found.values():
                started_s = time.process_time()
                planner.prepare(state, active_adapters())
                samples.append(time.process_time() - started_s)
    finally:
        dist.destroy_process_group()
    return found


def _plan_restore(num_ranks: int) -> float:
    """Seconds of choosing a step and its sources, from what the first ranks of all nodes told."""
    from mtckpt._choice import plan_restore
    from mtckpt._holdings import HeldSave, Holdings, Part, is_whole
    from mtckpt._manifest import SaveName

    save_id = "01234567-89ab-cdef-0123-456789abcdef"
    wire = []
    for node in range(num_ranks // PER_NODE):
        ranges = ((PER_NODE * node, PER_NODE * (node + 1)),)
        parts = (Part(save_id, num_ranks, "p" * 32, ranges, PER_NODE << 30),)
        saves = tuple(
            HeldSave(str(SaveName(step, 1, "0123456789ab")), parts, unfinished=True)
            for step in (10, 20)
        )
        wire += [msgspec.json.encode(Holdings(f"{tier}-{node}", saves)) for tier in ("ram", "disk")]
    gc.collect()
    started_s = time.process_time()
    held = [msgspec.convert(msgspec.json.decode(each), Holdings) for each in wire]
    assert is_whole(held, "latest")
    plan = plan_restore(held, "latest", fastest=[holdings.label for holdings in held])
    took_s = time.process_time() - started_s
    assert len(plan.candidates) == 2
    assert len(plan.candidates[0].sources) == num_ranks
    return took_s


if __name__ == "__main__":
    main()
