"""What the hardware does at best: copies of each kind, allocation, registration.

Rows in GiB/s, one way. The host's side is measured with the pages that a RAM tier has: those of
/dev/shm, and huge ones where a tmpfs of its own may be mounted.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu.bench import GIB, Bench, mounted_huge
from benchmarks.gpu.pinned import pinned

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def measure(bench: Bench) -> None:
    size_bytes = bench.size_mib(2048) * measuring.MIB
    bench.attempt("device to device", _device, bench, size_bytes)
    ram = os.environ["MTCKPT_RAM_DIR"]
    bench.attempt("tmpfs", _tmpfs, bench, size_bytes, ram, "4 KiB pages")
    bench.attempt("tmpfs, huge pages", _huge, bench, size_bytes)
    bench.attempt("memcpy", _memcpy, bench, size_bytes)


def _rates(bench: Bench, size_bytes: int, copy: Callable[[], object]) -> list[float]:
    """GiB/s of several runs, after one that does not count."""
    rates = []
    for number in range(1 + max(1, min(5, bench.rounds))):
        bench.sync()
        started_s = time.perf_counter()
        copy()
        bench.sync()
        if number:
            rates.append(size_bytes / GIB / (time.perf_counter() - started_s))
    return rates


def _device(bench: Bench, size_bytes: int) -> None:
    import torch

    source = torch.empty(size_bytes, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    copy: Callable[[], object] = partial(target.copy_, source)
    bench.row("limit: device to device", _rates(bench, size_bytes, copy), unit="GiB/s")
    host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=bench.on_gpu)
    copy = partial(host.copy_, source, non_blocking=True)
    bench.row("limit: device to host, pinned", _rates(bench, size_bytes, copy), unit="GiB/s")
    copy = partial(target.copy_, host, non_blocking=True)
    bench.row("limit: host to device, pinned", _rates(bench, size_bytes, copy), unit="GiB/s")


def _huge(bench: Bench, size_bytes: int) -> None:
    with mounted_huge(size_bytes) as directory:
        _tmpfs(bench, size_bytes, directory, "huge pages")


def _tmpfs(bench: Bench, size_bytes: int, directory: str, pages: str) -> None:
    import torch

    source = torch.empty(size_bytes, dtype=torch.uint8, device=bench.device).random_()
    with pinned(bench, directory, size_bytes) as slot:
        gib = size_bytes / GIB

        def row(what: str, rates: list[float]) -> None:
            bench.row(f"limit: {what}, {pages}", rates, unit="GiB/s")

        row("fallocate in tmpfs", [gib / slot.allocate_s])
        if bench.on_gpu:
            row("register with the driver", [gib / slot.register_s])
        copy = partial(slot.tensor.copy_, source, non_blocking=True)
        row("device to registered tmpfs", _rates(bench, size_bytes, copy))
        copy = partial(source.copy_, slot.tensor, non_blocking=True)
        row("registered tmpfs to device", _rates(bench, size_bytes, copy))


def _memcpy(bench: Bench, size_bytes: int) -> None:
    import torch

    size_bytes = min(size_bytes, 2 * GIB)
    source = torch.ones(size_bytes, dtype=torch.uint8)
    target = torch.ones(size_bytes, dtype=torch.uint8)
    for threads in (1, 8, 16):
        with ThreadPoolExecutor(threads) as pool:
            parts = list(zip(target.chunk(threads), source.chunk(threads), strict=True))
            copy = partial(_copy_parts, pool, parts)
            rates = _rates(bench, size_bytes, copy)
        bench.row(f"limit: memcpy, {threads} threads", rates, unit="GiB/s")


def _copy_parts(pool: ThreadPoolExecutor, parts: list[tuple[Any, Any]]) -> None:
    list(pool.map(_copy_part, parts))


def _copy_part(part: tuple[torch.Tensor, torch.Tensor]) -> None:
    import ctypes

    target, source = part
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
