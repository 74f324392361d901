"""A rank under torchrun: FSDP1 modules put directly in a state, saved and restored crosswise.

    torchrun --nproc-per-node N tests/fsdp1_ranks.py COMMAND DIRECTORY

What torch itself gathers of a module and its optimizer is held against what was restored. What
holds is asserted here, on every rank; the test looks at the exit status and the output.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch_ranks import Net, ddp, fsdp, mesh_of, open_run, say, train

from mtckpt.errors import UnsupportedState

CPU = torch.device("cpu")
# FSDP1 says that it is deprecated, and much about what it is asked to gather here.
warnings.simplefilter("ignore")


def flat(net: Net) -> nn.Module:
    """Flat parameters; the first layer in one of its own, all else in the root's."""
    net.first = FullyShardedDataParallel(net.first, device_id=CPU)  # type: ignore[assignment]
    return FullyShardedDataParallel(net, device_id=CPU)


def pieces(net: Net) -> nn.Module:
    """Pieces of parameters, within a module that is no FSDP; the norm is whole on every rank."""
    for name, strategy in (
        ("first", ShardingStrategy.FULL_SHARD),
        ("second", ShardingStrategy.SHARD_GRAD_OP),
        ("norm", ShardingStrategy.NO_SHARD),
    ):
        part = FullyShardedDataParallel(
            getattr(net, name), device_id=CPU, use_orig_params=True, sharding_strategy=strategy
        )
        setattr(net, name, part)
    return net


def hybrid(net: Net) -> nn.Module:
    """Sharded over pairs of ranks, each piece on two; given a mesh."""
    return FullyShardedDataParallel(
        net,
        device_id=CPU,
        use_orig_params=True,
        device_mesh=mesh_of(2, dist.get_world_size() // 2),
        sharding_strategy=ShardingStrategy._HYBRID_SHARD_ZERO2,
    )


KINDS: dict[str, Callable[[Net], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "flat": flat,
    "pieces": pieces,
    "hybrid": hybrid,
}
FOUR = (
    *(("flat", "flat"), ("flat", "hybrid"), ("hybrid", "pieces")),
    *(("pieces", "fsdp"), ("fsdp", "flat")),
)
TWO = (("flat", "pieces"), ("hybrid", "flat"), ("pieces", "ddp"))


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = KINDS[kind](Net())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and moments, whole, by name. All ranks call it."""
    options = StateDictOptions(full_state_dict=True)
    parameters, others = get_state_dict(model, optimizer, options=options)
    found = {
        name: value.clone()
        for name, value in parameters.items()
        if isinstance(value, torch.Tensor) and "running" not in name and "num_batches" not in name
    }
    state: Any = others["state"]
    for name, entry in state.items():
        found.update({f"{name}:{moment}": value.clone() for moment, value in entry.items()})
    return found


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def save(directory: Path) -> None:
    """Save each kind before the first step of its optimizer and after, by one plan and the next."""
    for kind in ("fsdp", "flat", "pieces", "hybrid"):
        model, optimizer = build(kind, 1)
        state = {"model": model, "optimizer": optimizer}
        with open_run(directory, kind) as checkpointer:
            checkpointer.save(0, state, tiers="all").wait("staged")
            train(model, optimizer, 0)
            checkpointer.save(1, state).wait("staged")
            train(model, optimizer, 1)
            before = gathered(model, optimizer)
            checkpointer.save(2, state).wait("local")
        torch.save(buffers(model), directory / f"{kind}-{dist.get_rank()}-buffers.pt")
        train(model, optimizer, 2)
        after = gathered(model, optimizer)
        if dist.get_rank() == 0:
            torch.save((before, after), directory / f"{kind}.pt")
        dist.barrier()


def load(directory: Path) -> None:
    """Into fresh optimizers, and into one whose moments are filled in place."""
    is_whole = dist.get_world_size() >= 4
    for source, kind in FOUR if is_whole else TWO:
        before, after = torch.load(directory / f"{source}.pt")
        model, optimizer = build(kind, 2)
        if source == kind or kind == "hybrid":
            train(model, optimizer, 7)
        model.eval()
        model(torch.ones(2, 16))  # a copy of all may be kept from here on: it is let go of
        model.train()
        with open_run(directory, f"{source}-into-{kind}") as checkpointer:
            restored = checkpointer.restore(
                {"optimizer": optimizer, "model": model}, source=directory / "disk" / source
            )
            assert restored.step == 2
        own = torch.load(directory / f"{source}-{dist.get_rank()}-buffers.pt")
        assert all(map(torch.equal, buffers(model), own)), (source, kind)
        compare(before, gathered(model, optimizer), (source, kind))
        train(model, optimizer, 2)
        found = gathered(model, optimizer)
        if source != kind or not is_whole:  # other sums; but each parameter has made one step
            after, found = (
                {name: value for name, value in each.items() if name.endswith(":step")}
                for each in (after, found)
            )
            assert found
        compare(after, found, (source, kind))
        say(f"{source} into {kind}")


def compare(before: Any, after: Any, pair: tuple[str, str]) -> None:
    assert after.keys() == before.keys(), (pair, after.keys() ^ before.keys())
    for name, value in before.items():
        assert torch.equal(after[name], value), (pair, name)


def refused(directory: Path) -> None:
    """An optimizer alone."""
    model, optimizer = build("pieces", 1)
    with open_run(directory, "refused") as checkpointer:
        try:
            checkpointer.save(0, {"optimizer": optimizer}, tiers="all")
            raise AssertionError("it was saved")
        except UnsupportedState as error:
            say(f"refused: {error.what}")
        state = {"model": model, "optimizer": optimizer}
        checkpointer.save(1, state, tiers="all").wait("staged")


def main() -> None:
    commands, directory = sys.argv[1].split(","), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for command in commands:
            globals()[command](Path(directory))
            dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
