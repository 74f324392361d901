"""Damage found in the middle of a restore that places what it has checked: who still has what."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt import _delivery
from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.cpu import CpuEngine
from mtckpt.capture.engine import AnyEngine
from mtckpt.errors import NoHealthyStep, RestoreFailed, StateMismatch

SIZE = 5 * CHUNK_BYTES // 8 + 3


def state_of(step: int) -> dict[str, Any]:
    return {
        "a": np.full(SIZE, float(step)),
        "b": np.full(SIZE, step + 0.5),
        "c": np.arange(7) + step,
    }


def other_state_of(step: int) -> dict[str, Any]:
    """Two steps that do not fit one template."""
    return {"model": {**state_of(step), **({"more": np.ones(3)} if step == 1 else {})}}


def tiers_of(disk: str) -> list[Any]:
    return [mtckpt.Ram(every=1, slots=3), mtckpt.Disk(disk, every=1)]


def killed_after_two(disk: Path, states: str = "state_of") -> list[Any]:
    """Two steps in RAM and on disk, of a trainer that was killed; returns the tiers."""
    command = f"import test_delivery; test_delivery.save_two({str(disk)!r}, {states!r})"
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": path}, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    return tiers_of(str(disk))


def save_two(disk: str, states: str) -> None:
    """In a process of its own, which ends without closing anything: memory is not freed."""
    checkpointer = mtckpt.Checkpointer("run", tiers_of(disk))
    make = globals()[states]
    for step in (1, 2):
        checkpointer.save(step, make(step)).wait("local")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def saved(runtime_dir: Path, tmp_path: Path) -> list[Any]:
    return killed_after_two(tmp_path / "disk")


def damage(root: Path, step: int, *, at: int = -SIZE * 8) -> None:
    """One bit of array "b" in the shard of that step, far enough behind the start of "a"."""
    (path,) = root.rglob(f"step-{step:012d}*/rank-00000.safetensors")
    with path.open("r+b") as file:
        file.seek(at, 2)
        byte = file.read(1)
        file.seek(at, 2)
        file.write(bytes([byte[0] ^ 4]))


def same(state: dict[str, Any], step: int) -> bool:
    return all(np.array_equal(state[name], value) for name, value in state_of(step).items())


@pytest.fixture(params=[0, 1 << 30], ids=["checked while placed", "staged"])
def cheap_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", request.param)
    return int(request.param)


def test_a_tensor_that_ram_has_damaged_comes_from_disk(
    saved: list[Any], ram_dir: Path, cheap_bytes: int
) -> None:
    damage(ram_dir, 2)
    state = state_of(0)
    with mtckpt.Checkpointer("run", saved) as again:
        restored = again.restore(state)
        assert restored.step == 2
        assert restored.sources == {"ram": SIZE * 8 + 56, "disk": SIZE * 8}
        assert same(state, 2)


def test_the_older_step_is_loaded_over_everything(
    saved: list[Any], ram_dir: Path, tmp_path: Path, cheap_bytes: int
) -> None:
    for root in (ram_dir, tmp_path / "disk"):
        damage(root, 2)
    state = state_of(0)
    with mtckpt.Checkpointer("run", saved) as again:
        restored = again.restore(state)
        assert restored.step == 1
        assert "step 2" in restored.skipped
        assert same(state, 1)


def test_without_any_healthy_step_the_error_says_what_became_of_the_state(
    saved: list[Any], ram_dir: Path, tmp_path: Path, cheap_bytes: int
) -> None:
    for root in (ram_dir, tmp_path / "disk"):
        for step in (1, 2):
            damage(root, step)
    state = state_of(0)
    with mtckpt.Checkpointer("run", saved) as again:
        wanted = NoHealthyStep if cheap_bytes else RestoreFailed
        with pytest.raises(wanted) as caught:
            again.restore(state)
        reasons: Any = vars(caught.value).get("reasons") or caught.value.details["reasons"]
        assert [line[:6] for line in reasons] == ["step 2", "step 1"]
        assert same(state, 0) == bool(cheap_bytes)
        assert ("undefined" in str(caught.value)) != bool(cheap_bytes)
        # Whatever was placed was checked: the damaged chunk is what it was before.
        assert set(np.unique(state["b"])) <= {0.5, 1.5, 2.5}


def test_the_only_copy_of_the_only_step_is_checked_before_anything_changes(
    runtime_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)
    first = mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)])
    first.save(1, state_of(1)).wait("staged")
    del first
    damage(ram_dir, 1)
    state = state_of(0)
    with mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)]) as again:
        with pytest.raises(NoHealthyStep, match="live state unchanged"):
            again.restore(state)
        assert same(state, 0)


def test_memory_that_nobody_has_seen_is_filled_in_one_pass(
    runtime_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the last copy: should it be damaged, nothing that lives was touched."""
    read: list[list[int]] = []

    def fetch(engine: CpuEngine, fd: int, spans: Any, targets: Any, *more: Any, **how: Any) -> Any:
        read.append(list(targets))
        return fetch_all(engine, fd, spans, targets, *more, **how)

    fetch_all = CpuEngine.fetch
    monkeypatch.setattr(CpuEngine, "fetch", fetch)
    with mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)]) as first:
        first.save(1, state_of(1)).wait("staged")
        states = [state_of(0), state_of(0)]
        for array in (array for state in states for array in state.values()):
            array.flags.writeable = False  # so that another takes its place
        first.restore(states[0])
        assert same(states[0], 1)
        assert [all(targets) for targets in read] == [True]
        damage(ram_dir, 1)
        with pytest.raises(NoHealthyStep, match="live state unchanged"):
            first.restore(states[1])
        assert same(states[1], 0)


