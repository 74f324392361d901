"""JAX: device arrays staged, restored by a fresh process, and donated right behind a save.

Each part has a process of its own. The limit of a save is a copy of the arrays by their pointers
into a registered tmpfs file (``cuda-bindings``). After each of some saves the arrays are donated to
a compiled step at once, and what is restored is compared with copies that were taken at the call.
Orbax saves and restores the same arrays in the same tmpfs, async, in two layouts.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks import measuring
from benchmarks.gpu.bench import GIB, Bench, Skipped, forget, options, ram, saved, show

_RUN = "jax"
_SEED = 6
_ARRAYS = 60
_WARM_UPS = 4
_LIMIT_S = 120.0
_State = dict[str, Any]


def measure(bench: Bench) -> None:
    bench.attempt("JAX, mtckpt", _mtckpt, bench, needs_s=15)
    forget(_RUN)
    for layout in ("Zarr", "OCDBT"):
        bench.attempt(f"JAX, Orbax, {layout}", _orbax, bench, layout, needs_s=20)


def _mtckpt(bench: Bench) -> None:
    done = _role(bench, "save")
    gib = done["size_bytes"] / GIB
    facts = {"size_bytes": done["size_bytes"], "arrays": _ARRAYS}
    how: dict[str, Any] = {"unit": "GiB/s", **facts}
    if done["limit"]:
        how["limit"] = [gib / took_s for took_s in done["limit"]]
        how["limit_name"] = "by pointer into registered tmpfs"
    rates = [gib / took_s for took_s in done["staged"]]
    bench.row("JAX: staged", rates, goal="value >= 45", **how)
    bench.row("JAX: save() blocks", done["blocked"], **facts)
    rounds = done["donated"]
    bench.row("JAX: donated behind the save, rounds with other bits", [0.0] * rounds, unit="")
    runs = [_role(bench, "restore") for _ in range(max(1, min(3, bench.rounds)))]
    rates = [gib / run["restore_s"] for run in runs]
    bench.row("JAX: restored", rates, unit="GiB/s", goal="value >= 27", **facts)


def _orbax(bench: Bench, layout: str) -> None:
    try:
        saved_ = _role(bench, f"orbax-save:{layout}")
        restored = _role(bench, f"orbax-restore:{layout}")
    finally:
        shutil.rmtree(_orbax_path(), ignore_errors=True)
    name, facts = f"JAX, Orbax, {layout}", {"size_bytes": saved_["size_bytes"]}
    bench.row(f"{name}: call blocks", saved_["blocked"], **facts)
    bench.row(f"{name}: complete in tmpfs", saved_["complete"], **facts)
    bench.row(f"{name}: restored, fresh process", [restored["restore_s"]], **facts)


def _role(bench: Bench, role: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(measuring.ROOT), os.environ.get("PYTHONPATH"))))
    platform = {"JAX_PLATFORMS": "cuda" if bench.on_gpu else "cpu"}
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **platform}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.in_jax", *bench.arguments(), f"--role={role}"],
            cwd=measuring.ROOT,
            env={**os.environ, **settings, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            timeout=max(5.0, min(_LIMIT_S, bench.left_s())),
        )
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"{role}: not done after {error.timeout:.0f} s") from error
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"{role}: status {done.returncode}, no row")
    found: dict[str, Any] = json.loads(rows[-1])
    return found


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    verb, _, layout = bench.chosen.role.partition(":")
    if not verb:
        with measuring.places():
            measure(bench)
        return
    if verb.startswith("orbax"):
        found = {"orbax-save": _orbax_save, "orbax-restore": _orbax_restore}[verb](bench, layout)
    else:
        found = {"save": _save, "restore": _restore}[verb](bench)
    show(found)
    os.kill(os.getpid(), signal.SIGKILL)  # closing would free the slots


# -- states ----------------------------------------------------------------------------------------


def _state(bench: Bench, seed: int) -> _State:
    """Random float32 arrays that any process with such a device can make again."""
    import jax

    items = max(64, bench.size_mib() * measuring.MIB // 4 // _ARRAYS)
    keys = jax.random.split(jax.random.key(seed), _ARRAYS)
    state = {f"a{i:02}": jax.random.normal(keys[i], (items,), "float32") for i in range(_ARRAYS)}
    _ready(state)
    return state


def _ready(state: _State) -> None:
    import jax

    wait: Any = jax.block_until_ready
    wait(state)


def _differing(state: _State, wanted: _State) -> list[str]:
    import jax.numpy as jnp

    return [name for name in wanted if not bool(jnp.array_equal(state[name], wanted[name]))]


def _size(state: _State) -> int:
    return sum(int(array.nbytes) for array in state.values())


# -- mtckpt ----------------------------------------------------------------------------------------


def _save(bench: Bench) -> dict[str, Any]:
    import mtckpt

    state = _state(bench, _SEED + 1)
    checkpointer = mtckpt.Checkpointer(_RUN, [ram(slots=2)], max_stall_s=60)
    steps = itertools.count(1)
    found: dict[str, Any] = {"limit": [], "staged": [], "blocked": [], "size_bytes": _size(state)}
    limit = _Limit(state) if bench.on_gpu else None
    for number in range(_WARM_UPS + bench.rounds):
        measuring.settle()
        limit_s = limit() if limit else 0.0
        started_s = time.perf_counter()
        save = saved(checkpointer, next(steps), state)
        blocked_s = time.perf_counter() - started_s
        save.wait("staged", timeout_s=60)
        staged_s = time.perf_counter() - started_s
        if number >= _WARM_UPS:
            found["staged"].append(staged_s)
            found["blocked"].append(blocked_s)
            found["limit"] += [limit_s] if limit else []
    if limit:
        limit.close()
    found["donated"], state = _donated(bench, checkpointer, steps, state)
    del state
    last = saved(checkpointer, next(steps), _state(bench, _SEED))
    last.wait("staged", timeout_s=60)
    return found


def _donated(
    bench: Bench, checkpointer: Any, steps: itertools.count[int], state: _State
) -> tuple[int, _State]:
    """Save, and give the arrays away to a compiled step at once; returns how often it was right."""
    import jax
    import jax.numpy as jnp

    def update(arrays: _State) -> _State:
        return {name: jnp.sin(array) + 1 for name, array in arrays.items()}

    step_on = jax.jit(update, donate_argnums=0)
    rounds = max(1, min(4, bench.rounds))
    for _ in range(rounds):
        wanted = {name: array.copy() for name, array in state.items()}
        step = next(steps)
        save = saved(checkpointer, step, state)
        state = step_on(state)
        state = step_on(state)
        save.wait("staged", timeout_s=60)
        template = {name: jnp.zeros_like(array) for name, array in wanted.items()}
        restored = checkpointer.restore(template, step=step)
        if wrong := _differing(restored.state, wanted):
            raise RuntimeError(f"step {step}: {len(wrong)} arrays have other bits: {wrong[:3]}")
    return rounds, state


def _restore(bench: Bench) -> dict[str, Any]:
    import jax

    wanted = _state(bench, _SEED)
    make: Any = jax.ShapeDtypeStruct
    template = {
        name: make(array.shape, array.dtype, sharding=array.sharding)
        for name, array in wanted.items()
    }
    import mtckpt

    checkpointer = mtckpt.Checkpointer(_RUN, [ram(slots=2)], max_stall_s=60)
    checkpointer.status()  # reaches the agent
    started_s = time.perf_counter()
    restored = checkpointer.restore(template)
    state = restored.state
    _ready(state)
    restore_s = time.perf_counter() - started_s
    if set(restored.sources) != {"ram"} or _differing(state, wanted):
        raise RuntimeError(f"{restored!r}: other bits, or not from RAM")
    return {"restore_s": restore_s}


class _Limit:
    """The arrays copied by their pointers into a tmpfs file that is registered."""

    def __init__(self, state: _State) -> None:
        import numpy as np
        from cuda.bindings import runtime  # type: ignore[import-not-found]  # there with a GPU

        self._runtime: Any = runtime
        self._state = state
        self._path = f"{os.environ['MTCKPT_RAM_DIR']}/limit"
        size_bytes = _size(state)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.posix_fallocate(self._fd, 0, size_bytes)
        self._map = mmap.mmap(self._fd, size_bytes)
        self._base = np.frombuffer(self._map, np.uint8).ctypes.data
        self._asked(runtime.cudaHostRegister(self._base, size_bytes, 0))
        self._stream = self._asked(runtime.cudaStreamCreateWithFlags(1))
        self()

    def _asked(self, answer: tuple[Any, ...]) -> Any:
        if int(answer[0]) != 0:
            raise RuntimeError(f"the CUDA runtime: {answer[0]}")
        return answer[1] if len(answer) > 1 else None

    def __call__(self) -> float:
        rt = self._runtime
        started_s = time.perf_counter()
        offset = 0
        for array in self._state.values():
            source = array.unsafe_buffer_pointer()
            kind = rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
            target = self._base + offset
            self._asked(rt.cudaMemcpyAsync(target, source, array.nbytes, kind, self._stream))
            offset += int(array.nbytes)
        self._asked(rt.cudaStreamSynchronize(self._stream))
        return time.perf_counter() - started_s

    def close(self) -> None:
        self._asked(self._runtime.cudaHostUnregister(self._base))
        os.close(self._fd)
        os.unlink(self._path)


# -- Orbax -----------------------------------------------------------------------------------------


def _orbax_path() -> str:
    return f"{os.environ['MTCKPT_RAM_DIR']}/orbax"


def _orbax_checkpointer(layout: str) -> Any:
    import orbax.checkpoint as ocp

    is_ocdbt = layout == "OCDBT"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=is_ocdbt, use_zarr3=is_ocdbt)
    return ocp.AsyncCheckpointer(handler)


def _orbax_save(bench: Bench, layout: str) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    state = _state(bench, _SEED)
    checkpointer = _orbax_checkpointer(layout)
    found: dict[str, Any] = {"blocked": [], "complete": [], "size_bytes": _size(state)}
    for number in range(3):
        started_s = time.perf_counter()
        checkpointer.save(f"{_orbax_path()}/{number}", args=ocp.args.PyTreeSave(state))
        blocked_s = time.perf_counter() - started_s
        checkpointer.wait_until_finished()
        if number:
            found["blocked"].append(blocked_s)
            found["complete"].append(time.perf_counter() - started_s)
            shutil.rmtree(f"{_orbax_path()}/{number - 1}")
    return found


def _orbax_restore(bench: Bench, layout: str) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    wanted = _state(bench, _SEED)
    make: Any = jax.ShapeDtypeStruct
    template = {
        name: make(array.shape, array.dtype, sharding=array.sharding)
        for name, array in wanted.items()
    }
    (number,) = os.listdir(_orbax_path())
    told = ocp.checkpoint_utils.construct_restore_args(template)
    arguments = ocp.args.PyTreeRestore(template, restore_args=told)
    checkpointer = _orbax_checkpointer(layout)
    started_s = time.perf_counter()
    state = checkpointer.restore(f"{_orbax_path()}/{number}", args=arguments)
    _ready(state)
    restore_s = time.perf_counter() - started_s
    if wrong := _differing(state, wanted):
        raise RuntimeError(f"{len(wrong)} arrays have other bits: {wrong[:3]}")
    return {"restore_s": restore_s}


if __name__ == "__main__":
    main()
