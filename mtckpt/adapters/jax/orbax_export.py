"""A checkpoint written as a directory that Orbax restores: a few bands in memory at a time.

Knows what Orbax wants to find beside the arrays. Does not use Orbax, only TensorStore, and reads
arrays through a function that it is given, so that none has to be in memory whole. The directory
appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtckpt import _state
from mtckpt._state import Node, escape
from mtckpt.errors import AccessDenied, TierFull, TierUnavailable, UnsupportedState, UsageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Leaf", "write"]

# Of an array at a time: what is a chunk of TensorStore's too.
BAND_BYTES = 32 * 1024 * 1024
_SEQUENCE, _MAPPING = 1, 2
_KEY = "jax.key."
_EMPTY = {_state.DICT: "Dict", _state.LIST: "List", _state.TUPLE: "Tuple"}
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array; ``framework`` is that of its ArraySpec.

    ``bands`` gives it as ndarrays of up to so many bytes, each with its offsets: all of them of one
    shape, the first one's, but for those at the end of an axis.
    """

    dtype: str
    framework: str
    shape: tuple[int, ...]
    bands: Callable[[int], Iterator[tuple[tuple[int, ...], Any]]]


@dataclass(slots=True)
class _Described:
    """What stands beside the arrays, filled leaf by leaf."""

    tree: dict[str, Any] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    keys: list[Any] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)  # name in Orbax -> path


def write(
    directory: Path, root: Node, plain: Sequence[Any], leaves: Sequence[Leaf], *, ocdbt: bool = True
) -> int:
    """Write the tree to ``directory``, which must not be there; returns the bytes of its arrays.

    Raises:
        UsageError: it is there, or Orbax has no such tree. UnsupportedState: no such type.
        TierFull, AccessDenied, TierUnavailable: it could not be written; nothing is left.
    """
    found = list(_walk(root, ()))
    if any(not keys for keys, _ in found):
        raise UsageError("Orbax saves trees, and this state is one leaf", state="nothing was done")
    if directory.exists():
        raise UsageError(
            f"{directory} is there already",
            state="nothing was done",
            actions=("name a directory that is not there yet: it is made",),
        )
    _check(found, plain, leaves)
    temporary = directory.parent / f"{directory.name}.orbax-checkpoint-tmp-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        size_bytes = _fill(temporary, found, plain, leaves, ocdbt=ocdbt)
        os.rename(temporary, directory)
    except (OSError, ValueError) as error:
        raise _failed(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size_bytes


def _failed(directory: Path, error: Exception) -> Exception:
    full = getattr(error, "errno", None) == 28 or "RESOURCE_EXHAUSTED" in str(error)
    denied = isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error)
    kind = TierFull if full else AccessDenied if denied else TierUnavailable
    return kind(f"{directory} could not be written: {error}", state="nothing was left there")


def _walk(node: Node, keys: tuple[tuple[int, str], ...]) -> Iterator[tuple[Any, Node]]:
    """Every leaf and empty container with its keys, as Orbax counts them."""
    while node.kind in (_state.CODEC, _state.OBJECT):
        node = node.children[0]
    if not node.children:
        yield keys, node
        return
    is_mapping = node.kind == _state.DICT
    names = node.keys if is_mapping else range(len(node.children))
    for name, child in zip(names or (), node.children, strict=True):
        kind = _MAPPING if is_mapping else _SEQUENCE
        yield from _walk(child, (*keys, (kind, str(name))))


def _check(found: Sequence[tuple[Any, Node]], plain: Sequence[Any], leaves: Sequence[Leaf]) -> None:
    """Refuse, before anything is written, what Orbax could not give back."""
    taken: dict[str, str] = {}
    for keys, node in found:
        path = "/".join(escape(name) for _, name in keys)
        name = ".".join(name for _, name in keys)
        why = ""
        if node.kind == _state.PLAIN and isinstance(plain[node.index], bytes):
            why = "Orbax has no bytes"
        if node.kind == _state.ARRAY:
            if leaves[node.index].dtype in ("complex32", "float4_e2m1fn_x2"):
                why = f"TensorStore has no type {leaves[node.index].dtype}"
            elif name in taken:
                why = f"Orbax would give it the name of {taken[name]}"
            elif {"", ".", ".."} & set(name.split("/")):
                why = "its name would lead out of the directory"
            taken[name] = path
        if why:
            raise UnsupportedState(
                why,
                path=path,
                type_name=node.kind,
                state="nothing was written",
                actions=("leave it out: load the checkpoint, and save a tree without it",),
            )


