"""What Orbax's manager tells of a step without reading it, and leaves that are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import mtckpt
from mtckpt.errors import StateMismatch, StepExists, UsageError

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
jnp = jax.numpy

from orbax_both import Both, told  # noqa: E402

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
    pytest.mark.filterwarnings("ignore::Warning:jax"),
]


class Moments(NamedTuple):
    mu: Any
    nu: Any


def tree() -> dict[str, Any]:
    return {
        "w": jnp.arange(6.0).reshape(3, 2),
        "n": np.arange(3),
        "numbers": {"i": 3, "f": 2.5, "b": True},
        "list": [jnp.zeros(1, jnp.bfloat16), {"x": jnp.ones(2)}],
        "tuple": (jnp.ones(2), jnp.ones(3, jnp.float8_e4m3fn)),
        "moments": Moments(jnp.ones(1), jnp.ones((2, 2))),
        "none": None,
        "empty": {},
        "scalar": jnp.asarray(7),
    }


def described(metadata: Any) -> Any:
    """What it says of each leaf."""

    def one(leaf: Any) -> str:
        facts = [getattr(leaf, name, None) for name in ("shape", "dtype", "sharding")]
        return f"{type(leaf).__name__} {leaf.name} {facts}"

    return jax.tree.map(one, metadata.tree)


def test_the_tree_of_a_step_is_told_without_reading_it(both: Both) -> None:
    def script(manager: Any) -> Any:
        manager.save(1, args=ocp.args.StandardSave(tree()))
        save = ocp.args.PyTreeSave(tree(), custom_metadata={"of": "item", "list": [1, None]})
        manager.save(2, args=save, custom_metadata={"of": "step"})
        manager.wait_until_finished()
        first, second = manager.item_metadata(1), manager.metadata(2)
        return {
            "trees": [described(each) for each in (first, second.item_metadata)],
            "custom": [str(first.custom_metadata), dict(second.item_metadata.custom_metadata)],
            "step": dict(second.custom_metadata),
            "one": [first["w"].shape, str(first["w"].dtype), "none" in first],
            "again": manager.restore(1, args=ocp.args.PyTreeRestore(first.tree)),
        }

    both.same(script)


def test_every_item_of_a_step_is_told(both: Both) -> None:
    def script(manager: Any) -> Any:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(tree()),
            layer_1=ocp.args.PyTreeSave({"m": jnp.ones(3)}, custom_metadata={"a": 1}),
            meta=ocp.args.JsonSave({"step": 3}),
        )
        manager.save(3, args=items)
        manager.wait_until_finished()
        found = manager.item_metadata(3)
        return {
            "params": described(found.params),
            "moments": described(found.layer_1),
            "custom": dict(found.layer_1.custom_metadata),
            "meta": str(found.meta),
            "names": sorted(found),
        }

    both.same(script)


def test_a_new_manager_restores_and_tells(both: Both) -> None:
    def script(manager: Any) -> Any:
        manager.save(1, args=ocp.args.StandardSave(tree()))
        manager.wait_until_finished()
        with both.open(manager.directory.name) as new:
            # Sequences are lists to Orbax then; mtckpt knows tuples.
            found = [jax.tree.leaves(new.restore(step)) for step in (1, None)]
            return found, described(new.item_metadata(1)), list(new.all_steps())

    both.same(script)
    with both.open("mtckpt") as new:  # and this one did not even restore
        assert new.item_metadata(1)["w"].shape == (3, 2)
        keys = new.item_metadata(1).tree.keys()
    assert keys == tree().keys()


def test_boxes_and_keys_are_told_as_what_they_are_parts_of(both: Both) -> None:
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=devices)
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    keys = jax.random.split(jax.random.key(0), (8, 2))
    with both.open("mtckpt") as manager:
        state = {
            "w": jax.device_put(jnp.ones((8, 4)), over),
            "keys": jax.device_put(keys, over),
            "text": "x",
        }
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        found = manager.item_metadata(1)
        again = manager.restore(1, args=ocp.args.StandardRestore(found))
    assert again["w"].sharding == over == again["keys"].sharding
    assert again["keys"].dtype == keys.dtype
    assert (found["w"].shape, found["w"].dtype) == ((8, 4), np.float32)
    assert (found["keys"].shape, found["keys"].dtype) == ((8, 2), keys.dtype)
    assert isinstance(found["text"], ocp.metadata.StringMetadata)


def test_leaves_with_a_placeholder_are_not_read(both: Both) -> None:
    template = {**tree(), "w": ocp.PLACEHOLDER, "tuple": (ocp.PLACEHOLDER, tree()["tuple"][1])}
    arguments = ocp.checkpoint_utils.construct_restore_args(tree())
    less = {name: leaf for name, leaf in template.items() if name != "n"}

    def script(manager: Any) -> Any:
        manager.save(1, args=ocp.args.PyTreeSave(tree()))
        manager.wait_until_finished()
        for odd in (less, {**template, "list": ocp.PLACEHOLDER}):
            with pytest.raises((ValueError, StateMismatch)):
                manager.restore(1, args=ocp.args.PyTreeRestore(odd))
        return [
            manager.restore(1, args=ocp.args.PyTreeRestore(template)),
            manager.restore(1, args=ocp.args.PyTreeRestore(template, restore_args=arguments)),
        ]

    found = both.same(script)
    assert found[0]["w"] is ... is found[1]["tuple"][0]


def test_metadata_that_is_no_json_or_too_long_is_refused(both: Both) -> None:
    with both.open("mtckpt") as manager:
        for custom, text in (({"x": object()}, "no JSON"), ({"x": "y" * 60_000}, "60,009 bytes")):
            with pytest.raises(UsageError, match=text):
                manager.save(1, args=ocp.args.PyTreeSave(tree(), custom_metadata=custom))
        manager.save(2, args=ocp.args.PyTreeSave(tree(), custom_metadata={"x": "y" * 40_000}))
        manager.wait_until_finished()
        assert len(manager.item_metadata(2).custom_metadata["x"]) == 40_000


def test_a_directory_says_which_step_it_is(tmp_path: Path, tiers: mtckpt.Checkpointer) -> None:
    """A checkpointer of Orbax's has no manager, and so no directory for each item."""
    from mtckpt.adapters.jax.orbax import Handler

    with ocp.Checkpointer(Handler(tiers)) as checkpointer:
        for step, name in enumerate(["run_7/1", "2", "step_3", "v1.2_4", "run_7/0005"], 1):
            directory = tmp_path / "orbax" / name
            directory.parent.mkdir(parents=True, exist_ok=True)
            checkpointer.save(directory, args=ocp.args.PyTreeSave({"w": jnp.full(3, step)}))
            found = checkpointer.restore(directory, args=ocp.args.PyTreeRestore({"w": None}))
            assert found["w"].tolist() == [step] * 3
    assert [each.step for each in tiers.steps()] == [1, 2, 3, 4, 5]


