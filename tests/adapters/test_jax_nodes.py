"""Pytrees: nodes of every kind are named by JAX's rules, and made anew or filled in their place."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from state_harness import plan, restore, save

from mtckpt.errors import StateMismatch

jax = pytest.importorskip("jax")
jnp = jax.numpy


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "count"], meta_fields=["name"]
)
@dataclasses.dataclass
class Layer:
    """A dataclass with a static field."""

    w: Any
    count: Any
    name: str = "x"


@jax.tree_util.register_pytree_node_class
class Stack:
    """A node whose children have no names."""

    def __init__(self, *layers: Any, scale: float = 1.0) -> None:
        self.layers = layers
        self.scale = scale

    def tree_flatten(self) -> tuple[tuple[Any, ...], float]:
        return self.layers, self.scale

    @classmethod
    def tree_unflatten(cls, scale: float, layers: tuple[Any, ...]) -> Stack:
        return cls(*layers, scale=scale)


def arange(start: int) -> Any:
    return jnp.arange(float(start), start + 3)


def same(one: Any, other: Any) -> None:
    """Equal trees: definitions, types and bits of all leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(left) is type(right)
        if isinstance(left, jax.Array) and jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def jax_paths(tree: Any) -> list[str]:
    entries = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in entries
        if isinstance(leaf, jax.Array)
    ]


def test_registered_nodes_come_back_as_what_the_template_is() -> None:
    tree = {
        "layer": Layer(arange(1), 3),
        "stack": Stack(Layer(arange(4), 5), arange(7)),
        "partial": jax.tree_util.Partial(jnp.add, arange(9)),
        "ordered": OrderedDict(b=arange(2), a=None),
    }
    zeros = jax.tree.map(lambda leaf: leaf * 0, tree)
    saved = save(tree)
    assert sorted(saved.paths) == sorted(jax_paths(tree))
    same(restore(saved, zeros), tree)
    template = {
        "layer": Layer(arange(0), 0, name="another"),
        "stack": Stack(Layer(arange(0), 0), 0.0),
    }
    template["stack"] = Stack(Layer(arange(0), 0), arange(0), scale=2.0)
    restored = restore(saved, template)
    assert (restored["layer"].name, restored["stack"].scale) == ("another", 2.0)
    assert (restored["layer"].count, restored["stack"].layers[0].count) == (3, 5)


def test_a_node_that_differs_is_described() -> None:
    saved = save({"layer": Layer(arange(1), {"more": arange(2)})})
    with pytest.raises(StateMismatch) as caught:
        plan(saved, {"layer": Layer(None, Layer(arange(0), arange(0)))})
    assert vars(caught.value)["missing"] == ("layer/count/w", "layer/count/count")
    assert vars(caught.value)["unused"] == ("layer/count/more",)
    with pytest.raises(StateMismatch) as caught:
        plan(save({"layer": 3}), {"layer": Layer(arange(0), 0)})
    assert vars(caught.value)["differing"] == ("layer: Layer here, plain in the checkpoint",)
    layer = Layer(arange(0), 4)
    restored = restore(save({"layer": {"w": arange(5)}}), {"layer": layer}, partial=True)["layer"]
    same(restored, Layer(arange(5), 4))


def test_leaves_move_by_rename() -> None:
    saved = save({"old": Layer(arange(1), 3)})
    restored = restore(
        saved,
        {"new": Layer(arange(0), 0)},
        rename=lambda path: path.replace("old", "new"),
    )
    same(restored["new"], Layer(arange(1), 3))


def test_only_new_objects_have_to_be_read() -> None:
    placing, _ = plan(save([np.zeros(2), 1]), [np.zeros(2), 2])
    assert not placing.replaced
    placing, _ = plan(save([arange(0)]), [arange(1)])
    assert placing.replaced
    placing, _ = plan(save(Layer(1, 2)), Layer(3, 4))
    assert placing.replaced


# -- libraries -------------------------------------------------------------------------------------


