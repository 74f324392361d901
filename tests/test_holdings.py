"""Which saves places hold together, and who is asked for which shard. Pure."""

from __future__ import annotations

from pathlib import Path

import builders
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtckpt import _inventory
from mtckpt._choice import plan_restore
from mtckpt._holdings import HeldSave, Holdings, Part, holdings_of, join
from mtckpt._manifest import Incarnation, SaveName
from mtckpt.errors import StepNotFound
from mtckpt.tiers import LocalTier

NAME = SaveName(10, 1, "0123456789ab")
ID = "01234567-89ab-cdef-0123-456789abcdef"


def part(*ranks: int, of: int = 4, plan: str = "p", size_bytes: int = 0) -> Part:
    return Part(ID, of, plan, tuple((rank, rank + 1) for rank in ranks), size_bytes)


def holding(label: str, *parts: Part, name: SaveName = NAME, **more: object) -> Holdings:
    held = HeldSave(str(name), parts, unfinished=True)
    return Holdings(label, (msgspec.structs.replace(held, **more),))


def test_places_hold_a_save_together() -> None:
    places = [holding("ram", part(0, 1)), holding("disk", part(1, 2)), holding("store", part(3, 0))]
    (save,) = join(places).values()
    assert save.complete
    assert save.sources == {
        0: ("ram", "store"), 1: ("ram", "disk"), 2: ("disk",), 3: ("store",),
    }  # fmt: skip
    assert not save.reasons
    (candidate,) = plan_restore(places, "latest").candidates
    assert candidate.labels() == {"ram", "disk", "store"}


@given(st.data())
def test_complete_is_the_union_of_places(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 6))
    ranks = st.sets(st.integers(0, world_size - 1))
    held = data.draw(st.lists(ranks, min_size=1, max_size=5))
    places = [
        holding(f"disk-{number}", *([part(*each, of=world_size)] if each else []))
        for number, each in enumerate(held)
    ]
    (save,) = join(places).values()
    assert save.complete == (set().union(*held) == set(range(world_size)))
    for rank, labels in save.sources.items():
        assert list(labels) == [f"disk-{n}" for n, each in enumerate(held) if rank in each]
    assert bool(plan_restore(places, "latest").candidates) == save.complete
    assert save.complete or save.reasons


def test_parts_of_two_plans_are_no_save_together() -> None:
    places = [holding("ram", part(0, 1, 2)), holding("disk", part(3, plan="other"))]
    plan = plan_restore(places, "latest")
    assert not plan.candidates
    assert not plan.lost  # it never was a step
    assert plan.skipped == {
        "step 10": "disk: records of ranks [3] are of another plan than those in ram;"
        " records of ranks [3] are missing from ram, disk"
    }


def test_the_plan_that_is_complete_counts() -> None:
    places = [holding("ram", part(0, 1, 2)), holding("disk", part(0, 1, of=2, plan="other"))]
    (candidate,) = plan_restore(places, "latest").candidates
    assert candidate.sources == {0: ("disk",), 1: ("disk",)}
    assert candidate.whole == (ID, 2, "other")


def test_what_was_more_once_is_lost_and_a_save_called_off_is_no_source() -> None:
    there = holding("ram", part(0, 1))
    off = holding("disk", part(2, 3), aborted="rank 1 had no slot", unfinished=False)
    plan = plan_restore([there, off], "latest")
    assert not plan.candidates
    assert plan.lost
    assert "disk: called off: rank 1 had no slot" in plan.skipped["step 10"]
    damaged = holding("disk", part(2), problem="rank-00003.json: digest", unfinished=False)
    plan = plan_restore([there, damaged], "latest")
    assert plan.lost
    assert plan.skipped["step 10"].startswith("disk: rank-00003.json: digest")
    assert plan_restore([there, damaged, holding("store", part(3))], "latest").candidates


