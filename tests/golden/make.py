"""Write the golden checkpoints, one for each type: ``python tests/golden/make.py DIRECTORY``.

They are committed and never written again: a later version of mtckpt must read what this one
wrote. A new format version gets a directory of its own beside ``v1``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT.parent.parent)]

import builders  # noqa: E402 - found by the line above when run as a script
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from mtckpt._dtypes import DTYPES  # noqa: E402

STEP = 7
PLAIN = {
    "text": "caf\u00e9 \u2713",
    "bytes": b"\x00\xff",
    "huge": 2**80,
    "nan": float("nan"),
    "none": None,
    "flag": True,
}
_BELOW_A_BYTE = {"int4": (-8, 8), "uint4": (0, 16), "int2": (-2, 2), "uint2": (0, 4)}


def pattern(dtype: str, num_items: int) -> bytes:
    """The bytes of ``num_items`` elements: every bit pattern where a byte has few, else mixed."""
    if dtype in _BELOW_A_BYTE:
        low, high = _BELOW_A_BYTE[dtype]
        kind = getattr(ml_dtypes, dtype)
        return bytes(np.resize(np.arange(low, high), num_items).astype(kind).tobytes())
    size_bytes = num_items * DTYPES[dtype].item_bytes
    mask = {"bool": 1, "float4_e2m1fn": 15}.get(dtype, 255)
    if DTYPES[dtype].item_bytes == 1:
        return bytes(i & mask for i in range(size_bytes))
    return bytes((i * 167 + i // 251) & mask for i in range(size_bytes))


def as_array(dtype: str, raw: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A NumPy array whose bytes are ``raw`` and whose ``dtype`` the builder can store."""
    if dtype == "complex32":
        return np.frombuffer(raw, np.dtype([("real", "<f2"), ("imag", "<f2")])).reshape(shape)
    if dtype == "float4_e2m1fn_x2":
        return np.frombuffer(raw, np.uint8).reshape(shape)
    return np.frombuffer(raw, np.dtype(getattr(ml_dtypes, dtype, dtype))).reshape(shape)


def make(directory: Path, dtype: str) -> Path:
    """One save of three arrays of this type, and plain values; returns its directory."""
    arrays = {
        "whole": as_array(dtype, pattern(dtype, 256), (16, 16)),
        "scalar": as_array(dtype, pattern(dtype, 2)[DTYPES[dtype].item_bytes :], ()),
        "empty": as_array(dtype, b"", (0, 3)),
    }
    save_dir = builders.build_save(
        directory,
        dtype,
        STEP,
        arrays,
        PLAIN,
        same_as={"tied": "whole"},
        dtypes=dict.fromkeys(arrays, dtype),
        metrics={"loss": 0.5},
    )
    builders.build_manifest(save_dir)
    return save_dir


if __name__ == "__main__":
    for name in DTYPES:
        make(Path(sys.argv[1]), name)
