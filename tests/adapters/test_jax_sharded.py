"""Arrays over several devices: stored box by box, restored onto any other mesh or sharding."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_worker import JaxState

import mtckpt
from mtckpt.errors import StateMismatch, UnsupportedState

jax = pytest.importorskip("jax")
jnp = jax.numpy

P = jax.sharding.PartitionSpec

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    if len(jax.devices()) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")


def on(axes: dict[str, int], *spec: Any) -> Any:
    """A sharding over a mesh of the first devices."""
    size = int(np.prod(list(axes.values())))
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:size])
    return jax.sharding.NamedSharding(mesh, P(*spec))


def placements() -> dict[str, Any]:
    """Shardings of an array of shape (16, 8, 4)."""
    cube = {"x": 2, "y": 2, "z": 2}
    return {
        "one": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "replicated": on({"x": 8}),
        "rows": on({"x": 8}, "x"),
        "some": on({"x": 4, "y": 2}, None, "y"),
        "columns": on({"x": 2, "y": 4}, None, "y"),
        "both": on({"x": 2, "y": 4}, "y", "x"),
        "joined": on({"x": 2, "y": 4}, ("x", "y")),
        "cube": on(cube, "z", "x", "y"),
        "part": on(cube, None, None, "y"),
        "fewer": on({"x": 2}, "x"),
    }


def make_whole(seed: int, dtype: Any) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(16, 8, 4)).astype(dtype)


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def open_run(tmp_path: Path) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def test_any_sharding_comes_back_as_any_other(tmp_path: Path) -> None:
    wholes = {
        name: make_whole(i, [jnp.float32, jnp.bfloat16][i % 2])
        for i, name in enumerate(placements())
    }
    state = {name: jax.device_put(wholes[name], to) for name, to in placements().items()}
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
        names = list(placements())
        for shift in (0, 1, 4, 7):
            targets = dict(zip(names, [*names[shift:], *names[:shift]], strict=True))
            template = {
                name: jax.ShapeDtypeStruct(
                    wholes[name].shape, wholes[name].dtype, sharding=placements()[target]
                )
                for name, target in targets.items()
            }
            restored = checkpointer.restore(template).state
            for name, target in targets.items():
                assert restored[name].sharding == placements()[target]
                assert bits(restored[name]) == wholes[name].tobytes()
                for shard in restored[name].addressable_shards:
                    assert bits(shard.data) == wholes[name][shard.index].tobytes()
        template = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(template).state
        assert {n: a.sharding for n, a in restored.items()} == {
            n: a.sharding for n, a in template.items()
        }
        assert all(bits(array) == wholes[name].tobytes() for name, array in restored.items())
        host: dict[str, Any] = {name: np.zeros_like(whole) for name, whole in wholes.items()}
        host["rows"] = torch.zeros((16, 8, 4))
        restored = checkpointer.restore(host).state
        assert all(bits(array) == wholes[name].tobytes() for name, array in restored.items())
        open_places = checkpointer.restore(dict.fromkeys(wholes)).state
        assert all(bits(array) == wholes[name].tobytes() for name, array in open_places.items())
    with mtckpt.load(tmp_path / "disk") as checkpoint:
        for name, whole in wholes.items():
            assert bits(checkpoint[name]) == whole.tobytes()
            assert checkpoint.shape(name) == (16, 8, 4)
            assert checkpoint.ranks(name) == (0,)


def test_each_box_is_stored_once_and_named_by_its_offsets(tmp_path: Path) -> None:
    array = jax.device_put(np.arange(32, dtype=np.float32).reshape(8, 4), on({"x": 4, "y": 2}, "y"))
    tied = {"a": array, "b": array}
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, tied).wait("local", timeout_s=20)
        save_dir = next((tmp_path / "disk" / "r").glob("**/*.safetensors"))
        restored = checkpointer.restore(jax.tree.map(jnp.zeros_like, tied)).state
        assert bits(restored["b"]) == bits(array)
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(save_dir)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "a@0,0": (4, 4),
        "a@4,0": (4, 4),
    }
    assert tensors["a@4,0"].tobytes() == np.asarray(array)[4:].tobytes()


def test_keys_are_sharded_too(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(3), 8)
    there = on({"x": 8}, "x")
    state = {"keys": jax.device_put(keys, there), "same": jax.device_put(keys, on({"x": 8}))}
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        halves = on({"x": 2, "y": 4}, "x")
        template = {
            "keys": jax.ShapeDtypeStruct((8,), keys.dtype, sharding=halves),
            "same": jax.device_put(jax.random.split(jax.random.key(0), 8), there),
        }
        restored = checkpointer.restore(template).state
        assert [array.sharding for array in restored.values()] == [halves, there]
        for array in restored.values():
            assert bits(jax.random.key_data(array)) == bits(jax.random.key_data(keys))


def test_the_sharding_may_change_between_saves(tmp_path: Path) -> None:
    whole = make_whole(0, np.float32)
    with open_run(tmp_path) as checkpointer:
        for step, placement in enumerate(placements().values()):
            array = jax.device_put(whole + step, placement)
            checkpointer.save(step, {"w": array}, tiers="all").wait("staged", timeout_s=20)
            restored = checkpointer.restore({"w": np.zeros_like(whole)}, step=step).state
            assert bits(restored["w"]) == bits(whole + step)


def test_shards_that_are_gone_are_named_and_the_next_save_works(tmp_path: Path) -> None:
    array = jax.device_put(np.zeros((8, 2), np.float32), on({"x": 8}, "x"))
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": array}).wait("staged", timeout_s=20)
        deleted = array + 1
        deleted.delete()
        with pytest.raises(UnsupportedState, match="donated or deleted") as caught:
            checkpointer.save(2, {"w": deleted})
        assert caught.value.details["path"] == "w"
        with pytest.raises(StateMismatch, match=r"float32\[4, 2\] here, float32\[8, 2\] in the"):
            checkpointer.restore({"w": jnp.zeros((4, 2))})
        checkpointer.save(3, {"w": array}).wait("staged", timeout_s=20)


def test_all_that_is_wrong_with_a_template_is_said_at_once(tmp_path: Path) -> None:
    rows = on({"x": 8}, "x")
    names = ("fits", "shape", "dtype", "extra", "odd", "both", "abstract")
    state = {"all": {name: jax.device_put(np.ones((8, 2), np.float32), rows) for name in names}}
    right = dict.fromkeys(names, jax.ShapeDtypeStruct((8, 2), np.float32, sharding=rows))
    nowhere = jax.sharding.NamedSharding(
        jax.sharding.AbstractMesh((8,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    wrong = {
        "shape": jax.ShapeDtypeStruct((16, 2), np.float32, sharding=rows),
        "dtype": jax.ShapeDtypeStruct((8, 2), np.int32, sharding=rows),
        "odd": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=on({"x": 8}, None, "x")),
        "both": jax.ShapeDtypeStruct((9, 2), np.float32, sharding=rows),
        "abstract": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=nowhere),
        "more": jnp.zeros(2),
    }
    host = np.zeros((8, 2), np.float32)
    live = {"all": {**right, **wrong, "fits": host}}
    del live["all"]["extra"]
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        with pytest.raises(StateMismatch) as caught:
            checkpointer.restore(live)
        found = vars(caught.value)
        assert (found["missing"], found["unused"]) == (("all/more",), ("all/extra",))
        said = dict(line.split(": ", 1) for line in found["differing"])
        assert said.keys() == {f"all/{name}" for name in wrong if name != "more"}
        assert said["all/shape"] == "float32[16, 2] here, float32[8, 2] in the checkpoint"
        assert said["all/dtype"] == "int32[8, 2] here, float32[8, 2] in the checkpoint"
        assert said["all/abstract"].startswith("its sharding names no devices")
        for name in ("odd", "both"):
            assert "its sharding does not fit: " in said[f"all/{name}"]
            assert said[f"all/{name}"] in str(caught.value)
        assert said["all/both"].startswith("float32[9, 2] here, float32[8, 2] in the")
        assert not host.any()
        assert checkpointer.restore({"all": {**right, "fits": host}})
        assert host.all()


def test_a_mesh_without_devices_is_the_one_that_is_set(tmp_path: Path) -> None:
    """As ``jax.eval_shape`` tells shardings, and what Flax makes of it."""
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=explicit)

    def make() -> dict[str, Any]:
        zeros = jnp.zeros((8, 4), out_sharding=P("x", "y"))
        return {"w": zeros + 2, "b": jnp.ones(4)}

    with open_run(tmp_path) as checkpointer:
        with jax.set_mesh(mesh):
            state, template = jax.jit(make)(), jax.eval_shape(make)
            checkpointer.save(1, state).wait("staged", timeout_s=20)
            found = checkpointer.restore(dict(template)).state
        for name, array in state.items():
            assert found[name].sharding.is_equivalent_to(array.sharding, array.ndim)
            assert bool((found[name] == array).all())
        for other in (None, jax.make_mesh((8, 1), ("x", "y"), axis_types=explicit)):
            with (
                pytest.raises(StateMismatch, match=r"within jax.set_mesh"),
                jax.set_mesh(other) if other else contextlib.nullcontext(),
            ):
                checkpointer.restore(template)


def test_addends_of_values_are_not_saved_as_values(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    partial = jax.sharding.NamedSharding(mesh, P(unreduced={"x"}))
    addends = jax.make_array_from_single_device_arrays(
        (3,), partial, [jax.device_put(np.full(3, i, np.float32), jax.devices()[i]) for i in (0, 1)]
    )
    with open_run(tmp_path) as checkpointer:
        with pytest.raises(UnsupportedState, match="unreduced") as caught:
            checkpointer.save(1, {"w": addends})
        assert caught.value.details["path"] == "w"
        checkpointer.save(2, {"w": jnp.ones(3)}).wait("staged", timeout_s=20)
        wanted = jax.ShapeDtypeStruct((3,), np.float32, sharding=partial)
        with pytest.raises(StateMismatch, match="w: its sharding is unreduced"):
            checkpointer.restore({"w": wanted})


def test_the_tree_of_a_killed_worker_is_whole() -> None:
    """The check that the kill tests rely on can fail."""
    with jax.enable_x64(True):
        state = JaxState()
        state.fill(3, 8)
        whole = dict(state.tree)
        assert not state.what_differs(8)
        assert state.what_differs(9)
        params = whole["params"]
        for name in ("kernel", "half", "scalar"):
            state.tree = {**whole, "params": {**params, name: params[name] + 1}}
            assert name in state.what_differs(8)
        elsewhere = jax.device_put(params["kernel"], jax.devices()[0])
        state.tree = {**whole, "params": {**params, "kernel": elsewhere}}
        assert "kernel" in state.what_differs(8)
        state.tree = {**whole, "key": jax.random.key(1)}
        assert "key" in state.what_differs(8)
