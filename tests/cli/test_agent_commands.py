"""status, ls, show, verify, rm and agent with an agent that runs, and without one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import kill_agent, until
from builders import build_save
from click.testing import CliRunner, Result

from mtckpt import Checkpointer, Disk, Ram
from mtckpt._manifest import run_key
from mtckpt._slots import BESIDE
from mtckpt.agent import beside
from mtckpt.agent.drains import Note
from mtckpt.agent.holding import Lock
from mtckpt.agent.owners import boot_id
from mtckpt.agent.protocol import SOCKET_NAME, AgentStatus, RunStatus, TierStatus, ram_base
from mtckpt.agent.spawn import ensure_agent
from mtckpt.cli import _agent, main

# A trainer that dies with everything staged and on disk, and closes nothing.
TRAINER = """
import os, sys
import numpy as np
import mtckpt
tiers = [mtckpt.Ram(every=1), mtckpt.Disk(sys.argv[1], every=1)]
checkpointer = mtckpt.Checkpointer("My Run", tiers=tiers)
state = {"w": np.arange(1000.0), "lr": 0.5}
checkpointer.restore(state)
for step in (1, 2):
    checkpointer.save(step, state, metrics={"loss": 0.25}).wait("local", timeout_s=30)
print("saved", flush=True)
if "--live" in sys.argv:
    sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def mtckpt(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*words: object, code: int = 0) -> dict[str, Any]:
    result = mtckpt(*words, "--json")
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def trainer(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "disk"), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    return process


@pytest.mark.usefixtures("runtime_dir")
def test_a_run_from_its_first_save_to_its_end(tmp_path: Path) -> None:
    process = trainer(tmp_path, "--live")
    try:
        (run,) = as_json("status", "My Run")["runs"]
        assert run["owner_pid"] == process.pid
        assert {tier["label"]: tier["newest_step"] for tier in run["tiers"]} == {
            "ram": 2,
            "disk": 2,
        }
        assert "owned by process" in mtckpt("status").output

        (listed,) = as_json("ls")["runs"]
        assert listed["run"] == "My Run"
        assert listed["steps"][-1]["tiers"] == ["ram", "disk"]
        assert listed["steps"][-1]["stages"] == ["staged", "local"]
        shown = as_json("show", "My Run", "--step", 2)
        assert shown["tiers"] == ["ram", "disk"]
        assert shown["metrics"] == {"loss": 0.25}
        assert as_json("verify", "My Run", "--read-data")["ok"]

        assert mtckpt("rm", "My Run", "--yes").exit_code == 1  # its owner lives
        assert (
            as_json("rm", "My Run", "--step", 9, "--yes", code=1)["error"]["details"]["step"] == 9
        )
        assert mtckpt("rm", "My Run", "--tier", "moon", "--yes").exit_code == 2
        assert mtckpt("rm", "My Run").exit_code == 2  # nobody to ask
        assert mtckpt("rm", "My Run", "--step", 1, "--tier", "disk", "--yes").exit_code == 0
        assert [step["step"] for step in as_json("ls", f"{tmp_path}/disk")["runs"][0]["steps"]] == [
            2
        ]
        for command in ("status", "ls", "show", "verify"):
            result = mtckpt(command, "other")
            assert result.exit_code == 1
            assert "My Run" in result.stderr  # the one that it knows
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    assert mtckpt("agent", "stop").output.startswith("stopped agent")


def left_beside(disk: Path, run: str) -> str:
    """As a container leaves it that is killed."""
    root = beside.make(str(disk / BESIDE), boot_id())
    slots = Path(root, run_key(run), "slots")
    slots.mkdir(parents=True)
    (slots / "0").write_bytes(bytes(10_000))
    return root


def test_what_containers_left_of_a_run_that_nobody_knows_is_removed(
    tmp_path: Path, runtime_dir: Path
) -> None:
    left, other = left_beside(tmp_path, "gone"), left_beside(tmp_path, "_other")
    assert as_json("rm", "gone", "--beside", tmp_path, code=2)["error"]["actions"] == ["add --yes"]
    assert mtckpt("rm", "gone", "--beside", tmp_path, "--step", 1, "--yes").exit_code == 2
    with contextlib.closing(Lock(left)):
        assert mtckpt("rm", "gone", "--beside", tmp_path, "--yes").exit_code == 1
    assert f"removed left: {left} (1" in mtckpt("rm", "gone", "--beside", tmp_path, "--yes").output
    assert os.listdir(tmp_path / BESIDE) == [os.path.basename(other)]
    error = as_json("rm", "gone", "--beside", tmp_path, "--yes", code=1)["error"]
    assert error["type"] == "StepNotFound"
    # By its directory's name, as doctor says it.
    assert mtckpt("rm", run_key("_other"), "--beside", tmp_path, "--yes").exit_code == 0
    assert list(runtime_dir.iterdir()) == []  # no agent was needed


