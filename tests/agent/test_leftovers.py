"""What a dead owner left in slots, where memory does not answer at once."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._manifest import save_name
from mtckpt.agent import registry as registries
from mtckpt.agent import roots, work
from mtckpt.agent.leftovers import Leftovers
from mtckpt.agent.owners import Owner
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import Limits, SlotState
from mtckpt.agent.registry import Registry
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, Slot
from mtckpt.agent.tools import Tools
from mtckpt.errors import AlreadyExists, CheckpointError, TierUnavailable

ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"
NAME = str(save_name(1, 1, ID))
SEALED = work.SealedSlot(NAME, ID, 1, 1, "", 0, 1, 100)
SILENT = TierUnavailable("the data process ended twice", tier=RAM)


@pytest.fixture(autouse=True)
def own_memory(runtime_dir: Path) -> None:
    """Registries look at what lies in their default directory too."""


class Scene:
    """A dead owner's slot with a capture that it had finished; ``answers`` are of seals."""

    def __init__(self, *answers: work.SealedSlot | CheckpointError) -> None:
        self.run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
        self.slot = Slot("s", SlotState.CAPTURING, 100, inode=1, holder="h")
        self.run.slots["s"] = self.slot
        self.owner = Owner("h", 0, 1, 1, 1, "host", incarnation=1)
        self.freed: list[str] = []
        self._answers: Iterator[work.SealedSlot | CheckpointError] = iter(answers)
        tools = Tools(cast(Any, SimpleNamespace(call=self._call)), Limits(), EventStream())
        ring = Ring(tools)
        ring.note_staged = lambda *_: None  # type: ignore[method-assign]  # it starts tasks
        self.leftovers = Leftovers(tools, ring)

    async def _call(self, command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Free):
            self.freed.append(command.slot_id)
            return work.Freed(1)
        if isinstance(command, work.Scan):
            slot = work.SlotScan("s", 1, 100, 64, 1, save=NAME, save_id=ID, step=1, incarnation=1)
            return work.Scanned([work.RunScan("r", slots=[slot])])
        answer = next(self._answers)
        if isinstance(answer, CheckpointError):
            raise answer
        return answer

    def settle(self) -> None:
        asyncio.run(self.leftovers.settle(self.run, self.owner))


def test_a_finished_capture_is_sealed_once_memory_answers() -> None:
    scene = Scene(SILENT, SEALED)
    with pytest.raises(TierUnavailable):
        scene.settle()
    assert scene.slot.state is SlotState.CAPTURING
    scene.settle()
    assert scene.run.finished == [NAME]
    assert scene.slot.save == NAME
    assert scene.freed == []


def test_the_slot_of_what_can_never_be_sealed_is_freed() -> None:
    scene = Scene(AlreadyExists("another slot is that shard", tier=RAM))
    scene.settle()
    assert (scene.freed, scene.run.slots, scene.run.finished) == (["s"], {}, [])


def test_memory_that_an_agent_could_not_look_at_is_looked_at_when_a_run_is_opened(
    tmp_path: Any,
) -> None:
    """What is there is never taken for nothing: it would be owed to nobody any more."""
    asked: list[type] = []

    async def call(command: work.Command, **_: Any) -> work.Result:
        asked.append(type(command))
        raise SILENT

    async def story() -> None:
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path), service=False)
        await registry.start()
        message = cast(Any, SimpleNamespace(ram_path=str(tmp_path), run="r"))
        for _ in range(2):
            asked.clear()
            with pytest.raises(TierUnavailable):
                await registry.run_for("r", message)
            assert asked == [work.ReadRunConfigs]
        assert registry.runs == {}

    asyncio.run(story())


