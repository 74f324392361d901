"""What the start of a job on one node takes from what an earlier start left there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_trainer import FakeTrainer

import mtckpt
from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import FORMAT_VERSION, Incarnation
from mtckpt._session import start_ticks
from mtckpt.agent import work
from mtckpt.agent.flushing import Flusher
from mtckpt.agent.links import Links
from mtckpt.agent.owners import Owner
from mtckpt.agent.peers import Peers
from mtckpt.agent.protocol import PROTOCOL_VERSION, Begin, Join, NodeOfRun, Open, TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry as AgentRegistry
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, TierState
from mtckpt.agent.tools import Tools
from mtckpt.agent.verbs import Caller, Verbs
from mtckpt.errors import NodeDraining, RunLocked, TierUnavailable

ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"


class Registry:
    """As much of the agent as a start needs; ``left``: other nodes are spoken to no more."""

    def __init__(self) -> None:
        self.tools = Tools(cast(Any, self), Limits(), EventStream())
        self.ring = nobody = cast(Any, None)
        self.flusher = Flusher(self.tools, nobody, nobody, nobody)
        self.peers = Peers(cast(Any, self))
        self.left = False
        self.runs: dict[str, RunState] = {}
        self.agent_id = "a"
        self.links = SimpleNamespace(leave=self._leave, join=self._join)
        self.joined: list[tuple[int, str]] = []
        self.kept: list[bytes] = []
        self.slow: asyncio.Event | None = None
        self.agreement = SimpleNamespace(begun=self._nothing)
        self.wait_scanned = self.write_config = self._nothing

    def _leave(self, _: RunState) -> None:
        self.left = True

    def _join(self, run: RunState, rank: int) -> None:
        join = self.peers.joined(run.key)
        assert join is not None
        self.joined.append((rank, join.secret))

    async def _nothing(self, *_: Any) -> None:
        """Every tier has answered; nothing is written."""

    async def call(self, command: work.Command, **_: Any) -> work.Stored:
        assert isinstance(command, (work.PutSmall, work.WriteJoin))
        if isinstance(command, work.WriteJoin):
            self.kept.append(command.data)
        if self.slow is not None:
            slow, self.slow = self.slow, None
            await slow.wait()
        return work.Stored()


@pytest.mark.parametrize(
    ("incarnation", "dead", "left"),
    [
        (0, False, True),  # it is about to begin as well: both are here
        (2, False, True),
        (1, False, False),  # nobody's rank: its launcher was killed, and it lives on
        (0, True, False),
    ],
)
def test_a_process_that_an_earlier_start_left_behind_is_no_rank_of_this_one(
    incarnation: int, dead: bool, left: bool
) -> None:
    """Two ranks, and rank 1 on another node now; where it was before, its old process still is."""
    registry = Registry()
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.owners[0] = Owner("new", 0, 1, 1, 1, "host", world_size=2)
    run.owners[1] = Owner("other", 1, 2, 2, 2, "host", world_size=2, incarnation=incarnation)
    run.owners[1].dead = dead
    verbs = Verbs(cast(Any, registry))
    asyncio.run(verbs.begin(run, Begin("new", 2, ID)))
    assert registry.left is left


@pytest.mark.parametrize("parent_pid", [os.getppid(), 999_999])
def test_a_rank_left_behind_does_not_fence_ranks_of_a_job_that_has_more(parent_pid: int) -> None:
    """Its launcher was killed, and it comes to its first save while the next job starts."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    pid = os.getpid()
    run.owners[0] = Owner("old", 0, pid, start_ticks(pid), parent_pid, "host", world_size=1)
    run.owners[1] = other = Owner("new", 1, 2, 2, 2, "host", world_size=2)
    asyncio.run(Verbs(cast(Any, Registry())).begin(run, Begin("old", 1, ID)))
    # If it is no such rank, the other one is of a job that had more.
    assert bool(other.fenced_by) is (parent_pid == os.getppid())


