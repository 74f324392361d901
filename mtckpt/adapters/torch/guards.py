"""Optimizers whose step waits for a capture that goes on during training.

Knows optimizers, and that nothing but ``step()`` changes what they hold: the user has said so by
asking for such a capture. One that is captured in a CUDA graph runs without its hooks, so what it
holds is not guarded. Keeps no optimizer alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mtckpt.capture import gates

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["note"]

_hooks: Any = WeakIdKeyDictionary()


def note(optimizer: Optimizer) -> None:
    """Let an optimizer of a state wait before it steps, if any capture needs that."""
    if gates.is_wanted() and optimizer not in _hooks:
        gates.guard(_addresses)
        _hooks[optimizer] = optimizer.register_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
    del optimizer, arguments, keywords
    for gate in gates.open_gates():
        gate.hold(torch.cuda.current_stream(gate.ordinal).cuda_stream)


def _addresses() -> set[int]:
    found: set[int] = set()
    for optimizer in list(_hooks):
        if any(group.get("capturable") for group in optimizer.param_groups):
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held = optimizer.state.get(parameter, {}).values()
                for value in (parameter, *held):
                    if isinstance(value, torch.Tensor):
                        found.add(getattr(value, "_local_tensor", value).data_ptr())
    return found - {0}
