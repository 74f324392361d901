"""What ``DistributedDataParallel`` keeps equal on all its ranks: parameters, and their moments.

Knows which modules were wrapped and whose optimizers hold their parameters. Does not guess: a
buffer is each rank's own (it is made equal before a forward pass, not after), and so is a module
that is not wrapped. Parameters of a module that no optimizer of the state has are another rank's to
step: what is shared out so is each rank's own. Keeps no module and no parameter alive.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mtckpt._replicas import Replicated
from mtckpt.adapters.torch import wrappers

__all__ = ["is_replicated", "note", "note_optimizers", "state_of_module", "state_of_optimizer"]

Ranks = tuple[int, ...]


class _Home(NamedTuple):
    """A module that was wrapped, and the ranks that hold its parameters alike."""

    ranks: Ranks
    module: weakref.ref[torch.nn.Module]


class _Surveyed(threading.local):
    """Of the state that this thread takes apart: its optimizers, and, once somebody asks, what is
    in a module and none of them steps."""

    def __init__(self) -> None:
        self.optimizers: list[weakref.ref[Optimizer]] = []
        self.left: dict[_Home, list[weakref.ref[torch.Tensor]]] = {}


# Parameters of wrapped modules that were seen, and where.
_known: Any = WeakIdKeyDictionary()
_surveyed = _Surveyed()


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
    home = _Home(ranks, weakref.ref(module.module))
    ignored = getattr(module, "parameters_to_ignore", ())
    names = set()
    for name, parameter in module.module.named_parameters(remove_duplicate=False):
        if name not in ignored:
            names.add(wrappers.bare_name(name))
            _known[parameter] = home
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
    homes = {_known.get(parameter) for parameter in _parameters_of(optimizer)}
    found = {home and home.ranks for home in homes}
    ranks = found.pop() if len(found) == 1 else None
    if (
        ranks is None
        or optimizer._optimizer_state_dict_post_hooks
        or wrappers.is_share(optimizer)
        or _leaves_some(optimizer, homes)
    ):
        return state
    return {
        name: Replicated(value, ranks) if name == "state" else value
        for name, value in state.items()
    }


def note_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Remember the optimizers of a state, in place of those of the last one."""
    _surveyed.optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
    _surveyed.left.clear()


def _leaves_some(optimizer: Optimizer, homes: Iterable[_Home]) -> bool:
    """Whether other ranks may hold other parameters of these modules under the same numbers: there
    are some that are trained and that neither this one has nor another optimizer of the state."""
    known = [each() for home in homes for each in _left_in(home)]
    # What is frozen now may be trained by the next save, of the same optimizers.
    left = [id(each) for each in known if each is not None and each.requires_grad]
    return bool(left) and not {*map(id, _parameters_of(optimizer))}.issuperset(left)


def _left_in(home: _Home) -> list[weakref.ref[torch.Tensor]]:
    """See ``_Surveyed``; looked for once a state, however many optimizers there are."""
    module = home.module()
    if module is None:
        return []
    if home not in _surveyed.left:
        optimizers = filter(None, (each() for each in _surveyed.optimizers))
        stepped = {id(each) for one in optimizers for each in _parameters_of(one)}
        _surveyed.left[home] = [
            weakref.ref(parameter)
            for parameter in module.parameters()
            if id(parameter) not in stepped and parameter in _known
        ]
    return _surveyed.left[home]


def _parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
