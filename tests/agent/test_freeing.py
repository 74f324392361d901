"""A run's RAM is freed, and the process that does it dies: what is left is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Incarnation, SaveName
from mtckpt.agent import work
from mtckpt.agent.freeing import Freer, why_kept
from mtckpt.agent.nodes import News, layout_of
from mtckpt.agent.protocol import Join, NodeOfRun, TierConfig
from mtckpt.agent.queue import Limits, SlotState
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, Slot, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import TierUnavailable

OLD, NEW = SaveName(1, 1, "0" * 12), SaveName(2, 1, "1" * 12)


def a_run() -> RunState:
    """A free slot, and two saves of two ranks, all in RAM; rank 1's parts are a guest's."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.slots["free"] = Slot("free", SlotState.FREE, 100, inode=1)
    run.slots["gone"] = Slot("gone", SlotState.FREE, 100, inode=2)
    for name in (OLD, NEW):
        save = run.saves[str(name)] = SaveState(name, str(name), world_size=2, guests={1})
        save.ranks[RAM] = {0}
        slot = Slot(f"of-{name}", SlotState.COMMITTED, 100, save=str(name))
        run.slots[slot.slot_id] = slot
    return run


def freer_of(
    run: RunState, found: work.Scanned, meanwhile: Callable[[], None] = lambda: None
) -> Freer:
    """Memory is freed in part; nobody says so. ``meanwhile`` is what happens during a scan."""

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Wipe):
            raise TierUnavailable("the data process ended twice", tier=RAM)
        assert isinstance(command, work.Scan)
        meanwhile()
        return found

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    unused = cast(Any, SimpleNamespace(start=lambda *_: None))
    return Freer(tools, {run.key: run}, unused, unused, Ring(tools))


def left(run: RunState, found: work.Scanned) -> tuple[set[str], set[int]]:
    """The slots, and the steps of which this node has its own part, once the run is opened."""
    freer = freer_of(run, found)
    with pytest.raises(TierUnavailable):
        asyncio.run(freer.wipe(run))
    assert not run.gone
    asyncio.run(freer.look_again(run))
    return set(run.slots), {s.name.step for s in run.saves.values() if RAM in s.ranks}


def test_nothing_is_left_of_what_was_freed_and_not_told() -> None:
    assert left(a_run(), work.Scanned([])) == (set(), set())


def test_what_somebody_else_has_freed_meanwhile_is_not_freed_again() -> None:
    """By now the next job may have begun there: `mtckpt rm` had waited for the agent's own end."""
    run = a_run()
    run.gone = True
    asyncio.run(freer_of(run, work.Scanned([])).wipe(run))
    assert run.gone


def test_what_was_not_freed_yet_is_known() -> None:
    run = a_run()
    ranks, sizes = [0, 1], [100, 100]
    save = work.SaveScan(
        str(NEW), 2, 1, ranks, world_size=2, complete=True, size_bytes=200, shard_bytes=sizes
    )
    slots = [
        work.SlotScan("free", 1, 100, 64, 0),
        work.SlotScan("gone", 7, 100, 64, 0),  # somebody else's by now
    ]
    scan = work.RunScan("r", [save], slots=slots)
    assert left(run, work.Scanned([scan])) == ({"free", f"of-{NEW}"}, {2})
    assert run.saves[str(NEW)].guests == {1}


def test_a_run_that_was_not_to_go_is_not_looked_at() -> None:
    run = a_run()
    asyncio.run(freer_of(run, work.Scanned([])).look_again(run))
    assert set(run.slots) == {"free", "gone", f"of-{OLD}", f"of-{NEW}"}


@pytest.mark.parametrize("is_over", [True, False], ids=["and is there", "and is under way"])
def test_what_comes_while_it_is_looked_at_stays(is_over: bool) -> None:
    """A copy is pulled, a save fetched and a slot made after the directory was listed."""
    run = a_run()
    run.doubted = True
    save, name = run.saves[str(NEW)], str(NEW)

    def meanwhile() -> None:
        save.guests.add(7)
        save.readers += not is_over
        save.ranks[RAM].add(5)
        run.slots["fetched"] = Slot("fetched", SlotState.COMMITTED, 100, save=name, rank=5)
        run.slots["new"] = Slot("new", SlotState.FREE, 100, inode=3)

    asyncio.run(freer_of(run, work.Scanned([]), meanwhile).look_again(run))
    assert {"fetched", "new"} <= run.slots.keys()
    assert 5 in save.ranks[RAM]
    assert 7 in save.guests
    assert ("free" in run.slots) == run.doubted == (not is_over)


