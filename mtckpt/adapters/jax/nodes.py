"""Nodes of pytrees: what is inside them by JAX's own rules, and how new ones are made.

Knows every type that is registered with ``jax.tree_util`` (dataclasses, Linen's FrozenDict and
TrainState, Equinox modules, NNX ...) and NNX's variables, which are filled in their place. Does not
know plain dicts, lists, tuples and named tuples: those are everybody's. Nothing of a tree's
definition is saved: functions, static fields and nodes without leaves are the template's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from mtckpt import _state
from mtckpt._placing import later, settle
from mtckpt._state import escape

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import Node

__all__ = ["key_name", "place_node", "state_of"]

_EVERYBODYS = (int, float, str, bool, bytes, type(None), dict, list, tuple)
_VALUE = "value"  # the key of what an NNX variable holds


def state_of(value: object) -> object | None:
    """One level of the tree: a list where children are numbered, else a dict by their keys."""
    if isinstance(value, _EVERYBODYS):
        return None
    if _is_variable(value):
        return {_VALUE: _raw(value)}
    opened = _opened(value)
    if opened is None:
        return None
    named = _named(opened[0])
    if [name for name, _, _ in named] == list(range(len(named))) and named:
        return [child for _, _, child in named]
    return {name: child for name, _, child in named}


def place_node(live: Any, node: Node, path: str, placing: Placing) -> Any | None:
    """See ``StateAdapter.place_object``. NNX's objects are filled, all other nodes made anew.

    A leaf for which the template has ``...`` is not read, and that stays.
    """
    if live is ...:
        is_leaf = node.kind in (_state.ARRAY, _state.PLAIN)
        return live if is_leaf else placing.differs(live, node, path)
    if isinstance(live, _EVERYBODYS):
        return None
    if _is_variable(live):
        return _place_variable(live, node, path, placing)
    opened = _opened(live)
    if opened is None:
        return None
    pairs, definition = opened
    saved = _saved(node)
    if saved is None:
        return placing.differs(live, node, path)
    prefix = f"{path}/" if path else ""
    matched = [child for _, child in pairs]
    replaced = placing.replaced
    for name, position, child in _named(pairs):
        text = escape(name)
        stored = saved.pop(text, None)
        if stored is None:
            placing.missing(prefix + text)
        else:
            matched[position] = placing.match(child, stored, prefix + text, top=False)
    if path:
        for text in saved:
            placing.unused(prefix + text)
    if _is_object(live):
        # What holds it sees what it holds now: nobody has to fetch it from Restored.state.
        placing.replaced = replaced
        placing.finish.append(lambda: _set_children(live, pairs, matched))
        return live
    placing.replaced = True
    return later(lambda: _rebuilt(live, pairs, matched, definition))


def _opened(value: object) -> tuple[list[tuple[Any, Any]], Any] | None:
    """The children of a node with their keys, and what makes it anew; None for a leaf."""
    if isinstance(value, Iterator) and type(value).__module__ == "builtins":
        return None  # JAX warns of generators and the like: they are no nodes
    entries, definition = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda each: each is not value
    )
    if len(entries) == 1 and not entries[0][0]:
        return None
    return [(keys[0], child) for keys, child in entries], definition


def _named(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, int, Any]]:
    """Name, position and child of every child that is saved."""
    return [
        (key_name(key), position, child)
        for position, (key, child) in enumerate(pairs)
        if not _is_structure(child)
    ]


def key_name(key: Any) -> Any:
    """What JAX calls a child; a number where children are numbered."""
    if isinstance(key, jax.tree_util.SequenceKey):
        return key.idx
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
        return key.key
    if isinstance(key, jax.tree_util.DictKey) and type(key.key) in (str, int):
        return key.key
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    return str(key)


def _is_structure(child: Any) -> bool:
    """True for what is no data: a function, or a node in which there is nothing."""
    if isinstance(child, _EVERYBODYS) or _is_variable(child):
        return False
    opened = _opened(child)
    if opened is None:
        return callable(child) and not hasattr(child, "state_dict")
    return not opened[0]


def _saved(node: Node) -> dict[str, Node] | None:
    """A saved node's children by the text of their key; None for what has none."""
    if node.kind == _state.DICT:
        return dict(zip(map(escape, node.keys or []), node.children, strict=True))
    if node.kind in (_state.LIST, _state.TUPLE):
        return {str(i): child for i, child in enumerate(node.children)}
    return None


def _rebuilt(
    live: Any, pairs: Sequence[tuple[Any, Any]], matched: Sequence[Any], definition: Any
) -> Any:
    children = [settle(child) for child in matched]
    if all(new is old for new, (_, old) in zip(children, pairs, strict=True)):
        return live
    return definition.unflatten(children)


# -- NNX -------------------------------------------------------------------------------------------


def _is_variable(value: object) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Variable)


def _is_object(value: object) -> bool:
    """True for modules, optimizers and the like, which change in their place."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, getattr(nnx, "Pytree", None) or nnx.Object)


def _raw(variable: Any) -> Any:
    get = getattr(variable, "get_raw_value", None)
    return variable.raw_value if get is None else get()


def _place_variable(variable: Any, node: Node, path: str, placing: Placing) -> Any:
    saved = _saved(node)
    stored = None if saved is None else saved.pop(_VALUE, None)
    if stored is None or saved:
        return placing.differs(variable, node, path)
    old = _raw(variable)
    matched = placing.match(old, stored, f"{path}/{_VALUE}", top=False)

    def write_back() -> None:
        value = settle(matched)
        if value is not old:
            if hasattr(variable, "set_raw_value"):
                variable.set_raw_value(value)
            else:
                variable.raw_value = value

    placing.finish.append(write_back)
    return variable


def _set_children(live: Any, pairs: Sequence[tuple[Any, Any]], matched: Sequence[Any]) -> None:
    for (key, old), child in zip(pairs, matched, strict=True):
        value = settle(child)
        if value is old:
            continue
        if isinstance(key, jax.tree_util.GetAttrKey):
            setattr(live, key.name, value)
        else:
            live[key_name(key)] = value
