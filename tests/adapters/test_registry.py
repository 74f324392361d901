"""Adapters are made by name, so no type checker sees whether one lacks a method."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from mtckpt import adapters
from mtckpt._state import StateAdapter


def signature(function: Any) -> list[tuple[str, Any]]:
    """Names and kinds of the parameters."""
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("module", "name"), [row[1:] for row in adapters._TABLE], ids=lambda value: value
)
def test_an_adapter_is_whole(module: str, name: str) -> None:
    adapter = getattr(importlib.import_module(module), name)
    wanted = {key for key in vars(StateAdapter) if not key.startswith("_")}
    wanted |= set(StateAdapter.__annotations__)
    assert wanted
    for key in sorted(wanted):
        assert hasattr(adapter, key), f"{name} lacks {key}"
        member = getattr(StateAdapter, key, None)
        if inspect.isfunction(member):
            assert signature(getattr(adapter, key)) == signature(member), key
