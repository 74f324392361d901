"""Objects of a store that are damaged, missing, cut short or of another step are passed over.

The store has all that is left. An older step comes back, and the report names the object.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import until

import mtckpt
from mtckpt.errors import NoHealthyStep

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path) -> mtckpt.Checkpointer:
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk"),
        mtckpt.ObjectStore(f"file://{tmp_path}/store"),
    ]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def state(fill: float) -> dict[str, Any]:
    return {"w": np.full(100_000, fill, np.float32)}


def flip(new: Path, old: Path) -> None:
    data = bytearray(new.read_bytes())
    data[len(data) // 2] ^= 4
    new.write_bytes(data)


def remove(new: Path, old: Path) -> None:
    new.unlink()


def cut(new: Path, old: Path) -> None:
    new.write_bytes(new.read_bytes()[:-10])


def swap(new: Path, old: Path) -> None:
    new.write_bytes(old.read_bytes())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("safetensors", flip),
        ("safetensors", remove),
        ("safetensors", swap),
        ("xxh3", swap),
        ("json", cut),
        *(
            pytest.param(file, damage, marks=pytest.mark.torture)
            for file, damage in [("safetensors", cut), ("xxh3", flip), ("json", remove)]
        ),
    ],
)
def test_an_older_step_is_used_and_the_object_named(
    tmp_path: Path, file: str, damage: Callable[[Path, Path], None]
) -> None:
    with open_run(tmp_path) as run:
        for step in (1, 2):
            run.save(step, state(step)).wait("durable", timeout_s=20)

    def is_wiped() -> bool:
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        return not (tmp_path / "disk").exists()

    until(is_wiped)
    old, new = sorted((tmp_path / "store" / "r").glob(f"step-*/rank-00000.{file}"))
    damage(new, old)
    with open_run(tmp_path) as run:
        live = state(0)
        restored = run.restore(live)
        assert restored.step == 1
        assert list(restored.sources) == ["store"]
        assert (live["w"] == 1).all()
        told = restored.skipped["step 2"]
        assert "store" in told or "record" in told, told


def test_none_left_is_no_fresh_start(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.save(1, state(1)).wait("durable", timeout_s=20)
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    (shard,) = (tmp_path / "store" / "r").glob("step-*/rank-00000.safetensors")
    flip(shard, shard)
    run = open_run(tmp_path)
    live = state(0)
    with pytest.raises(NoHealthyStep, match="step 1"):
        run.restore(live)
    assert not live["w"].any()
    run.close(timeout_s=20)
