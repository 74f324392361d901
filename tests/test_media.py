"""Disk tiers in memory, or on one device: said when the run is opened, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mtckpt
from mtckpt import _media
from mtckpt._media import Medium, warnings_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def test_memory_and_disks_that_fail_together_are_told() -> None:
    paths = {"disk": "/a", "disk-2": "/b", "disk-3": "/c", "disk-4": "/d"}
    media = {"disk": Medium(1, "ext4"), "disk-2": Medium(2, "xfs"), "disk-3": Medium(1, "ext4")}
    assert not warnings_of(paths, {"disk": media["disk"], "disk-2": media["disk-2"]})
    (both,) = warnings_of(paths, media)
    assert "disk-3 at /c and disk at /a are on one device" in both
    twice = {"disk": Medium(7, "tmpfs"), "disk-2": Medium(7, "tmpfs")}
    assert ["is memory (tmpfs)" in each for each in warnings_of(paths, twice)] == [True, True]


def test_it_is_said_once_when_a_run_is_opened(
    tmp_path: Path, ram_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_media, "_said", set())
    disks = mtckpt.Disk(ram_dir / "no" / "disk"), mtckpt.Disk(tmp_path / "a" / "b")
    for _ in range(2):
        mtckpt.Checkpointer("r", [mtckpt.Ram(), *disks, mtckpt.Disk(tmp_path / "c")]).close()
    said = [each.getMessage() for each in caplog.records if each.name == "mtckpt._media"]
    assert len(said) == 2
    assert f"{ram_dir}/no/disk is memory" in said[0]
    assert "are on one device" in said[1]
    assert not (ram_dir / "no").exists()


def test_memory_of_the_node_is_told_at_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mtckpt")
    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(tmp_path)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10) as checkpointer:
        for step in (1, 2):
            saved = checkpointer.save(step, {"w": np.zeros(1 << 20, np.uint8)})
            saved.wait("staged", timeout_s=20)
    (said,) = [each for each in caplog.messages if "memory of this node" in each]
    assert said.startswith("run r: memory of this node: 2 slots of 1.0 MiB, 2.0 MiB in all; "), said
