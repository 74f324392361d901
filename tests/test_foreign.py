"""Who finds nothing of mtckpt's is told what of other libraries is there."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import mtckpt
from mtckpt import _foreign
from mtckpt.errors import StepNotFound

ORBAX = ("_METADATA", "default/_METADATA", "5/_METADATA", "5/default/_METADATA")
DCP = (".metadata", "step_5/.metadata")


@pytest.mark.parametrize("name", [*ORBAX, *DCP])
def test_whose_checkpoints_they_are_is_told_with_what_reads_them(tmp_path: Path, name: str) -> None:
    place = tmp_path / "of mine"
    (place / name).parent.mkdir(parents=True)
    (place / name).touch()
    with pytest.raises(StepNotFound) as caught:
        mtckpt.load(place)
    whose, end = ("Orbax", "NAME") if name in ORBAX else ("torch.distributed", "NAME --unpickle")
    assert f"a checkpoint of {whose}" in caught.value.actions[-1]
    assert caught.value.actions[-1].endswith(f"mtckpt import '{place}' LOCATION --run {end}")


def test_nothing_is_told_of_what_is_not_there(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "_METADATA").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "not there", deep / "_METADATA", "s3://bucket/run"):
        assert _foreign.hints(place) == []
    assert len(_foreign.hints(tmp_path / "a")) == 1


def test_a_run_that_begins_beside_them_says_so(
    tmp_path: Path, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = tmp_path / "r" / "5" / "default"
    item.mkdir(parents=True)
    (item / "_METADATA").touch()
    state = {"w": np.zeros(3)}
    for disk in (tmp_path, tmp_path / "r"):
        with (
            mtckpt.Checkpointer("r", [mtckpt.Ram(), mtckpt.Disk(disk)], timeout_s=20) as run,
            caplog.at_level(logging.WARNING, "mtckpt"),
        ):
            assert not run.restore(state)
            with pytest.raises(StepNotFound) as caught:
                run.restore(state, source=tmp_path / "r")
        told = f"{tmp_path / 'r'} has a checkpoint of Orbax"
        assert f"run r begins at step 0, and {told}" in caplog.text
        assert told in str(caught.value)
        caplog.clear()
