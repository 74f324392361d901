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

from mtckpt import _state
from mtckpt._placing import settle
from mtckpt._state import escape
from mtckpt.adapters.torch import guards, leaves, replicas, sharded, wrappers
from mtckpt.adapters.torch.loading import OWN_NAMES, PLAIN_LOADS, check_taken_back, other_settings

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import Node

__all__ = ["place_object", "plain_state", "state_of"]

# State of torch.optim that has one element for each element of its parameter.
_ELEMENTWISE = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "grad_avg"),
        *("square_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
    }
)


def state_of(value: Any) -> Any:
    """The tree that stands for ``value`` in a checkpoint, or None if it is no object of torch's."""
    value = wrappers.unwrapped(value)
    if replicas.is_replicated(value):
        return replicas.state_of_module(value, state_of(value.module))
    if isinstance(value, Module):
        plain = plain_state(value)
        return _own_state(value) if plain is None else plain
    if isinstance(value, Optimizer):
        guards.note(value)
        return replicas.state_of_optimizer(value, value.state_dict())
    if isinstance(value, torch.Generator):
        return {"state": value.get_state()}
    return None


def place_object(live: Any, node: Node, path: str, placing: Placing) -> bool:
    """True if ``live`` is an object of torch's, which now is matched; it is filled in its place."""
    live = wrappers.unwrapped(live)
    if replicas.is_replicated(live):
        # The wrapper has no state: any other may have saved what it holds.
        live = wrappers.unwrapped(live.module)
    if isinstance(live, Module):
        _place_module(live, node, path, placing)
        return True
    if isinstance(live, Optimizer):
        return _place_optimizer(live, node, path, placing)
    if isinstance(live, torch.Generator):
        _place_generator(live, node, path, placing)
        return True
    return False


# -- modules -------------------------------------------------------------------------------------


def plain_state(module: Module) -> dict[str, torch.Tensor] | None:
    """What ``state_dict(keep_vars=True)`` gives, faster; None if a part has its own idea of it."""
    found: dict[str, torch.Tensor] = {}
    return found if _collect(module, "", found) else None


def _collect(module: Module, prefix: str, found: dict[str, torch.Tensor]) -> bool:
    if not _is_plain(module):
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


