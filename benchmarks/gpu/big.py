"""A state that fills much of the device's memory, steps of a second: what a save costs then.

The goals are stated for ``--fraction 0.6`` and a save every 20 steps. The default is a quarter of
the device's memory and blocks of 6 steps: two slots have to fit in the host's memory, and a run
stays short. What a save costs does not depend on how many steps follow it, as long as it is over.
The limit is what the bytes take at the rate of a copy into a registered tmpfs file.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import measuring
from benchmarks.gpu.bench import GIB, Bench, Skipped, mounted_huge, opened, ram, saved
from benchmarks.gpu.pinned import pinned

if TYPE_CHECKING:
    from collections.abc import Callable

_STEPS = 6
_AT = 1
_PAIRS = 2
_WIDTH = 4096
_STEP_S = 1.0
_GOALS = {"blocking": "ratio <= 1.05", "overlap": "ratio <= 0.1", "": ""}


def measure(bench: Bench) -> None:
    memory_bytes = 256 * measuring.MIB
    if bench.on_gpu:
        memory_bytes = torch.cuda.get_device_properties(0).total_memory
    size_bytes = int(memory_bytes * bench.chosen.fraction)
    trainer = Big(bench, size_bytes)
    limit_s = _limit_s(bench, trainer.size_bytes)
    for mode in _GOALS:
        name = f"big state, {mode or 'as it comes'}: lost per save"
        bench.attempt(
            name, _mode, bench, name, trainer, mode, limit_s, needs_s=20 if bench.on_gpu else 1
        )


class Big:
    """Square matrices with AdamW, and products that fill the step up to a second."""

    def __init__(self, bench: Bench, size_bytes: int) -> None:
        width = _WIDTH if bench.on_gpu else 64
        count = max(1, size_bytes // (3 * 4 * width * width))
        self.size_bytes = count * 3 * 4 * width * width
        make = partial(torch.randn, width, width, device=bench.device)
        self.parameters = [torch.nn.Parameter(make()) for _ in range(count)]
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self._batch = torch.randn(64, width, device=bench.device)
        side = 8192 if bench.on_gpu else 64
        self._filler = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
        self._products = 0
        for _ in range(2):
            self.step()
        if bench.on_gpu:
            self._products = self._calibrated(bench)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(((self._batch @ one).square().mean() for one in self.parameters), start=0.0)
        assert isinstance(loss, torch.Tensor)
        for _ in range(self._products):
            torch.mm(self._filler, self._filler)
        torch.autograd.backward([loss])
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"parameters": list(self.parameters), "optimizer": self.optimizer}

    def _calibrated(self, bench: Bench) -> int:
        """How many products fill a step up to a second."""
        bench.sync()
        bare_s = measuring.quietly(lambda: self._timed(bench, self.step))
        product_s = self._timed(bench, lambda: [self._filler @ self._filler for _ in range(20)])
        return max(0, int((_STEP_S - bare_s) / (product_s / 20)))

    def _timed(self, bench: Bench, call: Callable[[], object]) -> float:
        bench.sync()
        started_s = time.perf_counter()
        call()
        bench.sync()
        return time.perf_counter() - started_s


def _limit_s(bench: Bench, size_bytes: int) -> float:
    part_bytes = min(size_bytes, 2 * GIB)
    source = torch.zeros(part_bytes, dtype=torch.uint8, device=bench.device)
    with pinned(bench, os.environ["MTCKPT_RAM_DIR"], part_bytes) as slot:
        took = []
        for _ in range(4):
            bench.sync()
            started_s = time.perf_counter()
            slot.tensor.copy_(source, non_blocking=True)
            bench.sync()
            took.append(time.perf_counter() - started_s)
    return min(took) * size_bytes / part_bytes


def _mode(bench: Bench, name: str, trainer: Big, mode: str, limit_s: float) -> None:
    ram(mode)  # before anything is mounted for a mode that is not there
    try:
        with mounted_huge(int(2.2 * trainer.size_bytes)) as directory:
            _in(bench, name, trainer, mode, limit_s, directory)
    except Skipped:
        _in(bench, name, trainer, mode, limit_s, os.environ["MTCKPT_RAM_DIR"])


def _in(bench: Bench, name: str, trainer: Big, mode: str, limit_s: float, directory: str) -> None:
    steps = itertools.count(1)
    lost: list[float] = []
    blocked: list[float] = []
    peaks: dict[bool, int] = {}
    with opened(ram(mode, path=directory), f"big-{mode or 'auto'}") as checkpointer:

        def save() -> Any:
            return saved(checkpointer, next(steps), trainer.state())

        for _ in range(2):
            save().wait("staged", timeout_s=120)
        for pair in range(min(_PAIRS, bench.rounds)):
            took = {}
            for saving in (pair % 2 == 0, pair % 2 == 1):
                started_s = time.perf_counter()
                peaks[saving] = _block(bench, trainer, save if saving else None, blocked)
                took[saving] = time.perf_counter() - started_s
            lost.append(took[True] - took[False])
            if bench.left_s() < 2.5 * sum(took.values()):
                break
    facts: dict[str, Any] = {"size_bytes": trainer.size_bytes, "fraction": bench.chosen.fraction}
    how = {"limit": [limit_s], "limit_name": "its bytes into registered tmpfs"}
    bench.row(name, lost, goal=_GOALS[mode], **how, **facts)
    bench.row(f"{name}: save() blocks", blocked)
    if bench.on_gpu:
        more = [max(0, peaks[True] - peaks[False]) / measuring.MIB]
        goal = "value <= 64" if mode == "overlap" else ""
        bench.row(f"{name}: device memory", more, unit="MiB", goal=goal)


def _block(bench: Bench, trainer: Big, save: Callable[[], Any] | None, blocked: list[float]) -> int:
    """Some steps, one save among them; returns the most device memory that was in use."""
    last = None
    with _Watched(bench) as watched:
        for number in range(_STEPS):
            trainer.step()
            if save is not None and number == _AT:
                started_s = time.perf_counter()
                last = save()
                blocked.append(time.perf_counter() - started_s)
        bench.sync()
        if last is not None:
            last.wait("staged", timeout_s=120)
    return watched.most_bytes


class _Watched:
    """Samples what of the device's memory is in use, whoever took it."""

    def __init__(self, bench: Bench) -> None:
        self.most_bytes = 0
        self._on_gpu = bench.on_gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> _Watched:
        if self._on_gpu:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._on_gpu:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.most_bytes = max(self.most_bytes, total - free)
