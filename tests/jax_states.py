"""States of JAX programs of many kinds, made by a seed: one process saves them, another restores.

    python tests/jax_states.py save|restore DIRECTORY

What holds is asserted here; the test looks at the exit status. The process that restores makes its
templates by another seed, and by the first one what has to come back.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Most of the time goes to compiling.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import equinox
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import linen, nnx
from flax.training import dynamic_scale, train_state

import mtckpt

SAVED, OTHER = 2, 1
P: Any = jax.sharding.PartitionSpec
Described: Any = jax.ShapeDtypeStruct
STATES: dict[str, Callable[[int], Any]] = {}


def state(make: Callable[[int], Any]) -> Callable[[int], Any]:
    STATES[make.__name__] = make
    return make


def floats(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# -- optimizers ------------------------------------------------------------------------------------


def _label(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "other", params)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


SCHEDULE = optax.cosine_decay_schedule(1e-2, 10)
OPTIMIZERS: dict[str, Any] = {
    **{
        name: getattr(optax, name)(learning_rate=SCHEDULE)
        for name in (
            *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adan", "amsgrad"),
            *("fromage", "lamb", "lars", "lion", "nadamw", "novograd", "radam"),
            *("rmsprop", "sgd", "sign_sgd", "yogi"),
        )
    },
    **{
        name: getattr(optax.contrib, name)(learning_rate=1e-2)
        for name in (
            *("acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "madgrad", "momo", "muon"),
            *("prodigy", "schedule_free_adamw"),
        )
    },
    "rprop": optax.rprop(1e-2),
    "lbfgs": optax.lbfgs(memory_size=2, linesearch=None),
    "sam": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "momentum of another type": optax.sgd(0.1, 0.9, accumulator_dtype=jnp.bfloat16),
    "partition": optax.partition(
        {"matrix": optax.adam(1e-2), "other": optax.set_to_zero()}, _label
    ),
    "masked": optax.masked(optax.adam(1e-2), _is_matrix),
    "steps": optax.MultiSteps(optax.adamw(SCHEDULE), 3).gradient_transformation(),
    "finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1),
    "named": optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(1e-2))),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.ema(0.9)),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "conditional": optax.conditionally_mask(optax.adam(1e-2), lambda step: step > 2),
}


@state
def optimizers(seed: int) -> Any:
    params = {
        "a": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)},
        "s": jnp.asarray(1.5),
        "l": [jnp.ones(2)],
    }
    made = {name: optimizer.init(params) for name, optimizer in OPTIMIZERS.items()}
    return jax.tree.map(functools.partial(_stepped, seed - OTHER), made)


def _stepped(by: int, leaf: Any) -> Any:
    """Another value of the same kind; a step of every optimizer would take long to compile."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, by)
    return leaf ^ bool(by) if leaf.dtype == bool else leaf + by


# -- libraries -------------------------------------------------------------------------------------


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        spread = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
        return linen.Dense(4, kernel_init=spread)(linen.BatchNorm(use_running_average=False)(x))


class Train(train_state.TrainState):  # type: ignore[no-untyped-call]  # Flax leaves it so
    batch_stats: Any
    key: jax.Array
    scale: Any


ADAMW = optax.adamw(1e-3)


@state
def linen_train_state(seed: int) -> Any:
    variables = Net().init(jax.random.key(seed), jnp.ones((2, 3)))
    make: Any = Train.create
    return make(
        apply_fn=None,
        params=flax.core.freeze(variables["params"]),
        tx=ADAMW,
        batch_stats=variables["batch_stats"],
        key=jax.random.key(seed),
        scale=dynamic_scale.DynamicScale(),
    ).replace(step=seed)


