"""Keys of dicts in a state: which there may be, and that they come back as what they were."""

from __future__ import annotations

import enum
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from state_harness import restore, save

from mtckpt._state import flatten, refill
from mtckpt.adapters import active_adapters
from mtckpt.errors import StateMismatch, UnsupportedState

Pair = namedtuple("Pair", ["left", "right"])


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("key", [b"x", 1j, Colour.RED, np.int64(1), (1, b"x"), Pair(1, 2)])
def test_keys_must_be_plain(key: Any) -> None:
    with pytest.raises(UnsupportedState, match="a dict key must be") as caught:
        flatten({"a": {key: 1}}, active_adapters())
    assert "str(key)" in str(caught.value)
    assert "list(value.items())" in str(caught.value)
    with pytest.raises(UnsupportedState, match="20,001 bits"):
        flatten({"a": {2**20_000: 1}}, active_adapters())


def test_keys_that_are_tuples() -> None:
    """Tables of states and actions, edges of graphs, flattened parameters."""
    table: dict[Any, Any] = {(0, "left"): np.ones(2), ((True, None), 2.5): 3, (): "none"}
    saved = save({"q": table})
    assert saved.paths == ["q/(0, 'left')"]
    empty: dict[str, Any] = {"q": {}}
    restore(saved, empty)
    assert repr(empty["q"]) == repr(table)
    same = {(0, "left"): np.zeros(2), ((True, None), 2.5): 0, (): ""}
    restore(saved, {"q": same})
    assert repr(same) == repr(table)
    with pytest.raises(StateMismatch, match=r"q/\(1, 'left'\)"):
        restore(saved, {"q": {(1, "left"): np.zeros(2), ((True, None), 2.5): 0, (): ""}})
    root = flatten({(1, 2): 0}, active_adapters()).root
    assert refill(root, {(1, 2): 5}, active_adapters(), [], [])
    assert not refill(root, {(True, 2): 5}, active_adapters(), [], [])  # equal, of another path
    with pytest.raises(UnsupportedState, match="lone surrogate"):
        flatten({("\udc80",): 0}, active_adapters())


def test_two_leaves_with_one_path() -> None:
    with pytest.raises(UnsupportedState, match="2 leaves have the same path") as caught:
        flatten({"a": {1: torch.ones(1), "1": torch.ones(1)}}, active_adapters())
    assert caught.value.details["path"] == "a/1"


@pytest.mark.parametrize("keys", [(1, "1"), ("True", True), (None, "None"), (2.5, "2.5")])
def test_two_plain_values_with_one_path(keys: Any) -> None:
    # A template would get the one value for the other.
    with pytest.raises(UnsupportedState, match="2 leaves have the same path") as caught:
        flatten({"a": {"t": torch.ones(1), **dict.fromkeys(keys, 3)}}, active_adapters())
    assert caught.value.details["path"] == f"a/{keys[0]}"
