"""Directories of ``torch.distributed.checkpoint``, read piece by piece: no array is ever in memory.

Knows where a directory's arrays lie, once a child process has told (``dcp_unpickling``); believes
nothing of that before it was checked against the files. Does not use PyTorch. Does not know
mtckpt's tiers.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import math
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mtckpt import _state
from mtckpt._boxes import Box, cover, whole
from mtckpt._building import Pieced
from mtckpt._dtypes import DTYPES, check_dtype
from mtckpt._node import MAX_DEPTH
from mtckpt._patience import NoThread, in_time
from mtckpt._state import ArraySpec, Node, escape
from mtckpt.errors import Damaged, FormatError, UnsupportedPlatform, UnsupportedState, UsageError

__all__ = ["Item", "find_steps", "is_checkpoint", "read_step"]

# NumPy of before 2.0 has no more.
MAX_DIMENSIONS = 32
BAND_BYTES = 64 * 1024 * 1024
MAX_TOLD_BYTES = 512 * 1024 * 1024
CHILD_S = 600.0
_KILL_S = 5.0
_METADATA = ".metadata"
_NUMBERED = r"(?:.*[_.-])?(\d+)"
_CHILD = Path(__file__).with_name("dcp_unpickling.py")


@dataclass(slots=True)
class Item:
    """What was read of a directory: arrays to come, the tree around them, and plain values."""

    arrays: list[Pieced] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    root: Node = field(default_factory=lambda: Node(_state.DICT, keys=[]))


class _Chunk(msgspec.Struct, frozen=True):
    """A box of an array: a view of some bytes of a file, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    file: str
    start: int
    size_bytes: int


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    chunks: list[_Chunk]


class _Array(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: str
    is_scalar: bool


class _Told(msgspec.Struct, frozen=True):
    """What the child said: entries by path, or why there are none."""

    entries: list[tuple[list[str | int], list[Any]]] = []
    refused: str = ""
    broken: str = ""
    path: str = ""


def is_checkpoint(source: Path) -> bool:
    """Whether it, or something in it, has DCP's metadata."""
    return (source / _METADATA).is_file() or bool(_below(source))


def find_steps(source: Path) -> dict[int | None, Path]:
    """Step -> directory below ``source``; ``{None: source}`` where its name says no number.

    Raises UsageError for what is no directory of DCP's, or two directories of one step.
    """
    if (source / _METADATA).is_file():
        found = re.fullmatch(_NUMBERED, source.name)
        return {int(found[1]) if found else None: source}
    steps: dict[int | None, Path] = {}
    for path in _below(source):
        found = re.fullmatch(_NUMBERED, path.name)
        step = int(found[1]) if found else None
        if step is None or step in steps:
            raise UsageError(
                f"{source} has several checkpoints, and {path.name} does not say which step it is",
                state="nothing was read",
                actions=("give one of them",),
            )
        steps[step] = path
    if not steps:
        raise UsageError(
            f"{source} is no checkpoint of torch.distributed: neither it nor a directory in it has"
            f" {_METADATA}",
            state="nothing was read",
        )
    return steps


def _below(source: Path) -> list[Path]:
    children = sorted(source.iterdir()) if source.is_dir() else []
    return [path for path in children if (path / _METADATA).is_file()]


def read_step(path: Path) -> Item:
    """One directory. Its pickles are read in a child process that can call nothing.

    Raises FormatError for what cannot be what DCP wrote, UnsupportedState for a value of a type
    without a form here, Damaged for arrays that are not whole.
    """
    told = _ask(path)
    if told.refused:
        raise UnsupportedState(
            f"the pickle names something that is not read: {told.refused}",
            path=told.path,
            type_name=told.refused,
            state="nothing was written",
            actions=("load it with torch, and save a state without it",),
        )
    if told.broken:
        raise FormatError(f"cannot be read: {told.broken}", path=f"{path}: {told.path}"[:300])
    item = Item()
    reader = _Reader(path, item)
    top = _Draft()
    for steps, value in told.entries:
        if not steps or len(steps) > MAX_DEPTH:
            raise FormatError("a value without a path", path=str(path))
        draft = top
        for key in steps[:-1]:
            draft = draft.inner(key)
        draft.put(steps[-1], reader.node(value, "/".join(map(escape, steps))))
    item.root = top.built()
    return item


def _ask(path: Path) -> _Told:
    """Let the child tell. It has no environment, no packages, and limits of its own."""
    if sys.platform != "linux":
        raise UnsupportedPlatform(
            f"a process cannot be limited as reading pickles needs it; this is {sys.platform}",
            state="nothing was read",
            actions=("import it on Linux: what is written can be read here",),
        )
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", os.fspath(_CHILD), os.fspath(path.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
    )

    def hear() -> bytes:
        assert child.stdout is not None
        with child.stdout as told:
            return told.read(MAX_TOLD_BYTES + 1)

    try:
        said = in_time(hear, CHILD_S, name="mtckpt-pickles")
    except NoThread as error:
        raise FormatError(f"its pickles were not read: {error}", path=str(path)) from error
    finally:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_S)  # not longer: where a disk hangs, what reads it cannot be ended
    if not said:
        raise FormatError(
            f"the process that reads its pickles has not answered within {CHILD_S:.0f} s",
            path=str(path),
            state="nothing was written",
            actions=("see whether its disk answers: ls, dmesg",),
        )
    try:
        return msgspec.json.decode(said[0], type=_Told)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            "the process that reads its pickles ended without an answer", path=str(path)
        ) from error


