"""Element types: their name in mtckpt, their size, and how a safetensors file stores them.

Names are those that NumPy, ml_dtypes and torch share. A type that safetensors does not have is
stored as ``U8`` with one more axis, the bytes of an element; its name stands in the record.
Sub-byte types of ml_dtypes and JAX (int4, float4_e2m1fn ...) hold one element in one byte.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from mtckpt.errors import UnsupportedState

__all__ = ["DTYPES", "DType", "check_dtype", "name_of", "size_bytes_of"]


@dataclass(frozen=True, slots=True)
class DType:
    """``code`` is the safetensors type, or None for one that is stored as bytes."""

    name: str
    item_bytes: int
    code: str | None

    @property
    def stored_code(self) -> str:
        return self.code or "U8"

    @property
    def stored_item_bytes(self) -> int:
        return self.item_bytes if self.code else 1

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.code else (*shape, self.item_bytes)


DTYPES: dict[str, DType] = {
    name: DType(name, item_bytes, code)
    for name, item_bytes, code in [
        ("bool", 1, "BOOL"),
        ("uint8", 1, "U8"),
        ("int8", 1, "I8"),
        ("uint16", 2, "U16"),
        ("int16", 2, "I16"),
        ("uint32", 4, "U32"),
        ("int32", 4, "I32"),
        ("uint64", 8, "U64"),
        ("int64", 8, "I64"),
        ("float16", 2, "F16"),
        ("bfloat16", 2, "BF16"),
        ("float32", 4, "F32"),
        ("float64", 8, "F64"),
        ("complex64", 8, "C64"),
        ("float8_e4m3fn", 1, "F8_E4M3"),
        ("float8_e5m2", 1, "F8_E5M2"),
        ("float8_e8m0fnu", 1, "F8_E8M0"),
        ("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
        # Not in safetensors: stored as bytes with one more axis.
        ("complex32", 4, None),
        ("complex128", 16, None),
        ("float8_e3m4", 1, None),
        ("float8_e4m3", 1, None),
        ("float8_e4m3b11fnuz", 1, None),
        ("float4_e2m1fn", 1, None),
        ("float4_e2m1fn_x2", 1, None),
        ("int4", 1, None),
        ("uint4", 1, None),
        ("int2", 1, None),
        ("uint2", 1, None),
    ]
}


def size_bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of this type and shape. KeyError for a type that is not in the table."""
    return math.prod(shape) * DTYPES[dtype].item_bytes


@functools.lru_cache(maxsize=1000)
def name_of(dtype: Any) -> str:
    """The name of a NumPy type, which NumPy puts together anew each time it is asked."""
    return str(dtype.name)


def check_dtype(name: str, path: str, *instead: str) -> str:
    """``name`` if it can be stored. Raises UnsupportedState, which says what to do ``instead``."""
    if name not in DTYPES:
        raise UnsupportedState(
            f"arrays of type {name} cannot be stored",
            path=path,
            type_name=name,
            state="nothing was written",
            actions=instead,
        )
    return name
