"""Whose memory holds whose parts, as tables: partners, what pins a slot, and what a scan finds."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from layouts import layout

from mtckpt._events import EventStream
from mtckpt._manifest import Incarnation, SaveName
from mtckpt.agent import queue, work
from mtckpt.agent.copies import Copies
from mtckpt.agent.guests import Taken
from mtckpt.agent.healing import Healer
from mtckpt.agent.nodes import Layout
from mtckpt.agent.notes import config_of
from mtckpt.agent.partners import partners_of
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import SaveFacts
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import PARTNER_PATIENCE_S, RunState
from mtckpt.agent.saves import RAM, SaveState, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import TierFull, TierUnavailable

RAM_REF = work.TierRef("ram", "/dev/shm/x", label=RAM)
ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"


def test_partners_are_in_other_racks_and_each_node_has_as_many_guests() -> None:
    racks = ("r1", "r2", "r1", "r2")
    chosen = [partners_of(layout(here, *racks), 1) for here in range(4)]
    assert all(racks[here] != racks[there] for here, (there,) in enumerate(chosen))
    assert sorted(there for (there,) in chosen) == [0, 1, 2, 3]


@pytest.mark.parametrize("copies", [1, 2, 8])
def test_there_are_no_more_partners_than_other_nodes(copies: int) -> None:
    chosen = partners_of(layout(1, "a", "b", "c"), copies)
    assert len(chosen) == len(set(chosen)) == min(copies, 2)
    assert 1 not in chosen


def test_nodes_that_fail_or_go_are_not_partners() -> None:
    racks = ("r1", "r2", "r3", "r4")
    (partner,) = partners_of(layout(0, *racks), 1)
    for avoided in ({"troubles": {partner: 3}}, {"leaving": {partner}}):
        (other,) = partners_of(layout(0, *racks), 1, **avoided)
        assert other not in (0, partner)
    assert partners_of(layout(0, *racks), 1, {partner: 2}) == [partner]
    # Better on a node that fails than on none; one that goes takes nothing.
    assert partners_of(layout(0, "r1", "r2"), 1, {1: 3}) == [1]
    assert partners_of(layout(0, "r1", "r2"), 1, leaving={1}) == []


def test_a_slot_stays_until_a_newer_save_is_on_other_nodes_too() -> None:
    older = SaveFacts("a", (1, 1), True, copied=True, replicated=True)
    newer = SaveFacts("b", (1, 2), True)
    assert queue.blocks_recycling(older, [older, newer]) == "is the newest that other nodes have"
    assert queue.pick_recycle([older, newer]) is None
    newer = SaveFacts("b", (1, 2), True, copied=True, replicated=True)
    assert queue.pick_recycle([older, newer]) == "a"
    # One that no other node has a part of was promised to nobody.
    plain = SaveFacts("a", (1, 1), True)
    assert queue.pick_recycle([plain, SaveFacts("b", (1, 2), True)]) == "a"


@pytest.mark.parametrize(
    ("agent_id", "held_on", "again"),
    [("", set(), False), ("before", {1}, False), ("before", set(), True)],
)
def test_copies_of_an_earlier_start_are_offered_anew_to_another_agent(
    agent_id: str, held_on: set[int], again: bool
) -> None:
    """The memory of its node may have been emptied without a boot. As long as that is not known
    they count for what slots wait for."""
    run = run_with_peers()
    save = SaveState(SaveName(1, 1, "a" * 12), ID, world_size=4)
    save.ranks = {RAM: {0, 1}, "peers": {0, 1}}
    save.chosen, save.held_by, save.held_agents, save.held_on = (
        True,
        {"boot-1"},
        {agent_id},
        held_on,
    )
    run.saves[str(save.name)] = save
    tools = Tools(cast(Any, None), queue.Limits(), EventStream())
    copies = Copies(tools, cast(Any, None), cast(Any, SimpleNamespace(verbs={})))
    copies.look(run, run.tiers["peers"])
    copies.close()
    assert ("peers" in save.owed) == ("peers" not in save.ranks) == again
    assert is_copied(run, save)


def is_copied(run: RunState, save: SaveState) -> bool:
    return next(facts.copied for facts in run.facts() if facts.name == str(save.name))


def run_with_peers() -> RunState:
    run = RunState("run", "run", RAM_REF)
    run.layout = layout(0, "a", "b")
    config = TierConfig("peers", "peers", "1 other node", copies=1)
    run.tiers["peers"] = TierState("peers", config, RAM_REF)
    return run


def test_partners_that_are_silent_for_long_do_not_hold_up_saves() -> None:
    run = run_with_peers()
    save = run.saves["s"] = SaveState(SaveName(1, 1, "ab" * 6), ID)
    save.ranks = {RAM: {0}, "peers": {0}}
    assert is_copied(run, save)
    run.tiers["peers"].owed_since_s = time.monotonic() - PARTNER_PATIENCE_S - 1
    assert not is_copied(run, save)


def copied(run: RunState, step: int, incarnation: int = 1) -> SaveState:
    """A save of which partners have this node's part, and other nodes' theirs have not."""
    name = SaveName(step, incarnation, "ab" * 6)
    save = run.saves[str(name)] = SaveState(name, ID, chosen=True, stages=["staged"])
    save.ranks = {RAM: {0}, "peers": {0}}
    return save


def test_partners_of_other_nodes_that_are_silent_for_long_do_not_hold_up_saves() -> None:
    """This node's copies are there; the save is on other nodes whole only with everybody's."""
    run = run_with_peers()
    old, new = copied(run, 1), copied(run, 2)
    old.stages.append("replicated")
    assert is_copied(run, old)
    new.began_s -= PARTNER_PATIENCE_S + 1
    assert not is_copied(run, old)
    run.begun_s = time.monotonic()  # the job was started anew: there is hope
    assert is_copied(run, old)
    run.begun_s = 0.0
    new.stages.append("replicated")
    assert is_copied(run, new)


def test_who_waits_for_copies_hears_how_many_there_are() -> None:
    """One partner has no room; what the other has is a copy, and the save is not replicated."""
    run = run_with_peers()
    run.layout = layout(0, "a", "b", "c")
    tier = run.tiers["peers"]
    tier.config = TierConfig("peers", "peers", "2 other nodes", copies=2)
    save = run.saves["s"] = SaveState(SaveName(1, 1, "ab" * 6), ID)
    save.ranks = {RAM: {0}}

    async def ask(run: RunState, layout: Layout, save: SaveState, number: int, *_: Any) -> Taken:
        if number == 1:
            raise TierFull("b has no room", tier="peers")
        return Taken(5, 5, f"boot-{number}")

    tools = Tools(cast(Any, None), queue.Limits(), EventStream())
    copies = Copies(tools, cast(Any, None), cast(Any, SimpleNamespace(verbs={})))
    cast(Any, copies)._ask = ask
    with pytest.raises(TierFull, match="copies=2, copies_made=1"):
        asyncio.run(copies.copy(run, tier, save))
    copies.close()
    assert "peers" not in save.ranks


def test_a_node_that_is_alone_waits_for_no_partner() -> None:
    run = run_with_peers()
    save = copied(run, 1)
    run.layout = None
    assert not is_copied(run, save)


def test_an_abandoned_save_makes_room_first_and_for_nothing_else() -> None:
    """The job went back to step 1; step 2 was damaged, so nobody takes it any more."""
    run = run_with_peers()
    kept, abandoned = copied(run, 1), copied(run, 2)
    abandoned.due.add("store")
    run.tiers["store"] = TierState("store", TierConfig("store", "store", "s"), RAM_REF)
    assert queue.pick_recycle(run.facts()) is None
    run.incarnations[1] = Incarnation(1, "run", 1, ID)
    run.incarnations[2] = Incarnation(1, "run", 2, ID, parent=kept.order)
    assert queue.pick_recycle(run.facts()) == str(abandoned.name)
    assert queue.pick_recycle(run.facts(), frozenset({str(abandoned.name)})) is None


def test_a_scan_tells_guests_from_parts_of_its_own_ranks() -> None:
    run = run_with_peers()
    name = str(SaveName(7, 1, "ab" * 6))
    other = str(SaveName(6, 1, "cd" * 6))
    run.noted_guests = {name: [2, 3], other: [2]}
    entries = [
        work.SaveScan(n, step, 1, ranks=ranks, world_size=4, due=["peers"], save_id=ID)
        for n, step, ranks in ((name, 7, [0, 1, 2]), (other, 6, [2]))
    ]
    run.note_scan(RAM, work.RunScan("run", entries))
    save, guest_only = run.saves[name], run.saves[other]
    assert (save.ranks[RAM], save.guests, save.due) == ({0, 1}, {2}, {"peers"})
    assert (guest_only.ranks, guest_only.guests, guest_only.due) == ({}, {2}, set())
    assert save.apart_from_guests == [0, 1]
    assert not guest_only.is_staged
    assert config_of(run).extra["guests"] == {name: [2], other: [2]}
    run.forget_old()
    assert other in run.saves


def test_what_an_agent_before_this_one_may_have_had_copied_stays_until_a_newer_save_is() -> None:
    """Which one other nodes have all of, was in its memory alone. One that was not to be copied
    holds up nothing."""
    run = run_with_peers()
    names = [str(SaveName(step, 1, "ab" * 6)) for step in (1, 2, 3)]
    entries = [
        work.SaveScan(
            name,
            step,
            1,
            [0, 1],
            world_size=2,
            complete=True,
            save_id=ID,
            due=["peers"] * (step > 1),
        )
        for step, name in enumerate(names, 1)
    ]
    run.note_scan(RAM, work.RunScan("run", entries))
    run.note_scan("peers", work.RunScan("run"))
    plain, older, newer = (run.saves[name] for name in names)
    assert queue.pick_recycle(run.facts()) == names[0]
    run.drop_copy(plain, RAM)
    pick = queue.pick_flush("peers", run.flushable(run.tiers["peers"]))
    assert pick == queue.Pick(names[2], (names[1],))
    older.superseded.add("peers")
    assert queue.pick_recycle(run.facts()) is None
    newer.ranks["peers"] = {0, 1}
    run.reach(newer, "replicated")
    assert queue.pick_recycle(run.facts()) == names[1]


def test_copies_go_to_no_node_of_another_start_of_the_job() -> None:
    """The job starts anew, on fewer nodes, when partners are chosen and not yet asked."""
    run = run_with_peers()
    run.layout, run.secret = layout(0, "a", "b", "c", "d"), "old"
    run.tiers["peers"].config = TierConfig("peers", "peers", "3 other nodes", copies=3)
    tools = Tools(cast(Any, None), queue.Limits(), EventStream())
    copies = Copies(tools, cast(Any, None), cast(Any, SimpleNamespace(verbs={}, address=None)))

    def start_anew() -> None:
        run.layout, run.secret = layout(0, "a", "b"), "new"

    async def story() -> None:
        asyncio.get_running_loop().call_soon(start_anew)
        await copies.copy(run, run.tiers["peers"], copied(run, 1))

    with pytest.raises(TierUnavailable, match="started anew"):
        asyncio.run(story())
    copies.close()


def test_a_heal_asks_no_node_of_another_start_of_the_job() -> None:
    """The job starts anew, on fewer nodes, while the first of them is asked."""
    run = run_with_peers()
    run.layout = layout(0, "a", "b", "c", "d")
    run.tiers["peers"].config = TierConfig("peers", "peers", "3 other nodes", copies=3)
    save = copied(run, 1)
    asked = []

    async def call(command: work.Pull, *_: Any) -> None:
        asked.append(command.address)
        run.layout = None
        raise TierUnavailable("it does not answer", tier="peers")

    healer = Healer(cast(Any, SimpleNamespace(call=call)))
    with pytest.raises(TierUnavailable, match="does not answer"):
        asyncio.run(healer._replace(run, save, RAM, 0, "peers"))
    assert len(asked) == 1


def test_what_was_outlived_before_all_copies_of_it_were_there_is_superseded() -> None:
    """Other nodes' partners have let go of it: it comes to outlive a node no more."""
    run = run_with_peers()
    old, new = copied(run, 1), copied(run, 2)
    new.stages.append("replicated")
    tools = Tools(cast(Any, None), queue.Limits(), EventStream())
    copies = Copies(tools, Ring(tools), cast(Any, SimpleNamespace(verbs={})))
    copies.look(run, run.tiers["peers"])
    copies.close()
    assert "peers" not in old.ranks
    assert old.superseded == {"peers"}
    assert (new.ranks["peers"], new.superseded) == ({0}, set())
