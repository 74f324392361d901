"""The tests themselves, run by a user without any rights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
SOME = ("tests/test_slots.py", "tests/tiers/test_local.py")


def run_as_nobody(*arguments: str, timeout_s: float) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what belongs to the tree is asked of git")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_as_nobody.sh"), "-q", *arguments],
        # A run of its own: nothing of pytest's workers or of this test's places is handed on.
        env={
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PYTEST_", "MTCKPT_", "PYTHONPATH"))
            },
            "PYTHON": sys.executable,
            "MTCKPT_TEST_BUDGET_S": "0",
            "MTCKPT_SEED": os.environ["MTCKPT_SEED"],
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "needs root" in done.stdout or arguments[0] in SOME
    return done.stdout


@pytest.mark.timeout(180)
def test_some_tests_pass_as_a_user_without_rights() -> None:
    assert " passed" in run_as_nobody(*SOME, timeout_s=170)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_all_tests_pass_as_a_user_without_rights() -> None:
    assert " passed" in run_as_nobody("-rs", "-n", "2", "--dist", "worksteal", timeout_s=7000)