def test_nodes_that_an_earlier_start_told_of_do_not_come_last() -> None:
    """Memory took long to keep them; the rank that told of them is gone, and a new start has come
    in the meantime, with the ranks on other nodes."""
    registry = Registry()
    verbs = Verbs(cast(Any, registry))
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    registry.runs["r"] = run
    nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2), [n]) for n in range(2)]
    before, after = Join("old", "00" * 32, 2, nodes), Join("new", "11" * 32, 2, nodes)

    async def story() -> None:
        registry.slow = slow = asyncio.Event()
        run.owners[0] = Owner("old", 0, 1, 1, 1, "host", world_size=2)
        earlier = asyncio.create_task(verbs.join(run, before))
        await asyncio.sleep(0)
        run.owners[0] = Owner("new", 0, 2, 2, 2, "host", world_size=2)
        later = asyncio.create_task(verbs.join(run, after))
        again = asyncio.create_task(verbs.join(run, before))
        await asyncio.sleep(0)
        slow.set()
        await asyncio.gather(earlier, later)
        with pytest.raises(RunLocked):
            await again

    asyncio.run(story())
    assert registry.joined == [(0, "00" * 32), (0, "11" * 32)]
    assert registry.peers.joined("r") == after


@pytest.mark.parametrize(("incarnation", "comes"), [(1, False), (2, True), (0, True)])
def test_a_rank_left_behind_does_not_bring_back_the_nodes_of_its_start(
    incarnation: int, comes: bool
) -> None:
    """It says them again when it finds another agent. It was not fenced where the rank of its
    number is on another node now."""
    registry = Registry()
    verbs = Verbs(cast(Any, registry))
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    registry.runs["r"] = run
    nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2), [n]) for n in range(2)]
    run.owners[0] = Owner("new", 0, 1, 1, 1, "host", world_size=2, incarnation=2)
    run.owners[1] = Owner("other", 1, 2, 2, 2, "host", world_size=2, incarnation=incarnation)
    run.incarnations[2] = Incarnation(FORMAT_VERSION, "r", 2, ID, None, "host", 1)
    now, before = Join("new", "11" * 32, 2, nodes), Join("other", "00" * 32, 2, nodes)
    asyncio.run(verbs.join(run, now))
    if comes:
        asyncio.run(verbs.join(run, before))
    else:
        with pytest.raises(RunLocked, match="started anew"):
            asyncio.run(verbs.join(run, before))
    assert registry.peers.joined("r") == (before if comes else now)


def test_an_agent_that_ends_while_it_is_told_of_its_nodes_leaves_no_other_place() -> None:
    """What it is told and which of the nodes it is are kept at once: a note of the start before
    would have the next agent take the place of another node."""
    registry, again = Registry(), Registry()
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    registry.runs["r"] = run
    nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2), [n]) for n in range(2)]
    run.owners[0] = Owner("new", 0, 1, 1, 1, "host", world_size=2)
    asyncio.run(Verbs(cast(Any, registry)).join(run, Join("new", "00" * 32, 2, nodes)))
    asyncio.run(again.peers.adopt(run, registry.kept[-1], 1))
    assert again.peers.rank_here("r") == 0
    assert again.peers.joined("r") == registry.peers.joined("r")


