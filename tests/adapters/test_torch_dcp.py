"""``torch.distributed.checkpoint`` in one process, through tiers: what it promises holds too."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt.errors import StepExists, UnsupportedState, UsageError

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from torch.distributed.checkpoint.default_planner import (  # noqa: E402
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.planner import SavePlan  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402

from mtckpt.adapters.torch.dcp import Reader, Writer  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("runtime_dir"),
    # DCP says in each call that there are no other ranks.
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[mtckpt.Checkpointer]:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1, keep=10)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10) as made:
        yield made


def restored(model: Any, optimizer: Any, target: dict[str, Any]) -> None:
    set_state_dict(
        model,
        optimizer,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
    )


def state_of(fill: float) -> dict[str, Any]:
    return {
        "tensor": torch.full((300, 7), fill),
        "view": torch.full((6, 8), fill).t()[::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(fill),
        "half": torch.full((5,), fill, dtype=torch.bfloat16),
        "nested": {
            "list": [1, {"t": torch.full((2,), fill)}, torch.full((3,), fill)],
            "pair": (fill, torch.full((2, 2), fill)),
            "plain": [1, 2.5, "a", None, True],
            "bytes": bytes(range(256)),
            "numpy": np.full((2, 3), fill),
            "number": 2**80,
        },
    }


def blank(value: Any) -> Any:
    """The same names, with other things in them."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(each) for key, each in value.items()}
    if isinstance(value, list) and any(isinstance(each, (dict, torch.Tensor)) for each in value):
        return [blank(each) for each in value]
    return None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    return type(one) is type(other) and bool(one == other)


def test_what_was_saved_is_loaded_in_place(checkpointer: mtckpt.Checkpointer) -> None:
    for step in (1, 2):
        dcp.save(state_of(step), storage_writer=Writer(checkpointer, step))
    for step in (2, 1):
        target = blank(state_of(0))
        tensor = target["tensor"]
        reader = Reader(checkpointer, step)
        dcp.load(target, storage_reader=reader)
        assert reader.step == step
        assert target["tensor"] is tensor
        assert same(target, state_of(step))


def test_it_is_a_checkpoint_like_any_other(
    checkpointer: mtckpt.Checkpointer, tmp_path: Path
) -> None:
    state = state_of(3)
    writer = Writer(checkpointer, 3, stage="local")
    dcp.save(state, storage_writer=writer)
    with mtckpt.load(tmp_path / "disk" / "r", framework="torch") as checkpoint:
        assert torch.equal(checkpoint["nested/list/1/t"], state["nested"]["list"][1]["t"])
        assert checkpoint.plain["nested/plain/2"] == "a"
        tree = checkpoint.tree()
    tree["nested"]["numpy"] = tree["nested"]["numpy"].numpy()
    assert same(tree, state)
    target = state_of(0)
    assert checkpointer.restore(target).step == 3
    assert same(target, state)


def test_what_the_checkpointer_saved_is_loaded_by_dcp(checkpointer: mtckpt.Checkpointer) -> None:
    model = torch.nn.Linear(4, 3)
    checkpointer.save(1, {"model": model, "n": 7}, tiers="all").wait("staged")
    other = torch.nn.Linear(4, 3)
    target: dict[str, Any] = {"model": other, "n": 0}
    dcp.load(target, storage_reader=Reader(checkpointer))
    assert target["n"] == 7
    assert torch.equal(other.weight, model.weight)


def test_an_async_save_has_the_values_of_its_call(checkpointer: mtckpt.Checkpointer) -> None:
    state = state_of(4)
    saving = dcp.async_save(state, storage_writer=Writer(checkpointer, 4))
    state["tensor"].zero_()
    state["nested"]["list"][1]["t"].zero_()
    state["nested"]["plain"].append("later")
    state["new"] = torch.ones(1)
    saving.result(timeout=30)
    target = blank(state_of(0))
    dcp.load(target, storage_reader=Reader(checkpointer, 4))
    assert same(target, state_of(4))


def test_a_stager_of_the_callers_own_may_copy_first(checkpointer: mtckpt.Checkpointer) -> None:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    state = {"w": torch.ones(1000)}
    saving = dcp.async_save(
        state,
        storage_writer=Writer(checkpointer),
        async_stager=BlockingAsyncStager(),
        checkpoint_id="runs/7/step-12",
    )
    state["w"].zero_()
    saving.result(timeout=30)
    reader = Reader(checkpointer)
    dcp.load(state, storage_reader=reader)
    assert (reader.step, state["w"].sum().item()) == (12, 1000)


