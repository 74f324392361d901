"""Containers with hardly any memory for slots, and one volume: captures lie beside the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _isolation
import numpy as np
import pytest

import mtckpt
from mtckpt._slots import BESIDE
from mtckpt.errors import SaveFailed, TierFull
from mtckpt.testing.groups import local_groups

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

STAGES_AND_DIES = """
import os, signal, sys
import numpy as np
import mtckpt
disk, beside = sys.argv[1:]
tiers = [mtckpt.Ram(f"{disk}/{beside}", every=1), mtckpt.Disk(disk, every=100)]
run = mtckpt.Checkpointer("s", tiers, timeout_s=20.0, max_stall_s=10.0)
run.save(2, {"w": np.full(300_000, 2.0)}).wait("staged", timeout_s=20)
os.kill(os.getpid(), signal.SIGKILL)
"""
Container = Callable[..., _isolation.Places]


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[Container]:
    """From each call on, what is opened finds an agent of its own, with so much memory."""
    made: list[_isolation.Places] = []

    def make(size: str = "1M") -> _isolation.Places:
        places = _isolation.make_places()
        made.append(places)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(places.ram)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("may not mount here")
        for name, value in places.environment().items():
            monkeypatch.setenv(name, value)
        return places

    yield make
    for places in made:
        _isolation.end_all(places.runtime)
        subprocess.run(["umount", "--lazy", str(places.ram)], check=False)
        _isolation.sweep(places)


def state_of(step: int) -> dict[str, Any]:
    return {"w": np.full(300_000, float(step))}


def open_run(run: str, *tiers: mtckpt.Ram | mtckpt.Disk) -> mtckpt.Checkpointer:
    return mtckpt.Checkpointer(run, list(tiers), timeout_s=20.0, max_stall_s=10.0)


def test_two_containers_with_one_volume_keep_out_of_each_others_way(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mtckpt.Disk(tmp_path / "d")
    first_place = container()
    first = open_run("r", disk)
    first.save(1, state_of(1)).wait("local", timeout_s=20)
    second_place = container()
    # It is gone at once, with its agent and all that was in the container.
    command = [sys.executable, "-c", STAGES_AND_DIES, str(tmp_path / "d"), BESIDE]
    done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    _isolation.end_agent(second_place.runtime)
    assert len(os.listdir(tmp_path / "d" / BESIDE)) == 2
    monkeypatch.setenv("MTCKPT_RUNTIME_DIR", str(first_place.runtime))
    monkeypatch.setenv("MTCKPT_RAM_DIR", str(first_place.ram))
    first.save(2, state_of(2)).wait("local", timeout_s=20)
    # What it had staged is beside the disk, and the next one goes on from there.
    container()
    live = state_of(0)
    with open_run("s", mtckpt.Disk(tmp_path / "d", every=100)) as third:
        restored = third.restore(live)
        assert (restored.step, list(restored.sources)) == (2, ["ram"])
        assert live["w"][0] == 2.0
        third.save(200, state_of(200)).wait("local", timeout_s=20)
    first.save(3, state_of(3)).wait("local", timeout_s=20)
    first.close(timeout_s=20)
    assert [step.step for step in mtckpt.steps(tmp_path / "d" / "r")] == [1, 2, 3]
    _isolation.end_agent(first_place.runtime)


def test_all_ranks_of_a_node_capture_beside_the_disk_where_memory_is_too_small(
    container: Container, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    container()

    def job(tiers: list[Any]) -> list[mtckpt.Checkpointer]:
        return [
            mtckpt.Checkpointer("ranks", tiers, group=group, timeout_s=20.0, max_stall_s=10.0)
            for group in local_groups(2)
        ]

    def both(ranks: list[mtckpt.Checkpointer], step: int) -> list[Any]:
        """Restore and save a step, on both; what each restored, or its error."""

        def work(each: mtckpt.Checkpointer) -> Any:
            live = state_of(0)
            restored = each.restore(live)
            if restored:
                assert live["w"][0] == restored.step
            each.save(step, state_of(step)).wait("local", timeout_s=20)
            return restored.step

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work, each) for each in ranks]
        return [future.exception() or future.result() for future in futures]

    def end(ranks: list[mtckpt.Checkpointer]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda each: each.close(timeout_s=20), ranks))

    ranks = job([mtckpt.Disk(tmp_path / "d")])
    assert both(ranks, 1) == [None, None]
    assert "2 ranks" in caplog.text
    assert "captured on disk" in caplog.text
    (own,) = (tmp_path / "d" / BESIDE).iterdir()
    assert {str(own)} == {each.status().tiers[0]["path"] for each in ranks}
    end(ranks)
    again = job([mtckpt.Disk(tmp_path / "d")])
    assert both(again, 2) == [1, 1]
    end(again)
    assert not (tmp_path / "d" / BESIDE).exists() or not list(own.glob("ranks*"))
    # Memory that was named is insisted on, and what helps is said.
    insisting = job([mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "d")])
    found = both(insisting, 3)
    end(insisting)
    full = [error for error in found if isinstance(error, TierFull)]
    assert full, found
    assert "for the slots of 2 ranks: 9.2 MiB needed" in str(full[0])
    assert "leave Ram() out" in str(full[0])
    # Nor is there room beside the disk: tried once, and said once.
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / BESIDE).write_bytes(b"a file")
    nowhere = job([mtckpt.Disk(tmp_path / "e")])
    for error in both(nowhere, 1):
        assert isinstance(error, TierFull)
        assert len({*error.actions}) == len(error.actions), error
    end(nowhere)


def test_what_outgrows_memory_amid_a_job_of_two_ranks_goes_on_beside_the_disk(
    container: Container, tmp_path: Path
) -> None:
    """Saves may be called off until what is in memory is on the disk; none fails."""
    container("4M")
    ranks = [
        mtckpt.Checkpointer(
            "grows", [mtckpt.Disk(tmp_path / "d")], group=group, timeout_s=20.0, max_stall_s=10.0
        )
        for group in local_groups(2)
    ]

    def both(step: int, size: int) -> list[str | None]:
        def save(each: mtckpt.Checkpointer) -> str | None:
            done = each.save(step, {"w": np.full(size, float(step))})
            with contextlib.suppress(SaveFailed):  # that of the other rank was called off
                done.wait("local", timeout_s=20)
            return done.skipped

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(save, ranks))

    def places() -> set[str]:
        return {os.path.dirname(each.status().tiers[0]["path"]) for each in ranks}

    beside = str(tmp_path / "d" / BESIDE)
    assert both(1, 1_000) == [None, None]
    assert beside not in places()
    step = 1
    while both(step := step + 1, 300_000) != [None, None]:  # 2.4 MB each
        assert step < 6
    assert places() == {beside}
    assert both(7, 300_000) == [None, None]
    live = {"w": np.zeros(300_000)}
    with ThreadPoolExecutor(2) as pool:
        restored = list(pool.map(lambda each: each.restore(dict(live)), ranks))
        list(pool.map(lambda each: each.close(timeout_s=20), ranks))
    assert [each.step for each in restored] == [7, 7]
    assert {"ram"} == {tier for each in restored for tier in each.sources}
