"""What a save holds, in the words of ``torch.distributed.checkpoint``: names, and what is there.

Knows records, and how DCP takes a state apart and calls its pieces. Does not read bytes of arrays.
Of ranks that hold different things, everything is told; of a name that several have, what this
rank has, and else the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from mtckpt import _codecs, _state
from mtckpt.adapters import active_adapters
from mtckpt.adapters.torch import leaves
from mtckpt.errors import Damaged, UnsupportedState

if TYPE_CHECKING:
    from mtckpt._manifest import ArrayEntry, Record

__all__ = ["Array", "Catalog", "make"]


@dataclass(frozen=True, slots=True)
class Array:
    """One array of a save, as ``rank`` has it; of a global one, all of it."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int


@dataclass(frozen=True, slots=True)
class Catalog:
    """See the module. ``arrays`` has the tensors by the name that DCP gives them."""

    step: int
    id: str
    metadata: Metadata
    arrays: Mapping[str, Array]
    values: Mapping[str, Any]

    def value(self, name: str, want: Callable[[str, Any], None]) -> Callable[[], Any]:
        """What is no tensor to DCP. ``want`` is told arrays in it, which have to be filled before
        the result is called.
        """
        arrays: dict[int, Any] = {}
        _want(self.values[name], want, arrays)
        return lambda: _built(self.values[name], arrays)


@dataclass(frozen=True, slots=True)
class _Stored:
    """An array that is no tensor."""

    entry: ArrayEntry


@dataclass(frozen=True, slots=True)
class _Coded:
    """A value of a registered type, as it was encoded."""

    name: str
    path: str
    inner: Any


def make(records: Mapping[int, Record], rank: int, *, private: bool = False) -> Catalog:
    """The catalog of one save, as ``rank`` sees it: with what is others' own only if ``private``.

    Raises Damaged, UnsupportedState.
    """
    base = rank % len(records)
    found: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for each in sorted(records, key=lambda each: (each != base, each)):
        tensors: dict[int, ArrayEntry] = {}
        tree = _skeleton_of(records[each], tensors, own=private or each == base)
        flat, mappings = flatten_state_dict(tree if isinstance(tree, dict) else {"state": tree})
        for name, value in flat.items():
            if name in found or _lacks(value):
                continue
            found[name], paths[name] = value, mappings[name]
            if isinstance(value, torch.Tensor):
                entry = tensors[id(value)]
                arrays[name] = Array(entry.path, tuple(value.shape), value.dtype, each)
                metadata[name] = _described(value)
            else:
                found[name] = _with_entries(value, tensors)
                metadata[name] = BytesStorageMetadata()
    record = records[base]
    return Catalog(
        record.step, record.save_id, Metadata(metadata, planner_data=paths), arrays, found
    )


def _described(tensor: torch.Tensor) -> TensorStorageMetadata:
    """One chunk, whoever stores which part of it: that is not for DCP to plan."""
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk])


_ABSENT = object()


def _skeleton_of(record: Record, tensors: dict[int, ArrayEntry], *, own: bool) -> Any:
    """The state of a rank with tensors of the meta device in it."""
    entries = record.array_entries()
    try:
        plain = [_state.decode_plain(v) for v in msgspec.json.decode(record.plain, type=list[Any])]
        tree = msgspec.json.decode(record.structure)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"record does not parse: {error}", step=record.step) from error
    root = _state.node_from_json(tree, len(entries), len(plain))
    return _skeleton(root, entries, plain, tensors, own=own)


def _skeleton(
    node: _state.Node,
    entries: Sequence[ArrayEntry],
    plain: Sequence[Any],
    tensors: dict[int, ArrayEntry],
    *,
    own: bool,
    path: str = "",
) -> Any:
    if node.kind == _state.ARRAY:
        entry = entries[node.index]
        if entry.offsets is None and not own:
            return _ABSENT  # another rank's own
        if entry.framework != "torch":
            return _Stored(entry)
        made = _meta(entry)
        tensors[id(made)] = entry
        return made
    if node.kind == _state.PLAIN:
        return plain[node.index]

    def inside(child: _state.Node, key: object) -> Any:
        below = f"{path}/{_state.escape(key)}" if path else _state.escape(key)
        return _skeleton(child, entries, plain, tensors, own=own, path=below)

    if node.kind == _state.CODEC:
        inner = _skeleton(node.children[0], entries, plain, tensors, own=own, path=path)
        return _Coded(node.name, path, _with_entries(inner, tensors))
    if node.kind == _state.DICT:
        return {
            key: inside(child, key)
            for key, child in zip(node.keys or [], node.children, strict=True)
        }
    items = [inside(child, i) for i, child in enumerate(node.children)]
    return items if node.kind == _state.LIST else tuple(items)


def _meta(entry: ArrayEntry) -> torch.Tensor:
    dtype = leaves.DTYPE_OF.get(entry.dtype)
    if dtype is None:
        raise UnsupportedState(
            f"torch {torch.__version__} has no type {entry.dtype}",
            path=entry.path,
            type_name=entry.dtype,
            state="live state unchanged",
            actions=("read it with mtckpt.load",),
        )
    shape = entry.shape if entry.global_shape is None else entry.global_shape
    return torch.empty(shape, dtype=dtype, device="meta")


def _lacks(value: Any) -> bool:
    """True for a value with something in it that is another rank's own."""
    if isinstance(value, _Coded):
        return _lacks(value.inner)
    if isinstance(value, dict):
        return any(map(_lacks, value.values()))
    return value is _ABSENT or (isinstance(value, (list, tuple)) and any(map(_lacks, value)))


def _with_entries(value: Any, tensors: Mapping[int, ArrayEntry]) -> Any:
    """A value in which tensors have become what is known of them."""
    if isinstance(value, torch.Tensor):
        return _Stored(tensors[id(value)])
    if isinstance(value, dict):
        return {key: _with_entries(each, tensors) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_entries(each, tensors) for each in value)
    return value


def _want(value: Any, want: Callable[[str, Any], None], arrays: dict[int, Any]) -> None:
    """Ask for every array in a value, in new memory."""
    if isinstance(value, _Stored):
        made = arrays[id(value)] = _adapter(value.entry).new(_spec(value.entry))[0]
        want(value.entry.path, made)
    elif isinstance(value, _Coded):
        _want(value.inner, want, arrays)
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            _want(each, want, arrays)


def _spec(entry: ArrayEntry) -> _state.ArraySpec:
    """Of all of the array; one of a framework that this process does not use is NumPy's."""
    shape = entry.shape if entry.global_shape is None else entry.global_shape
    return _state.ArraySpec(entry.dtype, shape, entry.framework)


def _adapter(entry: ArrayEntry) -> _state.StateAdapter:
    name = entry.framework.partition(".")[0]
    known = {adapter.framework: adapter for adapter in active_adapters()}
    return known.get(name, known["numpy"])


def _built(value: Any, arrays: Mapping[int, Any]) -> Any:
    if isinstance(value, _Stored):
        return _adapter(value.entry).finished(arrays[id(value)], _spec(value.entry))
    if isinstance(value, _Coded):
        return _codecs.codec_named(value.name, value.path).decode(_built(value.inner, arrays))
    if isinstance(value, dict):
        return {key: _built(each, arrays) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_built(each, arrays) for each in value)
    return value