@pytest.mark.usefixtures("runtime_dir")
def test_what_a_dead_run_left_is_seen_without_an_agent_and_removed_by_a_new_one(
    tmp_path: Path,
) -> None:
    process = trainer(tmp_path)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert as_json("agent", "stop")["stopped"]
    assert as_json("agent", "stop") == {"version": 1, "stopped": False, "detail": "no agent ran"}

    body = as_json("ls", "My Run")
    assert "no agent runs" in body["notes"][0]
    assert [step["step"] for step in body["runs"][0]["steps"]] == [1, 2]
    assert as_json("verify", "My Run", "--read-data")["ok"]
    assert as_json("status") == {"version": 1, "agent": None, "runs": []}

    left = left_beside(tmp_path / "disk", "My Run")
    removed = as_json("rm", "My Run", "--yes")
    assert removed["kept"] == []
    assert any(left in line for line in removed["removed"])
    assert not (tmp_path / "disk" / BESIDE).exists()
    assert list(Path(ram_base()).rglob("*.safetensors")) == []
    assert list((tmp_path / "disk").rglob("*.safetensors")) == []
    assert as_json("ls", "My Run", code=1)["error"]["type"] == "StepNotFound"
    mtckpt("agent", "stop")


def test_without_an_agent_ram_is_all_that_can_be_seen(ram_dir: Path) -> None:
    build_save(Path(ram_base()), "gpt", 3, {"w": np.zeros(4)})
    assert ram_dir in Path(ram_base()).parents
    output = mtckpt("ls").output
    assert output.startswith(f"note: no agent runs on this node: looked only into {ram_base()}")
    assert as_json("show", "gpt")["step"] == 3
    error = as_json("ls", "other", code=1)["error"]
    assert error["type"] == "StepNotFound"
    assert mtckpt("status", "gpt").exit_code == 1
    assert mtckpt("status").exit_code == 0


def test_a_socket_that_nobody_serves_is_no_agent(runtime_dir: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(runtime_dir / SOCKET_NAME))
    assert as_json("status")["agent"] is None


def test_an_agent_that_does_not_answer_is_an_error(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from mtckpt.cli import _target

    monkeypatch.setattr(_target, "STATUS_TIMEOUT_S", 0.3)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(runtime_dir / SOCKET_NAME))
        silent.listen()
        for command in (("status",), ("ls",), ("agent", "stop")):
            error = as_json(*command, code=1)["error"]
            assert error["type"] == "AgentUnavailable"
            assert error["details"]["timeout_s"] == 0.3


@pytest.mark.usefixtures("runtime_dir")
def test_agent_run_serves_until_it_is_stopped(tmp_path: Path) -> None:
    directory = tmp_path / "service"
    environment = {**os.environ, "MTCKPT_RUNTIME_DIR": str(directory)}
    command = [sys.executable, "-m", "mtckpt.cli", "agent"]
    served = subprocess.Popen(
        [*command, "run", "--runtime-dir", str(directory)], env=environment, stderr=subprocess.PIPE
    )
    try:
        deadline_s = time.monotonic() + 20
        asks = [*command, "health", "--ready", "--timeout", "20"]
        # It answers before it is ready: what an earlier agent left is being read.
        while subprocess.run(asks, env=environment, capture_output=True, timeout=30).returncode:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        stopped = subprocess.run(
            [*command, "stop", "--drain"], env=environment, capture_output=True, timeout=30
        )
        assert stopped.returncode == 0, stopped.stderr
        assert served.wait(20) == 0
    finally:
        served.kill()
        served.communicate(timeout=10)


