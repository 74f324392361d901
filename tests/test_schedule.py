"""When a tier is due: tables of steps, and the interval that keeps the loss under 1 %."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtckpt._schedule import (
    Disk,
    DueTier,
    Ram,
    Schedule,
    Tempo,
    auto_interval,
    labels_of,
    make_schedule,
    parse_every,
)
from mtckpt.errors import UsageError


def run_through(schedule: Schedule, steps: range, now_s: float = 0.0) -> dict[int, list[str]]:
    fired = {}
    for step in steps:
        labels = schedule.due(step, now_s)
        assert bool(labels) == schedule.is_due(step, now_s)
        if labels:
            schedule.done(step, labels, now_s)
            fired[step] = labels
    return fired


def test_step_zero_is_not_due_and_multiples_are() -> None:
    schedule = make_schedule(Ram(every=4), [], [])
    assert list(run_through(schedule, range(13))) == [4, 8, 12]


def test_calls_that_are_not_multiples_still_fire() -> None:
    schedule = make_schedule(Ram(every=10), [], [])
    assert list(run_through(schedule, range(0, 50, 7))) == [14, 21, 35, 42]


def test_a_resumed_run_goes_on_with_the_same_steps() -> None:
    whole = list(run_through(make_schedule(Ram(every=10), [], []), range(100)))
    schedule = make_schedule(Ram(every=10), [], [])
    schedule.resumed(57, 0.0)
    assert list(run_through(schedule, range(58, 100))) == [s for s in whole if s > 57]


def test_a_slower_tier_takes_every_captured_step_or_has_its_own_rhythm() -> None:
    disks = [Disk("a"), Disk("b", every=15)]
    schedule = make_schedule(Ram(every=10), disks, labels_of(disks))
    assert run_through(schedule, range(31)) == {
        10: ["ram", "disk"],
        15: ["disk-2"],
        20: ["ram", "disk"],
        30: ["ram", "disk", "disk-2"],
    }


def test_a_time_fires_at_the_first_captured_step_after_it() -> None:
    disks = [Disk("a", every="10min")]
    schedule = Schedule(
        [DueTier("ram", 5, None), DueTier("disk", *parse_every("10min", times=True))]
    )
    assert labels_of(disks) == ["disk"]
    assert schedule.due(5, 599.0) == ["ram"]
    assert schedule.due(3, 601.0) == []
    assert schedule.due(5, 601.0) == ["ram", "disk"]


@given(st.integers(1, 50), st.lists(st.integers(0, 3), min_size=1, max_size=200))
def test_no_stretch_of_steps_is_passed_over(every: int, gaps: list[int]) -> None:
    schedule = make_schedule(Ram(every=every), [], [])
    step, last = 0, 0
    for gap in gaps:
        step += gap
        if schedule.is_due(step, 0.0):
            schedule.done(step, schedule.due(step, 0.0), 0.0)
            last = step
        assert step // every == last // every


@pytest.mark.parametrize("every", [0, -1, True, "soon", "0min", 1.5, None])
def test_bad_intervals_are_refused(every: object) -> None:
    with pytest.raises(UsageError, match="every="):
        Disk("x", every=every)  # type: ignore[arg-type]


def test_ram_takes_no_times_and_no_single_slot() -> None:
    with pytest.raises(UsageError):
        Ram(every="10min")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="2 are the least"):
        Ram(slots=1)


@given(st.floats(1e-6, 100), st.floats(1e-6, 100))
def test_auto_keeps_the_loss_under_one_per_cent(stall_s: float, step_s: float) -> None:
    every = auto_interval(stall_s, step_s)
    assert every == 10_000 or stall_s <= 0.01 * every * step_s * (1 + 1e-9)
    assert every == 1 or stall_s > 0.01 * (every - 1) * step_s * (1 - 1e-9)


@pytest.mark.parametrize("at_once", [True, False])
def test_one_slow_save_does_not_put_off_the_next_for_long(at_once: bool) -> None:
    schedule = make_schedule(Ram(), [], [])
    schedule.adapt(auto_interval(stall_s=60, step_s=0.1), "r", at_once=at_once)
    assert schedule.every_to_carry == 40
    for _ in range(5):
        schedule.adapt(auto_interval(stall_s=60, step_s=0.1), "r", at_once=True)
    assert schedule.tiers[0].every_steps == 10_000  # but it lasts: that is what saving costs


def test_the_tempo_knows_nothing_from_a_single_save() -> None:
    tempo = Tempo()
    assert tempo.note(10, 0.1) is None
    assert tempo.note(20, 0.1) is not None


def test_an_interval_that_trembles_is_no_line_a_save(caplog: pytest.LogCaptureFixture) -> None:
    schedule = make_schedule(Ram(), [], [])
    with caplog.at_level("INFO"):
        for every in (12, 9, 7, 13, 19, 20, 39, 18, 10, 8):
            schedule.adapt(every, "r", at_once=True)
    assert [record.message for record in caplog.records] == [
        "run r: saving every 20 steps (was 10)",
        "run r: saving every 10 steps (was 20)",
    ]
    assert schedule.tiers[0].every_steps == 10
