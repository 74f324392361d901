"""A node that is about to go: what is in its memory is brought away, and nothing new is begun."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from agent_checks import Own, agent_pid, kill_agent, until
from fake_trainer import FakeTrainer, disk
from layouts import layout

from mtckpt._events import EventStream
from mtckpt._manifest import SaveName
from mtckpt.agent import drains, protocol, work
from mtckpt.agent.client import AgentClient
from mtckpt.agent.copies import Copies
from mtckpt.agent.draining import Drainer, _Handover
from mtckpt.agent.flushing import Flusher
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, TierState
from mtckpt.errors import NodeDraining, TierFull, TierUnavailable


def drained(trainer: FakeTrainer, timeout_s: float = 20.0, **more: bool) -> drains.Drained:
    message = drains.Drain(timeout_s, **more)
    return trainer.client.call("/v1/drain", message, drains.Drained, timeout_s + 10)


def records(path: Path) -> list[Path]:
    return sorted(path.glob("*/step-*/rank-00000.json"))


def test_a_drained_node_brings_the_newest_step_away_and_begins_nothing(
    own: Own, tmp_path: Path
) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1)
    trainer.save(2)  # not due at the disk
    told = drained(trainer)
    assert len(records(tmp_path / "d")) == 1
    (run,) = told.runs
    assert (run.run, run.step, run.stages, run.lacking) == ("r", 2, ["staged", "local"], [])
    # On a disk, that may be this node's: whoever drains is to know.
    assert not told.safe
    assert run.detail == "step 2 is on disk, which is gone if that is a disk of this node"
    started_s = time.monotonic()
    assert trainer.slot().grant is not None  # it was given ahead, with the reply to the last seal
    refused = trainer.slot(wait_s=20.0)
    assert refused.grant is None
    assert "is being drained" in refused.reason
    assert time.monotonic() - started_s < 15
    stranger = own("other")
    with pytest.raises(NodeDraining, match="is being drained"):
        stranger.open()
    with pytest.raises(NodeDraining):
        trainer.client.call("/readyz", None, protocol.Done)
    assert "is being drained" in trainer.status().draining
    trainer.open()  # one that was there may come back: its step is not to be lost
    assert drained(trainer, cancel=True) == drains.Drained(True)
    assert trainer.slot().grant is not None
    stranger.open()
    assert trainer.status().draining == ""


def test_what_only_a_disk_has_is_not_safe_with_a_node_that_goes(own: Own, tmp_path: Path) -> None:
    """Memory was freed when the run was closed; somebody has opened it since."""
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    trainer.call("close", protocol.Close(trainer.holder, wait_s=5.0), protocol.Done)
    again = own("r", [disk(tmp_path / "d")])
    again.open()
    until(lambda: again.run_status().tiers[-1].steps == [1])
    told = drained(again)
    assert not told.safe
    (run,) = told.runs
    assert run.detail == "step 1 is on disk, which is gone if that is a disk of this node"


def test_what_does_not_come_away_in_time_is_told(own: Own, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    trainer = own("r", [disk(tmp_path / "file")])
    trainer.open()
    trainer.begin(1)
    trainer.save(1)
    told = drained(trainer, 0.5)
    assert not told.safe
    (run,) = told.runs
    assert run.detail == "step 1 is in the memory of this node and nowhere else"
    (why,) = run.lacking
    assert why.startswith("disk: ")


def test_an_agent_that_is_killed_does_not_take_back_that_its_node_is_safe_to_go(
    own: Own, tmp_path: Path
) -> None:
    """A newer step that it began would be the end of the one that was brought away. An agent that
    ends by itself, as where it is replaced, does take it back."""
    store = protocol.TierConfig("store", "store", f"file://{tmp_path}/s")
    trainer = own("r", [store])
    trainer.open()
    trainer.begin(1)
    trainer.save(1)
    assert drained(trainer).safe
    kill_agent()
    trainer.open()  # by the next agent
    trainer.next_slot = None
    assert trainer.run_status().tiers[0].steps == [1]
    assert "is being drained" in trainer.slot(wait_s=5.0).reason
    with pytest.raises(NodeDraining, match="is being drained"):
        own("other").open()
    pid = agent_pid()
    trainer.client.call("/v1/stop", protocol.Stop(), protocol.Done)
    until(lambda: not Path(f"/proc/{pid}").exists())
    trainer.open()
    assert trainer.slot().grant is not None


@pytest.mark.parametrize("grace", ["20", "0.0001"])
def test_sigterm_drains_within_the_grace_period(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: str
) -> None:
    monkeypatch.setenv("MTCKPT_GRACE_S", grace)
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin(1)
    trainer.save(7)
    pid = trainer.status().pid
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())
    if grace == "20":
        assert len(records(tmp_path / "d")) == 1
    log = Path(protocol.runtime_dir(), protocol.LOG_NAME).read_text()
    assert "run r is drained: step 7 is" in log
    opened = trainer.open()  # by the next agent, which goes on with what is in memory
    assert opened.pid != pid
    assert trainer.run_status().tiers[0].steps == [7]


def test_a_second_sigterm_ends_it_at_once(own: Own, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    trainer = own("r", [disk(tmp_path / "file")])
    trainer.open()
    trainer.begin(1)
    trainer.save(7)
    pid = trainer.status().pid
    with AgentClient(trainer.client.socket_path, 10.0) as client:
        os.kill(pid, signal.SIGTERM)
        until(lambda: client.call("/status", None, protocol.AgentStatus).draining != "")
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_disk_that_hangs_or_is_full_does_not_keep_what_is_here_from_a_store() -> None:
    """No other node stays, and the disk says nothing until the store has its part."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    for label in ("disk", "store"):
        config = protocol.TierConfig(label, label, f"/{label}")
        run.tiers[label] = TierState(label, config, work.TierRef(label, config.path, label=label))
    name = SaveName(10, 1, f"{10:012d}")
    save = run.saves[str(name)] = SaveState(name, "x", world_size=2)
    save.ranks[RAM] = {0}

    async def story() -> _Handover:
        stored = asyncio.Event()

        async def bring(_: RunState, tier: TierState, __: SaveState, ranks: set[int]) -> bool:
            assert ranks == {0}
            if tier.is_store:
                stored.set()
                return True
            await stored.wait()
            raise TierFull("no space is left", tier=tier.label)

        flusher = cast(Any, SimpleNamespace(bring=bring))
        handover = _Handover(run, cast(Any, None), flusher)
        await asyncio.wait_for(handover.of_doubted(save), 20.0)
        return handover

    handover = asyncio.run(story())
    assert handover.brought == {str(name)}
    assert handover.problems == []
    assert "no space is left" in handover.untaken[str(name)]


