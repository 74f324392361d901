"""Modules and optimizers that their own loading refuses, or should: said where it can be known."""

from __future__ import annotations

import importlib
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from state_harness import plan, restore, save
from torch import nn, optim

from mtckpt import _state
from mtckpt.adapters import active_adapters
from mtckpt.errors import StateMismatch, UnsupportedState

fake_pg: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")


class SavesMore(nn.Linear):
    """As quantised layers: what describes the weight is saved beside it, and loaded by others."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = torch.ones(2)
        destination[f"{prefix}weight.quant_state.nf4"] = torch.zeros(3, dtype=torch.uint8)


class SavesExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


@pytest.mark.parametrize("kind", [SavesMore, SavesExtra])
def test_what_no_load_takes_back_is_said_when_it_is_saved(kind: type[nn.Linear]) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(kind(2, 3)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(model.state_dict())
    for _ in range(2):
        with pytest.raises(UnsupportedState, match="does not take back") as caught:
            save({"m": model})
        assert kind.__qualname__ in str(caught.value)
        assert str(caught.value.details["path"]).startswith("1.0.")


def drop_more(state: Any, prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def drop_later(_: Any, keys: Any = None) -> None:
    if keys is not None:
        keys.unexpected_keys.clear()


@pytest.mark.parametrize("where", ["part", "outside", "post", "whole"])
def test_whoever_loads_itself_may_save_what_it_likes(where: str) -> None:
    model: Any = nn.Sequential(nn.Sequential(SavesMore(2, 3)))
    if where == "part":
        model[0][0].register_load_state_dict_pre_hook(lambda _, *more: drop_more(*more))
    elif where == "outside":
        model[0].register_load_state_dict_pre_hook(
            lambda _, state, prefix, *more: drop_more(state, f"{prefix}0.", *more)
        )
    elif where == "post":
        model.register_load_state_dict_post_hook(drop_later)
    else:
        setattr(model, "load_state_dict", drop_later)  # noqa: B010 - as a user would, untyped
    model.load_state_dict(model.state_dict())
    restore(save({"m": model}), {"m": model})


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        *(("Adam", "RAdam"), ("RAdam", "Adam"), ("Adamax", "Adam"), ("NAdam", "Adam")),
        *(("Adam", "AdamW"), ("AdamW", "Adam"), ("RMSprop", "Adagrad")),
        *(("Adagrad", "Adadelta"), ("SGD", "RMSprop"), ("Adamax", "RAdam"), ("RAdam", "Adamax")),
    ],
)
def test_torchs_kinds_of_optimizers_are_told_apart(saved: str, live: str) -> None:
    """Torch takes each of them, and goes on as another optimizer or fails in the next step."""
    parameters = [nn.Parameter(torch.ones(1))]
    one, other = (getattr(optim, kind)(parameters) for kind in (saved, live))
    differ = "decoupled_weight_decay" if "AdamW" in (saved, live) else "settings"
    with pytest.raises(StateMismatch, match=differ):
        plan(save({"o": one}), {"o": other})
    restore(save({"o": one}), {"o": getattr(optim, saved)(parameters)})


def test_names_of_parameters_are_no_settings() -> None:
    """As of an older torch, which lacks one, in a job whose optimizer was not given names."""
    saved = optim.AdamW(nn.Linear(1, 1).named_parameters(), lr=3.0)
    del saved.param_groups[0]["decoupled_weight_decay"]
    live = optim.AdamW(nn.Linear(1, 1).parameters())
    restore(save({"o": saved}), {"o": live})
    assert live.param_groups[0]["lr"] == 3


class AcceleratedOptimizer(optim.Optimizer):
    """As Accelerate's: nothing of its own, not even what every optimizer has."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


def test_an_optimizer_that_accelerate_prepared_is_the_one_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.optimizer", sys.modules[__name__])

    def made(kind: type[optim.Optimizer], *sizes: int) -> Any:
        groups = [{"params": [nn.Parameter(torch.ones(1)) for _ in range(n)]} for n in sizes]
        return AcceleratedOptimizer(kind(groups))  # type: ignore[call-arg]

    first = made(optim.Adam, 2)
    for parameter in first.param_groups[0]["params"]:
        parameter.grad = torch.ones(1)
    first.optimizer.step()
    saved, live = save({"o": first}), made(optim.Adam, 2)
    restore(saved, {"o": live})
    assert repr(live.state_dict()) == repr(first.state_dict())
    for other in (made(optim.RAdam, 2), made(optim.Adam, 1, 1)):
        with pytest.raises(StateMismatch, match="o/param_groups"):
            plan(saved, {"o": other})


class Slow(optim.SGD):
    """As optimizers around optimizers: a state of a form of its own."""

    seen: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"fast": super().state_dict(), "slow": [torch.ones(2)], "steps": 7}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["fast"])
        self.seen = state_dict["slow"], state_dict["steps"]


