"""A run that goes on in other memory: what it had is freed, where nobody else has it it stays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._manifest import SaveName
from mtckpt._slots import BESIDE
from mtckpt.agent import work
from mtckpt.agent.freeing import Freer
from mtckpt.agent.owners import Owner
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, Plan, SaveState, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import TierUnavailable, UsageError, WaitTimeout

KINDS: tuple[Literal["disk", "peers", "store"], ...] = ("disk", "peers", "store")


def save_at(step: int, **ranks: set[int]) -> SaveState:
    """One of a job of two ranks, each on its node, as this node knows it."""
    name = SaveName(step, 1, f"{step:012d}")
    return SaveState(name, str(step), world_size=2, ranks=dict(ranks))


def moves(
    tmp_path: Path,
    *saves: SaveState,
    settling: SaveState | None = None,
    sealing: SaveState | None = None,
    gone: bool = False,
) -> bool:
    """Whether a start that asks for memory frees slots that an earlier one had beside a disk."""
    asked: list[type] = []

    async def call(command: work.Command, **_: Any) -> work.Result:
        asked.append(type(command))
        return work.Freed(0) if isinstance(command, work.Wipe) else work.Scanned([])

    async def story() -> None:
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        name = "11111111-2222-3333-4444-555555555555.0123456789abcdef"
        beside = str(tmp_path / BESIDE / name)
        run = RunState("r", "r", work.TierRef("ram", beside, label=RAM))
        run.saves, run.gone = {str(save.name): save for save in saves}, gone
        for kind in KINDS:
            config, ref = TierConfig(kind, kind, "/there"), work.TierRef(kind, "/there", label=kind)
            run.tiers[kind] = TierState(kind, config, ref, scanned=True)

        async def settle(save: SaveState) -> None:
            await asyncio.sleep(0)
            run.saves[str(save.name)] = save

        async def seal(save: SaveState) -> None:
            async with run.sealing:
                await settle(save)

        if settling is not None:
            run.settling["dead"] = asyncio.create_task(settle(settling))
        under_way = [asyncio.create_task(seal(save)) for save in filter(None, [sealing])]
        await asyncio.sleep(0)
        await registry._move(run, str(tmp_path), cast(Any, SimpleNamespace(holder="h", rank=0)))
        assert (run.ram.path == beside) is (work.Wipe not in asked)
        await asyncio.gather(*under_way)

    asyncio.run(story())
    return work.Wipe in asked


@pytest.mark.parametrize(
    ("newest", "guests", "frees"),
    [
        ({"ram": {0}}, set(), False),  # an agent that has just started knows of no other node's
        ({"ram": {0}, "peers": {0, 1}}, set(), False),  # which may free it at the same time
        ({"ram": {0}, "disk": {0}}, set(), True),
        ({"ram": {0}, "disk": {0}}, {1}, False),  # the other node, and its disk, may be gone
        ({"ram": {0}, "store": {0, 1}}, {1}, True),
        ({}, set(), True),
    ],
)
def test_memory_is_left_where_no_slower_tier_has_what_is_in_it(
    newest: dict[str, set[int]], guests: set[int], frees: bool, tmp_path: Path
) -> None:
    save = save_at(20, **newest)
    save.guests = guests
    assert moves(tmp_path, save_at(10, disk={0}), save) is frees


def test_what_is_older_than_something_whole_is_let_go(tmp_path: Path) -> None:
    assert moves(tmp_path, save_at(10, ram={0}), save_at(20, store={0, 1}))
    damaged = save_at(20, store={0, 1})
    damaged.damaged.add("store")
    assert not moves(tmp_path, save_at(10, ram={0}), damaged)


def test_what_is_left_of_a_save_that_was_called_off_keeps_nothing(tmp_path: Path) -> None:
    save = save_at(20, ram={0})
    save.called_off = "rank 1 is gone"
    assert moves(tmp_path, save_at(10, ram={0}, disk={0}), save)


@pytest.mark.parametrize(
    ("owed", "guests", "error"),
    [({"disk"}, set(), WaitTimeout), (set(), set(), UsageError), ({"disk"}, {1}, UsageError)],
)
def test_amid_a_job_slots_come_to_the_disk_once_what_is_in_memory_has(
    owed: set[str], guests: set[int], error: type[Exception], tmp_path: Path
) -> None:
    """Copies for other nodes come to no disk of this one."""
    save = save_at(10, ram={0, 1})
    save.due, save.guests = owed, guests
    run = RunState("r", "r", work.TierRef("ram", "/memory", label=RAM))
    run.saves[str(save.name)] = save
    own = str(tmp_path / BESIDE / "11111111-2222-3333-4444-555555555555.0123456789abcdef")
    with pytest.raises(error):
        Freer.refuse_move(cast(Any, None), run, own)


def test_a_run_that_somebody_is_just_opening_makes_no_way_for_another_part_of_it(
    tmp_path: Path,
) -> None:
    """What that has captured by then would go with it."""

    async def story() -> None:
        tools = Tools(cast(Any, None), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        run = registry.runs["r"] = RunState("r", "r", work.TierRef("ram", "/memory", label=RAM))
        found = work.RunScan("r", [work.SaveScan("2.1", 2, 1)])
        async with run.opening:
            coming = asyncio.create_task(registry._makes_way(run, found))
            await asyncio.sleep(0)
            run.owners[0] = Owner("h", 0, 1, 1, 1, "host")
        assert not await coming
        assert not run.gone

    asyncio.run(story())


def test_what_a_dead_trainer_had_finished_is_sealed_before(tmp_path: Path) -> None:
    whole = save_at(10, ram={0}, store={0, 1})
    assert not moves(tmp_path, whole, settling=save_at(20, ram={0}))


def test_what_a_rank_is_just_sealing_is_in_memory_as_well(tmp_path: Path) -> None:
    whole = save_at(10, ram={0}, store={0, 1})
    assert not moves(tmp_path, whole, sealing=save_at(20, ram={0}))


def test_what_is_free_already_is_not_freed_again(tmp_path: Path) -> None:
    """Nor does it keep the start: what it had in memory is nowhere."""
    assert not moves(tmp_path, save_at(10, ram={0}, store={0, 1}), gone=True)


def test_no_slot_is_made_in_memory_that_is_being_left() -> None:
    """It would be in use there, and a part of the run for whoever looks there next."""
    run = RunState("r", "r", work.TierRef("ram", "/old", label=RAM))
    owner = Owner("h", 0, 0, 0, 0, "")
    run.plans["h"] = Plan(100, 10), 2
    made: list[tuple[str, bool]] = []

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Allocate):
            made.append((command.tier.path, True))
            return work.SlotFiles(command.slot_id, 1, "", "", "", 100, 10)
        if isinstance(command, work.Wipe):
            made.append((command.tier.path, await ring._allocate(run, owner) is not None))
            return work.Freed(0)
        return work.Scanned([])

    async def story() -> None:
        assert await Freer(tools, {}, unused, unused, ring).move(run, work.TierRef("ram", "/new"))
        assert await ring._allocate(run, owner)

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    ring, unused = Ring(tools), cast(Any, None)
    asyncio.run(story())
    assert made == [("/old", False), ("/new", True)]


def test_what_could_not_be_freed_is_looked_at_before_anybody_goes_on_with_it() -> None:
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))

    async def call(*_: Any, **__: Any) -> work.Result:
        raise TierUnavailable("the data process ended twice", tier=RAM)

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    unused = cast(Any, None)
    with pytest.raises(TierUnavailable):
        asyncio.run(Freer(tools, {}, unused, unused, unused).move(run, run.ram))
    assert run.doubted
