"""Orbax's directories, read leaf by leaf: OCDBT and plain Zarr, versions 2 and 3.

Knows what Orbax writes beside its arrays (``_METADATA`` and its companions) and how a checkpoint
manager lays out steps and items. Does not use Orbax, only TensorStore, so that no array has to be
in memory as a whole, and no pytree has to be there at all. Does not know mtckpt's tiers.

A chunk of TensorStore's is read whole, and once. Where a row of them is more than can be in memory,
the array becomes several boxes, each a strip of whole chunks.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtckpt import _state
from mtckpt._boxes import Box, whole
from mtckpt._building import Pieced
from mtckpt._dtypes import DTYPES
from mtckpt._node import MAX_DEPTH
from mtckpt._state import ArraySpec, Node, escape
from mtckpt.errors import Damaged, FormatError, UnsupportedState, UsageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Item", "find_steps", "read_step"]

BAND_BYTES = 32 * 1024 * 1024
# An array of so many bands is read in larger ones.
MAX_BANDS = 4096
MAX_METADATA_BYTES = 256 * 1024 * 1024
_METADATA = "_METADATA"
_STRINGS = "_strings.json"
_SEQUENCE, _MAPPING = 1, 2  # kinds of keys in Orbax's metadata
_EMPTY = {
    "Dict": _state.DICT,
    "NamedTuple": _state.DICT,
    "List": _state.LIST,
    "Tuple": _state.TUPLE,
}
_ARRAYS = {"jax.Array": "jax", "np.ndarray": "numpy"}


@dataclass(slots=True)
class Item:
    """What was read of a directory: arrays to come, the tree around them, and plain values.

    Of an array that comes in several boxes, the first is where the tree says, and the others are
    behind all arrays.
    """

    arrays: list[Pieced] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    root: Node = field(default_factory=lambda: Node(_state.DICT, keys=[]))
    boxes: list[Pieced] = field(default_factory=list)


def find_steps(source: Path) -> dict[int | None, Path]:
    """Step -> directory below a manager's root; ``{None: source}`` for a directory of one step.

    Raises UsageError for what is no directory of Orbax's.
    """
    if (source / _METADATA).is_file() or _items(source):
        found = re.fullmatch(r"(?:.*[_.-])?(\d+)", source.name)
        return {int(found[1]) if found else None: source}
    steps: dict[int | None, Path] = {}
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        found = re.fullmatch(r"(?:[A-Za-z_]+[_.-])?(\d+)", path.name)
        if found and path.is_dir() and ((path / _METADATA).is_file() or _items(path)):
            steps[int(found[1])] = path
    if not steps:
        raise UsageError(
            f"{source} is no checkpoint of Orbax's: neither it nor a step in it has {_METADATA}",
            state="nothing was read",
            actions=("give a manager's directory, one step of it, or one item of that",),
        )
    return steps


def _items(path: Path) -> dict[str, Path]:
    """The items of a step: pytrees, and JSON beside them."""
    found = {}
    for part in sorted(path.iterdir()) if path.is_dir() else ():
        if (part / _METADATA).is_file() or (part / "metadata").is_file():
            found[part.name] = part
    return found if any((part / _METADATA).is_file() for part in found.values()) else {}


def read_step(path: Path) -> Item:
    """One step, or one item of it. Items get their names as top-level keys; "default" has none.

    Raises FormatError for what cannot be what Orbax wrote, UnsupportedState for a type of array
    that mtckpt lacks.
    """
    item = Item()
    item.root = _read_items(path, item)
    item.arrays += item.boxes
    return item


def _read_items(path: Path, item: Item) -> Node:
    if (path / _METADATA).is_file():
        return _read_tree(path, (), item)
    items = _items(path)
    if list(items) == ["default"]:
        return _read_tree(items["default"], (), item)
    children = []
    for name, part in items.items():
        if (part / _METADATA).is_file():
            children.append(_read_tree(part, (name,), item))
        else:
            children.append(_plain_tree(_read_json(part / "metadata"), item))
    return Node(_state.DICT, keys=list(items), children=children)


# -- reading ---------------------------------------------------------------------------------------


class _Draft(dict[str, Any]):
    """A container in the making: children by key, leaves are nodes."""

    is_sequence = False


def _read_tree(directory: Path, prefix: tuple[str, ...], item: Item) -> Node:
    metadata = _read_json(directory / _METADATA)
    try:
        entries = metadata["tree_metadata"].values()
        leaves = [
            (
                [(key["key_type"], str(key["key"])) for key in entry["key_metadata"]],
                str(entry["value_metadata"]["value_type"]),
            )
            for entry in entries
        ]
        for keys, _ in leaves:
            "".join(name for _, name in keys).encode()  # JSON can say what is no text
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError) as error:
        raise FormatError(f"{_METADATA} is not what Orbax writes", path=str(directory)) from error
    if any(len(keys) > MAX_DEPTH for keys, _ in leaves):
        raise FormatError("a path is nested too deeply", path=str(directory))
    reader = _Reader(directory, metadata)
    top = _Draft()
    for keys, kind in leaves:
        names = [name for _, name in keys]
        path = "/".join(map(escape, (*prefix, *names)))
        node = _leaf(reader, names, path, kind, item)
        if not keys:
            return node
        draft = top
        for (key_type, name), following in zip(keys, [*keys[1:], None], strict=True):
            draft.is_sequence = key_type == _SEQUENCE
            if following is None:
                draft[name] = node
            else:
                draft = draft.setdefault(name, _Draft())
                if not isinstance(draft, _Draft):
                    raise FormatError(f"{path[:200]} is a leaf and a container")
    return _built(top)


def _built(draft: _Draft) -> Node:
    children = {
        name: _built(child) if isinstance(child, _Draft) else child for name, child in draft.items()
    }
    if draft.is_sequence and set(children) == set(map(str, range(len(children)))):
        ordered = [children[str(i)] for i in range(len(children))]
        return Node(_state.LIST, children=ordered)
    return Node(_state.DICT, keys=list(children), children=list(children.values()))


def _leaf(reader: _Reader, names: list[str], path: str, kind: str, item: Item) -> Node:
    if kind in _EMPTY:
        return Node(_EMPTY[kind], keys=[] if _EMPTY[kind] == _state.DICT else None)
    if kind in ("None", "string", "scalar"):
        item.plain.append(reader.plain(names, kind))
        return Node(_state.PLAIN, index=len(item.plain) - 1)
    if kind not in _ARRAYS:
        raise UnsupportedState(
            f"Orbax says that this is a {kind[:60]}, which mtckpt cannot import",
            path=path,
            type_name=kind[:60],
            state="nothing was written",
            actions=("save it from Orbax as an array or a plain number",),
        )
    first, *others = reader.array(names, path, _ARRAYS[kind])
    item.arrays.append(first)
    item.boxes += others
    return Node(_state.ARRAY, index=len(item.arrays) - 1)


class _Reader:
    """The arrays of one directory."""

    def __init__(self, directory: Path, metadata: Mapping[str, Any]) -> None:
        self._directory = directory
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._is_ocdbt = (directory / "manifest.ocdbt").is_file()
        # Where zeros are stored too, a chunk that is not there is a loss.
        self._all_stored = bool(metadata.get("store_array_data_equal_to_fill_value"))
        strings = directory / _STRINGS
        self._strings = _read_json(strings) if strings.is_file() else {}
        self._impls = _key_impls(directory)

    def plain(self, names: list[str], kind: str) -> Any:
        if kind == "None":
            return None
        if kind == "string":
            text = self._strings.get(".".join(names), "") if type(self._strings) is dict else None
            if not isinstance(text, str) or not _is_text(text):
                raise FormatError(f"{_STRINGS} is not what Orbax writes", path=str(self._directory))
            return text
        store = self._open(names)
        if store.rank:
            raise Damaged("a number has a shape", leaf=".".join(names)[:200])
        return _read(store).item()

    def array(self, names: list[str], path: str, framework: str) -> list[Pieced]:
        """An array, or the boxes that it is read in."""
        store = self._open(names)
        dtype = store.dtype.numpy_dtype.name
        if dtype not in DTYPES:
            raise UnsupportedState(
                f"arrays of type {dtype} cannot be stored",
                path=path,
                type_name=dtype,
                state="nothing was written",
            )
        impl = self._impls.get(".".join(names))
        framework = framework if impl is None else f"jax.key.{impl}"
        shape = tuple(store.shape)
        _check_memory(store, path)
        strips = _strips(store)
        specs = [ArraySpec(dtype, box.shape, framework, box.offsets, shape) for box in strips]
        if len(strips) == 1:
            specs = [ArraySpec(dtype, shape, framework)]
        return [
            Pieced(path, spec, functools.partial(self._pieces, names, box))
            for spec, box in zip(specs, strips, strict=True)
        ]

    def _pieces(self, names: list[str], strip: Box) -> Iterator[memoryview]:
        return _bands(self._open(names), strip)

    def _open(self, names: list[str]) -> Any:
        import tensorstore

        name = ".".join(names)
        if not self._is_ocdbt and ({"..", "."} & set(name.split("/")) or name.startswith("/")):
            raise Damaged("the name of an array leads out of its directory", path=name[:200])
        spec: dict[str, Any] = {
            "driver": self._driver,
            "kvstore": _kvstore(self._directory, name, is_ocdbt=self._is_ocdbt),
            "fill_missing_data_reads": not self._all_stored,
        }
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except (ValueError, KeyError, OSError) as error:
            raise Damaged(f"an array cannot be opened: {error}", path=name[:200]) from error


def _bands(store: Any, strip: Box) -> Iterator[memoryview]:
    """The bytes of a strip in C order, a tile at a time."""
    import numpy as np

    if strip.is_empty:
        return
    tile, axis = _tile(store)
    ends = tuple(map(int.__add__, strip.offsets, strip.shape))
    rest = tuple(map(slice, strip.offsets[axis + 1 :], ends[axis + 1 :]))
    for position in itertools.product(*map(range, strip.shape[:axis])):
        for first in range(0, ends[axis], tile[axis]) if ends else (0,):
            rows = (slice(first, min(first + tile[axis], ends[axis])),) if ends else ()
            part = store[(*position, *rows, *rest)]
            yield np.ascontiguousarray(_read(part)).reshape(-1).view(np.uint8).data


def _tile(store: Any) -> tuple[tuple[int, ...], int]:
    """As many whole chunks as make up a band, along the last axes first; and its first long axis.

    Tiles follow one another in C order along that axis and those before it.
    """
    shape, chunk = tuple(store.shape), _chunk_of(store)
    item_bytes = store.dtype.numpy_dtype.itemsize
    band_bytes = max(BAND_BYTES, math.prod(shape) * item_bytes // MAX_BANDS)
    tile = list(chunk)
    for axis in reversed(range(len(shape))):
        row_bytes = math.prod(tile) * item_bytes
        tile[axis] = min(shape[axis], chunk[axis] * max(1, band_bytes // row_bytes))
        if tile[axis] < shape[axis]:
            break
    long = next((axis for axis, length in enumerate(tile) if length > 1), len(tile) - 1)
    return tuple(tile), long


def _strips(store: Any) -> list[Box]:
    """An array as boxes that are as wide as a tile: one, where tiles have all of its last axes."""
    shape = tuple(store.shape)
    if not math.prod(shape):
        return [whole(shape)]
    tile, axis = _tile(store)
    corners = [range(0, size, step) for size, step in zip(shape, tile, strict=True)][axis + 1 :]
    return [
        Box(
            (*([0] * len(shape[: axis + 1])), *corner),
            (
                *shape[: axis + 1],
                *map(min, tile[axis + 1 :], map(int.__sub__, shape[axis + 1 :], corner)),
            ),
        )
        for corner in itertools.product(*corners)
    ]


def _chunk_of(store: Any) -> tuple[int, ...]:
    chunk = store.chunk_layout.read_chunk.shape or store.shape
    return tuple(max(1, min(n, c or n)) for n, c in zip(store.shape, chunk, strict=True))


def _check_memory(store: Any, path: str) -> None:
    """Raise FormatError where no read can be made: a few bytes of metadata can claim any chunk, and
    TensorStore ends the process that has no memory for one."""
    if not math.prod(store.shape):
        return
    tile, _ = _tile(store)
    # A chunk is unpacked whole, and may be said to be larger than its array.
    stored = store.chunk_layout.read_chunk.shape or store.shape
    chunk = [c or n for n, c in zip(store.shape, stored, strict=True)]
    needed_bytes = max(math.prod(tile), math.prod(chunk)) * store.dtype.numpy_dtype.itemsize
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > memory_bytes // 2:
        raise FormatError(
            f"its chunks need {needed_bytes:,} bytes of memory at a time, of {memory_bytes:,}",
            path=path[:200],
            actions=("import it where there is more memory, if that can be right",),
        )


def _read(part: Any) -> Any:
    try:
        return part.read().result()
    except (ValueError, KeyError, OSError) as error:
        raise Damaged(f"an array cannot be read: {error}") from error


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _kvstore(directory: Path, name: str, *, is_ocdbt: bool) -> dict[str, Any]:
    if is_ocdbt:
        base = {"driver": "file", "path": f"{directory}/"}
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {"driver": "file", "path": f"{directory}/{name}/"}


def _key_impls(directory: Path) -> dict[str, str]:
    """The generator of each array of random keys, by its name in Orbax."""
    found = {}
    for path in sorted((directory / "array_metadatas").glob("process_*")):
        try:
            for each in _read_json(path)["array_metadatas"]:
                entry = each["array_metadata"]
                impl = (entry["ext_metadata"] or {}).get("random_key_impl")
                if impl is not None:
                    found[str(entry["param_name"])] = str(impl)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError("array_metadatas is not what Orbax writes", path=str(path)) from error
    return found


def _plain_tree(value: Any, item: Item, depth: int = 0) -> Node:
    """JSON as plain values."""
    if depth > 64:
        raise FormatError("JSON is nested too deeply")
    if isinstance(value, dict):
        children = [_plain_tree(child, item, depth + 1) for child in value.values()]
        return Node(_state.DICT, keys=list(value), children=children)
    if isinstance(value, list):
        return Node(_state.LIST, children=[_plain_tree(each, item, depth + 1) for each in value])
    item.plain.append(value)
    return Node(_state.PLAIN, index=len(item.plain) - 1)


def _read_json(path: Path) -> Any:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_METADATA_BYTES:
                raise FormatError("not a file, or larger than metadata can be", path=str(path))
            return json.loads(file.read(MAX_METADATA_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"cannot be read: {error}", path=str(path)) from error
