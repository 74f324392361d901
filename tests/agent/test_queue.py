"""The agent's decisions, as tables."""

from __future__ import annotations

import pytest

from mtckpt import errors
from mtckpt.agent import queue
from mtckpt.agent.owners import Claim, Owner, Process, Verdict, judge
from mtckpt.agent.queue import Limits, Pick, SaveFacts


def facts(
    step: int,
    owed: str = "",
    writing: str = "",
    *,
    staged: bool = True,
    readers: int = 0,
    incarnation: int = 1,
    on_line: bool = True,
) -> SaveFacts:
    return SaveFacts(
        f"s{step}",
        (incarnation, step),
        staged,
        frozenset(owed.split()),
        frozenset(writing.split()),
        readers,
        on_line=on_line,
    )


def off(step: int, owed: str = "") -> SaveFacts:
    """Abandoned: the job was restored from an older step."""
    return facts(step, owed, on_line=False)


@pytest.mark.parametrize(
    ("saves", "pick"),
    [
        ([], None),
        ([facts(1)], None),
        ([facts(1, "disk")], Pick("s1")),
        ([facts(1, "other")], None),
        ([facts(1, "disk", staged=False)], None),
        ([facts(1, "disk"), facts(2, "disk")], Pick("s2", ("s1",))),
        ([facts(2, "disk"), facts(1, "disk"), facts(3)], Pick("s2", ("s1",))),
        # What is being written is never superseded midway.
        ([facts(1, "disk", "disk"), facts(2, "disk")], None),
        ([facts(1, "disk", "other"), facts(2, "disk")], Pick("s2", ("s1",))),
        # A newer incarnation is newer, whatever its step: a roll-back.
        ([facts(1000, "disk"), facts(510, "disk", incarnation=2)], Pick("s510", ("s1000",))),
        ([facts(1, "disk"), off(2, "disk")], Pick("s1", ("s2",))),
    ],
)
def test_a_tier_takes_the_newest_save_that_it_is_owed(
    saves: list[SaveFacts], pick: Pick | None
) -> None:
    assert queue.pick_flush("disk", saves) == pick


@pytest.mark.parametrize(
    ("saves", "recycled"),
    [
        ([], None),
        ([facts(1)], None),  # the newest stays
        ([facts(1), facts(2)], "s1"),
        ([facts(2), facts(1), facts(3)], "s1"),  # the oldest first
        ([facts(1), facts(2, staged=False)], None),  # a save under way replaces nothing
        ([facts(1, readers=1), facts(2)], None),
        ([facts(1, readers=1), facts(2), facts(3)], "s2"),
        ([facts(1, "disk", "disk"), facts(2, "disk")], None),  # being written
        ([facts(1, "disk"), facts(2)], None),  # owed, and nothing newer is owed there
        ([facts(1, "disk"), facts(2, "disk")], "s1"),  # superseded
        ([facts(1, "disk store"), facts(2, "disk")], None),
        ([facts(1, incarnation=2), facts(900, incarnation=1)], "s900"),
        # What was restored from is newer than what that abandoned.
        ([facts(5), off(6), off(7)], "s6"),
        ([facts(5), off(6)], "s6"),
        ([facts(5), off(6, "disk")], None),
        ([off(6), off(7)], "s6"),
    ],
)
def test_a_slot_is_recycled_only_when_nothing_needs_it(
    saves: list[SaveFacts], recycled: str | None
) -> None:
    assert queue.pick_recycle(saves) == recycled


def test_a_leased_save_is_passed_over() -> None:
    assert queue.pick_recycle([facts(1), facts(2), facts(3)], frozenset({"s1"})) == "s2"


