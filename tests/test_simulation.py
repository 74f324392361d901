"""Agents and trainers under virtual time, with faults at random moments: promises hold.

A seed that fails is told line by line by ``python -m mtckpt.testing.simulation SEED``.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from mtckpt.testing.simulation import run_seeds

BLOCK = 50
NUM_BLOCKS = 15
NUM_PARTNER_BLOCKS = 5
# Of `make torture`, with partners and without: together 100000, which two cores play in an hour.
NUM_SEEDS = int(os.environ.get("MTCKPT_SIM_SEEDS", "50000"))


def seeds_of(block: int) -> range:
    return range(1 + block * BLOCK, 1 + (block + 1) * BLOCK)


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_promises_hold(block: int) -> None:
    assert list(run_seeds(seeds_of(block))) == []


@pytest.mark.parametrize("block", range(NUM_PARTNER_BLOCKS))
def test_promises_hold_with_partners_and_bytes_that_change(block: int) -> None:
    assert list(run_seeds(seeds_of(block), partners=True)) == []


@pytest.mark.torture
@pytest.mark.timeout(14400)
def test_promises_hold_for_long() -> None:
    num_processes = len(os.sched_getaffinity(0))
    for partners in (False, True):
        broken = run_seeds(range(1, 1 + NUM_SEEDS), num_processes, partners=partners)
        assert list(itertools.islice(broken, 10)) == []


def test_a_seed_is_one_story() -> None:
    """In another process too, where sets have another order."""
    told = []
    for order in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": order}
        command = [sys.executable, "-m", "mtckpt.testing.simulation", "12"]
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True))
    stories = [
        [line for line in each.stdout.splitlines() if "ms each" not in line] for each in told
    ]
    assert stories[0] == stories[1]
    assert len(stories[0]) > 100
