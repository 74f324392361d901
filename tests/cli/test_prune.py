"""prune where several runs, or a copy of one, lie beside each other: each goes by its own saves."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from builders import build_manifest, build_save
from click.testing import CliRunner

import mtckpt
from mtckpt.cli import main

pytestmark = pytest.mark.usefixtures("runtime_dir")
ARRAYS = {"w": np.arange(5000, dtype=np.float32)}


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "0.01")


def prune(*words: object) -> str:
    command = ["prune", *map(str, words), "--yes"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def steps_of(run_dir: Path) -> list[int]:
    """Those that have data: a store in a directory leaves directories."""
    return sorted(int(path.parent.name[5:17]) for path in run_dir.glob("step-*/*.safetensors"))


@pytest.mark.parametrize(("first", "second"), [(4, 9), (9, 4)])
def test_runs_in_one_place_are_pruned_each_by_its_newest(
    tmp_path: Path, first: int, second: int
) -> None:
    for run, steps in (("bert", first), ("gpt", second)):
        for step in range(1, steps + 1):
            build_save(tmp_path, run, step, ARRAYS, {})
    told = json.loads(prune(tmp_path, "--keep", 2, "--json"))
    assert steps_of(tmp_path / "bert") == [first - 1, first]
    assert steps_of(tmp_path / "gpt") == [second - 1, second]
    assert all(each["deleted"] == each["delete"] for each in told["steps"])


def test_a_copy_of_a_run_beside_it_is_pruned_by_what_is_in_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        build_save(tmp_path, "gpt", step, ARRAYS, {})
    shutil.copytree(tmp_path / "gpt", tmp_path / "older")
    build_save(tmp_path, "gpt", 4, ARRAYS, {})
    prune(tmp_path, "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [3, 4]
    assert steps_of(tmp_path / "older") == [2, 3]


def test_a_step_that_is_being_read_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        build_save(tmp_path, "gpt", step, ARRAYS, {})
    with mtckpt.load(tmp_path / "gpt", step=1) as checkpoint:
        assert checkpoint["w"][7] == 7
        result = CliRunner().invoke(main, ["prune", str(tmp_path), "--keep", "2", "--yes"])
        assert result.exit_code == 1
        assert "is being read" in result.stdout
        assert steps_of(tmp_path / "gpt") == [1, 3, 4]
    prune(tmp_path, "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [3, 4]


def test_readers_in_a_store_are_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave no trace there. Nobody begins to read what has no records; who has begun ends."""
    for step in (1, 2, 3, 4, 5):
        build_save(tmp_path, "gpt", step, ARRAYS, {})
    url = f"file://{tmp_path}/gpt"
    reader = mtckpt.load(url, step=1)
    waited = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        assert [step.step for step in mtckpt.steps(url)] == [4, 5]
        assert reader["w"][7] == 7
        again = build_save(tmp_path / "other", "gpt", 2, ARRAYS, {})
        (again / "rank-00000.json").rename(tmp_path / "gpt" / again.name / "rank-00000.json")

    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "77")
    monkeypatch.setattr(time, "sleep", meanwhile)
    result = CliRunner().invoke(main, ["prune", url, "--keep", "2", "--yes", "--json"])
    reader.close()
    assert waited == [77]
    told = {each["step"]: each for each in json.loads(result.stdout)["steps"]}
    assert "stored again" in told[2]["problem"]  # while it was let go
    assert [step for step, each in told.items() if each["deleted"]] == [1, 3]
    assert steps_of(tmp_path / "gpt") == [2, 4, 5]


def test_what_may_be_on_its_way_up_is_no_remains(tmp_path: Path) -> None:
    """Of the newest incarnation, without a record yet: an older step that is brought there late."""
    for step in (1, 2, 3, 4):
        path = build_save(tmp_path, "gpt", step, ARRAYS, {})
        if step == 2:
            build_manifest(path)
        if step < 3:
            (path / "rank-00000.json").unlink()
    prune(f"file://{tmp_path}/gpt", "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [1, 3, 4]  # step 2 was whole once: a deletion broke off
    build_save(tmp_path, "gpt", 5, ARRAYS, {}, incarnation=2, parent=(1, 4))
    prune(f"file://{tmp_path}/gpt", "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [4, 5]


def test_a_run_without_a_complete_step_does_not_stop_the_others(tmp_path: Path) -> None:
    build_save(tmp_path, "zero", 1, ARRAYS, {}, rank=0, world_size=2)
    for step in (1, 2, 3):
        build_save(tmp_path, "gpt", step, ARRAYS, {})
    prune(tmp_path, "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [2, 3]
    assert steps_of(tmp_path / "zero") == [1]
