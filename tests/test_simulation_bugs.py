"""Bugs planted into the protocol: the simulation finds each by itself, at the seed that is given.

A bug is one edit in a copy of the package. Without it the stories of these seeds hold, as those of
all seeds do that ``test_simulation`` plays.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted_bug import ROOT, edited
from planted_in_simulation import BUGS, SimulatedBug
from test_simulation import BLOCK, NUM_BLOCKS, NUM_PARTNER_BLOCKS

NUM_AT_ONCE = 4


def assert_found(bug: SimulatedBug, home: Path) -> None:
    shutil.copytree(ROOT / "mtckpt", home / "mtckpt", ignore=shutil.ignore_patterns("*.pyc*"))
    (home / "mtckpt" / bug.file).write_text(edited(bug))
    command = [sys.executable, "-m", "mtckpt.testing.simulation", str(bug.seed), "1"]
    done = subprocess.run(
        [*command, *(["--partners"] if bug.partners else [])],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    # A promise was broken: this is no slip of whoever wrote the replacement.
    assert done.stdout.startswith(f"Violation: seed {bug.seed}: "), (
        done.stdout + done.stderr[-2000:]
    )
    assert done.returncode == 1


def test_every_bug_can_still_be_planted() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 15
    for bug in BUGS:
        assert edited(bug) != (ROOT / "mtckpt" / bug.file).read_text()
        last = BLOCK * (NUM_PARTNER_BLOCKS if bug.partners else NUM_BLOCKS)
        assert 1 <= bug.seed <= last, f"{bug.name}: no test plays the story of seed {bug.seed}"


@pytest.mark.timeout(180)
def test_some_bugs_are_found(seed: int, tmp_path: Path) -> None:
    """A few, others each time; ``make torture`` plants all."""
    for bug in random.Random(seed).sample(BUGS, NUM_AT_ONCE):
        assert_found(bug, tmp_path / bug.name)


@pytest.mark.torture
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_is_found(bug: SimulatedBug, tmp_path: Path) -> None:
    assert_found(bug, tmp_path / "home")