def test_a_start_that_could_not_be_noted_again_is_noted_by_who_comes_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next agent would not know of it, and give its number once more."""
    run, put = a_run(), list[str]()
    run.doubted, run.begun = True, {3: Incarnation(1, "r", 3, "3" * 32, None, "host", 1)}
    freer = freer_of(run, work.Scanned([]))

    async def call(command: work.Command, *_: Any) -> work.Result:
        if isinstance(command, work.Scan):
            return work.Scanned([])
        assert isinstance(command, work.PutSmall)
        put.append(command.key)
        if len(put) == 1:
            raise TierUnavailable("does not answer", tier=RAM)
        return work.Stored()

    monkeypatch.setattr(freer, "_tools", SimpleNamespace(call=call))
    with pytest.raises(TierUnavailable):
        asyncio.run(freer.look_again(run))
    asyncio.run(freer.look_again(run))
    assert len(put) == 2
    assert not run.doubted


def test_a_clock_that_is_set_frees_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer died a moment ago; that the calendar says otherwise since then is no reason."""
    run = a_run()
    freer = freer_of(run, work.Scanned([]))
    monkeypatch.setattr(freer, "_links", SimpleNamespace(is_behind=lambda _: False))
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 10 * 86400.0)
    asyncio.run(freer.let_go(run))
    monkeypatch.setattr(run, "left_s", run.left_s - 10 * 86400.0)  # and now it is
    with pytest.raises(TierUnavailable, match="ended twice"):
        asyncio.run(freer.let_go(run))


def test_what_has_a_damaged_record_is_there() -> None:
    """It can be healed, and takes memory."""
    run = a_run()
    run.doubted = True
    save = work.SaveScan(str(NEW), 2, 1, problems=["rank-00000.json: not what was sealed"])
    asyncio.run(freer_of(run, work.Scanned([work.RunScan("r", [save])])).look_again(run))
    assert run.slots.keys() == {f"of-{NEW}"}
    assert run.saves[str(NEW)].ranks[RAM] == {0}
    assert run.saves[str(NEW)].guests == {1}
    assert RAM not in run.saves[str(OLD)].ranks


def test_nobody_waits_for_a_tier_to_get_what_is_gone() -> None:
    run = a_run()
    run.doubted = True
    config = TierConfig("disk", "disk", "/nowhere/else")
    run.tiers["disk"] = TierState("disk", config, work.TierRef("disk", config.path, label="disk"))
    old, new = run.saves.values()
    for save in (old, new):
        save.due.add("disk")
        save.told[1] = News(str(save.name), save.save_id, world_size=2, whole=[RAM])
    ranks, sizes = [0, 1], [100, 100]
    there = work.SaveScan(
        str(NEW), 2, 1, ranks, world_size=2, complete=True, size_bytes=200, shard_bytes=sizes
    )
    asyncio.run(freer_of(run, work.Scanned([work.RunScan("r", [there])])).look_again(run))
    assert old.superseded == {"disk"}
    assert new.owed == {"disk"}


def test_a_tier_that_a_save_is_on_its_way_to_keeps_memory_and_is_named() -> None:
    run = a_run()
    config = TierConfig("disk", "disk", "/nowhere/else")
    disk = TierState("disk", config, work.TierRef("disk", config.path, label="disk"))
    run.tiers["disk"], disk.scanned, run.closing = disk, True, True
    assert why_kept(run) == ""
    run.saves[str(OLD)].writing.add("disk")
    assert why_kept(run) == "tier disk at /nowhere/else: still under way"


@pytest.mark.parametrize(
    ("leaving", "stored", "freed"), [(set(), False, True), ({1}, False, False), ({1}, True, True)]
)
def test_memory_that_holds_what_a_node_gave_away_before_it_went_is_kept(
    leaving: set[int], stored: bool, freed: bool
) -> None:
    """The disk of that node had its part, and so all nodes had the newest step on theirs."""
    run = a_run()
    nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2), [n]) for n in range(2)]
    run.layout, run.leaving, run.closing = (
        layout_of(Join("h", "00" * 32, 2, nodes), 0),
        leaving,
        True,
    )
    for label in ("disk", "store"):
        ref = work.TierRef(label, "/nowhere", label=label)
        run.tiers[label] = TierState(label, TierConfig(label, label, "/nowhere"), ref)
        run.tiers[label].scanned = True
    newest = run.saves[str(NEW)]
    for label in ("disk", "store") if stored else ("disk",):
        newest.ranks[label] = {0}
        newest.told[1] = News(str(NEW), str(NEW), world_size=2, whole=["ram", "disk", "store"])
    freer = freer_of(run, work.Scanned([]))
    freer._links = cast(Any, SimpleNamespace(is_behind=lambda _: False))
    if freed:
        with pytest.raises(TierUnavailable):  # it was begun
            asyncio.run(freer.let_go(run))
    else:
        asyncio.run(freer.let_go(run))
        assert newest.guests == {1}
