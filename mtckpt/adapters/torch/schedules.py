"""Schedules of learning rates: whether what was saved may be of this kind.

Knows which attributes torch's schedules have. Does not restore them: ``load_state_dict`` does, and
takes what any other kind has, so that training goes on by numbers of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtckpt import _state

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from mtckpt._placing import Placing
    from mtckpt._state import Node

__all__ = ["check_kind"]

_INNER = "_schedulers"  # of SequentialLR and ChainedScheduler, states of others


def check_kind(live: LRScheduler, node: Node, path: str, placing: Placing) -> None:
    """Note in the difference that a schedule of another kind was saved."""
    _check(type(live).__qualname__, live.state_dict(), node, path, placing)
    inner = _child(node, _INNER)
    lives = getattr(live, _INNER, None)
    if inner is not None and lives is not None:
        for number, (one, saved) in enumerate(zip(lives, inner.children, strict=False)):
            check_kind(one, saved, f"{path}/{_INNER}/{number}", placing)


def _check(kind: str, state: Mapping[str, Any], node: Node, path: str, placing: Placing) -> None:
    node = _inside(node)
    if node.kind != _state.DICT:
        return
    here, there = _settings(state), _settings(node.keys or [])
    # What only one side has may be that of another version of torch.
    if here - there and there - here:
        placing.diff.differing.append(
            f"{path}: {kind} here, with {', '.join(sorted(here - there))}; one with"
            f" {', '.join(sorted(there - here))} in the checkpoint"
        )


def _settings(names: Any) -> set[str]:
    """Names without those that torch has for itself."""
    texts = {name for name in names if isinstance(name, str)}
    return {name for name in texts if name == _INNER or not name.startswith("_")}


def _inside(node: Node) -> Node:
    while node.kind == _state.OBJECT:
        node = node.children[0]
    return node


def _child(node: Node, name: str) -> Node | None:
    node = _inside(node)
    if node.kind != _state.DICT or name not in (node.keys or []):
        return None
    return _inside(node.children[(node.keys or []).index(name)])
