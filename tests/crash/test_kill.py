"""SIGKILL at drawn times: what was acknowledged comes back, whole, and nothing is left behind."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from crash_phases import PHASES, descriptors, send
from crash_story import FAULTS, PARTIES, Story, shortfall, wait_for
from crash_worker import Life, Nursery, read_log

# 300 kills of trainers that need no framework in `make test`, 20 and more in each phase; 10,000 in
# `make torture`. Some of the 300 are while one agent, or one trainer, lives through them all.
NUM_KILLS_BESIDE_ONE_AGENT, NUM_KILLS_BESIDE_ONE_TRAINER = 40, 16
PARTS, MIN_HITS = 3, 7
NUM_KILLS = -(-(300 - NUM_KILLS_BESIDE_ONE_AGENT - NUM_KILLS_BESIDE_ONE_TRAINER) // PARTS)
TORTURE_PARTS, NUM_TORTURE_KILLS, MIN_TORTURE_HITS = 4, 2_500, 60
NUM_TORCH_KILLS = 20
NUM_JAX_KILLS, NUM_TORTURE_JAX_KILLS = 10, 1_000
WEIGHTS = {"trainer": 8, "group": 8, "agent": 1, "both": 1}


@pytest.fixture
def nursery(
    request: pytest.FixtureRequest, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nursery]:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.5")
    nursery = Nursery(getattr(request, "param", "numpy"))
    yield nursery
    nursery.close()


@pytest.fixture
def story(
    seed: int, tmp_path: Path, ram_dir: Path, runtime_dir: Path, nursery: Nursery
) -> Iterator[Story]:
    story = Story(tmp_path, ram_dir, runtime_dir, random.Random(seed), nursery)
    yield story
    print(story.tell())


def choose(story: Story, left: int, min_hits: int) -> tuple[str, str]:
    """The next fault, and the phase that it is aimed at while one lacks hits."""
    lacking = [phase for phase in PHASES if story.hits[phase] < min_hits]
    # Every third, or as many as are needed to the end.
    needed = sum(min_hits - story.hits[phase] for phase in lacking)
    if not lacking or (needed < left and story.rng.random() > 1 / 3):
        fault = story.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        return fault, ""
    aim = story.rng.choice(lacking)
    faults = [fault for fault, who in FAULTS.items() if who & PARTIES[aim]]
    return story.rng.choice(faults), aim


def play(story: Story, num_kills: int, min_hits: int, *, wipes: bool = True) -> None:
    """Kill, check what comes back, and look at what is left in the end."""
    before_all = descriptors(story.nursery.pid)
    story.measure()
    before = story.level()
    story.close()
    while (left := num_kills - story.kills) > 0:
        fault, aim = choose(story, left, min_hits)
        if not story.pid:
            story.begin(every=story.rng.choice((1, 1, 2)))
        early = not aim and fault in ("trainer", "group") and story.rng.random() < 0.15
        story.strike(fault, aim, early=early)
        if wipes and fault == "both" and story.rng.random() < 0.1:
            story.wipe(story.rng.choice(("ram", "disk")))
    story.finish()
    after = story.level()
    assert shortfall(after, before) == []
    story.close()
    assert descriptors(story.nursery.pid) == before_all
    print(story.table())
    assert min(story.hits[phase] for phase in PHASES) >= min_hits, story.table()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_drawn_times(story: Story, part: int) -> None:
    play(story, NUM_KILLS, MIN_HITS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("nursery", ["torch"], indirect=True)
def test_a_model_and_its_optimizer_are_killed_at_drawn_times(story: Story) -> None:
    play(story, NUM_TORCH_KILLS, 2, wipes=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("nursery", ["jax"], indirect=True)
def test_arrays_that_never_change_are_killed_at_drawn_times(story: Story) -> None:
    pytest.importorskip("jax")
    play(story, NUM_JAX_KILLS, 1, wipes=False)


def grown(log: Path, num_lines: int) -> bool:
    return len(read_log(log)) > num_lines


@pytest.mark.timeout(300)
@pytest.mark.parametrize("nursery", ["jax"], indirect=True)
def test_another_restores_while_trainers_and_agents_are_killed(story: Story) -> None:
    """Whatever it catches on disk is one step, every byte of it, or an error of ours."""
    pytest.importorskip("jax")
    story.measure()
    log = story.run_dir / "reader.log"
    reader = Life(
        "reader",
        str(story.run_dir / "own"),
        str(log),
        0,
        source=str(story.disk / story.look.run_key),
    )
    pid = story.nursery.start(reader)
    for fault in ("trainer", "both", "group", "agent", "trainer", "both"):
        if not story.pid:
            story.begin()
        story.strike(fault)
        wait_for(partial(grown, log, len(read_log(log))), f"it goes on: {log.read_text()[-1500:]}")
    story.finish()
    send([pid], signal.SIGKILL)
    assert story.nursery.wait(pid) == -signal.SIGKILL
    lines = read_log(log)
    reads = [words for words in lines if words[0] == "read"]
    print(Counter(words[0] for words in lines), {w[1] for w in lines if w[0] == "failed"})
    assert {words[2] for words in reads} == {"ok"}
    assert len({words[1] for words in reads}) >= 3
    assert not [words for words in lines if words[0] == "error"]


@pytest.mark.timeout(300)
def test_trainers_are_killed_while_one_agent_lives(story: Story) -> None:
    """What a dead trainer had captured the agent seals; it gives the slots out, and keeps no
    descriptor of the dead."""
    story.measure()
    before = story.level()
    story.kill_held()
    for _ in range(NUM_KILLS_BESIDE_ONE_AGENT):
        story.begin()
        story.strike(story.rng.choice(("trainer", "group")), early=story.rng.random() < 0.15)
    after = story.level()
    assert shortfall(after, before) == []
    story.close()
    assert story.kills == NUM_KILLS_BESIDE_ONE_AGENT
    assert story.counts["resumed"] >= 30


@pytest.mark.timeout(300)
def test_agents_are_killed_while_one_trainer_lives(story: Story) -> None:
    """Every save is acknowledged, none fails, and the trainer keeps no descriptor of the dead."""
    story.measure()
    story.begin()
    story.strike("agent")
    before = descriptors(story.pid)
    for _ in range(NUM_KILLS_BESIDE_ONE_TRAINER - 1):
        story.strike("agent")
    after = descriptors(story.pid)
    assert {k: n for k, n in after.items() if k != "socket"} == {
        k: n for k, n in before.items() if k != "socket"
    }
    assert after["socket"] <= max(before["socket"], 5)
    story.finish()
    assert story.kills == NUM_KILLS_BESIDE_ONE_TRAINER


@pytest.mark.torture
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("part", range(TORTURE_PARTS))
def test_killed_ten_thousand_times(story: Story, part: int) -> None:
    play(story, NUM_TORTURE_KILLS, MIN_TORTURE_HITS)


@pytest.mark.torture
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("nursery", ["jax"], indirect=True)
def test_arrays_that_never_change_are_killed_a_thousand_times(story: Story) -> None:
    pytest.importorskip("jax")
    play(story, NUM_TORTURE_JAX_KILLS, MIN_TORTURE_HITS // 3)