def test_a_newer_step_that_is_nowhere_whole_is_named() -> None:
    newer = SaveName(20, 1, "0123456789ab")
    places = [
        holding("ram", part(0, 1, 2, 3)),
        holding("disk", part(0, 1), name=newer),
        holding("store", part(2), name=newer),
    ]
    plan = plan_restore(places, "latest")
    assert [candidate.name.step for candidate in plan.candidates] == [10]
    assert plan.skipped == {"step 20": "records of ranks [3] are missing from disk, store"}
    with pytest.raises(StepNotFound, match="no tier has step 30"):
        plan_restore(places, 30)


def test_a_shard_is_a_short_line(tmp_path: Path) -> None:
    """What is told to every rank does not grow with the number of tensors."""
    arrays = {f"layer.{number}.weight": np.zeros(3) for number in range(200)}
    for rank in range(6):
        builders.build_save(tmp_path, "r", 10, arrays, rank=rank, world_size=6)
    held = holdings_of(_inventory.scan(LocalTier(tmp_path, read_only=True), "r"))
    incarnations = len(msgspec.json.encode(held.incarnations))
    wire = msgspec.json.encode(held)
    assert len(wire) - incarnations <= 256
    again = msgspec.convert(msgspec.json.decode(wire), Holdings)
    assert again == held
    (save,) = join([again]).values()
    assert save.sources == dict.fromkeys(range(6), ("disk",))
    shards = list((tmp_path / "r").glob("step-*/*.safetensors"))
    assert save.size_bytes == sum(path.stat().st_size for path in shards)


def test_ten_thousand_ranks_on_many_nodes() -> None:
    """What is told of a shard stays below 256 bytes; the last node's silence is one step's end."""
    names = [SaveName(step, 1, "0123456789ab") for step in (10, 20, 30)]
    wire = []
    for node in range(1250):
        ranks = ((8 * node, 8 * node + 8),)
        parts = (Part(ID, 10_000, "p" * 32, ranks, 8 << 30),)
        kept = names if node < 1249 else names[:2]
        saves = tuple(HeldSave(str(name), parts, unfinished=True) for name in kept)
        wire += [msgspec.json.encode(Holdings(f"{t}-{node}", saves)) for t in ("ram", "disk")]
    assert sum(map(len, wire)) < 10_000 * 256
    held = [msgspec.convert(msgspec.json.decode(each), Holdings) for each in wire]
    plan = plan_restore(held, "latest", fastest=[holdings.label for holdings in held])
    assert [candidate.name for candidate in plan.candidates] == [names[1], names[0]]
    assert plan.candidates[0].sources[9_999] == ("ram-1249", "disk-1249")
    assert "[9992, 9993, 9994" in plan.skipped["step 30"]
    assert len(plan.skipped["step 30"]) < 500


def test_holdings_that_overlap_are_counted_once() -> None:
    places = [
        holding("ram", part(0, 1, size_bytes=200)),
        holding("disk", part(0, 1, 2, 3, size_bytes=400)),
    ]
    (save,) = join(places).values()
    assert save.size_bytes == 400


def test_sound_steps_that_a_later_start_left_are_no_fresh_start() -> None:
    """It began without a restore, and saved nothing."""
    begun = Incarnation(1, "r", 2, ID)
    held = msgspec.structs.replace(holding("disk", part(0, of=1)), incarnations=(begun,))
    plan = plan_restore([held], "latest")
    assert (plan.candidates, plan.lost) == ((), True)
    assert "restore(step=10) takes it" in plan.skipped["step 10"]
    assert [each.name for each in plan_restore([held], 10).candidates] == [NAME]


def test_a_step_that_was_asked_for_is_never_nothing() -> None:
    """As while what was abandoned is being deleted: its records go one by one."""
    branched = Incarnation(1, "r", 2, ID, (1, 5))
    half = msgspec.structs.replace(holding("disk", part(0, 1)), incarnations=(branched,))
    plan = plan_restore([half], 10)
    assert not plan.candidates
    assert plan.skipped == {"step 10": "records of ranks [2, 3] are missing from disk"}
    assert not plan_restore([half], "latest").skipped
    whole = holding("disk", part(0, 1, 2, 3))
    whole = msgspec.structs.replace(whole, incarnations=(branched,))
    for step in ("latest", "best"):
        assert plan_restore([whole], step, best=lambda saves: max(saves, default=None)).lost
