"""The same script for Orbax's manager on its own handlers and on mtckpt's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import mtckpt

Options = dict[str, Any]
Script = Callable[[Any], Any]


class Both:
    """Runs a script on a manager of Orbax's own and on one that saves through mtckpt."""

    def __init__(self, root: Path, tiers: mtckpt.Checkpointer) -> None:
        self.root, self.tiers = root, tiers

    def open(self, whose: str, **options: Any) -> Any:
        from mtckpt.adapters.jax.orbax import registry

        made = registry(self.tiers) if whose == "mtckpt" else plain_registry()
        chosen = ocp.CheckpointManagerOptions(**options)
        return ocp.CheckpointManager(self.root / whose, options=chosen, handler_registry=made)

    def same(self, script: Script, **options: Any) -> Any:
        """What the script returned on both, which has to be equal."""
        said = {}
        for whose in ("orbax", "mtckpt"):
            with self.open(whose, **options) as manager:
                said[whose] = script(manager)
        assert told(said["mtckpt"]) == told(said["orbax"])
        return said["mtckpt"]


def plain_registry() -> Any:
    """Orbax's handlers for the same arguments."""
    made = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for handler, save_kind, restore_kind in (
        (ocp.StandardCheckpointHandler(), ocp.args.StandardSave, ocp.args.StandardRestore),
        (ocp.PyTreeCheckpointHandler(), ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
    ):
        made.add(None, save_kind, handler)
        made.add(None, restore_kind, handler)
    return made


def told(value: Any) -> Any:
    """A tree as what can be compared: its structure, and types and bytes of its leaves."""
    return jax.tree.structure(value), [bits(leaf) for leaf in jax.tree.leaves(value)]


def bits(leaf: Any) -> Any:
    if isinstance(leaf, (str, bool, int, float)) or leaf is ...:
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()