def test_an_agent_is_asked_how_it_is(runtime_dir: Path) -> None:
    """None, one that answers, one that is stopped: a probe needs no more."""
    assert as_json("agent", "health", code=1)["error"]["type"] == "AgentUnavailable"
    assert not (runtime_dir / SOCKET_NAME).exists()  # it starts none
    ensure_agent(20.0)
    assert as_json("agent", "health") == {"version": 1, "healthy": True, "detail": "it answers"}
    assert mtckpt("agent", "health", "--ready", "--timeout", 20).output == "it is ready\n"
    pid = as_json("status")["agent"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        error = as_json("agent", "health", "--timeout", 0.3, code=1)["error"]
        assert error["details"]["timeout_s"] == 0.3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mtckpt("agent", "health", "--timeout", 0).exit_code == 2


def test_a_node_is_drained(runtime_dir: Path, tmp_path: Path) -> None:
    said = mtckpt("agent", "drain")
    assert (said.exit_code, said.output) == (
        0,
        "no agent ran: nothing is in memory that it could bring away\n",
    )
    assert not (runtime_dir / SOCKET_NAME).exists()  # it starts none
    with Checkpointer("r", [Ram(every=1), Disk(tmp_path / "d", every=100)]) as checkpointer:
        checkpointer.restore({"n": 1})
        checkpointer.save(1, {"n": 1}).wait("staged")
        said = mtckpt("agent", "drain", "--timeout", 20)
        assert said.exit_code == 1  # the disk may go with the node
        assert said.output == (
            "r: step 1 is on disk, which is gone if that is a disk of this node\nnot safe to go\n"
        )
        assert "nothing new is taken: " in mtckpt("status").output
        assert as_json("agent", "drain", "--cancel") == {"version": 1, "safe": True, "runs": []}
        assert "nothing new is taken" not in mtckpt("status").output
    assert mtckpt("agent", "drain", "--timeout", -1).exit_code == 2
    assert mtckpt("agent", "run", "--grace", -1).exit_code == 2


def test_what_a_killed_agent_left_does_not_go_with_its_node(
    runtime_dir: Path, tmp_path: Path
) -> None:
    """Whoever asks whether it may go is told by another agent, and what that was told holds."""
    trainer = [sys.executable, "-c", TRAINER, str(tmp_path / "d")]
    assert subprocess.run(trainer, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    kill_agent()
    said = mtckpt("agent", "drain", "--timeout", 20)
    assert said.exit_code == 1
    assert "step 2 is on disk, which is gone if that is a disk of this node" in said.output
    kill_agent()
    note = Note(str(runtime_dir), boot_id())
    note.write("it was safe to go")
    assert mtckpt("agent", "drain", "--cancel").output == "the node stays\n"
    assert note.read() == ""


def test_a_tier_with_a_problem_makes_status_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = TierStatus("ram", "ram", "/dev/shm/x", [1, 2], 2, 65.0, 10 << 20)
    disk = TierStatus("disk", "disk", "/d", owed=[2], problem="no room: \x1b[5m", newest_age_s=None)
    busy = TierStatus("disk-2", "disk", "/e", bytes_per_s=2 << 20, done_bytes=1, total_bytes=4)
    run = RunStatus("gpt", 3, 77, False, [ram, disk, busy], counters={"staged": 2})
    found = AgentStatus(1, "0.1", "id", "boot", 5, "own", "host", 7300.0, "the login", [run])
    monkeypatch.setattr(_agent, "agent_status", lambda: found)
    result = mtckpt("status")
    assert result.exit_code == 1
    for text in ("no room: \\x1b[5m", "step 2", "1.1 min", "25 % at 2.0 MiB/s", "owned by nobody"):
        assert text in result.output
    assert "up 2.0 h; bounded by the login" in result.output
    assert as_json("status", "gpt", code=1)["runs"][0]["tiers"][1]["owed"] == [2]


def test_watch_goes_on_until_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_agent, "agent_status", lambda: None)
    monkeypatch.setattr(time, "sleep", sleep)
    result = mtckpt("status", "--watch")
    assert result.output.count("no agent runs") == 3
    assert result.exit_code == 130
    assert mtckpt("status", "--watch", "--json").exit_code == 2


@pytest.mark.usefixtures("runtime_dir", "ram_dir")
def test_a_run_that_was_closed_is_found_by_its_name(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with Checkpointer("My Run", [Ram(every=1), Disk(disk)]) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)})
    until(lambda: not as_json("status")["runs"])
    for agent in ("idle", "gone"):
        (listed,) = as_json("ls", "My Run")["runs"]
        assert [(step["step"], step["tiers"]) for step in listed["steps"]] == [(1, ["disk"])]
        assert as_json("show", "My Run")["step"] == 1
        assert as_json("verify", "My Run")["ok"]
        assert "is closed" in mtckpt("ls", "My Run").output
        error = as_json("rm", "My Run", "--yes", code=1)["error"]
        assert "is closed" in error["what"]
        assert f"rm -r {disk}/{run_key('My Run')}" in "".join(error["actions"])
        if agent == "idle":
            assert mtckpt("agent", "stop").exit_code == 0
    assert as_json("ls", "Other Run", code=1)["error"]["type"] == "StepNotFound"
    assert "mtckpt ls ./checkpoints" in mtckpt("ls").output
    with Checkpointer("Empty Run", [Ram(every=1), Disk(disk)]) as checkpointer:
        checkpointer.restore({"w": np.ones(3)})
    error = as_json("ls", "Empty Run", code=1)["error"]
    assert error["what"] == "run 'Empty Run' has no step in its tiers"
    assert f"looked into {disk}" in error["actions"]
