"""Optimizers and what goes with them: training goes on exactly as if it had not stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_harness import fills, plan, restore, save
from torch import nn, optim

from mtckpt.errors import StateMismatch

Maker = Callable[[list[nn.Parameter]], Any]


def two_groups(kind: Any, **options: Any) -> Maker:
    def make(parameters: list[nn.Parameter]) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": parameters[:1], "lr": 0.03},
            {"params": parameters[1:]},
        ]
        return kind(groups, **options)

    return make


def one_group(kind: Any, **options: Any) -> Maker:
    return lambda parameters: kind(parameters, **options)


MAKERS: dict[str, Maker] = {
    "SGD": two_groups(optim.SGD, lr=0.1),
    "SGD momentum": two_groups(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": two_groups(optim.Adam),
    "Adam amsgrad": two_groups(optim.Adam, amsgrad=True, weight_decay=0.1),
    "Adam tensor lr": one_group(optim.Adam, lr=torch.tensor(0.01)),
    "AdamW": two_groups(optim.AdamW),
    "AdamW foreach": two_groups(optim.AdamW, foreach=True),
    "AdamW fused": two_groups(optim.AdamW, fused=True),
    "Adagrad": two_groups(optim.Adagrad, initial_accumulator_value=0.1),
    "Adadelta": two_groups(optim.Adadelta),
    "Adamax": two_groups(optim.Adamax),
    "NAdam": two_groups(optim.NAdam),
    "RAdam": two_groups(optim.RAdam),
    "RMSprop": two_groups(optim.RMSprop, momentum=0.5, centered=True),
    "Rprop": two_groups(optim.Rprop),
    "ASGD": two_groups(optim.ASGD),
    "LBFGS": one_group(optim.LBFGS, max_iter=2, history_size=3),
    "LBFGS wolfe": one_group(optim.LBFGS, line_search_fn="strong_wolfe"),
    "Adafactor": two_groups(optim.Adafactor),
}
if hasattr(optim, "Muon"):
    MAKERS["Muon"] = lambda parameters: optim.Muon([p for p in parameters if p.ndim == 2])


class Trainer:
    """A model, an optimizer and data that depends on the step alone."""

    def __init__(self, make: Maker, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.optimizer = make(list(self.model.parameters()))
        self.dtype = dtype

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def train(self, *steps: int) -> None:
        for step in steps:
            data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(self.dtype)

            def closure(data: torch.Tensor = data) -> Any:
                self.optimizer.zero_grad()
                loss = (self.model(data) - 1).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)

    def bits(self) -> list[bytes]:
        saved = save(self.state)
        return [*saved.data, saved.plain.encode(), saved.structure.encode()]


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("steps_before", [0, 2])
def test_training_goes_on_bit_for_bit(name: str, steps_before: int) -> None:
    """Into a fresh optimizer, and into one that has moments of its own."""
    trainer = Trainer(MAKERS[name], 1)
    trainer.train(1, 2)
    saved = save(trainer.state)
    bits = trainer.bits()
    trainer.train(3, 4)

    other = Trainer(MAKERS[name], 2)
    other.train(*range(90, 90 + steps_before))
    restore(saved, other.state)
    assert other.bits() == bits
    other.train(3, 4)
    assert other.bits() == trainer.bits()


@pytest.mark.parametrize("name", ["Adam", "AdamW fused", "SGD momentum", "RMSprop"])
def test_live_moments_are_filled_where_they_lie(name: str) -> None:
    trainer, other = Trainer(MAKERS[name], 1), Trainer(MAKERS[name], 2)
    trainer.train(1, 2)
    other.train(3)
    moments = {
        (i, key): value
        for i, entry in enumerate(other.optimizer.state.values())
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    saved = save({"optimizer": trainer.optimizer})
    placing, _ = plan(saved, {"optimizer": other.optimizer})
    assert {f.address for f in fills(placing)} == {t.data_ptr() for t in moments.values()}
    restore(saved, {"optimizer": other.optimizer})
    for i, entry in enumerate(other.optimizer.state.values()):
        for key, value in entry.items():
            assert value is moments[i, key]


def test_float32_moments_of_bfloat16_parameters_keep_their_digits() -> None:
    """As mixed-precision optimizers make them; load_state_dict alone would cast them."""

    def step_with_float32_moments(trainer: Trainer) -> None:
        for p in trainer.model.parameters():
            trainer.optimizer.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.randn(p.shape),
                "exp_avg_sq": torch.rand(p.shape),
                "parts": [torch.randn(2), torch.randn(3)],
            }

    trainer = Trainer(MAKERS["Adam"], 1, torch.bfloat16)
    step_with_float32_moments(trainer)
    for prepare in (lambda trainer: None, step_with_float32_moments):
        other = Trainer(MAKERS["Adam"], 2, torch.bfloat16)
        prepare(other)
        restore(save(trainer.state), other.state)
        assert other.bits() == trainer.bits()
        entry = other.optimizer.state[next(other.model.parameters())]
        assert entry["exp_avg"].dtype == entry["parts"][1].dtype == torch.float32


def test_hooks_of_an_optimizer_have_the_last_word() -> None:
    trainer = Trainer(MAKERS["Adam"], 1)
    trainer.train(1)
    saved = save({"optimizer": trainer.optimizer})
    other = Trainer(MAKERS["Adam"], 1)
    called = []

    def before(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
        called.append("pre")
        for entry in state["state"].values():
            entry["exp_avg"] = entry["exp_avg"].double() * 2

    other.optimizer.register_load_state_dict_pre_hook(before)
    other.optimizer.register_load_state_dict_post_hook(lambda o: called.append("post"))
    restore(saved, {"optimizer": other.optimizer})
    assert called == ["pre", "post"]
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(
            trainer.optimizer.state[p]["exp_avg"] * 2, other.optimizer.state[q]["exp_avg"]
        )


def test_a_hook_may_change_moments_that_are_cast() -> None:
    def make() -> Any:
        parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        return parameter, optim.Adam([parameter])

    def double(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] * 2

    p, optimizer = make()
    third = torch.full((2,), 1 / 3)
    optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": third, "exp_avg_sq": third}
    q, other = make()
    other.register_load_state_dict_pre_hook(double)
    restore(save(optimizer), other)
    assert torch.equal(other.state[q]["exp_avg"], (third * 2).bfloat16())  # as the hook left it
    assert torch.equal(other.state[q]["exp_avg_sq"], third)  # as it was saved


def test_state_dict_hooks_of_an_optimizer_run_at_a_save() -> None:
    trainer = Trainer(MAKERS["SGD"], 1)
    trainer.optimizer.register_state_dict_post_hook(
        lambda o, state: {**state, "extra": {"note": "kept", "tensor": torch.ones(2)}}
    )
    assert "optimizer/extra/tensor" in save(trainer.state).paths


@pytest.mark.parametrize("sizes", [[1, 2], [2, 2], [3, 1]])
def test_groups_must_match(sizes: list[int]) -> None:
    def make(groups: list[int]) -> optim.Optimizer:
        return optim.SGD(
            [{"params": [nn.Parameter(torch.ones(1)) for _ in range(n)]} for n in groups], lr=1.0
        )

    live = make(sizes)
    with pytest.raises(StateMismatch, match=r"parameters here, of \[1, 3\] in the checkpoint"):
        plan(save({"o": make([1, 3])}), {"o": live})
    restore(save({"o": make(sizes)}), {"o": live})


def test_another_kind_of_optimizer_is_a_difference() -> None:
    parameters = [nn.Parameter(torch.ones(1))]
    adam, sgd = optim.Adam(parameters), optim.SGD(parameters, lr=1.0, momentum=0.9)
    with pytest.raises(StateMismatch, match=r"settings \['dampening', .*'betas'") as caught:
        plan(save({"o": adam}), {"o": sgd})
    assert len(vars(caught.value)["differing"]) == 1
    own = type("Own", (optim.SGD,), {"load_state_dict": lambda self, state: seen.append(state)})
    seen: list[Any] = []
    restore(save({"o": adam}), {"o": own(parameters)})  # it says itself what it takes
    assert "betas" in seen[0]["param_groups"][0]
    optim.lr_scheduler.OneCycleLR(sgd, 1.0, total_steps=9)  # which adds settings of its own
    restore(save({"o": sgd}), {"o": optim.SGD(parameters, lr=1.0)})
    older = save({"o": adam})
    adam.defaults["newer"] = adam.param_groups[0]["newer"] = True
    restore(older, {"o": adam})


def test_a_count_of_steps_that_was_one_becomes_one_of_each_parameter() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    one, live = optim.Adam(parameters), optim.Adam(parameters)
    one.step()
    for entry in one.state.values():
        entry["step"] = one.state[parameters[0]]["step"]
    restore(save({"o": one}), {"o": live})
    live.step()
    assert [entry["step"].item() for entry in live.state.values()] == [2, 2]


def test_moments_of_other_shapes_are_a_difference_without_live_moments_too() -> None:
    def make(size: int) -> optim.Optimizer:
        p = nn.Parameter(torch.ones(size))
        p.grad = torch.ones(size)
        return optim.Adam([p])

    old, live = make(3), make(4)
    old.step()
    with pytest.raises(StateMismatch) as caught:
        plan(save({"o": old}), {"o": live})
    differing = vars(caught.value)["differing"]
    assert [line.split(":")[0] for line in differing] == [
        "o/state/0/exp_avg",
        "o/state/0/exp_avg_sq",
    ]


def test_something_else_than_an_optimizer_is_a_difference() -> None:
    live = optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    others: list[Any] = [3, {"state": {}}, {"state": [], "param_groups": []}]
    for other in others:
        with pytest.raises(StateMismatch):
            plan(save({"o": other}), {"o": live})


def test_moments_of_channels_last_parameters_lie_like_them() -> None:
    def make() -> tuple[nn.Parameter, optim.Optimizer]:
        p = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        return p, optim.Adam([p])

    p, optimizer = make()
    p.grad = torch.randn_like(p)
    optimizer.step()
    q, other = make()
    restore(save({"o": optimizer}), {"o": other})
    moment = other.state[q]["exp_avg"]
    assert moment.stride() == optimizer.state[p]["exp_avg"].stride() == q.stride()
    assert torch.equal(moment, optimizer.state[p]["exp_avg"])


class Rotated(optim.Optimizer):
    """Multiplies by what ``eigh`` gives, whose columns lie in memory one after the other."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"kind": torch.bfloat16})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            turned = torch.linalg.eigh(p.grad @ p.grad.T).eigenvectors
            state["both"] = [turned, turned]
            state["same_shape"] = p.grad.T.contiguous().T
            p.data -= 0.1 * turned @ p.grad


