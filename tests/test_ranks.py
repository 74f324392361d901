"""Jobs of several ranks on one node: threads, a real agent, real slots and files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import until
from boxed import Boxed, boxed_arrays

import mtckpt
from mtckpt import _coordination, _run
from mtckpt._boxes import Box, whole
from mtckpt.agent import protocol
from mtckpt.errors import (
    CheckpointError,
    RankTimeout,
    SaveFailed,
    StateMismatch,
    StepDisagreement,
    UsageError,
)
from mtckpt.testing.groups import local_groups

pytestmark = pytest.mark.timeout(90)
SHAPE = (600, 700)
ARRAY = np.random.default_rng(3).standard_normal(SHAPE)


@pytest.fixture(autouse=True)
def _boxed(runtime_dir: Path) -> Iterator[None]:
    with boxed_arrays():
        yield


class Job:
    """Runs a function on every rank at once; each has a Checkpointer of its own."""

    def __init__(self, path: Path, world_size: int, **settings: Any) -> None:
        self.path, self.world_size = path, world_size
        tiers = settings.pop("tiers", [mtckpt.Ram(every=1), mtckpt.Disk(path / "disk")])
        options = {"timeout_s": 20.0, "max_stall_s": 10.0, **settings}
        self.ranks = [
            mtckpt.Checkpointer("run", tiers, group=group, **options)
            for group in local_groups(world_size)
        ]

    def __call__(self, work: Callable[[int, mtckpt.Checkpointer], Any]) -> list[Any]:
        """What each rank returned, or the error that it raised."""
        with ThreadPoolExecutor(self.world_size) as pool:
            futures = [pool.submit(work, rank, each) for rank, each in enumerate(self.ranks)]
        return [future.exception() or future.result() for future in futures]

    def close(self) -> None:
        for found in self(lambda _, checkpointer: checkpointer.close(timeout_s=30)):
            assert found is None, found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(world_size: int, **settings: Any) -> Job:
        made.append(Job(tmp_path, world_size, **settings))
        return made[-1]

    yield make
    for each in made:

        def leave(_: int, checkpointer: mtckpt.Checkpointer) -> None:
            try:
                checkpointer.close(timeout_s=1)
            except CheckpointError:
                pass  # what the test was about

        each(leave)


def rows(rank: int, world_size: int) -> Box:
    first, stop = (SHAPE[0] * r // world_size for r in (rank, rank + 1))
    return Box((first, 0), (stop - first, SHAPE[1]))


def columns(rank: int, world_size: int) -> Box:
    first, stop = (SHAPE[1] * r // world_size for r in (rank, rank + 1))
    return Box((0, first), (SHAPE[0], stop - first))


def state(
    rank: int, world_size: int, *, filled: bool, cut: Any = rows, padded: bool = False
) -> dict[str, Any]:
    """A sharded array, a replicated one, one of the rank's own, and a plain value.

    ``padded``: no rank can use a slot of another, since each shard has a size of its own.
    """
    everybody = tuple(range(world_size))
    box, source = cut(rank, world_size), ARRAY if filled else None
    return {
        "sharded": Boxed(SHAPE, float, [box], of=source, sharers=everybody),
        "replicated": mtckpt.replicated(ARRAY * 2 if filled else np.zeros(SHAPE)),
        "own": np.full(50, rank + 1.0 if filled else 0.0),
        "rank": rank if filled else -1,
        **({"pad": np.zeros(5000 * rank)} if padded else {}),
    }


def check(found: dict[str, Any], own: int) -> None:
    assert found["sharded"].equals(ARRAY)
    assert np.array_equal(found["replicated"].value, ARRAY * 2)
    assert np.array_equal(found["own"], np.full(50, own + 1.0))
    assert found["rank"] == own


def save(job: Job, step: int, **options: Any) -> list[Any]:
    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save:
        return checkpointer.save(step, state(rank, job.world_size, filled=True, **options))

    return job(work)


def restore(job: Job, **options: Any) -> list[Any]:
    """Restore on every rank and check what came."""

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Restored:
        live = state(rank, job.world_size, filled=False, **options)
        restored = checkpointer.restore(live)
        if restored:
            check(live, rank)
        return restored

    return job(work)


def test_three_ranks_save_and_restore(job: Callable[..., Job]) -> None:
    first = job(3)
    assert not any(restore(first))
    for step in (1, 2, 3):
        saves = save(first, step)
        assert {each.id for each in saves} == {saves[0].id}
        for each in saves:
            each.wait("local", timeout_s=30)
    again = job(3)
    for restored in restore(again):
        assert restored.step == 3
        assert restored.sources.keys() == {"ram"}
    for each in save(again, 4):
        each.wait("staged", timeout_s=30)
    again.close()


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 3)])
def test_another_number_of_ranks(job: Callable[..., Job], before: int, after: int) -> None:
    first = job(before)
    for each in save(first, 1):
        each.wait("local", timeout_s=30)
    first.close()
    later = job(after)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> None:
        live = state(rank, after, filled=False, cut=columns)
        assert checkpointer.restore(live).step == 1
        check(live, rank % before)

    assert later(work) == [None] * after


def test_ranks_wait_for_one_another_as_long_as_a_store_may_take(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = [mtckpt.Ram(every=1), mtckpt.ObjectStore(f"file://{tmp_path}/store")]
    first = job(2, tiers=tiers)
    for each in save(first, 1):
        each.wait("durable", timeout_s=30)
    first.close()  # frees the memory
    waits: dict[str, float] = {}
    together = _coordination.together

    def noted(group: Any, stage: str, timeout_s: float, foreign: Any) -> Any:
        waits[stage] = timeout_s
        return together(group, stage, timeout_s, foreign)

    monkeypatch.setattr(_coordination, "together", noted)
    monkeypatch.setattr(_run.Run, "fetch", lambda *_: None)
    for restored in restore(job(2, tiers=tiers)):
        assert restored.sources.keys() == {"store"}
    assert waits["fetch"] - waits["look"] > 2 * ARRAY.nbytes / 1e6


def test_each_replicated_byte_is_captured_once(job: Callable[..., Job], tmp_path: Path) -> None:
    first = job(3)
    for each in save(first, 1):
        each.wait("local", timeout_s=30)
    first.close()
    (directory,) = (tmp_path / "disk" / "run").glob("step-*")
    sizes = [path.stat().st_size for path in sorted(directory.glob("*.safetensors"))]
    assert len(sizes) == 3
    # Two arrays over three ranks, and what alignment and small arrays cost.
    assert all(abs(size - 2 * ARRAY.nbytes / 3) < 20_000 for size in sizes)
    with mtckpt.load(tmp_path / "disk") as checkpoint:
        assert np.array_equal(checkpoint["sharded"], ARRAY)
        assert np.array_equal(checkpoint["replicated"], ARRAY * 2)
        assert checkpoint.read("own", rank=2).tolist() == [3.0] * 50


def test_a_callable_is_asked_once_a_save(job: Callable[..., Job]) -> None:
    """Also where the ranks agree on who stores what, and the plan is made anew."""
    ranks, asked = job(2), [0, 0]

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save:
        def made() -> dict[str, Any]:
            asked[rank] += 1
            return state(rank, 2, filled=True)

        run, begin = checkpointer._link, checkpointer._link.begin

        def agreed() -> None:
            begin()
            run.members = dataclasses.replace(run.members)

        run.begin = agreed  # type: ignore[method-assign]  # as it is where memory is short
        return checkpointer.save(1, made)

    for each in ranks(work):
        each.wait("staged", timeout_s=20)
    assert asked == [1, 1]


def test_a_rank_that_cannot_capture_calls_the_save_off_on_all(job: Callable[..., Job]) -> None:
    three = job(3)
    for each in save(three, 1):
        each.wait("staged", timeout_s=30)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save:
        bad = {"more": object()} if rank == 1 else {}
        return checkpointer.save(2, {**state(rank, 3, filled=True), **bad})

    found = three(work)
    assert isinstance(found[1], CheckpointError)
    for each in (found[0], found[2]):
        with pytest.raises(SaveFailed, match="rank 1: the state could not be read"):
            each.wait("staged", timeout_s=30)
        assert "rank 1" in each.skipped
    for step in (3, 4, 5, 6):  # no slot was lost
        for each in save(three, step):
            each.wait("staged", timeout_s=30)
    assert [restored.step for restored in restore(three)] == [6, 6, 6]


def test_different_steps_are_a_disagreement(job: Callable[..., Job]) -> None:
    two = job(2)
    for each in save(two, 1):
        each.wait("staged", timeout_s=30)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save:
        return checkpointer.save(2 + rank, state(rank, 2, filled=True))

    for each in two(work):
        with pytest.raises(SaveFailed) as raised:
            each.wait("staged", timeout_s=30)
        assert isinstance(raised.value.__cause__, StepDisagreement)
    for found in save(two, 4):
        assert isinstance(found, SaveFailed)
        assert isinstance(found.__cause__, StepDisagreement)
    for each in save(two, 5):
        each.wait("staged", timeout_s=30)


def test_different_arrays_are_a_disagreement(job: Callable[..., Job]) -> None:
    two = job(2)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save:
        return checkpointer.save(1, {"w": mtckpt.replicated(np.zeros(5 + rank))})

    for each in two(work):
        with pytest.raises(SaveFailed, match="different global arrays"):
            each.wait("staged", timeout_s=30)
    assert not any(restore(two))


def test_a_rank_that_never_comes_is_named(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_RANK_S", "0.5")
    three = job(3)
    for each in save(three, 1):
        each.wait("staged", timeout_s=30)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> mtckpt.Save | None:
        return checkpointer.save(2, state(rank, 3, filled=True)) if rank != 2 else None

    for each in three(work)[:2]:
        with pytest.raises(SaveFailed, match=r"ranks \[2\] did not capture") as raised:
            each.wait("staged", timeout_s=30)
        assert isinstance(raised.value.__cause__, RankTimeout)
        assert raised.value.__cause__.details["rank"] == 2
    # Two ranks raise it instead of saving: then the third does not save alone.
    found = save(three, 3)
    assert [type(each) for each in found] == [SaveFailed, SaveFailed, mtckpt.Save]
    with pytest.raises(SaveFailed, match="an earlier save had failed"):
        found[2].wait("staged", timeout_s=30)
    for each in save(three, 4):
        each.wait("staged", timeout_s=30)


def test_a_restore_without_a_rank_ends_in_time(job: Callable[..., Job]) -> None:
    two = job(2, timeout_s=1.0)
    session = two.ranks[0]._session
    session.timeout_s = 20.0  # what is short is the patience with other ranks, not with the agent
    session.open()
    with pytest.raises(RankTimeout, match=r"\[1\] did not come") as raised:
        two.ranks[0].restore({"w": np.zeros(3)})
    assert raised.value.details["stage"] == "join"


def test_a_template_that_differs_on_one_rank_stops_all(job: Callable[..., Job]) -> None:
    two = job(2)
    for each in save(two, 1):
        each.wait("staged", timeout_s=30)
    lives = [state(rank, 2, filled=False) for rank in range(2)]
    lives[1]["own"] = np.zeros(49)
    found = two(lambda rank, checkpointer: checkpointer.restore(lives[rank]))
    assert all(isinstance(each, StateMismatch) for each in found)
    assert "rank 1" in str(found[0])
    assert all(live["sharded"].equals(np.zeros(SHAPE)) for live in lives)


def test_ranks_close_in_any_order_and_the_newest_step_arrives(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    two = job(2, tiers=[mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=100)])
    for each in save(two, 1):
        each.wait("staged", timeout_s=30)
    turn = threading.Event()

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> None:
        if rank == 1:
            turn.wait(20)
        checkpointer.save(2, state(rank, 2, filled=True))
        if rank == 0:
            threading.Timer(0.3, turn.set).start()
        checkpointer.close(timeout_s=30)

    assert two(work) == [None, None]
    assert [step.step for step in mtckpt.steps(tmp_path / "disk")] == [2]


def test_a_global_array_without_dimensions(job: Callable[..., Job]) -> None:
    two = job(2)
    for each in two(lambda _, c: c.save(1, {"t": mtckpt.replicated(np.array(7.0))})):
        each.wait("staged", timeout_s=30)

    def work(_: int, checkpointer: mtckpt.Checkpointer) -> float:
        live = {"t": Boxed((), float, [whole(())])}
        checkpointer.restore(live)
        return float(live["t"].arrays[0])

    assert two(work) == [7.0, 7.0]


def test_an_agent_that_dies_takes_nothing_along(job: Callable[..., Job], runtime_dir: Path) -> None:
    three = job(3)
    for each in save(three, 1):
        each.wait("staged", timeout_s=30)
    for step in (2, 3):
        os.kill(int((runtime_dir / "agent.pid").read_text()), signal.SIGKILL)
        for each in save(three, step):
            each.wait("local", timeout_s=30)
    assert [restored.step for restored in restore(three)] == [3, 3, 3]


def test_what_no_rank_finished_holds_no_slot(job: Callable[..., Job], runtime_dir: Path) -> None:
    """All are killed while one has not captured its part: the next start has its slots."""
    settings = {"tiers": [mtckpt.Ram(every=1, slots=2)]}
    two = job(2, **settings)
    for each in save(two, 1):
        each.wait("staged", timeout_s=30)
    two.ranks[0].save(2, state(0, 2, filled=True)).wait("captured", timeout_s=30)
    two.ranks[0]._session.wait_idle(20)
    os.kill(int((runtime_dir / "agent.pid").read_text()), signal.SIGKILL)
    again = job(2, **settings)
    assert [restored.step for restored in restore(again)] == [1, 1]
    for step in (2, 3, 4):
        for each in save(again, step):
            each.wait("staged", timeout_s=30)


def test_a_first_save_that_was_never_whole_is_no_step(job: Callable[..., Job]) -> None:
    two = job(2)
    two(lambda _, checkpointer: checkpointer.restore({"n": 0}))
    groups = [checkpointer._link for checkpointer in two.ranks]
    two(lambda rank, _: groups[rank].begin())
    two.ranks[0].save(1, {"n": 1})
    two.ranks[0]._session.wait_idle(20)
    assert not any(restore(job(2)))


def test_ranks_that_are_left_over_do_not_hold_the_others_up(job: Callable[..., Job]) -> None:
    four = job(4)
    for each in save(four, 1):
        each.wait("local", timeout_s=30)
    two = job(2)

    def work(rank: int, checkpointer: mtckpt.Checkpointer) -> int | None:
        live = state(rank, 2, filled=False)
        restored = checkpointer.restore(live)
        check(live, rank)
        return restored.step

    assert two(work) == [1, 1]
    for step in range(2, 7):
        for each in save(two, step):
            each.wait("local", timeout_s=30)
    assert len(slots_of(two)) <= 2 * 3 + 2  # of the old job nothing is left


def test_ranks_of_one_agent_have_their_memory_in_one_place(ram_dir: Path) -> None:
    """They look like ranks of two nodes, and are not: better no save than half of one."""

    def work(rank: int) -> Exception | None:
        group = groups[rank]
        tiers = [mtckpt.Ram(ram_dir / f"node-{rank}", every=1)]
        checkpointer = mtckpt.Checkpointer("run", tiers, group=group, timeout_s=20)
        try:
            checkpointer.save(1, {"w": np.zeros(3)})
        except CheckpointError as error:
            return error
        finally:
            checkpointer.close(timeout_s=20)  # the other one's end may be the run's, too
        return None

    groups = local_groups(2)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, range(2)):
            assert isinstance(found, UsageError)
            assert "in different directories" in str(found)


def slots_of(job: Job) -> list[protocol.SlotStatus]:
    (run,) = job.ranks[0]._session.status().runs
    return run.slots


def settled(saves: list[mtckpt.Save]) -> list[str]:
    """Why each of them was called off, once that or the opposite is known; empty where staged."""
    for each in saves:
        try:
            each.wait("staged", timeout_s=30)
        except SaveFailed:
            assert each.skipped  # called off, and no error
    return [each.skipped or "" for each in saves]


def test_a_rank_without_a_slot_holds_no_slot_of_another(
    job: Callable[..., Job], ram_dir: Path
) -> None:
    """Somebody reads all that rank 1 has in memory: its slots are not given out again."""
    three = job(3, tiers=[mtckpt.Ram(every=1, slots=2)], max_stall_s=0.5)
    staged = 0
    for step in range(1, 100):  # on a busy machine the first may take longer than that
        staged += not any(settled(save(three, step, padded=True)))
        if staged == 3:
            break
    with contextlib.ExitStack() as held:
        for path in ram_dir.rglob("rank-00001.safetensors"):
            fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_SH)
        settled(save(three, 1999, padded=True))  # it had a slot for the next save already
        for step in range(2000, 2006):
            reasons = settled(save(three, step, padded=True))
            assert all(reasons), reasons
            assert "no slot is free" in reasons[1]
        until(lambda: "sealed" not in [slot.state for slot in slots_of(three)])
    # Saves resume together: at one step, on all ranks.
    for step in range(3000, 3100):
        reasons = settled(save(three, step, padded=True))
        assert all(reasons) or not any(reasons)
        if not any(reasons):
            break
    assert [restored.step for restored in restore(three, padded=True)] == [step] * 3
