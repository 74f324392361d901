"""What an agent makes of what an earlier one left: what is open, owed, whole and recyclable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from mtckpt._manifest import FORMAT_VERSION, Incarnation, SaveName
from mtckpt.agent import queue, work
from mtckpt.agent.leftovers import adopt_slots
from mtckpt.agent.nodes import News
from mtckpt.agent.notes import config_of, left_s_of
from mtckpt.agent.owners import Owner
from mtckpt.agent.protocol import TierConfig, WireError
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, Plan, SaveState, TierState

SIZES = [100, 250]


@pytest.fixture
def run(tmp_path: Path) -> RunState:
    run = RunState("r", "r", work.TierRef("ram", str(tmp_path), label=RAM))
    for label in ("disk", "store"):
        config = TierConfig(label, label, str(tmp_path / label))
        ref = work.TierRef("disk" if label == "disk" else "store", config.path, label=label)
        run.tiers[label] = TierState(label, config, ref)
    return run


def found(step: int, ranks: list[int], due: str = "", incarnation: int = 1) -> work.SaveScan:
    name = SaveName(step, incarnation, f"{step:012d}")
    sizes = [SIZES[rank] for rank in ranks]
    return work.SaveScan(
        str(name),
        step,
        incarnation,
        ranks,
        world_size=2,
        complete=len(ranks) == 2,
        size_bytes=sum(sizes),
        save_id="x",
        due=due.split(),
        committed=True,
        shard_bytes=sizes,
    )


def at(run: RunState, step: int, incarnation: int = 1) -> SaveState:
    save = run.save_at(incarnation, step)
    assert save is not None
    return save


def test_another_directory_under_the_same_label_has_nothing_yet(run: RunState) -> None:
    """A disk tier was given another path: what the old one had is not in the new one."""
    run.note_scan(RAM, work.RunScan("r", [found(10, [0, 1], "disk store")]))
    run.note_scan("disk", work.RunScan("r", [found(10, [0, 1], "store")]))
    save = at(run, 10)
    assert run.source_for(save, "store") == run.tiers["disk"].ref
    save.failed["disk"] = WireError("TierFull", "full")
    known = [tier.config for tier in run.tiers.values()]
    tiers = [TierConfig(each.label, each.kind, f"{each.path}-2") for each in known]
    registry = Registry(
        cast(Any, SimpleNamespace(limits=Limits(), events=None)), "/nowhere", service=False
    )
    registry.set_tiers(run, tiers)
    assert "disk" not in save.ranks
    assert save.failures() == {}
    assert run.source_for(save, "store") == run.ram


def test_what_recycling_had_left_of_an_older_step_is_not_open(run: RunState) -> None:
    saves = [found(10, [1]), found(20, [0, 1]), found(30, [0]), found(40, [1], "", 2)]
    run.note_scan(RAM, work.RunScan("r", saves))
    assert [save.name.step for save in run.open_saves(1)] == [30]
    assert [save.name.step for save in run.open_saves(2)] == [40]
    assert queue.pick_recycle(run.facts()) == str(at(run, 10).name)


@pytest.mark.parametrize(
    ("on_disk", "superseded"), [([0, 1], set()), ([], {"disk", "store"}), ([0], {"disk", "store"})]
)
def test_what_nobody_has_whole_any_more_is_waited_for_by_nobody(
    on_disk: list[int], superseded: set[str], run: RunState
) -> None:
    """A step due everywhere whose slots were half recycled: the disk has it, or it is superseded.

    Recycling had begun, so a newer step was owed to whatever had not got this one.
    """
    run.note_scan(RAM, work.RunScan("r", [found(10, [1], "disk store"), found(20, [0, 1])]))
    assert queue.pick_recycle(run.facts()) == str(at(run, 10).name)  # its slots wait for nobody
    run.note_scan("store", work.RunScan("r"))
    assert at(run, 10).superseded == set()  # a disk that was not looked into may have it
    run.note_scan("disk", work.RunScan("r", [found(10, on_disk, "store")] if on_disk else []))
    run.note_scan("store", work.RunScan("r"))
    assert at(run, 10).superseded == superseded
    assert at(run, 10).owed == (frozenset() if superseded else {"store"})


def test_slots_that_an_earlier_agent_left_fit_whose_ranks_are_of_unequal_size(
    run: RunState,
) -> None:
    run.note_scan(RAM, work.RunScan("r", [found(10, [0, 1])]))
    adopt_slots(run, [], "?")
    sizes = {slot.rank: slot.shard_bytes for slot in run.slots.values()}
    assert sizes == dict(enumerate(SIZES))
    assert [s.rank for s in run.slots.values() if s.fits(Plan(SIZES[1], 64))] == [1]


def test_a_slot_waits_for_the_store_until_a_disk_has_the_save(run: RunState) -> None:
    """A disk that waits for it may be given a newer one instead, and the store has nothing then."""
    saves = [found(10, [0, 1], "disk store"), found(20, [0, 1], "disk")]
    run.note_scan(RAM, work.RunScan("r", saves))
    assert queue.pick_recycle(run.facts()) is None
    run.note_scan("disk", work.RunScan("r", [found(10, [0, 1], "store")]))
    assert [each.owed for each in run.facts() if each.order == (1, 10)] == [frozenset()]
    assert queue.pick_recycle(run.facts()) == str(at(run, 10).name)
    at(run, 10).damaged.add("disk")
    assert queue.pick_recycle(run.facts()) is None


def rolled_back(run: RunState) -> None:
    """Steps 10 to 30 in RAM, and a start of the job that was restored from step 10."""
    run.note_scan(RAM, work.RunScan("r", [found(step, [0, 1]) for step in (10, 20, 30)]))
    for number, parent in ((1, None), (2, (1, 10))):
        run.incarnations[number] = Incarnation(FORMAT_VERSION, "r", number, "x", parent)


def test_the_slot_of_what_was_restored_from_outlasts_what_that_abandoned(run: RunState) -> None:
    rolled_back(run)
    assert run.newest_staged() is at(run, 10)
    recycled = []
    while name := queue.pick_recycle(run.facts()):
        recycled.append(run.saves[name].name.step)
        run.drop_copy(run.saves[name], RAM)
    assert recycled == [20, 30]


def test_what_other_nodes_say_ends_no_backlog_that_a_store_still_gets(run: RunState) -> None:
    """The store has the newer one, and is on its way to the older: its rules keep both."""
    run.note_scan(RAM, work.RunScan("r", [found(10, [0, 1], "store")]))
    run.note_scan("store", work.RunScan("r"))
    run.note_scan(RAM, work.RunScan("r", [found(step, [0, 1]) for step in (10, 20)]))
    at(run, 20).ranks["store"] = {0, 1}
    run.discharge(scanned=False)
    assert at(run, 10).owed == {"store"}
    run.discharge()
    assert at(run, 10).superseded == {"store"}


def test_a_disk_that_is_looked_at_again_ends_no_backlog_of_a_store(run: RunState) -> None:
    """At close the store has the newest, and is still to get one that its rules keep: that stays
    owed. What it has let go is not owed again, whatever the disk's records say."""
    on_disk = work.RunScan("r", [found(step, [0, 1], "store") for step in (10, 20, 30)])
    run.note_scan("disk", on_disk)
    run.note_scan("store", work.RunScan("r"))
    for save in (at(run, 10), at(run, 30)):
        save.due.discard("store")
    at(run, 30).ranks["store"] = {0, 1}  # and 10 was there, and has gone
    run.tiers["disk"].scanned = False
    run.note_scan("disk", on_disk)
    assert [at(run, step).owed for step in (10, 20, 30)] == [set(), {"store"}, set()]


