"""Whether a save of several nodes is called off, kept in doubt or left alone: facts and outcome."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Incarnation, save_name
from mtckpt.agent.agreement import Agreement
from mtckpt.agent.links import Link, Links
from mtckpt.agent.nodes import News, Tell, layout_of
from mtckpt.agent.owners import Owner
from mtckpt.agent.protocol import CallOff, Join, NodeOfRun, Seal, TierConfig
from mtckpt.agent.queue import Limits, SlotState
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, Slot, TierState
from mtckpt.agent.tools import Tools
from mtckpt.agent.work import Recycled, SealedSlot, SlotFiles, TierRef
from mtckpt.errors import AgentUnavailable, CheckpointError, ObjectNotFound, TierUnavailable

ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"
OTHER_ID = "6ba7b811-9dad-51d1-80b4-00c04fd430c8"
LIMITS = Limits(rank_s=10.0)


def _nothing(*_: Any) -> None:
    """Neither slots nor tiers nor replicas are looked at here."""


class Slots:
    """In the place of the ring: which shards were given back."""

    def __init__(self) -> None:
        self.given_back: list[str] = []
        self.problem: CheckpointError | None = None

    async def recycle_shard(self, run: RunState, save: SaveState, shard: Slot) -> Slot:
        if self.problem is not None:
            raise self.problem
        self.given_back.append(shard.slot_id)
        run.drop_shard(save, shard.slot_id, shard.rank)
        return shard


class Scene:
    """Three nodes with a rank each, seen from one of them."""

    def __init__(self, here: int) -> None:
        nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2, name="abc"[n]), [n]) for n in range(3)]
        self.run = RunState("r", "r", TierRef("ram", "/nowhere", label=RAM))
        self.run.layout = layout_of(Join("h", "00" * 32, 3, nodes), here)
        self.run.links = {number: Link() for number in self.run.layout.partners()}
        self.slots = Slots()
        tools = Tools(cast(Any, None), LIMITS, EventStream())
        self.agreement = Agreement(tools, cast(Any, self.slots))
        self.owner = Owner("h", here, 1, 1, 1, "host", world_size=3, incarnation=1)

    def save(self, step: int, *, here: bool = True, waited_s: float = 0.0) -> SaveState:
        name = save_name(step, 1, ID)
        made = self.run.saves[str(name)] = SaveState(name, ID, world_size=3)
        made.began_s = time.monotonic() - waited_s
        if here:
            self.seal(made)
        return made

    def seal(self, save: SaveState) -> None:
        save.ranks[RAM] = {self.owner.rank}
        slot = Slot(f"slot-{save.name.step}", SlotState.SEALED, 100, save=str(save.name))
        slot.rank = self.owner.rank
        self.run.slots[slot.slot_id] = slot

    def hear(self, node: int, save: SaveState, **facts: Any) -> None:
        news = News(str(save.name), ID, world_size=3, **facts)
        address = PeerAddress(f"10.0.0.{node}", 1, 2, agent_id="abc"[node])
        asyncio.run(self.links().hear(self.run, Tell(node, address, [news])))

    def links(self) -> Links:
        address = PeerAddress("10.0.0.0", 1, 2, agent_id="a")
        joined = {"joined": lambda _: None, "joining": asyncio.Lock()}
        peers = SimpleNamespace(verbs={}, address=address, **joined)
        tools = Tools(cast(Any, None), LIMITS, EventStream())
        names = ("note_staged", "look_again", "look")
        unused = cast(Any, SimpleNamespace(**dict.fromkeys(names, _nothing)))
        return Links(tools, unused, self.agreement, unused, unused, cast(Any, peers))

    def overdue(self) -> None:
        asyncio.run(self.agreement.overdue(self.run))


def test_a_rank_that_went_on_without_a_save_calls_it_off() -> None:
    scene = Scene(0)
    first, second = scene.save(1), scene.save(2)
    scene.hear(1, first, parts={RAM: [1]})
    assert not first.called_off
    scene.hear(2, second, parts={RAM: [2]})
    assert first.failed[RAM].error == "StepDisagreement"
    assert "rank 2 on c (10.0.0.2) went on to step 2" in first.called_off
    assert scene.slots.given_back == ["slot-1", "slot-2"]


def test_a_rank_that_has_heard_of_a_later_save_has_not_gone_on() -> None:
    """Its node says again what the lead has said: that the save is called off."""
    scene = Scene(0)
    first, second = scene.save(1), scene.save(2, here=False)
    reason = "rank 2: no slot is free"
    scene.hear(2, second, called_off=reason)
    scene.hear(1, second, called_off=reason)
    assert (first.called_off, second.called_off) == ("", reason)
    scene.hear(1, first, parts={RAM: [1]})
    scene.hear(2, first, parts={RAM: [2]})
    assert first.is_complete(RAM)


def test_what_an_agent_before_this_one_left_is_called_off_for_nobody_who_went_on() -> None:
    """It may have been whole, and the other may have let go of it since, as of what is older."""
    scene = Scene(0)
    first, second = scene.save(1), scene.save(2)
    first.found = second.found = True
    scene.hear(2, second, parts={RAM: [2]})
    assert [first.called_off, second.called_off] == ["", ""]
    scene.hear(1, second, parts={RAM: [1]})
    assert second.is_complete(RAM)
    assert scene.slots.given_back == []


def test_the_lead_does_not_wait_for_a_part_for_ever() -> None:
    scene = Scene(0)
    save = scene.save(1, waited_s=10.5)
    save.told[1] = News(str(save.name), ID, world_size=3, parts={RAM: [1]})
    scene.overdue()
    assert save.called_off
    assert "rank 2 on c (10.0.0.2)" in save.failed[RAM].what
    assert "rank 1" not in save.failed[RAM].what
    assert scene.slots.given_back == ["slot-1"]


@pytest.mark.parametrize(("here", "fact"), [(0, "found"), (0, "offered"), (1, "handed")])
def test_a_part_that_others_may_count_on_is_kept(here: int, fact: str) -> None:
    """By a node that has all of its ranks' parts; and by a lead that found it in files, or has
    offered it to another node while it was about to go."""
    scene = Scene(here)
    save = scene.save(1, waited_s=14.0)
    setattr(save, fact, True)
    scene.overdue()
    assert not save.failed  # the lead's word may still be on its way
    save.began_s -= 10.0
    scene.overdue()
    assert not save.called_off
    assert save.failed[RAM].error == "RankTimeout"
    assert "not say whether it is on all nodes" in save.failed[RAM].what
    assert scene.slots.given_back == []
    if here == 1:
        scene.hear(0, save, whole=[RAM])
        assert save.is_complete(RAM)


def test_a_node_without_a_part_of_its_own_calls_it_off_itself() -> None:
    scene = Scene(1)
    save = scene.save(1, here=False, waited_s=10.5)
    save.told[0] = News(str(save.name), ID, world_size=3, parts={RAM: [0]})
    scene.overdue()
    assert "rank 1 on b" in save.failed[RAM].what


def test_what_is_whole_is_never_called_off() -> None:
    scene = Scene(0)
    save = scene.save(1, waited_s=100.0)
    for node in (1, 2):
        scene.hear(node, save, parts={RAM: [node]})
    scene.overdue()
    scene.hear(1, save, parts={RAM: [1]}, called_off="rank 1: no slot is free")
    asyncio.run(scene.agreement.left(scene.run, scene.owner))
    assert save.is_complete(RAM)
    assert (save.called_off, save.failed, scene.slots.given_back) == ("", {}, [])


@pytest.mark.parametrize("who", ["another node", "a rank of this one"])
def test_a_save_called_off_while_it_is_sealed_gives_its_slot_back(who: str) -> None:
    scene = Scene(1)
    save = scene.save(1, here=False)
    news = News(str(save.name), ID, world_size=3, called_off="rank 0: no slot is free")
    message = CallOff("h", ID, 1, "no slot is free")
    other = Owner("g", 2, 2, 2, 2, "host", world_size=3, incarnation=1)

    if who == "a rank of this one":
        scene.run.saves.clear()  # it is the first that this node hears of that save

    async def story() -> None:
        async with scene.run.sealing:
            said = asyncio.create_task(
                scene.agreement.heard(scene.run, save, news)
                if who == "another node"
                else scene.agreement.declined(scene.run, other, message)
            )
            await asyncio.sleep(0)
            assert not save.called_off
            scene.run.saves[str(save.name)] = save
            scene.seal(save)
        await said

    asyncio.run(story())
    assert "no slot is free" in save.called_off
    assert scene.slots.given_back == ["slot-1"]


def test_saves_that_never_had_a_slot_are_forgotten_in_the_end() -> None:
    """Memory is too small, or the node is about to go: a job calls off every save, for days."""
    scene = Scene(0)

    async def story() -> None:
        for step in range(1, 501):
            message = CallOff("h", f"{step:012x}" + ID[12:], step, "no slot is free")
            await scene.agreement.declined(scene.run, scene.owner, message)

    asyncio.run(story())
    assert len(scene.run.saves) <= 250
    assert max(save.name.step for save in scene.run.saves.values()) == 500


def test_what_is_called_off_stays_so_though_its_slot_could_not_be_given_back() -> None:
    """Another node that has started anew says that it has its part, and had not heard of it."""
    scene = Scene(0)
    save = scene.save(1)
    scene.slots.problem = TierUnavailable("the data process ended twice", tier=RAM)
    message = CallOff("h", ID, 1, "no slot is free")
    asyncio.run(scene.agreement.declined(scene.run, scene.owner, message))
    address = PeerAddress("10.0.0.1", 1, 2, agent_id="b")
    parts = News(str(save.name), ID, world_size=3, parts={RAM: [1, 2]})
    asyncio.run(scene.links().hear(scene.run, Tell(1, address, [parts])))
    assert save.ranks[RAM] == {0}
    assert save.called_off
    assert not save.is_complete(RAM)
    asyncio.run(scene.agreement.begun(scene.run, 2, (1, 1)))
    assert save.is_complete(RAM)  # it was restored from: all of it was there


def test_a_save_called_off_before_a_rank_came_to_it_is_not_begun() -> None:
    scene = Scene(1)
    save = scene.save(1, here=False)
    scene.hear(0, save, called_off="rank 0: no slot is free")
    assert save.called_off
    assert scene.run.counters["called_off"] == 1


def test_a_step_of_another_start_says_nothing_of_this_one() -> None:
    scene = Scene(0)
    scene.run.links[2].incarnation, scene.run.links[2].last_step = 7, 9
    save = scene.save(1)
    scene.hear(1, save, parts={RAM: [1]})
    assert not save.called_off


def test_the_word_of_another_than_the_lead_is_not_taken() -> None:
    scene = Scene(1)
    save = scene.save(1)
    address = PeerAddress("10.0.0.2", 1, 2, agent_id="c")
    links = scene.links()
    whole = News(str(save.name), ID, world_size=3, whole=[RAM])
    for word in (whole, msgspec.structs.replace(whole, whole=[], called_off="by nobody")):
        with pytest.raises(AgentUnavailable):
            asyncio.run(links.hear(scene.run, Tell(2, address, [word])))
    assert not save.is_complete(RAM)
    assert not save.called_off
    asyncio.run(links.hear(scene.run, Tell(0, address, [whole])))
    assert save.is_complete(RAM)


@pytest.mark.parametrize("where", ["on several nodes", "with guests", "alone"])
def test_what_the_job_was_restored_from_was_whole(where: str) -> None:
    """Its other parts may be copies for a node that the job no longer has, and be read as such. Or
    they are on a node that has no part in the job now: this one's are all that is here."""
    scene = Scene(0)
    save = scene.save(1)
    if where != "on several nodes":
        scene.run.layout = None
    if where == "with guests":
        save.guests = {1, 2}
    asyncio.run(scene.agreement.begun(scene.run, 2, (1, 1)))
    assert save.is_complete(RAM)
    assert not save.called_off
    assert scene.slots.given_back == []


