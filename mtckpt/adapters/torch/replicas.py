"""What ``DistributedDataParallel`` keeps equal on all its ranks: parameters, and their moments.

Knows which modules were wrapped and whose optimizers hold their parameters. Does not guess: a
buffer is each rank's own (it is made equal before a forward pass, not after), and so is a module
that is not wrapped. Parameters of a module that no optimizer of the state has are another rank's to
step: what is shared out so is each rank's own. Keeps no module and no parameter alive.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mtckpt._replicas import Replicated
from mtckpt.adapters.torch import wrappers

__all__ = ["is_replicated", "note", "note_optimizers", "state_of_module", "state_of_optimizer"]

Ranks = tuple[int, ...]

# Parameters of wrapped modules that were seen, and the ranks that hold them alike.
_known: Any = WeakIdKeyDictionary()
_homes: Any = WeakIdKeyDictionary()  # and the module that each is in
# Parameters of the optimizers of the state that was surveyed last.
_optimized: Any = WeakIdKeyDictionary()


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
            _homes[parameter] = weakref.ref(module.module)
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
    """Moments of replicated parameters are replicated: every rank has computed the same, where it
    has those of all."""
    if type(optimizer).state_dict is not Optimizer.state_dict or not len(_known):
        return state
    found = {_known.get(parameter) for parameter in _parameters_of(optimizer)}
    ranks = found.pop() if len(found) == 1 else None
    if ranks is None or optimizer._optimizer_state_dict_post_hooks or _is_share(optimizer):
        return state
    return {
        name: Replicated(value, ranks) if name == "state" else value
        for name, value in state.items()
    }


def note_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Remember what the optimizers of a state hold, in place of those of the last one."""
    _optimized.clear()
    for optimizer in optimizers:
        for parameter in _parameters_of(optimizer):
            _optimized[parameter] = True


def _is_share(optimizer: Optimizer) -> bool:
    """Whether other ranks may hold other parameters of the same modules under the same numbers."""
    if wrappers.is_share(optimizer):
        return True
    held = set(map(id, _parameters_of(optimizer)))
    modules = [home() for home in {_homes[parameter] for parameter in _parameters_of(optimizer)}]
    return any(
        parameter.requires_grad
        and id(parameter) not in held
        and parameter in _known
        and parameter not in _optimized
        for module in modules
        if module is not None
        for parameter in module.parameters()
    )


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
