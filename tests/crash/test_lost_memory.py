"""Memory that somebody empties while the agent lives, as who tidies /dev/shm between jobs does."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import agent_pid, ram_root
from small_writer import Nursery, Writer, whole_steps

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def nursery(tmp_path: Path, runtime_dir: Path) -> Iterator[Nursery]:
    del runtime_dir
    made = Nursery(tmp_path)
    yield made
    made.close()


def emptied(what: str) -> None:
    run = ram_root() / "small"
    if what == "its files":
        for path in run.rglob("*"):
            if path.is_file():
                path.unlink()
        return
    shutil.rmtree({"all": ram_root(), "the run": run}[what])


def start(nursery: Nursery, tmp_path: Path, num: int) -> tuple[Writer, dict[str, Any]]:
    writer = nursery.start()
    writer.do("open", num, str(tmp_path / "disk"))
    return writer, writer.do("restore")


def kill(nursery: Nursery, writer: Writer) -> None:
    writer.kill()
    assert nursery.wait(writer) == -signal.SIGKILL


@pytest.mark.parametrize("what", ["all", "the run", "its files"])
def test_the_next_job_has_the_disk_and_saves(nursery: Nursery, tmp_path: Path, what: str) -> None:
    writer, _ = start(nursery, tmp_path, 1)
    writer.do("saves", 1, 4)
    pid = agent_pid()
    kill(nursery, writer)
    emptied(what)
    writer, restored = start(nursery, tmp_path, 2)
    assert (restored["step"], restored["bad"], restored["sources"]) == (4, "", ["disk"])
    writer.do("saves", 5, 9)
    assert agent_pid() == pid
    kill(nursery, writer)
    # What it has in memory is in memory.
    _, restored = start(nursery, tmp_path, 3)
    assert (restored["step"], restored["bad"], restored["sources"]) == (9, "", ["ram"])


@pytest.mark.parametrize("what", ["all", "the run"])
def test_a_job_loses_a_save_and_goes_on(nursery: Nursery, tmp_path: Path, what: str) -> None:
    writer, _ = start(nursery, tmp_path, 1)
    writer.do("saves", 1, 4)
    pid = agent_pid()
    emptied(what)
    told: list[dict[str, Any]] = []
    step = 4
    while not told or "local" not in told[-1]["reached"]:
        step += 1
        told.append(writer.do("attempt", step))
        assert len(told) <= 4, told
    writer.do("saves", step + 1, step + 4)
    assert agent_pid() == pid
    assert step + 4 in whole_steps(tmp_path / "disk")
    kill(nursery, writer)
    _, restored = start(nursery, tmp_path, 2)
    assert (restored["step"], restored["bad"], restored["sources"]) == (step + 4, "", ["ram"])
