"""JAX states saved and restored by mtckpt, next to Orbax: async, with OCDBT and without.

Each contender has processes of its own: one saves, fresh ones restore, with the same shardings and
on another mesh. All save to the same tmpfs. Rows: the call, until the save is complete (staged with
digests; every file of Orbax's in its place), training time lost, host memory beyond the state, and
the restores. Restored bytes are compared with what was saved, box by box; if they differ there is
no row. ``--kind small`` is 20,000 arrays of 1 to 16 KiB, without the rows on other meshes.

Training time lost: a compiled step of a few milliseconds on one thread is run over and over until
the save is complete; lost is what these steps took longer than as many without a save.
Memory: the most that the process and mtckpt's agent have of their own, less the state, and what
mtckpt's slots take. The files that Orbax writes to the tmpfs are not counted.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks import measuring
from benchmarks.memory import own_bytes, used_bytes

_WARM_UPS = 3
_COMMON = ("size_mib", "rounds", "kind", "tensors")
_MTCKPT, _ORBAX = "mtckpt", "Orbax async"
_State = dict[str, Any]


def main() -> None:
    chosen = measuring.options(__doc__, rounds=5, kind="gpt", tensors=20_000, role="", path="")
    size = chosen.size_mib if chosen.kind == "gpt" else chosen.tensors
    if chosen.role:
        _work(chosen.role, chosen.kind, size, chosen.path, chosen.rounds)
        return
    names = [_MTCKPT, _ORBAX, "Orbax async, Zarr"]
    found = {name: _compare(name, chosen) for name in names}
    if chosen.kind == "gpt":
        mine, best = found[_MTCKPT]["lost_s"], found[_ORBAX]["lost_s"]
        measuring.row(
            "JAX, training time lost, beside Orbax's", mine, limit=best, limit_name=_ORBAX,
            goal="ratio <= 0.25",
        )  # fmt: skip


def _compare(name: str, chosen: Any) -> dict[str, Any]:
    """The rows of one contender."""
    common = [f"--{key.replace('_', '-')}={getattr(chosen, key)}" for key in _COMMON]
    with measuring.places() as where:
        path = f"{where.ram}/orbax"
        saved = _child(f"save:{name}", path, common)
        roles = ["same"] if chosen.kind == "small" else ["same", "other"]
        restored = {
            role: [_child(f"{role}:{name}", path, common) for _ in range(chosen.rounds)]
            for role in roles
        }
    facts = {key: saved[key] for key in ("size_bytes", "arrays")}
    copied = saved["memcpy_s"]
    goals = _GOALS.get(chosen.kind, {}) if name == _MTCKPT else {}
    kind = "JAX" if chosen.kind == "gpt" else "JAX, small arrays"

    def row(figure: str, samples: list[float], **more: Any) -> None:
        goal = goals.get(figure, "")
        measuring.row(f"{kind}, {name}: {figure}", samples, goal=goal, **more, **facts)

    row("complete", saved["complete_s"], limit=copied)
    row("call blocks", saved["blocked_s"], limit=copied)
    row("training time lost", saved["lost_s"], limit=copied)
    row("memory beyond state", saved["memory_mib"], unit="MiB", slots_mib=saved["slots_mib"])
    same = [done["restore_s"] for done in restored["same"]]
    row("restored", same, limit=[done["memcpy_s"] for done in restored["same"]])
    if "other" in restored:
        other = [done["restore_s"] for done in restored["other"]]
        row("restored on another mesh", other, limit=same, limit_name="the same mesh")
    return saved


_GOALS = {
    "gpt": {
        "complete": "ratio <= 1.3",
        "restored": "ratio <= 2.2",
        "restored on another mesh": "ratio <= 1.3",
    },
    "small": {"complete": "value <= 0.3"},
}


def _child(role: str, path: str, common: list[str]) -> dict[str, Any]:
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    )
    arguments = (f"--role={role}", f"--path={path}", *common)
    out = measuring.child("benchmarks.in_jax", *arguments, check=False)  # it may kill itself
    lines = out.splitlines()
    if not lines:
        raise SystemExit(f"{role}: no row")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _work(role: str, kind: str, size: int, path: str, rounds: int) -> None:
    warnings.simplefilter("ignore")  # of the peers; each is used as its documents say
    verb, _, name = role.partition(":")
    contender = _Mtckpt() if name == _MTCKPT else _Orbax(path, ocdbt=name == _ORBAX)
    if verb == "save":
        found = _save(contender, kind, size, rounds)
    else:
        found = _restore(contender, kind, size, other=verb == "other")
    print(json.dumps(found), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # closing would free the slots


# -- states ----------------------------------------------------------------------------------------


def _host(kind: str, size: int, salt: int) -> _State:
    """One level of names; torch's tensors stand for the bytes that are expected."""
    state = measuring.make_state(kind, size)
    measuring.fill(state, salt)
    if kind == "small":
        return dict(state)
    return {f"{part}.{name}": t for part, inner in state.items() for name, t in inner.items()}


