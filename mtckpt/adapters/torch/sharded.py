"""DTensors as boxes of global arrays: FSDP2, tensor parallelism, and meshes of several dimensions.

Knows placements and device meshes, and the ShardedTensors that FSDP made before. Does not
communicate: which box a rank holds, and which other ranks hold the same one, follows from the
placements. Does not know pending sums (``Partial``): there is no array yet that could be saved.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mtckpt._state import ArraySpec, Part
from mtckpt.adapters.torch import leaves
from mtckpt.errors import UnsupportedState

__all__ = [
    "Boxes",
    "assembled",
    "empty_like",
    "held",
    "identity",
    "is_sharded",
    "parts_of",
    "spec_of",
]

# (mesh, placements, shape) -> offsets, local shape, and the ranks that hold the same.
_Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_places: dict[tuple[Any, tuple[Any, ...], tuple[int, ...]], _Place] = {}
_MAX_PLACES = 100_000


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes of one global array as a leaf: tensors, and where in the array each begins.

    ``sharers`` are the ranks that have a part in the array, ``holders`` those that hold these very
    boxes; none of either stands for this one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[tuple[int, ...], torch.Tensor], ...]
    sharers: tuple[int, ...] = ()
    holders: tuple[int, ...] = ()


def is_sharded(value: object) -> bool:
    """True for a part of a global array; nothing is imported to find out."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):  # as nearly all are
        return False
    return is_dtensor(value) or isinstance(value, Boxes) or _is_sharded_tensor(value)


