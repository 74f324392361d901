"""Modules, optimizers and generators: the trees inside them, and how saved ones go back in.

Knows ``torch.nn.Module``, ``torch.optim.Optimizer`` and ``torch.Generator``. Does not know where
bytes come from: it tells a ``Placing`` what it wants where, and what to do afterwards. Does not
promise to skip anybody's hooks: a module or optimizer with behaviour of its own gets its own
``load_state_dict``; a module without any gets its bytes straight into its live parameters.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtckpt import _state
from mtckpt._node import MAPPING_NAMES
from mtckpt._placing import settle
from mtckpt._state import escape
from mtckpt.adapters.torch import (
    flat_optimizers,
    flats,
    guards,
    leaves,
    loading,
    optimizers,
    replicas,
    schedules,
    sharded,
    wrappers,
)
from mtckpt.adapters.torch.loading import EXTRA, OWN_NAMES, PLAIN_LOADS, check_taken_back

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import Node

__all__ = ["place_object", "plain_state", "state_of"]

_ORDERED = MAPPING_NAMES[OrderedDict]
_VERSIONS = "_metadata"  # by module, an attribute of the dict that a state_dict() gives


def state_of(value: Any) -> Any:
    """The tree that stands for ``value`` in a checkpoint, or None if it is no object of torch's."""
    value = wrappers.unwrapped(value)
    if replicas.is_replicated(value):
        return replicas.state_of_module(value, state_of(value.module))
    if isinstance(value, Module):
        plain = plain_state(value)
        if plain is None and flats.has_flat(value):
            return flats.found_in(value).tensors
        return _own_state(value) if plain is None else plain
    if isinstance(value, Optimizer):
        guards.note(value)
        if flat_optimizers.has_flat(value):
            return flat_optimizers.state_of(value)
        return replicas.state_of_optimizer(value, value.state_dict())
    if isinstance(value, torch.Generator):
        return {"state": value.get_state()}
    return None


def place_object(live: Any, node: Node, path: str, placing: Placing) -> bool:
    """True if ``live`` is an object of torch's, which now is matched; it is filled in its place."""
    outer, live = live, wrappers.unwrapped(live)
    if replicas.is_replicated(live):
        # The wrapper has no state: any other may have saved what it holds.
        live = wrappers.unwrapped(live.module)
    if isinstance(live, Module):
        _place_module(live, node, path, placing)
        return True
    if isinstance(live, Optimizer):
        if flat_optimizers.has_flat(live):
            flat_optimizers.place(live, node, path, placing)
            return True
        placed = optimizers.place(live, node, path, placing)
        if outer is not live:
            placing.finish.append(lambda: wrappers.show_settings(outer))
        return placed
    if isinstance(live, torch.Generator):
        _place_generator(live, node, path, placing)
        return True
    if isinstance(live, LRScheduler):
        schedules.check_kind(live, node, path, placing)
    return _place_versioned(live, node, path, placing)


def _place_versioned(live: Any, node: Node, path: str, placing: Placing) -> bool:
    """An object that passes on the state of a module, or has one like that, as a TensorDict has.

    What torch keeps beside the names says how they are to be read. A checkpoint lacks it, and what
    is loaded has today's.
    """
    access = _state.accessors(live) if node.name == _ORDERED else None
    if access is None:
        return False
    versions = getattr(access[0](), _VERSIONS, None)
    if versions is None:
        return False
    tree = placing.tree(node, path)

    def load() -> None:
        state = settle(tree)
        setattr(state, _VERSIONS, versions)
        access[1](state)

    placing.finish.append(load)
    return True


# -- modules -------------------------------------------------------------------------------------


def plain_state(module: Module) -> dict[str, torch.Tensor] | None:
    """What ``state_dict(keep_vars=True)`` gives, faster; None if a part has its own idea of it."""
    found: dict[str, torch.Tensor] = {}
    return found if _collect(module, "", found) else None


def _collect(module: Module, prefix: str, found: dict[str, torch.Tensor]) -> bool:
    if not loading.is_plain(module):
        return False
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found[prefix + name] = parameter
    passing = module._non_persistent_buffers_set
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in passing:
            found[prefix + name] = buffer
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = name == "_orig_mod" and wrappers.is_compiled(module)
        if not _collect(child, prefix if inside else f"{prefix}{name}.", found):
            return False
    return True


def _own_state(module: Module) -> Any:
    """A ``state_dict()`` without what compiling has added to its names."""
    state = module.state_dict()
    if not isinstance(state, Mapping):
        return state
    check_taken_back(module, state)
    names = wrappers.bare_names(state)
    return state if all(map(operator.is_, names, state)) else {n: state[names[n]] for n in names}


def _may_rename(module: Module) -> bool:
    """True if loading may accept other names or shapes than the module has now."""
    return any(
        type(part)._load_from_state_dict not in PLAIN_LOADS
        or type(part).load_state_dict is not Module.load_state_dict
        or part._load_state_dict_pre_hooks
        or not OWN_NAMES.isdisjoint(part.__dict__)
        for part in module.modules()
    )


