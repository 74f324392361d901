"""What a saved step holds, whatever happens to the state, the slots and the processes around it."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_worker import Life, Nursery, make_state, read_log, what_differs

import mtckpt
from mtckpt.errors import RunLocked, WaitTimeout

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

TIMEOUT_S = 20.0


def open_run(tmp_path: Path, run: str = "r", **settings: Any) -> mtckpt.Checkpointer:
    tiers: list[mtckpt.Ram | mtckpt.Disk] = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1, keep=20),
    ]
    return mtckpt.Checkpointer(run, tiers, timeout_s=TIMEOUT_S, **{"max_stall_s": 10.0, **settings})


def save_now(checkpointer: mtckpt.Checkpointer, step: int, state: Any) -> mtckpt.Save:
    save = checkpointer.save(step, state)
    save.wait("staged", timeout_s=TIMEOUT_S)
    save.wait("local", timeout_s=TIMEOUT_S)
    return save


def agent_pid(runtime_dir: Path) -> int:
    return int((runtime_dir / "agent.pid").read_text())


def wait_for(what: Callable[[], bool], name: str, timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {name}"
        time.sleep(0.01)


@pytest.fixture
def nursery(runtime_dir: Path) -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_values_are_those_at_the_call(tmp_path: Path) -> None:
    """Whatever is done to the tensors as soon as save() has returned."""
    state: dict[str, Any] = {
        "array": np.zeros(500_001, "f4"),
        "tensor": torch.zeros(400_001),
        "view": torch.zeros(300, 400).t(),
        "plain": {"n": 0, "items": [0, 0]},
    }
    with open_run(tmp_path) as checkpointer:
        for step in range(1, 6):
            state["array"][:] = step
            state["tensor"].fill_(step)
            state["view"].copy_(torch.full((400, 300), float(step)))
            state["plain"]["n"] = step
            state["plain"]["items"][:] = [step, -step]
            save = checkpointer.save(step, state)
            state["array"][:] = 99
            state["tensor"].fill_(99)
            state["view"].fill_(99)
            state["plain"]["items"][:] = [99, 99]
            save.wait("local", timeout_s=TIMEOUT_S)
            restored: dict[str, Any] = {
                "array": np.empty(500_001, "f4"),
                "tensor": torch.empty(400_001),
                "view": torch.empty(300, 400).t(),
                "plain": {"n": -1, "items": [1, 1]},
            }
            assert checkpointer.restore(restored).step == step
            assert (restored["array"] == step).all()
            assert (restored["tensor"] == step).all()
            assert (restored["view"] == step).all()
            assert restored["plain"] == {"n": step, "items": [step, -step]}


def _changes() -> Iterator[tuple[str, dict[str, Any]]]:
    """States that follow one another: each differs from the last in one way, and in its values."""
    yield "first", {"a": np.arange(6.0), "b": {"c": np.zeros(3, "i4")}}
    yield "values", {"a": np.arange(6.0) + 1, "b": {"c": np.ones(3, "i4")}}
    yield "storage", {"a": np.arange(12.0)[::2], "b": {"c": np.full(3, 2, "i4")}}
    yield "shape", {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.full(3, 3, "i4")}}
    yield "size", {"a": np.arange(200_000.0), "b": {"c": np.full(3, 4, "i4")}}
    yield "dtype of the same size", {"a": np.arange(200_000), "b": {"c": np.full(3, 5, "f4")}}
    yield "dtype", {"a": np.arange(200_000, dtype="f4"), "b": {"c": np.full(3, 6, "i2")}}
    yield "a new key", {"a": np.arange(7.0), "b": {"c": np.zeros(3), "d": np.ones(2)}}
    yield "a key less", {"b": {"c": np.zeros(3), "d": np.full(2, 9.0)}}
    yield "two change places", {"b": {"c": np.full(2, 9.5), "d": np.zeros(3)}}
    yield "a list for a dict", {"b": [np.full(2, 8.5), np.zeros(3)]}
    yield "plain for an array", {"b": [4, np.zeros(3)]}
    yield "plain of another type", {"b": [4.5, np.zeros(3)]}
    yield "order of keys", {"z": np.zeros(1), "b": [4.5, np.ones(3)]}
    yield "a tie", {"z": (tied := np.arange(3.0)), "b": [4.5, tied]}
    yield "no tie", {"z": np.arange(3.0), "b": [4.5, np.arange(3.0) + 1]}


def _blank(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_blank(item) for item in value]
    if isinstance(value, np.ndarray):
        return np.full(value.shape, 77, value.dtype)
    return type(value)(77)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype and np.array_equal(left, right))
    return bool(left == right and type(left) is type(right))


def test_no_change_of_the_state_is_saved_by_a_stale_plan(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        for step, (what, state) in enumerate(_changes(), 1):
            save_now(checkpointer, step, state)
            restored = _blank(state)
            assert checkpointer.restore(restored).step == step, what
            assert _equal(restored, state), f"{what}: {restored}"


def test_optimizer_before_and_after_its_first_step_and_with_a_group_more(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make(num_groups: int) -> tuple[torch.nn.ModuleList, torch.optim.Optimizer]:
        model = torch.nn.ModuleList([torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)])
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1)
        if num_groups == 2:
            optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
        return model, optimizer

    def train(model: torch.nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss = model[1](model[0](torch.ones(2, 5))).pow(2).sum()
        loss.backward()
        optimizer.step()

    model, optimizer = make(1)
    with open_run(tmp_path) as checkpointer:
        for step in range(1, 5):
            if step == 3:
                optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
            if step in (2, 4):
                train(model, optimizer)
            save_now(checkpointer, step, {"model": model, "optimizer": optimizer})
            fresh, fresh_optimizer = make(2 if step >= 3 else 1)
            restored = checkpointer.restore({"model": fresh, "optimizer": fresh_optimizer})
            assert restored.step == step
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, fresh.state_dict()[name]), (step, name)
            wanted, got = optimizer.state_dict(), fresh_optimizer.state_dict()
            assert wanted["param_groups"] == got["param_groups"]
            assert wanted["state"].keys() == got["state"].keys()
            for index, moments in wanted["state"].items():
                for name, value in moments.items():
                    assert torch.equal(value, got["state"][index][name]), (step, index, name)


def test_nothing_live_shares_memory_with_a_slot(tmp_path: Path, ram_dir: Path) -> None:
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "a": np.arange(100_000.0),
        "n": 1,
    }
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    older = open_run(tmp_path)  # which would close itself, and free memory, if nobody had it
    save_now(older, 1, state)
    with open_run(tmp_path) as checkpointer:  # the older one is fenced and frees nothing
        restored = checkpointer.restore(state)
        assert (restored.step, list(restored.sources)) == (1, ["ram"])
        (shard,) = ram_dir.rglob("step-000000000001.*/rank-00000.safetensors")
        before = shard.read_bytes()
        for parameter in model.parameters():
            parameter.data.fill_(7)
        for moments in optimizer.state.values():
            for tensor in moments.values():
                tensor.fill_(7)
        state["a"][:] = 7
        assert shard.read_bytes() == before
        for step in range(2, 5):
            state["a"][:] = step
            save_now(checkpointer, step, state)
            assert all((tensor == 7).all() for tensor in model.parameters())
        (flushed,) = (tmp_path / "disk").rglob("step-000000000001.*/rank-00000.safetensors")
        assert flushed.read_bytes() == before
        assert (state["a"] == 4).all()


def test_a_parked_reader_sees_its_bytes_unchanged_for_ten_saves(
    tmp_path: Path, ram_dir: Path
) -> None:
    from mtckpt.tiers import LocalTier

    state: dict[str, Any] = {"a": np.zeros(300_000), "n": 0}
    with open_run(tmp_path) as checkpointer:
        state["a"][:] = 1
        save_now(checkpointer, 1, state)
        (shard,) = ram_dir.rglob("step-*/rank-00000.safetensors")
        root = shard.parent.parent.parent
        tier = LocalTier(root, name="ram", read_only=True)
        with (
            tier.lease(shard.relative_to(root).as_posix()) as lease,
            mmap.mmap(lease.fd, 0, prot=mmap.PROT_READ) as mapped,
        ):
            before = bytes(mapped)
            middle = len(before) // 2
            for step in range(2, 12):
                state["a"][:] = step
                save = checkpointer.save(step, state)
                assert save.skipped is None
                save.wait("staged", timeout_s=TIMEOUT_S)
                assert mapped[middle : middle + 4096] == before[middle : middle + 4096]
            assert bytes(mapped) == before
            assert os.pread(lease.fd, len(before), 0) == before
        tier.close()


def test_a_roll_back_comes_back_from_every_tier(
    tmp_path: Path, ram_dir: Path, runtime_dir: Path
) -> None:
    def state_at(value: int) -> dict[str, Any]:
        return {"a": np.full(50_000, value, "i8"), "n": value}

    disk = mtckpt.Disk(tmp_path / "disk", every=1, keep=100)

    def open_it() -> mtckpt.Checkpointer:
        tiers: list[mtckpt.Ram | mtckpt.Disk] = [mtckpt.Ram(every=1), disk]
        return mtckpt.Checkpointer("roll", tiers, timeout_s=TIMEOUT_S, max_stall_s=10.0)

    with open_it() as checkpointer:
        for step in (300, 500, 700, 1000):
            save_now(checkpointer, step, state_at(step))
    first = open_it()
    state = state_at(0)
    assert first.restore(state, step=500).step == 500
    assert state["n"] == 500
    save_now(first, 510, state_at(-510))
    # As if killed: nothing is closed, and the next one finds what lies there.
    second = open_it()
    restored = second.restore(state := state_at(0))
    assert (restored.step, list(restored.sources)) == (510, ["ram"])
    assert (state["a"] == -510).all()
    os.kill(agent_pid(runtime_dir), signal.SIGKILL)
    for path in ram_dir.iterdir():
        shutil.rmtree(path)
    second = open_it()
    restored = second.restore(state := state_at(0))
    assert (restored.step, list(restored.sources)) == (510, ["disk"])
    assert (state["a"] == -510).all()
    save_now(second, 1000, state_at(-1000))
    second.close()
    with open_it() as third:
        assert third.restore(state).step == 1000
        assert (state["a"] == -1000).all()


def test_a_stopped_agent_costs_the_loop_the_stall_and_no_more(
    tmp_path: Path, runtime_dir: Path
) -> None:
    state: dict[str, Any] = {"a": np.zeros(100_000), "n": 0}
    tiers: list[mtckpt.Ram | mtckpt.Disk] = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
    ]
    checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=TIMEOUT_S, max_stall_s=0.3)
    save_now(checkpointer, 1, state)
    agent = agent_pid(runtime_dir)
    os.kill(agent, signal.SIGSTOP)
    try:
        called_off = []
        for step in range(2, 6):
            began_s = time.monotonic()
            save = checkpointer.save(step, state)
            took_s = time.monotonic() - began_s
            assert took_s < 2.0, f"step {step} took {took_s:.1f} s of training"
            if save.skipped:
                called_off.append(save.skipped)
            else:
                with pytest.raises(WaitTimeout, match="not staged yet"):
                    save.wait("staged", timeout_s=0.2)
        assert len(called_off) >= 2
        assert "agent" in called_off[0]
    finally:
        os.kill(agent, signal.SIGCONT)
    state["a"][:] = 6
    wait_for(lambda: not checkpointer.save(next(_steps), state).skipped, "saves go on")
    checkpointer.close(timeout_s=30.0)


_steps = iter(range(6, 1_000_000))


def test_a_second_live_process_is_refused_or_fences_the_first(
    tmp_path: Path, nursery: Nursery
) -> None:
    """Two trainers of one run: exactly one goes on, and the other one is told by a typed error."""
    first = Life("r", str(tmp_path / "disk"), str(tmp_path / "1.log"), 1, max_steps=10**6)
    second = Life("r", str(tmp_path / "disk"), str(tmp_path / "2.log"), 2, max_steps=10**6)
    pids = [nursery.start(first)]
    wait_for(lambda: len(read_log(Path(first.log))) > 3, "the first trains")
    pids.append(nursery.start(second))

    def refused() -> list[int]:
        found = []
        for number, life in enumerate((first, second)):
            text = Path(life.log).read_text() if Path(life.log).exists() else ""
            if RunLocked.__name__ in text:
                found.append(number)
        return found

    try:
        wait_for(lambda: bool(refused()), "one is told")
        time.sleep(0.3)
        assert len(refused()) == 1
        living = (first, second)[1 - refused()[0]]
        before = len(read_log(Path(living.log)))
        wait_for(lambda: len(read_log(Path(living.log))) > before, "the other goes on")
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            nursery.wait(pid)


def test_a_pipe_of_the_trainer_closes_when_the_trainer_ends(tmp_path: Path) -> None:
    """``python train.py | cat``: nothing that the trainer started holds its output open."""
    script = tmp_path / "train.py"
    script.write_text(
        "import numpy as np, mtckpt, os\n"
        f"c = mtckpt.Checkpointer('r', [mtckpt.Ram(every=1), mtckpt.Disk({str(tmp_path)!r})])\n"
        "s = c.save(1, {'a': np.zeros(1000)}); s.wait('staged', timeout_s=20)\n"
        "print('trained', flush=True)\n"
        "os._exit(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.run(
        f"{sys.executable} {script} 2>&1 | cat",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
        check=False,
    )
    assert "trained" in process.stdout


def test_the_state_of_a_killed_worker_is_whole() -> None:
    """The check that the kill tests rely on can fail."""
    state = make_state(3, 8)
    assert not what_differs(state, 8)
    assert what_differs(state, 9)
    for name in ("w", "half", "bytes", "scalar"):
        broken = make_state(3, 8)
        broken[name].reshape(-1).view("u1")[-1] ^= 1
        assert name in what_differs(broken, 8)
    older = {**make_state(3, 8), "w": make_state(3, 7)["w"]}
    assert "w is not" in what_differs(older, 8)
    other = {**make_state(3, 8), "w": make_state(4, 8)["w"]}
    assert "w is not" in what_differs(other, 8)
