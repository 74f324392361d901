"""A launcher is killed and its worker lives on; data loaders and forks outlive their trainer."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import agent_pid, status_of, until
from scene_trainer import SceneTrainer, TrainerError, make_state

import mtckpt

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("runtime_dir")]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
# Without a pidfd it takes 10 s of silence until an owner counts as dead.
AT_ONCE_S = 8.0
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


def files_held(pid: int, root: Path) -> dict[int, str]:
    """Files below ``root`` that a process maps or has open: path by inode."""
    try:
        return _files_held(pid, root)
    except OSError:
        assert state_of(pid) in ("gone", "Z")  # it has just ended, and holds nothing
        return {}


def _files_held(pid: int, root: Path) -> dict[int, str]:
    held = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{root}/"):
            held[int(fields[4])] = fields[5]
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd).startswith(f"{root}/"):
                held[fd.stat().st_ino] = os.readlink(fd)
    return held


def saved_inodes(root: Path) -> set[int]:
    """Of every file of a save below ``root``; what is renamed meanwhile may be left out."""
    inodes = set()
    for home, _, names in os.walk(root):  # which passes over directories that go meanwhile
        if "/step-" in home:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    inodes.add(os.stat(os.path.join(home, name)).st_ino)
    return inodes


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


@pytest.mark.parametrize("worker", ["runs", pytest.param("was stopped", marks=pytest.mark.torture)])
def test_a_worker_that_outlives_torchrun_is_fenced(
    worker: str, start: Start, tmp_path: Path, ram_dir: Path
) -> None:
    first = start("r", tmp_path / "d", num=1, python=TORCHRUN)
    assert first.do("restore")["step"] is None
    for step in (1, 2, 3):
        first.save(step)
    old = first.do("hello")
    assert old["parent"] == first.process.pid
    first.kill()
    second: SceneTrainer | None = None
    try:
        # Nobody told the worker: it goes on, as the owner that it still is.
        first.save(4)
        assert first.do("hello")["pid"] == old["pid"]
        (granted,) = first.do("granted")
        if worker == "was stopped":
            os.kill(old["pid"], signal.SIGSTOP)
        second = start("r", tmp_path / "d", num=2, python=TORCHRUN)
        restored = second.do("restore")
        assert (restored["step"], restored["num"], restored["bad"]) == (4, 1, "")
        assert restored["sources"] == ["ram"]
        new = second.do("hello")["pid"]
        if worker == "was stopped":
            first.send("save", 5, "staged")
            os.kill(old["pid"], signal.SIGCONT)
        for step in range(5, 12):
            second.save(step)
            held = files_held(new, ram_dir)
            assert held, "the new worker maps its slots"
            assert granted not in held, f"step {step}: a slot is shared"
            assert granted not in saved_inodes(ram_dir)
        with pytest.raises(TrainerError) as caught:
            if worker == "was stopped":
                first.answer()
            first.do("save", 6, "staged")
        assert "RunLocked" in (caught.value.name, *caught.value.causes), str(caught.value)
        with pytest.raises(TrainerError) as caught:
            first.do("save", 7, "staged")
        assert caught.value.name == "RunLocked", str(caught.value)
        second.save(12, "local")
        second.kill()
        os.kill(new, signal.SIGKILL)
    finally:
        for trainer in (first, second):
            if trainer is not None:
                _end_orphans(trainer)
    third = start("r", tmp_path / "d", num=3)
    restored = third.do("restore")
    assert (restored["step"], restored["num"], restored["bad"]) == (12, 2, "")
    assert restored["sources"] == ["ram"]
    # All slots are the new one's to use: those of the fenced worker are free since it is dead.
    states = [slot.state for slot in until(status_of).slots]
    assert "capturing" not in states
    assert len(states) <= 4, states
    third.do("close")
    for kept in mtckpt.steps(tmp_path / "d" / "r"):
        with mtckpt.load(tmp_path / "d" / "r", step=kept.step) as found:
            wanted = make_state(1 if kept.step < 5 else 2, kept.step)
            assert found["scalar"] == wanted["scalar"], f"step {kept.step} is another's"
            assert (found["w"] == wanted["w"]).all()


def _end_orphans(trainer: SceneTrainer) -> None:
    """End what a killed launcher left: whoever has our pipe as its input."""
    assert trainer.process.stdin is not None
    ours = os.fstat(trainer.process.stdin.fileno()).st_ino
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "fd" / "0").stat().st_ino == ours and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
                until(functools.partial(_is_over, int(entry.name)))


def _is_over(pid: int) -> bool:
    return state_of(pid) in ("gone", "Z")


def test_children_that_outlive_their_trainer_keep_nothing_alive(
    start: Start,
    tmp_path: Path,
    runtime_dir: Path,
    ram_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "1")
    first = start("r", tmp_path / "d", num=1, torch=True)
    first.do("restore")
    for step in (1, 2, 3):
        first.save(step)
    loader, forked = first.do("load_data"), first.do("fork")
    children = [*loader["pids"], forked["pid"]]
    try:
        assert len(loader["pids"]) == 2
        assert (loader["said"], forked["said"]) == (["ForkedProcess"], "ForkedProcess")
        first.save(4)
        assert files_held(first.process.pid, ram_dir)
        os.kill(first.process.pid, signal.SIGKILL)
        until(lambda: not until(status_of).owner_alive, AT_ONCE_S)
        assert "capturing" not in [slot.state for slot in until(status_of).slots]
        first.process.wait(10)

        # DataLoader workers look at their parent now and then and leave; the fork never does.
        assert state_of(forked["pid"]) in "SR"
        second = start("r", tmp_path / "d", num=2)
        restored = second.do("restore")
        assert (restored["step"], restored["num"], restored["bad"]) == (4, 1, "")
        for step in range(5, 10):
            second.save(step)
        pid = agent_pid()
        second.do("close")
        until(lambda: state_of(pid) == "gone", 30.0)
        assert state_of(forked["pid"]) in "SR"
        for child in children:
            if state_of(child) != "gone":
                assert files_held(child, ram_dir) == {}
        assert [path for path in ram_dir.rglob("*") if path.is_file()] == []
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
