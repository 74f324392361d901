"""The tests' own ground: isolation, seeds and the time budget, checked like everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import _isolation
import pytest
from _budget import Budget

SLEEPER = "import time; print(flush=True); time.sleep(60)  # mtckpt"


def start_sleeper(environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SLEEPER]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    # Popen returns before the kernel has put the arguments where /proc shows them.
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    return process


def test_every_process_has_places_of_its_own() -> None:
    runtime, ram = Path(os.environ["MTCKPT_RUNTIME_DIR"]), Path(os.environ["MTCKPT_RAM_DIR"])
    assert runtime.name.startswith(f"mtk-{os.getpid()}-")
    assert ram.is_dir()
    assert ram != runtime


def test_fixtures_give_a_test_its_own_places(runtime_dir: Path, ram_dir: Path) -> None:
    assert os.environ["MTCKPT_RUNTIME_DIR"] == str(runtime_dir)
    assert os.environ["MTCKPT_RAM_DIR"] == str(ram_dir)
    assert list(runtime_dir.iterdir()) == list(ram_dir.iterdir()) == []


def test_sweep_kills_the_process_of_the_pid_file() -> None:
    places = _isolation.make_places()
    agent = start_sleeper()
    (places.runtime / "agent.pid").write_text(f"{agent.pid}\n")
    _isolation.sweep(places)
    assert agent.wait(10) == -9
    assert not places.runtime.exists()
    assert not places.ram.exists()


def test_sweep_kills_what_was_started_with_its_places_and_nothing_else() -> None:
    places = _isolation.make_places()
    ours = start_sleeper({**os.environ, **places.environment()})
    other = start_sleeper()
    try:
        _isolation.sweep(places)
        assert ours.wait(10) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(10)


def test_sweep_leaves_a_process_that_only_has_the_number_of_an_agent() -> None:
    places = _isolation.make_places()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (places.runtime / "agent.pid").write_text(str(stranger.pid))
        _isolation.sweep(places)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(10)


def test_seed_is_the_same_for_the_same_session_and_test(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    runs = [
        run_inner(
            tmp_path, "def test_seed(seed): print('seed is', seed)", "-s", f"--seed={session}"
        )
        for session in (1, 1, 2)
    ]
    seen = [line for run in runs for line in run.stdout.splitlines() if "seed is" in line]
    assert len(seen) == 3, runs[0].stdout + runs[0].stderr
    assert seen[0] == seen[1] != seen[2]
    assert "replay with --seed=1" in runs[0].stdout


def run_inner(
    directory: Path, test: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    (directory / "test_inner.py").write_text(test)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", str(directory), *options, "test_inner.py"),
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("budget_s", "code"), [("0.05", 1), ("60", 0)])
def test_budget_fails_a_session_that_took_too_long(
    tmp_path: Path, budget_s: str, code: int
) -> None:
    (tmp_path / "conftest.py").write_text(
        "from _budget import Budget, limit_from_environment\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(Budget(limit_from_environment()))\n"
    )
    test = "import time\ndef test_long():\n    time.sleep(0.1)\n"
    done = run_inner(tmp_path, test, MTCKPT_TEST_BUDGET_S=budget_s)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("FAILED: the session took" in done.stdout) == (code == 1)


def test_budget_measures_from_its_start() -> None:
    budget = Budget(limit_s=10)
    assert time.monotonic() - budget.start_s < 10
    assert not budget.exceeded
    budget.elapsed_s = 11
    assert budget.exceeded
