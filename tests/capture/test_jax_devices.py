"""The public object with JAX's arrays on devices, end to end: a real agent, a fake driver.

Some of XLA's CPU devices count as devices of CUDA's. What the fake queues is done only when it is
waited for, so whatever XLA does to the memory after ``save()`` must have been waited for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, Mode

import mtckpt
from mtckpt.capture import driver as driver_module
from mtckpt.capture.addresses import OnDevice
from mtckpt.errors import CaptureStuck, StateMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt.capture.driver import Driver

jax = pytest.importorskip("jax")
jnp = jax.numpy

from mtckpt.adapters.jax import (  # noqa: E402 - after JAX is known to be there
    JaxAdapter,
    arriving,
    leaves,
)
from mtckpt.adapters.jax.arriving import Kind, empties  # noqa: E402 - likewise

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

Array = Any


class Devices:
    """XLA's CPU devices 1 and 2 as CUDA's 0 and 1, and the arrays that were made there."""

    def __init__(self, fake: FakeCuda) -> None:
        if len(jax.devices()) < 4:
            pytest.skip("JAX has started with fewer devices")
        self.fake = fake
        self.places = jax.devices()[1:3]
        self.made: list[Array] = []  # by a restore
        self.held: list[Array] = []

    def ordinal_of(self, device: Any) -> int:
        return self.places.index(device) if device in self.places else -1

    def put(self, value: Any, where: Any = 0) -> Array:
        place = self.places[where] if isinstance(where, int) else where
        return self.hold(jax.device_put(value, place))

    def hold(self, array: Array) -> Array:
        """Tell the fake of the memory of an array, and keep it."""
        numbers = jax.random.key_data(array) if leaves.is_key(array) else array
        for shard in numbers.addressable_shards:
            if shard.data.nbytes:
                address, ordinal = shard.data.unsafe_buffer_pointer(), self.ordinal_of(shard.device)
                self.fake.adopt(address, shard.data.nbytes, ordinal)
        self.held.append(array)
        return array


@pytest.fixture
def devices(fake_cuda: FakeCuda, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Devices:
    fake_cuda.mode(Mode.LAZY)
    found = Devices(fake_cuda)
    monkeypatch.setattr(driver_module.Driver, "_loaded", (os.getpid(), driver))
    monkeypatch.setattr(leaves, "ordinal_of", found.ordinal_of)

    def noted(kinds: Sequence[Kind]) -> list[Array]:
        arrays = [found.hold(array) for array in empties(kinds)]
        found.made += arrays
        return arrays

    monkeypatch.setattr(leaves, "empties", noted)
    return found


def open_run(tmp_path: Path, **ram: Any) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1, **ram), mtckpt.Disk(tmp_path / "disk", every=1)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def make_state(devices: Devices, seed: int = 0) -> dict[str, Any]:
    numbers = np.random.default_rng(seed)
    return {
        "w": devices.put(numbers.normal(size=(300, 1001)).astype(np.float32)),
        "b": devices.put(numbers.normal(size=77).astype(jnp.bfloat16)),
        "k": devices.put(numbers.integers(0, 9, (3, 5, 7)), 1),
        "host": jnp.arange(5) + seed,
        "none": devices.put(np.zeros((0, 3), np.float32)),
        "key": devices.put(jax.random.key(seed)),
        "n": seed,
    }


def plain(state: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Copies of the values, in host memory."""
    keys = [jax.random.key_data(state["key"])]
    return [np.array(leaf) for leaf in jax.tree.leaves({**state, "key": keys})]


def assert_same(state: dict[str, Any], wanted: list[np.ndarray[Any, Any]]) -> None:
    for one, other in zip(plain(state), wanted, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("capture", ["auto", "blocking"])
def test_donated_arrays_are_saved_as_they_were(
    tmp_path: Path, devices: Devices, capture: str
) -> None:
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    numbers = np.arange(2_000_000, dtype=np.float32).reshape(1000, 2000)
    # Memory of XLA's own: NumPy's could not be donated.
    params = jax.tree.map(jnp.copy, {"w": devices.put(numbers), "b": devices.put(numbers[0])})
    with open_run(tmp_path, capture=capture) as checkpointer:
        for i in range(1, 5):
            params = jax.tree.map(devices.hold, params)
            where = params["w"].unsafe_buffer_pointer()
            save = checkpointer.save(i, {"params": params})
            old, params = params, step(params)
            assert old["w"].is_deleted()
            assert params["w"].unsafe_buffer_pointer() == where  # in the same memory
            save.wait("staged", timeout_s=20)
        assert "cuLaunchKernel" in devices.fake.calls()
        restored = checkpointer.restore({"params": params})
        assert (restored.step, set(restored.sources)) == (4, {"ram"})
        np.testing.assert_array_equal(restored.state["params"]["w"], numbers + 3)
        np.testing.assert_array_equal(restored.state["params"]["b"], numbers[0] + 3)
    assert len(devices.made) == 2


def test_a_state_comes_back_to_the_memory_that_is_handed_out(
    tmp_path: Path, devices: Devices
) -> None:
    state = make_state(devices)
    wanted = plain(state)
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
        again = checkpointer.restore(make_state(devices, 1)).state
    assert_same(again, wanted)
    pointers = [array.unsafe_buffer_pointer() for array in devices.made]
    for name in ("w", "b", "k"):
        assert again[name].unsafe_buffer_pointer() in pointers
        assert again[name].devices() == state[name].devices()
        assert again[name].committed
    assert len(pointers) == 3
    template = jax.eval_shape(lambda: {**state, "n": 0})
    with open_run(tmp_path) as checkpointer:  # from disk: memory was freed
        restored = checkpointer.restore({**template, "n": 0})
        assert set(restored.sources) == {"disk"}
        assert_same(restored.state, wanted)
    assert len(devices.made) == 3  # the default device is none of CUDA's


def test_a_description_without_a_place_comes_to_the_default_device(
    tmp_path: Path, devices: Devices
) -> None:
    w = devices.put(np.arange(10_000.0))
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w}).wait("staged", timeout_s=20)
        with jax.default_device(devices.places[1]):
            template = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}
            found = checkpointer.restore(template).state["w"]
    assert found.devices() == {devices.places[1]}
    assert not found.committed
    np.testing.assert_array_equal(found, w)
    assert len(devices.made) == 1


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ()], ids=str)
def test_sharded_over_two_devices(tmp_path: Path, devices: Devices, spec: tuple[str, ...]) -> None:
    mesh = jax.sharding.Mesh(np.array(devices.places), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    numbers = np.arange(400_000.0, dtype=np.float32).reshape(200, 2000)
    w = devices.put(numbers, sharding)
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w}).wait("staged", timeout_s=20)
        assert "cuLaunchKernel" in devices.fake.calls()
        template = {"w": jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=sharding)}
        found = checkpointer.restore(template).state["w"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, numbers)
    made = {array.unsafe_buffer_pointer() for array in devices.made}
    shards = {shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards}
    assert len(made) == (2 if spec else 1)
    assert made <= shards


