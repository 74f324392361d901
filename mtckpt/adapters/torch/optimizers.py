"""Optimizers: how a saved state goes back into one, moments into live ones where there are any.

Knows ``torch.optim.Optimizer`` and what its ``load_state_dict`` does to types. Does not know
modules, nor parameters that are pieces of a flat one (``flat_optimizers``). No step is ever taken.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from mtckpt import _state
from mtckpt._placing import settle
from mtckpt._state import escape
from mtckpt.adapters.torch import leaves, naming, sharded
from mtckpt.adapters.torch.loading import other_settings

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import Node
    from mtckpt.adapters.torch.naming import Names

__all__ = [
    "Here",
    "Moments",
    "Saved",
    "children_of",
    "find_saved",
    "is_elementwise",
    "load",
    "own",
    "place",
    "place_entry",
]

# State of torch.optim that has one element for each element of its parameter.
_ELEMENTWISE = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "grad_avg"),
        *("square_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
    }
)


def place(optimizer: Optimizer, node: Node, path: str, placing: Placing) -> bool:
    """Moments go into live ones where there are any, else into fresh tensors; no step is taken.

    False for an optimizer that has its own idea of what a state is: it gets fresh tensors.
    """
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        if node.kind != _state.DICT:
            placing.differs(optimizer, node, path)
        return node.kind != _state.DICT
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    here = Here(sizes, lambda: naming.names_of(optimizer))
    saved = find_saved(optimizer, here, node, path, placing)
    if saved is None:
        return True
    live = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = {str(i): parameter for i, parameter in zip(chain(*saved.ids), live, strict=True)}
    id_of = {str(i): i for i in chain(*saved.ids)}
    trees: dict[Any, Any] = {}
    moments = Moments()
    for key, child in saved.entries.items():
        parameter = parameters.get(str(key))
        child_path = f"{path}/state/{escape(key)}"
        if parameter is None or child.kind != _state.DICT:
            trees[key] = placing.tree(child, child_path)
        else:
            trees[id_of[str(key)]] = place_entry(
                optimizer, parameter, child, child_path, placing, moments
            )
    moments.place(placing)
    others = saved.others(path, placing)

    def finish() -> None:
        settled = settle(others)
        for group, ids in zip(settled["param_groups"], saved.ids, strict=True):
            if group.get("params") != ids:  # by name: in another order, which are its own names
                group["params"] = ids
                group.pop("param_names", None)
        load(optimizer, parameters, settle(trees), settled)

    placing.finish.append(finish)
    return True


def is_elementwise(optimizer: Optimizer, name: object) -> bool:
    """True for state that is known to have one element for each of its parameter."""
    return name in _ELEMENTWISE and type(optimizer).__module__.startswith("torch.optim")


class Here(NamedTuple):
    """The parameters of a live optimizer: how many in each group, and their names if known.

    ``is_ordered``: they have the order in which the module without wrappers has them.
    """

    sizes: list[int]
    names: Callable[[], Names | None]
    is_ordered: bool = True


class Saved(NamedTuple):
    """The state of an optimizer in a checkpoint: ``ids`` are its parameters, group by group, in the
    order of those here."""

    fields: dict[str, Node]
    entries: dict[Any, Node]
    ids: list[list[Any]]

    def others(self, path: str, placing: Placing) -> dict[str, Any]:
        """All but the state of parameters."""
        return {
            name: placing.tree(child, f"{path}/{escape(name)}")
            for name, child in self.fields.items()
            if name != "state"
        }


def find_saved(
    optimizer: Optimizer, here: Here, node: Node, path: str, placing: Placing
) -> Saved | None:
    """What was saved; None, and a difference, if its groups are not those of ``here``."""
    fields = children_of(node)
    state, groups = fields.get("state"), fields.get("param_groups")
    if state is None or state.kind != _state.DICT or groups is None:
        placing.differs(optimizer, node, path)
        return None
    saved = [children_of(group) for group in groups.children]
    ids = [_saved_list(group, "params", placing) for group in saved]
    if here.sizes != list(map(len, ids)):
        placing.diff.differing.append(
            f"{path}/param_groups: groups of {here.sizes} parameters here, "
            f"of {list(map(len, ids))} in the checkpoint"
        )
        return None
    ids, why = _in_order(optimizer, ids, saved, here, placing)
    if why:
        placing.diff.differing.append(f"{path}/param_groups: {why}")
        return None
    for i, group in enumerate(() if placing.partial else saved):
        plain = {
            name: placing.plain[child.index] if child.kind == _state.PLAIN else None
            for name, child in group.items()
        }
        if why := other_settings(optimizer, i, plain):
            placing.diff.differing.append(f"{path}/param_groups/{i}: {why}")
    return Saved(fields, dict(zip(state.keys or [], state.children, strict=True)), ids)


def _in_order(
    optimizer: Optimizer,
    ids: list[list[Any]],
    saved: list[dict[str, Node]],
    here: Here,
    placing: Placing,
) -> tuple[list[list[Any]], str]:
    """See ``naming.in_order``; what a hook of loading makes of names is for it alone."""
    goes_by_name = any(isinstance(i, str) for i in chain(*ids))
    names = ids if goes_by_name else [_saved_list(g, "param_names", placing) for g in saved]
    is_told = list(map(len, names)) == here.sizes and all(isinstance(n, str) for n in chain(*names))
    is_needed = goes_by_name or not here.is_ordered
    if not is_needed and (not is_told or optimizer._optimizer_load_state_dict_pre_hooks):
        return ids, ""
    known = here.names()
    return naming.in_order(ids, names if is_told else None, known, is_needed=is_needed)


def children_of(node: Node) -> dict[str, Node]:
    """What is in a dict, by the text of its keys; of anything else, nothing."""
    if node.kind != _state.DICT:
        return {}
    return dict(zip(map(str, node.keys or []), node.children, strict=True))


def _saved_list(group: dict[str, Node], name: str, placing: Placing) -> list[Any]:
    """A list of plain values of a saved group: its parameters as numbers, or their names."""
    found = group.get(name)
    if found is None:
        return []
    return [placing.plain[child.index] for child in found.children if child.kind == _state.PLAIN]


class Moments:
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


def place_entry(
    optimizer: Optimizer,
    parameter: torch.Tensor,
    node: Node,
    path: str,
    placing: Placing,
    moments: Moments,
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
        elementwise = is_elementwise(optimizer, name)
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


def load(
    optimizer: Optimizer,
    parameters: dict[str, torch.Tensor],
    state: dict[Any, Any],
    others: dict[str, Any],
) -> None:
    """Run the optimizer's own ``load_state_dict``, then undo what it does to types."""
    had: set[int] = set()
    for key, entry in state.items():
        parameter = parameters.get(str(key))
        if parameter is not None and isinstance(entry, dict):
            state[key] = {
                name: own(_laid_out(value, parameter), had) for name, value in entry.items()
            }
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


def own(value: Any, had: set[int]) -> Any:
    """A tensor that no other parameter has; ``had`` are the ids of those that some have.

    Of FSDP1's flat parameters all in one have one count of steps. As one tensor of several
    parameters without FSDP it would be counted up several times a step.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in had:
        return value.detach().clone()
    had.add(id(value))
    return value


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
