"""Arrays of no values yet, where a device's memory is to be filled by somebody else.

Knows shapes, types and shardings of one device. JAX has no call that only reserves memory: a
compiled program makes these, so many are asked for together. Programs are compiled for sets of
different arrays, never for one array after the other, and nothing is waited for in between.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Sharding

__all__ = ["Arriving", "Kind", "empties"]

_BATCH = 500  # arrays of one program


class Kind(NamedTuple):
    """What an array is to be. Without a sharding it is put on the default device, uncommitted."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Sharding | None


@dataclass(slots=True)
class Arriving:
    """An array on device ``ordinal`` that nobody has seen, and that is waiting for bytes.

    ``array`` is there once all that a restore needs have been asked for; or ``host`` memory, where
    the device has another order of elements than files do.
    """

    kind: Kind
    ordinal: int
    array: Any = None
    host: Any = None


def empties(kinds: Sequence[Kind]) -> list[Any]:
    """An array for each, of no values yet. Their memory is not waited for.

    A program returns one array of each kind in a set. The sets are those of which there are once,
    twice and so on at least, so there are as many programs as different counts.
    """
    found: dict[Kind, list[Any]] = {kind: [] for kind in kinds}
    counts = Counter(kinds)
    for sharding in dict.fromkeys(kind.sharding for kind in counts):
        here = [kind for kind in counts if kind.sharding == sharding]
        made = 0
        for wanted in sorted({counts[kind] for kind in here}):
            those = [kind for kind in here if counts[kind] >= wanted]
            for first in range(0, len(those), _BATCH):
                batch = tuple(those[first : first + _BATCH])
                program = _program(batch)
                for _ in range(wanted - made):
                    for kind, array in zip(batch, program(), strict=True):
                        found[kind].append(array)
            made = wanted
    return [found[kind].pop() for kind in kinds]


@functools.lru_cache(maxsize=256)
def _program(batch: tuple[Kind, ...]) -> Any:
    return jax.jit(
        lambda: tuple(jnp.empty(kind.shape, kind.dtype) for kind in batch),
        out_shardings=batch[0].sharding,
    )