class _Draft:
    """A container in the making: children by key. Numbers are places in a list."""

    def __init__(self) -> None:
        self._children: dict[str | int, Node | _Draft] = {}

    def inner(self, key: str | int) -> _Draft:
        """The container at a key."""
        found = self._children.setdefault(key, _Draft())
        if not isinstance(found, _Draft):
            raise FormatError(f"{str(key)[:200]} is a value and a container")
        return found

    def put(self, key: str | int, node: Node) -> None:
        """A leaf at a key."""
        if key in self._children:
            raise FormatError(f"{str(key)[:200]} is there twice")
        self._children[key] = node

    def built(self) -> Node:
        """The node, with all that is in it."""
        children = {
            key: child.built() if isinstance(child, _Draft) else child
            for key, child in self._children.items()
        }
        if children and set(children) == set(range(len(children))):
            return Node(_state.LIST, children=[children[i] for i in range(len(children))])
        return Node(_state.DICT, keys=list(children), children=list(children.values()))


class _Reader:
    """Turns what was told into nodes, and adds arrays and plain values to an item."""

    def __init__(self, directory: Path, item: Item) -> None:
        self._directory = directory
        self._item = item
        self._sizes: dict[str, int] = {}

    def node(self, value: Any, path: str, depth: int = 0) -> Node:
        """Raises FormatError, Damaged, UnsupportedState."""
        if not isinstance(value, list) or len(value) != 2 or depth > MAX_DEPTH:
            raise FormatError("not what the child tells", path=path[:200])
        kind, body = value
        try:
            if kind == "plain":
                self._item.plain.append(_state.decode_plain(body))
                return Node(_state.PLAIN, index=len(self._item.plain) - 1)
            if kind == "tensor":
                return self._tensor(msgspec.convert(body, _Tensor), path)
            if kind == "array":
                return self._array(msgspec.convert(body, _Array), path)
        except msgspec.ValidationError as error:
            raise FormatError(f"not what the child tells: {error}", path=path[:200]) from error
        if kind == "dict":
            keys = [_state.decode_plain(key) for key, _ in body]
            children = [
                self.node(each, f"{path}/{escape(key)}", depth + 1)
                for key, (_, each) in zip(keys, body, strict=True)
            ]
            return Node(_state.DICT, keys=keys, children=children)
        if kind not in (_state.LIST, _state.TUPLE):
            raise FormatError("not what the child tells", path=path[:200])
        items = [self.node(each, f"{path}/{i}", depth + 1) for i, each in enumerate(body)]
        return Node(kind, children=items)

    def _add(self, path: str, spec: ArraySpec, pieces: Any) -> Node:
        self._item.arrays.append(Pieced(path, spec, pieces))
        return Node(_state.ARRAY, index=len(self._item.arrays) - 1)

    def _array(self, array: _Array, path: str) -> Node:
        """One of NumPy's, whose bytes were in the pickle."""
        data = base64.b64decode(array.data)
        framework = "numpy.scalar" if array.is_scalar else "numpy"
        spec = ArraySpec(check_dtype(array.dtype, path), array.shape, framework)
        return self._add(path, spec, lambda: iter([memoryview(data)]))

    def _tensor(self, tensor: _Tensor, path: str) -> Node:
        spec = ArraySpec(check_dtype(tensor.dtype, path), tensor.shape, "torch")
        boxes = []
        for chunk in tensor.chunks:
            self._check(chunk, tensor, path)
            boxes.append(Box(chunk.offsets, chunk.sizes))
        if cover(whole(tensor.shape), boxes)[1]:
            raise Damaged("its chunks do not make up the whole array", leaf=path[:200])
        return self._add(path, spec, lambda: _bands(self._directory, tensor))

    def _check(self, chunk: _Chunk, tensor: _Tensor, path: str) -> None:
        """Raise Damaged for a chunk that does not lie in its array, or not in its file."""
        sizes, strides, shape = chunk.sizes, chunk.strides, tensor.shape
        counts = [*chunk.offsets, *sizes, *strides, *shape, chunk.first, chunk.start]
        lies = (
            len(chunk.offsets) == len(sizes) == len(strides) == len(shape)
            and len(shape) <= MAX_DIMENSIONS
            and min([*counts, chunk.size_bytes], default=0) >= 0
            and all(map(lambda o, n, m: o + n <= m, chunk.offsets, sizes, shape))
        )
        if lies and all(sizes):
            last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            end_bytes = (chunk.first + last + 1) * DTYPES[tensor.dtype].item_bytes
            file_bytes = self._size_bytes(chunk.file)
            # A view that has bytes twice would be larger than its file: nothing writes that.
            num_bytes = math.prod(sizes) * DTYPES[tensor.dtype].item_bytes
            lies = num_bytes <= chunk.size_bytes
            lies = (
                lies
                and end_bytes <= chunk.size_bytes
                and chunk.start + chunk.size_bytes <= file_bytes
            )
        if not lies:
            raise Damaged("a chunk does not lie in its file or its array", leaf=path[:200])

    def _size_bytes(self, name: str) -> int:
        if name not in self._sizes:
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise Damaged("the name of a file leads out of the directory", path=name[:200])
            try:
                info = os.lstat(self._directory / name)
            except OSError as error:
                raise Damaged(f"a file cannot be read: {error}", path=name) from error
            if not stat.S_ISREG(info.st_mode):
                raise Damaged("not a file: links are not followed", path=name)
            self._sizes[name] = info.st_size
        return self._sizes[name]


