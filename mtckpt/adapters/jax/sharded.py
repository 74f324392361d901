"""Arrays over several devices as boxes of a global array, and global arrays from such boxes.

Knows shardings: which device has which box, and that devices with the same box hold the same
bytes. Does not know meshes: any sharding that JAX can tell the boxes of will do. An array that
every device holds whole is no sharded one: it is stored and restored as one piece.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import SingleDeviceSharding

from mtckpt._state import ArraySpec, Part
from mtckpt.adapters.jax import leaves
from mtckpt.adapters.jax.meshes import sharding_of

if TYPE_CHECKING:
    from jax.sharding import Sharding

    from mtckpt.adapters.jax.arriving import Arriving

__all__ = ["Cell", "assembled", "is_sharded", "parts_of"]

_Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Cell:
    """The place of one box in a template: bytes for it go into fresh memory.

    ``sharding`` is that of the box on one of the devices that have it, ``dtype`` the template's.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    sharding: Sharding
    dtype: Any
    casts_to: Any = None


def is_sharded(value: Any) -> bool:
    """True if no device holds all of the array, or if other processes have devices that do."""
    sharding = sharding_of(value)
    return sharding is not None and not (
        sharding.is_fully_replicated and sharding.is_fully_addressable
    )


def parts_of(value: Any, path: str, *, template: bool = False) -> Sequence[Part] | None:
    """Every box of this process's devices once; None for an array that is held whole."""
    if not is_sharded(value):
        return None
    whole = leaves.spec_of(value, path, template=template)
    sharding = sharding_of(value)
    boxes = _boxes(sharding, tuple(value.shape), whole.shape)
    if template:
        casts_to = getattr(value, "casts_to", None)
        kind = sharding.memory_kind
        arrays: dict[_Box, Any] = {
            box: Cell(*box, SingleDeviceSharding(device, memory_kind=kind), value.dtype, casts_to)
            for device, box in boxes.items()
        }
    else:
        plain = jax.random.key_data(value) if leaves.is_key(value) else value
        arrays = {boxes[shard.device]: shard.data for shard in plain.addressable_shards}
    holders, sharers = _processes(sharding, tuple(value.shape), whole.shape)
    return [
        Part(
            ArraySpec(whole.dtype, box[1], whole.framework, box[0], whole.shape),
            array,
            holders.get(box, ()),
            sharers,
        )
        for box, array in sorted(arrays.items(), key=lambda item: item[0])
    ]


def assembled(live: Any, freshes: Sequence[leaves.Fresh | Arriving]) -> Any:
    """A global array of filled boxes, each put on every device that has it."""
    parts = parts_of(live, "", template=True)
    assert parts is not None
    by_box = {
        (part.spec.offsets, part.spec.shape): fresh
        for part, fresh in zip(parts, freshes, strict=True)
    }
    sharding = sharding_of(live)
    whole = parts[0].spec.global_shape or ()
    hosts = {box: fresh.host for box, fresh in by_box.items() if leaves.is_as_held(fresh, live)}
    if len(hosts) == len(by_box):
        # All devices at once: one by one takes as long as the bytes do.
        array = jax.make_array_from_callback(
            whole, sharding, lambda index: hosts[_box_at(index, whole)]
        )
    else:
        arrays = [
            leaves.on_device(by_box[box], live, device)
            for device, box in _boxes(sharding, tuple(live.shape), whole).items()
        ]
        array = jax.make_array_from_single_device_arrays(tuple(live.shape), sharding, arrays)
    if not all(isinstance(each, leaves.Fresh) and each.is_weak for each in freshes):
        return array
    # An array that is put together is never weak. Each process does its own part: nothing is sent.
    return jax.jit(leaves.weakened, out_shardings=sharding)(array)


def _processes(
    sharding: Sharding, shape: tuple[int, ...], stored: tuple[int, ...]
) -> tuple[dict[_Box, tuple[int, ...]], tuple[int, ...]]:
    """The processes that hold each box, and all that hold any; none where it is this one alone."""
    if sharding.is_fully_addressable:
        return {}, ()
    found: dict[_Box, set[int]] = {}
    for device, box in _boxes(sharding, shape, stored, every=True).items():
        found.setdefault(box, set()).add(device.process_index)
    holders = {box: tuple(sorted(processes)) for box, processes in found.items()}
    return holders, tuple(sorted(set().union(*found.values())))


@functools.lru_cache(maxsize=1024)
def _boxes(
    sharding: Sharding, shape: tuple[int, ...], stored: tuple[int, ...], *, every: bool = False
) -> Mapping[Any, _Box]:
    """Device -> offsets and shape of its box, for this process's devices or for all.

    Many arrays have one shape and sharding.

    ``stored`` has the axes of a key's numbers too.
    """
    more = stored[len(shape) :]
    boxes = {}
    indices = (
        sharding.devices_indices_map(shape)
        if every
        else sharding.addressable_devices_indices_map(shape)
    )
    for device, index in indices.items():
        offsets, lengths = _box_at(index, shape)
        boxes[device] = (offsets + (0,) * len(more), lengths + more)
    return boxes


def _box_at(index: Sequence[slice] | None, shape: Sequence[int]) -> _Box:
    spans = [piece.indices(size) for piece, size in zip(index or (), shape, strict=True)]
    return tuple(start for start, _, _ in spans), tuple(
        max(0, stop - start) for start, stop, _ in spans
    )
