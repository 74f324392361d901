"""Sharded PyTorch states: what a save costs training, and restores onto other meshes.

fsdp: two ranks of FSDP2 under torchrun train in blocks of equal numbers of steps, in turns without
a save and with one at its start: by mtckpt, and by ``dcp.async_save`` in two configurations, each
with all that its documentation recommends for speed: one stager kept over all saves, cached plans,
a process group of its own, no fsync, the same tmpfs; its writer as a thread, and as a process that
gets the staged tensors in shared memory. The better one is the limit.
mesh: four ranks of FSDP2 save; two restore, beside two restoring what two have saved; and four with
tensor parallelism restore it, beside restoring what such four have saved. Each restore is one by
fresh processes, out of RAM, every value compared. Memory is the kernel's high-water mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measuring

TORCHRUN_S = 200.0
LAYERS = 8


def main() -> None:
    chosen = measuring.options(
        __doc__, rounds=0, size_mib=0, only="", role="", saved="", kind="fsdp", path=""
    )
    if chosen.role:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        {"lost": _lost, "save": _save, "restore": _restore}[chosen.role](chosen)
        sys.stdout.flush()
        os._exit(0)  # as a job that is killed: closing would free the slots
    rows = {"fsdp": fsdp, "mesh": mesh}
    for name in chosen.only.split(",") if chosen.only else rows:
        rows[name](chosen.size_mib, chosen.rounds)


def _torchrun(num_ranks: int, role: str, size_mib: int, **more: Any) -> dict[str, Any]:
    """What rank 0 printed; Gloo may say something of other ranks after it."""
    words = [f"--{name}={value}" for name, value in more.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "benchmarks.meshes", f"--role={role}"]
    done = subprocess.run(
        [*command, f"--size-mib={size_mib}", *words],
        cwd=measuring.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,  # DCP's processes tell of their parents' end at length
        text=True,
        timeout=TORCHRUN_S,
    )
    if done.returncode:
        sys.exit(f"{role} on {num_ranks} ranks: status {done.returncode}\n{done.stderr[-4000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


# -- states ----------------------------------------------------------------------------------------


def _trainer(kind: str, size_mib: int) -> tuple[Any, Any, int]:
    """A model of pairs of layers, sharded by ``kind``, its AdamW with moments, and its width."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    width = max(16, int((size_mib * measuring.MIB / 3 / 4 / LAYERS) ** 0.5) // 16 * 16)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    world_size = torch.distributed.get_world_size()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
    else:
        both = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("data", "tensor"))
        styles = (ColwiseParallel(), RowwiseParallel())
        plan: Any = {str(number): styles[number % 2] for number in range(LAYERS)}
        parallelize_module(model, both["tensor"], plan)
        mesh = both["data"]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, width


def _boxes(model: Any, optimizer: Any) -> list[tuple[Any, Any]]:
    """Each local tensor, and what it is to hold by its place in the global one."""
    import torch
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found = []
    tensors = list(model.parameters())
    tensors += [optimizer.state[p][name] for p in tensors for name in ("exp_avg", "exp_avg_sq")]
    for number, tensor in enumerate(tensors):
        placed = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        value = torch.zeros((1,) * tensor.ndim, dtype=torch.int32)
        for axis, (length, first) in enumerate(zip(*placed, strict=True)):
            along = torch.arange(first, first + length, dtype=torch.int32) * (131, 7)[axis]
            value = value + along.view([-1 if a == axis else 1 for a in range(tensor.ndim)])
        found.append((tensor.detach().to_local(), value.add_(number).remainder_(65521)))
    return found


def _own_bytes(model: Any) -> int:
    parameters = list(model.parameters())
    return 3 * sum(int(parameter.to_local().nbytes) for parameter in parameters)


# -- training time lost ----------------------------------------------------------------------------