def test_a_start_waits_until_memory_that_is_being_freed_is_free(tmp_path: Path) -> None:
    """What it saves is not to go as well."""
    freed = asyncio.Event()

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Wipe):
            await freed.wait()
            return work.Freed(1)
        assert isinstance(command, work.WriteRunConfig)
        return work.Stored()

    async def story() -> tuple[RunState, RunState]:
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = AgentRegistry(tools, str(tmp_path), service=False)
        registry.held.loaded.append(str(tmp_path))
        verbs = Verbs(registry)
        old = registry.runs["r"] = RunState("r", "r", work.TierRef("ram", str(tmp_path), label=RAM))
        old.closing = True
        going = asyncio.create_task(registry.freer.let_go(old))
        message = Open(PROTOCOL_VERSION, "r", "h", 0, 1, os.getpid(), 1, 1, str(tmp_path), [])
        coming = asyncio.create_task(verbs.open(Caller(os.getpid(), os.geteuid()), "r", message))
        done, _ = await asyncio.wait([coming], timeout=0.05)
        assert not done
        freed.set()
        await asyncio.gather(going, coming)
        (owner,) = registry.runs["r"].owners.values()
        registry._unwatch(owner)
        return old, registry.runs["r"]

    old, new = asyncio.run(story())
    assert old.gone
    assert not new.gone
    assert new is not old


def test_a_start_that_comes_as_its_node_is_drained_is_refused(tmp_path: Path) -> None:
    """It was told to be safe to go, and what such a start saved would go with it."""

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            told = await registry.drainer.drain(1.0, "it is about to go")
            assert told.safe
            return work.RunConfigs()
        return work.Scanned([]) if isinstance(command, work.Scan) else work.Stored()

    async def story() -> None:
        registry.ready.set()
        message = Open(PROTOCOL_VERSION, "r", "h", 0, 1, os.getpid(), 1, 1, str(tmp_path), [])
        with pytest.raises(NodeDraining):
            await Verbs(registry).open(Caller(os.getpid(), os.geteuid()), "r", message)
        assert not registry.runs["r"].owners
        await registry.held.close()

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    registry = AgentRegistry(tools, str(tmp_path), service=False)
    asyncio.run(story())


def test_a_start_has_a_tier_asked_again_that_was_silent_for_long() -> None:
    asked = asyncio.Event()

    async def call(*_: Any, **__: Any) -> work.Result:
        if asked.is_set():
            return work.Scanned()
        asked.set()
        raise TierUnavailable("did not answer", tier="disk")

    async def story() -> None:
        unused = cast(Any, None)
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        flusher = Flusher(tools, unused, unused, unused)
        run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
        ref = work.TierRef("disk", "/nowhere", label="disk")
        tier = run.tiers["disk"] = TierState("disk", TierConfig("disk", "disk", ref.path), ref)
        tier.attempts = 10  # so that it is asked again in half a minute
        flusher.start(run)
        await asked.wait()
        assert tier.problem
        flusher.start(run)
        changed = run.changed
        await asyncio.wait_for(changed.wait(), 10.0)
        assert tier.scanned
        assert tier.task is not None
        tier.task.cancel()

    asyncio.run(story())


def test_copies_that_found_no_node_are_offered_at_once_to_those_of_a_new_start() -> None:
    """Its ranks have opened the run before it is known which nodes there are."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    ref = work.TierRef("peers", "", label="peers")
    tier = run.tiers["peers"] = TierState("peers", TierConfig("peers", "peers", ""), ref)
    tier.attempts = 10
    nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2), [n]) for n in range(2)]
    join = Join("new", "11" * 32, 2, nodes)
    peers = SimpleNamespace(verbs={}, joined=lambda _: join)
    tools = SimpleNamespace(start=lambda coroutine, _: coroutine.close())
    unused = cast(Any, None)
    links = Links(cast(Any, tools), unused, unused, unused, unused, cast(Any, peers))
    links.join(run, 0)
    assert tier.retry.is_set()
    assert tier.attempts == 0


def test_a_start_of_which_no_file_tells_yet_is_not_repeated_by_the_next_one(
    tmp_path: Path, own: Callable[..., FakeTrainer], ram_dir: Path
) -> None:
    """As one whose process ended while its agent was writing the file."""
    before = own("r")
    before.open()
    before.begin()
    for file in ram_dir.rglob("incarnation-*"):
        file.unlink()
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20) as checkpointer:
        assert not checkpointer.restore({"n": 0})
        checkpointer.save(1, {"n": 1}).wait("local", timeout_s=20)
