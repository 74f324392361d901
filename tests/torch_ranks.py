"""A rank under torchrun: small models in every kind of parallelism, saved and restored crosswise.

    torchrun --nproc-per-node N tests/torch_ranks.py COMMAND DIRECTORY [ARGUMENTS]

What holds is asserted here, on every rank; the test looks at the exit status and the output.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mtckpt
from mtckpt.errors import CheckpointError

WIDTH = 302  # over 4 ranks uneven, and of the bias of 3 one shard is empty


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.second = nn.Linear(WIDTH, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.second(torch.relu(self.first(x))))
        return found


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def plain(net: Net) -> nn.Module:
    return net


def ddp(net: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def fsdp(net: Net) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in (net.first, net.second):
        fully_shard(part, mesh=mesh_of(dist.get_world_size()))
    fully_shard(net, mesh=mesh_of(dist.get_world_size()))
    return net


def hsdp(net: Net) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, dist.get_world_size() // 2)
    for part in (net.first, net.second):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def tp_fsdp(net: Net) -> nn.Module:
    """Columns of the first, rows of the second over one dimension, then sharded over the other."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = mesh_of(dist.get_world_size() // 2, 2)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(net, mesh["shard"], plan)
    fully_shard(net, mesh=mesh["replicate"])
    return net


KINDS: dict[str, Callable[[Net], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp_fsdp": tp_fsdp,
}


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = KINDS[kind](Net())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    optimizer.zero_grad()
    model(torch.randn(8, 16, generator=generator)).square().mean().backward()
    optimizer.step()


def full(value: Any) -> torch.Tensor:
    found = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()  # type: ignore[no-any-return]


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and moments, whole, by name. All ranks call it."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = full(parameter)
        for moment, value in sorted(optimizer.state[parameter].items()):
            found[f"{name}:{moment}"] = full(value)
    return found


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): buffer.clone() for name, buffer in model.named_buffers()}


def open_run(directory: Path, run: str) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(directory / "disk")]
    return mtckpt.Checkpointer(run, tiers, timeout_s=40, max_stall_s=20)


def save_all(directory: Path, *kinds: str) -> None:
    """Train in each kind, save, and note what was saved."""
    for kind in kinds:
        model, optimizer = build(kind, 1)
        for step in range(2):
            train(model, optimizer, step)
        with open_run(directory, kind) as checkpointer:
            assert not checkpointer.restore({"model": model, "optimizer": optimizer})
            state = {"model": model, "optimizer": optimizer}
            checkpointer.save(1, state).wait("local")
            train(model, optimizer, 2)
            before = contents(model, optimizer)
            checkpointer.save(2, state).wait("local")  # by the plan of the first
        rank = dist.get_rank()
        torch.save(buffers(model), directory / f"{kind}-{rank}-buffers.pt")
        if rank == 0:
            torch.save(before, directory / f"{kind}.pt")
        dist.barrier()


def restore_all(directory: Path, *saved: str) -> None:
    """Restore each of ``saved`` into every kind that this many ranks can build."""
    world_size = dist.get_world_size()
    for source in saved:
        before = torch.load(directory / f"{source}.pt")
        for kind in KINDS if world_size >= 4 else ("ddp", "fsdp"):
            model, optimizer = build(kind, 2)
            if kind == "hsdp":
                train(model, optimizer, 7)  # live moments are filled in place
            with open_run(directory, f"{source}-into-{kind}") as checkpointer:
                restored = checkpointer.restore(
                    {"model": model, "optimizer": optimizer}, source=directory / "disk" / source
                )
                assert restored.step == 2
                kept = buffers(model)
            after = contents(model, optimizer)
            assert after.keys() == before.keys(), (source, kind, after.keys() ^ before.keys())
            for name, value in before.items():
                assert torch.equal(after[name], value), (source, kind, name)
            own = torch.load(directory / f"{source}-{dist.get_rank()}-buffers.pt")
            for name, value in own.items():
                assert torch.equal(kept[name], value), (source, kind, name)
            train(model, optimizer, 3)
            print(f"rank {dist.get_rank()}: {source} into {kind}", flush=True)


def loop(directory: Path, kind: str, steps: str, kill_at: str) -> None:
    """Train with a checkpoint at each step; rank 1 is killed, or stopped, at one of them."""
    model, optimizer = build(kind, 3)
    state = {"model": model, "optimizer": optimizer, "rng": mtckpt.rng()}
    rank = dist.get_rank()
    with open_run(directory, "loop") as checkpointer:
        restored = checkpointer.restore(state)
        print(f"rank {rank}: from {restored.step} {sorted(restored.sources)}", flush=True)
        for step in range(restored.next_step, int(steps)):
            train(model, optimizer, step)
            torch.rand(3)
            save = checkpointer.save(step, state)
            if step == int(kill_at) and not restored and rank == 1:
                save.wait("staged")
                os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256()
    for name, value in sorted({**contents(model, optimizer), **buffers(model)}.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    print(f"rank {rank}: {digest.hexdigest()}", flush=True)


def stuck(directory: Path) -> None:
    """Rank 1 does not come to the second save: the others are told who it is, and go on."""
    model, optimizer = build("ddp", 4)
    state = {"model": model, "optimizer": optimizer}
    checkpointer = open_run(directory, "stuck")
    checkpointer.restore(state)
    checkpointer.save(1, state).wait("staged")
    if dist.get_rank() != 1:
        try:
            checkpointer.save(2, state).wait("staged", timeout_s=30)
        except CheckpointError as error:
            print(f"rank {dist.get_rank()}: {error.__cause__!r}", flush=True)
    dist.barrier()
    try:
        checkpointer.save(3, state)
    except CheckpointError as error:
        print(f"rank {dist.get_rank()}: {type(error).__name__}", flush=True)
    checkpointer.save(4, state).wait("staged")
    checkpointer.close()


def main() -> None:
    command, directory, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        globals()[command](Path(directory), *arguments)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("default")
    json.dumps(None)
    main()
