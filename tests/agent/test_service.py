"""A service for a group: other users' trainers, one RAM tier, and nobody else's runs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import TrainerProcess, disk

from mtckpt.agent import protocol
from mtckpt.errors import AccessDenied

pytestmark = pytest.mark.root

GROUP = 1
SETPRIV = ("setpriv", f"--regid={GROUP}", "--clear-groups")
SERVICE_UID, ALICE, BOB = 65534, 12001, 12002


@functools.cache
def python_of_others() -> str:
    """An interpreter that another user can run; ours may lie in a home directory."""
    path = os.pathsep.join(p for p in sys.path if p)
    for python in (sys.executable, "/usr/bin/python3"):
        # env executes it as it is; setpriv itself would go on looking along PATH.
        command = [*SETPRIV, f"--reuid={BOB}", "env", python, "-c", "import aiohttp, msgspec"]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        if done.returncode == 0:
            return python
    pytest.skip("another user cannot run Python with these packages here")


def as_user(uid: int) -> list[str]:
    return [*SETPRIV, f"--reuid={uid}", "env", python_of_others()]


@pytest.fixture
def service(runtime_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running service; its RAM directory."""
    home = runtime_dir / "service"
    home.mkdir(0o750)
    for directory in (runtime_dir, ram_dir):
        directory.chmod(0o755)
    os.chown(home, SERVICE_UID, GROUP)
    os.chown(ram_dir, SERVICE_UID, GROUP)
    text = (
        "import sys; from mtckpt.agent.life import run_service;"
        f"sys.exit(run_service({str(home)!r}, '{GROUP}'))"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [*as_user(SERVICE_UID), "-c", text],
        env={**os.environ, "PYTHONPATH": path},
    )
    socket_path = home / protocol.SOCKET_NAME
    deadline_s = time.monotonic() + 15
    while not socket_path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(socket_path))
    yield ram_dir
    process.terminate()
    assert process.wait(15) == 0


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_a_trainer_of_another_pid_namespace_is_followed(
    service: Path, trainers: Callable[..., TrainerProcess]
) -> None:
    """Nested in ours: its pid is another one there, its death is a pidfd all the same."""
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("pid namespaces cannot be made here")
    first = trainers(ALICE, "r", wrap=UNSHARE)
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, [], True)
    first.kill()
    second = trainers(ALICE, "r", wrap=UNSHARE)
    started_s = time.monotonic()
    assert len(second.do("open")["finished"]) == 1
    assert time.monotonic() - started_s < 4.0


@pytest.fixture
def trainers(service: Path) -> Iterator[Callable[..., TrainerProcess]]:
    started: list[TrainerProcess] = []

    def start(
        uid: int,
        run: str,
        tiers: list[protocol.TierConfig] | None = None,
        *,
        wrap: Sequence[str] = (),
        **options: Any,
    ) -> TrainerProcess:
        started.append(TrainerProcess(run, tiers, [*wrap, *as_user(uid)], **options))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


def test_other_users_of_the_group_train(
    service: Path, trainers: Callable[..., TrainerProcess], tmp_path: Path
) -> None:
    base = service / "disk"  # below directories that the service's user may enter
    base.mkdir()
    os.chown(base, SERVICE_UID, GROUP)
    base.chmod(0o2770)
    alice = trainers(ALICE, "r", [disk(base)])
    opened = alice.do("open")
    assert Path(opened["ram_root"]).is_relative_to(service)
    alice.do("begin", 1)
    for step in (1, 2, 3, 4):
        alice.do("save", step, ["disk"])
    assert alice.do("wait_stage", 4, "local")["stages"] == ["staged", "local"]
    alice.do("capture", 5, [], True)
    alice.kill()
    again = trainers(ALICE, "r", [disk(base)])
    started_s = time.monotonic()
    assert len(again.do("open")["finished"]) == 1
    assert time.monotonic() - started_s < 4.0
    again.do("close")


def test_a_run_is_its_creators_or_whoever_has_the_token(
    trainers: Callable[..., TrainerProcess],
) -> None:
    alice = trainers(ALICE, "r", token="of this run")
    alice.do("open")
    alice.do("begin", 1)
    alice.do("save", 1, [])
    alice.kill()
    with pytest.raises(AccessDenied, match="another user") as caught:
        trainers(BOB, "r").do("open")
    assert "MTCKPT_TOKEN" in str(caught.value)
    with pytest.raises(AccessDenied):
        trainers(BOB, "r", token="a guess").do("open")
    bob = trainers(BOB, "r", token="of this run")
    bob.do("open")
    bob.do("begin", 2)
