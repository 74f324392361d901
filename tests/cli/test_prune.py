"""prune where several runs, or a copy of one, lie beside each other: each goes by its own saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import build_save
from click.testing import CliRunner

from mtckpt.cli import main

pytestmark = pytest.mark.usefixtures("runtime_dir")
ARRAYS = {"w": np.arange(5000, dtype=np.float32)}


def prune(*words: object) -> str:
    command = ["prune", *map(str, words), "--yes"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:17]) for path in run_dir.glob("step-*"))


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


def test_a_run_without_a_complete_step_does_not_stop_the_others(tmp_path: Path) -> None:
    build_save(tmp_path, "zero", 1, ARRAYS, {}, rank=0, world_size=2)
    for step in (1, 2, 3):
        build_save(tmp_path, "gpt", step, ARRAYS, {})
    prune(tmp_path, "--keep", 2)
    assert steps_of(tmp_path / "gpt") == [2, 3]
    assert steps_of(tmp_path / "zero") == [1]