def test_an_optimizer_of_its_own_kind_may_save_what_it_likes() -> None:
    saved = save({"o": Slow([nn.Parameter(torch.ones(1))], lr=3.0)})
    live = Slow([nn.Parameter(torch.ones(1))])
    restore(saved, {"o": live})
    (slow,), steps = live.seen
    assert torch.equal(slow, torch.ones(2))
    assert steps == 7
    assert live.param_groups[0]["lr"] == 3
    with pytest.raises(StateMismatch, match="Slow here, array in the checkpoint"):
        plan(save({"o": torch.ones(1)}), {"o": live})


def replicated(state: dict[str, Any], *, by_plan: bool = False) -> set[str]:
    """The top-level keys below which something is the same on all ranks; ``by_plan``, as a save
    asks that goes by the plan of the last one."""
    for adapter in active_adapters():
        if not by_plan:
            adapter.survey(state)
        with ThreadPoolExecutor(1) as other:  # which has another state
            other.submit(adapter.survey, {}).result()
    flat = _state.flatten(state, active_adapters())
    return {flat.paths[i].partition("/")[0] for i in flat.replicas}


def test_each_rank_has_its_share_of_a_zero_redundancy_optimizer() -> None:
    """Under the same numbers each rank has other parameters: DDP does not make those alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its module compiles others by what is deprecated
        from torch.distributed.optim import ZeroRedundancyOptimizer

    def make() -> tuple[Any, Any]:
        wrapped = nn.parallel.DistributedDataParallel(
            nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        )
        return wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), optim.Adam, lr=0.1)

    store = fake_pg.FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=1, world_size=2)
    try:
        wrapped, zero = make()
        for parameter in wrapped.parameters():
            parameter.grad = torch.ones_like(parameter)
        zero.step()
        zero.param_groups[0]["lr"] = 0.5  # as a schedule does, after the step
        for optimizer in (zero, zero.optim):
            assert replicated({"m": wrapped, "o": optimizer}) == {"m"}
        parameters = list(wrapped.parameters())
        some, others = optim.SGD(parameters[:1], momentum=0.9), optim.Adam(parameters[1:])
        some.step()
        others.step()
        assert replicated({"m": wrapped, "o": some}) == {"m"}
        assert replicated({"m": wrapped, "o": some, "others": others}) == {"m", "o", "others"}
        wrapped.module[1].requires_grad_(False)
        rest = optim.Adam(list(wrapped.module[0].parameters()))
        rest.step()
        assert replicated({"m": wrapped, "o": rest}) == {"m", "o"}
        wrapped.module[1].requires_grad_()  # which others may step from now on
        assert replicated({"m": wrapped, "o": rest}, by_plan=True) == {"m"}
        saved = save({"m": wrapped, "o": zero})
        _, live = make()
        restore(saved, {"o": live})
        assert [group["lr"] for group in live.param_groups + live.optim.param_groups] == [0.5] * 2
        # All that is trained may be this rank's share: the others have nothing of it.
        tuned = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
        tuned[0].requires_grad_(False)
        adapted = nn.parallel.DistributedDataParallel(tuned)
        alone = ZeroRedundancyOptimizer(tuned.parameters(), optim.Adam)
        tuned[1].weight.grad = torch.ones(2, 4)
        alone.step()
        assert alone.optim.state
        assert replicated({"m": adapted, "o": alone}) == {"m"}
        pairs = zip(zero.optim.state.values(), live.optim.state.values(), strict=True)
        for one, other in pairs:
            assert torch.equal(one["exp_avg"], other["exp_avg"])
    finally:
        torch.distributed.destroy_process_group()


class PassesOn:
    """What it saves is a module's, versions included, as a TensorDict's flat state has them."""

    def __init__(self) -> None:
        self.module = nn.BatchNorm1d(2)
        self.versions: Any = None

    def state_dict(self) -> Any:
        return self.module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.versions = state._metadata
        self.module.load_state_dict(state)


def test_versions_beside_the_names_of_a_state_stay_with_it() -> None:
    one, other = PassesOn(), PassesOn()
    one.module(torch.rand(3, 2))
    restore(save({"m": one}), {"m": other})
    assert other.versions[""]["version"] == nn.BatchNorm1d._version
    assert repr(one.module.running_mean) == repr(other.module.running_mean)


class Packed(nn.Linear):
    """As Transformer Engine: bytes, of which there are none before the first step."""

    packed = b""

    def get_extra_state(self) -> Any:
        return torch.frombuffer(bytearray(self.packed), dtype=torch.uint8) if self.packed else None

    def set_extra_state(self, state: Any) -> None:
        self.packed = b"" if state is None else state.numpy().tobytes()


@pytest.mark.parametrize(("there", "here"), [(b"scales", b"none"), (b"scales", b""), (b"", b"x")])
def test_extra_state_is_whatever_its_module_takes(there: bytes, here: bytes) -> None:
    saved, live = nn.Sequential(Packed(2, 2)), nn.Sequential(Packed(2, 2))
    saved[0].packed, live[0].packed = there, here  # type: ignore[assignment]
    restore(save({"m": saved}), {"m": live})
    assert live[0].packed == there
