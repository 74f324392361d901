"""Where arrays of JAX are, or are to be: shardings of arrays and of what describes them.

Knows meshes with devices and without. Does not know boxes (``sharded``) or bytes (``leaves``).
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

__all__ = ["misfit", "sharding_of"]


def sharding_of(value: Any) -> Any:
    """Where an array is or is to be. Over the mesh that is set if its own names no devices, as that
    of what ``jax.eval_shape`` tells."""
    sharding = value.sharding
    mesh = getattr(sharding, "mesh", None)
    if not isinstance(mesh, AbstractMesh):
        return sharding
    here = jax.sharding.get_mesh()
    if (here.axis_names, here.axis_sizes) != (mesh.axis_names, mesh.axis_sizes):
        return sharding
    return NamedSharding(here, sharding.spec, memory_kind=sharding.memory_kind)


def misfit(value: Any) -> str:
    """Why an array of this shape and sharding cannot be here; empty if it can, or has none."""
    sharding = sharding_of(value)
    if sharding is None:
        return ""
    if isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return "its sharding names no devices: call restore() within jax.set_mesh(mesh)"
    try:
        sharding.shard_shape(tuple(value.shape))
        here = sharding.addressable_devices
    except ValueError as error:
        return f"its sharding does not fit: {error}"
    if not here:
        return f"its sharding has no device of this process, {jax.process_index()}"
    if getattr(getattr(sharding, "spec", None), "unreduced", None):
        return "its sharding is unreduced: devices hold addends of its values"
    return ""