@pytest.mark.parametrize("begun", [False, True])
def test_moments_keep_their_order_in_memory(begun: bool) -> None:
    # Sums are taken in another order, with other last digits, where a matrix lies otherwise.
    p, q = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer, other = Rotated([p]), Rotated([q])
    p.grad = torch.randn_like(p)
    optimizer.step()
    if begun:
        other.state[q] = {"both": [torch.zeros(4, 4)] * 2, "same_shape": torch.zeros(4, 4)}
    restore(save({"o": optimizer}), {"o": other})
    state = other.state[q]
    for moment in (*state["both"], state["same_shape"]):
        assert moment.stride() == (1, 4)
    assert torch.equal(state["both"][0], optimizer.state[p]["both"][0])
    assert torch.equal(state["same_shape"], p.grad)
    assert state["both"][0] is state["both"][1]
    assert other.param_groups[0]["kind"] is torch.bfloat16


def test_schedules_that_change_over_to_milestones() -> None:
    def make() -> Any:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        warm = optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
        milestones = optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2])
        return optimizer, optim.lr_scheduler.SequentialLR(optimizer, [warm, milestones], [3])

    def steps(both: Any, count: int) -> list[float]:
        optimizer, schedule = both
        rates = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole, first, second = make(), make(), make()
    expected = steps(whole, 7)
    steps(first, 2)
    restore(save(dict(zip("os", first, strict=True))), dict(zip("os", second, strict=True)))
    assert steps(second, 5) == expected[2:]


