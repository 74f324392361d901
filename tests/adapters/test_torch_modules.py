"""Modules: bytes straight into live parameters, or through their own hooks where they have any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_harness import fills, plan, restore, save
from torch import nn

from mtckpt._state import register_codec
from mtckpt.adapters.torch import objects
from mtckpt.errors import StateMismatch, UnsupportedState


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Dropout()),
        nn.Embedding(7, 5),
        nn.LSTM(5, 6),
        nn.MultiheadAttention(4, 2),
    )
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.fill_(seed)
    return model


def same(one: Any, other: Any) -> bool:
    here, there = one.state_dict(), other.state_dict()
    return list(here) == list(there) and all(torch.equal(here[k], there[k]) for k in here)


def test_a_module_is_filled_where_it_lies() -> None:
    model, live = network(1), network(2)
    parameters = list(live.parameters())
    addresses = [p.data_ptr() for p in parameters]
    placing, _ = plan(save({"model": model}), {"model": live})
    wanted = {t.data_ptr() for t in live.state_dict().values()}
    assert {fill.address for fill in fills(placing)} == wanted  # no second copy of the model
    restore(save({"model": model}), {"model": live})
    assert same(model, live)
    assert [p.data_ptr() for p in live.parameters()] == addresses
    assert all(a is b for a, b in zip(live.parameters(), parameters, strict=True))


def test_paths_are_the_names_of_state_dict() -> None:
    model = network(1)
    assert save({"m": model}).paths == [f"m/{name}" for name in model.state_dict()]
    assert objects.plain_state(model) is not None


def test_buffers_that_are_not_persistent_are_left_alone() -> None:
    def make(value: float) -> Any:
        module: Any = nn.Module()
        module.register_buffer("kept", torch.full((2,), value))
        module.register_buffer("passing", torch.full((2,), value), persistent=False)
        module.register_parameter("absent", None)
        return module

    live = make(2)
    saved = save(make(1))
    assert saved.paths == ["kept"]
    restore(saved, live)
    assert live.kept.tolist() == [1, 1]
    assert live.passing.tolist() == [2, 2]


def tied(seed: int, device: str = "cpu") -> Any:
    torch.manual_seed(seed)
    with torch.device(device):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_stored_and_wanted_once() -> None:
    model, live = tied(1), tied(2)
    saved = save({"m": model})
    by_path = dict(zip(saved.paths, saved.arrays, strict=True))
    assert by_path["m/1.weight"].bytes_of == saved.paths.index("m/0.weight")
    placing, _ = plan(saved, {"m": live})
    assert len([f for f in fills(placing) if f.address == live[0].weight.data_ptr()]) == 1
    restore(saved, {"m": live})
    assert same(model, live)
    assert live[0].weight is live[1].weight


def test_tied_weights_into_a_model_that_does_not_tie_them() -> None:
    model, live = tied(1), tied(2)
    live[1].weight = nn.Parameter(torch.zeros(5, 3))
    restore(save({"m": model}), {"m": live})
    assert same(model, live)
    assert live[0].weight is not live[1].weight


def test_a_meta_module_gets_memory_once_and_stays_tied() -> None:
    model, live = tied(1), tied(2, "meta")
    live[0].weight.requires_grad_(False)
    live[2].weight.marker = "kept"
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=1.0)
    placing, _ = plan(save({"m": model}), {"m": live})
    size_bytes = sum(fill.size_bytes for fill in fills(placing))
    assert size_bytes == sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
    restore(save({"m": model}), {"m": live})
    assert same(model, live)
    assert live[0].weight is live[1].weight
    assert not live[0].weight.requires_grad
    assert live[2].weight.requires_grad
    assert live[2].weight.marker == "kept"
    assert isinstance(live[2].weight, nn.Parameter)
    # An optimizer that was made before the parameters had memory trains them all the same.
    live[2].bias.grad = torch.ones(3)
    optimizer.step()
    assert live[2].bias.tolist() == [-1, -1, -1]


def test_a_meta_parameter_that_someone_watches_is_replaced() -> None:
    import weakref

    model, live = tied(1), tied(2, "meta")
    watcher = weakref.ref(live[0].weight)
    restore(save({"m": model}), {"m": live})
    assert same(model, live)
    assert live[0].weight is live[1].weight
    assert watcher() is not live[0].weight


def test_views_and_expanded_parameters_are_copied_into() -> None:
    class Odd(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.turned = nn.Parameter(torch.randn(3, 4).t())
            self.register_buffer("wide", torch.randn(1, 4).expand(3, 4))
            self.last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))

    model, live = Odd(1), Odd(2)
    strides = [t.stride() for t in live.state_dict().values()]
    version = live.turned._version
    restore(save(model), live)
    assert same(model, live)
    assert [t.stride() for t in live.state_dict().values()] == strides
    assert live.turned._version > version


def test_all_differences_are_reported_and_nothing_is_changed() -> None:
    saved = save({"m": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(1, 1))})
    live = nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 3).half())
    live.register_buffer("extra", torch.zeros(1))
    before = copy.deepcopy(live)
    with pytest.raises(StateMismatch) as caught:
        plan(saved, {"m": live})
    details = vars(caught.value)
    assert details["missing"] == ("m/extra",)
    assert details["unused"] == ("m/2.weight", "m/2.bias")
    assert len(details["differing"]) == 4
    assert same(before, live)
    assert "partial=True" in str(caught.value)


def test_partial_restores_what_both_have() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    live: Any = nn.Sequential(nn.Linear(2, 2))
    live.register_buffer("extra", torch.ones(1))
    restore(save({"m": model}), {"m": live}, partial=True)
    assert torch.equal(model[0].weight, live[0].weight)
    assert live.extra.tolist() == [1]


class Extra(nn.Linear):
    """State beside the tensors."""

    def __init__(self, note: Any) -> None:
        super().__init__(2, 2)
        self.note = note

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def test_extra_state_is_restored() -> None:
    model: Any = nn.Sequential(Extra([1, torch.ones(2)]))
    live: Any = nn.Sequential(Extra(None))
    restore(save({"m": model}), {"m": live})
    assert live[0].note[0] == 1
    assert live[0].note[1].tolist() == [1, 1]
    assert torch.equal(live[0].weight, model[0].weight)


class Packed(nn.Linear):
    """Saves its weight under another name and shape."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return {"packed": self.weight.detach().reshape(-1).clone(), "scale": 3}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        with torch.no_grad():
            self.weight.copy_(state["packed"].reshape(self.weight.shape))
        self.loaded_scale = state["scale"]


