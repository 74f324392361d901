"""Train a small GPT on the sources of Python's standard library.

Real text that is on every machine, byte by byte, on one CPU core. Everything that decides the
result is fixed, so two runs end with the same parameters, bit for bit. There are two of these
scripts, train_plain.py and train_gpt.py: the second one survives being killed.
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import mtckpt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes
CONTEXT = 64
BATCH = 2
WIDTH = 128
HEADS = 4
BLOCKS = 3
TEXT_BYTES = 4 * 1024 * 1024


class Block(nn.Module):
    """Attention, then two layers, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, HEADS, width // HEADS)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out. The embedding is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Loader:
    """Windows of the text, in a new random order every pass. Knows where it stands."""

    def __init__(self, text: Tensor, seed: int) -> None:
        self.text, self.seed = text, seed
        self.load_state_dict({"epoch": 0, "index": 0})

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.index + BATCH > len(self.order):
            self.load_state_dict({"epoch": self.epoch + 1, "index": 0})
        starts = self.order[self.index : self.index + BATCH].tolist()
        self.index += BATCH
        windows = torch.stack([self.text[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in starts])
        return windows[:, :-1].long(), windows[:, 1:].long()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.order = torch.randperm((len(self.text) - 1) // CONTEXT, generator=generator)


def read_text() -> Tensor:
    """The standard library's modules, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8)


def train_step(model: nn.Module, optimizer: Any, lr: Any, batch: tuple[Tensor, Tensor]) -> float:
    tokens, targets = batch
    loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    lr.step()
    return loss.item()


@contextmanager
def open_losses(out: Path) -> Iterator[TextIO]:
    """One line a step, written at once: a kill loses none."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "losses.tsv").open("a", buffering=1) as file:
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own sources.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="losses and parameters")
    parser.add_argument("--store", help="URL of an object store that gets every 50th step")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * 0.998**s)
    data = Loader(read_text(), args.seed)

    state = {"model": model, "optimizer": optimizer, "lr": lr, "data": data, "rng": mtckpt.rng()}
    store = args.store and mtckpt.ObjectStore(args.store, every=50)
    tiers = [mtckpt.Ram(), mtckpt.Disk("checkpoints"), store] if store else None
    with open_losses(args.out) as losses, mtckpt.Checkpointer("gpt-small", tiers) as checkpointer:
        restored = checkpointer.restore(state)
        for step in range(restored.next_step, args.steps):
            loss = train_step(model, optimizer, lr, next(data))
            print(step, loss, sep="\t", file=losses)
            if step % 10 == 0 or step + 1 == args.steps:
                print(f"step {step:5d}  loss {loss:.4f}", flush=True)
            checkpointer.save(step, state)

    save_file(dict(model.named_parameters()), args.out / "parameters.safetensors")


if __name__ == "__main__":
    main()