@pytest.mark.parametrize(
    ("error", "owed"),
    [
        (errors.TierUnavailable("x"), True),
        (errors.ShortRead("x"), True),
        (errors.TierFull("x"), False),
        (errors.TierReadOnly("x"), False),
        (errors.AccessDenied("x"), False),
        (errors.Damaged("x"), False),
        (errors.ObjectNotFound("x"), False),
    ],
)
def test_what_is_retried_and_what_is_reported(error: Exception, owed: bool) -> None:
    assert queue.is_owed(error) is owed


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [queue.backoff_s(attempt, 0.5) for attempt in range(1, 40)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.5
    assert queue.backoff_s(1000, 1.0) == 90.0
    assert queue.backoff_s(1, 0.0) < queue.backoff_s(1, 1.0)


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "MTCKPT_SCRUB_S": "7.5",
        "MTCKPT_AGENT_IDLE_S": "soon",
        "MTCKPT_OWED_S": "-1",
    }.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("MTCKPT_CALL_TIMEOUT_S", raising=False)
    limits = Limits.from_environment()
    assert (limits.scrub_s, limits.owed_s) == (7.5, Limits().owed_s)
    assert limits.idle_s == Limits().idle_s
    assert limits.deadline_s(8 * 2**20) == limits.call_timeout_s + 1


@pytest.mark.parametrize(("cap", "rate"), [(0, 2**20), (2**30, 2**20), (2**20, 2**18)])
def test_a_cap_is_given_the_time_that_it_takes(cap: float, rate: float) -> None:
    limits = Limits(store_bytes_per_s=cap)
    assert limits.deadline_s(2**30, store=True) == 2 * limits.call_timeout_s + 2**30 / rate


OWNER = Owner("h1", 0, 100, 5, 42, "host")
OTHER = Claim("h2", 200, 9)


def process(state: str = "S", parent_pid: int = 42, *, exiting: bool = False) -> Process:
    return Process(100, state, parent_pid, 5, exiting)


@pytest.mark.parametrize(
    ("found", "claim", "waited_s", "verdict"),
    [
        (process(), Claim("h1", 100, 5), 0.0, Verdict.REOPEN),
        (process(), Claim("h2", 100, 5), 0.0, Verdict.FENCE),  # a notebook cell run again
        (process(), Claim("h1", 100, 6), 9.0, Verdict.REFUSE),  # the pid alone proves nothing
        (process(), OTHER, 0.0, Verdict.WAIT),
        (process(), OTHER, 4.9, Verdict.WAIT),
        (process(), OTHER, 5.0, Verdict.REFUSE),
        (process(parent_pid=1), OTHER, 0.0, Verdict.WAIT),  # its launcher was killed
        (process(parent_pid=1), OTHER, 1.0, Verdict.FENCE),
        (process("T"), OTHER, 1.0, Verdict.FENCE),
        (process("Z"), OTHER, 1.0, Verdict.FENCE),
        (process(exiting=True), OTHER, 1.0, Verdict.WAIT),  # a big process takes its time
        (process(parent_pid=1, exiting=True), OTHER, 2.0, Verdict.WAIT),
        (process(exiting=True), OTHER, 5.0, Verdict.FENCE),
        (None, OTHER, 5.0, Verdict.REFUSE),  # of another pid namespace: only its pidfd tells
    ],
)
def test_who_may_take_a_run(
    found: Process | None, claim: Claim, waited_s: float, verdict: Verdict
) -> None:
    assert judge(OWNER, found, claim, waited_s) is verdict


@pytest.mark.parametrize(
    ("pidfd", "listening", "listened", "silent_for_s", "dead"),
    [
        (3, 0, True, 1e9, False),  # a pidfd tells
        (-1, 1, True, 1e9, False),  # it is listening right now
        (-1, 0, True, 9.0, False),
        (-1, 0, True, 11.0, True),
        (-1, 0, False, 11.0, False),  # it has not begun to listen
        (-1, 0, False, 601.0, True),
    ],
)
def test_silence_counts_only_without_a_pidfd(
    pidfd: int, listening: int, listened: bool, silent_for_s: float, dead: bool
) -> None:
    owner = Owner("h", 0, 1, 1, 1, "host", pidfd=pidfd, listening=listening, listened=listened)
    assert owner.is_silent(owner.heard_s + silent_for_s) is dead
