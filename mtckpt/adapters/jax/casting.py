"""Templates that take floating-point arrays of any type and convert them.

Knows which leaves of a template are converted, and to what. Does not know files, devices or trees
of other frameworks: a template without ``cast`` takes the very types that were saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mtckpt._dtypes import check_dtype
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from mtckpt._state import ArraySpec

__all__ = ["CAST", "Cast", "cast", "converted", "stored_type"]

# What ArraySpec.framework says of such a place.
CAST = "jax.cast"


class Cast(jax.ShapeDtypeStruct):
    """The description of an array that is wanted as ``dtype``, whatever floating type is stored."""

    __slots__ = ()

    @property
    def casts_to(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self.dtype)
        return dtype


def cast(template: Any, dtype: Any = None) -> Any:
    """A template like ``template`` that also takes floating-point arrays of another type.

    Pass the result to ``Checkpointer.restore``, whole or as a part of the state. Arrays are rounded
    to the nearest value once their bytes are verified; what is too large becomes infinite, or what
    the type has in its place. Integers, booleans, complex numbers and random keys have to be of the
    type that was saved, with or without ``cast``.

    Args:
        template: a pytree of arrays of JAX or ``jax.ShapeDtypeStruct``; other leaves stay.
        dtype: what its floating-point arrays become; without it, the types that they have.

    Raises UsageError for a ``dtype`` that is no floating-point type, or that JAX would narrow.
    """
    if dtype is not None:
        dtype = np.dtype(dtype)
        if not jnp.issubdtype(dtype, np.floating):
            raise UsageError(
                f"cast() converts floating-point numbers, not to {dtype}", state="nothing was read"
            )
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UsageError(
                f"jax would narrow {dtype}",
                state="nothing was read",
                actions=("jax.config.update('jax_enable_x64', True) before arrays are made",),
            )
        check_dtype(dtype.name, "")

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            return leaf
        if not jnp.issubdtype(leaf.dtype, np.floating):
            return leaf
        sharding = leaf.sharding if getattr(leaf, "committed", True) else None
        make: Any = Cast  # jax leaves it untyped
        return make(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(one, template)


def stored_type(spec: ArraySpec) -> np.dtype[Any]:
    """The type of bytes that are to be converted."""
    return np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype))


def converted(host: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Every number of ``host``, rounded into ``out``."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, host, casting="unsafe")
    return out