def _is_plain(module: Module) -> bool:
    """True if nobody has changed how this one module is saved and loaded (children aside)."""
    kind = type(module)
    return (
        kind._save_to_state_dict is Module._save_to_state_dict
        and kind._load_from_state_dict in PLAIN_LOADS
        and kind.state_dict is Module.state_dict
        and kind.load_state_dict is Module.load_state_dict
        and kind.get_extra_state is Module.get_extra_state
        and kind.set_extra_state is Module.set_extra_state
        and not module._state_dict_hooks
        and not module._state_dict_pre_hooks
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
        and OWN_NAMES.isdisjoint(module.__dict__)
        and not isinstance(module, torch.jit.ScriptModule)
    )


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
    tensors = plain_state(module)
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
            elif name.rpartition(".")[0] in free:
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
        # Versions by module, which torch keeps beside the names; what is loaded has today's.
        state._metadata = getattr(expected, "_metadata", OrderedDict())  # type: ignore[attr-defined]
        module.load_state_dict(state, **options)

    placing.finish.append(load)


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for one on the meta device, and for a shard, which is filled for itself."""
    return not tensor.is_meta and not sharded.is_sharded(tensor)


def _children(node: Node) -> dict[str, Node]:
    return dict(zip(map(str, node.keys or []), node.children, strict=True))


def _named(node: Node) -> dict[Any, Node]:
    """What is saved of a module, by bare names: some files have those that compiling made."""
    keys = node.keys or []
    bare = {name: bare for bare, name in wrappers.bare_names(keys).items()}
    return {bare[key]: child for key, child in zip(keys, node.children, strict=True)}


# -- optimizers ----------------------------------------------------------------------------------


def _place_optimizer(optimizer: Optimizer, node: Node, path: str, placing: Placing) -> bool:
    """Moments go into live ones where there are any, else into fresh tensors; no step is taken."""
    fields = _children(node) if node.kind == _state.DICT else {}
    state, groups = fields.get("state"), fields.get("param_groups")
    if state is None or state.kind != _state.DICT or groups is None:
        placing.differs(optimizer, node, path)
        return True
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return False  # it has its own idea of what a state is: load_state_dict gets fresh tensors
    ids = [_saved_ids(group, placing) for group in groups.children]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if here != list(map(len, ids)):
        placing.diff.differing.append(
            f"{path}/param_groups: groups of {here} parameters here, "
            f"of {list(map(len, ids))} in the checkpoint"
        )
        return True
    for i, group in enumerate(groups.children if not placing.partial else ()):
        if why := other_settings(optimizer, _children(group)):
            placing.diff.differing.append(f"{path}/param_groups/{i}: {why}")
    live = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = {str(i): parameter for i, parameter in zip(chain(*ids), live, strict=True)}
    trees: dict[Any, Any] = {}
    moments = _Moments()
    for key, child in zip(state.keys or [], state.children, strict=True):
        parameter = parameters.get(str(key))
        child_path = f"{path}/state/{escape(key)}"
        if parameter is None or child.kind != _state.DICT:
            trees[key] = placing.tree(child, child_path)
        else:
            trees[int(key)] = _place_entry(
                optimizer, parameter, child, child_path, placing, moments
            )
    moments.place(placing)
    others = {
        name: placing.tree(child, f"{path}/{escape(name)}")
        for name, child in fields.items()
        if name != "state"
    }
    placing.finish.append(
        lambda: _load_optimizer(optimizer, parameters, settle(trees), settle(others))
    )
    return True


def _saved_ids(group: Node, placing: Placing) -> list[int]:
    """The parameters of a saved group, as numbers."""
    params = _children(group).get("params") if group.kind == _state.DICT else None
    if params is None:
        return []
    return [placing.plain[child.index] for child in params.children if child.kind == _state.PLAIN]


class _Moments:
    """Live tensors of an optimizer's state, and where in its tree each of them stands."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.nodes: list[Node] = []
        self.paths: list[str] = []
        self.places: list[tuple[dict[Any, Any], Any]] = []

    def add(
        self, tensor: torch.Tensor, node: Node, path: str, entry: dict[Any, Any], name: Any
    ) -> None:
        self.tensors.append(tensor)
        self.nodes.append(node)
        self.paths.append(path)
        self.places.append((entry, name))
        entry[name] = tensor  # keeps the order of the entry

    def place(self, placing: Placing) -> None:
        """Ask for the bytes of all of them, in one go."""
        placed = placing.arrays_into(self.tensors, self.nodes, self.paths)
        for (entry, name), value in zip(self.places, placed, strict=True):
            entry[name] = value


def _place_entry(
    optimizer: Optimizer,
    parameter: torch.Tensor,
    node: Node,
    path: str,
    placing: Placing,
    moments: _Moments,
) -> dict[Any, Any]:
    """The state of one parameter: a tree in which live tensors stand where they can be filled."""
    live = optimizer.state.get(parameter, {})
    entry: dict[Any, Any] = {}
    for name, child in zip(node.keys or [], node.children, strict=True):
        child_path = f"{path}/{escape(name)}"
        if child.kind != _state.ARRAY:
            entry[name] = placing.tree(child, child_path)
            continue
        spec = placing.arrays[child.index].spec
        elementwise = name in _ELEMENTWISE and type(optimizer).__module__.startswith("torch.optim")
        if torch.nn.parameter.is_lazy(parameter):  # its module may be told its shape by then
            entry[name] = placing.tree(child, child_path)
            continue
        if elementwise and spec.whole_shape != parameter.shape:
            placing.diff.differing.append(
                f"{child_path}: for a parameter of shape {list(parameter.shape)} here, "
                f"of shape {list(spec.whole_shape)} in the checkpoint"
            )
            continue
        tensor = live.get(name)
        order = leaves.order_in(spec)
        if tensor is None and spec.whole_shape == parameter.shape and (elementwise or not order):
            tensor = sharded.empty_like(parameter, leaves.DTYPE_OF.get(spec.dtype))
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == spec.whole_shape
            and leaves.NAME_OF.get(tensor.dtype) == spec.dtype
            and (elementwise or not order or leaves.order_of(tensor) == order)
        ):
            moments.add(tensor, child, child_path, entry, name)
        else:
            entry[name] = placing.tree(child, child_path)
    return entry


