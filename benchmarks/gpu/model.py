"""The model that the training figures use: a GPT with AdamW, and its steps.

At its full size it has 10 layers of width 2048 (5.63 GiB of state, 360 tensors) and a step of about
64 ms on an H100: bf16 autocast, fused AdamW, 8 sequences of 1024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks import measuring

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

__all__ = ["Trainer"]

_HEAD = 128


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        out: torch.Tensor = x + self.mlp(self.norm_2(x))
        return out


class Trainer:
    """A model, its optimizer, and one batch that is used again and again."""

    def __init__(self, bench: Bench, size_mib: int, *, layers: int = 10) -> None:
        torch.manual_seed(bench.chosen.seed)
        width = int((size_mib * measuring.MIB / 144 / layers) ** 0.5) // 64 * 64
        self.device = bench.device
        width = max(64, width)
        with torch.device(bench.device):
            self.model = nn.Sequential(*[_Block(width) for _ in range(layers)])
            shape = (8, 1024, width) if bench.on_gpu else (1, 16, width)
            self.batch = torch.randn(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state, in an order that is always the same."""
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        for number, kept in enumerate(self.optimizer.state.values()):
            for name, value in kept.items():
                if torch.is_tensor(value):
                    found[f"optimizer.{number}.{name}"] = value
        return found
