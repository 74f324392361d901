"""What a call leaves open: the step of a directory, and what arrays are and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt.errors import UsageError

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
epath = pytest.importorskip("etils.epath")
jnp = jax.numpy

from orbax_both import told  # noqa: E402

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
    pytest.mark.filterwarnings("ignore::Warning:jax"),
]


def test_a_directory_of_any_name_is_the_next_step(
    tmp_path: Path, tiers: mtckpt.Checkpointer
) -> None:
    from mtckpt.adapters.jax.orbax import Handler

    def save(checkpointer: Any, name: str, fill: float, **more: Any) -> None:
        arguments = ocp.args.StandardSave({"w": jnp.full(3, fill)})
        checkpointer.save(tmp_path / "orbax" / name, args=arguments, **more)

    names = ["params", "7", "run_7/state", "v1.2"]
    with ocp.Checkpointer(Handler(tiers)) as checkpointer:
        (tmp_path / "orbax/run_7").mkdir(parents=True)
        for fill, name in enumerate(names):
            save(checkpointer, name, fill)
        save(checkpointer, "params", 9, force=True)
    assert [each.step for each in tiers.steps()] == [1, 7, 8, 9, 10]
    with ocp.Checkpointer(Handler(tiers)) as checkpointer:
        for fill, name in zip((9, 1, 2, 3), names, strict=True):
            found = checkpointer.restore(tmp_path / "orbax" / name)
            assert found["w"].tolist() == [fill] * 3
        save(checkpointer, "last", 4)
        items = ocp.args.Composite(
            a=ocp.args.StandardSave({"x": jnp.ones(1)}), b=ocp.args.StandardSave({"y": 2})
        )
    assert [each.step for each in tiers.steps()][-1] == 11
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.StandardSave, Handler(tiers))
    composite = ocp.CompositeCheckpointHandler(handler_registry=registry)
    with ocp.Checkpointer(composite) as checkpointer:
        checkpointer.save(tmp_path / "orbax/both", args=items)
    assert [each.step for each in tiers.steps()][-1] == 12


def test_what_the_arguments_leave_open_is_as_it_was_saved(
    tmp_path: Path, tiers: mtckpt.Checkpointer
) -> None:
    from mtckpt.adapters.jax.orbax import Handler

    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=devices)
    P = jax.sharding.PartitionSpec
    rows = jax.sharding.NamedSharding(mesh, P("x"))
    everywhere = jax.sharding.NamedSharding(mesh, P())
    state = {
        "w": jax.device_put(jnp.arange(16.0).reshape(8, 2), rows),
        "key": jax.device_put(jax.random.key(3), everywhere),
        "host": np.arange(3),
        "list": [5, jax.device_put(jnp.ones(4), rows)],
    }
    described = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    unplaced = jax.tree.map(
        lambda leaf: (
            leaf if isinstance(leaf, int) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        ),
        state,
    )
    zeros = jax.tree.map(lambda _: 0, state)
    columns = ocp.ArrayRestoreArgs(mesh=mesh, mesh_axes=P(None, "y"))
    same = ocp.RestoreArgs()
    arguments = {"w": columns, "key": same, "host": same, "list": [same, same]}
    numbers = {**arguments, "list": [ocp.RestoreArgs(restore_type=float), same]}
    partial = {"w": 0, "more": 0}
    tree = ocp.args.PyTreeRestore
    asked = [
        ocp.args.StandardRestore(described),
        ocp.args.StandardRestore(unplaced),
        tree(),
        tree(zeros),
        tree(restore_args=arguments),
        tree(zeros, restore_args=numbers),
        tree(partial, restore_args={**arguments, "more": same}, partial_restore=True),
    ]

    def script(standard: Any, pytree: Any, name: str) -> Any:
        directory = epath.Path(tmp_path) / name
        directory.mkdir()
        standard.save(directory, args=ocp.args.StandardSave(state))
        standard.finalize(directory)
        found = [
            (standard if isinstance(each, ocp.args.StandardRestore) else pytree).restore(
                directory, args=each
            )
            for each in asked
        ]
        arrays = [each for each in jax.tree.leaves(found) if isinstance(each, jax.Array)]
        return found, [each.sharding.devices_indices_map(each.shape) for each in arrays]

    handler = Handler(tiers)
    ours, where = script(handler, handler, "mtckpt")
    theirs, there = script(ocp.StandardCheckpointHandler(), ocp.PyTreeCheckpointHandler(), "orbax")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert told(one) == told(other), number
    assert where == there
    with pytest.raises(UsageError, match="look at 'more'"):
        handler.restore(tmp_path / "mtckpt", args=tree({"more": jnp.ones(1)}, restore_args={}))
