"""A fresh process restores from RAM into tensors on the device, verified; every bit is compared.

A process saves and is killed with SIGKILL; fresh ones come after it, as a restarted job would.
Measured is ``restore()`` until the tensors are ready, with the imports done and the device started;
a row of its own begins before the Checkpointer is made. Once with slots in /dev/shm and once on a
tmpfs with huge pages, where one may be mounted. The limit is what a copy of so many bytes takes
from memory that is registered already.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from benchmarks import measuring
from benchmarks.gpu.bench import (
    GIB,
    Bench,
    differing,
    forget,
    make_state,
    mounted_huge,
    options,
    ram,
    saved,
    scramble,
    show,
    size_of,
)
from benchmarks.gpu.pinned import pinned

_RUN = "restored"
_SEED = 3
_STEPS = 3
_GOALS = {"4 KiB pages": "value >= 14", "huge pages": "value >= 30"}


def measure(bench: Bench) -> None:
    for pages, prepare in (("4 KiB pages", _small_pages), ("huge pages", _huge_pages)):
        bench.attempt(
            f"restored, {pages}", prepare, bench, pages, needs_s=10 if bench.on_gpu else 1
        )
        forget(_RUN)


def _small_pages(bench: Bench, pages: str) -> None:
    _row(bench, pages, os.environ["MTCKPT_RAM_DIR"])


def _huge_pages(bench: Bench, pages: str) -> None:
    with mounted_huge(4 * bench.size_mib() * measuring.MIB + GIB) as directory:
        _row(bench, pages, directory)
        forget(_RUN)


def _row(bench: Bench, pages: str, directory: str) -> None:
    _role(bench, "save", directory)
    runs: list[dict[str, Any]] = []
    while len(runs) < max(1, min(3, bench.rounds)):
        started_s = time.monotonic()
        runs.append(_role(bench, "restore", directory))
        if bench.left_s() < 2 * (time.monotonic() - started_s):
            break
    if wrong := [run["wrong"] for run in runs if run["wrong"]]:
        raise RuntimeError(f"came back with other bits: {wrong[0]}")
    gib = runs[0]["size_bytes"] / GIB
    limit = [gib / run["limit_s"] for run in runs]
    how: dict[str, Any] = {"unit": "GiB/s", "limit": limit, "size_bytes": runs[0]["size_bytes"]}
    how["limit_name"] = "registered tmpfs to device"
    rates = [gib / run["restore_s"] for run in runs]
    bench.row(f"restored, {pages}", rates, goal=_GOALS[pages], **how)
    rates = [gib / run["ready_s"] for run in runs]
    bench.row(f"restored, {pages}: with opening the run", rates, **how)


def _role(bench: Bench, role: str, directory: str) -> dict[str, Any]:
    arguments = [*bench.arguments(), f"--role={role}", f"--where={directory}"]
    out = measuring.child("benchmarks.gpu.restored", *arguments, check=False)  # it kills itself
    lines = out.splitlines()
    if not lines:
        raise RuntimeError(f"the process that was to {role} printed nothing")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    if not bench.chosen.role:
        with measuring.places():
            measure(bench)
        return
    {"save": _save, "restore": _restore}[bench.chosen.role](bench, bench.chosen.where)
    os.kill(os.getpid(), signal.SIGKILL)  # closing would free the slots


def _save(bench: Bench, directory: str) -> None:
    import mtckpt

    state = make_state(bench.size_mib(), bench.device)
    checkpointer = mtckpt.Checkpointer(_RUN, [ram(path=directory)], max_stall_s=60)
    for step in range(1, 1 + _STEPS):
        scramble(state, _SEED if step == _STEPS else _SEED + 10 * step)
        saved(checkpointer, step, state).wait("staged", timeout_s=120)
    show({"saved": _STEPS})


def _restore(bench: Bench, directory: str) -> None:
    state = make_state(bench.size_mib(), bench.device)
    for tensor in state.values():
        tensor.fill_(-1.0)
    bench.sync()
    import torch

    import mtckpt

    assert mtckpt.Checkpointer is not None  # names are loaded when they are first used
    started_s = time.perf_counter()
    checkpointer = mtckpt.Checkpointer(_RUN, [ram(path=directory)], max_stall_s=60)
    checkpointer.status()  # reaches the agent
    opened_s = time.perf_counter()
    restored = checkpointer.restore(state)
    bench.sync()
    ready_s = time.perf_counter()
    wrong = differing(state, _SEED)
    if restored.step != _STEPS or set(restored.sources) != {"ram"}:
        wrong.append(repr(restored))
    part_bytes = min(GIB, size_of(state))
    target = torch.empty(part_bytes, dtype=torch.uint8, device=bench.device)
    with pinned(bench, directory, part_bytes) as slot:
        limits = []
        for _ in range(3):
            bench.sync()
            limit_s = time.perf_counter()
            target.copy_(slot.tensor, non_blocking=True)
            bench.sync()
            limits.append((time.perf_counter() - limit_s) * size_of(state) / part_bytes)
    took = {"ready_s": ready_s - started_s, "restore_s": ready_s - opened_s}
    facts = {"wrong": wrong[:3], "size_bytes": size_of(state), "limit_s": min(limits)}
    show({**took, **facts})


if __name__ == "__main__":
    main()
