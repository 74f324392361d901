"""Agent and trainer share three directories and nothing else: users, namespaces, cgroups differ."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_checks import until
from control_groups import ControlGroup, make_group
from other_users import as_user, python_for_others, unshared, without_peerpidfd
from scene_trainer import SceneTrainer, TrainerError

import mtckpt
from mtckpt.agent import protocol

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

GROUP, SERVICE_USER, TRAINER_USER, OUTSIDER = 12500, 12000, 12001, 12002
# Where the trainer's namespace has the directory of the socket; ours and the agent's have not.
MOUNTED = "/mnt"


@pytest.fixture
def groups() -> Iterator[tuple[ControlGroup, ControlGroup]]:
    agent, trainer = make_group(), make_group()
    yield agent, trainer
    for group in (trainer, agent):
        group.remove()


class Cluster:
    """The service, and trainers that can reach its socket, its memory and a disk."""

    def __init__(self, runtime: Path, ram: Path, groups: tuple[ControlGroup, ControlGroup]) -> None:
        self.ram, self.home, self.disk = ram, runtime / "service", runtime / "disk"
        self._agent_group, self._trainer_group = groups
        self._process: subprocess.Popen[bytes] | None = None
        self._trainers: list[SceneTrainer] = []
        runtime.chmod(0o755)
        for directory in (self.home, self.disk, ram):
            directory.mkdir(exist_ok=True)
            os.chown(directory, SERVICE_USER, GROUP)
            directory.chmod(0o2750 if directory is self.home else 0o2770)

    def start_service(self, *wrap: str) -> None:
        self._process = subprocess.Popen(
            [
                *self._agent_group.wrap,
                *unshared(),
                *as_user(SERVICE_USER, GROUP),
                *wrap,
                *(python_for_others(), "-m", "mtckpt.cli", "agent", "run"),
                *("--group", str(GROUP), "--runtime-dir", str(self.home)),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        until((self.home / protocol.SOCKET_NAME).exists, 30.0)

    def kill_service(self) -> None:
        """All of its cgroup, as the end of its container does."""
        self._agent_group.kill()
        assert self._process is not None
        self._process.wait(10)
        (self.home / protocol.SOCKET_NAME).unlink()

    def _into(self, uid: int) -> list[str]:
        mount = f"mount --bind {self.home} {MOUNTED}"
        return [*unshared(mount), *as_user(uid, uid, [GROUP])]

    @property
    def _environment(self) -> dict[str, str]:
        return {"MTCKPT_AGENT_SOCKET": f"{MOUNTED}/{protocol.SOCKET_NAME}"}

    def trainer(self, uid: int = TRAINER_USER, **options: Any) -> SceneTrainer:
        wrap = [*self._trainer_group.wrap, *self._into(uid)]
        python = (python_for_others(),)
        self._trainers.append(
            SceneTrainer(
                *("r", self.disk), wrap=wrap, python=python,
                environment=self._environment, **options,
            )
        )  # fmt: skip
        return self._trainers[-1]

    def kill_trainers(self) -> None:
        self._trainer_group.kill()

    def command(self, *arguments: str) -> str:
        """``mtckpt`` as the trainer's user, where the trainer is."""
        done = subprocess.run(
            [*self._into(TRAINER_USER), python_for_others(), "-m", "mtckpt.cli", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **self._environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        for trainer in self._trainers:
            trainer.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)


@pytest.fixture
def cluster(
    runtime_dir: Path, ram_dir: Path, groups: tuple[ControlGroup, ControlGroup]
) -> Iterator[Cluster]:
    tried = subprocess.run([*unshared(), "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("namespaces cannot be made here")
    made = Cluster(runtime_dir, ram_dir, groups)
    yield made
    made.close()


@pytest.mark.parametrize(
    "death", ["pidfd", pytest.param("closed connection", marks=pytest.mark.torture)]
)
def test_a_service_in_namespaces_of_its_own(death: str, cluster: Cluster) -> None:
    cluster.start_service(*(without_peerpidfd() if death == "closed connection" else ()))
    first = cluster.trainer(num=1)
    assert first.do("restore")["step"] is None
    who = first.do("hello")
    assert (who["uid"], who["pid"]) == (TRAINER_USER, 1)
    for step in (1, 2, 3):
        first.save(step, "local")
    first.save(4)
    cluster.kill_trainers()

    second = cluster.trainer(num=2)
    restored = second.do("restore")
    assert (restored["step"], restored["num"], restored["bad"]) == (4, 1, "")
    assert restored["sources"] == ["ram"]
    with pytest.raises(TrainerError) as caught:
        cluster.trainer(OUTSIDER, num=9).do("restore")
    assert caught.value.name == "AccessDenied"
    second.save(5, "local")
    second.save(6, "local")
    cluster.kill_trainers()
    cluster.kill_service()
    for path in cluster.ram.iterdir():
        shutil.rmtree(path)

    cluster.start_service()
    third = cluster.trainer(num=3)
    restored = third.do("restore")
    assert (restored["step"], restored["num"], restored["bad"]) == (6, 2, "")
    assert restored["sources"] == ["disk"]
    third.save(7, "local")
    assert [step.step for step in mtckpt.steps(cluster.disk / "r")][-1] == 7
    cluster.kill_trainers()
    until(lambda: "owned by nobody" in cluster.command("status", "r"))
    assert "removed" in cluster.command("rm", "r", "--yes")
    assert list(cluster.disk.rglob("rank-*")) == []
    assert list(cluster.ram.rglob("*.safetensors")) == []
