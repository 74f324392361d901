"""What is put around an object without a state of its own: by ``torch.compile``, ``DataParallel``,
and Accelerate, around optimizers and schedules too, and by ``ZeroRedundancyOptimizer``.

Knows how to get inside, and what names look like from there. A checkpoint says nothing of such a
wrapper, so what was saved with it is restored without it, and the reverse. Imports nothing to look.
``DistributedDataParallel``, which says more of its module than that, is ``replicas``' business.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch.nn import DataParallel, Module

__all__ = [
    "COMPILED",
    "bare_name",
    "bare_names",
    "inside_of",
    "is_compiled",
    "is_share",
    "show_settings",
    "unwrapped",
]

COMPILED = "_orig_mod."
_ACCELERATED = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("accelerate.scheduler", "AcceleratedScheduler", "scheduler"),
)
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_shares: Any = weakref.WeakSet()  # optimizers inside such ones that were seen


def is_compiled(value: object) -> bool:
    """True for what ``torch.compile(module)`` returns."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return eval_frame is not None and isinstance(value, eval_frame.OptimizedModule)


def unwrapped(value: Any) -> Any:
    """The object inside wrappers that have no state; any other value as it is."""
    if not isinstance(value, Module):
        return _prepared(value)
    while isinstance(value, Module):
        if is_compiled(value):
            value = value._orig_mod
        elif type(value) is DataParallel:
            value = value.module
        else:
            break
    return value


def _prepared(value: Any) -> Any:
    """What Accelerate's ``prepare`` was given, of an optimizer or a schedule that it returned, and
    the optimizer of this rank's share of the parameters within a ``ZeroRedundancyOptimizer``."""
    if _shares_out(value):
        _copy_settings(value, value.optim)  # as its step() begins
        _shares.add(value.optim)
        return value.optim
    for name, kind, inside in _ACCELERATED:
        module = sys.modules.get(name)
        if module is not None and type(value) is getattr(module, kind, None):
            return getattr(value, inside)
    return value


def is_share(optimizer: Any) -> bool:
    """Whether it was found inside a ``ZeroRedundancyOptimizer``: it is this rank's alone."""
    return optimizer in _shares


def show_settings(outer: Any) -> None:
    """Let what is around a restored optimizer have its settings, which its step would undo."""
    if _shares_out(outer):
        _copy_settings(outer.optim, outer)


def _shares_out(value: Any) -> bool:
    module = sys.modules.get(_ZERO)
    # One that overlaps with the backward pass has nothing inside before its first step.
    return (
        module is not None
        and isinstance(value, module.ZeroRedundancyOptimizer)
        and hasattr(value, "optim")
    )


def _copy_settings(source: Any, target: Any) -> None:
    for given, group in zip(source.param_groups, target.param_groups, strict=True):
        group.update({name: value for name, value in given.items() if name != "params"})


def inside_of(module: Any) -> Module | None:
    """The module within what compiling or activation checkpointing has put around it, if any."""
    inside: Module | None = None
    checkpointing = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    if is_compiled(module):
        inside = module._orig_mod
    elif checkpointing is not None and isinstance(module, checkpointing.ActivationWrapper):
        inside = module._checkpoint_wrapped_module
    return inside


def bare_name(name: str) -> str:
    """A name as it is where nothing in the module is compiled."""
    return name.replace(COMPILED, "") if COMPILED in name else name


def bare_names(names: Iterable[Any]) -> dict[Any, Any]:
    """From each bare name to the name. Those that would be the same stay as they are."""
    given = list(names)
    found = {bare_name(name) if isinstance(name, str) else name: name for name in given}
    return found if len(found) == len(given) else {name: name for name in given}
