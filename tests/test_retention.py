"""Retention rules as tables, and what holds whatever the rules are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtckpt._manifest import SaveName
from mtckpt._retention import (
    Held,
    KeepBest,
    KeepEvery,
    KeepLast,
    best_of,
    decide,
    keep_from_wire,
    keep_to_wire,
    parse_keep,
)
from mtckpt.errors import UsageError


def held(step: int, **facts: object) -> Held:
    return Held(SaveName(step, 1, "0" * 12), verified=True, **facts)  # type: ignore[arg-type]


def kept(saves: list[Held], keep: object) -> list[int]:
    decisions = decide(saves, parse_keep(keep))
    return [name.step for name, decision in sorted(decisions.items()) if not decision.delete]


STEPS = [held(step) for step in range(100, 1100, 100)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (3, [800, 900, 1000]),
        (2, [900, 1000]),
        (None, list(range(100, 1100, 100))),
        ([KeepLast(2), KeepEvery(400)], [100, 400, 800, 900, 1000]),
        (KeepEvery(500), [100, 500, 900, 1000]),
    ],
)
def test_rules(keep: object, left: list[int]) -> None:
    assert kept(STEPS, keep) == left


def test_best_keeps_by_metric_and_ignores_what_is_no_number() -> None:
    losses = {100: 3.0, 200: 1.0, 300: 2.0, 400: float("nan"), 500: 5.0, 600: 4.0}
    saves = [held(step, metrics={"loss": loss}) for step, loss in losses.items()]
    assert kept(saves, [KeepLast(2), KeepBest(1, "loss")]) == [200, 500, 600]
    assert kept(saves, [KeepLast(2), KeepBest(1, "loss", "max")]) == [500, 600]
    pick = best_of([3, [KeepBest(2, "loss")]])
    assert pick is not None
    assert pick({s.name: s.metrics or {} for s in saves}) == saves[1].name
    assert best_of([3]) is None


def test_nothing_goes_before_a_newer_one_was_read_back() -> None:
    saves = [Held(SaveName(step, 1, "0" * 12)) for step in (1, 2, 3, 4)]
    assert kept(saves, 2) == [1, 2, 3, 4]


def test_damaged_and_incomplete_saves_do_not_count_as_newer() -> None:
    saves = [held(1), held(2), held(3, damaged=True), held(4, complete=False)]
    assert kept(saves, 2) == [1, 2, 3, 4]


def test_the_newest_that_nobody_doubts_is_kept_too() -> None:
    """Suspect ones may be the only ones from some step on: then they go by the rules."""
    saves = [held(1), held(2), *(held(step, suspect=True) for step in (3, 4, 5, 6))]
    assert kept(saves, 2) == [2, 5, 6]
    assert kept([*saves, held(7)], 2) == [6, 7]
    assert kept(saves[2:], 2) == [5, 6]


def branch(step: int, incarnation: int, **facts: object) -> Held:
    name = SaveName(step, incarnation, "0" * 12)
    return Held(name, verified=True, **facts)  # type: ignore[arg-type]


def test_abandoned_saves_go_once_their_successors_are_there_and_what_is_read_stays() -> None:
    saves = [held(10), held(20), held(1000, on_line=False), held(5, busy=True)]
    assert kept(saves, 2) == [5, 10, 20, 1000]  # rolled back just now, perhaps by mistake
    saves += [branch(21, 2)]
    assert kept(saves, 2) == [5, 20, 21, 1000]
    saves += [branch(22, 2)]
    assert kept(saves, 2) == [5, 21, 22]
    assert kept([save for save in saves if not save.busy], None) == [10, 20, 21, 22, 1000]


def test_what_never_completed_goes_once_newer_ones_did() -> None:
    saves = [held(1, complete=False), held(2), held(3), held(4, complete=False)]
    assert kept(saves, 2) == [2, 3, 4]
    assert kept([held(1, complete=False, busy=True), held(2), held(3)], 2) == [1, 2, 3]


def test_a_rule_in_hours_keeps_tomorrow_what_it_keeps_today() -> None:
    hour = 3600.0
    ages = [step * 600.0 for step in range(60)]  # a save every ten minutes, for ten hours
    rules = [KeepLast(2), KeepEvery("1h", within="6h")]
    saves = [held(1000 - round(age / 600), age_s=age) for age in ages]
    first = kept(saves, rules)
    assert len(first) == 2 + 6
    for later_s in (60.0, 0.4 * hour, 0.9 * hour):
        left = [s for s in saves if s.name.step in first]
        moved = [held(s.name.step, age_s=s.age_s + later_s) for s in left]
        gone = {s.name.step for s in moved if s.age_s > 6 * hour}
        assert set(kept(moved, rules)) == set(first) - gone


@pytest.mark.parametrize("keep", [0, 1, -3, True, "all", [1], KeepLast])
def test_bad_rules_are_refused(keep: object) -> None:
    with pytest.raises(UsageError):
        parse_keep(keep)


@pytest.mark.parametrize(
    "keep", [3, KeepEvery(10), KeepEvery("1h", within="2h"), [KeepLast(2), KeepBest(3, "a", "max")]]
)
def test_rules_travel(keep: object) -> None:
    assert keep_to_wire(keep_from_wire(keep_to_wire(keep))) == keep_to_wire(keep)


saves_strategy = st.lists(
    st.builds(
        Held,
        st.builds(SaveName, st.integers(0, 50), st.integers(1, 3), st.just("0" * 12)),
        complete=st.booleans(),
        on_line=st.booleans(),
        verified=st.booleans(),
        damaged=st.booleans(),
        busy=st.booleans(),
        age_s=st.floats(0, 1e6),
    ),
    max_size=20,
    unique_by=lambda save: save.name,
)
rules_strategy = st.lists(
    st.one_of(
        st.builds(KeepLast, st.integers(2, 5)),
        st.builds(KeepEvery, st.one_of(st.integers(1, 20), st.just("1h"))),
        st.builds(KeepBest, st.integers(1, 3), st.just("loss")),
    ),
    max_size=3,
)


def order(save: Held) -> tuple[int, int]:
    return (save.name.incarnation, save.name.step)


@given(saves_strategy, rules_strategy)
def test_whatever_the_rules_two_newer_stay_and_one_is_verified(
    saves: list[Held], rules: list[KeepLast | KeepEvery | KeepBest]
) -> None:
    decisions = decide(saves, rules)
    left = [
        s
        for s in saves
        if not decisions[s.name].delete and s.complete and s.on_line and not s.damaged
    ]
    for save in saves:
        if decisions[save.name].delete:
            assert rules
            assert not save.busy
            newer = [s for s in left if order(s) > order(save)]
            assert len(newer) >= 2  # of those that are left, not of those that were there
            assert any(s.verified for s in newer)
    good = [s for s in saves if s.complete and s.on_line and not s.damaged]
    assert not good or max(good, key=order) in left
