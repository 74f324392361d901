"""Nothing grows: device memory, registrations, descriptors, mappings and slots over many saves.

The baseline is taken after some saves and restores, when all that is kept exists; the figures are
what was there more after ``--times`` further ones, in one process, with the same agent.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, differing, make_state, opened, ram, saved, scramble, size_of
from benchmarks.memory import own_bytes

if TYPE_CHECKING:
    import mtckpt

_WARM_UPS = 6
_USUAL_MIB = 128
# What must be as before, and what is only told: allocators keep what they had once.
_EXACT = ("device, allocated", "pinned by torch", "descriptors", "mappings of slots", "slots")


def measure(bench: Bench) -> None:
    state: dict[str, Any] = make_state(bench.size_mib(_USUAL_MIB), bench.device)
    where = measuring.Places(
        os.environ["MTCKPT_RUNTIME_DIR"], os.environ["MTCKPT_RAM_DIR"], os.environ["MTCKPT_RAM_DIR"]
    )
    steps = itertools.count(1)
    with opened(ram(), "memory") as checkpointer:
        for _ in range(_WARM_UPS):
            _once(checkpointer, state, next(steps))
        before = _held(bench, where, size_of(state))
        times = 0
        while times < bench.chosen.times and bench.left_s() > 5:
            times += 1
            _once(checkpointer, state, next(steps))
        after = _held(bench, where, size_of(state))
    for name, value in after.items():
        goal = "value <= 0" if name in _EXACT else ""
        if name == "device, all processes":
            goal = "value <= 2"  # drivers round
        unit = "MiB" if name.startswith(("device", "pinned", "host", "agent, memory")) else ""
        grown = [value - before[name]]
        facts: dict[str, Any] = {"times": times, "baseline": round(before[name], 3)}
        bench.row(f"grown over saves and restores: {name}", grown, unit=unit, goal=goal, **facts)


def _once(checkpointer: mtckpt.Checkpointer, state: dict[str, Any], step: int) -> None:
    scramble(state, step)
    saved(checkpointer, step, state).wait("staged", timeout_s=60)
    scramble(state, -1 - step)
    if not checkpointer.restore(dict(state)) or (wrong := differing(state, step)):
        raise RuntimeError(f"step {step} did not come back: {wrong[:3]}")


def _held(bench: Bench, where: measuring.Places, size_bytes: int) -> dict[str, float]:
    """What this process and its agent hold now."""
    gc.collect()
    held: dict[str, float] = {}
    if bench.on_gpu:
        import torch

        bench.sync()
        free, total = torch.cuda.mem_get_info()
        held["device, allocated"] = torch.cuda.memory_allocated() / measuring.MIB
        held["device, reserved"] = torch.cuda.memory_reserved() / measuring.MIB
        held["device, all processes"] = (total - free) / measuring.MIB
        with contextlib.suppress(AttributeError):  # torch before 2.7
            pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
            held["pinned by torch"] = pinned / measuring.MIB
    status = Path("/proc/self/status").read_text()
    for field in ("VmPin", "VmLck"):
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        held[f"pinned, {field}"] = int(found.group(1)) / 1024 if found else 0.0
    held["host, own"] = own_bytes(os.getpid()) / measuring.MIB
    held["descriptors"] = len(os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    held["mappings of slots"] = sum(where.ram in line for line in maps)
    held["mappings"] = len(maps)
    held["threads"] = len(os.listdir("/proc/self/task"))
    files = [path for path in Path(where.ram).rglob("*") if path.is_file()]
    held["slots"] = sum(path.stat().st_size > size_bytes // 2 for path in files)
    held["agent, memory"] = sum(map(own_bytes, where.agent_pids())) / measuring.MIB
    held["agent, descriptors"] = sum(
        len(os.listdir(f"/proc/{pid}/fd")) for pid in where.agent_pids()
    )
    return held
