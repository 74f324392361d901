"""A rank under torchrun: states saved and loaded by ``torch.distributed.checkpoint`` through tiers.

    torchrun --nproc-per-node N tests/dcp_ranks.py COMMAND DIRECTORY

What holds is asserted here, on every rank; the test looks at the exit status and the output.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch_ranks import Net, build, contents, open_run, say, train

from mtckpt.adapters.torch.dcp import Reader, Writer
from mtckpt.errors import UnsupportedState

dcp: Any = importlib.import_module("torch.distributed.checkpoint")
TALL = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)  # uneven over 2, 3 and 4
LARGE = torch.arange(300_000, dtype=torch.float32)  # divided among the ranks that hold it
KINDS = ("ddp", "fsdp", "tp_fsdp")
FOUR = (("ddp", "tp_fsdp"), ("tp_fsdp", "fsdp"))
TWO = (("tp_fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp"))
NAMES = ("rows", "columns", "grid", "replicated")


def layouts() -> dict[str, Any]:
    """One array in every layout that this number of ranks has."""
    ranks = dist.get_world_size()
    line = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, ranks // 2) if ranks > 1 else (1, 1))
    return {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "grid": (square, [Shard(1), Shard(0)]),
        "replicated": (square, [Replicate(), Shard(0)]),
    }


def arrays(factor: float) -> dict[str, Any]:
    return {
        name: distribute_tensor(TALL * factor, mesh, placements)
        for name, (mesh, placements) in layouts().items()
    }


def half(tensor: torch.Tensor) -> Any:
    """Over the first two ranks: the others have no part in it."""
    ranks = list(range(min(2, dist.get_world_size())))
    return distribute_tensor(tensor, DeviceMesh("cpu", ranks), [Shard(0)])


def plain_state(factor: float) -> dict[str, Any]:
    rank = dist.get_rank()
    state = {
        "arrays": arrays(factor),
        "large": LARGE * factor,
        "nested": {"list": [1, {"t": torch.ones(3) * factor}], "pair": (factor, b"x"), "text": "a"},
        "numpy": {"array": np.arange(5) * factor, "number": np.float64(factor)},
        "pair": half(TALL * factor),  # of two ranks
        f"stage{rank}": {"w": torch.full((4,), rank * factor), "rank": rank},
    }
    if rank < 2:  # held by some ranks, not by all
        state["some"] = torch.full((200_000,), factor)
    return state


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_plain(directory: Path) -> None:
    dcp.save(plain_state(1.0), checkpoint_id=directory / "foreign/step-1")  # DCP's own
    with open_run(directory, "plain") as checkpointer:
        dcp.save(plain_state(1.0), storage_writer=Writer(checkpointer, 1))
        state = plain_state(2.0)
        saving = dcp.async_save(state, storage_writer=Writer(checkpointer, 2))
        state["large"].zero_()
        state["arrays"]["rows"].to_local().zero_()
        saving.result(timeout=40)
        state = plain_state(3.0)
        if dist.get_rank() == 1:
            state["odd"] = object()
        try:
            dcp.async_save(state, storage_writer=Writer(checkpointer, 3))
            raise AssertionError("it was saved")
        except UnsupportedState as error:
            say(f"refused: {error.what}")
        assert [each.step for each in checkpointer.steps()][-2:] == [1, 2]
        dist.barrier()


def load_plain(directory: Path) -> None:
    """On any number of ranks: every key, those that one rank had saved too."""
    with open_run(directory, "plain") as checkpointer:
        for step in (1, 2):
            state: dict[str, Any] = {
                "arrays": arrays(0),
                "large": torch.zeros_like(LARGE),
                "nested": {"list": [0, {"t": torch.zeros(3)}], "pair": 0, "text": ""},
                "numpy": {"array": None, "number": None},
                "pair": half(TALL * 0),
                "some": torch.zeros(200_000),
            }
            for rank in range(4):
                state[f"stage{rank}"] = {"w": torch.zeros(4), "rank": -1}
            reader = Reader(checkpointer, step)
            dcp.load(state, storage_reader=reader)
            assert reader.step == step
            for name, value in state["arrays"].items():
                assert torch.equal(whole(value), TALL * step), name
            assert torch.equal(state["large"], LARGE * step)
            assert np.array_equal(state["numpy"]["array"], np.arange(5) * float(step))
            assert state["numpy"]["number"] == step
            if state["pair"].device_mesh.get_coordinate() is not None:
                assert torch.equal(whole(state["pair"]), TALL * step)
            assert torch.equal(state["some"], torch.full((200_000,), float(step)))
            assert torch.equal(state["nested"]["list"][1]["t"], torch.ones(3) * step)
            assert state["nested"]["pair"] == (float(step), b"x")
            for rank in range(4):
                stage = state[f"stage{rank}"]
                assert torch.equal(stage["w"], torch.full((4,), float(rank * step))), stage
                assert stage["rank"] == rank
        full: dict[str, Any] = {
            "pair": torch.zeros_like(TALL),
            "arrays": {name: torch.zeros_like(TALL) for name in NAMES},
        }
        dcp.load(full, storage_reader=Reader(checkpointer))
        for value in (full["pair"], *full["arrays"].values()):
            assert torch.equal(value, TALL * 2)
        say("loaded plain")


def fsdp1(net: Net) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"))


def save_models(directory: Path) -> None:
    """Every kind of parallelism, by ``get_state_dict``."""
    for kind in KINDS:
        model, optimizer = build(kind, 1)
        for step in range(2):
            train(model, optimizer, step)
        with open_run(directory, kind) as checkpointer:
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.async_save(parts, storage_writer=Writer(checkpointer, 3)).result(timeout=40)
        before = contents(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(before, directory / f"{kind}.pt")
        dist.barrier()


def load_models(directory: Path) -> None:
    """Each kind into another, and into itself."""
    pairs = FOUR if dist.get_world_size() >= 4 else TWO
    for source, kind in pairs:
        before = torch.load(directory / f"{source}.pt")
        model, optimizer = build(kind, 2)
        with open_run(directory, source) as checkpointer:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, storage_reader=Reader(checkpointer))
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        after = contents(model, optimizer)
        assert after.keys() == before.keys(), (source, kind, after.keys() ^ before.keys())
        for name, value in before.items():
            assert torch.equal(after[name], value), (source, kind, name)
        train(model, optimizer, 3)
        say(f"{source} into {kind}")


def first_fsdp(directory: Path) -> None:
    """ShardedTensors. (Where a rank has no shard of one, ``dcp.load`` itself finds no keys.)"""
    states: list[dict[str, Any]] = []
    with open_run(directory, f"fsdp1-{dist.get_world_size()}") as checkpointer:
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = fsdp1(Net())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            train(model, optimizer, seed)
            model_state, optimizer_state = get_state_dict(model, optimizer)
            assert {type(v).__name__ for v in model_state.values()} == {"ShardedTensor", "Tensor"}
            states.append({"model": model_state, "optimizer": optimizer_state})
        before, after = states
        checkpointer.save(0, before, tiers="all").wait("local")
        assert checkpointer.restore(states[1], step=0).step == 0
        compare_shards(before, after)
        for value in shards_of(after).values():
            value.zero_()
        if dist.get_world_size() > 3:  # the last rank has no shard of the 3 rows of a bias
            say("restored fsdp1")
            return
        dcp.save(before, storage_writer=Writer(checkpointer, 1))
        dcp.async_save(before, storage_writer=Writer(checkpointer, 2)).result(timeout=40)
        for step in (1, 2):
            dcp.load(after, storage_reader=Reader(checkpointer, step))
            compare_shards(before, after)
        whole_weight: dict[str, Any] = {"model": {"first.weight": torch.zeros(302, 16)}}
        dcp.load(whole_weight, storage_reader=Reader(checkpointer))
        mine = before["model"]["first.weight"].local_shards()[0]
        first = mine.metadata.shard_offsets[0]
        found = whole_weight["model"]["first.weight"][first : first + len(mine.tensor)]
        assert torch.equal(found, mine.tensor)
    say("loaded fsdp1")


def compare_shards(before: Any, after: Any) -> None:
    compared = 0
    for name, value in shards_of(before).items():
        if "running" in name:
            continue  # each rank has its own, and DCP keeps one of them
        assert torch.equal(value, shards_of(after)[name]), name
        compared += 1
    assert compared > 10


def shards_of(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        name = f"{prefix}.{key}"
        if hasattr(value, "local_shards"):
            found.update({f"{name}@{i}": s.tensor for i, s in enumerate(value.local_shards())})
        elif isinstance(value, torch.Tensor):
            found[name] = value
        else:
            found.update(shards_of(value, name))
    return found


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
