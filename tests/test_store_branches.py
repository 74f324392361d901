"""Branches and rivals in one store: a roll-back, a reader of the old branch, two jobs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import _isolation
import numpy as np
import pytest
import store_worker
from agent_checks import kill_agent, until

import mtckpt
from mtckpt import _inventory, _manifest
from mtckpt.errors import CloseFailed, RunLocked, SaveFailed
from mtckpt.tiers import BytesSource, ObjectStoreTier

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path) -> mtckpt.Checkpointer:
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
        mtckpt.ObjectStore(f"file://{tmp_path}/store"),
    ]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def state(fill: float) -> dict[str, Any]:
    return {"w": np.full(1000, fill, np.float32)}


def test_a_roll_back_holds_when_the_store_is_all_there_is(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with open_run(tmp_path) as run:
        for step in range(100, 501, 100):
            run.save(step, state(step)).wait("durable", timeout_s=20)
    with mtckpt.load(url, step=500) as old:
        with open_run(tmp_path) as run:
            assert run.restore(state(0), step=300).step == 300
            for step in (400, 500):
                run.save(step, state(step + 1)).wait("durable", timeout_s=20)
        assert (old["w"] == 500).all()  # undisturbed
    until(lambda: wiped(tmp_path / "disk"))
    with open_run(tmp_path) as run:
        live = state(0)
        assert run.restore(live).step == 500
        assert (live["w"] == 501).all()
    steps = [(s.step, s.incarnation, s.abandoned) for s in mtckpt.steps(url)]
    assert steps == [
        (100, 1, False),
        (200, 1, False),
        (300, 1, False),
        (400, 1, True),
        (400, 2, False),
        (500, 1, True),
        (500, 2, False),
    ]


def test_two_jobs_that_write_one_run_do_not_mix(tmp_path: Path) -> None:
    """On two nodes, at the same moment, under the same name: of each step one save is committed,
    and the loser of a step is told which other job there is."""
    url = f"file://{tmp_path}/store"
    jobs, places = [], []
    try:
        for number in range(2):
            places.append(_isolation.make_places())
            environment = {**os.environ, **places[-1].environment()}
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            command = [sys.executable, "-m", "store_worker", str(tmp_path / f"disk{number}"), url]
            jobs.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            )
        ended = wait_for_an_end(jobs)
    finally:
        for job in jobs:
            job.kill()
            job.wait(20)
            assert job.stdout is not None
            job.stdout.close()
        for place in places:
            _isolation.sweep(place)
    told = ("committed by another job", "is known already", "another job has begun")
    assert any(words in ended for words in told), ended[-2000:]
    steps = list(mtckpt.steps(url))
    by_place = {(step.step, step.incarnation) for step in steps}
    assert len(by_place) == len(steps) > 0  # one save for each
    for step in steps:
        with mtckpt.load(url, step=step.id) as checkpoint:
            assert np.array_equal(checkpoint["w"], store_worker.state_at(step.step)["w"])


@pytest.mark.parametrize("agent", ["stays", "restarts"])
def test_a_job_that_goes_on_beside_its_successor_is_told(tmp_path: Path, agent: str) -> None:
    """Its node was given up, and was only cut off: what it writes now counts on no branch."""
    url = f"file://{tmp_path}/store"
    with open_run(tmp_path) as run:
        run.save(1, state(1)).wait("durable", timeout_s=20)
        successor = _manifest.Incarnation(1, "r", 2, str(uuid.uuid4()), (1, 1))
        with contextlib.closing(ObjectStoreTier(url)) as there:
            key = _inventory.incarnation_key("r", successor)
            there.put(key, BytesSource(_manifest.encode_sealed(successor)))
        if agent == "restarts":  # the next one finds the successor when it looks into the store
            kill_agent()
        save = run.save(2, state(2))
        with pytest.raises(SaveFailed) as raised:
            save.wait("durable", timeout_s=20)
        assert isinstance(raised.value.__cause__, RunLocked)
        save.wait("local", timeout_s=20)
        with pytest.raises(SaveFailed, match="incarnation 2"):
            run.save(3, state(3))
        with pytest.raises(CloseFailed):
            run.close(timeout_s=4)
    assert [step.step for step in mtckpt.steps(url)] == [1]


def wiped(directory: Path) -> bool:
    """The agent may be deleting there by its rules, just now."""
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def wait_for_an_end(jobs: list[subprocess.Popen[str]]) -> str:
    """Until one of the jobs has ended by an error; what it said."""
    said = [""] * len(jobs)
    for _ in range(4000):
        for number, job in enumerate(jobs):
            assert job.stdout is not None
            line = job.stdout.readline()
            said[number] += line
            if not line and job.poll() is not None:
                return said[number]
            if line.startswith("{") and json.loads(line).get("durable", 0) > 200:
                raise AssertionError("two jobs get on as if there were one")
    raise AssertionError("".join(said)[-2000:])
