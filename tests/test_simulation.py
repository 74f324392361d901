"""Agents and trainers under virtual time, with faults at random moments: promises hold.

A seed that fails is told line by line by ``python -m mtckpt.testing.simulation SEED``.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

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
    """In another process too, where sets have another order, and on another machine: nothing of
    that is touched."""
    told = []
    for order, odd in (("1", {}), ("2", {"LOCAL_RANK": "1", "MTCKPT_DOMAINS": "rack=r1"})):
        environment = {**os.environ, **odd, "PYTHONHASHSEED": order}
        command = [sys.executable, str(Path(__file__).with_name("watched_stories.py"))]
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True))
    stories = [each.stdout.splitlines() for each in told]
    assert [line for line in stories[0] if line.startswith("touched")] == []
    assert stories[0] == stories[1]
    assert len(stories[0]) > 300, told[0].stderr
