"""Conversion on restore: only where the template asks for it, rounded once, all else as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from state_harness import plan, restore, save

import mtckpt
from mtckpt.errors import StateMismatch, UnsupportedState, UsageError

jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")

from mtckpt.adapters.jax import cast  # noqa: E402 - after it is known that jax is there

FLOATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("stored", [*FLOATS, "float64"])
@pytest.mark.parametrize("wanted", FLOATS)
def test_every_pair_of_types_is_rounded_as_numpy_does(stored: str, wanted: str) -> None:
    host = np.random.default_rng(7).normal(size=(40, 3)).astype(stored)
    rounded = host.astype(wanted)
    for live in (jnp.zeros((40, 3), wanted), jax.ShapeDtypeStruct((40, 3), wanted)):
        result = restore(save({"w": host}), {"w": cast(live)})["w"]
        assert (result.dtype, bits(result)) == (rounded.dtype, bits(rounded))
        again = restore(save({"w": host}), {"w": cast(jnp.zeros((40, 3)), wanted)})["w"]
        assert bits(again) == bits(rounded)


def test_what_is_too_large_says_nothing() -> None:
    saved = save([jnp.asarray([1e30, -1e30, 1e-30, jnp.nan])])
    (half,) = restore(saved, cast([jnp.zeros(4)], "float16"))
    assert np.asarray(half)[:3].tolist() == [np.inf, -np.inf, 0]
    assert np.isnan(half[3])


def test_only_floating_point_arrays_are_converted() -> None:
    state = {
        "w": jnp.full((2, 2), 1.5),
        "count": jnp.asarray(3),
        "mask": jnp.ones(2, bool),
        "key": jax.random.key(1),
        "host": np.full(2, 1.5),
        "plain": 2.5,
    }
    template = jax.eval_shape(lambda: {k: v for k, v in state.items() if k != "host"})
    wanted = cast({**template, "host": np.zeros(2), "plain": 0.5}, jnp.bfloat16)
    found = restore(save(state), wanted)
    assert found["w"].dtype == jnp.bfloat16
    assert (found["count"].dtype, found["mask"].dtype) == (jnp.int32, bool)
    assert (found["key"], found["plain"]) == (state["key"], 2.5)
    assert (type(found["host"]), found["host"].dtype) == (np.ndarray, np.float64)
    for name, live in [
        ("count", jnp.asarray(0, jnp.int8)),
        ("count", jnp.asarray(0.5)),
        ("w", jnp.zeros((2, 2), int)),
        ("w", jnp.zeros((2, 3))),
    ]:
        with pytest.raises(StateMismatch, match=name):
            plan(save(state), {name: cast(live)})
    with pytest.raises(StateMismatch, match=r"bfloat16\[2, 2\] here, float32\[2, 2\]"):
        plan(save(state), {"w": jnp.zeros((2, 2), jnp.bfloat16)})  # nobody asked


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "float64"])
def test_types_that_are_no_numbers_with_a_fraction_are_refused(dtype: str) -> None:
    with pytest.raises(UsageError):
        cast(jnp.zeros(2), dtype)
    described = cast(jax.ShapeDtypeStruct((2,), "float64"))
    with pytest.raises(UnsupportedState, match="narrow"):
        plan(save([jnp.zeros(2)]), [described])


def test_a_module_of_another_type_from_another_framework(tmp_path: Path, runtime_dir: Path) -> None:
    model = torch.nn.Linear(3, 2).double()
    wanted = {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path)], timeout_s=20) as checkpointer:
        checkpointer.save(1, {"model": model}, tiers="all").wait("local", timeout_s=20)
        found = checkpointer.restore({"model": cast(wanted, jnp.bfloat16)}).state["model"]
    assert found["weight"].dtype == jnp.bfloat16
    rounded = model.weight.detach().to(torch.bfloat16)
    assert bits(found["weight"]) == rounded.view(torch.uint8).numpy().tobytes()


def test_modules_of_nnx() -> None:
    saved = save(nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    model = cast(nnx.Linear(3, 2, rngs=nnx.Rngs(2)), jnp.bfloat16)
    restored = restore(saved, model)
    expected = nnx.Linear(3, 2, rngs=nnx.Rngs(1)).kernel[...].astype(jnp.bfloat16)
    assert bits(restored.kernel[...]) == bits(expected)


def test_boxes_of_several_devices(tmp_path: Path, runtime_dir: Path) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices()[:8])
    rows, columns, all_ = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("x",), (None, "y"), ())
    )
    whole = np.random.default_rng(7).normal(size=(8, 4)).astype(np.float32)
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path)], timeout_s=20) as checkpointer:
        state = {"w": jax.device_put(whole, rows)}
        checkpointer.save(1, state, tiers="all").wait("local", timeout_s=20)
        for sharding in (rows, columns, all_):
            live = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)
            found = checkpointer.restore(cast({"w": live}, "float16")).state["w"]
            assert found.sharding == sharding
            assert bits(found) == bits(whole.astype(np.float16))
