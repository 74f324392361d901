"""Optimizers of FSDP1 modules: their state as that of the module's parameters, and back.

Knows pieces of flat parameters (``flats``) and what optimizers keep of them. With
``use_orig_params`` an optimizer has a piece of each parameter, else all of a unit in one. What it
saves is what the optimizer of the same module without FSDP would. Does not communicate: what a
rank holds no element of is described as what it does hold. No step is ever taken.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from mtckpt import _state
from mtckpt._placing import settle
from mtckpt._state import escape
from mtckpt.adapters.torch import flats, leaves, optimizers
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import ArraySpec, Node
    from mtckpt.adapters.torch.flats import Unit

__all__ = ["has_flat", "place", "state_of"]

_At = tuple[int, int]  # the module that a parameter was seen in, and its place there
_NOWHERE = -1, -1


class _Member(NamedTuple):
    """One parameter of the module without FSDP: in which of the optimizer's it is, and where.

    For ``name``, which is empty if nobody knows it, and ``mixed`` see ``flats.Known``.
    """

    number: int
    parameter: torch.Tensor
    unit: Unit | None
    part: int
    name: str
    mixed: int

    @property
    def is_here(self) -> bool:
        """True if this rank holds any of its elements."""
        return self.unit is None or bool(self.unit.flat._shard_param_infos[self.part].in_shard)

    def is_elementwise(self, value: object) -> bool:
        """True for a tensor with an element for each of the optimizer's parameter."""
        return isinstance(value, torch.Tensor) and value.shape == self.parameter.shape

    def boxes(self, value: torch.Tensor) -> Any:
        """The part of such a tensor that is this parameter's."""
        assert self.unit is not None
        if not self.unit.keeps_parameters:
            return self.unit.boxes(self.part, self.unit.cut(self.part, value), value.dtype)
        if self.unit.is_whole:
            return self.unit.whole(value)
        return self.unit.boxes(self.part, value if self.is_here else None, value.dtype)


def has_flat(optimizer: Optimizer) -> bool:
    """True if FSDP1 has flattened any of an optimizer's parameters."""
    return flats.is_loaded() and any(
        any(map(flats.is_flattened, group["params"])) for group in optimizer.param_groups
    )


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """As ``Optimizer.state_dict``, by the parameters of the module without FSDP.

    Raises UnsupportedState where a parameter's module is not known, or nothing of it is here.
    """
    _check(optimizer)
    groups = _members(optimizer)
    ids = _ids(optimizer, groups)
    native = optimizer.state_dict()
    entries, saved_groups = native["state"], native["param_groups"]
    members = [(member, at) for at, group in enumerate(groups) for member in group]
    likes = [(m, at, entries[m.number]) for m, at in members if m.is_here and entries.get(m.number)]
    state: dict[int | str, Any] = {}
    had: set[int] = set()
    for place, (member, at) in zip(ids, members, strict=True):
        entry = entries.get(member.number)
        # An optimizer may make state of what it never steps here: its count of steps stays 0.
        described = None if member.is_here else _described(member, at, likes, had)
        if described is not None:
            state[place] = described
        elif entry is not None:
            state[place] = {name: _part(member, value, had) for name, value in entry.items()}
    numbers = {member.number for member, _ in members}
    state.update({key: value for key, value in entries.items() if key not in numbers})
    rest = iter(ids)
    for group, inside in zip(saved_groups, groups, strict=True):
        group["params"] = list(itertools.islice(rest, len(inside)))
        group.pop("param_names", None)  # those that FSDP gives
    return {**native, "state": state, "param_groups": saved_groups}


