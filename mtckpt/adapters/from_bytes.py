"""Whole arrays of the framework that is asked for, from verified bytes.

Knows what NumPy, torch and JAX call the element types of ``_dtypes``. Does not copy where the
framework can take the bytes as they are, and never changes a value on the way: a type that a
framework lacks is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mtckpt._state import ArraySpec
from mtckpt.errors import UnsupportedState, UsageError

__all__ = ["FRAMEWORKS", "maker"]

Maker = Callable[[Any, str, tuple[int, ...], str, str], Any]

FRAMEWORKS = ("numpy", "torch", "jax")
# Packed or paired types that NumPy has no name for: their bytes under the nearest type.
_PAIRS = "complex32"
_PACKED = "float4_e2m1fn_x2"


def maker(framework: str) -> Maker:
    """``(bytes as a NumPy array, type, shape, path, kind) -> array``. Imports the framework now.

    ``kind`` is the ``framework`` of the array's ``ArraySpec``: what it was when it was saved.

    Raises UsageError for a name that is none, or for one that is not installed.
    """
    makers: dict[str, Maker] = {"numpy": to_numpy, "torch": _to_torch, "jax": _to_jax}
    if framework not in makers:
        raise UsageError(
            f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}",
            state="nothing was read",
        )
    try:
        if framework == "torch":
            import torch  # noqa: F401 - so that a missing one is said before a file is opened
        elif framework == "jax":
            import jax  # noqa: F401 - as above
    except ImportError as error:
        raise UsageError(
            f"{framework} is not installed: {error}",
            state="nothing was read",
            actions=(f"pip install {framework}", "or load with framework='numpy'"),
        ) from error
    return makers[framework]


def to_numpy(raw: Any, dtype: str, shape: tuple[int, ...], path: str, kind: str = "") -> Any:
    """An ndarray over ``raw``. complex32 is float16 pairs on one more axis, packed types uint8."""
    import numpy as np

    del path, kind
    _require_little_endian()
    if dtype == _PAIRS:
        return raw.view(np.float16).reshape((*shape, 2))
    if dtype == _PACKED:
        return raw.reshape(shape)
    return raw.view(_numpy_dtype(dtype)).reshape(shape)


def _numpy_dtype(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    extended = getattr(ml_dtypes, name, None)
    return np.dtype(extended if extended is not None else name)


def _to_torch(raw: Any, dtype: str, shape: tuple[int, ...], path: str, kind: str) -> Any:
    import torch

    from mtckpt.adapters.torch.leaves import DTYPE_OF

    _require_little_endian()
    del kind
    torch_dtype = DTYPE_OF.get(dtype)
    if torch_dtype is None:
        raise _lacking("torch", torch.__version__, dtype, path)
    flat = torch.from_numpy(raw)
    if dtype == _PAIRS:  # by way of pairs: the constructor of this type warns that it is young
        return torch.view_as_complex(flat.view(torch.float16).reshape((*shape, 2)))
    if not raw.size:
        return torch.empty(shape, dtype=torch_dtype, device="cpu")
    return flat.view(torch_dtype).reshape(shape)


def _to_jax(raw: Any, dtype: str, shape: tuple[int, ...], path: str, kind: str) -> Any:
    from mtckpt.adapters.jax import leaves

    _require_little_endian()
    framework = kind if kind.partition(".")[0] == leaves.PLAIN else leaves.PLAIN
    spec = ArraySpec(dtype, shape, framework)
    leaves.check(spec, path, state="nothing was handed out")
    return leaves.made(leaves.Fresh(to_numpy(raw, dtype, shape, path), spec))


def _lacking(framework: str, version: str, dtype: str, path: str) -> UnsupportedState:
    return UnsupportedState(
        f"{framework} {version} has no type {dtype}",
        path=path,
        type_name=dtype,
        state="nothing was handed out",
        actions=("load it with framework='numpy'",),
    )


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise UnsupportedState(
            "checkpoints are little-endian and this machine is not",
            path="",
            type_name=sys.byteorder,
            state="nothing was handed out",
        )
