"""Schedules of learning rates: whether what was saved may be of this kind.

Knows which attributes torch's schedules have. Does not restore them: ``load_state_dict`` does, and
takes what any other kind has, so that training goes on by numbers of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

from mtckpt import _state

if TYPE_CHECKING:
    from mtckpt._placing import Placing
    from mtckpt._state import Node

__all__ = ["check_kind"]

_INNER = "_schedulers"  # of SequentialLR and ChainedScheduler, states of others
_MILESTONES = "_milestones"  # of SequentialLR
# What every version of torch gives to schedules of a kind, and to no others.
_OF_KINDS = frozenset(
    {
        *("T_0", "T_max", _MILESTONES, "anneal_epochs", "factor", "gamma", "lr_lambdas", "max_lrs"),
        *("milestones", "patience", "power", "start_factor", "step_size", "total_steps"),
    }
)


def check_kind(live: LRScheduler, node: Node, path: str, placing: Placing) -> None:
    """Note in the difference that a schedule of another kind was saved."""
    _check(type(live), live.state_dict(), node, path, placing)
    inner = _child(node, _INNER)
    lives = getattr(live, _INNER, None)
    if inner is None or not isinstance(lives, (list, tuple)):
        return
    if len(lives) != len(inner.children):
        placing.diff.differing.append(
            f"{path}/{_INNER}: {len(lives)} schedules here, {len(inner.children)} in the checkpoint"
        )
    for number, (one, saved) in enumerate(zip(lives, inner.children, strict=False)):
        if isinstance(one, LRScheduler):
            check_kind(one, saved, f"{path}/{_INNER}/{number}", placing)


def _check(
    live: type[LRScheduler], state: Mapping[str, Any], node: Node, path: str, placing: Placing
) -> None:
    node = _inside(node)
    if node.kind != _state.DICT:
        return
    kind = live.__qualname__
    here, there = _settings(state), _settings(node.keys or [])
    is_torchs = live.__module__.startswith("torch.optim")
    kinds = (here ^ there) & _OF_KINDS if is_torchs and not placing.partial else ()
    # What else only one side has may be that of another version of torch, or of the user's class.
    differ = here - there and there - here and (is_torchs or not placing.partial)
    if kinds or differ:
        placing.diff.differing.append(
            f"{path}: {kind} here, with {_listed(here - there)}; one with"
            f" {_listed(there - here)} in the checkpoint"
        )


def _settings(names: Any) -> set[str]:
    """Names without those that torch has for itself."""
    texts = {name for name in names if isinstance(name, str)}
    shown = {name for name in texts if name in (_INNER, _MILESTONES) or not name.startswith("_")}
    return shown - {"verbose"}  # until torch 2.6


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing else"


def _inside(node: Node) -> Node:
    while node.kind == _state.OBJECT:
        node = node.children[0]
    return node


def _child(node: Node, name: str) -> Node | None:
    node = _inside(node)
    if node.kind != _state.DICT or name not in (node.keys or []):
        return None
    return _inside(node.children[(node.keys or []).index(name)])