def test_news_of_a_newer_save_ends_no_backlog() -> None:
    """The store is on its way to the older one, which its rules keep: it was no scan that told."""
    scene = Scene(0)
    run = scene.run
    store = TierRef("store", "file:///nowhere", label="store")
    run.tiers["store"] = TierState("store", TierConfig("store", "store", store.path), store)
    run.tiers["store"].scanned = True
    older, newer = scene.save(1), scene.save(2)
    older.due = {"store"}
    newer.ranks["store"] = {0}
    parts = {RAM: [1], "store": [1, 2]}
    news = [
        News(str(older.name), ID, world_size=3, parts={RAM: [1]}),
        News(str(newer.name), ID, world_size=3, parts=parts),
    ]
    links = scene.links()
    asyncio.run(links.hear(run, Tell(1, PeerAddress("10.0.0.1", 1, 2, agent_id="b"), news)))
    assert newer.is_complete("store")
    assert older.owed == {"store"}
    assert not older.superseded


def test_what_others_told_stands_when_a_rank_seals_after_its_agent_restarted() -> None:
    """The new agent knows the rank's incarnation by its number alone."""
    scene = Scene(0)
    save = scene.save(1, here=False)
    for node in (1, 2):
        scene.hear(node, save, parts={RAM: [node]}, incarnation_id=OTHER_ID)
    save.incarnation_id = OTHER_ID
    scene.run.owners[0] = scene.owner
    slot = scene.run.slots["s"] = Slot("s", SlotState.CAPTURING, 100, inode=5, holder="h")
    sealed = SealedSlot(str(save.name), ID, 1, 1, OTHER_ID, 0, 3, 100)

    async def call(*_: Any, **__: Any) -> SealedSlot:
        return sealed

    ring = Ring(Tools(cast(Any, SimpleNamespace(call=call)), LIMITS, EventStream()))
    ring.note_staged = lambda *_: None  # type: ignore[method-assign]  # it starts tasks
    asyncio.run(ring.seal(scene.run, scene.owner, Seal("h", "s", 5, ID, 1)))
    assert scene.run.saves[str(save.name)] is save
    assert save.is_complete(RAM)
    assert slot.save == str(save.name)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_tier_waits_for_nothing_whose_last_part_was_recycled(is_there: bool) -> None:
    """Other nodes were faster, so that it was not whole any more when it went here. Or it had gone
    before, by a command whose answer was lost."""
    scene = Scene(0)
    disk = TierRef("disk", "/nowhere", label="disk")
    scene.run.tiers["disk"] = TierState("disk", TierConfig("disk", "disk", disk.path), disk)
    save = scene.save(1)
    save.due = {"disk"}
    scene.run.reach(save, "staged")
    for node in (1, 2):
        scene.hear(node, save, parts={"disk": [node]})
    assert save.owed == {"disk"}

    async def call(*_: Any, **__: Any) -> Recycled:
        if not is_there:
            raise ObjectNotFound("there was no such shard", tier=RAM)
        return Recycled(SlotFiles("slot-1", 5, "d", "t", "r", 100, 10))

    ring = Ring(Tools(cast(Any, SimpleNamespace(call=call)), LIMITS, EventStream()))
    asyncio.run(ring.recycle_shard(scene.run, save, scene.run.slots["slot-1"]))
    assert not save.owed
    assert save.change().superseded == ["disk"]


