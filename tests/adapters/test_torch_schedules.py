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
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 5)], [3]
    ),
    "other sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
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
        with pytest.raises(StateMismatch, match=r"LR.* here, with .*; one with .* in the checkp"):
            plan(checkpoint, {"lr": live})
        assert repr(live.state_dict()) == before


def test_what_one_version_of_torch_has_more_is_no_other_kind() -> None:
    saved, live = made("step"), made("step")
    saved.verbose = False
    restore(save({"lr": saved}), {"lr": live})
    assert live.verbose is False