def _ids(optimizer: Optimizer, groups: Sequence[Sequence[_Member]]) -> Sequence[int | str]:
    """What the parameters go by: their numbers, or their names where their order is not known."""
    members = list(itertools.chain(*groups))
    if all(map(_is_ordered, groups)):
        return range(len(members))
    names = [member.name for member in members]
    if "" in names or len(set(names)) < len(names):
        raise _unsupported(
            optimizer,
            "an FSDP1 module ignores some parameters of a part of it, so that their order is not"
            " known, and not all parameters of its optimizer have a name of their own",
            "put one module into the state that all parameters of the optimizer are in",
            "or give ignored parameters an optimizer of their own",
        )
    return names


def _is_ordered(group: Sequence[_Member]) -> bool:
    """False if some of a group are of a part whose other parameters in it FSDP ignores."""
    mixed = [{m.mixed for m in group if (m.unit is None) is ignored} for ignored in (True, False)]
    return not (mixed[0] & mixed[1]) - {-1}


def _part(member: _Member, value: Any, had: set[int]) -> Any:
    here = member.unit is not None and member.is_elementwise(value)
    return member.boxes(value) if here else optimizers.own(value, had)


def _described(
    member: _Member,
    at: int,
    likes: Sequence[tuple[_Member, int, dict[str, Any]]],
    had: set[int],
) -> dict[str, Any] | None:
    """What other ranks keep of a parameter that this one has no element of, without any element;
    None where nothing is known of it.

    An optimizer steps all parameters of a unit together, and those of a group alike.
    """
    if not member.parameter.requires_grad or not likes:
        return None
    assert member.unit is not None
    flat = member.unit.flat

    def nearness(like: tuple[_Member, int, dict[str, Any]]) -> tuple[bool, bool]:
        return like[0].unit is not None and like[0].unit.flat is flat, like[1] == at

    other, _, entry = max(likes, key=nearness)
    return {
        name: member.unit.boxes(member.part, None, value.dtype)
        if other.is_elementwise(value)
        else optimizers.own(value, had)
        for name, value in entry.items()
    }