def _free_shapes(module: Module) -> set[str]:
    """The parts whose loading is their own affair: an observer's range may change its length."""
    return {
        wrappers.bare_name(name)
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part)._load_from_state_dict not in PLAIN_LOADS
    }


def _place_module(module: Module, node: Node, path: str, placing: Placing) -> None:
    if node.kind != _state.DICT:
        placing.differs(module, node, path)
        return
    tensors: Mapping[str, Any] | None = plain_state(module)
    flat = flats.found_in(module) if tensors is None and flats.has_flat(module) else None
    if flat is not None:
        tensors = flat.tensors
    if tensors is None:
        _place_custom_module(module, node, path, placing)
        return
    saved = _named(node)
    prefix = f"{path}/" if path else ""
    seen: dict[int, Node] = {}
    names: list[str] = []
    lives: list[torch.Tensor] = []
    nodes: list[Node] = []
    for name, tensor in tensors.items():
        child = saved.pop(name, None)
        if child is None:
            placing.missing(prefix + escape(name))
        elif id(tensor) in seen:  # tied: its memory is wanted once
            if type(tensor) not in _state.CODECS:
                placing.fits(tensor, child, prefix + escape(name))
            placing.tied(seen[id(tensor)], child)
        else:
            seen[id(tensor)] = child
            names.append(name)
            lives.append(tensor)
            nodes.append(child)
    for name in saved:
        placing.unused(prefix + escape(name))
    placed = placing.arrays_into(lives, nodes, [prefix + escape(name) for name in names])
    later = [pair for pair in zip(lives, placed, strict=True) if pair[0] is not pair[1]]
    if later:
        placing.finish.append(lambda: _settle_tensors(module, later))
    if flat is not None:
        placing.finish.append(flat.settle)


def _settle_tensors(module: Module, later: list[tuple[torch.Tensor, Any]]) -> None:
    for tensor, result in later:
        value = settle(result)
        if value is not tensor:
            _replace(module, tensor, value)


def _replace(module: Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Give a tensor of the meta device its memory, wherever it is used.

    The object stays: ties and an optimizer that was made before see the new memory. Where torch
    refuses that (a weak reference, a graph), the modules get a new object.
    """
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    new.__class__ = type(old)
    new.__dict__.update({**old.__dict__, **new.__dict__})  # a codec's tensor has parts of its own
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]  # torch ships this function untyped
    except RuntimeError:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is old:
                        table[name] = new  # type: ignore[assignment]  # one of two kinds of table


def _place_custom_module(module: Module, node: Node, path: str, placing: Placing) -> None:
    """A module with hooks or a ``load_state_dict`` of its own gets fresh tensors and decides."""
    expected = module.state_dict()
    saved = _named(node)
    # By the names of a checkpoint: what load_state_dict calls each of them.
    own = wrappers.bare_names(expected) if isinstance(expected, Mapping) else {}
    names = list(own)
    if set(names) == set(saved) or not _may_rename(module):
        prefix = f"{path}/" if path else ""
        free = _free_shapes(module)
        targets: dict[object, Node] = {}
        for name in names:
            value = expected[own[name]]
            if name not in saved:
                placing.missing(prefix + escape(name))
            elif name.rpartition(".")[0] in free or name.rpartition(".")[2] == EXTRA:
                continue
            elif (
                isinstance(value, torch.Tensor)
                and not torch.nn.parameter.is_lazy(value)
                and placing.fits(value, saved[name], prefix + escape(name))
                and _has_memory(value)
            ):
                placing.tied(targets.setdefault(leaves.identity(value), saved[name]), saved[name])
        for name in saved:
            if name not in own:
                placing.unused(prefix + escape(name))
    options: dict[str, bool] = {"strict": False} if placing.partial else {}
    if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        options["assign"] = True
    prefix = f"{path}/" if path else ""
    # A shard is filled where it lies: what load_state_dict gets is the live one.
    tree = {
        own.get(key, key): placing.array_into(expected[own[key]], child, prefix + escape(key))
        if key in own and sharded.is_sharded(expected[own[key]])
        else placing.tree(child, prefix + escape(key))
        for key, child in saved.items()
    }

    def load() -> None:
        state = OrderedDict(settle(tree))
        setattr(state, _VERSIONS, getattr(expected, _VERSIONS, OrderedDict()))
        module.load_state_dict(state, **options)

    placing.finish.append(load)


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for one on the meta device, and for a shard, which is filled for itself."""
    return not tensor.is_meta and not sharded.is_sharded(tensor)


def _named(node: Node) -> dict[Any, Node]:
    """What is saved of a module, by bare names: some files have those that compiling made."""
    keys = node.keys or []
    bare = {name: bare for bare, name in wrappers.bare_names(keys).items()}
    return {bare[key]: child for key, child in zip(keys, node.children, strict=True)}


# -- generators ----------------------------------------------------------------------------------


def _place_generator(generator: torch.Generator, node: Node, path: str, placing: Placing) -> None:
    child = optimizers.children_of(node).get("state") if node.kind == _state.DICT else None
    if child is None:
        placing.differs(generator, node, path)
    elif placing.fits(generator.get_state(), child, f"{path}/state"):
        tree = placing.tree(child, f"{path}/state")
        placing.finish.append(lambda: generator.set_state(settle(tree)))