def test_an_older_step_that_does_not_fit_leaves_no_doubt_about_the_state(
    runtime_dir: Path, ram_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)
    tiers = killed_after_two(tmp_path / "disk", "other_state_of")
    for root in (ram_dir, tmp_path / "disk"):
        damage(root, 2)
    with (
        mtckpt.Checkpointer("run", tiers) as again,
        pytest.raises(RestoreFailed, match="undefined") as caught,
    ):
        again.restore({"model": state_of(0)})
    assert isinstance(caught.value.__cause__, StateMismatch)


def test_memory_stays_while_a_thread_that_was_given_up_may_write_to_it(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier that answers after all would else write into what is somebody else's by then."""
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", 0)
    answers = threading.Event()
    fetch_all = CpuEngine.fetch

    def fetch(engine: CpuEngine, fd: int, spans: Any, targets: Any, *more: Any, **how: Any) -> Any:
        if any(targets):
            assert answers.wait(30)
        return fetch_all(engine, fd, spans, targets, *more, **how)

    with mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)]) as first:
        first.save(1, state_of(1)).wait("staged")
        monkeypatch.setattr(CpuEngine, "fetch", fetch)
        # From here on only what was patched is waited for.
        monkeypatch.setattr(AnyEngine, "settle", lambda *_: setattr(first._link, "timeout_s", 0.1))
        live = state_of(0)
        array = weakref.ref(live["a"])
        with pytest.raises(RestoreFailed, match="stopped answering in the middle"):
            first.restore(live)
        del live
        gc.collect()
        assert array() is not None
        answers.set()
        for thread in threading.enumerate():
            if thread.name.startswith("mtckpt-read"):
                thread.join(30)
        gc.collect()
        assert array() is None


def restore_with_little_memory() -> None:
    """In a process of its own: what its address space may grow by is less than one array."""
    threading.stack_size(1 << 20)
    _delivery._CHEAP_BYTES = 1 << 30
    saved = {"large": np.ones(12 << 20), "small": np.ones(7)}
    with mtckpt.Checkpointer("run", [mtckpt.Ram(every=1)]) as checkpointer:
        checkpointer.save(1, saved).wait("staged")
        for large in (None, np.zeros(12 << 20)):  # for the array itself, and for staging it
            live: dict[str, Any] = {"large": large, "small": np.zeros(7)}
            with Path("/proc/self/statm").open() as file:
                size_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (size_bytes + (48 << 20), most))
            with pytest.raises(RestoreFailed, match="too little memory for a restore") as caught:
                checkpointer.restore(live)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            assert "live state unchanged" in str(caught.value)
            assert caught.value.details["live_state"] == "unchanged"
            assert not live["small"].any()
            assert checkpointer.restore(live)
            assert np.array_equal(live["large"], saved["large"])


def test_too_little_memory_is_said_to_be_that_of_a_restore(runtime_dir: Path) -> None:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", "import test_delivery; test_delivery.restore_with_little_memory()"],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
        timeout=60,
    )
    assert done.returncode == 0