def is_dtensor(value: object) -> bool:
    """True for a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _is_sharded_tensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    return module is not None and isinstance(value, module.ShardedTensor)


def spec_of(value: Any, path: str, *, template: bool = False) -> ArraySpec:
    """The first box that this rank holds. Raises UnsupportedState for a pending sum."""
    if not is_dtensor(value):
        return _parts_of_boxes(value, path)[0].spec
    offsets, shape, _ = _place_of(value, path)
    local = leaves.spec_of(value._local_tensor, path, template=template)
    return ArraySpec(local.dtype, shape, leaves.FRAMEWORK, offsets, tuple(value.shape))


def parts_of(value: Any, path: str, *, template: bool = False) -> Sequence[Part] | None:
    """The local tensors with their boxes; None for a tensor that is no part of anything."""
    if not is_sharded(value):
        return None
    if not is_dtensor(value):
        return _parts_of_boxes(value, path)
    _, _, holders = _place_of(value, path)
    spec = spec_of(value, path, template=template)
    return (Part(spec, value._local_tensor, holders, _sharers(value.device_mesh)),)


def identity(value: Any) -> object | None:
    """The same local memory as the same box."""
    if isinstance(value, Boxes) and value.boxes:
        found = tuple((offsets, leaves.identity(tensor)) for offsets, tensor in value.boxes)
        return None if any(each is None for _, each in found) else (found, value.shape)
    if not is_dtensor(value):
        return None
    local = leaves.identity(value._local_tensor)
    return None if local is None else (local, value.shape, value.placements, value.device_mesh)


def assembled(live: Any, arrays: Sequence[torch.Tensor]) -> Any:
    """``live``; a shard of the meta device has got memory, so a new DTensor around that."""
    if not is_dtensor(live):
        return live
    (local,) = arrays
    if local is live._local_tensor:
        return live
    return _around(local, live, live.requires_grad)


def empty_like(value: Any, dtype: torch.dtype | None) -> Any:
    """A DTensor of that type with the layout of another, its shard not filled; None for others.

    What an optimizer holds for each element of a sharded parameter is sharded like it.
    """
    if dtype is None or not is_dtensor(value) or not value.ndim:
        return None
    local = torch.empty_like(value._local_tensor, dtype=dtype, requires_grad=False)
    return _around(local, value, False)


def _around(local: torch.Tensor, like: Any, requires_grad: bool) -> Any:
    from torch.distributed.tensor import DTensor

    made = DTensor.from_local(
        local.detach(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made.requires_grad_(requires_grad)


def _parts_of_boxes(value: Any, path: str) -> list[Part]:
    """The parts of ``Boxes`` or of a ShardedTensor; an empty one where there is none."""
    boxes = value if isinstance(value, Boxes) else _boxes_of(value, path)
    shape = boxes.shape
    parts = [
        Part(
            leaves.spec_of(tensor, path)._replace(offsets=offsets, global_shape=shape),
            tensor,
            boxes.holders,
            boxes.sharers,
        )
        for offsets, tensor in boxes.boxes
    ]
    if parts:
        return parts
    nothing = torch.empty((0, *shape[1:]), dtype=boxes.dtype)
    offsets = (shape[0], *(0 for _ in shape[1:]))
    spec = leaves.spec_of(nothing, path)._replace(offsets=offsets, global_shape=shape)
    return [Part(spec, nothing, boxes.holders, boxes.sharers)]


def _boxes_of(value: Any, path: str) -> Boxes:
    """What a ShardedTensor holds here. Raises UnsupportedState where its shards are sharded."""
    found = []
    for shard in value.local_shards():
        if is_sharded(shard.tensor):
            raise UnsupportedState(
                "cannot save a ShardedTensor whose shards are sharded again",
                path=path,
                type_name="ShardedTensor",
                state="nothing was written",
                actions=("give the mesh to FSDP: it then has DTensors",),
            )
        found.append((tuple(map(int, shard.metadata.shard_offsets)), shard.tensor))
    ranks = torch.distributed.get_process_group_ranks(value._process_group)
    return Boxes(tuple(value.size()), value.dtype, tuple(found), tuple(sorted(ranks)))


def held(value: Any, path: str) -> Any:
    """What this rank holds of a value: None where that is no part of a global array.

    A ShardedTensor becomes the boxes of those ranks alone that hold any; all else is as it is.
    """
    if is_dtensor(value) and value.device_mesh.get_coordinate() is None:
        return None
    if not _is_sharded_tensor(value):
        return value
    boxes = _boxes_of(value, path)
    ranks = {int(each.placement.rank()) for each in value.metadata().shards_metadata}
    return replace(boxes, sharers=tuple(sorted(ranks))) if boxes.boxes else None


def _place_of(value: Any, path: str) -> _Place:
    key = (value.device_mesh, tuple(value.placements), tuple(value.shape))
    found = _places.get(key)
    if found is None:
        if any(placement.is_partial() for placement in value.placements):
            raise UnsupportedState(
                "cannot save a DTensor that is a pending sum",
                path=path,
                type_name="DTensor",
                placements=str(value.placements),
                state="nothing was written",
                actions=("redistribute it to Shard or Replicate first",),
            )
        if len(_places) >= _MAX_PLACES:
            _places.clear()
        found = _places[key] = _compute(*key)
    local = tuple(value._local_tensor.shape)
    if local != found[1]:
        raise UnsupportedState(
            f"a DTensor whose shard has the shape {list(local)} where its placements mean"
            f" {list(found[1])}",
            path=path,
            type_name="DTensor",
            placements=str(value.placements),
            state="nothing was written",
            actions=("make it with distribute_tensor",),
        )
    return found


@functools.lru_cache(maxsize=1000)
def _sharers(mesh: Any) -> tuple[int, ...]:
    return tuple(sorted(map(int, mesh.mesh.flatten().tolist())))


def _compute(mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> _Place:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank has no part of that mesh
        return (0,) * len(shape), (0,) * len(shape), ()
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    local, offset = tuple(map(int, local)), tuple(map(int, offset))
    # An empty shard lies anywhere: at the end, as far as its array goes.
    offset = tuple(min(at, size) for at, size in zip(offset, shape, strict=True))
    where = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(placements, coordinate, strict=True)
    )
    holders = tuple(int(rank) for rank in mesh.mesh[where].flatten().tolist())
    return offset, local, tuple(sorted(holders))
