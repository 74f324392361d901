"""Train a small GPT with Flax NNX and Optax on a mesh of virtual devices, data x model.

The text is the sources of Python's standard library, byte by byte; eight devices on the CPU stand
for eight accelerators. Everything that decides the result is fixed, so two runs end with the same
parameters, bit for bit. There are two of these scripts, train_jax_plain.py and train_jax.py: the
second one survives being killed, and goes on where it was, on another mesh as well.
"""

from __future__ import annotations

import argparse
import logging
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import mtckpt
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

VOCABULARY = 256  # bytes
CONTEXT = 32
BATCH = 8
WIDTH = 64
HEADS = 4
BLOCKS = 2
TEXT_BYTES = 1024 * 1024


class Block(nnx.Module):
    """Attention, then two layers, each added to what came in."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.reshape(x.shape)))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class GPT(nnx.Module):
    """Bytes in, logits of the next byte out. The embedding is also the output layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (CONTEXT, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


class Loader:
    """Windows of the text, in a new random order every pass. Knows where it stands."""

    def __init__(self, text: np.ndarray, seed: int) -> None:
        self.text, self.seed = text, seed
        self.load_state_dict({"epoch": 0, "index": 0})

    def __next__(self) -> np.ndarray:
        if self.index + BATCH > len(self.order):
            self.load_state_dict({"epoch": self.epoch + 1, "index": 0})
        starts = self.order[self.index : self.index + BATCH]
        self.index += BATCH
        windows = [self.text[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in starts]
        return np.stack(windows).astype(np.int32)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        windows = (len(self.text) - 1) // CONTEXT
        self.order = np.random.default_rng(self.seed + self.epoch).permutation(windows)


def read_text() -> np.ndarray:
    """The standard library's modules, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return np.frombuffer(bytes(text[:TEXT_BYTES]), np.uint8)


def spread(model: nnx.Module, mesh: Mesh) -> None:
    """Divide the last axis of every large parameter among the devices of a model's copy."""

    def placed(leaf: jax.Array) -> jax.Array:
        divided = leaf.ndim > 1 and leaf.shape[-1] % mesh.shape["model"] == 0
        axes = (*[None] * (leaf.ndim - 1), "model") if divided else ()
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    nnx.update(model, jax.tree.map(placed, nnx.state(model)))


@nnx.jit
def train_step(model: nnx.Module, optimizer: Any, batch: jax.Array) -> jax.Array:
    def loss_of(model: nnx.Module) -> jax.Array:
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@contextmanager
def open_losses(out: Path) -> Iterator[TextIO]:
    """One line a step, written at once: a kill loses none."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "losses.tsv").open("a", buffering=1) as file:
        yield file


def parameters_of(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by its name, in memory of the host."""
    flat = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's own sources.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="4x2", help="devices for data x devices for the model")
    parser.add_argument("--out", type=Path, default=Path("out"), help="losses and parameters")
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    shape = tuple(map(int, args.mesh.split("x")))
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))
    model = GPT(nnx.Rngs(args.seed))
    spread(model, mesh)
    schedule = optax.warmup_exponential_decay_schedule(1e-4, 1e-3, 20, 100, 0.9)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    data = Loader(read_text(), args.seed)

    state = {"model": model, "optimizer": optimizer, "data": data}
    with open_losses(args.out) as losses, mtckpt.Checkpointer("gpt-jax") as checkpointer:
        restored = checkpointer.restore(state)
        for step in range(restored.next_step, args.steps):
            batch = jax.device_put(next(data), NamedSharding(mesh, PartitionSpec("data")))
            loss = float(train_step(model, optimizer, batch))
            print(step, loss, sep="\t", file=losses)
            if step % 10 == 0 or step + 1 == args.steps:
                print(f"step {step:5d}  loss {loss:.4f}", flush=True)
            checkpointer.save(step, state)

    save_file(parameters_of(model), args.out / "parameters.safetensors")


if __name__ == "__main__":
    main()