class Block(nnx.Module):
    """Parameters, statistics, a cache, streams of keys, a tied layer, a container of each kind."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(1, 3, decode=True, rngs=rngs)
        self.attention.init_cache((1, 4, 3))
        self.lora = nnx.LoRA(3, 2, 3, rngs=rngs)
        self.count = nnx.Variable(jnp.asarray(seed))
        self.layers = nnx.List([self.linear, nnx.Embed(5, 3, rngs=rngs)])
        self.table = nnx.Dict(a=nnx.Param(floats(seed, 2)), b=nnx.List([nnx.Param(floats(seed))]))
        self.name, self.none, self.function = "x", None, jax.nn.relu


@state
def nnx_model_and_optimizer(seed: int) -> Any:
    model = Block(seed)
    optimizer = nnx.Optimizer(model.linear, ADAMW, wrt=nnx.Param)
    loss = nnx.grad(lambda layer: layer(jnp.ones((2, 3))).sum())
    for _ in range(seed):
        optimizer.update(model.linear, loss(model.linear))
    meter: Any = nnx.MultiMetric
    metric = meter(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
    metric.update(loss=floats(seed, 3), logits=jnp.ones((2, 3)), labels=jnp.zeros(2, int))
    make_all: Any = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs)))
    return {
        "model": model,
        "average": nnx.clone(model),
        "optimizer": optimizer,
        "metric": metric,
        "streams": nnx.Rngs(seed, params=seed + 1),
        "many": make_all(nnx.Rngs(seed)),
    }


@state
def nnx_states(seed: int) -> Any:
    parts: Any = nnx.split(Block(seed), nnx.Param, nnx.BatchStat, ...)
    return {"all": nnx.state(Block(seed)), "divided": parts[1:]}


class Mixed(equinox.Module):
    w: jax.Array
    function: Any
    count: int
    inner: Any
    none: Any = None
    name: str = equinox.field(static=True, default="x")


@state
def equinox_modules(seed: int) -> Any:
    key = jax.random.key(seed)
    inner = [equinox.nn.Linear(2, 2, key=key), equinox.nn.Dropout(0.5), None, equinox.nn.PReLU()]
    norm, statistics = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, "batch", mode="ema")
    over: Any = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, statistics = over(floats(seed, 2, 3), statistics)
    cell = equinox.nn.LSTMCell(2, 2, key=key)
    return {
        "mixed": Mixed(floats(seed, 3), jax.nn.relu, seed, inner),
        "norm": norm,
        "statistics": statistics,
        "moments": ADAMW.init(equinox.filter(cell, equinox.is_array)),
    }


# -- trees and arrays ------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "n"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    """A dataclass with a static field."""

    w: Any
    n: Any
    name: str = "x"


@state
def trees(seed: int) -> Any:
    w = floats(seed, 2)
    partial: Any = jax.tree_util.Partial
    return {
        "registered": Layer(w, Layer(None, {"empty": jnp.zeros(0), "nothing": []})),
        "ordered": OrderedDict(b=w, a=None),
        "default": defaultdict(list, {"x": [w]}),
        "partial": partial(jnp.add, w),
        "frozen": flax.core.freeze({"a": w, "empty": {}}),
        "only frozen": [flax.core.freeze({}), (flax.core.freeze({}),)],
        "no state": (optax.EmptyState(), {"n": optax.EmptyState()}),
        "numbers": {1: w, 2: None, 3: (seed, 1.5 * seed, seed > OTHER, str(seed))},
        "numpy": {"a": np.arange(3) * seed, "b": np.float32(seed), "c": np.zeros((0, 2))},
    }


NARROW = "int4 uint4 int2 uint2 float4_e2m1fn float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e3m4"


@state
def types(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    names = [*NARROW.split(), "bfloat16", "float16", "bool", "int8", "complex64"]
    shapes: list[tuple[int, ...]] = [(), (1,), (3,), (5, 7), (0, 2)]
    return {
        "weak": [
            jnp.asarray(1.0 * seed),
            jnp.asarray(seed),
            jax.lax.full_like(2.5, seed, shape=(3,)),
        ],
        **{name: [jnp.asarray(rng.integers(0, 2, s), name) for s in shapes] for name in names},
    }


@state
def keys(seed: int) -> Any:
    def of(impl: str) -> Any:
        key = jax.random.key(seed, impl=impl)
        return key, jax.random.split(key, (2, 3)), jax.random.split(key, 0)

    kinds = ("threefry2x32", "rbg", "unsafe_rbg")
    return {**{impl: of(impl) for impl in kinds}, "old": jax.random.PRNGKey(seed)}


@state
def meshes(seed: int) -> Any:
    devices = np.array(jax.devices())
    cube = jax.sharding.Mesh(devices.reshape(2, 2, 2), ("a", "b", "c"))
    flat = jax.sharding.Mesh(devices.reshape(4, 2), ("a", "b"))
    some = jax.sharding.Mesh(devices[3:5], ("a",))
    explicit = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def put(array: Any, mesh: Any, *axes: Any, kind: str | None = None) -> Any:
        sharding: Any = jax.sharding.NamedSharding(mesh, P(*axes), memory_kind=kind)
        return jax.device_put(array, sharding)

    w, box = floats(seed, 8, 8), floats(seed, 2, 4, 6)
    many = jax.random.split(jax.random.key(seed, impl="rbg"), (8, 2))
    return {
        "cube": [
            put(w, cube, ("a", "b"), "c"),
            put(w, cube, "b"),
            put(w, cube, None, ("c", "a")),
            put(w, cube),
            put(box, cube, "a", "b", "c"),
            put(box, cube, "c", "b", "a"),
            put(jnp.asarray(seed), cube),
        ],
        "some": [put(w, some, None, "a"), jax.device_put(w, jax.devices()[3])],
        "empty": [put(jnp.zeros((0, 8)), flat, None, "b"), put(jnp.zeros((8, 0)), flat, "a")],
        "narrow": [put(w.astype(jnp.int4), flat, "a", "b"), put(w.astype(jnp.int4), flat)],
        "other": [
            put(w.astype(jnp.float8_e4m3fn), flat, "b"),
            put(w > 0, flat, "a"),
            put(jax.lax.full_like(2.5, seed, shape=(8,)), flat, "b"),
            put(w, flat, "a", kind="unpinned_host"),
            put(w, explicit, "a", "b"),
        ],
        "keys": [put(many, flat, "a", "b"), put(many, flat, "b"), put(jax.random.key(seed), flat)],
    }


# -- the two processes -----------------------------------------------------------------------------


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def told(leaf: Any) -> Any:
    """All that there is to say about a leaf."""
    if not isinstance(leaf, jax.Array):
        return type(leaf), np.asarray(leaf).dtype, repr(leaf)
    data = leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(leaf)
    about = leaf.dtype, leaf.shape, getattr(leaf, "weak_type", None), leaf.committed
    return *about, leaf.sharding, leaf.sharding.memory_kind, np.asarray(data).tobytes()


def check(name: str, found: Any, wanted: Any) -> None:
    definitions: list[Any] = [jax.tree.structure(found), jax.tree.structure(wanted)]
    assert definitions[0] == definitions[1], name
    for (path, leaf), (_, expected) in zip(leaves_of(found), leaves_of(wanted), strict=True):
        assert told(leaf) == told(expected), (name, path, told(leaf), told(expected))


def described(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        weak = getattr(leaf, "weak_type", False)
        sharding = leaf.sharding if leaf.committed else None
        return Described(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(one, tree)


def main() -> None:
    what, directory = sys.argv[1:]
    tiers = [mtckpt.Disk(Path(directory) / "disk", every=1)]
    with mtckpt.Checkpointer("states", tiers, timeout_s=40, max_stall_s=20) as checkpointer:
        wanted = {name: make(SAVED) for name, make in STATES.items()}
        if what == "save":
            checkpointer.save(1, wanted).wait("local", timeout_s=60)
            print("saved")
            return
        found = checkpointer.restore({n: make(OTHER) for n, make in STATES.items()}).state
        for name in STATES:
            check(name, found[name], wanted[name])
        by_name = {n: STATES[n](OTHER) for n in STATES if n != "nnx_model_and_optimizer"}
        found = checkpointer.restore({n: described(tree) for n, tree in by_name.items()}).state
        for name in by_name:
            check(name, found[name], wanted[name])
    print("restored")


if __name__ == "__main__":
    main()