def test_a_learning_rate_that_is_a_tensor_stays_the_same_object() -> None:
    def make(value: float) -> optim.Optimizer:
        return optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(value), capturable=False)

    live = make(0.5)
    rate = live.param_groups[0]["lr"]
    restore(save({"o": make(0.25)}), {"o": live})
    assert live.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_what_an_optimizer_adopts_is_its_own() -> None:
    trainer, other = Trainer(MAKERS["Adam"], 1), Trainer(MAKERS["Adam"], 2)
    trainer.train(1)
    saved = save(trainer.state)
    restore(saved, other.state)
    bits = other.bits()
    third = Trainer(MAKERS["Adam"], 3)
    restore(saved, third.state)
    third.train(5)
    assert other.bits() == bits


class Wrapping(optim.SGD):
    """An optimizer with a load_state_dict of its own."""

    def load_state_dict(self, state_dict: Any) -> None:
        self.seen = set(state_dict)
        super().load_state_dict(state_dict)


def test_an_optimizer_with_its_own_loading_is_asked() -> None:
    make = two_groups(Wrapping, lr=0.1, momentum=0.9)
    trainer, other = Trainer(make, 1), Trainer(make, 2)
    trainer.train(1, 2)
    restore(save(trainer.state), other.state)
    assert other.optimizer.seen == {"state", "param_groups"}
    assert other.bits() == trainer.bits()


