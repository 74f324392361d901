"""FSDP1 without FSDP's communication: what each rank of a pretended job would save and want.

A process group that does nothing lets one process be each rank in turn. The pieces of all ranks
are put together and held against the module before it was wrapped.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from state_harness import plan, restore, save
from torch import nn

from mtckpt.adapters.torch import surveying
from mtckpt.adapters.torch.flats import found_in
from mtckpt.adapters.torch.objects import state_of
from mtckpt.adapters.torch.sharded import Boxes
from mtckpt.errors import StateMismatch, UnsupportedState

fsdp: Any = pytest.importorskip("torch.distributed.fsdp")
FSDP: Any = fsdp.FullyShardedDataParallel
fake_pg: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")
CPU = torch.device("cpu")
RANKS = 4
Wrap = Callable[[Any], Any]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


class Net(nn.Module):
    """Tied weights, a buffer, a kernel whose channels come last in memory, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.conv = nn.Conv2d(3, 5, 3)
        kernel = self.conv.weight
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
        self.last = nn.Linear(7, 6, bias=False)
        self.again = nn.Linear(7, 6, bias=False)
        self.again.weight = self.last.weight
        self.norm = nn.BatchNorm1d(6)


def make() -> Net:
    torch.manual_seed(3)
    return Net()


def wrap(module: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        return FSDP(module, device_id=CPU, **options)


@contextmanager
def as_rank(rank: int, ranks: int = RANKS) -> Iterator[None]:
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def nested(**options: Any) -> Wrap:
    def build(net: Net) -> Any:
        net.conv = wrap(net.conv, **options)
        return wrap(net, **options)

    return build


def inside(net: Net) -> Any:
    """No FSDP at the root, which has parameters and buffers of its own."""
    net.first = wrap(net.first, use_orig_params=True)
    net.conv = wrap(net.conv, use_orig_params=True)
    return net


def ignoring(net: Net) -> Any:
    return wrap(net, ignored_modules=[net.conv], use_orig_params=False)


def checkpointing(net: Net) -> Any:
    module = importlib.import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    net.first = wrap(module.checkpoint_wrapper(net.first))
    return wrap(net, cpu_offload=fsdp.CPUOffload(offload_params=True))


def low(net: Net) -> Any:
    policy = fsdp.MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    return wrap(net, mixed_precision=policy)


def strategy(name: str, **options: Any) -> Wrap:
    return lambda net: wrap(net, sharding_strategy=fsdp.ShardingStrategy[name], **options)


def meshed(net: Net) -> Any:
    mesh = importlib.import_module("torch.distributed.device_mesh")
    pairs = mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return strategy("HYBRID_SHARD", device_mesh=pairs, use_orig_params=True)(net)


WRAPS: dict[str, Wrap] = {
    "flat": nested(use_orig_params=False),
    "pieces": nested(use_orig_params=True),
    "inside": inside,
    "ignoring": ignoring,
    "checkpointing": checkpointing,
    "low precision": low,
    "not sharded": strategy("NO_SHARD"),
    "not sharded, pieces": strategy("NO_SHARD", use_orig_params=True),
    "in pairs": meshed,
}


def step(parameters: Any) -> torch.optim.Optimizer:
    """One step of an optimizer that treats every element by itself."""
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel():
                parameter.grad = parameter.detach() * 3
    optimizer.step()
    return optimizer


def trees(build: Wrap) -> tuple[list[Any], list[Any]]:
    """What every rank would save of the module and of its optimizer."""
    modules, optimizers = [], []
    for rank in range(RANKS):
        with as_rank(rank):
            model = build(make())
            optimizer = step(model.parameters())
            surveying.survey({"o": optimizer, "m": [model]})
            modules.append(state_of(model))
            optimizers.append(state_of(optimizer))
    return modules, optimizers


def joined(values: list[Any]) -> torch.Tensor:
    """A value of all ranks as one. Boxes are the whole, each element as often as it is held."""
    first = values[0]
    if not isinstance(first, Boxes):
        assert all(torch.equal(value, first) for value in values)
        return first.detach()  # type: ignore[no-any-return]
    whole, times = torch.full(first.shape, torch.nan), torch.zeros(first.shape)
    for rank, value in enumerate(values):
        assert (value.shape, value.sharers) == (first.shape, tuple(range(RANKS)))
        assert rank in value.holders
        for offsets, tensor in value.boxes:
            box = tuple(slice(at, at + n) for at, n in zip(offsets, tensor.shape, strict=True))
            whole[box] = tensor.detach()
            times[box] += 1
    assert torch.equal(times, torch.full_like(times, len(first.holders)))
    return whole


@pytest.mark.parametrize("name", WRAPS)
def test_pieces_of_all_ranks_are_the_module_and_its_optimizer(name: str) -> None:
    plain = make()
    optimizer = step(plain.parameters())
    modules, optimizers = trees(WRAPS[name])
    expected = plain.state_dict()
    assert {frozenset(tree) for tree in modules} == {frozenset(expected)}
    for key, value in expected.items():
        assert torch.equal(joined([tree[key] for tree in modules]), value), key
    native = optimizer.state_dict()
    for tree in optimizers:
        assert tree["param_groups"] == native["param_groups"]
        assert tree["state"].keys() == native["state"].keys()
    for place, entry in native["state"].items():
        for moment, value in entry.items():
            found = joined([tree["state"][place][moment] for tree in optimizers])
            assert torch.equal(found, value), (place, moment)
    for tree in optimizers:  # each has its own count of steps
        assert len({id(entry["step"]) for entry in tree["state"].values()}) == len(tree["state"])


def test_state_that_is_there_before_the_first_step_counts_the_steps_of_others() -> None:
    """Of a parameter that this rank has no element of, whose piece is never stepped."""

    def state(rank: int) -> Any:
        with as_rank(rank):
            model = wrap(make(), use_orig_params=True)
            optimizer = torch.optim.Adagrad(model.parameters())
            for parameter in model.parameters():
                if parameter.numel():
                    parameter.grad = parameter.detach()
            optimizer.step()
            surveying.survey([model, optimizer])
            return state_of(optimizer)["state"]

    for rank in range(RANKS):
        found = state(rank).values()
        assert len(found) == 7
        assert {entry["step"].item() for entry in found} == {1}
        assert all(isinstance(entry["sum"], Boxes) for entry in found)


@pytest.mark.parametrize("name", ["flat", "pieces", "inside", "ignoring", "not sharded, pieces"])
def test_a_plain_state_is_restored_into_the_pieces_of_a_rank(name: str) -> None:
    plain = make()
    saved = save({"m": plain, "o": step(plain.parameters())})
    modules, optimizers = trees(WRAPS[name])
    for rank in range(RANKS):
        with as_rank(rank):
            model = WRAPS[name](make())
            optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
            surveying.survey([model, optimizer])
            restore(saved, {"m": model, "o": optimizer})
            assert same(state_of(model), modules[rank])
            assert same(state_of(optimizer), optimizers[rank])
            assert optimizer.param_groups[0]["lr"] == 0.1


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Boxes):
        pairs = zip(one.boxes, other.boxes, strict=True)
        return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_a_parameter_that_was_given_other_memory_is_saved_as_it_is() -> None:
    with as_rank(0):
        for options in ({"use_orig_params": True}, {"use_orig_params": False}):
            model = wrap(nn.Linear(8, 8), **options)
            parameter = next(model.parameters())
            parameter.data = parameter.data + 1
            found = found_in(model).tensors["weight"]
            assert isinstance(found, Boxes)
            pieces = torch.cat([piece.flatten() for _, piece in found.boxes])
            assert torch.equal(pieces, parameter.detach()[: pieces.numel()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_buffers_in_another_type_are_saved_and_restored_in_their_own(is_compiled: bool) -> None:
    with as_rank(0):
        net = make()
        inside: Any = torch.compile(net, backend="eager") if is_compiled else net
        model = low(inside)
        buffer = net.norm.running_mean
        assert buffer is not None
        saved = save({"m": make()})
        buffer.data = torch.full((6,), 3.0, dtype=torch.bfloat16)  # as FSDP does before it computes
        assert state_of(model)["norm.running_mean"].dtype == torch.float32
        restore(saved, {"m": model})
        assert torch.equal(buffer, torch.zeros(6, dtype=torch.bfloat16))


def test_what_an_optimizer_has_of_no_parameter_is_kept_and_its_names_are_its_own() -> None:
    plain = make()
    optimizer = torch.optim.Adam(plain.named_parameters())
    optimizer.state["seen"] = {"batches": 7}  # type: ignore[index]  # torch says tensors only
    saved = save({"o": optimizer})
    with as_rank(0):
        model = wrap(make(), use_orig_params=True)
        live = torch.optim.Adam(model.named_parameters())
        names = live.param_groups[0]["param_names"]
        surveying.survey([model, live])
        restore(saved, {"o": live})
        assert live.state["seen"] == {"batches": 7}  # type: ignore[index]  # as above
        assert live.param_groups[0]["param_names"] == names
        tree = state_of(live)
        assert tree["state"] == {"seen": {"batches": 7}}
        assert "param_names" not in tree["param_groups"][0]


def test_parameters_that_were_made_one_and_have_different_state_are_refused() -> None:
    plain = make()
    optimizer = step(plain.parameters())
    del optimizer.state[plain.first.bias]
    saved = save({"o": optimizer})
    with as_rank(1):
        model = wrap(make())
        live = torch.optim.Adam(model.parameters())
        surveying.survey([model, live])
        with pytest.raises(StateMismatch, match="have different state"):
            plan(saved, {"o": live})


def linears(*options: dict[str, Any] | None) -> list[Any]:
    """Modules of different shapes, and those that have options as FSDP's."""
    nets = [nn.Linear(8 + number, 9 + number) for number in range(len(options))]
    return [
        net if each is None else wrap(net, **each) for net, each in zip(nets, options, strict=True)
    ]


def shapes(optimizer: Any) -> list[tuple[int, ...]]:
    return [tuple(entry["exp_avg"].shape) for entry in state_of(optimizer)["state"].values()]


def test_an_optimizer_of_two_modules_has_one_after_the_other_as_it_was_given_them() -> None:
    with as_rank(0):
        for nets in (linears({}, {}), linears({}, {})[::-1]):
            optimizer = step([parameter for net in nets for parameter in net.parameters()])
            surveying.survey([optimizer, nets[1], nets[0]])
            one, other = ([tuple(s) for s in net._flat_param._shapes] for net in nets)
            assert shapes(optimizer) == [*one, *other]


def test_a_module_that_is_in_the_state_beside_what_it_is_a_part_of_has_its_place_there() -> None:
    with as_rank(0):
        first, inner, last = linears(None, {}, None)
        whole = wrap(nn.Sequential(first, inner, last))
        optimizer = step(whole.parameters())
        surveying.survey({"whole": whole, "part": inner, "optimizer": optimizer})
        assert shapes(optimizer) == [(9, 8), (9,), (10, 9), (10,), (11, 10), (11,)]


class Three(nn.Module):
    """Parameters of one shape: nothing but their order, or their names, tells which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.full((4, 3), n)) for n in (2.0, 3.0, 4.0))


def averages(optimizer: torch.optim.Optimizer, net: Three) -> list[float]:
    """A moment of each parameter, in the order of the module."""
    return [float(optimizer.state[each]["exp_avg"].mean()) for each in (net.a, net.b, net.c)]


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_moments_beside_ignored_parameters_go_by_name(use_orig_params: bool) -> None:
    """FSDP puts ignored parameters before others, or behind: where they were is not known."""
    plain = Three()
    optimizer = step(plain.parameters())
    expected = averages(optimizer, plain)
    trees = []
    for rank in range(RANKS):
        with as_rank(rank):
            net = Three()
            model = wrap(net, use_orig_params=use_orig_params, ignored_states=[net.b])
            ours = step(model.parameters())
            surveying.survey([model, ours])
            trees.append(state_of(ours))
            live = torch.optim.Adam(model.parameters())
            surveying.survey([model, live])
            with pytest.raises(
                StateMismatch, match="their order is not known, and what was saved goes by n"
            ):
                plan(save({"o": optimizer}), {"o": live})
            named = torch.optim.Adam(plain.named_parameters())
            named.load_state_dict(optimizer.state_dict())
            restore(save({"o": named}), {"o": live})
            assert same(state_of(live), trees[-1])
    entries = {
        name: {key: joined([tree["state"][name][key] for tree in trees]) for key in entry}
        for name, entry in trees[0]["state"].items()
    }
    saved = save({"o": {**trees[0], "state": entries}})
    fresh = Three()
    live = torch.optim.Adam(fresh.parameters())
    surveying.survey({"model": torch.nn.DataParallel(fresh), "o": live})
    restore(saved, {"o": live})
    assert averages(live, fresh) == expected
    surveying.survey({"o": live})
    with pytest.raises(StateMismatch, match="those here are not known: put the module into the"):
        plan(saved, {"o": live})


def test_ignored_parameters_of_an_optimizer_without_names_of_their_own_are_refused() -> None:
    with as_rank(0):
        nets = [Three(), Three()]
        models = [wrap(net, ignored_states=[net.b], use_orig_params=True) for net in nets]
        optimizer = step([each for model in models for each in model.parameters()])
        surveying.survey([models, optimizer])
        with pytest.raises(UnsupportedState, match="have a name of their own"):
            state_of(optimizer)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda entry: entry.update(exp_avg=torch.ones(3)),
            r"of shape \[7, 6\] here, of shape \[3\]",
        ),
        (lambda entry: entry.update(seen=7), "differs among parameters that FSDP has made one"),
    ],
)
def test_what_one_moment_cannot_hold_is_refused(change: Any, why: str) -> None:
    optimizer = step(make().parameters())
    for entry in optimizer.state.values():
        entry["seen"] = 6
    change(next(iter(optimizer.state.values())))
    saved = save({"o": optimizer})
    with as_rank(1):
        model = wrap(make())
        live = torch.optim.Adam(model.parameters())
        surveying.survey([model, live])
        with pytest.raises(StateMismatch, match=why):
            plan(saved, {"o": live})


def test_no_gathered_copy_outlives_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation may have one of its own, in the type of the parameters."""
    monkeypatch.setenv("FSDP_USE_FULL_PREC_IN_EVAL", "1")
    saved = save({"m": nn.Linear(8, 9)})
    with as_rank(0):
        model = wrap(nn.Linear(8, 9), mixed_precision=fsdp.MixedPrecision(torch.bfloat16))
        for is_training in (True, False):
            model.train(is_training)(torch.ones(1, 8))
            flat = model._flat_param
            full = flat._full_param_padded if is_training else flat._full_prec_full_param_padded
            assert full.untyped_storage().nbytes()
            restore(saved, {"m": model.train()})
            assert not full.untyped_storage().nbytes()


class Own(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1


def own(net: Net) -> Any:
    net.first = Own(6, 7)
    return wrap(net)


def summoned(net: Net) -> Any:
    model = wrap(net)
    model._handle._training_state = type(model._handle._training_state)["SUMMON_FULL_PARAMS"]
    return model


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (own, "cannot save a Own within FSDP1"),
        (summoned, "within summon_full_params"),
    ],
)
def test_what_cannot_be_known_of_a_module_is_refused(build: Wrap, what: str) -> None:
    with as_rank(0):
        model = build(make())
        with pytest.raises(UnsupportedState, match=what):
            state_of(model)


def test_a_module_whose_process_group_is_gone_is_refused() -> None:
    with as_rank(0):
        model = wrap(make())
    with pytest.raises(UnsupportedState, match="process group is gone"):
        state_of(model)


def test_optimizers_of_which_something_is_not_known_are_refused() -> None:
    class Wrapper(torch.optim.Adam):
        def state_dict(self) -> Any:
            return copy.copy(super().state_dict())

    with as_rank(3):
        model = wrap(make(), use_orig_params=True)
        other = wrap(nn.Linear(2, 1), use_orig_params=True)
        alone = torch.optim.Adam([*model.parameters(), *other.parameters()])
        surveying.survey([alone, model])
        with pytest.raises(UnsupportedState, match=r"2 of \d parameters of an optimizer are of"):
            state_of(alone)
        tiny = torch.optim.Adam(other.parameters())
        surveying.survey([tiny, other])
        with pytest.raises(UnsupportedState, match="holds no element of any parameter"):
            state_of(tiny)
        with pytest.raises(UnsupportedState, match="in a way of its own"):
            state_of(Wrapper(model.parameters()))
