"""Eight devices for JAX in the processes that run these tests, where it has not started yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mtckpt

if TYPE_CHECKING:
    from orbax_both import Both

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


@pytest.fixture
def tiers(tmp_path: Path, runtime_dir: Path) -> Iterator[mtckpt.Checkpointer]:
    """A run in memory and on disk."""
    settings = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1, keep=50)]
    with mtckpt.Checkpointer("r", settings, timeout_s=30, max_stall_s=20) as checkpointer:
        yield checkpointer


@pytest.fixture
def both(tmp_path: Path, tiers: mtckpt.Checkpointer) -> Both:
    """Orbax's manager on its own handlers, and on mtckpt's."""
    from orbax_both import Both

    return Both(tmp_path, tiers)
