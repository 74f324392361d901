"""What is in a directory of ``torch.distributed.checkpoint``, as JSON: a program for a child.

    python -I -S dcp_unpickling.py DIRECTORY

Its metadata is a pickle, and so is every value that is no tensor: reading one calls what its bytes
say. Here they can say nothing but the names in ``_KNOWN``, and each of those is a stand-in of this
file that notes what it is given: no class of PyTorch's or of anybody's is ever called, or even
there. Memory, time and files are limited first. Of tensors it tells where their bytes lie.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import math
import os
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MAX_MEMORY_BYTES = 4 * 1024**3
MAX_TIME_S = 600
MAX_FILES = 64
MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # a pickle of a few bytes can name one value any number of times
MAX_PICKLE_BYTES = 256 * 1024 * 1024
METADATA = ".metadata"


class Refused(Exception):
    """Nothing that can be told: ``args`` say why."""


# -- stand-ins -------------------------------------------------------------------------------------


class _Noted:
    """An object of any class: ``state`` is what it was pickled with."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = {}
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """One of its fields, None without."""
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


def _noted(name: str) -> type[_Noted]:
    return type(name, (_Noted,), {})


_Metadata = _noted("_Metadata")
_TensorMetadata = _noted("_TensorMetadata")
_BytesMetadata = _noted("_BytesMetadata")
_Chunk = _noted("_Chunk")
_Index = _noted("_Index")
_Info = _noted("_Info")
_ArrayKind = _noted("_ArrayKind")


class _Size(tuple[Any, ...]):
    __slots__ = ()


class _Dict(dict[Any, Any]):
    pass


class _Dtype:
    def __init__(self, name: str) -> None:
        self.name = name


class _StorageKind(_Dtype):
    """The type of a storage; its elements have one too."""


class _Storage:
    def __init__(self, dtype: str, key: str) -> None:
        self.dtype = dtype
        self.key = key


class _Tensor:
    """A view of a storage, in elements."""

    def __init__(self, storage: Any, first: Any, shape: Any, strides: Any, dtype: str) -> None:
        self.storage = storage
        self.first = first
        self.shape = tuple(shape)
        self.strides = tuple(strides)
        self.dtype = dtype


class _Array(_Noted):
    """An array of NumPy's, or a scalar."""


def _tensor_v2(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    # rest: requires_grad, hooks, and bits that negate or conjugate
    if not isinstance(storage, _Storage) or (len(rest) > 2 and rest[2]):
        raise Refused("a tensor that is not its bytes")
    return _Tensor(storage, first, shape, strides, storage.dtype)


def _tensor_v3(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    # rest: requires_grad, hooks, type, and bits as above
    if not isinstance(storage, _Storage) or len(rest) < 3 or (len(rest) > 3 and rest[3]):
        raise Refused("a tensor that is not its bytes")
    if not isinstance(rest[2], _Dtype):
        raise Refused("a tensor without a type")
    return _Tensor(storage, first, shape, strides, rest[2].name)


def _parameter(tensor: Any, *rest: Any) -> Any:
    del rest
    return tensor


def _encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise Refused(f"bytes in {codec!r}")
    return text.encode("latin1")


def _reconstruct(*args: Any) -> _Array:
    del args
    return _Array()


def _scalar(kind: Any, data: Any = b"") -> _Array:
    made = _Array("scalar")
    made.state = (1, (), kind, False, data)
    return made


_DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float4_e2m1fn_x2",
)
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_ARRAY_KINDS = {
    "b1": "bool",
    **{f"{kind}{size}": f"{name}{8 * size}" for size in (1, 2, 4, 8)
       for kind, name in (("i", "int"), ("u", "uint"))},
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    "c8": "complex64",
    "c16": "complex128",
}  # fmt: skip

_DCP = "torch.distributed.checkpoint"
_METADATA_NAMES: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _TensorMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _BytesMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_DCP}.metadata", "MetadataIndex"): _Index,
    (f"{_DCP}.metadata", "TensorProperties"): _Noted,
    (f"{_DCP}.metadata", "StorageMeta"): _Noted,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Noted,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Info,
    ("torch.serialization", "_get_layout"): _Noted,
    **{
        (module, name): _Noted
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")
    },
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{("torch", name): _Dtype(name) for name in _DTYPES},
    ("torch", "Size"): _Size,
    ("collections", "OrderedDict"): _Dict,
}
_VALUE_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): _StorageKind(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _StorageKind("uint8"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _ArrayKind,
    **{
        (module, name): made
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, made in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows exact names, of which each is a stand-in."""

    def __init__(self, file: BinaryIO, names: dict[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._names = {**_KNOWN, **names}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in. Raises Refused for every other name."""
        found = self._names.get((module, name))
        if found is None:
            raise Refused(f"{module}.{name}"[:200])
        return found

    def persistent_load(self, pid: Any) -> Any:
        """A storage that lies beside the pickle."""
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise Refused("a reference that is none to a storage")
        if not isinstance(pid[1], _StorageKind) or not isinstance(pid[2], str):
            raise Refused("a storage without a type")
        return _Storage(pid[1].name, pid[2])


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
        return _Unpickler(io.BytesIO(data), _VALUE_NAMES).load()

    def place(self, storage: _Storage) -> dict[str, Any]:
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
    if isinstance(value, _Tensor):
        chunk = _chunk(value, entry, [0] * len(value.shape))
        return ["tensor", {"dtype": value.dtype, "shape": value.shape, "chunks": [chunk]}]
    if isinstance(value, _Array):
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


def _chunk(tensor: _Tensor, entry: _Entry, offsets: Any) -> dict[str, Any]:
    return {
        "offsets": list(offsets),
        "sizes": list(tensor.shape),
        "first": tensor.first,
        "strides": list(tensor.strides),
        **entry.place(tensor.storage),
    }


def _array(value: _Array) -> dict[str, Any]:
    state = value.state
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _ArrayKind):
        raise Refused("an array of NumPy's in an unknown form")
    _, shape, kind, is_fortran, data = state
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
    name = _ARRAY_KINDS.get(str(kind.args[0])) if kind.args else None
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
        metadata = _Unpickler(file, _METADATA_NAMES).load()
    if not isinstance(metadata, _Metadata):
        raise Refused("a pickle of something else")
    infos: dict[tuple[str, Any], Any] = {}
    for index, info in (metadata.get("storage_data") or {}).items():
        if not isinstance(index, _Index) or not isinstance(info, _Info):
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
            if not isinstance(tensor, _Tensor) or tensor.shape != tuple(chunk.get("sizes")):
                raise Refused("a chunk of another shape than the metadata says")
            if dtype not in ("", tensor.dtype):
                raise Refused("chunks of several types")
            dtype = tensor.dtype
            chunks.append(_chunk(tensor, entry, offsets))
        if not chunks:
            raise Refused("a tensor without chunks")
        return ["tensor", {"dtype": dtype, "shape": list(kind.get("size")), "chunks": chunks}]

    if isinstance(kind, _BytesMetadata):
        return tell_value
    if isinstance(kind, _TensorMetadata):
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
