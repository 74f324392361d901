"""Lists, tuples and deques of a template: what was saved for one, and how it is filled.

Knows sequences and nodes. Does not know arrays, adapters or where bytes come from.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import MutableSequence, Sequence
from typing import Any

from mtckpt._codecs import DEQUE
from mtckpt._node import CODEC, PLAIN, Node
from mtckpt._settling import settle
from mtckpt.errors import FormatError

__all__ = ["assign_items", "check_deque", "items_of", "sequence_like", "unfillable"]


def items_of(node: Node) -> Node:
    """What was saved for a sequence; of a deque, its items as a list."""
    if node.kind != CODEC or node.name != DEQUE:
        return node
    inner = node.children[0]
    for key, child in zip(inner.keys or (), inner.children, strict=False):
        if key == "items":
            return child
    return node


def check_deque(node: Node, plain: Sequence[Any]) -> None:
    """Raise FormatError for a saved deque with more items than it can have had."""
    inner = node.children[0]
    fields = dict(zip(inner.keys or (), inner.children, strict=False))
    items, most = fields.get("items"), fields.get("maxlen")
    limit = plain[most.index] if most is not None and most.kind == PLAIN else None
    if items is not None and isinstance(limit, int) and len(items.children) > limit:
        raise FormatError(
            f"what is called a deque of at most {limit} items has {len(items.children)}"
        )


def unfillable(live: Sequence[Any], node: Node, *, takes_all: bool) -> str:
    """Why a sequence cannot hold what was saved for it; empty if it can."""
    count = len(node.children)
    if takes_all and not hasattr(live, "_fields"):
        most = getattr(live, "maxlen", None)
        if most is None or count <= most:
            return ""
        return f"a deque of at most {most} items here, {count} in the checkpoint"
    if len(live) == count:
        return ""
    line = f"{len(live)} items here, {count} in the checkpoint"
    if node.has_objects:
        return f"{line}; make as many before restore(), each has a state of its own"
    is_open = isinstance(live, MutableSequence)
    return f"{line}; an empty one takes all that was saved" if is_open else line


def assign_items(live: MutableSequence[Any], values: list[Any]) -> None:
    """Put settled values into a live list or deque."""
    settled = [settle(value) for value in values]
    if isinstance(live, deque):
        live.clear()
        live.extend(settled)
    else:
        live[:] = settled


def sequence_like(live: Sequence[Any], items: list[Any]) -> Any:
    """A tuple of the same kind; the same one if nothing in it has changed."""
    if not any(map(operator.is_not, items, live)) and len(items) == len(live):
        return live
    make: Any = type(live)
    return make(*items) if hasattr(live, "_fields") else make(items)