def test_sparse_adam() -> None:
    def make(seed: int) -> tuple[nn.Embedding, optim.Optimizer]:
        torch.manual_seed(seed)
        embedding = nn.Embedding(5, 3, sparse=True)
        return embedding, optim.SparseAdam(list(embedding.parameters()))

    def train(embedding: nn.Embedding, optimizer: optim.Optimizer) -> None:
        optimizer.zero_grad()
        embedding(torch.tensor([1, 3])).sum().backward()
        optimizer.step()

    one: Any = make(1)
    other: Any = make(2)
    train(*one)
    restore(save(list(one)), list(other))
    train(*one)
    train(*other)
    assert torch.equal(one[0].weight, other[0].weight)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: optim.lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: optim.lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: optim.lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: optim.lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: optim.lr_scheduler.SequentialLR(
        o,
        [
            optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 2),
            optim.lr_scheduler.CosineAnnealingLR(o, 5),
        ],
        [3],
    ),
    "ChainedScheduler": lambda o: optim.lr_scheduler.ChainedScheduler(
        [optim.lr_scheduler.ConstantLR(o), optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    kinds = {name for name in optim.lr_scheduler.__all__ if not name.startswith("_")}
    assert kinds - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedules_go_on(name: str) -> None:
    def make() -> tuple[Trainer, Any]:
        trainer = Trainer(one_group(optim.SGD, lr=0.1, momentum=0.9), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR steps its parts before the optimizer
            return trainer, SCHEDULERS[name](trainer.optimizer)

    def go(trainer: Trainer, scheduler: Any, *steps: int) -> list[Any]:
        rates = []
        for step in steps:
            trainer.train(step)
            plateau = isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step(*([1.0] if plateau else []))
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return rates

    trainer, scheduler = make()
    go(trainer, scheduler, 1, 2)
    saved = save({**trainer.state, "scheduler": scheduler})
    expected = go(trainer, scheduler, 3, 4, 5, 6)
    other, other_scheduler = make()
    restore(saved, {**other.state, "scheduler": other_scheduler})
    assert go(other, other_scheduler, 3, 4, 5, 6) == expected
    assert other.bits() == trainer.bits()


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler.scale(torch.ones(1))
    live = torch.amp.GradScaler("cpu")
    restore(save({"scaler": scaler}), {"scaler": live})
    assert live.get_scale() == 128.0
    off = torch.amp.GradScaler("cpu", enabled=False)
    restore(save({"scaler": off}), {"scaler": torch.amp.GradScaler("cpu", enabled=False)})


def test_stateful_data_loader() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loading = pytest.importorskip("torchdata.stateful_dataloader")

        def make() -> Any:
            """As the quickstart has it: with one generator the next pass would differ."""
            order = torch.Generator().manual_seed(3)
            sampler = loading.sampler.RandomSampler(list(range(40)), generator=order)
            return loading.StatefulDataLoader(
                list(range(40)), batch_size=4, sampler=sampler, generator=torch.Generator()
            )

        loader, live = make(), make()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        saved = save({"loader": loader})
        drawn = torch.get_rng_state()
        restore(saved, {"loader": live})
        for rest in (batches, loader):
            assert [b.tolist() for b in live] == [b.tolist() for b in rest]
        assert torch.equal(torch.get_rng_state(), drawn)