def test_what_was_restored_from_is_whole_for_the_next_agent_too(run: RunState) -> None:
    """This node has a part of it; that others had theirs was known when the job was started."""
    run.note_scan(RAM, work.RunScan("r", [found(10, [0])]))
    assert not at(run, 10).is_complete(RAM)
    at(run, 10).chosen = True
    again = RunState("r", "r", run.ram)
    again.noted_chosen = set(config_of(run).extra["chosen"])
    again.note_scan(RAM, work.RunScan("r", [found(10, [0]), found(20, [0])]))
    assert [at(again, step).is_complete(RAM) for step in (10, 20)] == [True, False]


def test_copies_of_what_was_restored_from_outlast_what_that_abandoned(run: RunState) -> None:
    rolled_back(run)
    at(run, 30).stages.append("replicated")
    assert at(run, 10) not in run.outlived()
    at(run, 10).stages.append("replicated")
    assert [save.name.step for save in run.outlived()] == [20, 30]


def test_what_other_nodes_handed_over_goes_once_something_newer_is_whole(run: RunState) -> None:
    """Where the run keeps no copies nothing ever outlives the loss of a node."""
    run.note_scan(RAM, work.RunScan("r", [found(step, [0, 1]) for step in (10, 20)]))
    assert [save.name.step for save in run.outlived()] == [10]
    peers = TierConfig("peers", "peers", "", copies=1)
    run.tiers["peers"] = TierState("peers", peers, work.TierRef("peers", "", label="peers"))
    assert run.outlived() == []


def test_what_is_here_with_the_copies_for_other_nodes_is_whole(run: RunState) -> None:
    """Also for the next agent, and where the node of rank 0 is gone and says nothing."""
    run.noted_guests = {found(10, []).save: [1]}
    run.note_scan(RAM, work.RunScan("r", [found(10, [0, 1]), found(20, [0])]))
    assert [at(run, step).is_complete(RAM) for step in (10, 20)] == [True, False]
    assert at(run, 10).ranks[RAM] == {0}
    assert run.newest_staged() is at(run, 10)


