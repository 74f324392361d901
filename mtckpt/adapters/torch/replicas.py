"""What ``DistributedDataParallel`` keeps equal on all its ranks: parameters, and their moments.

Knows which modules were wrapped and whose optimizers hold their parameters. Does not guess: a
buffer is each rank's own (it is made equal before a forward pass, not after), and so is a module
that is not wrapped. Keeps no module and no parameter alive.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mtckpt._replicas import Replicated
from mtckpt.adapters.torch import wrappers

__all__ = ["is_replicated", "note", "state_of_module", "state_of_optimizer"]

Ranks = tuple[int, ...]

# Parameters of wrapped modules that were seen, and the ranks that hold them alike.
_known: Any = WeakIdKeyDictionary()


def is_replicated(value: object) -> bool:
    """True for a DistributedDataParallel; nothing is imported to find out."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    return module is not None and isinstance(value, module.DistributedDataParallel)


def note(module: Any) -> None:
    """Remember the parameters of a wrapped module, for the sake of its optimizers."""
    _note(module)


def _note(module: Any) -> tuple[Ranks, set[str]]:
    """The ranks that a wrapped module is equal on, and the names of what is."""
    ranks = tuple(sorted(torch.distributed.get_process_group_ranks(module.process_group)))
    ignored = getattr(module, "parameters_to_ignore", ())
    names = set()
    for name, parameter in module.module.named_parameters(remove_duplicate=False):
        if name not in ignored:
            names.add(wrappers.bare_name(name))
            _known[parameter] = ranks
    return ranks, names


def state_of_module(module: Any, inner: Any) -> Any:
    """The state of the module inside, its parameters marked as what all ranks hold."""
    ranks, names = _note(module)
    if not isinstance(inner, Mapping):
        return inner
    return {
        name: Replicated(value, ranks) if name in names else value for name, value in inner.items()
    }


def state_of_optimizer(optimizer: Optimizer, state: Any) -> Any:
    """Moments of replicated parameters are replicated: every rank has computed the same."""
    if type(optimizer).state_dict is not Optimizer.state_dict or not len(_known):
        return state
    found = {
        _known.get(parameter) for group in optimizer.param_groups for parameter in group["params"]
    }
    ranks = found.pop() if len(found) == 1 else None
    if ranks is None or optimizer._optimizer_state_dict_post_hooks:
        return state
    return {
        name: Replicated(value, ranks) if name == "state" else value
        for name, value in state.items()
    }