class Counter:
    def __init__(self) -> None:
        self.count = 0
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "t": torch.full((2,), self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        assert state["t"].tolist() == [self.count] * 2
        self.loads += 1


def test_stateful_objects_and_optimizers(checkpointer: mtckpt.Checkpointer) -> None:
    def build(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        for _ in range(seed):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = build(2)
    counter = Counter()
    counter.count = 5
    names = ("model", "optimizer")
    parts = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    state = {**parts, "counter": counter}
    dcp.save(state, checkpoint_id="step-2", storage_writer=Writer(checkpointer))

    other, other_optimizer = build(1)
    fresh = Counter()
    target = {
        **dict(zip(names, get_state_dict(other, other_optimizer), strict=True)),
        "counter": fresh,
    }
    dcp.load(target, checkpoint_id="step-2", storage_reader=Reader(checkpointer))
    restored(other, other_optimizer, target)
    assert (fresh.count, fresh.loads) == (5, 1)
    assert same(other.state_dict(), model.state_dict())
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def test_what_differs_is_said_before_anything_changes(checkpointer: mtckpt.Checkpointer) -> None:
    dcp.save({"a": torch.ones(3), "n": 1}, storage_writer=Writer(checkpointer, 1))
    reader = Reader(checkpointer, 1)
    live = torch.zeros(3)
    with pytest.raises(BaseException, match="Missing key in checkpoint state_dict: b"):
        dcp.load({"a": live, "b": torch.ones(1)}, storage_reader=reader)
    with pytest.raises(BaseException, match=r"Size mismatch .* for a"):
        dcp.load({"a": torch.zeros(4)}, storage_reader=reader)
    with pytest.raises(BaseException, match="no tier has step 9"):
        dcp.load({"a": live}, storage_reader=Reader(checkpointer, 9))
    assert not live.any()
    partial: dict[str, Any] = {"a": live, "b": torch.zeros(1)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(partial, storage_reader=reader, planner=planner)
    assert partial["a"].tolist() == [1, 1, 1]
    assert partial["b"].tolist() == [0]


def test_tensors_of_any_layout_are_filled_in_place(checkpointer: mtckpt.Checkpointer) -> None:
    saved = torch.arange(60.0).reshape(6, 10)
    dcp.save({"a": saved, "b": saved, "c": saved.t()}, storage_writer=Writer(checkpointer, 1))
    backing = torch.zeros(6, 20)
    target = {"a": torch.zeros(10, 6).t(), "b": backing[:, ::2], "c": torch.zeros(10, 6)}
    weight = torch.nn.Parameter(torch.zeros(6, 10))
    dcp.load({**target, "a": weight}, storage_reader=Reader(checkpointer, 1))
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    assert torch.equal(weight, saved)
    assert torch.equal(target["a"], saved)
    assert torch.equal(backing[:, ::2], saved)
    assert not backing[:, 1::2].any()
    assert torch.equal(target["c"], saved.t())
    other = {"a": torch.zeros(6, 10, dtype=torch.float64)}  # converted, as by DCP
    dcp.load(other, storage_reader=Reader(checkpointer, 1))
    assert torch.equal(other["a"], saved.double())


class Failing(DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        raise RuntimeError("no plan")


def test_a_file_in_memory_comes_back_where_it_was(checkpointer: mtckpt.Checkpointer) -> None:
    """States of trainers have them: what ``torch.save`` wrote into one."""
    file = io.BytesIO()
    torch.save([0.5, 0.25], file)
    dcp.save({"train": {"losses": file}}, storage_writer=Writer(checkpointer, 1))
    target: dict[str, Any] = {"train": {"losses": io.BytesIO()}}
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    found = target["train"]["losses"]
    assert found.tell() == file.tell() > 0
    found.seek(0)
    assert torch.load(found) == [0.5, 0.25]


def test_a_try_that_failed_is_not_taken_for_the_next(checkpointer: mtckpt.Checkpointer) -> None:
    state = {"w": torch.ones(2)}
    writer = Writer(checkpointer, 1)
    saving = dcp.async_save(state, storage_writer=writer, planner=Failing())
    with pytest.raises(BaseException, match="no plan"):
        saving.result(timeout=30)
    state["w"].zero_()
    with pytest.raises(BaseException, match="step 1 was saved already"):
        dcp.save(state, storage_writer=writer)


def test_a_step_is_saved_once(checkpointer: mtckpt.Checkpointer) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=Writer(checkpointer, 1))
    with pytest.raises(BaseException, match="step 1 was saved already") as caught:
        dcp.save({"w": torch.zeros(2)}, storage_writer=Writer(checkpointer, 1))
    (failure, _) = caught.value.failures[0]  # type: ignore[attr-defined]  # a CheckpointException
    assert isinstance(failure, StepExists)
    with pytest.raises(StepExists):
        dcp.async_save({"w": torch.zeros(2)}, storage_writer=Writer(checkpointer, 1))
    target = {"w": torch.zeros(2)}
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    assert target["w"].tolist() == [1, 1]


class Hostile:
    """Pickles into a call: if storage ever reached an unpickler, it would happen."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


def test_no_byte_of_storage_is_unpickled(
    checkpointer: mtckpt.Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved as bytes stays bytes, and what is unpickled was pickled here and now."""
    payload = pickle.dumps(Hostile())
    made: list[bytes] = []
    true_load = torch.load

    def load(file: io.BytesIO, **options: Any) -> Any:
        made.append(file.getvalue())
        return true_load(file, **options)

    monkeypatch.setattr(torch, "load", load)
    dcp.save({"p": payload, "n": 1, "w": torch.ones(2)}, storage_writer=Writer(checkpointer, 1))
    target = {"p": b"", "n": 0, "w": torch.zeros(2)}
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    assert target["p"] == payload
    assert len(made) == 2


@dataclasses.dataclass
class Odd:
    x: int


def test_what_would_be_pickled_is_refused(checkpointer: mtckpt.Checkpointer) -> None:
    refused: list[tuple[Any, str]] = [
        ({"a": {1: Odd(1)}}, "a.1"),
        ({"a": (1, Odd(1))}, "a"),
        ({"deep": {"model": torch.nn.Linear(1, 1)}}, "deep.model"),
        ({"set": {1}}, "set"),
    ]
    for value, path in refused:
        with pytest.raises(UnsupportedState) as caught:
            dcp.async_save(value, storage_writer=Writer(checkpointer, 1))
        assert caught.value.details["path"] == path
    assert checkpointer.steps() == []


class Renaming(DefaultSavePlanner):
    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        renamed = {f"new_{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class Halving(DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        return super().transform_object(write_item, object).half()


def test_planners_may_rename_and_not_change_values(checkpointer: mtckpt.Checkpointer) -> None:
    state = {"w": torch.ones(2)}
    dcp.save(state, storage_writer=Writer(checkpointer, 1), planner=Renaming())
    target = {"new_w": torch.zeros(2)}
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    assert target["new_w"].tolist() == [1, 1]
    saving = dcp.async_save(state, storage_writer=Writer(checkpointer, 2), planner=Renaming())
    with pytest.raises(BaseException, match="Renaming has other keys"):
        saving.result(timeout=30)
    with pytest.raises(BaseException, match="Halving has a transform_object of its own"):
        dcp.save(state, storage_writer=Writer(checkpointer, 3), planner=Halving())
    flat = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=Writer(checkpointer, 4), planner=flat)
    with pytest.raises(BaseException, match="flatten_state_dict=False is pickled"):
        dcp.save({"n": state}, storage_writer=Writer(checkpointer, 5), planner=flat)
    cached = DefaultSavePlanner(enable_plan_caching=True)
    for step in (6, 7):
        writer = Writer(checkpointer, step, stage="local")
        dcp.save(state, storage_writer=writer, planner=cached)
    assert [each.step for each in checkpointer.steps()][-2:] == [6, 7]


def test_a_writer_needs_a_step_and_stays_in_its_process(checkpointer: mtckpt.Checkpointer) -> None:
    with pytest.raises(UsageError, match="no step was given"):
        dcp.async_save({"w": torch.ones(1)}, storage_writer=Writer(checkpointer))
    with pytest.raises(UsageError, match="no step in the name"):
        dcp.save({"w": torch.ones(1)}, storage_writer=Writer(checkpointer), checkpoint_id="last")
    with pytest.raises(UsageError, match="belongs to the process"):
        pickle.dumps(Writer(checkpointer, 1))


def test_all_ranks_of_the_job_have_to_come(checkpointer: mtckpt.Checkpointer) -> None:
    writer = Writer(checkpointer, 1)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    with pytest.raises(UsageError, match="2 of 1 ranks came"):
        writer.prepare_global_plan([SavePlan([]), SavePlan([])])


def test_where_no_tier_is_due_nothing_is_saved(tmp_path: Path) -> None:
    with mtckpt.Checkpointer("d", [mtckpt.Ram(every=5), mtckpt.Disk(tmp_path / "disk")]) as made:
        for step in range(7):
            dcp.save({"n": step}, storage_writer=Writer(made, step, tiers="due"))
        assert [each.step for each in made.steps()] == [5]


def test_a_damaged_copy_is_passed_over(checkpointer: mtckpt.Checkpointer, tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=Writer(checkpointer, 1, stage="local"))
    ram = next(
        path
        for path in Path(checkpointer._session.ram_path).rglob("rank-*.safetensors")
        if not str(path).startswith(str(tmp_path / "disk"))
    )
    data = bytearray(ram.read_bytes())
    data[-5] ^= 1
    ram.chmod(0o600)
    ram.write_bytes(data)
    target = blank(state_of(0))
    dcp.load(target, storage_reader=Reader(checkpointer, 1))
    assert same(target, state_of(1))
