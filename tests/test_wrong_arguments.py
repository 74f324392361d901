"""What a user may give by mistake: an error of ours that says so, and not whatever breaks on it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt._handle import Save
from mtckpt._steps import metrics_of
from mtckpt.agent.protocol import ram_base
from mtckpt.errors import CheckpointError, UsageError

pytestmark = pytest.mark.usefixtures("runtime_dir", "ram_dir")
NO_SECONDS: list[Any] = [None, "60", -1, math.nan, math.inf, 1e300, True]


@pytest.mark.parametrize("value", NO_SECONDS, ids=repr)
@pytest.mark.parametrize("name", ["timeout_s", "max_stall_s"])
def test_times_of_a_checkpointer(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}=.*must be a number of seconds"):
        mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path)], **{name: value})


def test_times_of_waits(tmp_path: Path) -> None:
    save = Save(1, planned={"ram": "staged"})
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "d")]) as checkpointer:
        for value in NO_SECONDS:
            for wait in (save.wait, checkpointer.close):
                with pytest.raises(UsageError, match="must be a number of seconds"):
                    wait(timeout_s=value)
        checkpointer.save(1, {"w": np.ones(3)})  # it is open still


@pytest.mark.parametrize("make", [lambda path: mtckpt.Disk(path), lambda path: iter([path])])
def test_tiers_that_are_no_list(tmp_path: Path, make: Any) -> None:
    with pytest.raises(UsageError, match="must be a list") as caught:
        mtckpt.Checkpointer("r", make(tmp_path))
    assert "tiers=[Ram(), Disk(...)]" in str(caught.value)


@pytest.mark.parametrize("rename", [lambda path: 5, lambda path: path.encode(), lambda path: True])
def test_a_rename_that_gives_no_path(tmp_path: Path, rename: Any) -> None:
    state = {"w": np.ones(3)}
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "d")]) as checkpointer:
        checkpointer.save(1, state).wait("local")
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "d")]) as checkpointer:
        live = {"w": np.zeros(3)}
        with pytest.raises(UsageError, match="rename gives a"):
            checkpointer.restore(live, rename=rename)
        assert not live["w"].any()


def test_a_rename_that_cannot_be_called(tmp_path: Path) -> None:
    state = {"w": np.ones(3)}
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "d")]) as checkpointer:
        checkpointer.save(1, state).wait("local")
        with pytest.raises(CheckpointError, match="rename"):
            checkpointer.restore(state, rename={"w": "v"})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [b"disk", 3, None, ["a"]], ids=repr)
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises(UsageError, match=r"path=.*must be a text or a Path"):
        mtckpt.Checkpointer("r", [mtckpt.Disk(path)])


def test_a_path_that_is_empty() -> None:
    with pytest.raises(UsageError, match="path='' names no directory"):
        mtckpt.Checkpointer("r", [mtckpt.Disk("")])


def test_a_directory_that_can_never_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said when a run is opened for the first time. One that had it goes on without, and so may
    one that a store may know."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "later")
    for path in ("/proc/x/y", tmp_path / "file" / "disk"):
        with pytest.raises(UsageError, match=r"cannot be made: No") as caught:
            mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), mtckpt.Disk(path)])
        assert "directory in one that you may write to" in str(caught.value)
    store = mtckpt.ObjectStore(f"file://{tmp_path}/store")
    for tiers in ([mtckpt.Disk("/proc/x"), store], [mtckpt.Disk(tmp_path / "link")]):
        mtckpt.Checkpointer("r", tiers).close()
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "disk" / "a")]) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)})
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").touch()
    mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "disk" / "a")]).close()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.setenv("MTCKPT_RUNTIME_DIR", str(tmp_path / "new"))
    Path(ram_base(), "r").mkdir(parents=True)
    mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "disk" / "a")]).close()


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``mtckpt.load`` takes it: a directory called ``~`` is what nobody means."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with mtckpt.Checkpointer("r", [mtckpt.Disk("~/disk")]) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)}, tiers="all").wait("local", timeout_s=30)
    assert not (tmp_path / "~").exists()
    assert [step.step for step in mtckpt.steps("~/disk/r")] == [1]
    with mtckpt.Checkpointer("other", [mtckpt.Disk("~/disk")]) as checkpointer:
        state = {"w": np.zeros(3)}
        assert checkpointer.restore(state, source="~/disk/r").step == 1


@pytest.mark.parametrize("run", [3, "", None, Path("r")], ids=repr)
def test_runs_without_a_name(run: Any) -> None:
    with pytest.raises(UsageError, match="a run needs a name"):
        mtckpt.Checkpointer(run)


def test_metrics_are_a_dict() -> None:
    metrics: Any = [0.5]
    with pytest.raises(UsageError, match="must be a dict of names and numbers"):
        metrics_of(1, metrics)