def fsdp(size_mib: int, rounds: int) -> None:
    """Two ranks, each with its half."""
    size_mib, rounds = size_mib or 512, rounds or 7
    with measuring.places() as where:
        found = _torchrun(2, "lost", size_mib, rounds=rounds, path=where.ram)
    ways, facts = found["lost"], {"state_bytes": found["state_bytes"], "step_s": found["step_s"]}
    ours = ways.pop("mtckpt")
    best = min(ways, key=lambda name: median(ways[name]))
    name = "training time lost, 2 ranks FSDP2"
    measuring.row(
        f"{name}, mtckpt", ours, limit=ways[best], limit_name=best, goal="ratio <= 0.5", **facts,
        unfinished=found["unfinished"]["mtckpt"],
    )  # fmt: skip
    for way, samples in ways.items():
        measuring.row(f"{name}, {way}", samples, **facts, unfinished=found["unfinished"][way])
    for way, samples in found["blocked"].items():
        measuring.row(f"{name}, {way}: call blocks", samples, **facts)


def _lost(chosen: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    model, optimizer, width = _trainer("fsdp", chosen.size_mib)
    ways = _ways(model, optimizer, chosen.path)
    inputs = torch.randn(4, width)

    def train(steps: int) -> None:
        for _ in range(steps):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for save in ways.values():
        for _ in range(2):
            save()()
    train(2)
    steps = _agreed_steps(train, 3.0 if chosen.size_mib >= 64 else 0.2)
    found: dict[str, dict[str, list[float]]] = {"blocked": {}, "took": {}}
    unfinished = dict.fromkeys(ways, 0)
    names = ["", *ways]
    for round_ in range(chosen.rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            dist.barrier()
            started_s = time.perf_counter()
            wait = ways[name]() if name else (lambda: False)
            found["blocked"].setdefault(name, []).append(time.perf_counter() - started_s)
            train(steps)
            dist.barrier()
            found["took"].setdefault(name, []).append(time.perf_counter() - started_s)
            if wait():
                unfinished[name] += 1
    plain = found["took"].pop("")
    found["blocked"].pop("")
    told = {
        "lost": {
            name: [one - without for one, without in zip(took, plain, strict=True)]
            for name, took in found["took"].items()
        },
        "blocked": found["blocked"],
        "unfinished": unfinished,
        "step_s": round(median(plain) / steps, 4),
        "state_bytes": 2 * _own_bytes(model),
    }
    if dist.get_rank() == 0:
        print(json.dumps(told))


def _agreed_steps(train: Callable[[int], None], block_s: float) -> int:
    """So many steps that a block takes as long as that, alike on all ranks."""
    import torch
    import torch.distributed as dist

    steps = torch.tensor(max(3, int(block_s / measuring.quietly(lambda: train(3)) * 3)))
    dist.broadcast(steps, 0)
    return int(steps)


_Save = Callable[[], Callable[[], bool]]


def _ways(model: Any, optimizer: Any, path: str) -> dict[str, _Save]:
    """Each way to save; what it returns waits for the end, and says if there was still a wait."""
    return {
        "mtckpt": _ours(model, optimizer),
        "DCP async, a thread": _dcp(model, optimizer, f"{path}/thread", is_process=False),
        "DCP async, a process": _dcp(model, optimizer, f"{path}/process", is_process=True),
    }


def _ours(model: Any, optimizer: Any) -> _Save:
    import mtckpt

    checkpointer = mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1)], max_stall_s=60)
    checkpointer.restore({"model": model, "optimizer": optimizer})
    steps = iter(range(1, 1 << 30))

    def save() -> Callable[[], bool]:
        saved = checkpointer.save(next(steps), {"model": model, "optimizer": optimizer})

        def wait() -> bool:
            is_late = "staged" not in saved.reached
            saved.wait("staged", timeout_s=60)
            return is_late

        return wait

    return save


def _dcp(model: Any, optimizer: Any, path: str, *, is_process: bool) -> _Save:
    import torch.distributed as dist
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

    class Kept(DefaultStager):
        def close(self) -> None:
            """Kept over all saves, so that its memory is warm."""

    stager = Kept(StagingOptions(False, is_process, False, False))
    kind = AsyncCheckpointerType.PROCESS if is_process else AsyncCheckpointerType.THREAD
    group = dist.new_group(backend="gloo")

    def save() -> Callable[[], bool]:
        saved: Any = async_save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            storage_writer=FileSystemWriter(path, thread_count=1, sync_files=False),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            process_group=group,
            async_checkpointer_type=kind,
            async_stager=stager,
        )

        def wait() -> bool:
            is_late = not saved.done()
            saved.result(60)
            return is_late

        return wait

    return save


