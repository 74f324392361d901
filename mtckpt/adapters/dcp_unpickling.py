"""What is in a directory of ``torch.distributed.checkpoint``, as JSON: a program for a child.

    python -I -S dcp_unpickling.py DIRECTORY

Its metadata is a pickle, and so is every value that is no tensor: reading one calls what its bytes
say. Here they can say nothing but a few names, of which each is a stand-in (``dcp_stand_ins``).
Memory, time and files are limited first. Of tensors it tells where their bytes lie.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import math
import os
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING or __name__ != "__main__":
    from mtckpt.adapters.dcp_stand_ins import (
        ARRAY_KINDS,
        METADATA_NAMES,
        VALUE_NAMES,
        Array,
        ArrayKind,
        BytesMetadata,
        Index,
        Info,
        Metadata,
        Refused,
        Storage,
        Tensor,
        TensorMetadata,
        Unpickler,
    )
else:  # a program without packages: nothing but the file beside it, and that for a moment
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from dcp_stand_ins import (
        ARRAY_KINDS,
        METADATA_NAMES,
        VALUE_NAMES,
        Array,
        ArrayKind,
        BytesMetadata,
        Index,
        Info,
        Metadata,
        Refused,
        Storage,
        Tensor,
        TensorMetadata,
        Unpickler,
    )

    del sys.path[0]

MAX_MEMORY_BYTES = 4 * 1024**3
MAX_TIME_S = 600
MAX_FILES = 64
MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # a pickle of a few bytes can name one value any number of times
MAX_PICKLE_BYTES = 256 * 1024 * 1024
METADATA = ".metadata"


# -- files -----------------------------------------------------------------------------------------


class _View:
    """A part of a file as a file, for ``zipfile``."""

    def __init__(self, file: BinaryIO, start: int, size_bytes: int) -> None:
        self._file = file
        self.start = start
        self._size_bytes = size_bytes
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size_bytes - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self.start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


class _Files:
    """The data files of a directory, opened when they are needed, the last one kept."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._open: tuple[str, BinaryIO] | None = None

    def view(self, info: Any) -> tuple[str, _View]:
        """The part of a file that an entry is."""
        name, start, length = (info.get(n) for n in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise Refused("the name of a file leads out of the directory")
        if type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise Refused("an entry lies nowhere")
        if info.get("transform_descriptors"):
            raise Refused("an entry that was compressed or transformed")
        if self._open is None or self._open[0] != name:
            if self._open is not None:
                self._open[1].close()
            fd = os.open(os.path.join(self._directory, name), os.O_NOFOLLOW | os.O_NONBLOCK)
            self._open = name, os.fdopen(fd, "rb")
        return name, _View(self._open[1], start, length)


class _Entry:
    """One value as ``torch.save`` writes it: a zip file of a pickle and storages."""

    num_values = 0  # told so far, of all entries

    def __init__(self, name: str, view: _View) -> None:
        self._name = name
        self._view = view
        if view.read(2) != b"PK":
            raise Refused("an entry that torch.save did not write as a zip file")
        self._zip = zipfile.ZipFile(view)
        pickles = [each for each in self._zip.namelist() if each.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("an entry with another number of pickles than one")
        self._prefix = pickles[0][: -len("data.pkl")]

    def value(self) -> Any:
        """What was saved, of stand-ins."""
        if f"{self._prefix}byteorder" in self._zip.namelist():
            order = self._small(f"{self._prefix}byteorder", 16)
            if order != b"little":
                raise Refused("numbers that are big-endian")
        data = self._small(f"{self._prefix}data.pkl", MAX_PICKLE_BYTES)
        return Unpickler(io.BytesIO(data), VALUE_NAMES).load()

    def place(self, storage: Storage) -> dict[str, Any]:
        """Where the bytes of a storage lie."""
        info = self._zip.getinfo(f"{self._prefix}data/{storage.key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused("a storage that is compressed")
        self._view.seek(info.header_offset)
        header = self._view.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise Refused("a storage without a header")
        skip = (
            30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        start = self._view.start + info.header_offset + skip
        return {"file": self._name, "start": start, "size_bytes": info.file_size}

    def _small(self, name: str, limit_bytes: int) -> bytes:
        info = self._zip.getinfo(name)
        if info.file_size > limit_bytes or info.compress_type != zipfile.ZIP_STORED:
            raise Refused("a pickle that is too large or compressed")
        return self._zip.read(name)


# -- what is told ----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """As records have it: what JSON lacks is an object with a single key."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) is int and not -(2**63) <= value < 2**63:
        if value.bit_length() > 13_600:
            raise Refused("an integer of more than 13,600 bits")
        return {"int": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _told(value: Any, entry: _Entry, depth: int = 0) -> list[Any]:
    """A value as JSON: its kind, and what is in it."""
    _Entry.num_values += 1
    if depth > MAX_DEPTH or _Entry.num_values > MAX_VALUES:
        raise Refused("values that are nested too deeply, or too many")
    if value is None or type(value) in (bool, int, float, str, bytes):
        return ["plain", _plain(value)]
    if isinstance(value, Tensor):
        chunk = _chunk(value, entry, [0] * len(value.shape))
        return ["tensor", {"dtype": value.dtype, "shape": value.shape, "chunks": [chunk]}]
    if isinstance(value, Array):
        return ["array", _array(value)]
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_told(each, entry, depth + 1) for each in value]]
    if isinstance(value, dict):
        pairs = []
        for key, each in value.items():
            if key is not None and type(key) not in (bool, int, float, str):
                raise Refused("a key that is no plain value")
            pairs.append([_plain(key), _told(each, entry, depth + 1)])
        return ["dict", pairs]
    raise Refused(f"a value of a type without a form here ({type(value).__name__.strip('_')})")


def _chunk(tensor: Tensor, entry: _Entry, offsets: Any) -> dict[str, Any]:
    return {
        "offsets": list(offsets),
        "sizes": list(tensor.shape),
        "first": tensor.first,
        "strides": list(tensor.strides),
        **entry.place(tensor.storage),
    }


def _array(value: Array) -> dict[str, Any]:
    state = value.state
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], ArrayKind):
        raise Refused("an array of NumPy's in an unknown form")
    _, shape, kind, is_fortran, data = state
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
    name = ARRAY_KINDS.get(str(kind.args[0])) if kind.args else None
    if name is None or order not in ("<", "|") or is_fortran or not isinstance(data, bytes):
        raise Refused("an array of NumPy's of a type or order without a form here")
    return {
        "dtype": name,
        "shape": list(shape),
        "data": base64.b64encode(data).decode(),
        "is_scalar": value.args == ("scalar",),
    }


def _entries(directory: str) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """Every value by its path, and what tells it."""
    path = os.path.join(directory, METADATA)
    if os.path.getsize(path) > MAX_PICKLE_BYTES:
        raise Refused("metadata that is too large")
    with open(path, "rb") as file:
        metadata = Unpickler(file, METADATA_NAMES).load()
    if not isinstance(metadata, Metadata):
        raise Refused("a pickle of something else")
    infos: dict[tuple[str, Any], Any] = {}
    for index, info in (metadata.get("storage_data") or {}).items():
        if not isinstance(index, Index) or not isinstance(info, Info):
            raise Refused("metadata of another storage than files")
        offset = index.get("offset")
        infos[index.get("fqn"), None if offset is None else tuple(offset)] = info
    files = _Files(directory)
    paths = metadata.get("planner_data") or {}
    for name, kind in (metadata.get("state_dict_metadata") or {}).items():
        steps = list(paths.get(name, (name,)))
        yield json.dumps(steps), _teller(name, kind, infos, files)


def _teller(name: str, kind: Any, infos: Any, files: _Files) -> Callable[[], list[Any]]:
    def tell_value() -> list[Any]:
        entry = _Entry(*files.view(infos[name, None]))
        return _told(entry.value(), entry)

    def tell_tensor() -> list[Any]:
        chunks = []
        dtype = ""
        for chunk in kind.get("chunks"):
            offsets = tuple(chunk.get("offsets"))
            info = infos.get((name, offsets))
            if info is None and not any(offsets):
                info = infos.get((name, None))
            entry = _Entry(*files.view(info))
            tensor = entry.value()
            if not isinstance(tensor, Tensor) or tensor.shape != tuple(chunk.get("sizes")):
                raise Refused("a chunk of another shape than the metadata says")
            if dtype not in ("", tensor.dtype):
                raise Refused("chunks of several types")
            dtype = tensor.dtype
            chunks.append(_chunk(tensor, entry, offsets))
        if not chunks:
            raise Refused("a tensor without chunks")
        return ["tensor", {"dtype": dtype, "shape": list(kind.get("size")), "chunks": chunks}]

    if isinstance(kind, BytesMetadata):
        return tell_value
    if isinstance(kind, TensorMetadata):
        return tell_tensor
    raise Refused("an entry of an unknown kind")


def tell(directory: str) -> dict[str, Any]:
    """What is in the directory, or what in it cannot be told and why."""
    found: list[Any] = []
    path = ""
    try:
        for path, teller in _entries(directory):
            found.append([json.loads(path), teller()])
    except Refused as error:
        return {"refused": str(error), "path": path}
    except Exception as error:  # noqa: BLE001 - a hostile file may make any of them fail
        return {"broken": f"{type(error).__name__}: {error}"[:500], "path": path}
    return {"entries": found}


def restrict() -> None:
    """Take away from this process what it does not need."""
    for what, most in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, MAX_TIME_S),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        limit = resource.getrlimit(what)[1]
        most = most if limit == resource.RLIM_INFINITY else min(most, limit)
        resource.setrlimit(what, (most, most))


def main() -> None:
    """Tell on the standard output."""
    restrict()
    gc.disable()  # it would walk over everything that is told, again and again
    json.dump(tell(sys.argv[1]), sys.stdout)


if __name__ == "__main__":
    main()
