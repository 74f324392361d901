"""A service for a group: other users' trainers, one RAM tier, and nobody else's runs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from agent_checks import until
from fake_trainer import TrainerProcess, disk

from mtckpt._access import Access
from mtckpt.agent import address, protocol
from mtckpt.agent.client import AgentClient
from mtckpt.errors import AccessDenied, UsageError

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("fresh_agents")]

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


class Service:
    """An agent for the group, of a user of its own; ``ram`` is its RAM directory."""

    def __init__(self, home: Path, ram: Path, mask: int = 0o022) -> None:
        self.ram = ram
        self._home = home
        self._mask = mask
        home.mkdir(0o750)
        for directory in (home.parent, ram):
            directory.chmod(0o755)
        os.chown(home, SERVICE_UID, GROUP)
        os.chown(ram, SERVICE_UID, GROUP)
        self.socket_path = home / protocol.SOCKET_NAME
        self.start()

    def start(self) -> None:
        text = (
            "import sys; from mtckpt.agent.life import run_service;"
            f"sys.exit(run_service({str(self._home)!r}, '{GROUP}'))"
        )
        self.process = subprocess.Popen(
            [*as_user(SERVICE_UID), "-c", text], env=environment(), umask=self._mask
        )
        deadline_s = time.monotonic() + 15
        while not address.answers(str(self.socket_path), 1.0):
            assert self.process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(15)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(15) == 0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def service(runtime_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running service; its RAM directory."""
    running = Service(runtime_dir / "service", ram_dir)
    monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(running.socket_path))
    yield ram_dir
    running.stop()


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


REPLACE = """
import os, sys
run = sys.argv[1]
mine = os.path.join(os.path.dirname(run), "../mine")
with open(mine, "w") as file:
    file.write('{"run": "r", "run_key": "r", "extra": {"uid": %d}}' % os.getuid())
refused = 0
for path in (run + "/.run.json", run + "/.slots"):
    for try_ in (lambda: os.rename(mine, path), lambda: os.unlink(path),
                 lambda: os.rename(path, run + "/.old"), lambda: open(path, "r+")):
        try:
            try_()
        except (PermissionError, IsADirectoryError):
            refused += 1
for try_ in (lambda: os.rename(run, run + ".old"), lambda: os.mkdir(run + "-next"),
             lambda: open(run + "/.mine", "w")):
    try:
        try_()
    except PermissionError:
        refused += 1
print(refused)
"""


