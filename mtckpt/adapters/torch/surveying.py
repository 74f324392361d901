"""What modules of a state say of its optimizers, found out before anything is taken apart.

Knows containers, however nested, and whom to tell of which module. Does not know what they note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from mtckpt._node import MAX_DEPTH, PLAIN_TYPES
from mtckpt._replicas import Replicated
from mtckpt.adapters.torch import flat_optimizers, flats, naming, replicas, wrappers

__all__ = ["survey"]

# What is in a state by the thousand, and has nothing inside.
_LEAVES = PLAIN_TYPES | {Tensor, Parameter}


def survey(state: object) -> None:
    """Note the modules, the parameters of replicated ones, and FSDP1's that an optimizer has."""
    objects = list(_objects_in(state))
    for value in objects:
        if replicas.is_replicated(value):
            replicas.note(value)
    optimizers = [value for value in objects if isinstance(value, Optimizer)]
    modules = [value for value in objects if isinstance(value, Module)] if optimizers else []
    replicas.note_optimizers(optimizers)
    naming.note(modules)
    if any(map(flat_optimizers.has_flat, optimizers)):
        # The whole after its parts: what counts is the order of the whole.
        for module in naming.by_size(filter(flats.has_flat, modules)):
            flats.note(module)


def _objects_in(state: Any, depth: int = 0) -> Iterator[Any]:
    state = wrappers.unwrapped(state)
    if isinstance(state, (Module, Optimizer)):
        yield state
    elif depth > MAX_DEPTH:
        return  # whoever takes the state apart says so
    elif isinstance(state, Replicated):
        yield from _objects_in(state.value, depth + 1)
    elif isinstance(state, (Mapping, list, tuple)):
        for value in state.values() if isinstance(state, Mapping) else state:
            if type(value) not in _LEAVES:
                yield from _objects_in(value, depth + 1)
