"""A run's RAM is freed, and the process that does it dies: what is left is known."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._manifest import SaveName
from mtckpt.agent import work
from mtckpt.agent.freeing import Freer
from mtckpt.agent.queue import Limits, SlotState
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, Slot
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


def freer_of(run: RunState, found: work.Scanned) -> Freer:
    """Memory is freed in part; nobody says so."""

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Wipe):
            raise TierUnavailable("the data process ended twice", tier=RAM)
        assert isinstance(command, work.Scan)
        return found

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    unused = cast(Any, SimpleNamespace(start=lambda *_: None))
    return Freer(tools, {run.key: run}, unused, unused)


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
