"""Where a run that is opened has its slots, whatever other agents, and other jobs, do meanwhile."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import FORMAT_VERSION, Incarnation, run_key, save_name
from mtckpt._session import start_ticks
from mtckpt._slots import BESIDE
from mtckpt.agent import beside, holding, roots, work
from mtckpt.agent.nodes import layout_of
from mtckpt.agent.peers import _Kept
from mtckpt.agent.protocol import PROTOCOL_VERSION, Join, NodeOfRun, Open
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.roots import Roots
from mtckpt.agent.runs import RunState
from mtckpt.agent.tools import Tools

Call = Callable[[work.Command], work.Result]
ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"


def opens(run: str, ram_path: str) -> Open:
    return Open(PROTOCOL_VERSION, run, "holder", 0, 1, 1, 1, 1, ram_path, [])


def agent(runtime: Path, call: Call) -> Registry:
    """One whose data processes answer what ``call`` says."""

    async def answered(command: work.Command, **_: Any) -> work.Result:
        await asyncio.sleep(0)
        return call(command)

    runtime.mkdir()
    tools = Tools(cast(Any, SimpleNamespace(call=answered)), Limits(), EventStream())
    registry = Registry(tools, str(runtime), service=False)
    registry.held.loaded.append(registry.held.named(""))  # the default memory
    return registry


def nothing(command: work.Command) -> work.Result:
    """There is nothing in any memory."""
    if isinstance(command, work.ReadRunConfigs):
        return work.RunConfigs([], [])
    return work.Scanned() if isinstance(command, work.Scan) else work.Stored()


def test_a_directory_that_was_just_made_beside_a_disk_stays_this_agents(tmp_path: Path) -> None:
    """Another container that begins at the same time takes it for one that is left, if it can."""
    place, others = str(tmp_path / BESIDE), []

    def call(command: work.Command) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            others.append(holding.lock(command.tier.path))
        return nothing(command)

    registry = agent(tmp_path / "a", call)
    run = asyncio.run(registry.run_for(run_key("r"), opens("r", place)))
    assert beside.is_one(run.ram.path)
    assert others
    assert not any(others)
    asyncio.run(registry.held.close())


def test_what_an_agent_that_ends_notes_last_is_read(tmp_path: Path) -> None:
    """It may serve whoever is connected for as long as it has the directory."""
    ram = tmp_path / "ram"
    ram.mkdir()
    before = Roots(str(tmp_path / "before"))
    (tmp_path / "before").mkdir()
    asyncio.run(before.take(str(ram)))

    def call(command: work.Command) -> work.Result:
        if not isinstance(command, work.ReadRunConfigs):
            return nothing(command)
        lives = str(ram) in before._locks
        return work.RunConfigs([work.RunConfig("r", "r", extra={"closing": not lives})], [])

    async def story() -> None:
        registry = agent(tmp_path / "a", call)
        asyncio.get_running_loop().call_later(0.01, before._release, str(ram))
        await registry._load_root(str(ram))
        assert registry.runs["r"].closing
        await registry.held.close()

    asyncio.run(story())


@pytest.mark.timeout(60)
def test_a_run_whose_memory_hangs_keeps_no_other_from_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, answers = tmp_path / "hangs", threading.Event()
    fine, is_there = tmp_path / "fine", roots._is_there
    for path in (hangs, fine):
        path.mkdir()

    def look(root: str) -> bool:
        if root == str(hangs):
            answers.wait(30)
        return is_there(root)

    async def story() -> None:
        registry = agent(tmp_path / "a", nothing)
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(roots, "_is_there", look)
        late = asyncio.create_task(registry.run_for(run_key("r"), opens("r", str(hangs))))
        await asyncio.sleep(0)
        run = await registry.run_for(run_key("s"), opens("s", str(fine)))
        assert run.ram.path == str(fine)
        assert not late.done()
        loop.call_soon(answers.set)
        assert (await late).ram.path == str(hangs)
        await registry.held.close()

    asyncio.run(story())


def test_the_next_agent_is_told_of_other_nodes_in_other_memory_too(tmp_path: Path) -> None:
    noted: list[type] = []

    def call(command: work.Command) -> work.Result:
        if isinstance(command, (work.WriteJoin, work.PutSmall)):
            assert command.tier == new
            noted.append(type(command))
        return work.Freed(0) if isinstance(command, work.Wipe) else nothing(command)

    async def story() -> None:
        registry = agent(tmp_path / "a", call)
        nodes = [NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2, "", "a", "b"), [n]) for n in range(2)]
        join = Join("h", "00" * 32, 2, nodes)
        run = RunState("r", "r", work.TierRef("ram", "/old"), layout=layout_of(join, 0))
        run.begun[1] = Incarnation(FORMAT_VERSION, "r", 1, ID)
        registry.peers._kept["r"] = _Kept(join, rank=0)
        assert await registry.freer.move(run, new)

    new = work.TierRef("ram", "/new")
    asyncio.run(story())
    assert noted == [work.WriteJoin, work.PutSmall]


def test_a_note_that_came_late_to_memory_does_not_hide_where_its_run_is(tmp_path: Path) -> None:
    """It was being written as the run moved from there, and its agent was killed later."""
    left, has = (tmp_path / name for name in ("left", "has"))
    wiped: list[str] = []
    save = work.SaveScan(str(save_name(1, 1, ID)), 1, 1, [0], 1, True, 1, ID, shard_bytes=[1])

    def call(command: work.Command) -> work.Result:
        if isinstance(command, work.Wipe):
            wiped.append(command.tier.path)
            return work.Freed(0)
        if isinstance(command, work.ReadRunConfigs):
            owner = work.Owner("h", 0, os.getpid(), start_ticks(os.getpid()))
            return work.RunConfigs([work.RunConfig("r", "r", owners=[owner])], [])
        if isinstance(command, work.Scan):
            is_left = command.tier.path == str(left)
            return work.Scanned([work.RunScan("r", [] if is_left else [save])])
        return work.Stored()

    async def story() -> None:
        registry = agent(tmp_path / "a", call)
        await registry._load_roots([str(left), str(has), str(left)])
        run = registry.runs["r"]
        assert (run.ram.path, list(run.saves)) == (str(has), [save.save])
        assert [owner.holder for owner in run.living()] == ["h"]
        await registry.held.close()

    for path in (left, has):
        path.mkdir()
    asyncio.run(story())
    assert wiped == [str(left)]
