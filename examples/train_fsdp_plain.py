"""Train a small sharded model on the sources of Python's standard library, on several ranks.

    torchrun --nproc-per-node 2 examples/train_fsdp_plain.py

Real text that is on every machine, byte by byte. Everything that decides the result is fixed, so
two runs end with the same parameters, bit for bit. There are two of these scripts,
train_fsdp_plain.py and train_fsdp.py: the second one survives being killed.
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

VOCABULARY = 256  # bytes
CONTEXT = 32
BATCH = 16
WIDTH = 96
LAYERS = 3
TEXT_BYTES = 1024 * 1024


class Layer(nn.Module):
    """Two linear maps, added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """The last bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.inward = nn.Linear(8 * CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.inward(self.embedding(tokens).flatten(1))))


class Loader:
    """Windows of the text at random places, others on every rank. Knows where it stands."""

    def __init__(self, seed: int) -> None:
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_bytes()
        self.text = torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8)
        self.seed, self.position = seed, 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + self.position)
        self.position += 1
        starts = torch.randint(len(self.text) - CONTEXT, (BATCH,), generator=generator).tolist()
        windows = torch.stack([self.text[i : i + CONTEXT + 1] for i in starts]).long()
        return windows[:, :-1], windows[:, -1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train_step(model: nn.Module, optimizer: Any, lr: Any, batch: tuple[Tensor, Tensor]) -> float:
    tokens, targets = batch
    loss = functional.cross_entropy(model(tokens), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lr.step()
    return loss.item()


@contextmanager
def open_losses(out: Path) -> Iterator[TextIO]:
    """One line a step for each rank, written at once: a kill loses none."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"losses-{dist.get_rank()}.tsv").open("a", buffering=1) as file:
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small sharded model on several ranks.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="losses and parameters")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    model, mesh = Net(), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * 0.998**s)
    data = Loader(args.seed + dist.get_rank())

    with open_losses(args.out) as losses:
        for step in range(args.steps):
            loss = train_step(model, optimizer, lr, next(data))
            print(step, loss, sep="\t", file=losses)
            if dist.get_rank() == 0 and (step % 10 == 0 or step + 1 == args.steps):
                print(f"step {step:5d}  loss {loss:.4f}", flush=True)

    parameters = {name: part.full_tensor() for name, part in model.state_dict().items()}
    if dist.get_rank() == 0:
        save_file(parameters, args.out / "parameters.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
