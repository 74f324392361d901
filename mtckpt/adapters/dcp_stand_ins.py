"""What pickles of ``torch.distributed.checkpoint`` may name: stand-ins that note and do nothing.

Knows exact names, and for each a class or function of this file, which notes what it is given. No
class of PyTorch's or of anybody's is ever called, or even there, and what has been made once is not
changed by what a pickle says later. Does not know files. For the child of ``dcp_unpickling``, which
has no packages: it imports nothing but Python's own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

__all__ = [
    "ARRAY_KINDS",
    "METADATA_NAMES",
    "VALUE_NAMES",
    "Array",
    "ArrayKind",
    "BytesMetadata",
    "Index",
    "Info",
    "Metadata",
    "Refused",
    "Storage",
    "Tensor",
    "TensorMetadata",
    "Unpickler",
]


class Refused(Exception):
    """Nothing that can be told: ``args`` say why."""


# -- stand-ins -------------------------------------------------------------------------------------


class _Fixed:
    """What a pickle may name or make, and not change: its BUILD looks for ``__setstate__``, and
    where there is none it sets whatever attributes it likes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise Refused("something that is changed after it was made")


class _Function(_Fixed):
    """A function that may be named."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _Noted:
    """An object of any class: ``state`` is what it was pickled with, which is said once."""

    is_built = False

    def __init__(self, *args: Any) -> None:
        self.state: Any = {}
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if self.is_built:
            raise Refused("something that is changed after it was made")
        self.is_built, self.state = True, state

    def get(self, name: str) -> Any:
        """One of its fields, None without."""
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


def _noted(name: str) -> type[_Noted]:
    return type(name, (_Noted,), {})


Metadata = _noted("_Metadata")
TensorMetadata = _noted("_TensorMetadata")
BytesMetadata = _noted("_BytesMetadata")
_Chunk = _noted("_Chunk")
Index = _noted("_Index")
Info = _noted("_Info")
ArrayKind = _noted("_ArrayKind")
_MemoryFormat = _noted("_MemoryFormat")


class _Size(tuple[Any, ...]):
    __slots__ = ()

    __setstate__ = _Fixed.__setstate__


class _Dict(dict[Any, Any]):
    is_built = False

    def __setstate__(self, state: Any) -> None:
        """Attributes, which state dicts of modules have, are not told."""
        if self.is_built:
            raise Refused("something that is changed after it was made")
        self.is_built = True


class _Dtype(_Fixed):
    def __init__(self, name: str) -> None:
        self.name = name


class _StorageKind(_Dtype):
    """The type of a storage; its elements have one too."""


class Storage(_Fixed):
    def __init__(self, dtype: str, key: str) -> None:
        self.dtype = dtype
        self.key = key


class Tensor(_Fixed):
    """A view of a storage, in elements."""

    def __init__(self, storage: Any, first: Any, shape: Any, strides: Any, dtype: str) -> None:
        self.storage = storage
        self.first = first
        self.shape = tuple(shape)
        self.strides = tuple(strides)
        self.dtype = dtype


class Array(_Noted):
    """An array of NumPy's, or a scalar."""


@_Function
def _tensor_v2(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    # rest: requires_grad, hooks, and bits that negate or conjugate
    if not isinstance(storage, Storage) or (len(rest) > 2 and rest[2]):
        raise Refused("a tensor that is not its bytes")
    return Tensor(storage, first, shape, strides, storage.dtype)


@_Function
def _tensor_v3(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    # rest: requires_grad, hooks, type, and bits as above
    if not isinstance(storage, Storage) or len(rest) < 3 or (len(rest) > 3 and rest[3]):
        raise Refused("a tensor that is not its bytes")
    if not isinstance(rest[2], _Dtype):
        raise Refused("a tensor without a type")
    return Tensor(storage, first, shape, strides, rest[2].name)


@_Function
def _member(kind: Any, name: Any) -> Any:
    # So an enumeration's members are pickled by Python 3.11 before 3.11.4.
    if kind is not _MemoryFormat or not isinstance(name, str):
        raise Refused("builtins.getattr of what is no enumeration")
    return _MemoryFormat()


@_Function
def _parameter(tensor: Any, *rest: Any) -> Any:
    del rest
    return tensor


@_Function
def _encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise Refused(f"bytes in {codec!r}")
    return text.encode("latin1")


@_Function
def _reconstruct(*args: Any) -> Array:
    del args
    return Array()


@_Function
def _scalar(kind: Any, data: Any = b"") -> Array:
    made = Array("scalar")
    made.__setstate__((1, (), kind, False, data))
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
ARRAY_KINDS = {
    "b1": "bool",
    **{f"{kind}{size}": f"{name}{8 * size}" for size in (1, 2, 4, 8)
       for kind, name in (("i", "int"), ("u", "uint"))},
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    "c8": "complex64",
    "c16": "complex128",
}  # fmt: skip

_DCP = "torch.distributed.checkpoint"
METADATA_NAMES: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_DCP}.metadata", "MetadataIndex"): Index,
    (f"{_DCP}.metadata", "TensorProperties"): _Noted,
    (f"{_DCP}.metadata", "StorageMeta"): _Noted,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("builtins", "getattr"): _member,
    (f"{_DCP}.filesystem", "_StorageInfo"): Info,
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
VALUE_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): _StorageKind(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _StorageKind("uint8"),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): ArrayKind,
    **{
        (module, name): made
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, made in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
}


class Unpickler(pickle.Unpickler):
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
        return Storage(pid[1].name, pid[2])
