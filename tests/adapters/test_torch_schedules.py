"""Schedules of another kind than was saved: torch would mix the two, and say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_harness import plan, restore, save
from torch.optim import lr_scheduler

from mtckpt.errors import StateMismatch

Make = Callable[[torch.optim.Optimizer], Any]

KINDS: dict[str, Make] = {
    "step": lambda o: lr_scheduler.StepLR(o, 5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 5)], [3]
    ),
    "other sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 5)]
    ),
}


def made(kind: str) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return KINDS[kind](optimizer)


@pytest.mark.parametrize("saved", list(KINDS))
def test_a_schedule_is_restored_into_its_own_kind_alone(saved: str) -> None:
    checkpoint = save({"lr": made(saved)})
    for kind in KINDS:
        live = made(kind)
        if kind == saved:
            restore(checkpoint, {"lr": live})
            continue
        before = repr(live.state_dict())
        with pytest.raises(StateMismatch, match=r": \w+ here, with .*; one with .* in the checkp"):
            plan(checkpoint, {"lr": live})
        assert repr(live.state_dict()) == before


def test_more_or_fewer_schedules_than_were_saved_are_no_restore() -> None:
    """Torch fails half way for want of one, and goes on without those that are more."""

    def chain(count: int) -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        parts: list[Any] = [lr_scheduler.StepLR(optimizer, 5) for _ in range(count)]
        return lr_scheduler.SequentialLR(optimizer, parts, [*range(3, 2 + count)])

    for saved, live in ((2, 3), (3, 2)):
        with pytest.raises(StateMismatch, match=f"{live} schedules here, {saved} in the"):
            plan(save({"lr": chain(saved)}), {"lr": chain(live)})


class Own(lr_scheduler.LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, **more: Any) -> None:
        self.__dict__.update(more)
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return self.base_lrs


def test_what_both_have_is_taken_where_that_is_asked_for() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    saved, live = Own(optimizer, before=1), Own(optimizer, after=2)
    saved.last_epoch = 7
    with pytest.raises(StateMismatch, match="Own here, with after; one with before in"):
        plan(save({"lr": saved}), {"lr": live})
    restore(save({"lr": saved}), {"lr": live}, partial=True)
    assert live.last_epoch == 7
    length = made("cosine")
    length.T_max = 99
    dropped = {"partial": True, "rename": lambda path: None if "T_max" in path else path}
    restore(save({"lr": made("cosine")}), {"lr": length}, **dropped)
    assert length.T_max == 99


def test_a_schedule_of_an_older_torch_is_of_its_kind() -> None:
    saved, live = made("plateau"), made("plateau")
    saved.verbose = False
    del saved.default_min_lr
    saved.best = 3.0
    restore(save({"lr": saved}), {"lr": live})
    assert live.best == 3


def test_what_one_version_of_torch_has_more_is_no_other_kind() -> None:
    saved, live = made("step"), made("step")
    saved.verbose = False
    restore(save({"lr": saved}), {"lr": live})
    assert live.verbose is False