def test_what_is_converted_comes_through_the_host(tmp_path: Path, devices: Devices) -> None:
    w = devices.put(np.arange(1000, dtype=np.float32))
    weak = devices.put(2.5)
    old = devices.put(jax.random.PRNGKey(3))
    with open_run(tmp_path) as checkpointer:
        state = {"w": w, "weak": weak, "old": old}
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        key = devices.put(jax.random.key(0))
        template = {"w": mtckpt.adapters.jax.cast(w, jnp.bfloat16), "weak": weak, "old": key}
        found = checkpointer.restore(template).state
    np.testing.assert_array_equal(found["w"], np.arange(1000).astype(jnp.bfloat16))
    assert found["w"].dtype == jnp.bfloat16
    assert found["weak"].weak_type
    np.testing.assert_array_equal(jax.random.key_data(found["old"]), old)
    assert all(leaf.devices() == {devices.places[0]} for leaf in jax.tree.leaves(found))
    assert devices.made == []


def test_memory_of_the_host_is_no_memory_of_the_device(devices: Devices) -> None:
    there = jax.sharding.SingleDeviceSharding(devices.places[0])
    beside = there.with_memory_kind("pinned_host")
    arrays = [jax.device_put(np.arange(6.0), place) for place in (there, beside)]
    adapter = JaxAdapter()
    addresses, _ = adapter.addresses(arrays, ["a", "b"])
    assert [isinstance(address, OnDevice) for address in addresses] == [True, False]
    fresh = [adapter.new(adapter.spec(array, ""), array) for array in arrays]
    assert [address is None for _, address in fresh] == [True, False]
    assert isinstance(adapter.reserved([fresh[0][0]])[0], OnDevice)


def test_a_device_that_never_reads_is_told(
    tmp_path: Path, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtckpt.capture.underway.FINISH_S", 0.0)
    monkeypatch.setattr("mtckpt.capture.driver.Driver.event_done", lambda *_: False)
    with open_run(tmp_path) as checkpointer, pytest.raises(CaptureStuck):
        checkpointer.save(1, {"w": devices.put(np.arange(1000.0))})


# -- memory for what comes back ------------------------------------------------------------------


def test_one_program_makes_one_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a device's compiler tens of milliseconds: it is done for sets of arrays."""
    monkeypatch.setattr(arriving, "_BATCH", 30)
    arriving._program.cache_clear()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    of_size = [Kind((n, 3), np.dtype(np.float32), place) for n in range(1, 41)]
    elsewhere = Kind((5,), np.dtype(np.int8), None)
    kinds = [*of_size, *of_size[:2] * 6, elsewhere, *of_size[1:2]]
    arrays = empties(kinds)
    for kind, array in zip(kinds, arrays, strict=True):
        assert (array.shape, array.dtype) == (kind.shape, kind.dtype)
        if kind.sharding is not None:
            assert array.sharding == place
    assert not arrays[-2].committed
    addresses = {array.unsafe_buffer_pointer() for array in arrays}
    assert len(addresses) == len(arrays)
    # Once each, in two programs, as there are many; the first two six times more; one once more.
    assert arriving._program.cache_info().misses == 5
    empties(kinds)
    assert arriving._program.cache_info().misses == 5


def test_what_a_device_lays_out_otherwise_comes_through_the_host(
    tmp_path: Path, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.arange(6000.0).reshape(60, 100)
    w = devices.put(numbers)
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w}).wait("staged", timeout_s=20)
        monkeypatch.setattr(leaves, "_is_dense", lambda _: False)
        found = checkpointer.restore({"w": devices.put(numbers - 1)}).state["w"]
    np.testing.assert_array_equal(found, numbers)
    assert found.devices() == {devices.places[0]}


def test_nothing_is_reserved_for_a_template_that_differs(tmp_path: Path, devices: Devices) -> None:
    w, b = devices.put(np.arange(10.0)), devices.put(np.arange(5.0))
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w, "b": b}).wait("staged", timeout_s=20)
        with pytest.raises(StateMismatch):
            checkpointer.restore({"w": w, "b": devices.put(np.arange(6.0))})
        assert devices.made == []
