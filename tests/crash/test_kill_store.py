"""A node is killed and wiped at any moment; what the store was said to have, it has.

Trainer, agent and data processes get SIGKILL together, then memory and disk are emptied, so the
next start has the store alone. Uploads, commits and deletions are all cut off like this.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import _isolation
import numpy as np
import pytest
import store_worker

import mtckpt

NUM_KILLS = 10
NUM_TORTURE = 100


class Scene:
    """One run, killed again and again; ``durable`` is the newest step it was promised."""

    def __init__(self, tmp_path: Path, runtime: Path, ram: Path, url: str) -> None:
        self.disk, self.runtime, self.ram, self.url = tmp_path / "disk", runtime, ram, url
        self.durable = self.started = 0
        self.restored: list[int] = []
        self.moments: list[str] = []

    def live_and_die(self, moment: random.Random) -> None:
        """Start the job, let it reach a durable step or two, and kill all of it midway."""
        process = subprocess.Popen(
            [sys.executable, "-m", "store_worker", str(self.disk), self.url],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        wanted = moment.choice((1, 1, 2, 3, 4))
        reached = threading.Event()
        reader = threading.Thread(target=self._read, args=(process, wanted, reached), daemon=True)
        reader.start()
        assert reached.wait(180), f"it does not get on: {self}"
        assert process.poll() is None, f"it has ended by itself: {self}"
        time.sleep(moment.uniform(0, 0.12))
        _isolation.end_all(self.runtime)  # also what was just being started
        process.wait(20)
        reader.join(20)
        process.stdout.close()
        self.moments.append(f"after {wanted}")

    def _read(self, process: Any, wanted: int, reached: threading.Event) -> None:
        for line in process.stdout:
            said = json.loads(line)
            if "restored" in said:
                assert said["whole"], said
                self.restored.append(said["restored"] or 0)
            self.started = max(self.started, said.get("started", 0))
            if "durable" in said:
                self.durable = max(self.durable, said["durable"])
                wanted -= 1
            if wanted <= 0:
                reached.set()
        reached.set()

    def wipe(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        for path in self.ram.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Read the store as a stranger: what it lists is whole, and nothing promised is missing."""
        steps = list(mtckpt.steps(self.url))
        assert not [step for step in steps if step.damaged], steps
        newest = max((s.step for s in steps if not s.abandoned), default=0)
        assert self.durable <= newest <= self.started, f"{self}: {steps}"
        for step in steps[-2:]:
            with mtckpt.load(self.url, step=step.id) as checkpoint:
                assert np.array_equal(checkpoint["w"], store_worker.state_at(step.step)["w"])

    def __str__(self) -> str:
        return f"durable {self.durable}, started {self.started}, {self.restored}, {self.moments}"


@pytest.fixture(params=["s3"])
def scene(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    runtime_dir: Path,
    ram_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    server = request.getfixturevalue({"gs": "gcs", "az": "azure"}.get(request.param, "s3"))
    for name, value in {**server.environment, "MTCKPT_DELETE_GRACE_S": "0.02"}.items():
        monkeypatch.setenv(name, value)
    ram_dir.mkdir(exist_ok=True)
    return Scene(tmp_path, runtime_dir, ram_dir, f"{request.param}://{server.new_prefix()}")


def kill_and_wipe(scene: Scene, seed: int, count: int) -> None:
    moment = random.Random(seed)
    for _ in range(count):
        before = scene.durable
        scene.live_and_die(moment)
        assert scene.restored[-1] >= before, str(scene)
        scene.wipe()
        scene.check()


@pytest.mark.timeout(240)
def test_the_newest_durable_step_comes_back(scene: Scene, seed: int) -> None:
    kill_and_wipe(scene, seed, NUM_KILLS)
    assert scene.durable >= NUM_KILLS


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "scene", ["gs", pytest.param("az", marks=pytest.mark.torture)], indirect=True
)
def test_it_comes_back_from_others(scene: Scene, seed: int) -> None:
    kill_and_wipe(scene, seed, 2)
    assert scene.durable >= 2


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scene", ["s3", "gs", "az"], indirect=True)
def test_the_newest_durable_step_comes_back_a_hundred_times(scene: Scene, seed: int) -> None:
    kill_and_wipe(scene, seed, NUM_TORTURE)
