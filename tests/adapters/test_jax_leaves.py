"""Arrays of JAX: every type, placement and kind of key comes back, the rest is refused by path."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from state_harness import fills, plan, restore, save

from mtckpt.adapters import active_adapters
from mtckpt.errors import StateMismatch, UnsupportedState

jax = pytest.importorskip("jax")
jnp = jax.numpy
leaves = pytest.importorskip("mtckpt.adapters.jax.leaves")

TYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32"),
    *("complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float4_e2m1fn", "int4", "uint4", "int2", "uint2"),
]


def values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Every bit pattern that fits: 0 and 1 for those types that have few."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    rng = np.random.default_rng(7)
    if name in ("bool", "float4_e2m1fn", "int4", "uint4", "int2", "uint2"):
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_every_type_comes_back(name: str, shape: tuple[int, ...]) -> None:
    host = values(name, shape)
    saved = save({"a": jax.device_put(host)})
    assert saved.data[0] == host.tobytes()
    single = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    for sharding in (None, single):
        template = jax.ShapeDtypeStruct(shape, host.dtype, sharding=sharding)
        result = restore(saved, {"a": template})["a"]
        assert isinstance(result, jax.Array)
        assert (result.dtype, result.shape, bits(result)) == (host.dtype, shape, host.tobytes())
        assert not result.weak_type


@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
def test_wide_types_come_back_or_are_refused(name: str) -> None:
    host = values(name, (3, 2))
    with jax.enable_x64(True):
        saved = save({"a": jax.device_put(host)})
        result = restore(saved, {"a": jax.ShapeDtypeStruct((3, 2), name)})["a"]
    assert (result.dtype, bits(result)) == (host.dtype, host.tobytes())
    live = {"a": None}
    with pytest.raises(UnsupportedState, match=f"jax would narrow {name} to") as caught:
        plan(saved, live)
    assert caught.value.details["path"] == "a"


def test_bytes_are_taken_where_they_lie_and_new_ones_adopted() -> None:
    array = jnp.arange(1000.0)
    adapter = next(each for each in active_adapters() if each.framework == "jax")
    addresses, copies = adapter.addresses([array], ["a"])
    assert (addresses, copies) == ([array.unsafe_buffer_pointer()], [])
    saved = save([array])
    here = jax.devices()[0]
    for live in (jnp.zeros(1000), jax.device_put(jnp.zeros(1000), here)):
        placing, result = plan(saved, [live])
        (fill,) = fills(placing)
        for work in placing.finish:
            work()
        assert restore(saved, [live])[0].unsafe_buffer_pointer() % 64 == 0
        assert result[0].unsafe_buffer_pointer() == fill.address


def test_an_array_that_is_where_it_belongs_is_not_made_once_more() -> None:
    array = jax.device_put(jnp.zeros(3), jax.devices()[0])
    assert leaves.made(leaves.Arriving(None, 0, array), array) is array
    elsewhere = jax.device_put(array, jax.devices()[-1])
    assert leaves.made(leaves.Arriving(None, 0, array), elsewhere).sharding == elsewhere.sharding
    assert not leaves.made(leaves.Arriving(None, 0, array), jnp.zeros(3)).is_deleted()


def test_a_transposed_layout_is_saved_in_c_order() -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    host = values("float32", (3, 5))
    turned = layouts.Format(
        layouts.Layout((1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    array = jax.device_put(host, turned)
    assert np.asarray(array).strides == (4, 12)
    assert save([array]).data[0] == host.tobytes()


@pytest.mark.parametrize(
    "weak", [jnp.asarray(1.5), jnp.asarray(3), jax.lax.full_like(2.5, 2, shape=(3,))]
)
def test_weak_types_stay_weak_and_others_do_not_become_so(weak: Any) -> None:
    assert weak.weak_type
    strong = jnp.asarray(np.asarray(weak))
    restored = restore(save([weak, strong]), [strong, weak])
    assert [array.weak_type for array in restored] == [True, False]
    assert [bits(array) for array in restored] == [bits(weak), bits(strong)]


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("abstract", [False, True])
def test_keys_come_back(impl: str, abstract: bool) -> None:
    one = jax.random.key(7, impl=impl)
    many = jax.random.split(one, (2, 3))
    live = [jax.random.key(0, impl=impl), jax.random.split(jax.random.key(0, impl=impl), (2, 3))]
    template = jax.eval_shape(lambda: live) if abstract else live
    restored = restore(save([one, many]), template)
    for old, new in zip([one, many], restored, strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert jax.random.key_impl(new) == impl
        assert bits(jax.random.key_data(new)) == bits(jax.random.key_data(old))
    opened = restore(save({"key": one}), {"key": None})["key"]
    assert jax.random.normal(opened, 2).tolist() == jax.random.normal(one, 2).tolist()


def test_old_keys_become_new_ones_where_the_template_says_so() -> None:
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    assert restore(save([old]), [new])[0] == new
    assert bits(restore(save([new]), [old])[0]) == bits(old)


def test_keys_of_another_generator_differ() -> None:
    saved = save({"key": jax.random.key(0, impl="rbg")})
    with pytest.raises(StateMismatch) as caught:
        plan(saved, {"key": jax.random.key(0, impl="unsafe_rbg")})
    assert vars(caught.value)["differing"] == (
        "key: uint32[4] (key.unsafe_rbg) here, uint32[4] (key.rbg) in the checkpoint",
    )


def test_keys_of_an_unknown_generator_are_refused() -> None:
    saved = save({"key": jax.random.key(0)})
    (stored,) = saved.arrays
    odd = stored._replace(spec=stored.spec._replace(framework="jax.key.mine"))
    with pytest.raises(UnsupportedState, match="no keys that jax"):
        plan(dataclasses.replace(saved, arrays=[odd]), {"key": None})


# -- placement -------------------------------------------------------------------------------------


def test_an_array_stays_on_its_device_or_free_to_move() -> None:
    device = jax.devices()[-1]
    here = jax.device_put(np.arange(3.0, dtype=np.float32), device)
    free = jnp.arange(3.0)
    saved = save([here, free])
    restored = restore(saved, [here + 1, free + 1])
    assert [bits(array) for array in restored] == [bits(here), bits(free)]
    assert restored[0].sharding == here.sharding
    assert [array.committed for array in restored] == [True, False]
    single = jax.sharding.SingleDeviceSharding(device)
    template = [jax.ShapeDtypeStruct((3,), np.float32, sharding=s) for s in (None, single)]
    there = restore(saved, template)
    assert [array.committed for array in there] == [False, True]
    assert there[1].sharding == single


# -- what cannot be saved --------------------------------------------------------------------------


def _donated() -> Any:
    array = jnp.arange(1000.0)
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    return array


def _deleted(array: Any) -> Any:
    array.delete()
    return array


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_donated, "donated or deleted"),
        (lambda: _deleted(jnp.zeros((2, 3))), "donated or deleted"),
        (lambda: _deleted(jax.random.key(0)), "donated or deleted"),
        (lambda: jax.ShapeDtypeStruct((2,), np.float32), "has no bytes"),
    ],
)
def test_what_has_no_bytes_is_named(make: Any, text: str) -> None:
    with pytest.raises(UnsupportedState, match=text) as caught:
        save({"outer": [jnp.ones(2), {"inner": make()}]})
    assert caught.value.details["path"] == "outer/1/inner"
    assert "nothing was written" in str(caught.value)


def test_a_traced_value_is_named() -> None:
    def step(x: Any) -> Any:
        save({"model": {"w": x}})
        return x

    with pytest.raises(UnsupportedState, match="outside of") as caught:
        jax.jit(step)(jnp.zeros(2))
    assert caught.value.details["path"] == "model/w"


def test_a_donated_template_says_what_is_wanted() -> None:
    live = _donated()
    assert bits(restore(save([jnp.ones(1000)]), [live])[0]) == bits(jnp.ones(1000))


def test_shapes_and_types_that_differ_are_listed() -> None:
    saved = save({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "old": jnp.zeros(1)})
    live = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3, jnp.bfloat16), "new": jnp.zeros(1)}
    with pytest.raises(StateMismatch) as caught:
        plan(saved, live)
    assert vars(caught.value)["differing"] == (
        "w: float32[3, 2] here, float32[2, 3] in the checkpoint",
        "b: bfloat16[3] here, float32[3] in the checkpoint",
    )
    assert vars(caught.value)["missing"] == ("new",)


def test_a_sharding_that_does_not_fit_is_a_difference() -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    saved = save({"w": jnp.zeros(3)})
    with pytest.raises(StateMismatch, match="w: its sharding does not fit"):
        plan(saved, {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=halves)})


@pytest.mark.parametrize("number", [3, 2.5, True])
def test_a_number_and_an_array_of_one_are_the_same(number: Any) -> None:
    array = jnp.asarray(number)
    assert restore(save({"n": number}), {"n": jnp.zeros_like(array)})["n"] == array
    restored = restore(save({"n": array}), {"n": type(number)(0)})["n"]
    assert (restored, restored.dtype, restored.weak_type) == (array, array.dtype, array.weak_type)


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (3, jnp.zeros(1, int)),
        (2.5, jnp.zeros((), int)),
        (2**40, jnp.zeros((), int)),
        (True, jnp.zeros((), int)),
        (jnp.zeros((), int), 2.5),
        (jnp.zeros(1, int), 3),
        (np.zeros(1, int), 3),
    ],
)
def test_other_numbers_differ(saved: Any, live: Any) -> None:
    with pytest.raises(StateMismatch):
        plan(save({"n": saved}), {"n": live})