def _fill(
    directory: Path,
    found: Sequence[tuple[Any, Node]],
    plain: Sequence[Any],
    leaves: Sequence[Leaf],
    *,
    ocdbt: bool,
) -> int:
    import numpy as np

    described = _Described()
    size_bytes = 0
    for keys, node in found:
        name = ".".join(name for _, name in keys)
        value_type = _EMPTY.get(node.kind, "None")
        if node.kind == _state.PLAIN and isinstance(plain[node.index], str):
            value_type, described.strings[name] = "string", plain[node.index]
        elif node.kind == _state.PLAIN and plain[node.index] is not None:
            value_type = "scalar"
            value = np.asarray(plain[node.index])
            _write_array(directory, name, (), iter([((), value)]), ocdbt=ocdbt)
        elif node.kind == _state.ARRAY:
            leaf = leaves[node.index]
            value_type = "np.ndarray"
            if leaf.framework.startswith(_KEY):
                described.keys.append(_key_entry(name, leaf.shape, leaf.framework[len(_KEY) :]))
            bands = leaf.bands(BAND_BYTES)
            size_bytes += _write_array(directory, name, leaf.shape, bands, ocdbt=ocdbt)
        _describe(described, keys, value_type)
    _write_json(
        directory / "_METADATA",
        {
            "tree_metadata": described.tree,
            "use_ocdbt": ocdbt,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
    )
    _write_json(directory / "_CHECKPOINT_METADATA", {"item_handlers": _HANDLER, "metrics": {}})
    if described.strings:
        _write_json(directory / "_strings.json", described.strings)
    if described.keys:
        (directory / "array_metadatas").mkdir()
        _write_json(
            directory / "array_metadatas" / "process_0", {"array_metadatas": described.keys}
        )
    return size_bytes


def _describe(described: _Described, keys: Sequence[tuple[int, str]], value_type: str) -> None:
    described.tree[str(tuple(name for _, name in keys))] = {
        "key_metadata": [{"key": name, "key_type": kind} for kind, name in keys],
        "value_metadata": {
            "value_type": value_type,
            "skip_deserialize": value_type in ("None", *_EMPTY.values()),
        },
    }


def _key_entry(name: str, shape: tuple[int, ...], impl: str) -> Any:
    return {
        "array_metadata": {
            "param_name": name,
            "write_shape": list(shape),
            "chunk_shape": list(shape),
            "ext_metadata": {"random_key_impl": impl},
        }
    }


def _write_array(
    directory: Path,
    name: str,
    shape: tuple[int, ...],
    bands: Iterator[tuple[tuple[int, ...], Any]],
    *,
    ocdbt: bool,
) -> int:
    """Write an array band by band, each of them a chunk; returns its bytes."""
    import tensorstore

    base = {"driver": "file", "path": f"{directory}/"}
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{directory}/{name}/"}
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    store: Any = None
    size_bytes = 0
    for offsets, band in bands:
        if store is None:
            spec = {
                "driver": "zarr",
                "kvstore": kvstore,
                "metadata": {
                    "shape": list(shape),
                    "chunks": [max(1, size) for size in band.shape],
                    "compressor": {"id": "zstd", "level": 1},
                },
                "store_data_equal_to_fill_value": True,
            }
            dtype = tensorstore.dtype(band.dtype)
            store = tensorstore.open(spec, create=True, open=True, dtype=dtype).result()
        place = tuple(slice(o, o + n) for o, n in zip(offsets, band.shape, strict=True))
        store[place].write(band).result()
        size_bytes += band.nbytes
    return size_bytes


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
