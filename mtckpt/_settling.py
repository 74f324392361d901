"""Values that exist only once the bytes of a restore have arrived, and what is built of them.

Knows containers. Does not know where bytes come from, trees of a checkpoint, or frameworks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from mtckpt._node import PLAIN_TYPES

__all__ = ["has_objects", "later", "refilled", "settle"]


class _Later:
    """A value that exists only once the bytes have arrived; made at the first ``get``."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._made: Any = None

    def get(self) -> Any:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


def later(make: Callable[[], Any]) -> Any:
    """What ``settle`` turns into the result of ``make``, which is called once."""
    return _Later(make)


def settle(value: Any) -> Any:
    """``value`` with all that had to wait in its place. Containers without stay as they are."""
    kind = type(value)
    if kind is _Later:
        return value.get()
    if kind is dict:
        settled = {key: settle(item) for key, item in value.items()}
        return settled if any(settled[key] is not value[key] for key in value) else value
    if kind in (list, tuple):
        items = [settle(item) for item in value]
        return kind(items) if any(map(operator.is_not, items, value)) else value
    return value


def refilled(
    live: Mapping[Any, Any],
    changes: Mapping[Any, Any],
    finish: list[Callable[[], object]],
    *,
    replace: bool,
) -> Any:
    """``live`` with other values, ``later`` or by ``finish``; ``replace`` keeps none of the old."""
    if not isinstance(live, MutableMapping):
        make: Any = type(live)
        kept = {} if replace else dict(live)
        return later(lambda: make({**kept, **settle(changes)}))
    finish.append(lambda: _assign_values(live, changes, replace=replace))
    return live


def _assign_values(
    live: MutableMapping[Any, Any], changes: Mapping[Any, Any], *, replace: bool
) -> None:
    if replace:
        for key in [key for key in live if key not in changes]:
            del live[key]
    for key, value in changes.items():
        if key in live and live[key] is value:
            continue  # a live object that was filled in its place
        settled = settle(value)
        if key not in live or live[key] is not settled:
            live[key] = settled


def has_objects(live: Any, is_array: Callable[[Any], bool]) -> bool:
    """True if a container holds what is never just replaced by what was saved.

    These are arrays, stateful objects, and containers whose type only the template knows.
    """
    for item in live.values() if isinstance(live, Mapping) else live:
        if type(item) in PLAIN_TYPES:
            continue
        if not isinstance(item, (MutableMapping, list, tuple)) or is_array(item):
            return True
        if hasattr(type(item), "_fields") or has_objects(item, is_array):
            return True
    return False
