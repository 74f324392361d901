"""Containers that stand at several places of a template, and whether they can be one there.

Knows live containers and the nodes that were saved for them. Does not know files or frameworks.
A dict that is filled in its place can be filled with one thing only: where a checkpoint has another
at its next place, that place gets a copy.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any

from mtckpt import _state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._renaming import Stored
    from mtckpt._state import Node

__all__ = ["Aliases"]


class Aliases:
    """The containers of one template that were met. ``arrays`` and ``plain`` are what was saved."""

    def __init__(self, arrays: Sequence[Stored], plain: Sequence[Any]) -> None:
        self._arrays = arrays
        self._plain = plain
        self._met: dict[int, tuple[Any, Node]] = {}  # with the container, so that its id stays its

    def own(self, live: Any, node: Node) -> Any:
        """``live`` itself, or a copy of it if it is to hold something else in another place."""
        if not isinstance(live, (MutableMapping, MutableSequence)):
            return live
        _, first = self._met.setdefault(id(live), (live, node))
        if first is node or self._is_same(first, node):
            return live
        return copy.copy(live)

    def _is_same(self, one: Node, other: Node) -> bool:
        """True if the same bytes and values were saved for both."""
        if one.kind != other.kind:
            return False
        if one.kind == _state.ARRAY:
            return self._arrays[one.index].bytes_of == self._arrays[other.index].bytes_of
        if one.kind == _state.PLAIN:
            values = self._plain[one.index], self._plain[other.index]
            return type(values[0]) is type(values[1]) and repr(values[0]) == repr(values[1])
        kinds = [
            (each.name, each.keys, each.key_types, len(each.children)) for each in (one, other)
        ]
        return kinds[0] == kinds[1] and all(map(self._is_same, one.children, other.children))