def test_a_disk_is_owed_what_was_restored_from_whatever_it_has_of_what_is_abandoned(
    run: RunState,
) -> None:
    rolled_back(run)
    at(run, 10).due.add("disk")
    run.note_scan("disk", work.RunScan("r", [found(30, [0, 1])]))
    assert at(run, 10).owed == {"disk"}
    run.note_scan("disk", work.RunScan("r", [found(30, [0, 1]), found(40, [0, 1], "", 2)]))
    assert at(run, 10).superseded == {"disk"}


def test_a_trainer_is_told_of_its_own_saves_alone(run: RunState) -> None:
    """Each answer wakes a thread of it, and much changes that is no news to it."""
    run.owners[0] = Owner("h", 0, 1, 1, 1, "host", incarnation=2)
    run.note_scan(RAM, work.RunScan("r", [found(10, [0, 1]), found(20, [0, 1], "", 2)]))
    assert run.has_news(0, "h")
    since = run.changes(0, "h").seq
    assert not run.has_news(since, "h")
    run.touch()
    run.touch(at(run, 10))
    assert run.seq > since
    assert not run.has_news(since, "h")
    run.touch(at(run, 20, 2))
    assert not run.has_news(since, "h")  # it was told all that is said of that one
    at(run, 20, 2).stages.append("local")
    run.touch(at(run, 20, 2))
    assert run.has_news(since, "h")
    answer = run.changes(since, "h")
    assert [change.stages for change in answer.saves] == [["staged", "local"]]
    run.touch(at(run, 20, 2))
    assert not run.has_news(answer.seq, "h")
    assert run.has_news(since, "whoever was fenced")


def test_what_is_done_for_a_save_does_not_grow_with_those_that_were_before(run: RunState) -> None:
    """All that are known are looked at each time: those that lie nowhere are soon forgotten."""
    held = run.lock(SaveState(SaveName(1, 1, f"{1:012x}"), ""), RAM)
    for step in range(1, 2001):
        name = SaveName(step, 1, f"{step:012x}")
        save = SaveState(name, "", stages=["staged", "replicated"], seq=step)
        run.saves[str(name)] = save
        assert not run.lock(save, "disk").locked()
    assert run.lock(at(run, 1), RAM) is held
    assert len(run._locks) == 1
    at(run, 7).ranks["disk"] = {0, 1}
    run.forget_old()
    assert at(run, 7).ranks
    assert at(run, 2000).stages == ["staged", "replicated"]  # who waits for it is still told
    assert len(run.saves) <= 500


def test_what_other_nodes_alone_still_have_is_not_forgotten(run: RunState) -> None:
    """They say so once, to a lead that may have no part of it, and tell nobody else: without its
    word that all is there, one that starts anew takes its part for what was never complete."""
    names = [SaveName(step, 1, f"{step:012x}") for step in range(1, 501)]
    for name in names:
        save = run.saves[str(name)] = SaveState(name, "", world_size=2, seq=name.step)
        for rank in (0, 1):
            save.told[rank + 1] = News(str(name), "", world_size=2, parts={"disk": [rank]})
    run.forget_old()
    assert all(save.is_whole("disk") for save in run.saves.values())
    assert len(run.saves) == len(names)
    for save in run.saves.values():  # its nodes let go of it
        save.told[1] = save.told[2] = News(str(save.name), "", world_size=2)
    new = SaveName(501, 1, f"{501:012x}")
    run.saves[str(new)] = SaveState(new, "")  # whose parts are still to come
    run.forget_old()
    assert str(new) in run.saves
    assert len(run.saves) < len(names)


def test_a_time_since_another_start_of_the_machine_says_nothing(run: RunState) -> None:
    """Slots beside a disk outlive a reboot: nobody has been away from them for longer than it."""
    run.left_s = 5.0
    noted = config_of(run)
    assert left_s_of(noted, 100.0) == 5.0
    rebooted = {**noted.extra, "boot_id": "another"}
    assert left_s_of(msgspec.structs.replace(noted, extra=rebooted), 100.0) == 100.0
    assert left_s_of(msgspec.structs.replace(noted, extra={}), 100.0) == 100.0
    # A trainer of a job that has run for days, and died with the agent: it was there just now. An
    # agent of an older version has noted the time of its start as well.
    run.owners[0] = Owner("h", 0, 1, 1, 0, "here")
    with_owner = msgspec.structs.replace(config_of(run), extra=noted.extra)
    assert left_s_of(with_owner, 100.0) == 100.0


def test_what_is_saved_beside_a_successor_is_refused_and_not_passed_over(run: RunState) -> None:
    """Whoever waits for it is told why: nothing newer of this job takes its place."""
    first = Incarnation(FORMAT_VERSION, "r", 1, "x")
    after = Incarnation(FORMAT_VERSION, "r", 2, "y", (1, 10))
    saves = [found(step, [0, 1], "store") for step in (10, 20)]
    run.note_scan(RAM, work.RunScan("r", saves, [first]))
    run.note_scan("store", work.RunScan("r", [found(10, [0, 1])], [first, after]))
    assert (at(run, 20).owed, at(run, 20).superseded) == (frozenset({"store"}), set[str]())
