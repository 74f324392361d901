"""What ranks exchange: bounded even where the store's host stops, and never with another stage."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import until
from stores import free_ports

import mtckpt
from mtckpt import _coordination
from mtckpt._coordination import Group, StoreGroup
from mtckpt._copies import Shards
from mtckpt._manifest import Record
from mtckpt.agent.spawn import ensure_agent
from mtckpt.errors import NoHealthyStep, RankTimeout, StepDisagreement, UsageError
from mtckpt.testing.groups import LocalGroup, local_groups

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("runtime_dir")]

# A process of torch.distributed; rank 0 hosts the store. Each waits for a word before it goes on.
TORCH_RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
from mtckpt import _coordination
from mtckpt._copies import Shards
from mtckpt._manifest import Record
from mtckpt.adapters.torch.group import find_group
from mtckpt.errors import RankTimeout
rank, port = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=600))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
"""

JAX_RANK = """
import sys
import jax
from mtckpt import _coordination
from mtckpt._copies import Shards
from mtckpt._manifest import Record
from mtckpt.adapters.jax.group import find_group
from mtckpt.errors import RankTimeout
rank, port = map(int, sys.argv[1:])
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
"""

EXCHANGES = """
group = find_group("run")
print(_coordination.exchange(group, "first", [rank, _coordination.host_of(group)], 60), flush=True)
sys.stdin.readline()
try:
    _coordination.exchange(group, "second", rank, 2)
except RankTimeout as error:
    print(error, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start() -> Iterator[Callable[[str, int, int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def one(script: str, rank: int, port: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script + EXCHANGES, str(rank), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()  # also one that is stopped
        process.communicate()


@pytest.mark.parametrize("script", [TORCH_RANK, JAX_RANK], ids=["torch", "jax"])
def test_a_stopped_host_of_the_store_ends_the_exchange_in_time(
    script: str, start: Callable[[str, int, int], subprocess.Popen[str]]
) -> None:
    pytest.importorskip("torch" if script is TORCH_RANK else "jax")
    port = free_ports(1)
    ranks = [start(script, rank, port) for rank in (0, 1)]
    for process in ranks:
        assert process.stdout is not None
        # Each knows where they meet: that is the way on which agents look for each other, too.
        assert process.stdout.readline() == "[[0, '127.0.0.1'], [1, '127.0.0.1']]\n"
    os.kill(ranks[0].pid, signal.SIGSTOP)
    stdin, stdout = ranks[1].stdin, ranks[1].stdout
    assert stdin is not None
    assert stdout is not None
    stdin.write("go on\n")
    stdin.flush()
    said = stdout.readline()  # for ever without a bound: the store itself waits 10 minutes
    where = f"the host at 127.0.0.1:{port} of the store that joins the ranks"
    assert said.startswith(f"second: {where} did not answer within 2.0 s")
    stdin.write("end\n")
    stdin.flush()
    if script is TORCH_RANK:  # JAX itself waits for its coordinator before it ends
        assert ranks[1].wait(30) == 0  # a call that was left behind does not hold the process up


class _Table:
    """A store that outlives the ranks: torchrun has one for all starts of its workers."""

    place = ""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def have(self, directory: str, names: Sequence[str]) -> bool:
        return all(f"{directory}/{name}" in self.values for name in names)

    def read(self, directory: str, names: Sequence[str]) -> dict[str, bytes]:
        found = {name: self.values.get(f"{directory}/{name}") for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def groups(self, world_size: int) -> list[StoreGroup]:
        """Of ranks that are started now."""
        return [StoreGroup(self, rank, world_size, "run") for rank in range(world_size)]


def _told(pool: ThreadPoolExecutor, groups: Sequence[Group], stage: str, value: str) -> list[Any]:
    """What each rank hears of the others."""
    calls = [pool.submit(_coordination.exchange, g, stage, [value, g.rank], 20.0) for g in groups]
    return [call.result(30) for call in calls]


def test_nobody_takes_what_an_earlier_start_has_left_in_the_store() -> None:
    """What other ranks have, where they are, what they restore: all of it was of another start."""
    table = _Table()
    with ThreadPoolExecutor(3) as pool:
        groups = table.groups(3)
        for stage in ("join", "look", "begin"):
            assert _told(pool, groups, stage, "first") == [[["first", r] for r in range(3)]] * 3
        # Of the second only rank 2 has come.
        with pytest.raises(RankTimeout, match="rank 0 of 3 did not come"):
            table.groups(3)[2].exchange("join", b"second", 0.0)
        assert any("/asks/2" in key for key in table.values)
        groups = table.groups(3)
        early = [pool.submit(_coordination.exchange, g, "join", g.rank, 20.0) for g in groups[:2]]
        until(lambda: any("/answers/" in key for key in table.values))  # rank 2 of the second
        late = pool.submit(_coordination.exchange, groups[2], "join", "late", 20.0)
        assert [call.result(30) for call in (*early, late)] == [[0, 1, "late"]] * 3
        for stage in ("look", "begin", "look"):
            assert _told(pool, groups, stage, "third") == [[["third", r] for r in range(3)]] * 3
    assert len(table.values) < 20  # each start leaves little behind


def test_ranks_that_did_not_find_each_other_may_try_again() -> None:
    table = _Table()
    groups = table.groups(3)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(_coordination.exchange, g, "join", 0, 0.0) for g in groups[:2]]
        for call in calls:
            with pytest.raises(RankTimeout, match="rank 2 of 3 did not come"):
                call.result(30)
        for stage in ("join", "look"):
            assert _told(pool, groups, stage, "x") == [[["x", r] for r in range(3)]] * 3


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_leaves_before_it_has_met_the_others_is_heard(leaver: int) -> None:
    groups = _Table().groups(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_coordination.exchange, groups[1 - leaver], "join", 0, 20.0)
        _coordination.leave(groups[leaver], ValueError("no agent"))
        with pytest.raises(RankTimeout, match=f"rank {leaver} does not come: ValueError: no agent"):
            other.result(30)


def test_two_stages_are_not_taken_for_one() -> None:
    groups = local_groups(3)
    stages = ["look", "begin", "look"]
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(_coordination.exchange, group, stage, 0, 20)
            for group, stage in zip(groups, stages, strict=True)
        ]
    found = [(1, "begin"), (0, "look"), (1, "begin")]
    for call, stage, (rank, at) in zip(calls, stages, found, strict=True):
        with pytest.raises(StepDisagreement, match=f"rank {rank} is at '{at}'") as raised:
            call.result()
        assert raised.value.details["rank"] == rank
        assert raised.value.details["stage"] == stage
        assert raised.value.state
        assert "restore and save on every rank" in str(raised.value.actions)
    with ThreadPoolExecutor(3) as pool:  # and they can go on together
        told = pool.map(lambda group: _coordination.exchange(group, "look", group.rank, 20), groups)
    assert list(told) == [[0, 1, 2]] * 3


def test_a_rank_that_saves_while_another_restores_is_named() -> None:
    ensure_agent(20.0)
    one, other = (
        mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)], group=group, timeout_s=20.0)
        for group in local_groups(2)
    )
    with one, other, ThreadPoolExecutor(2) as pool:
        restored = pool.submit(one.restore, {"w": np.zeros(3)})
        saved = pool.submit(lambda: other.save(1, {"w": np.zeros(3)}).wait("staged"))
        with pytest.raises(StepDisagreement, match="rank 1 is at 'begin'"):
            restored.result()
        with pytest.raises(mtckpt.errors.CheckpointError) as raised:
            saved.result()
    causes = [raised.value, raised.value.__cause__]
    assert any(isinstance(cause, StepDisagreement) for cause in causes)


def test_ranks_with_other_tiers_are_told_so(tmp_path: Path) -> None:
    """One of them would take the tier away from all ranks of its node, without a word."""
    disks: list[list[mtckpt.Disk]] = [[mtckpt.Disk(tmp_path)], []]
    one, other = (
        mtckpt.Checkpointer("run", [mtckpt.Ram(every=1), *disk], group=group, timeout_s=20.0)
        for group, disk in zip(local_groups(2), disks, strict=True)
    )
    with one, other, ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(each.restore, {"w": np.zeros(3)}) for each in (one, other)]:
            with pytest.raises(UsageError, match="rank 0 has the tiers ram, disk, and rank 1 ram"):
                call.result(30)


def test_ranks_that_ask_for_different_steps_restore_none() -> None:
    """Parts of two steps would be a model that never was."""
    one, other = (
        mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)], group=group, timeout_s=20.0)
        for group in local_groups(2)
    )
    with one, other, ThreadPoolExecutor(2) as pool:
        for step in (1, 2):
            saves = [pool.submit(each.save, step, {"w": np.ones(3)}) for each in (one, other)]
            for save in saves:
                save.result(30).wait("staged")
        state = {"w": np.zeros(3)}
        calls = [pool.submit(one.restore, state), pool.submit(other.restore, state, step=1)]
        for call in calls:
            with pytest.raises(StepDisagreement, match="is at 'match step-"):
                call.result(30)
        assert not state["w"].any()


class _Interrupted(LocalGroup):
    """Ctrl-C comes once, while it waits for the others to tell what they have."""

    is_due = True

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        if not self.is_due or stage != "holdings":
            return super().exchange(stage, value, timeout_s)
        self.is_due = False
        with contextlib.suppress(RankTimeout):
            super().exchange(stage, value, 0.0)
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["exchange", "work"])
def test_the_others_hear_at_once_of_a_rank_that_is_interrupted(
    where: str,
) -> None:
    """They would wait for it for a minute, and two where it reads. All can restore again then."""
    board = local_groups(2)
    groups = [board[0], _Interrupted(board[0]._board, 1, 2) if where == "exchange" else board[1]]
    is_due = where == "work"

    def rename(path: str) -> str:
        if is_due:
            raise KeyboardInterrupt
        return path

    one, other = (
        mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)], group=group, timeout_s=60.0)
        for group in groups
    )
    with one, other, ThreadPoolExecutor(2) as pool:
        saves = [pool.submit(each.save, 1, {"w": np.ones(3)}) for each in (one, other)]
        for save in saves:
            save.result().wait("staged")
        first = pool.submit(one.restore, {"w": np.zeros(3)})
        second = pool.submit(other.restore, {"w": np.zeros(3)}, rename=rename)
        with pytest.raises(KeyboardInterrupt):
            second.result()
        with pytest.raises(RankTimeout, match="rank 1 does not come: KeyboardInterrupt") as raised:
            first.result(30)
        assert raised.value.details["ranks"] == [1]
        again = [pool.submit(each.restore, {"w": np.zeros(3)}) for each in (one, other)]
        assert [each.result(30).step for each in again] == [1, 1]


class _Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "told"), [(_Wordless(), "_Wordless"), (ValueError("a\udcffb"), "ValueError: a.?b")]
)
def test_whatever_a_rank_leaves_by_is_told(error: Exception, told: str) -> None:
    groups = local_groups(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_coordination.exchange, groups[0], "begin", None, 20.0)
        _coordination.leave(groups[1], error)
        with pytest.raises(RankTimeout, match=f"rank 1 does not come: {told}"):
            other.result(20.0)


def test_what_is_read_of_records_waits_for_an_agent_that_is_just_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a restore does: an older step would give up the newer ones for good."""
    looks: list[Shards] = []

    def record(shards: Shards, rank: int) -> Record:
        if not looks:
            looks.append(shards)
            shards._attempt.silent["peers-a-ram"] = "does not answer"
            raise NoHealthyStep("no record", state="live state unchanged")
        return sound(shards, rank)

    with mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)]) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": np.ones(3)}).wait("staged")
        sound = Shards.record
        monkeypatch.setattr(Shards, "record", record)
        assert checkpointer._records("latest")[0].step == 2
    assert len(looks) == 1
