"""What the parameters of an optimizer are called, for states that go by names and not by numbers.

Knows the modules of a template, and the names that an optimizer was made with. Does not know nodes,
nor FSDP1, which has names of its own (``flats``). Keeps no module alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mtckpt.adapters.torch import replicas, wrappers

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from torch.optim import Optimizer

__all__ = ["Names", "by_size", "in_order", "names_of", "note"]

Names = Sequence[Sequence[str]]  # by group

_SECOND = "module."  # what DistributedDataParallel and its like put before every name


class _Noted(threading.local):
    """Of the state that this thread restores: another may restore one with other modules."""

    modules: Sequence[weakref.ref[Module]] = ()


_noted = _Noted()


def note(modules: Iterable[Module]) -> None:
    """Remember the modules of a state, in place of those of the last one."""
    _noted.modules = [weakref.ref(module) for module in modules]


def by_size(modules: Iterable[Module]) -> list[Module]:
    """The whole after its parts, so that what it says comes last."""
    return sorted(modules, key=lambda module: sum(1 for _ in module.modules()))


def names_of(optimizer: Optimizer) -> Names | None:
    """Those that it was made with, or else those in the modules of the state; None if unknown."""
    groups = optimizer.param_groups
    given: list[Any] = [group.get("param_names") for group in groups]
    if all(map(_is_names, given)):
        return given
    known: dict[int, str] = {}
    for module in by_size(filter(None, (each() for each in _noted.modules))):
        known.update((id(parameter), name) for name, parameter in _named(module))
    found = [[known.get(id(parameter), "") for parameter in group["params"]] for group in groups]
    return None if any("" in names for names in found) else found


def _named(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    inner: Any = module.module if replicas.is_replicated(module) else module
    for name, parameter in inner.named_parameters():
        yield wrappers.bare_name(name), parameter


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def in_order(
    ids: Sequence[Sequence[Any]], saved: Names | None, here: Names | None, *, is_needed: bool
) -> tuple[list[list[Any]], str]:
    """Saved parameters in the order of those here, group by group, and why they cannot be.

    Where names are not needed, since numbers say the same, they count if the same are on both
    sides: a parameter that was called otherwise is the one at its place.
    """
    as_saved = [list(group) for group in ids]
    if saved is None or here is None:
        why = _UNORDERED if saved is None else _NAMELESS
        return as_saved, why if is_needed else ""
    saved, here = _bare(saved), _bare(here)
    every = [sorted(name for group in side for name in group) for side in (saved, here)]
    if every[0] != every[1] or len(set(every[0])) < len(every[0]):
        differ = sorted(set(every[0]).symmetric_difference(every[1]))[:4]
        return as_saved, f"parameters of other names: {', '.join(differ)}" if is_needed else ""
    found: list[list[Any]] = []
    for number, (group, names, wanted) in enumerate(zip(ids, saved, here, strict=True)):
        at = dict(zip(names, group, strict=True))
        if at.keys() != set(wanted):
            name = next(name for name in wanted if name not in at)
            return as_saved, f"parameter {name} is in group {number} here, not in the checkpoint"
        found.append([at[name] for name in wanted])
    return found, ""


_UNORDERED = (
    "an FSDP1 module ignores some parameters of a part of it, so that their order is not known, and"
    " what was saved goes by numbers: save it from an optimizer that was made of named_parameters()"
)
_NAMELESS = (
    "what was saved goes by the names of parameters, and those here are not known: put the module"
    " into the template beside its optimizer, or make the optimizer of named_parameters()"
)


def _bare(names: Names) -> list[list[str]]:
    bare = [[wrappers.bare_name(name) for name in group] for group in names]
    if all(name.startswith(_SECOND) for group in bare for name in group):
        return [[name.removeprefix(_SECOND) for name in group] for group in bare]
    return bare
