"""Trainer and agent end with their cgroup, or run out of its memory: nothing sealed is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import agent_pid, data_processes, kill_agent, status_of, until
from control_groups import ControlGroup, make_group
from scene_trainer import SceneTrainer, TrainerError

import mtckpt
from mtckpt.agent.spawn import ensure_agent

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("runtime_dir"),
]

MIB = 1 << 20
Start = Callable[..., SceneTrainer]


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Start]:
    started: list[SceneTrainer] = []

    def make(*arguments: Any, **options: Any) -> SceneTrainer:
        started.append(SceneTrainer(*arguments, **options))
        return started[-1]

    yield make
    for trainer in started:
        trainer.close()


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    made = make_group()
    yield made
    made.remove()


@pytest.fixture
def memory_group() -> Iterator[ControlGroup]:
    made = make_group(memory=True)
    yield made
    made.remove()


def steps_on(disk: Path, run: str = "r") -> list[int]:
    """Complete steps in a directory, read without an agent."""
    root = disk / run
    found = mtckpt.steps(root) if root.is_dir() else []
    return [step.step for step in found]


def wipe(ram_dir: Path) -> None:
    """What a reboot does to memory."""
    kill_agent()
    for path in ram_dir.iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "who", ["another run", pytest.param("agent run", marks=pytest.mark.torture)]
)
def test_what_a_killed_cgroup_owed_is_flushed_by_the_next_agent(
    who: str, start: Start, group: ControlGroup, tmp_path: Path, ram_dir: Path
) -> None:
    disk = tmp_path / "d"
    first = start("r", disk, num=1, wrap=group.wrap)
    first.do("restore")
    first.save(1, "local")
    pid = agent_pid()
    assert {first.process.pid, pid} <= group.pids()
    os.kill(data_processes()[str(disk)], signal.SIGSTOP)
    first.save(2, "staged")
    assert steps_on(disk) == [1]
    group.kill()
    first.process.wait(10)
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert steps_on(disk) == [1]

    service: subprocess.Popen[bytes] | None = None
    try:
        if who == "agent run":
            service = subprocess.Popen([sys.executable, "-m", "mtckpt.cli", "agent", "run"])
        else:
            assert start("other", tmp_path / "other").do("restore")["step"] is None
        until(lambda: steps_on(disk) == [1, 2], 30.0)  # and no trainer of the run has come back
    finally:
        if service is not None:
            service.terminate()
            assert service.wait(20) == 0
    ensure_agent(20.0)
    wipe(ram_dir)
    second = start("r", disk, num=2)
    restored = second.do("restore")
    assert (restored["step"], restored["num"], restored["bad"]) == (2, 1, ""), restored
    assert restored["sources"] == ["disk"]
    second.save(3, "local")
    second.do("close")


def test_a_trainer_that_runs_out_of_memory_loses_nothing_sealed(
    start: Start, memory_group: ControlGroup, tmp_path: Path
) -> None:
    first = start("r", tmp_path / "d", num=1, wrap=memory_group.wrap)
    first.do("restore")
    agent = agent_pid()
    assert {first.process.pid, agent} <= memory_group.pids()
    memory_group.limit_memory(320 * MIB)
    first.send("hog", str(tmp_path / "log"))
    assert first.process.wait(60) == -signal.SIGKILL
    assert memory_group.num_oom_kills() >= 1
    acknowledged = int((tmp_path / "log").read_text().splitlines()[-1])
    assert acknowledged >= 1
    # While the kernel still takes back what the trainer had, it may end the agent as well.
    second = start("r", tmp_path / "d", num=2)
    restored = second.do("restore")
    assert restored["step"] in (acknowledged, acknowledged + 1)
    assert (restored["num"], restored["bad"], restored["sources"]) == (1, "", ["ram"])
    second.save(restored["step"] + 1, "local")
    second.do("close")


def test_slots_that_a_cgroup_has_no_memory_for_are_refused_and_nothing_is_killed(
    start: Start, memory_group: ControlGroup, tmp_path: Path
) -> None:
    trainer = start("r", tmp_path / "d", wrap=memory_group.wrap, scale=160 * MIB)
    trainer.do("restore")  # the state is there, and then the limit leaves less than a slot
    memory_group.limit_memory(440 * MIB)
    with pytest.raises(TrainerError) as caught:
        trainer.do("save", 1, "staged")
    assert "TierFull" in (caught.value.name, *caught.value.causes), str(caught.value)
    assert "cgroup" in caught.value.text
    assert memory_group.num_oom_kills() == 0
    assert trainer.do("hello")["pid"] == trainer.process.pid
    assert status_of() is not None
