"""The agent alone is killed: whoever speaks to the next one first, nobody is told wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_checks import kill_agent, until
from fake_trainer import FakeTrainer, disk

from mtckpt._manifest import SaveName
from mtckpt.agent import protocol, work
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, TierState
from mtckpt.errors import AgentUnavailable


@pytest.fixture
def own(runtime_dir: Path, ram_dir: Path) -> Iterator[Callable[..., FakeTrainer]]:
    made: list[FakeTrainer] = []

    def make(run: str, tiers: list[TierConfig]) -> FakeTrainer:
        made.append(FakeTrainer(run, tiers))
        return made[-1]

    yield make
    for trainer in made:
        trainer.client.close()


def test_a_slot_from_before_is_sealed_once_the_run_is_open_again(
    own: Callable[..., FakeTrainer], tmp_path: Path
) -> None:
    """Another thread, or another run, has started the next agent: our seal may arrive before
    we have told that agent which slots are ours."""
    trainer = own("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin()
    trainer.save(1, ["disk"])
    grant = trainer.slot().grant
    assert grant is not None
    seal = trainer.capture(2, grant, ["disk"])
    kill_agent()
    other = own("other", [])
    other.open()
    with pytest.raises(AgentUnavailable, match="does not know who asks"):
        trainer.seal(seal)
    with pytest.raises(AgentUnavailable, match="does not know who asks"):
        trainer.slot()
    with pytest.raises(AgentUnavailable, match="does not know who asks"):
        trainer.changes()
    trainer.open()
    trainer.seal(seal)
    trainer.wait_stage(2, "local")


def test_a_place_in_the_news_of_one_agent_is_none_in_those_of_the_next(
    own: Callable[..., FakeTrainer], tmp_path: Path
) -> None:
    trainer = own("r", [disk(tmp_path / "d")])
    first = trainer.open().agent_id
    trainer.begin()
    trainer.save(1, ["disk"])
    trainer.wait_stage(1, "local")
    kill_agent()
    second = trainer.open().agent_id
    assert second != first

    def ask(agent_id: str, since: int) -> protocol.Changes:
        path = f"changes?since={since}&timeout_s=0&holder={trainer.holder}&agent={agent_id}"
        changes: protocol.Changes = trainer.call(path, None, protocol.Changes)
        return changes

    for since in (0, 3, 1_000_000):
        with pytest.raises(AgentUnavailable, match="another agent"):
            ask(first, since)
    assert [change.step for change in ask(second, 0).saves] == [1]


def test_what_a_kill_left_of_a_deletion_goes_with_the_next_one(
    own: Callable[..., FakeTrainer], tmp_path: Path
) -> None:
    trainer = own("r", [disk(tmp_path / "d", keep=3)])
    trainer.open()
    trainer.begin()
    for step in (1, 2, 3):
        trainer.save(step, ["disk"])
        trainer.wait_stage(step, "local")
    kill_agent()
    (oldest, *_) = sorted((tmp_path / "d" / trainer.key).glob("step-*"))
    for name in ("rank-00000.json", "manifest.json"):  # what goes first
        (oldest / name).unlink()
    empty = oldest.with_name("step-000000000000.000001.0123456789ab")  # what goes last
    empty.mkdir()
    trainer.open()
    for step in (4, 5):
        trainer.save(step, ["disk"])
        trainer.wait_stage(step, "local")
    until(lambda: not oldest.exists())
    assert not empty.exists()


def test_slots_whose_grant_never_arrived_are_given_again(own: Callable[..., FakeTrainer]) -> None:
    """The agent was stopped, or slow, and whoever had asked for a slot asked no longer."""
    trainer = own("r", [])
    trainer.open()
    trainer.begin()
    trainer.save(1)
    held: list[str] = []
    for _ in range(5):
        want = protocol.WantSlots(
            trainer.holder, trainer.layout.size_bytes, trainer.layout.table_bytes, 3, 5.0, held
        )
        lost = trainer.call("slots", want, protocol.Slots).grant
        assert lost is not None
    seal = trainer.capture(2, lost, [])
    held = [lost.slot_id]
    for _ in range(3):
        want = protocol.WantSlots(
            trainer.holder, trainer.layout.size_bytes, trainer.layout.table_bytes, 3, 5.0, held
        )
        other = trainer.call("slots", want, protocol.Slots).grant
        assert other is not None
        assert other.inode != lost.inode  # it is being written
    trainer.seal(seal)


def test_who_waits_hears_that_a_save_was_superseded_before_the_agent_died() -> None:
    """RAM is read first, and the news of that are told before the disk has been read."""
    run = RunState("r", "r", work.TierRef("ram", "/nowhere"))
    config = TierConfig("disk", "disk", "/nowhere", [])
    run.tiers["disk"] = TierState("disk", config, work.TierRef("disk", "/nowhere"))

    def scan(*steps: int) -> work.RunScan:
        return work.RunScan(
            "r",
            [
                work.SaveScan(
                    str(SaveName(step, 1, "0" * 12)),
                    step,
                    1,
                    ranks=[0],
                    world_size=1,
                    complete=True,
                    save_id=f"save {step}",
                    due=["disk"],
                )
                for step in steps
            ],
        )

    run.note_scan(RAM, scan(4, 5))
    told = run.changes(0, "")
    assert {change.step: change.superseded for change in told.saves} == {4: [], 5: []}
    run.note_scan("disk", scan(5))
    news = {change.step: change for change in run.changes(told.seq, "").saves}
    assert news[4].superseded == ["disk"]
    assert news[5].stages == ["staged", "local"]