def _load_optimizer(
    optimizer: Optimizer,
    parameters: dict[str, torch.Tensor],
    state: dict[Any, Any],
    others: dict[str, Any],
) -> None:
    """Run the optimizer's own ``load_state_dict``, then undo what it does to types."""
    for key, entry in state.items():
        parameter = parameters.get(str(key))
        if parameter is not None and isinstance(entry, dict):
            state[key] = {name: _laid_out(value, parameter) for name, value in entry.items()}
    hyper = [
        {name: value for name, value in group.items() if isinstance(value, torch.Tensor)}
        for group in optimizer.param_groups
    ]
    # Hooks may change the dicts that they are given; ours still say what was saved.
    given = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state.items()}
    optimizer.load_state_dict({"state": given, **others})
    hooked = bool(
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )
    for key, entry in state.items():
        parameter = parameters.get(str(key))
        loaded = None if parameter is None else optimizer.state.get(parameter)
        if loaded is None or not isinstance(entry, dict):
            continue
        for name, value in entry.items():
            if name in loaded:
                loaded[name] = _as_saved(loaded[name], value, hooked)
    for group, live in zip(optimizer.param_groups, hyper, strict=True):
        for name, tensor in live.items():
            value = group.get(name)
            # A learning rate that is a tensor is read by a captured graph: the object stays.
            if not isinstance(value, torch.Tensor):
                continue
            if (value.shape, value.dtype) == (tensor.shape, tensor.dtype):
                group[name] = leaves.assign(tensor, value)


def _as_saved(loaded: Any, saved: Any, hooked: bool) -> Any:
    """The loaded value with the saved type.

    ``Optimizer.load_state_dict`` casts state to the type of its parameter: float32 moments of a
    bfloat16 parameter would lose their digits. What a hook has changed is left as the hook wants.
    """
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        if loaded is saved or loaded.dtype == saved.dtype or loaded.shape != saved.shape:
            return loaded
        if hooked and not leaves.same_bits(loaded, saved.to(loaded.device, loaded.dtype)):
            return loaded
        return saved.to(loaded.device)
    alike = type(saved) in (list, tuple) and isinstance(loaded, type(saved))
    if alike and len(saved) == len(loaded):
        pairs = zip(loaded, saved, strict=True)
        return type(saved)(_as_saved(here, there, hooked) for here, there in pairs)
    return loaded


def _laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """A moment in the memory order of its parameter (channels_last), as the optimizer makes it.

    Fused kernels insist on it.
    """
    if (
        not isinstance(value, torch.Tensor)
        or torch.nn.parameter.is_lazy(parameter)
        or sharded.is_sharded(value)
        or value.shape != parameter.shape
        or parameter.is_contiguous()
        or not value.is_contiguous()
    ):
        return value
    like = torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False)
    return value if like.is_contiguous() else leaves.assign(like, value)


# -- generators ----------------------------------------------------------------------------------


def _place_generator(generator: torch.Generator, node: Node, path: str, placing: Placing) -> None:
    child = _children(node).get("state") if node.kind == _state.DICT else None
    if child is None:
        placing.differs(generator, node, path)
    elif placing.fits(generator.get_state(), child, f"{path}/state"):
        tree = placing.tree(child, f"{path}/state")
        placing.finish.append(lambda: generator.set_state(settle(tree)))