def test_parts_that_lost_nodes_left_hold_no_slot_of_a_job_that_is_alone_now() -> None:
    """Two saves were whole, on three nodes; the newer one is restored, from a store in part."""
    scene = Scene(0)
    old, new = scene.save(1), scene.save(2)
    for save in (old, new):
        for node in (1, 2):
            scene.hear(node, save, parts={RAM: [node]})
        scene.run.reach(save, "staged")
        save.told.clear()
    scene.run.layout = None
    asyncio.run(scene.agreement.begun(scene.run, 2, (1, 2)))
    assert scene.slots.given_back == ["slot-1"]
    assert new.is_complete(RAM)
    assert (old.called_off, new.called_off) == ("", "")


def test_nothing_is_kept_for_a_job_that_is_alone_and_found_no_step() -> None:
    scene = Scene(0)
    save = scene.save(1)
    scene.run.layout = None
    asyncio.run(scene.agreement.begun(scene.run, 2, None))
    assert save.called_off
    assert scene.slots.given_back == ["slot-1"]


def test_what_was_made_to_tell_goes_with_its_save() -> None:
    """A start of a job may save a million times."""
    scene = Scene(0)
    run, links = scene.run, scene.links()

    async def watched() -> None:
        watching = asyncio.ensure_future(links._watch(run, run.secret))
        for step in range(50):
            run.touch(scene.save(step))
            await asyncio.sleep(0)
            if step >= 2:
                del run.saves[next(iter(run.saves))]
        run.touch()
        await asyncio.sleep(0)
        assert links._words[run.key].made.keys() == run.saves.keys()
        run.gone = True
        run.touch()
        await watching

    asyncio.run(watched())
    assert not links._words