def _check(optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if (
        kind.state_dict is not Optimizer.state_dict
        or kind.load_state_dict is not Optimizer.load_state_dict
    ):
        raise _unsupported(
            optimizer,
            f"{kind.__module__}.{kind.__qualname__} has parameters of an FSDP1 module, and saves"
            " or loads itself in a way of its own",
            "put the optimizer that is inside of it into the state",
        )


def _members(optimizer: Optimizer) -> list[list[_Member]]:
    """By group, in the order that the module without FSDP has its parameters in."""
    units: dict[int, Unit | None] = {}
    numbers = itertools.count()
    groups: list[list[_Member]] = []
    missing: list[str] = []
    for group in optimizer.param_groups:
        placed: list[tuple[_At, _Member]] = []
        for parameter in group["params"]:
            placed += _pieces(parameter, next(numbers), units, missing)
        groups.append(list(_in_order(placed)))
    if missing:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        raise _unsupported(
            optimizer,
            f"{len(missing)} of {count} parameters of an optimizer are of an FSDP1 module that is"
            " not in the state",
            "put the module that FSDP was given into the state, beside its optimizer",
        )
    here = [m for members in groups for m in members if m.unit is not None]
    if not any(member.is_here for member in here):
        raise _unsupported(
            optimizer,
            "this rank holds no element of any parameter of an optimizer: what other ranks keep"
            " of them is not known here",
            "wrap more in that FSDP module, or shard it over fewer ranks",
            "or use fully_shard (FSDP2)",
        )
    return groups


def _pieces(
    parameter: torch.Tensor, number: int, units: dict[int, Unit | None], missing: list[str]
) -> Iterator[tuple[_At, _Member]]:
    """The parameters that one of an optimizer's stands for, with their places."""
    found = flats.known(parameter)
    if not flats.is_flattened(parameter):
        if found is None:
            yield _NOWHERE, _Member(number, parameter, None, 0, "", -1)
        else:
            member = _Member(number, parameter, None, 0, found.names[0], found.mixed[0])
            yield (found.module, found.places[0]), member
        return
    fsdp = None if found is None or found.fsdp is None else found.fsdp()
    if found is None or fsdp is None:
        missing.append(str(number))
        return
    unit = units[id(fsdp)] if id(fsdp) in units else units.setdefault(id(fsdp), found.unit())
    if found.part is not None:  # in the order that it was given in, which is the module's own
        name, mixed = found.names[0], found.mixed[0]
        yield _NOWHERE, _Member(number, parameter, unit, found.part, name, mixed)
        return
    told = zip(found.places, found.names, found.mixed, strict=True)
    for index, (place, name, mixed) in enumerate(told):
        yield (found.module, place), _Member(number, parameter, unit, index, name, mixed)


def _in_order(placed: Sequence[tuple[_At, _Member]]) -> Iterator[_Member]:
    """Those of one module in its order, between others, which stay where they are."""
    for module, run in itertools.groupby(placed, key=lambda each: each[0][0]):
        members = list(run)
        if module != _NOWHERE[0]:
            members.sort(key=lambda each: each[0])
        yield from (member for _, member in members)


def _unsupported(optimizer: Optimizer, what: str, *actions: str) -> UnsupportedState:
    return UnsupportedState(
        what,
        path="",
        type_name=type(optimizer).__qualname__,
        state="nothing was written, live state unchanged",
        actions=actions,
    )


# -- restoring -------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What a checkpoint has of one parameter."""

    member: _Member
    entry: Node | None
    path: str


def place(optimizer: Optimizer, node: Node, path: str, placing: Placing) -> None:
    """Moments go into live ones where there are any, else into fresh ones of the right shape."""
    _check(optimizer)
    groups = _members(optimizer)
    here = optimizers.Here(
        list(map(len, groups)), lambda: _names(groups), all(map(_is_ordered, groups))
    )
    saved = optimizers.find_saved(optimizer, here, node, path, placing)
    if saved is None:
        return
    by_number: dict[int, list[_Saved]] = {}
    entries = dict(saved.entries)
    for member, key in zip(itertools.chain(*groups), itertools.chain(*saved.ids), strict=True):
        entry = entries.pop(key, None)
        by_number.setdefault(member.number, []).append(
            _Saved(member, entry, f"{path}/state/{escape(key)}")
        )
    parameters: dict[str, torch.Tensor] = {}
    trees: dict[Any, Any] = {  # what is of no parameter
        key: placing.tree(child, f"{path}/state/{escape(key)}") for key, child in entries.items()
    }
    moments = optimizers.Moments()
    for number, parts in sorted(by_number.items()):
        first = parts[0]
        parameters[str(number)] = first.member.parameter
        if first.member.unit is None:
            if first.entry is not None:
                trees[number] = optimizers.place_entry(
                    optimizer, first.member.parameter, first.entry, first.path, placing, moments
                )
        elif any(part.entry is not None for part in parts) and _is_stepped_here(first.member):
            trees[number] = _place_unit(optimizer, parts, placing)
    moments.place(placing)
    others = saved.others(path, placing)

    def finish() -> None:
        settled, numbers = settle(others), itertools.count()
        for group, live in zip(settled["param_groups"], optimizer.param_groups, strict=True):
            group["params"] = [next(numbers) for _ in live["params"]]
            group.pop("param_names", None)
        optimizers.load(optimizer, parameters, settle(trees), settled)

    placing.finish.append(finish)


def _names(groups: Sequence[Sequence[_Member]]) -> list[list[str]] | None:
    """By group; None if any is not known."""
    names = [[member.name for member in group] for group in groups]
    return None if any("" in group for group in names) else names


def _is_stepped_here(member: _Member) -> bool:
    """False for a parameter without an element on this rank, which its optimizer passes over."""
    assert member.unit is not None
    return member.is_here or not member.unit.keeps_parameters


def _place_unit(optimizer: Optimizer, parts: Sequence[_Saved], placing: Placing) -> dict[Any, Any]:
    """The state of one of the optimizer's parameters, put together from those that are in it."""
    parameter = parts[0].member.parameter
    live = optimizer.state.get(parameter, {})
    children = [
        {}
        if part.entry is None
        else dict(zip(part.entry.keys or [], part.entry.children, strict=True))
        for part in parts
    ]
    if len(set(map(frozenset, children))) > 1:
        placing.diff.differing.append(
            f"{parts[0].path}: parameters that FSDP has made one have different state in the"
            " checkpoint; use_orig_params=True can hold it"
        )
        return {}
    entry: dict[Any, Any] = {}
    for name in children[0]:
        nodes = [each[name] for each in children]
        paths = [f"{part.path}/{escape(name)}" for part in parts]
        dtype = _dtype_if_elementwise(parts, nodes, placing)
        if dtype is None:
            if why := _why_not_one(optimizer, name, parts, nodes, placing):
                placing.diff.differing.append(f"{paths[0]}: {why}")
                continue
            entry[name] = placing.tree(nodes[0], paths[0])
            for other in nodes[1:]:
                placing.tied(nodes[0], other)
            continue
        moment = live.get(name)
        if not parts[0].member.is_elementwise(moment) or moment.dtype != dtype:
            moment = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        placed = [
            placing.array_into(part.member.boxes(moment), child, child_path)
            for part, child, child_path in zip(parts, nodes, paths, strict=True)
        ]
        placing.finish.append(functools.partial(settle, placed))
        entry[name] = moment
    return entry


def _why_not_one(
    optimizer: Optimizer,
    name: object,
    parts: Sequence[_Saved],
    nodes: Sequence[Node],
    placing: Placing,
) -> str:
    """Why what was saved for some parameters cannot be what one has; empty if it may be.

    Whether arrays that may are the same is for ``Placing.tied`` to see.
    """
    specs = [_spec_of(node, placing) for node in nodes]
    if optimizers.is_elementwise(optimizer, name):
        for part, spec in zip(parts, specs, strict=True):
            assert part.member.unit is not None
            shape = part.member.unit.shape(part.member.part)
            if spec is not None and spec.whole_shape != shape:
                return (
                    f"for a parameter of shape {list(shape)} here,"
                    f" of shape {list(spec.whole_shape)} in the checkpoint"
                )
    if any(not _is_alike(nodes[0], other, placing) for other in nodes[1:]):
        return "differs among parameters that FSDP has made one; use_orig_params=True can hold it"
    return ""


def _spec_of(node: Node, placing: Placing) -> ArraySpec | None:
    return placing.arrays[node.index].spec if node.kind == _state.ARRAY else None


def _is_alike(one: Node, other: Node, placing: Placing) -> bool:
    """True for the same values, and for arrays of the same type and shape."""
    if (one.kind, one.name, one.keys) != (other.kind, other.name, other.keys):
        return False
    if one.kind == _state.ARRAY:
        specs = [placing.arrays[each.index].spec for each in (one, other)]
        return specs[0].dtype == specs[1].dtype and specs[0].whole_shape == specs[1].whole_shape
    if one.kind == _state.PLAIN:
        return repr(placing.plain[one.index]) == repr(placing.plain[other.index])
    return len(one.children) == len(other.children) and all(
        _is_alike(*pair, placing) for pair in zip(one.children, other.children, strict=True)
    )


def _dtype_if_elementwise(
    parts: Sequence[_Saved], nodes: Sequence[Node], placing: Placing
) -> torch.dtype | None:
    """The type of what has an element for each of all these parameters; None for anything else."""
    for part, node in zip(parts, nodes, strict=True):
        unit, index = part.member.unit, part.member.part
        assert unit is not None
        if node.kind != _state.ARRAY:
            return None
        if placing.arrays[node.index].spec.whole_shape != unit.shape(index):
            return None
    return leaves.DTYPE_OF.get(placing.arrays[nodes[0].index].spec.dtype)