def test_checkpointers_without_a_manager(tmp_path: Path, tiers: mtckpt.Checkpointer) -> None:
    """What the test base that Orbax ships asks of a checkpointer, on both handlers."""
    from mtckpt.adapters.jax.orbax import Handler

    def script(handler: Any, directory: Path) -> Any:
        state = {"w": jnp.arange(6.0).reshape(3, 2), "m": Moments(jnp.ones(1), jnp.ones(2))}
        zeros = jax.tree.map(jnp.zeros_like, state)
        arguments = ocp.checkpoint_utils.construct_restore_args(zeros)
        directory.mkdir()
        with ocp.Checkpointer(handler()) as one:
            one.save(directory / "1", state)  # as it was before there were arguments
            found = [
                one.restore(directory / "1", item=zeros),
                one.restore(directory / "1", item=zeros, restore_args=arguments),
                one.restore(directory / "1"),
            ]
            with pytest.raises(FileNotFoundError):
                one.restore(directory / "9")
            with pytest.raises(ValueError, match="already exists"):
                one.save(directory / "1", zeros)
            save = ocp.args.PyTreeSave(state, custom_metadata={"b": 2})
            one.save(directory / "2", args=save, custom_metadata={"a": 1})
            metadata = one.metadata(directory / "2")
            found += [dict(metadata.custom_metadata), described(metadata.item_metadata)]
        with ocp.AsyncCheckpointer(handler()) as other:
            other.save(directory / "3", args=ocp.args.PyTreeSave(state))
            other.wait_until_finished()
            found.append(other.restore(directory / "3", args=ocp.args.PyTreeRestore(zeros)))
        return found

    plain = script(ocp.PyTreeCheckpointHandler, tmp_path / "orbax")
    assert told(script(lambda: Handler(tiers), tmp_path / "mtckpt")) == told(plain)
    with ocp.Checkpointer(Handler(tiers)) as checkpointer:
        checkpointer.save(tmp_path / "7", {"w": jnp.ones(1)})
        with pytest.raises(StepExists):
            checkpointer.save(tmp_path / "7", {"w": jnp.ones(1)}, force=True)