def test_a_job_that_starts_anew_meanwhile_has_other_nodes() -> None:
    """Their numbers are those of one start: with the next, others are chosen among its nodes."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.layout, run.secret = layout(0, "a", "b", "c", "d"), "old"
    name = SaveName(10, 1, f"{10:012d}")
    save = run.saves[str(name)] = SaveState(name, "x", world_size=2)
    save.ranks[RAM] = {0}
    asked = []

    async def hand_over(
        _: RunState, __: SaveState, ranks: list[int], number: int, ___: Any
    ) -> None:
        asked.append((run.secret, ranks, number))
        if run.secret == "old":
            run.layout, run.secret = layout(0, "a", "b"), "new"
            raise TierUnavailable("it does not answer", tier="peers")

    def candidates(run: RunState) -> list[int]:
        assert run.layout is not None
        return [number for number in range(len(run.layout.nodes)) if number != run.layout.here]

    copies = cast(Any, SimpleNamespace(candidates=candidates, hand_over=hand_over))
    handover = _Handover(run, copies, cast(Any, None))
    asyncio.run(handover.of_own(save))
    assert asked == [("old", [0], 1), ("new", [0], 1)]
    assert handover.untaken == {}
    assert list(handover.holders) == [str(name)]


def test_what_others_brought_to_a_store_is_known_with_its_sizes() -> None:
    """It may be fetched from there later: it has to be known how much memory that takes."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    config = protocol.TierConfig("store", "store", "/store")
    tier = run.tiers["store"] = TierState("store", config, work.TierRef("store", "/store"))
    name = SaveName(10, 1, f"{10:012d}")
    save = run.saves[str(name)] = SaveState(name, "x", world_size=2)
    save.ranks[RAM], save.shard_bytes = {0}, {0: 100}
    there = work.SaveScan(str(name), 10, 1, [1], 2, False, 250, save_id="x", shard_bytes=[250])

    async def call(command: work.Command, *_: Any) -> Any:
        if isinstance(command, work.Scan):
            return work.Scanned([work.RunScan("r", [there])])
        return work.Flushed(100, 0.1, True)

    tools = cast(Any, SimpleNamespace(call=call))
    flusher = Flusher(tools, *cast(Any, (None, None, None)))
    assert asyncio.run(flusher.bring(run, tier, save, {0}))
    assert save.ranks["store"] == {0, 1}
    assert save.size_of({0, 1}) == 350


@pytest.mark.parametrize("takes", [True, False])
def test_what_is_given_away_is_brought_away_by_nobody_else(takes: bool) -> None:
    """As soon as another node may have it: that may be told to go the next moment."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.layout = layout(0, "a", "b")
    name = SaveName(10, 1, f"{10:012d}")
    save = run.saves[str(name)] = SaveState(name, "x", world_size=2)
    save.ranks[RAM] = {0}
    handed = []

    async def hand_over(*_: Any) -> None:
        handed.append(save.handed)
        if not takes:
            raise TierFull("no room", tier="peers")

    copies = SimpleNamespace(candidates=lambda _: [1], hand_over=hand_over)
    handover = _Handover(run, cast(Any, copies), cast(Any, None))
    asyncio.run(handover.of_own(save))
    assert handed == [True]
    assert save.handed == takes == (str(name) in handover.holders)
    assert save.offered  # its answer may have been lost


def test_a_node_that_stays_after_all_says_so_at_once_to_those_that_wait_for_it(
    tmp_path: Path,
) -> None:
    """Where it is their only partner, copies would pause for as long as a silent one is left
    alone."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.layout = layout(0, "a", "b")
    config = protocol.TierConfig("peers", "peers", "")
    tier = run.tiers["peers"] = TierState("peers", config, work.TierRef("peers", "pull"))
    name = SaveName(10, 1, f"{10:012d}")
    save = run.saves[str(name)] = SaveState(name, "x", ranks={RAM: {0}, "peers": {0}})
    tools = SimpleNamespace(events=EventStream())
    copies = Copies(cast(Any, tools), cast(Any, None), cast(Any, SimpleNamespace(verbs={})))
    note = drains.Note(str(tmp_path), "boot")
    unused = cast(Any, None)
    drainer = Drainer({"r": run}, asyncio.Event(), {}, unused, copies, unused, tools.events, note)
    drainer.cancel()
    assert save.owed == {"peers"}  # it is offered, and whoever has it already says so
    assert tier.retry.is_set()
    tier.retry.clear()
    run.note_leaving(1, True)
    run.note_leaving(1, False)  # what the other node hears with the offer
    assert tier.retry.is_set()
    copies.close()
