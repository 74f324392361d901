"""One rank on a node of its own, told what to do by lines: what ``benchmarks.nodes`` starts.

It starts as a job's rank does: imports, joins the others through gloo, builds its state, restores
if it is to, and takes a step. Then it prints when it came to each of these, by the clock that all
processes of a machine share, and does what it is told: ``["save", 3, "replicated"]``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any, Literal

from benchmarks import measuring

SALT = 100
Kind = Literal["sharded", "ddp"]


class Trainer:
    """The verbs, one method each."""

    def __init__(
        self, world_size: int, size_mib: int, kind: Kind, restores: bool, store: str = ""
    ) -> None:
        self.reached = {"main": time.perf_counter()}
        import torch
        import torch.distributed as dist

        self._note("imported")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        self.rank = dist.get_rank()
        self._note("joined")
        self.held = measuring.gpt_state(max(1, size_mib // world_size)) if kind != "ddp" else {}
        self.state = _ddp(size_mib) if kind == "ddp" else _sharded(self.held, world_size)
        self._note("built")
        self.sources: dict[str, int] = {}
        self.restored: int | None = None
        self.checkpointer = self._restore(store) if restores else None
        self._note("restored")
        self._step()
        self._note("stepped")

    def _note(self, what: str) -> None:
        self.reached[what] = time.perf_counter()

    def _restore(self, store: str) -> Any:
        import mtckpt

        tiers: list[Any] = [mtckpt.Ram(every=1, slots=2), mtckpt.Peers(copies=1)]
        if store:
            tiers.append(mtckpt.ObjectStore(store, every=1, keep=2))
        checkpointer = mtckpt.Checkpointer("bench", tiers, max_stall_s=60)
        restored = checkpointer.restore(self.state)
        self.sources, self.restored = dict(restored.sources), restored.step
        return checkpointer

    def _step(self) -> None:
        """Every value is touched, and nobody goes on before all have come so far."""
        import torch.distributed as dist

        for tensor in measuring.tensors_of(self.held):
            tensor.mul_(1.0)
        dist.barrier()

    def told(self) -> dict[str, Any]:
        """When it came to each part of its start, and what its restore took from where."""
        return {"reached": self.reached, "sources": self.sources, "step": self.restored}

    def fill(self) -> None:
        """Give the state values that a rank of another start can make again."""
        measuring.fill(self.held, SALT + self.rank)

    def same(self) -> bool:
        """Whether it has exactly these."""
        return measuring.same(self.held, SALT + self.rank)

    def save(self, step: int, *stages: Any) -> None:
        """A save, until it has come to all these stages."""
        assert self.checkpointer is not None
        save = self.checkpointer.save(step, self.state)
        for stage in stages:
            save.wait(stage, timeout_s=120)

    def state_bytes(self) -> int:
        """Of all tensors, as every rank of a wrapped module holds them."""
        optimizer = self.state["optimizer"].state_dict()["state"]
        values = [*self.state["model"].state_dict().values()]
        values += [value for each in optimizer.values() for value in each.values()]
        return sum(value.nbytes for value in values)


def _sharded(held: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Every tensor as this rank's rows of one that is so many times as long."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world_size,))
    return {
        part: {
            name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
            for name, tensor in tensors.items()
        }
        for part, tensors in held.items()
    }


def _ddp(size_mib: int) -> dict[str, Any]:
    """A wrapped module and its AdamW after one step, of so many MiB on every rank."""
    import torch
    from torch import nn

    width = max(64, int((size_mib * measuring.MIB / 4 / 3 / 4) ** 0.5))
    torch.manual_seed(1)
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    model = nn.parallel.DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, width)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def main() -> None:
    trainer = Trainer(**json.loads(sys.argv[1]))
    _say(trainer.told())
    for line in sys.stdin:
        verb, *words = json.loads(line)
        _say(getattr(trainer, verb)(*words))
    os._exit(0)  # as a job that is killed: closing would free the slots


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps({"ok": answer}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
