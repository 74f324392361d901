"""One process of a JAX job of several: save, and restore onto another sharding.

    python tests/jax_ranks.py RANK RANKS PORT DIRECTORY

What holds is asserted here; the test looks at the exit status.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import mtckpt

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
        assert found["own"].tolist() == [int(rank)] * 7
        assert found["rank"] == int(rank)
        checkpointer.save(3, found).wait("staged")
    print(f"rank {rank}: good", flush=True)


if __name__ == "__main__":
    main()