def test_nobody_of_the_group_says_what_another_run_is(
    service: Path, trainers: Callable[..., TrainerProcess]
) -> None:
    alice = trainers(ALICE, "r")
    alice.do("open")
    alice.do("begin", 1)
    alice.do("save", 1, [])
    run = service / f"mtckpt-{SERVICE_UID}/r"
    service.chmod(0o777)  # of the same file system, so that a rename could do
    done = subprocess.run(
        [*as_user(BOB), "-c", REPLACE, str(run)], env=environment(), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("11\n", "")
    config = run / ".run.json"
    assert (config.stat().st_uid, config.stat().st_mode & 0o777) == (SERVICE_UID, 0o600)
    with pytest.raises(AccessDenied):
        trainers(BOB, "r").do("open")


SAY = """
import sys
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.errors import AccessDenied, CheckpointError

refused = 0
with AgentClient(sys.argv[1], 20.0) as client:
    for path, message, answer in (
        ("rm", protocol.Remove(), protocol.Removed),
        ("flush", protocol.Flush(sys.argv[2]), protocol.Done),
        ("close", protocol.Close(sys.argv[2], free_ram=True), protocol.Done),
        ("changes?since=0&timeout_s=0", None, protocol.Changes),
    ):
        try:
            client.call(f"/v1/runs/r/{path}", message, answer)
        except AccessDenied:
            refused += 1
        except CheckpointError:
            pass  # an answer
print(refused)
"""


def test_nobody_of_the_group_speaks_for_another_run(
    service: Path, trainers: Callable[..., TrainerProcess]
) -> None:
    alice = trainers(ALICE, "r", token="of this run")
    alice.do("open")
    alice.do("begin", 1)
    alice.do("save", 1, [])
    holder = json.loads((service / f"mtckpt-{SERVICE_UID}/r/.run.json").read_text())["owners"][0]

    def refused(uid: int) -> int:
        command = [*as_user(uid), "-c", SAY, os.environ["MTCKPT_AGENT_SOCKET"], holder["holder"]]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert not done.stderr
        return int(done.stdout)

    assert refused(BOB) == 4
    alice.kill()
    bob = trainers(BOB, "r", token="of this run")
    bob.do("open")
    bob.do("close")
    assert refused(BOB) == 0


def test_a_service_runs_no_command_of_another_user(
    service: Path, trainers: Callable[..., TrainerProcess]
) -> None:
    """A configuration of AWS names a command that gives keys: not with the service's rights."""
    place = service / "aws"  # below directories that the service's user may enter
    place.mkdir()
    place.chmod(0o777)
    config = place / "config"
    config.write_text(f"[default]\ncredential_process = touch {place}/ran\nregion = x\n")
    access = Access(environment=(("AWS_CONFIG_FILE", str(config)),))
    store = protocol.TierConfig("store", "store", "s3://bucket-of-nobody/x", access=access)
    alice = trainers(ALICE, "r", [store])
    alice.do("open")
    alice.do("begin", 1)
    alice.do("save", 1, ["store"])
    with AgentClient(os.environ["MTCKPT_AGENT_SOCKET"], 20.0) as client:

        def has_tried() -> bool:
            (run,) = client.call("/status", None, protocol.AgentStatus).runs
            return any(tier.problem for tier in run.tiers if tier.label == "store")

        until(lambda: has_tried() or (place / "ran").exists(), 30.0)
    assert not (place / "ran").exists()
    with pytest.raises(UsageError, match="reaches no store"):
        trainers(BOB, "s", [protocol.TierConfig("store", "store", "file:///etc/x")]).do("open")


HOLD = """
import socket, sys
held = []
for _ in range(600):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_one_user_does_not_keep_the_others_out(
    service: Path, trainers: Callable[..., TrainerProcess]
) -> None:
    holding = subprocess.Popen(
        [*as_user(BOB), "-c", HOLD, os.environ["MTCKPT_AGENT_SOCKET"]],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        alice = trainers(ALICE, "r")
        alice.do("open")
        alice.do("begin", 1)
        alice.do("save", 1, [])
    finally:
        holding.communicate(timeout=20)


def test_a_record_that_its_owner_keeps_to_itself_costs_only_that_save(
    trainers: Callable[..., TrainerProcess], service: Path
) -> None:
    alice = trainers(ALICE, "r")
    alice.do("open")
    alice.do("begin", 1)
    alice.do("save", 1, [])
    alice.do("capture", 2, [], True)
    (record,) = service.glob(f"mtckpt-{SERVICE_UID}/r/.slots/*.json")
    assert record.stat().st_uid == ALICE
    record.chmod(0o600)
    alice.kill()
    again = trainers(ALICE, "r")
    assert again.do("open")["finished"] == []
    again.do("begin", 2)
    again.do("save", 2, [])


REAL = """
import os, sys
import numpy as np
import mtckpt

run, disk, num_steps, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
state = {"w": np.zeros(100_000), "note": "at 0"}
c = mtckpt.Checkpointer(run, [mtckpt.Ram(every=1), mtckpt.Disk(disk, every=2)], timeout_s=20)
restored = c.restore(state)
first = restored.step or 0
assert (state["w"] == first).all() and state["note"] == f"at {first}"
for step in range(first + 1, first + 1 + num_steps):
    state["w"][:] = step
    state["note"] = f"at {step}"
    save = c.save(step, state, metrics={"loss": 1 / step})
    assert save.skipped is None, save.skipped
    save.wait("local" if step % 2 == 0 else "staged", timeout_s=20)
c.report(step, {"late": 2.0})
assert {tier["label"] for tier in c.status().tiers} == {"ram", "disk"}
assert c.steps()[-1].step == step
print(first, *restored.sources, flush=True)
if end == "die":
    os.kill(os.getpid(), 9)
c.close(timeout_s=20)
"""


@pytest.mark.parametrize(
    ("agents", "trainers_"),
    [(0o000, 0o077), pytest.param(0o077, 0o000, marks=pytest.mark.torture)],
)
def test_whatever_the_umasks_a_whole_life_works(
    agents: int,
    trainers_: int,
    runtime_dir: Path,
    ram_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Agent and trainers are different users without rights; everything they do with a run."""
    service = Service(runtime_dir / "service", ram_dir, agents)
    monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(service.socket_path))
    base = ram_dir / "disk"  # below directories that the service's user may enter
    base.mkdir()
    os.chown(base, SERVICE_UID, GROUP)
    base.chmod(0o2770)

    def train(uid: int, run: str, num_steps: int, end: str) -> list[str]:
        done = subprocess.run(
            [*as_user(uid), "-c", REAL, run, str(base), str(num_steps), end],
            env=environment(),
            umask=trainers_,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == (-9 if end == "die" else 0), done.stderr
        return done.stdout.split()

    assert train(ALICE, "r", 3, "die") == ["0"]
    assert train(BOB, "other", 2, "close") == ["0"]
    assert train(ALICE, "r", 2, "die") == ["3", "ram"]
    service.kill()
    service.start()
    assert train(ALICE, "r", 2, "die") == ["5", "ram"]
    with AgentClient(str(service.socket_path), 20.0) as client:

        def remove(what: protocol.Remove) -> list[str]:
            return client.call("/v1/runs/r/rm", what, protocol.Removed).removed

        assert len(remove(protocol.Remove(7, ["ram"]))) == 1  # it was nowhere else
        assert train(ALICE, "r", 2, "die")[0] == "6"
        modes = {path.stat().st_mode & 0o777 for path in base.rglob("*") if path.is_file()}
        assert modes == {0o660}
        assert remove(protocol.Remove())
    assert sorted(path.name for path in base.glob("*/step-*")) != []
    assert not list(base.glob("r/step-*"))
    assert not (ram_dir / f"mtckpt-{SERVICE_UID}" / "r").exists()
    assert train(ALICE, "r", 2, "close") == ["0"]
    service.stop()
