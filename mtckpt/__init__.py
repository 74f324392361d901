"""Checkpoints of a training run, kept in several tiers at once.

    with mtckpt.Checkpointer("gpt-small") as checkpointer:
        restored = checkpointer.restore(state)
        for step in range(restored.next_step, num_steps):
            train_step(...)
            checkpointer.save(step, state)

Names are loaded when they are first used, so importing this costs a training script next to
nothing and never imports a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtckpt._checkpointer import Checkpointer
    from mtckpt._codecs import register_codec
    from mtckpt._handle import Restored, Save, Status, Step
    from mtckpt._load import load, steps
    from mtckpt._replicas import replicated
    from mtckpt._retention import KeepBest, KeepEvery, KeepLast
    from mtckpt._rng import rng
    from mtckpt._schedule import Disk, ObjectStore, Peers, Ram

__all__ = [
    "Checkpointer",
    "Disk",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "ObjectStore",
    "Peers",
    "Ram",
    "Restored",
    "Save",
    "Status",
    "Step",
    "load",
    "register_codec",
    "replicated",
    "rng",
    "steps",
]

_HOME = {
    "Checkpointer": "mtckpt._checkpointer",
    "Disk": "mtckpt._schedule",
    "KeepBest": "mtckpt._retention",
    "KeepEvery": "mtckpt._retention",
    "KeepLast": "mtckpt._retention",
    "ObjectStore": "mtckpt._schedule",
    "Peers": "mtckpt._schedule",
    "Ram": "mtckpt._schedule",
    "Restored": "mtckpt._handle",
    "Save": "mtckpt._handle",
    "Status": "mtckpt._handle",
    "Step": "mtckpt._handle",
    "load": "mtckpt._load",
    "register_codec": "mtckpt._codecs",
    "replicated": "mtckpt._replicas",
    "rng": "mtckpt._rng",
    "steps": "mtckpt._load",
}
_PUBLIC_MODULES = ("adapters", "errors", "testing", "tiers")


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is not None:
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f"mtckpt.{name}")
    raise AttributeError(f"module 'mtckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_MODULES])