def test_memory_that_another_agent_had_at_the_start_is_looked_at_once_that_has_ended(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody need open a run for what it is owed to go on its way."""
    monkeypatch.setattr(roots, "WAIT_S", 0.0)
    monkeypatch.setattr(registries, "LATE_S", 3.0)
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "a").mkdir()

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            return work.RunConfigs([work.RunConfig("r", "r")], [])
        return work.Scanned([]) if isinstance(command, work.Scan) else work.Stored()

    async def story() -> None:
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        ending = roots.Roots(str(tmp_path / "ending"))
        await ending.take(str(tmp_path / "a"))
        registry = Registry(tools, str(tmp_path / "run"), service=False)
        registry.held.note(str(tmp_path / "a"))
        await registry.start()
        assert registry.runs == {}
        (unread,) = (await registry.drainer.drain(1.0, "it is about to go")).runs
        assert (unread.run, unread.safe) == (str(tmp_path / "a"), False)
        registry.drainer.cancel()
        await ending.close()
        while "r" not in registry.runs:  # noqa: ASYNC110 - as somebody who looks at status
            await asyncio.sleep(0.01)  # LATE_S at most, or the test's own time
        assert (await registry.drainer.drain(1.0, "it is about to go")).safe
        await registry.held.close()

    asyncio.run(story())


def test_memory_that_hangs_at_the_start_is_nothing_that_a_node_may_go_with(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever mends the disk, or removes what was there, asks again."""
    monkeypatch.setattr(registries, "LATE_S", 0.0)
    answers, is_there = threading.Event(), os.stat
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "a").mkdir()

    def hanging(path: Any, *args: Any, **known: Any) -> os.stat_result:
        if path == str(tmp_path / "a"):
            answers.wait(20)
        return is_there(path, *args, **known)

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            return work.RunConfigs([work.RunConfig(os.path.basename(command.tier.path), "r")])
        return work.Scanned([]) if isinstance(command, work.Scan) else work.Stored()

    async def story(is_gone: bool) -> None:
        tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
        registry = Registry(tools, str(tmp_path / "run"), service=False)
        registry.held.note(str(tmp_path / "a"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", hanging)
            patched.setattr(roots, "aside", functools.partial(roots.aside, timeout_s=0.05))
            await registry.start()
            told = (await registry.drainer.drain(5.0, "it is about to go")).runs
            assert (str(tmp_path / "a"), False) in [(each.run, each.safe) for each in told]
            if is_gone:  # before it answers: it may be taken in at once
                shutil.rmtree(tmp_path / "a")
            answers.set()
            while roots._hanging[str(tmp_path / "a")]:  # noqa: ASYNC110 - a thread ends it
                await asyncio.sleep(0.01)
        drained = await registry.drainer.drain(5.0, "it is about to go")
        assert drained.safe
        assert ("a" in [each.run for each in drained.runs]) is not is_gone
        await registry.held.close()

    for is_gone in (False, True):
        answers.clear()
        asyncio.run(story(is_gone))


@pytest.mark.parametrize("joins", [{}, {"r": b"{}"}])
def test_a_run_is_freed_once_it_is_taken_in_and_no_earlier(
    tmp_path: Any, joins: dict[str, bytes]
) -> None:
    """Its job had closed it. It may have copies of a node that goes: which, is known last."""
    freed: list[str] = []

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            closing = [work.RunConfig(key, key, extra={"closing": True}) for key in "rs"]
            return work.RunConfigs(closing, [], joins)
        if isinstance(command, work.WriteRunConfig):
            for run in list(registry.runs.values()):
                await registry.freer.let_go(run)
        if isinstance(command, work.Wipe):
            freed.append(command.run_key)
            return work.Freed(1)
        return work.Scanned([]) if isinstance(command, work.Scan) else work.Stored()

    async def story() -> None:
        registry.held.note(str(tmp_path))
        await registry.start()
        assert freed == ["r"]  # once the other one came
        await registry.freer.let_go(registry.runs["s"])
        assert freed == ["r", "s"]
        await registry.held.close()

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    registry = Registry(tools, str(tmp_path), service=False)
    asyncio.run(story())


def test_memory_that_takes_no_note_is_read_all_the_same(tmp_path: Any) -> None:
    """What is owed from there goes where it should, and the next slot waits for the note."""
    disk = [TierConfig("disk", "disk", str(tmp_path / "d"))]

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.ReadRunConfigs):
            return work.RunConfigs([work.RunConfig(key, key, disk) for key in "rs"])
        if isinstance(command, work.WriteRunConfig):
            raise SILENT
        return work.Scanned([])

    async def story() -> None:
        registry.held.note(str(tmp_path))
        await registry.start()
        for run in registry.runs.values():
            await registry.wait_scanned(run, 5.0)
            assert run.tiers["disk"].scanned
            assert run.doubted
        assert list(registry.runs) == ["r", "s"]
        registry.flusher.stop()
        await registry.held.close()

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    registry = Registry(tools, str(tmp_path), service=False)
    asyncio.run(story())


def test_memory_that_hangs_keeps_nobody_of_another_run_waiting(tmp_path: Any) -> None:
    """Slots of one lie on a disk that hangs; of the other one a rank is gone for good."""

    async def call(command: work.Command, **_: Any) -> work.Result:
        if isinstance(command, work.Scan):
            await asyncio.Event().wait()
        return work.Stored()

    async def story() -> None:
        registry.peers.keep = registry.held.renew = nothing  # type: ignore[method-assign]
        for key in "ab":
            registry.runs[key] = RunState(key, key, work.TierRef("ram", str(tmp_path), label=RAM))
        slot = Slot("s", SlotState.CAPTURING, 100, holder="h")
        registry.runs["a"].slots["s"] = slot
        registry.runs["a"].unsettled.append(Owner("h", 0, 1, 1, 0, "here", dead=True))
        silent = registry.runs["b"].owners[0] = Owner("h", 0, 1, 1, 0, "here", heard_s=-1e9)
        for _ in range(3):
            chores = asyncio.create_task(registry.housekeeping())
            await asyncio.wait([chores], timeout=0.1)
        assert silent.dead
        assert sum("looking after" in task.get_name() for task in tools.tasks) == 1
        for task in tools.tasks:
            task.cancel()

    async def nothing() -> None: ...

    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(), EventStream())
    registry = Registry(tools, str(tmp_path), service=False)
    asyncio.run(story())