# -- other meshes ----------------------------------------------------------------------------------


_PAIRS = {
    "4 ranks onto 2, FSDP2": (2, "fsdp", "four", "two"),
    "4 ranks FSDP2 onto 2 x 2 with tensor parallelism": (4, "tensor", "four", "tensor"),
}


def mesh(size_mib: int, rounds: int) -> None:
    """The same processes restore what was saved on another mesh, and on their own."""
    size_mib, rounds = size_mib or 1024, rounds or 5
    with measuring.places():
        for run, num_ranks, kind in (
            ("four", 4, "fsdp"),
            ("two", 2, "fsdp"),
            ("tensor", 4, "tensor"),
        ):
            _torchrun(num_ranks, "save", size_mib, saved=run, kind=kind)
        for name, (num_ranks, kind, other, same) in _PAIRS.items():
            took: dict[str, list[float]] = {other: [], same: []}
            peaks: dict[str, list[float]] = {other: [], same: []}
            used: dict[str, list[float]] = {other: [], same: []}
            for round_ in range(rounds):
                for run in (other, same) if round_ % 2 else (same, other):
                    told = _torchrun(num_ranks, "restore", size_mib, saved=run, kind=kind)
                    took[run].append(told["restore_s"])
                    peaks[run].append(max(told["peaks"]))
                    used[run].append(told["cpu_s"])
            facts = {
                "state_bytes": told["state_bytes"],
                "cpu_s": round(median(used[other]), 3),
                "limit_cpu_s": round(median(used[same]), 3),
            }
            measuring.row(
                f"restored, {name}", took[other], limit=took[same], limit_name="the same mesh",
                goal="ratio <= 1.3", **facts,
            )  # fmt: skip
            what = f"restored, {name}: peak memory, of own shards"
            measuring.row(what, peaks[other], unit="x", goal="value <= 1.1", **facts)
            measuring.row(f"{what}, same mesh", peaks[same], unit="x", **facts)


def _save(chosen: Any) -> None:
    import torch.distributed as dist

    import mtckpt

    model, optimizer, _ = _trainer(chosen.kind, chosen.size_mib)
    for local, value in _boxes(model, optimizer):
        local.copy_(value)
    tiers = [mtckpt.Ram(every=1, slots=2)]
    checkpointer = mtckpt.Checkpointer(chosen.saved, tiers, max_stall_s=60)
    state = {"model": model, "optimizer": optimizer}
    checkpointer.restore(state)
    for step in (1, 2):
        checkpointer.save(step, state).wait("staged", timeout_s=120)
    dist.barrier()
    print("{}", flush=True)


def _restore(chosen: Any) -> None:
    import torch
    import torch.distributed as dist

    import mtckpt

    model, optimizer, _ = _trainer(chosen.kind, chosen.size_mib)
    own_bytes = _own_bytes(model)
    checkpointer = mtckpt.Checkpointer(chosen.saved, [mtckpt.Ram(every=1)], max_stall_s=60)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before_bytes = measuring.memory_bytes("VmRSS")
    before_s, started_s = time.process_time(), time.perf_counter()
    restored = checkpointer.restore({"model": model, "optimizer": optimizer})
    cpu_s = time.process_time() - before_s
    dist.barrier()
    restore_s = time.perf_counter() - started_s
    peak = 1 + (measuring.memory_bytes("VmHWM") - before_bytes) / own_bytes
    if restored.step != 2 or set(restored.sources) != {"ram"}:
        sys.exit(f"{restored!r}: not from RAM")
    with torch.no_grad():
        if not all(
            torch.equal(local, value.to(local.dtype)) for local, value in _boxes(model, optimizer)
        ):
            sys.exit("other bytes than were saved")
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (peak, cpu_s))
    dist.barrier()
    if dist.get_rank() == 0:
        found = {
            "restore_s": restore_s,
            "peaks": [each for each, _ in told],
            "cpu_s": sum(each for _, each in told),
            "state_bytes": own_bytes * dist.get_world_size(),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