def test_linen_and_optax() -> None:
    pytest.importorskip("flax")
    import flax.linen
    import optax
    from flax.training import train_state

    model = flax.linen.Dense(3)

    def make(seed: int) -> Any:
        params = model.init(jax.random.key(seed), jnp.ones((1, 2)))["params"]
        schedule = optax.cosine_decay_schedule(1e-2, 10)
        tx = optax.chain(optax.clip(1.0), optax.adamw(schedule))
        made: Any = train_state.TrainState.create  # flax leaves it untyped
        state = made(apply_fn=model.apply, params=flax.core.freeze(params), tx=tx)
        return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))

    one, other = make(1), make(2)
    saved = save({"train": one})
    assert sorted(saved.paths) == sorted(jax_paths({"train": one}))
    restored = restore(saved, {"train": other})["train"]
    assert (restored.tx, restored.step) == (other.tx, 1)
    same(jax.tree.leaves(restored), jax.tree.leaves(one))
    stepped = save({"train": jax.jit(lambda: one)()})  # the step is an array there
    abstract = jax.eval_shape(lambda: make(2))
    same(
        jax.tree.leaves(restore(stepped, {"train": abstract})),
        jax.tree.leaves(jax.jit(lambda: one)()),
    )
    assert restore(stepped, {"train": other})["train"].step == 1


def test_equinox_modules() -> None:
    equinox = pytest.importorskip("equinox")

    def made(seed: int) -> Any:
        return equinox.nn.MLP(2, 3, 4, 1, key=jax.random.key(seed))

    saved = save({"model": made(1)})
    assert "model/layers/0/weight" in saved.paths
    assert not any("activation" in path for path in saved.paths)
    other = made(2)
    restored = restore(saved, {"model": other})["model"]
    assert equinox.tree_equal(restored, made(1))
    assert not equinox.tree_equal(other, restored)
    arrays = equinox.filter(made(1), equinox.is_array)
    assert equinox.tree_equal(restore(save(arrays), arrays), arrays)


def _nnx(seed: int) -> tuple[Any, Any]:
    import optax
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.table = nnx.data({"seen": jnp.zeros(2) + seed})
            self.head = self.layers[0]

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = self.drop(layer(x))
            return self.head(self.norm(x)).sum()

    model = Model(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((2, 3))))(model))
    return model, optimizer


def test_nnx_objects_are_filled_where_they_are() -> None:
    pytest.importorskip("flax")
    from flax import nnx

    model, optimizer = _nnx(1)
    saved = save({"model": model, "optimizer": optimizer})
    assert "model/layers/1/kernel/value" in saved.paths
    assert "optimizer/opt_state/0/mu/norm/scale/value" in saved.paths
    assert not any("_pytree" in path for path in saved.paths)
    other, other_optimizer = _nnx(2)
    kernel = other.layers[0].kernel
    live = {"model": other, "optimizer": other_optimizer}
    placing, _ = plan(saved, live)
    assert not placing.replaced
    restored = restore(saved, live)
    assert (restored["model"], restored["optimizer"]) == (other, other_optimizer)
    assert other.layers[0].kernel is kernel is other.head.kernel
    same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))
    same(nnx.to_pure_dict(nnx.state(other_optimizer)), nnx.to_pure_dict(nnx.state(optimizer)))
    assert other(jnp.ones((2, 3))) == model(jnp.ones((2, 3)))


def test_nnx_states_have_to_be_read() -> None:
    pytest.importorskip("flax")
    from flax import nnx

    model, _ = _nnx(1)
    saved = save({"model": nnx.state(model)})
    other, _ = _nnx(2)
    placing, _ = plan(saved, {"model": nnx.state(other)})
    assert placing.replaced
    restored = restore(saved, {"model": nnx.state(other)})
    nnx.update(other, restored["model"])
    same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))
    pure = nnx.to_pure_dict(nnx.state(model))
    same(restore(save(pure), jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: pure))), pure)
