"""A rank under torchrun: small models in every kind of parallelism, saved and restored crosswise.

    torchrun --nproc-per-node N tests/torch_ranks.py COMMAND DIRECTORY [ARGUMENTS]

What holds is asserted here, on every rank; the test looks at the exit status and the output.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mtckpt
from mtckpt.errors import CheckpointError, RankTimeout, SaveFailed

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


def say(text: str) -> None:
    """One line, in one piece: other ranks write to the same pipe."""
    os.write(1, f"rank {dist.get_rank()}: {text}\n".encode())


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
            say(f"{source} into {kind}")


def matrix(directory: Path) -> None:
    """Every kind into every kind."""
    save_all(directory, *KINDS)
    restore_all(directory, *KINDS)


def stuck(directory: Path) -> None:
    """Rank 1 is stopped at the second save: the others are told who it is, and all go on."""
    model, optimizer = build("ddp", 4)
    state = {"model": model, "optimizer": optimizer}
    rank = dist.get_rank()
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    checkpointer = open_run(directory, "stuck")
    checkpointer.restore(state)
    checkpointer.save(1, state).wait("staged")
    for step in (2, 3, 4):
        if rank == 1 and step == 2:
            os.kill(pids[1], signal.SIGSTOP)
        said = "staged"
        try:
            save = checkpointer.save(step, state)
            try:
                save.wait("staged", timeout_s=30)
            except CheckpointError as error:
                cause = error.__cause__
                said = save.skipped or str(error)
                if isinstance(cause, RankTimeout):
                    said = f"RankTimeout of {cause.details['ranks']} at {cause.details['stage']}"
        except SaveFailed as error:
            said = f"SaveFailed: {error.what}"
        say(f"step {step}: {said}")
        if rank == 0 and step == 2:
            os.kill(pids[1], signal.SIGCONT)
        dist.barrier()
    checkpointer.close()


def main() -> None:
    command, directory, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        globals()[command](Path(directory), *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
