"""Optimizers whose parameters have names: what was saved of each goes to the one of that name."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from state_harness import plan, restore, save
from torch import nn, optim

from mtckpt.adapters.torch import naming
from mtckpt.errors import StateMismatch


def test_parameters_in_another_order_are_found_by_their_names() -> None:
    def make(names: str, groups: int = 1, **options: Any) -> optim.Optimizer:
        named = [(name, nn.Parameter(torch.ones(2))) for name in names]
        for name, parameter in named:
            parameter.grad = torch.full((2,), float(ord(name[-1])))
        size = len(named) // groups
        parts = [{"params": named[at : at + size]} for at in range(0, len(named), size)]
        return optim.Adam(parts, **options)

    def moments(optimizer: optim.Optimizer) -> list[float]:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        return [float(optimizer.state[each]["exp_avg"][0]) for each in parameters]

    first = make("abcd", lr=0.5)
    first.step()
    a, b, c, d = moments(first)
    live = make("dcba")
    restore(save({"o": first}), {"o": live})
    assert live.param_groups[0]["param_names"] == list("dcba")
    assert {name: moments(live)[at] for at, name in enumerate("dcba")} == dict(
        zip("abcd", (a, b, c, d), strict=True)
    )
    assert live.param_groups[0]["lr"] == 0.5
    other = make("wxyz")  # called otherwise: the ones at the same places
    restore(save({"o": first}), {"o": other})
    assert moments(other) == [a, b, c, d]
    two = make("abcd", groups=2)
    with pytest.raises(StateMismatch, match="parameter c is in group 0 here, not in"):
        plan(save({"o": two}), {"o": make("acbd", groups=2)})


def test_what_another_thread_restores_has_other_names() -> None:
    module = nn.Linear(2, 2)
    naming.note([module])
    other = threading.Thread(target=naming.note, args=([nn.Linear(1, 1)],))
    other.start()
    other.join()
    assert naming.names_of(optim.Adam(module.parameters())) == [["weight", "bias"]]


def test_what_are_no_names_are_no_names() -> None:
    first = optim.Adam([("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2)))])
    first.param_groups[0]["param_names"] = ["a", 7]
    live = optim.Adam([("b", nn.Parameter(torch.ones(2))), ("a", nn.Parameter(torch.ones(2)))])
    restore(save({"o": first}), {"o": live})
