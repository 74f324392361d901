"""Containers and arrays at several places of a template, and whether they can be one there.

Knows live containers and what was saved for them. Does not know files or frameworks.
A dict that is filled in its place can be filled with one thing only: where a checkpoint has another
at its next place, that place gets a copy. An array that is filled in its place is not copied: it is
mostly meant to be one (tied weights), so a checkpoint that has two there is refused. Where both are
cut in different ways, their digests cannot be compared, and their bytes are.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any

from mtckpt import _state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mtckpt._renaming import Stored
    from mtckpt._state import ArraySpec, Node

__all__ = ["Aliases"]


class Aliases:
    """The containers of one template that were met. ``arrays`` and ``plain`` are what was saved."""

    def __init__(self, arrays: Sequence[Stored], plain: Sequence[Any]) -> None:
        self._arrays = arrays
        self._plain = plain
        self._met: dict[int, tuple[Any, Node]] = {}  # with the container, so that its id stays its
        self._filled: dict[object, int] = {}
        # Arrays that are to go into one, in order, and whether their digests can be compared.
        self._shared: dict[tuple[int, int], bool] = {}

    def own(self, live: Any, node: Node) -> Any:
        """``live`` itself, or a copy of it if it is to hold something else in another place."""
        if not isinstance(live, (MutableMapping, MutableSequence)):
            return live
        _, first = self._met.setdefault(id(live), (live, node))
        if first is node or self._is_same(first, node):
            return live
        return copy.copy(live)

    def share(self, first: int, second: int) -> None:
        """Two stored arrays are wanted in one live one."""
        one, other = self._arrays[first], self._arrays[second]
        if one.bytes_of != other.bytes_of and _is_one_place(one.spec, other.spec):
            self._shared[first, second] = _is_cut_alike(one.spec, other.spec)

    def fill(self, target: object, index: int) -> None:
        """A stored array is to be copied into a live one that ``target`` stands for, if known."""
        if target is not None:
            self.share(self._filled.setdefault(target, index), index)

    def tie(self, one: Node, other: Node) -> None:
        """What was saved in two places, an array or the parts of one, is wanted in one."""
        if one.kind == other.kind == _state.ARRAY:
            self.share(one.index, other.index)
        for pair in zip(one.children, other.children, strict=False):
            self.tie(*pair)

    def apart(
        self, is_same: Callable[[int, int], bool], reads_same: Callable[[int, int], bool]
    ) -> list[str]:
        """A line for every two of those that do not have the same bytes: by their digests, or, for
        those that are cut in different ways, by ``reads_same``, which gets whose bytes they have.
        """
        of = [array.bytes_of for array in self._arrays]
        return [
            f"{self._arrays[first].path} and {self._arrays[second].path}: "
            "one array here, two in the checkpoint"
            for (first, second), can_be_compared in self._shared.items()
            if not (
                is_same(first, second) if can_be_compared else reads_same(of[first], of[second])
            )
        ]

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


def _is_one_place(one: ArraySpec, other: ArraySpec) -> bool:
    """True for as many bytes, of whole arrays or of boxes that are not empty."""
    if one.offsets is None and other.offsets is None:
        return one.size_bytes == other.size_bytes > 0
    return one.whole_shape == other.whole_shape and min(one.size_bytes, other.size_bytes) > 0


def _is_cut_alike(one: ArraySpec, other: ArraySpec) -> bool:
    return one.offsets == other.offsets and (one.offsets is None or one.shape == other.shape)