def test_a_load_state_dict_of_its_own_is_called() -> None:
    model, live = Packed(2, 3), Packed(2, 3)
    saved = save({"m": model})
    assert saved.paths == ["m/packed"]
    restore(saved, {"m": live})
    assert torch.equal(model.weight, live.weight)
    assert live.loaded_scale == 3


def test_hooks_run() -> None:
    called: list[str] = []

    def rename(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        called.append("pre")
        state[f"{prefix}weight"] = state.pop(f"{prefix}old_weight")

    def after(module: nn.Module, incompatible: Any) -> None:
        called.append("post")

    old = nn.Module()
    old.register_parameter("old_weight", nn.Parameter(torch.ones(2, 2)))
    live: Any = nn.Linear(2, 2, bias=False)
    live.register_load_state_dict_pre_hook(rename)
    live.register_load_state_dict_post_hook(after)
    restore(save({"m": old}), {"m": live})  # the hook knows better than our diff
    assert called == ["pre", "post"]
    assert live.weight.tolist() == [[1, 1], [1, 1]]

    def add(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state["added"] = torch.ones(1)

    saver: Any = nn.Linear(2, 2)
    saver.register_state_dict_post_hook(add)
    assert "m/added" in save({"m": saver}).paths


@pytest.mark.parametrize(
    "register", ["register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"]
)
def test_one_hook_of_a_part_is_enough(register: str) -> None:
    live = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    called: list[Any] = []
    getattr(live[1], register)(lambda *arguments: called.append(arguments[0]))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    restore(save({"m": model}), {"m": live})
    assert called == [live[1]]
    assert same(model, live)


def test_a_module_with_a_post_hook_only_is_still_checked() -> None:
    live: Any = nn.Linear(2, 2)
    live.register_load_state_dict_post_hook(lambda module, keys: None)
    with pytest.raises(StateMismatch) as caught:
        plan(save({"m": nn.Linear(2, 3, bias=False)}), {"m": live})
    assert vars(caught.value)["missing"] == ("m/bias",)
    assert len(vars(caught.value)["differing"]) == 1


def test_a_meta_module_with_hooks_gets_its_tensors_assigned() -> None:
    model = Extra("note")
    with torch.device("meta"):
        live = Extra(None)
    restore(save(model), live)
    assert torch.equal(live.weight, model.weight)
    assert live.note == "note"


def test_a_method_put_on_one_module_counts() -> None:
    live: Any = nn.Linear(2, 2)
    live.state_dict = lambda *a, **k: {"only": torch.ones(1)}
    assert save({"m": live}).paths == ["m/only"]


def test_wrappers_keep_the_names_of_torch() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    averaged.update_parameters(nn.Linear(2, 2))
    live = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    saved = save({"ema": averaged})
    assert saved.paths == ["ema/n_averaged", "ema/module.weight", "ema/module.bias"]
    restore(saved, {"ema": live})
    assert same(averaged, live)


class Noted(nn.Module):
    """A module with its own idea of what its state is, around another one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.notes = 0

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPED: dict[str, Callable[[Callable[[nn.Module], Any]], Any]] = {
    "all of it": lambda wrap: wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "a part": lambda wrap: nn.Sequential(wrap(nn.Linear(2, 2)), nn.BatchNorm1d(2)),
    "a part of one with hooks": lambda wrap: Noted(nn.Sequential(wrap(nn.Linear(2, 2)))),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=list(WRAPPED))
@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_says_nothing_of_compiling(make: Any, there: bool) -> None:
    bare = list(make(lambda module: module).state_dict())
    model = make(compiled if there else lambda module: module)
    live = make(compiled if not there else lambda module: module)
    assert (list(model.state_dict()) == bare) is not there
    saved = save({"m": model})
    assert saved.paths == [f"m/{name}" for name in bare if name != "_extra_state"]
    restore(saved, {"m": live})
    for one, other in zip(model.parameters(), live.parameters(), strict=True):
        assert torch.equal(one, other)


def test_names_that_compiling_made_are_read() -> None:
    live: Any = nn.Sequential(nn.Linear(2, 2))
    saved = save({"m": {"_orig_mod.0.weight": torch.ones(2, 2), "_orig_mod.0.bias": torch.ones(2)}})
    restore(saved, {"m": live})
    assert torch.equal(live[0].weight, torch.ones(2, 2))
    restore(save({"m": nn.Sequential(nn.Linear(2, 2))}), {"m": compiled(live)})
    assert not torch.equal(live[0].weight, torch.ones(2, 2))


def test_data_parallel_has_no_state_of_its_own() -> None:
    model, live = nn.DataParallel(network(1)), network(2)
    saved = save({"m": model})
    assert saved.paths == [f"m/{name}" for name in live.state_dict()]
    restore(saved, {"m": live})
    assert same(model.module, live)
    restore(save({"m": network(3)}), {"m": model})
    assert same(model.module, network(3))


class Scaled(torch.Tensor):
    """A tensor made of two, as quantised weights are."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)
        made.numbers, made.scale = numbers, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:  # type: ignore[override]  # torch's stub lacks func
        assert func is torch.ops.aten.detach.default  # what a parameter is made with
        return cls(args[0].numbers, args[0].scale)


def test_a_codec_carries_tensors_that_are_more_than_their_bytes() -> None:
    def make(fill: float) -> Any:
        model: Any = nn.Module()
        weight = Scaled(torch.full((3, 2), int(fill), dtype=torch.int8), torch.full((3,), fill))
        model.weight = nn.Parameter(weight, requires_grad=False)
        model.again = model.weight
        model.bias = nn.Parameter(torch.full((3,), fill))
        return model

    with pytest.raises(UnsupportedState, match="register_codec"):
        save({"m": make(2.0)})
    register_codec(
        Scaled,
        name="scaled",
        encode=lambda tensor: {"numbers": tensor.numbers, "scale": tensor.scale},
        decode=lambda tree: Scaled(tree["numbers"], tree["scale"]),
    )
    live = make(5.0)
    weight = live.weight
    restore(save({"m": make(2.0)}), {"m": live})
    assert live.weight is live.again is weight
    assert type(weight) is Scaled
    assert (weight.numbers.tolist(), weight.scale.tolist()) == ([[2, 2]] * 3, [2.0] * 3)
    assert live.bias.tolist() == [2.0] * 3


class Range(nn.Module):
    """Learns how many channels there are, as observers of quantisation do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("least", torch.arange(float(channels)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.least = torch.empty_like(state_dict[f"{prefix}least"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_part_that_loads_itself_may_change_its_shape() -> None:
    live: Any = nn.Sequential(nn.Linear(2, 3), Range(1))
    restore(save({"m": nn.Sequential(nn.Linear(2, 3), Range(3))}), {"m": live})
    assert live[1].least.tolist() == [0, 1, 2]
    with pytest.raises(StateMismatch, match=r"0\.weight: float32\[3, 2\] here"):
        plan(save({"m": nn.Sequential(nn.Linear(5, 3), Range(3))}), {"m": live})


def test_parametrized_modules() -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        return nn.Sequential(normed, nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)))

    model, live = make(1), make(2)
    restore(save({"m": model}), {"m": live})
    assert same(model, live)
    assert torch.equal(model(torch.ones(1, 2)), live(torch.ones(1, 2)))


@pytest.mark.parametrize("keys", ["mo", "om"])
def test_lazy_modules_take_their_shape_from_the_checkpoint(keys: str) -> None:
    model = nn.LazyLinear(3)
    model(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    live = nn.LazyLinear(3)
    other = torch.optim.AdamW(live.parameters())
    state = {"m": live, "o": other}
    restore(save({"m": model, "o": optimizer}), {key: state[key] for key in keys})
    assert torch.equal(live.weight, model.weight)
    moment = other.state[live.weight]["exp_avg"]
    assert torch.equal(moment, optimizer.state[model.weight]["exp_avg"])


def test_batch_norm_without_a_count_is_a_difference() -> None:
    saved = save({"m": nn.BatchNorm1d(2, track_running_stats=False)})
    with pytest.raises(StateMismatch) as caught:
        plan(saved, {"m": nn.BatchNorm1d(2)})
    assert len(vars(caught.value)["missing"]) == 3


def test_generators_go_on_where_they_were() -> None:
    generator, live = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    torch.rand(3, generator=generator)
    saved = save({"g": generator})
    restore(saved, {"g": live})
    assert torch.equal(torch.rand(9, generator=live), torch.rand(9, generator=generator))
    with pytest.raises(StateMismatch):
        plan(save({"g": {"state": torch.zeros(3, dtype=torch.uint8)}}), {"g": live})
    with pytest.raises(StateMismatch):
        plan(save({"g": 3}), {"g": live})


def test_a_module_where_the_checkpoint_has_something_else() -> None:
    with pytest.raises(StateMismatch, match="Linear here, plain in the checkpoint"):
        plan(save({"m": 3}), {"m": nn.Linear(1, 1)})


def test_a_distributed_wrapper_has_no_state_of_its_own() -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store.name}", rank=0, world_size=1
        )
        try:
            model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            live = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            saved = save({"m": model})
            assert saved.paths == ["m/weight", "m/bias"]
            restore(saved, {"m": live})
            assert same(model, live)
            restore(saved, {"m": (plain := nn.Linear(2, 2))})
            assert same(model.module, plain)
        finally:
            torch.distributed.destroy_process_group()