def _shardings(host: _State, kind: str, *, other: bool = False) -> _State:
    """Small arrays lie on one device, the others over a mesh of eight as their shapes allow."""
    import jax

    if kind == "small":
        return dict.fromkeys(host, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    sizes = (2, 4) if other else (4, 2)
    mesh = jax.make_mesh(sizes, ("x", "y"))
    made = {}
    for name, tensor in host.items():
        axes = [
            axis if extent % size == 0 else None
            for axis, size, extent in zip(("x", "y"), sizes, tensor.shape, strict=False)
        ]
        spec: Any = jax.sharding.PartitionSpec
        made[name] = jax.sharding.NamedSharding(mesh, spec(*axes))
    return made


def _same(state: _State, host: _State) -> bool:
    """True if every box on every device has the bytes that were saved."""
    import numpy as np

    return all(
        np.array_equal(np.asarray(shard.data), tensor.numpy()[shard.index])
        for name, tensor in host.items()
        for shard in state[name].addressable_shards
    )


# -- saving ----------------------------------------------------------------------------------------


def _save(contender: _Mtckpt | _Orbax, kind: str, size: int, rounds: int) -> dict[str, Any]:
    import jax

    host = _host(kind, size, 5)
    memcpy = measuring.Memcpy(host)
    places = _shardings(host, kind)
    state = {name: jax.device_put(tensor.numpy(), places[name]) for name, tensor in host.items()}
    jax.block_until_ready(state)  # type: ignore[no-untyped-call]  # jax leaves it untyped
    found: dict[str, Any] = {"memcpy_s": [], "blocked_s": [], "complete_s": [], "lost_s": []}
    train = _make_step()
    for number in range(_WARM_UPS + rounds):
        measuring.settle()
        copy_s = memcpy()
        started_s = time.perf_counter()
        wait = contender.save(state)
        blocked_s = time.perf_counter() - started_s
        wait()
        complete_s = time.perf_counter() - started_s
        lost_s = _lost(contender, state, train)
        if number >= _WARM_UPS:
            found["memcpy_s"].append(copy_s)
            found["blocked_s"].append(blocked_s)
            found["complete_s"].append(complete_s)
            found["lost_s"].append(lost_s)
    found.update(_memory(contender, state, rounds))
    return {**found, "size_bytes": memcpy.size_bytes, "arrays": len(host)}


def _make_step() -> Callable[[], None]:
    import jax
    import jax.numpy as jnp

    weight = jnp.full((256, 256), 0.01)

    @jax.jit
    def work(hidden: Any) -> Any:
        return jax.lax.fori_loop(0, 20, lambda _, h: jnp.tanh(h @ weight), hidden)

    def step() -> None:
        work(weight).block_until_ready()

    step()
    return step


def _lost(contender: _Mtckpt | _Orbax, state: _State, train: Callable[[], None]) -> float:
    """How much longer the steps took that ran beside a save."""
    usual_s = median([measuring.quietly(train) for _ in range(50)])
    started_s = time.perf_counter()
    wait = contender.save(state)
    waiter = threading.Thread(target=wait)
    waiter.start()
    num_steps = 0
    while waiter.is_alive() or num_steps < 20:
        train()
        num_steps += 1
    elapsed_s = time.perf_counter() - started_s
    waiter.join()
    return elapsed_s - num_steps * usual_s


def _memory(contender: _Mtckpt | _Orbax, state: _State, rounds: int) -> dict[str, Any]:
    """The highest sample of each of some saves."""
    before_bytes = own_bytes(os.getpid())
    stop = threading.Event()
    samples: list[int] = []

    def watch() -> None:
        while not stop.wait(0.02):
            samples.append(own_bytes(os.getpid()) + contender.helpers_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    highest = []
    for _ in range(rounds):
        samples.clear()
        contender.save(state)()
        measuring.settle(0.2)
        highest.append((max(samples) - before_bytes) / measuring.MIB)
    stop.set()
    watcher.join()
    return {"memory_mib": highest, "slots_mib": contender.slots_bytes() / measuring.MIB}


def _restore(contender: _Mtckpt | _Orbax, kind: str, size: int, *, other: bool) -> dict[str, Any]:
    import jax

    host = _host(kind, size, 5)
    places = _shardings(host, kind, other=other)
    make: Any = jax.ShapeDtypeStruct
    template = {
        name: make(tuple(tensor.shape), "float32", sharding=places[name])
        for name, tensor in host.items()
    }
    contender.open()
    started_s = time.perf_counter()
    state = contender.restore(template)
    jax.block_until_ready(state)  # type: ignore[no-untyped-call]  # jax leaves it untyped
    restore_s = time.perf_counter() - started_s
    if not _same(state, host):
        sys.exit("restored bytes differ: no row")
    memcpy = measuring.Memcpy(host)
    return {"restore_s": restore_s, "memcpy_s": median([memcpy() for _ in range(5)])}


# -- contenders ------------------------------------------------------------------------------------


class _Mtckpt:
    """RAM of this machine, two slots."""

    def __init__(self) -> None:
        self._steps = itertools.count(1)
        self._checkpointer: Any = None

    def open(self) -> None:
        if self._checkpointer is None:
            import mtckpt

            tiers = [mtckpt.Ram(every=1, slots=2)]
            self._checkpointer = mtckpt.Checkpointer("bench", tiers, max_stall_s=60)
            self._checkpointer.status()  # reaches the agent, starting one if need be

    def save(self, state: _State) -> Callable[[], object]:
        self.open()
        save = self._checkpointer.save(next(self._steps), state)
        if save.skipped:
            sys.exit(f"a save was called off: {save.skipped}")
        return lambda: save.wait("staged", timeout_s=120)

    def restore(self, template: _State) -> _State:
        restored = self._checkpointer.restore(template)
        if not restored or set(restored.sources) != {"ram"}:
            sys.exit(f"{restored!r}: not from RAM")
        state: _State = restored.state
        return state

    def helpers_bytes(self) -> int:
        where = measuring.Places(os.environ["MTCKPT_RUNTIME_DIR"], "", "")
        return sum(map(own_bytes, where.agent_pids()))

    def slots_bytes(self) -> int:
        return used_bytes(os.environ["MTCKPT_RAM_DIR"])


class _Orbax:
    """One ``AsyncCheckpointer`` kept over all saves, with the newest step alone left behind."""

    def __init__(self, path: str, *, ocdbt: bool) -> None:
        import orbax.checkpoint as ocp

        self._path = path
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=ocdbt)
        self._checkpointer = ocp.AsyncCheckpointer(handler)
        self._numbers = itertools.count()

    def open(self) -> None:
        """Nothing is to be started."""

    def save(self, state: _State) -> Callable[[], object]:
        import orbax.checkpoint as ocp

        number = next(self._numbers)
        self._checkpointer.save(f"{self._path}/{number}", args=ocp.args.PyTreeSave(state))

        def wait() -> None:
            self._checkpointer.wait_until_finished()
            if number:  # it never writes over an older one; whoever keeps one step deletes it
                shutil.rmtree(f"{self._path}/{number - 1}")

        return wait

    def restore(self, template: _State) -> _State:
        import orbax.checkpoint as ocp

        (number,) = os.listdir(self._path)
        told = ocp.checkpoint_utils.construct_restore_args(template)
        arguments = ocp.args.PyTreeRestore(template, restore_args=told)
        state: _State = self._checkpointer.restore(f"{self._path}/{number}", args=arguments)
        return state

    def helpers_bytes(self) -> int:
        return 0

    def slots_bytes(self) -> int:
        return 0


if __name__ == "__main__":
    main()
