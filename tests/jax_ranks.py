"""One process of a JAX job of several: save, and restore onto another sharding.

    python tests/jax_ranks.py RANK RANKS PORT DIRECTORY

What holds is asserted here; the test looks at the exit status.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import mtckpt
from mtckpt.errors import CheckpointError, SaveFailed, StateMismatch, UnsupportedState

P: Any = jax.sharding.PartitionSpec  # JAX leaves these two untyped
Described: Any = jax.ShapeDtypeStruct
SHAPE = (600, 300)


def make(values: np.ndarray[Any, Any], mesh: Mesh, spec: Any) -> jax.Array:
    return jax.make_array_from_callback(
        values.shape, NamedSharding(mesh, spec), lambda index: values[index]
    )


def equal(array: jax.Array, values: np.ndarray[Any, Any]) -> bool:
    return all(
        np.array_equal(np.asarray(shard.data), values[shard.index])
        for shard in array.addressable_shards
    )


def of_one(process: int, mesh: Mesh) -> jax.Array:
    """An array of which all other processes have nothing."""
    there = NamedSharding(Mesh(mesh.devices[process], ("device",)), P("device"))
    values = np.arange(4, dtype=np.float32)
    return jax.make_array_from_callback((4,), there, lambda i: values[i], dtype=np.float32)


def save(checkpointer: mtckpt.Checkpointer, step: int, state: Any) -> None:
    checkpointer.save(step, state).wait("staged")


def raised(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except CheckpointError as error:
        return error
    return None


def refused(checkpointer: mtckpt.Checkpointer, rank: int, mesh: Mesh, state: Any) -> None:
    """What one rank cannot save is named there, called off elsewhere, and the next save works."""
    gone = jax.device_put(np.ones(3), jax.local_devices()[0])
    if rank == 1:
        gone.delete()
    for step, bad, culprit in [(4, of_one(1, mesh), 0), (6, gone, 1)]:
        before = {each.step for each in checkpointer.steps()}
        whole = {**state, "more": [{"w": bad}]}
        error = raised(functools.partial(save, checkpointer, step, whole))
        if rank == culprit:
            assert isinstance(error, UnsupportedState), error
            assert error.details["path"] == "more/0/w"
            assert "nothing was written" in str(error)
        else:
            assert isinstance(error, SaveFailed), error
            assert f"rank {culprit}" in str(error), error
        save(checkpointer, step + 1, state)
        after = checkpointer.steps()
        assert {each.step for each in after} - before == {step + 1}, (before, after)
    there = of_one(1, mesh).sharding
    template = {"own": Described((7,), jnp.int32, sharding=there), "rank": -1}
    error = raised(lambda: checkpointer.restore(template))
    assert isinstance(error, StateMismatch), error
    print(rank, vars(error)["differing"])


def main() -> None:
    rank, ranks, port, directory = sys.argv[1:]
    config: Any = jax.config
    config.update("jax_platforms", "cpu")
    config.update("jax_cpu_collectives_implementation", "gloo")
    config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(ranks), int(rank))
    mesh = Mesh(np.array(jax.devices()).reshape(int(ranks), 2), ("process", "device"))
    whole = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(Path(directory) / "disk")]

    state = {
        "rows": make(whole, mesh, P("process")),
        "both": make(whole + 1, mesh, P("device", "process")),
        "all": make(whole + 2, mesh, P()),
        "weak": jax.jit(
            lambda: jax.lax.full_like(2.5, 3, shape=(8,)),
            out_shardings=NamedSharding(mesh, P("process")),
        )(),
        "own": jnp.full(7, int(rank)),
        "rank": int(rank),
    }
    with mtckpt.Checkpointer("jax", tiers, timeout_s=40) as checkpointer:
        assert not checkpointer.restore(state)
        for step in (1, 2):
            checkpointer.save(step, state).wait("local")

    template = {
        "rows": Described(
            SHAPE, jnp.float32, sharding=NamedSharding(mesh, P(None, ("device", "process")))
        ),
        "both": make(np.zeros(SHAPE, np.float32), mesh, P("process")),
        "all": make(np.zeros(SHAPE, np.float32), mesh, P("device")),
        "weak": make(np.zeros(8, np.float32), mesh, P("device")),
        "own": jnp.zeros(7, int),
        "rank": -1,
    }
    with mtckpt.Checkpointer("jax", tiers, timeout_s=40) as checkpointer:
        restored = checkpointer.restore(template)
        found = restored.state
        assert restored.step == 2
        assert equal(found["rows"], whole)
        assert equal(found["both"], whole + 1)
        assert equal(found["all"], whole + 2)
        assert equal(found["weak"], np.full(8, 3, np.float32))
        assert found["weak"].weak_type
        assert found["own"].tolist() == [int(rank)] * 7
        assert found["rank"] == int(rank)
        checkpointer.save(3, found).wait("staged")
        refused(checkpointer, int(rank), mesh, found)
    with mtckpt.Checkpointer("jax", tiers, timeout_s=40) as checkpointer:
        checkpointer._go_on_below(9)  # as for Orbax's manager, which need not have restored
        save(checkpointer, 9, found)
        assert not any(step.abandoned for step in checkpointer.steps())
    print(f"rank {rank}: good", flush=True)


if __name__ == "__main__":
    main()
