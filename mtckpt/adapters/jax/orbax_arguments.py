"""What Orbax's arguments of a save or a restore ask for, in the words of ``Checkpointer.restore``.

Knows ``ocp.args`` and the ``SaveArgs`` and ``RestoreArgs`` of leaves. Does not save or restore: it
makes the template that says the same, or refuses what no template can say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mtckpt.adapters.jax.casting import Cast
from mtckpt.adapters.jax.orbax_metadata import template_of
from mtckpt.errors import UsageError

__all__ = ["MAX_CUSTOM_BYTES", "Wanted", "check_save", "wanted_of"]

MAX_CUSTOM_BYTES = 48 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """``is_partial``: what only one of checkpoint and template has is passed over."""

    template: Any
    is_partial: bool


def check_save(args: Any) -> None:
    """Raises UsageError where values would have to be changed before they are saved.

    How Orbax would divide arrays into chunks and files says nothing here, and is passed over.
    """
    custom = getattr(args, "custom_metadata", None)
    try:
        size = len(json.dumps(custom))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"custom_metadata is no JSON: {error}", state="nothing was saved"
        ) from error
    if size > MAX_CUSTOM_BYTES:
        raise UsageError(
            f"custom_metadata is {size:,} bytes of JSON, and {MAX_CUSTOM_BYTES:,} are the most",
            state="nothing was saved",
            actions=("save it as an item of its own: ocp.args.JsonSave(...)",),
        )
    for each in jax.tree.leaves(getattr(args, "save_args", None)):
        if getattr(each, "dtype", None) is not None:
            raise UsageError(
                f"SaveArgs(dtype={each.dtype}): mtckpt saves arrays as they are",
                state="nothing was saved",
                actions=(
                    "give arrays of that type: jax.tree.map(lambda a: a.astype(...), state)",
                    "or let the restore convert: mtckpt.adapters.jax.cast(template, dtype)",
                ),
            )


def wanted_of(args: Any) -> Wanted:
    """The template that restore arguments amount to. Raises UsageError where none does."""
    refused = {
        "strict=False": getattr(args, "strict", True) is False,
        "support_layout=True": getattr(args, "support_layout", False),
        "fallback_sharding": getattr(args, "fallback_sharding", None) is not None,
        "transforms": getattr(args, "transforms", None) is not None,
        "legacy_transform_fn": getattr(args, "legacy_transform_fn", None) is not None,
    }
    for name in (name for name, is_given in refused.items() if is_given):
        raise UsageError(
            f"{name} is Orbax's: mtckpt has no such option",
            state="nothing was restored",
            actions=("give a template with the shapes, types and shardings that are wanted",),
        )
    template = template_of(args.item)
    for_leaves = getattr(args, "restore_args", None)
    if for_leaves is not None:
        template = _told(template, for_leaves)
    # Orbax's callers keep their template as it is: what is filled in place is a copy of it.
    template = jax.tree.map(_own, template)
    return Wanted(template, bool(getattr(args, "partial_restore", False)))


def _own(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _told(template: Any, for_leaves: Any) -> Any:
    """A template with what the arguments of its leaves say."""
    if template is None:
        return jax.tree.map(lambda told: _leaf(None, told), for_leaves)
    try:
        return jax.tree.map(_leaf, template, for_leaves, is_leaf=lambda leaf: leaf is None)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"restore_args is not a tree like item: {error}",
            state="nothing was restored",
            actions=("make it with ocp.checkpoint_utils.construct_restore_args(item)",),
        ) from error


def _leaf(leaf: Any, told: Any) -> Any:
    if leaf is ocp.PLACEHOLDER or not isinstance(told, ocp.RestoreArgs):
        return leaf
    shape = getattr(told, "global_shape", None)
    if getattr(told, "strict", True) is False:
        raise UsageError(
            "strict=False is Orbax's: mtckpt cuts no array, and fills none up",
            state="nothing was restored",
        )
    shape = getattr(leaf, "shape", None) if shape is None else shape
    dtype = getattr(leaf, "dtype", None) if told.dtype is None else told.dtype
    if shape is None or dtype is None:
        return leaf  # a plain value, or a place that is left open
    if told.restore_type is np.ndarray:
        return np.empty(shape, dtype)
    if leaf is not None and not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    is_cast = told.dtype is not None and jnp.issubdtype(dtype, np.floating)
    make: Any = Cast if is_cast else jax.ShapeDtypeStruct
    return make(shape, dtype, sharding=_sharding(leaf, told))


def _sharding(leaf: Any, told: Any) -> Any:
    sharding: Any = getattr(told, "sharding", None)
    if hasattr(sharding, "to_jax_sharding"):
        return sharding.to_jax_sharding()
    if sharding is None and getattr(told, "mesh_axes", None) is not None:
        return jax.sharding.NamedSharding(told.mesh, told.mesh_axes)
    if sharding is None and getattr(leaf, "committed", True):
        return getattr(leaf, "sharding", None)
    return sharding
