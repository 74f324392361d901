"""NumPy leaves: every type and layout comes back as it was, the rest is refused by path."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from state_harness import restore, save

from mtckpt._state import ArraySpec
from mtckpt.adapters.numpy import NumpyAdapter
from mtckpt.errors import UnsupportedState

NATIVE = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
SMALL = [
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float4_e2m1fn", "int4", "uint4", "int2", "uint2"),
]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(name) if name in NATIVE else np.dtype(getattr(ml_dtypes, name))


def values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Every bit pattern that fits: 0 and 1 for those types that have few."""
    dtype = dtype_of(name)
    rng = np.random.default_rng(7)
    if name in ("bool", "float4_e2m1fn", "int4", "uint4", "int2", "uint2"):
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", NATIVE + SMALL)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_every_type_comes_back(name: str, shape: tuple[int, ...]) -> None:
    array = values(name, shape)
    live = np.zeros(shape, dtype_of(name))
    result = restore(save({"a": array}), {"a": live})
    assert result["a"] is live
    assert live.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda a: a.T,
        lambda a: a[:, ::2],
        lambda a: a[::-1],
        np.asfortranarray,
        lambda a: np.broadcast_to(a[0], (3, a.shape[1])),
    ],
)
def test_every_layout_is_saved_in_c_order_and_restored_into(name: str, layout: Any) -> None:
    array = layout(values(name, (6, 8)))
    saved = save([array])
    assert saved.data[0] == array.tobytes()
    plain = np.zeros(array.shape, array.dtype)
    assert restore(saved, [plain])[0] is plain
    assert plain.tobytes() == array.tobytes()
    strided = layout(np.zeros((6, 8), array.dtype))
    assert restore(saved, [strided])[0].tobytes() == array.tobytes()


def test_byte_order_is_not_kept_and_values_are() -> None:
    big = np.arange(5, dtype=">i4")
    saved = save({"a": big})
    assert saved.data[0] == np.arange(5, dtype="<i4").tobytes()
    live = np.zeros(5, ">i4")
    assert restore(saved, {"a": live})["a"] is live
    assert live.tolist() == [0, 1, 2, 3, 4]


def test_a_read_only_array_is_replaced() -> None:
    live = np.zeros(3)
    live.flags.writeable = False
    state = {"a": live}
    restore(save({"a": np.arange(3.0)}), state)
    assert live.tolist() == [0, 0, 0]
    assert state["a"].tolist() == [0, 1, 2]
    assert not state["a"].flags.writeable


@pytest.mark.parametrize(
    "scalar", [np.float64(1.5), np.bool_(True), np.int8(-3), ml_dtypes.bfloat16(2.5)]
)
def test_scalars_come_back_as_scalars(scalar: Any) -> None:
    saved = save({"a": scalar})
    state: dict[str, Any] = {"a": type(scalar)(0)}
    restore(saved, state)
    assert type(state["a"]) is type(scalar)
    assert state["a"] == scalar
    opened = restore(saved, {"a": None})  # a place that the template leaves open
    assert type(opened["a"]) is type(scalar)


def test_memmap_is_an_array(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "a", np.int32, "w+", shape=(4,))
    mapped[:] = range(4)
    live = np.zeros(4, np.int32)
    restore(save([mapped]), [live])
    assert live.tolist() == [0, 1, 2, 3]


class Quantity(np.ndarray[Any, Any]):
    """An array with a unit, say."""


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.zeros(2, [("x", "f4"), ("y", "i4")]),
        np.ma.masked_array([1, 2], [True, False]),
        np.zeros(3).view(Quantity),
        np.zeros(2, np.longdouble),
        np.str_("text"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any) -> None:
    with pytest.raises(UnsupportedState) as caught:
        save({"outer": [1, {"inner": value}]})
    assert caught.value.path == "outer/1/inner"  # type: ignore[attr-defined]
    assert "nothing was written" in str(caught.value)
    assert "try: save " in str(caught.value)


def test_the_same_memory_has_the_same_identity() -> None:
    adapter = NumpyAdapter()
    array = np.zeros((2, 3))
    assert adapter.identity(array) == adapter.identity(array[:])
    assert adapter.identity(array) != adapter.identity(array.T)
    assert adapter.identity(array) != adapter.identity(array.view(np.int64))
    assert adapter.identity(np.zeros((0, 2))) is None
    assert adapter.identity(np.float64(1)) is None


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((2, 3), np.float32),
        np.zeros((3, 2)),
        np.zeros((2, 3), order="F"),
        np.zeros((2, 3), ">f8"),
        np.zeros((4, 3))[::2],
        np.zeros((2, 3)).view(np.matrix),
    ],
)
def test_the_fingerprint_sees_type_shape_and_layout(other: Any) -> None:
    adapter = NumpyAdapter()
    array = np.zeros((2, 3))
    assert adapter.fingerprint([array]) == adapter.fingerprint([np.ones((2, 3))])
    assert adapter.fingerprint([array]) != adapter.fingerprint([other])
    assert adapter.fingerprint([array]) != adapter.fingerprint([array, array])


def test_types_of_torch_that_numpy_lacks_keep_their_bytes() -> None:
    adapter = NumpyAdapter()
    pairs, _ = adapter.new(ArraySpec("complex32", (4,), "torch"))
    assert (pairs.dtype, pairs.shape) == (np.float16, (4, 2))
    packed, _ = adapter.new(ArraySpec("float4_e2m1fn_x2", (4,), "torch"))
    assert (packed.dtype, packed.shape) == (np.uint8, (4,))


def test_numpy_is_not_imported_for_a_state_without_arrays() -> None:
    script = (
        "import sys\n"
        "from mtckpt._state import flatten\n"
        "from mtckpt.adapters import active_adapters\n"
        "flatten({'a': [1, 2.0, None]}, active_adapters())\n"
        "assert not {'numpy', 'torch', 'jax', 'ml_dtypes'} & set(sys.modules)\n"
        "assert [a.framework for a in active_adapters()] == ['numpy']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)