def test_what_was_made_to_tell_is_not_told_for_another_start() -> None:
    scene = Scene(0)
    run, links = scene.run, scene.links()
    assert run.layout is not None
    save = scene.save(1)
    run.touch(save)
    links._word(run, run.layout, save)
    links.leave(run)
    assert not links._words


def test_what_the_job_was_restored_from_may_be_whole_on_other_nodes_alone() -> None:
    scene = Scene(0)
    save = scene.save(1, here=False, waited_s=1000.0)
    save.chosen = save.found = True
    for node, ranks in ((1, [0, 1]), (2, [2])):
        scene.hear(node, save, parts={RAM: ranks})
    scene.overdue()
    assert not save.is_open
    assert not save.failed


@pytest.mark.parametrize("word", [{"whole": [RAM]}, {"called_off": "rank 0: no slot is free"}])
@pytest.mark.parametrize("num_gone", [0, 1, 2])
def test_what_a_node_let_go_of_before_the_lead_spoke_is_as_the_lead_says(
    num_gone: int, word: dict[str, Any]
) -> None:
    """It knows that a newer save is whole from the copies that it was given of it."""
    scene = Scene(1)
    run, (older, newer) = scene.run, (scene.save(1), scene.save(2))
    for save in (older, newer):
        save.world_size, save.ranks[RAM] = 4, {1, 3}
        for rank in (1, 3):
            slot = Slot(f"{save.name}-{rank}", SlotState.SEALED, 1, save=str(save.name), rank=rank)
            run.slots[slot.slot_id] = slot
    assert run.layout is not None
    nodes = [
        msgspec.structs.replace(n, ranks=[i, 3][: i + 1]) for i, n in enumerate(run.layout.nodes)
    ]
    run.layout = dataclasses.replace(run.layout, nodes=tuple(nodes))
    newer.guests = {0, 2}
    for rank in (1, 3)[:num_gone]:
        run.drop_shard(older, f"{older.name}-{rank}", rank)
    last = Owner("g", 3, 2, 2, 2, "host", world_size=4, incarnation=1)
    last.last_step = 3
    run.owners = {1: scene.owner, 3: last}
    run.owners[1].last_step = 3
    run.incarnations[1] = Incarnation(1, "r", 1, ID, None, "host", 1)
    asyncio.run(scene.agreement.sealed(run, last))
    assert (older.called_off, newer.called_off) == ("", "")
    identity: dict[str, Any] = {"save_id": ID, "world_size": 4}
    news = [
        News(str(older.name), **identity, **word),
        News(str(newer.name), **identity, whole=[RAM]),
    ]
    staged: list[SaveState] = []
    links = scene.links()
    links._ring.note_staged = lambda _, save: staged.append(save)  # type: ignore[method-assign, assignment]
    asyncio.run(links.hear(run, Tell(0, PeerAddress("10.0.0.0", 1, 2, agent_id="b"), news)))
    assert staged == [*([older] if "whole" in word else []), newer]
    assert older.called_off == word.get("called_off", "")


@pytest.mark.parametrize("when", ["while it follows", "while it calls off"])
def test_what_was_told_to_another_start_of_the_job_is_not_taken_in(when: str) -> None:
    """The node has joined again meanwhile, and numbers are those of other nodes."""
    scene = Scene(1)
    run, links = scene.run, scene.links()
    saves = [scene.save(1), scene.save(2)]
    off = "rank 0: no slot is free"
    news = [News(str(save.name), ID, world_size=3, called_off=off) for save in saves]
    address = PeerAddress("10.0.0.0", 1, 2, agent_id="b")
    if when != "while it follows":
        run.links[0].told_by = "b"

    async def story() -> None:
        async with links._peers.joining, run.sealing:
            hearing = asyncio.create_task(links.hear(run, Tell(0, address, news)))
            await asyncio.sleep(0)
            run.links = {0: Link()}
            for save in saves:
                save.told.clear()
        await hearing

    with pytest.raises(AgentUnavailable):
        asyncio.run(story())
    assert not saves[1].called_off
    assert not list(saves[1].told)
