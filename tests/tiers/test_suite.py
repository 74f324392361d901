"""The public suite, run against the tiers that ship and against what wraps them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtckpt.errors import TierUnavailable
from mtckpt.testing import Fault, FaultyTier, TierSuite
from mtckpt.tiers import (
    DeadlineTier,
    LocalTier,
    MeteredTier,
    RetryingTier,
    Survives,
    ThrottledTier,
    Tier,
)

PAUSE_S = 0.001


class TestDisk(TierSuite):
    survives = Survives.PROCESS | Survives.POWER

    def make_tier(self, tmp_path: Path) -> Tier:
        return LocalTier(tmp_path / "objects")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a tmpfs")
class TestRam(TierSuite):
    survives = Survives.PROCESS

    @pytest.fixture
    def tmp_path(self) -> Iterator[Path]:
        path = tempfile.mkdtemp(prefix="mtckpt-test-", dir="/dev/shm")
        yield Path(path)
        shutil.rmtree(path)

    def make_tier(self, tmp_path: Path) -> Tier:
        return LocalTier(tmp_path / "objects", name="ram", survives=Survives.PROCESS, sync=False)


class TestGroup(TierSuite):
    def make_tier(self, tmp_path: Path) -> Tier:
        return LocalTier(tmp_path / "objects", group_access=True, direct_io="never")


class TestWrapped(TierSuite):
    """All wrappers at once, with an inner tier that fails to answer now and then."""

    def make_tier(self, tmp_path: Path) -> Tier:
        faults = [
            Fault(verb, TierUnavailable, nth=nth)
            for verb in ("put", "read_into", "stat", "list", "delete")
            for nth in (1, 3)
        ]
        faulty = FaultyTier(LocalTier(tmp_path / "objects"), rules=faults)
        deadline = DeadlineTier(ThrottledTier(faulty, bytes_per_s=1e12), timeout_s=20)
        return MeteredTier(RetryingTier(deadline, first_delay_s=PAUSE_S))
