"""Runs whose last tier is an object store, end to end: a real agent, real files, a real store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path, run: str = "r", **settings: Any) -> mtckpt.Checkpointer:
    tiers = settings.pop("tiers", None) or [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
        mtckpt.ObjectStore(store_url(tmp_path), every=2),
    ]
    return mtckpt.Checkpointer(run, tiers, timeout_s=20, max_stall_s=10, **settings)


def store_url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def make_state(fill: float = 0.0) -> dict[str, Any]:
    return {"w": np.full((300, 7), fill, np.float32), "n": np.zeros((), np.int64), "note": "x"}


def test_everything_local_is_wiped_and_the_store_resumes(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        assert not checkpointer.restore(make_state())
        save = checkpointer.save(2, make_state(2.0))
        save.wait("durable", timeout_s=20)
        assert "durable" in save.reached
        checkpointer.save(3, make_state(3.0)).wait("local", timeout_s=20)
    shutil.rmtree(tmp_path / "disk")
    with open_run(tmp_path) as checkpointer:
        state = make_state()
        restored = checkpointer.restore(state)
        assert restored.step == 3  # close() sent the newest step, though it was not due
        assert list(restored.sources) == ["store"]
        assert (state["w"] == 3.0).all()
        assert [step.step for step in checkpointer.steps()] == [2, 3]