def _bands(directory: Path, tensor: _Tensor) -> Iterator[memoryview]:
    """The bytes of an array in C order, a block of at most BAND_BYTES at a time."""
    import numpy as np

    item_bytes = DTYPES[tensor.dtype].item_bytes
    # One axis at least. Elements are bytes that nobody looks into.
    shape: tuple[int, ...] = tensor.shape or (1,)
    if not math.prod(shape):
        return
    kind = np.dtype(f"V{item_bytes}")
    views = [(chunk, _mapped(directory, chunk, kind)) for chunk in tensor.chunks]
    for first, sizes in _blocks(shape, BAND_BYTES // item_bytes):
        block = np.empty(sizes, kind)
        for chunk, view in views:
            if not view.size:
                continue
            begins = [*map(max, first, chunk.offsets or (0,))]
            ends = [
                min(at + size, offset + length)
                for at, size, offset, length in zip(
                    first, sizes, chunk.offsets or (0,), chunk.sizes or (1,), strict=True
                )
            ]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            block[_slices(begins, ends, first)] = view[_slices(begins, ends, chunk.offsets or (0,))]
        yield block.reshape(-1).view(np.uint8).data


def _blocks(shape: Sequence[int], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that make up an array, one after the other in C order: where each begins, its sizes.

    Each has ``most`` elements at most, and is whole along every axis behind the one that is cut.
    """
    axis = next(i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= max(1, most))
    height = max(1, most // math.prod(shape[axis + 1 :]))
    behind = len(shape) - axis - 1
    for outer in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], height):
            size = min(height, shape[axis] - first)
            yield (*outer, first, *[0] * behind), (*[1] * axis, size, *shape[axis + 1 :])


def _slices(begins: Sequence[int], ends: Sequence[int], base: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, base, strict=True))


def _mapped(directory: Path, chunk: _Chunk, kind: Any) -> Any:
    """A chunk as an array over its file; what is read of it is the kernel's to keep or drop."""
    import numpy as np

    sizes: Sequence[int] = chunk.sizes or (1,)
    if not math.prod(sizes):
        return np.empty(sizes, kind)
    count = chunk.size_bytes // kind.itemsize
    try:
        # What was a file when it was looked at may be a link now, or shorter.
        fd = os.open(directory / chunk.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            flat = np.memmap(file, dtype=kind, mode="r", offset=chunk.start, shape=(count,))
    except (OSError, ValueError) as error:
        raise Damaged(f"a file cannot be read: {error}", path=chunk.file) from error
    strides = [stride * kind.itemsize for stride in chunk.strides] or [kind.itemsize]
    return np.lib.stride_tricks.as_strided(flat[chunk.first :], sizes, strides, writeable=False)
