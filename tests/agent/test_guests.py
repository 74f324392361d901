"""What a node acknowledges of other nodes' parts: what it has, and what it was offered now."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import save_name
from mtckpt.agent import work
from mtckpt.agent.fetching import Fetcher
from mtckpt.agent.guests import Guests, Offer, Taken
from mtckpt.agent.nodes import News, layout_of, moved
from mtckpt.agent.notes import config_of
from mtckpt.agent.peers import _Kept
from mtckpt.agent.protocol import Join, NodeOfRun, TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import AgentUnavailable, NodeDraining, TierFull, TierUnavailable

ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"
ADDRESSES = [PeerAddress(f"10.0.0.{n}", 1, 2, "", f"agent-{n}", "ab"[n]) for n in range(2)]


class Scene:
    """The node of rank 0, to which that of ranks 1 and 2 offers its parts of a save."""

    def __init__(self) -> None:
        nodes = [NodeOfRun(ADDRESSES[0], [0]), NodeOfRun(ADDRESSES[1], [1, 2])]
        self.run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
        self.join = Join("h", "00" * 32, 3, nodes)
        self.run.layout = layout_of(self.join, 0)
        self.run.secret = "now"
        self.pulled: list[tuple[int, str]] = []
        self.lets_through = asyncio.Event()
        self.refused = ""
        self.is_full = False
        self.found: list[work.SaveScan] = []
        self.noted = work.RunConfig("r", "r")
        tools = Tools(cast(Any, self), Limits(), EventStream())
        peers = cast(Any, SimpleNamespace(verbs={}))
        arrived = Fetcher(tools).arrived
        self.guests = Guests(tools, peers, "boot", self._nothing, self._note, arrived)
        self.offer = Offer(1, ADDRESSES[1], str(save_name(1, 1, ID)), ID, [1])

    async def _nothing(self, *_: Any) -> None:
        """No node has moved."""

    async def _note(self, run: RunState) -> None:
        if self.is_full:
            raise TierFull("no page is left", tier="ram")
        self.noted = config_of(run)

    async def call(self, command: work.Command, **_: Any) -> Any:
        """In the place of the data processes."""
        if isinstance(command, work.Pull):
            await self.lets_through.wait()
            if self.refused == command.secret:
                raise TierUnavailable("its secret is another by now", tier="peers")
            self.pulled.append((command.rank, command.secret))
            return work.Flushed(100, 0.1, True)
        if isinstance(command, work.Scan):
            return work.Scanned([work.RunScan("r", self.found)])
        assert isinstance(command, work.Delete)
        return work.Deleted()

    async def arrives(self) -> None:
        """What was offered so far is taken, or refused, before anybody asks again."""
        self.lets_through.set()
        await asyncio.gather(*self.guests._tools.tasks, return_exceptions=True)

    async def ask(self, *ranks: int, wait_s: float = 5.0) -> Taken:
        offer = msgspec.structs.replace(self.offer, ranks=list(ranks), wait_s=wait_s)
        return await self.guests.offered(self.run, offer)


def test_a_copy_is_acknowledged_once_it_is_there() -> None:
    async def story() -> None:
        scene = Scene()
        assert (await scene.ask(1, wait_s=0.0)).boot_id == ""
        scene.lets_through.set()
        assert (await scene.ask(1)).boot_id == "boot"

    asyncio.run(story())


def test_a_copy_that_is_gone_when_it_is_asked_for_is_not_acknowledged() -> None:
    """Taken, and removed by hand before its owner asked again."""

    async def story() -> None:
        scene = Scene()
        await scene.ask(1, wait_s=0.0)
        await scene.arrives()
        scene.run.saves[scene.offer.save].guests.clear()
        with pytest.raises(AgentUnavailable, match="is gone again"):
            await scene.ask(1)
        assert (await scene.ask(1)).boot_id == "boot"
        assert scene.pulled == [(1, "now"), (1, "now")]

    asyncio.run(story())


@pytest.mark.parametrize("why", ["gone", "emptying"])
def test_memory_that_is_being_freed_takes_no_copies(why: str) -> None:
    """Nobody would know of what came after that."""

    async def story() -> None:
        scene = Scene()
        scene.lets_through.set()
        setattr(scene.run, why, True)
        with pytest.raises(AgentUnavailable, match="goes from the memory of this node"):
            await scene.ask(1)
        assert scene.pulled == []
        setattr(scene.run, why, False)  # it could not be freed
        assert (await scene.ask(1)).boot_id == "boot"

    asyncio.run(story())


def test_memory_that_is_too_full_for_a_note_has_no_copies_either() -> None:
    """Else they counted as parts that are here: what they seem to make whole is not."""

    async def story() -> None:
        scene = Scene()
        scene.lets_through.set()
        scene.is_full = True
        with pytest.raises(TierFull, match="no room for copies of other nodes"):
            await scene.ask(1)
        assert scene.run.saves[scene.offer.save].guests == set()
        scene.is_full = False
        assert (await scene.ask(1)).boot_id == "boot"

    asyncio.run(story())


@pytest.mark.parametrize("thin", [False, True])
def test_what_comes_back_to_its_own_node_is_a_slot_if_nothing_is_left_out(thin: bool) -> None:
    """Else it would take room beside the slots; and to a store it goes from here, if it has to."""

    async def story() -> None:
        scene = Scene()
        run, name = scene.run, scene.offer.save
        for kind in ("peers", "store"):
            ref = work.TierRef(kind, "/there", label=kind)
            run.tiers[kind] = TierState(kind, TierConfig(kind, kind, "/there"), ref)
        scene.found = [
            work.SaveScan(
                name, 1, 1, [0, 1], 3, False, 100, ID, due=["store"], shard_bytes=[60, 40],
                thin=[0] if thin else [],
            )
        ]  # fmt: skip
        scene.lets_through.set()
        assert (await scene.ask(0, 1)).boot_id == "boot"
        save = run.saves[name]
        assert save.guests == ({0, 1} if thin else {1})
        assert scene.noted.extra["guests"] == {name: sorted(save.guests)}
        assert [(slot.rank, slot.shard_bytes) for slot in run.slots.values()] == (
            [] if thin else [(0, 60)]
        )
        assert save.due == (set() if thin else {"peers", "store"})
        assert not save.is_complete(RAM)  # of three ranks

    asyncio.run(story())


def test_what_an_agent_that_was_killed_had_taken_back_is_taken_in_by_the_next_one() -> None:
    """It had noted it as a copy, had it all, and not said so: it is offered again."""

    async def story() -> None:
        scene = Scene()
        name = scene.offer.save
        scene.run.saves[name] = SaveState(save_name(1, 1, ID), ID, guests={0})
        scene.found = [work.SaveScan(name, 1, 1, [0], 3, False, 60, ID, shard_bytes=[60])]
        scene.lets_through.set()
        assert (await scene.ask(0)).boot_id == "boot"
        assert scene.run.saves[name].guests == set()
        assert [slot.rank for slot in scene.run.slots.values()] == [0]

    asyncio.run(story())


def test_what_was_offered_before_does_not_stand_for_what_is_offered_now() -> None:
    async def more_ranks() -> None:
        scene = Scene()
        await scene.ask(1, wait_s=0.0)
        await scene.arrives()
        assert (await scene.ask(1, 2)).boot_id == "boot"
        assert {rank for rank, _ in scene.pulled} == {1, 2}

    async def another_start() -> None:
        scene = Scene()
        scene.run.secret = scene.refused = "before"
        await scene.ask(1, wait_s=0.0)
        await scene.arrives()
        scene.run.secret = "now"
        assert (await scene.ask(1)).boot_id == "boot"

    asyncio.run(more_ranks())
    asyncio.run(another_start())


@pytest.mark.parametrize(
    ("ranks", "away", "has_own"),
    [
        ([0], "", True),
        ([0], "handed", False),
        ([0], "drained", False),
        ([1], "", False),
        ([0, 1], "", False),
    ],
)
def test_a_node_that_goes_says_whether_what_it_is_offered_is_its_own(
    ranks: list[int], away: str, has_own: bool
) -> None:
    """Then it brings it away itself. Not where it has given it to somebody, who may ask since it
    goes, too: each would count on the other. To whom, an agent started since does not know."""
    scene = Scene()
    save = scene.run.saves[scene.offer.save] = SaveState(save_name(1, 1, ID), ID, world_size=3)
    save.ranks[RAM], save.handed = {0}, away == "handed"
    scene.run.draining, scene.run.drained = "the node goes", away == "drained"
    offer = msgspec.structs.replace(scene.offer, ranks=ranks)
    with pytest.raises(NodeDraining) as caught:
        asyncio.run(scene.guests.offered(scene.run, offer))
    assert caught.value.details["has_own"] is has_own


@pytest.mark.parametrize(("agent_id", "leaving"), [("agent-1", {1}), ("another", set())])
def test_the_next_agent_knows_who_gave_away_what_is_here(
    tmp_path: Path, agent_id: str, leaving: set[int]
) -> None:
    """The node has gone, and what is here is nowhere else. Where another agent is on it, it has
    not."""

    async def story() -> RunState:
        scene = Scene()
        await scene.ask(1, wait_s=0.0)  # under way, as any copy, when the node is to go
        leaves = msgspec.structs.replace(scene.offer, leaving=True, wait_s=5.0)
        scene.lets_through.set()
        assert (await scene.guests.offered(scene.run, leaves)).boot_id == "boot"
        assert scene.run.leaving == {1}
        address = msgspec.structs.replace(ADDRESSES[1], agent_id=agent_id)
        kept = msgspec.json.encode(_Kept(moved(scene.join, 1, address), rank=0))

        async def call(command: work.Command, **_: Any) -> work.Result:
            """A data process of the next agent."""
            if isinstance(command, work.ReadRunConfigs):
                return work.RunConfigs([scene.noted], [], {"r": kept})
            return work.Scanned() if isinstance(command, work.Scan) else work.Stored()

        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        await registry._load_root(str(tmp_path))
        return registry.runs["r"]

    assert asyncio.run(story()).leaving == leaving


def test_who_gives_away_is_noted_though_the_first_offer_came_to_nothing() -> None:
    async def story() -> list[str]:
        scene = Scene()
        await scene.ask(1, wait_s=0.0)
        await asyncio.sleep(0)  # it is noted, and under way
        leaves = msgspec.structs.replace(scene.offer, leaving=True, wait_s=5.0)
        scene.lets_through.set()
        scene.run.draining = "the node goes"  # and then it stays
        with pytest.raises(NodeDraining):
            await scene.guests.offered(scene.run, leaves)
        scene.run.draining = ""
        assert (await scene.guests.offered(scene.run, leaves)).boot_id == "boot"
        return list(scene.noted.extra.get("leaving", ()))

    assert asyncio.run(story()) == ["agent-1"]


def test_what_else_is_where_a_run_was_taken_over_is_taken_in_too(tmp_path: Path) -> None:
    """The disk was silent when this agent began, so it has not looked there."""

    async def story() -> dict[str, RunState]:
        asked: list[str | None] = []

        async def call(command: work.Command, **_: Any) -> work.Result:
            if isinstance(command, work.ReadRunConfigs):
                return work.RunConfigs([work.RunConfig("r", "r"), work.RunConfig("s", "s")], [])
            if isinstance(command, work.Scan):
                asked.append(command.run_key)
                return work.Scanned()
            return work.Stored()

        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        taken = work.RunConfig("r", "r", [TierConfig("disk", "disk", "/elsewhere")])
        for _ in range(2):
            await registry._load_root(str(tmp_path), taken)
        assert asked == [None, "r"]
        return registry.runs

    runs = asyncio.run(story())
    assert set(runs) == {"r", "s"}
    assert list(runs["r"].tiers) == ["disk"]


def test_the_newest_step_that_an_agent_finds_is_owed_to_partners_still(tmp_path: Path) -> None:
    """It is not told who they are before it has looked into its memory; nor does a start of the job
    on other nodes find that the step had none when it was on one."""

    async def story() -> tuple[SaveState, bool]:
        scene = Scene()
        name = scene.offer.save
        scene.run.saves[name] = SaveState(save_name(1, 1, ID), ID, guests={1, 2})
        config = config_of(scene.run)
        tier = TierConfig("peers", "peers", "1 other node", copies=1)
        config = msgspec.structs.replace(config, tiers=[tier])
        save = work.SaveScan(
            name, 1, 1, [0, 1, 2], world_size=3, complete=True, save_id=ID, due=["peers"],
            shard_bytes=[1, 1, 1],
        )  # fmt: skip
        kept = msgspec.json.encode(_Kept(scene.join, rank=0))

        async def call(command: work.Command, **_: Any) -> work.Result:
            await asyncio.sleep(0)
            if isinstance(command, work.ReadRunConfigs):
                return work.RunConfigs([config], [], {"r": kept})
            if isinstance(command, work.Scan):
                return work.Scanned([work.RunScan("r", [save])])
            return work.Stored()

        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        await registry._load_root(str(tmp_path))
        run = registry.runs["r"]
        for _ in range(20):
            await asyncio.sleep(0)
        found = run.saves[name]
        is_owed = "peers" in found.owed
        found.superseded.add("peers")
        join = msgspec.structs.replace(scene.join, secret="11" * 32)
        registry.peers._kept["r"] = _Kept(join, rank=0)
        registry.links.join(run, 0)
        return found, is_owed

    save, was_owed = asyncio.run(story())
    assert was_owed
    assert "peers" in save.owed


def test_what_a_job_was_restored_from_is_not_still_to_come() -> None:
    """On a node that has nothing of it, while another one still has a part."""
    save = SaveState(save_name(1, 1, ID), ID, world_size=3)
    save.told[1] = News(str(save.name), ID, parts={RAM: [1, 2]})
    assert save.is_open
    save.chosen = True
    assert not save.is_open


def test_what_copies_made_whole_is_owed_to_nobody_once_they_are_let_go() -> None:
    """This node's own parts are left of it, and the others have their newer ones."""

    async def story() -> None:
        scene = Scene()
        run = scene.run
        config = TierConfig("peers", "peers", "1 other node", copies=1)
        run.tiers["peers"] = TierState("peers", config, run.ram, scanned=True)
        old, new = (SaveState(save_name(step, 1, ID), ID, world_size=3) for step in (1, 2))
        for save in (old, new):
            run.saves[str(save.name)] = save
            save.ranks[RAM], save.stages = {0}, ["staged"]
        old.guests, old.due = {1, 2}, {"peers"}
        new.stages.append("replicated")
        new.told[1] = News(str(new.name), ID, parts={RAM: [1, 2]})
        run.discharge(scanned=False)
        assert old.owed == {"peers"}
        await scene.guests.let_go(run)
        assert not old.guests
        assert not old.owed
        assert old.superseded == {"peers"}

    asyncio.run(story())
