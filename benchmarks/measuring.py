"""What all benchmarks share: states of known bytes, limits, places of their own, rows of figures.

A row is one JSON line. A figure stands next to a limit that was measured between its own rounds,
so the ratio is of the same minutes. Nothing here knows how mtckpt works.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
BLOCK_ITEMS = 1 << 18
CHILD_TIMEOUT_S = 300.0
_PACKAGES = (
    "mtckpt",
    "torch",
    "safetensors",
    "numpy",
    "msgspec",
    "xxhash",
    "aiohttp",
    "jax",
    "orbax-checkpoint",
)


# -- options ---------------------------------------------------------------------------------------


def options(description: str | None, **more: Any) -> argparse.Namespace:
    """``--size-mib``, ``--rounds`` and what else a script has, with their defaults."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    for name, default in {"size_mib": 1024, "rounds": 7, **more}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


# -- states ----------------------------------------------------------------------------------------


def gpt_state(size_mib: int) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and Adam's moments of a GPT of 8 layers: 300 float32 tensors, touched."""
    import torch

    items = size_mib * MIB // 4 // 3
    width = max(8, int((items * 0.86 / 96) ** 0.5) // 8 * 8)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(8):
        block = f"h.{layer}."
        for name, rows in (("qkv", 3 * width), ("proj", width), ("up", 4 * width)):
            shapes[f"{block}{name}.weight"] = (rows, width)
            shapes[f"{block}{name}.bias"] = (rows,)
        shapes[f"{block}down.weight"] = (width, 4 * width)
        shapes[f"{block}down.bias"] = (width,)
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    shapes["wpe"] = (1024 if size_mib >= 64 else 8, width)
    used = sum(_items(shape) for shape in shapes.values())
    shapes["wte"] = (max(1, (items - used) // width), width)
    return {
        part: {name: torch.full(shape, -1.0) for name, shape in shapes.items()}
        for part in ("model", "exp_avg", "exp_avg_sq")
    }


def small_state(count: int) -> dict[str, torch.Tensor]:
    """``count`` float32 tensors of 1 to 16 KiB, touched."""
    import torch

    return {f"t{i:05}": torch.full((256 * (1 + i % 16),), -1.0) for i in range(count)}


def make_state(kind: str, size: int) -> Any:
    """The state that a child process has to build again: ``gpt`` (MiB) or ``small`` (tensors)."""
    return gpt_state(size) if kind == "gpt" else small_state(size)


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state]


def _items(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _expected(index: int, items: int, salt: int, block: torch.Tensor) -> torch.Tensor:
    part = block[:items] + float(index * 7 + salt)
    return part if items <= BLOCK_ITEMS else part.repeat(-(-items // BLOCK_ITEMS))[:items]


def _block() -> torch.Tensor:
    import torch

    return torch.rand(BLOCK_ITEMS, generator=torch.Generator().manual_seed(7))


def fill(state: Any, salt: int) -> None:
    """Give every tensor values that any process can make again."""
    block = _block()
    for index, tensor in enumerate(tensors_of(state)):
        tensor.view(-1).copy_(_expected(index, tensor.numel(), salt, block))


def same(state: Any, salt: int) -> bool:
    """True if every tensor has exactly the values that ``fill`` gave it."""
    import torch

    block = _block()
    return all(
        torch.equal(tensor.view(-1), _expected(index, tensor.numel(), salt, block))
        for index, tensor in enumerate(tensors_of(state))
    )


# -- limits ----------------------------------------------------------------------------------------


class Memcpy:
    """One warm copy of the bytes of a state, one thread, into memory that was touched before."""

    def __init__(self, state: Any) -> None:
        import torch

        self._parts = [(t.data_ptr(), t.nbytes) for t in tensors_of(state)]
        self.size_bytes = sum(size for _, size in self._parts)
        self._target = torch.full((self.size_bytes,), 1, dtype=torch.uint8)
        self()

    def __call__(self) -> float:
        target = self._target.data_ptr()
        started_s = time.perf_counter()
        for address, size_bytes in self._parts:
            ctypes.memmove(target, address, size_bytes)
            target += size_bytes
        return time.perf_counter() - started_s


class TmpfsWrite:
    """The bytes of a state written to a tmpfs file whose pages are there already."""

    def __init__(self, state: Any, directory: str) -> None:
        self._views = [
            memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))
            for t in tensors_of(state)
            if t.nbytes
        ]
        self._fd = os.open(f"{directory}/limit", os.O_RDWR | os.O_CREAT, 0o600)
        self()

    def __call__(self) -> float:
        started_s = time.perf_counter()
        os.lseek(self._fd, 0, os.SEEK_SET)
        for first in range(0, len(self._views), 512):
            os.writev(self._fd, self._views[first : first + 512])
        return time.perf_counter() - started_s

    def close(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


# -- places and processes --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Directories of one benchmark: the agent's, RAM slots, and one on a disk."""

    runtime: str
    ram: str
    disk: str

    def agent_pids(self) -> list[int]:
        """The agent and its data processes: whatever was started with this runtime directory."""
        needle = b"MTCKPT_RUNTIME_DIR=" + os.fsencode(self.runtime)
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if b"mtckpt.agent" not in (path / "cmdline").read_bytes():
                    continue
                if needle in (path / "environ").read_bytes().split(b"\0"):
                    pids.append(int(path.name))
            except OSError:
                continue  # gone meanwhile, or not ours
        return pids

    def kill_agent(self) -> None:
        for pid in self.agent_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 5
        while self.agent_pids() and time.monotonic() < deadline_s:
            time.sleep(0.01)


@contextlib.contextmanager
def places() -> Iterator[Places]:
    """Fresh directories, in this process's environment too; afterwards nothing of them is left."""
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    where = Places(
        tempfile.mkdtemp(prefix="mtb-"),
        tempfile.mkdtemp(prefix="mtb-", dir=shm),
        tempfile.mkdtemp(prefix="mtb-", dir=os.environ.get("MTCKPT_BENCH_DISK")),
    )
    os.environ["MTCKPT_RUNTIME_DIR"], os.environ["MTCKPT_RAM_DIR"] = where.runtime, where.ram
    failed = False
    try:
        yield where
    except BaseException:
        failed = True
        traceback.print_exc()
    finally:
        where.kill_agent()
        for directory in (where.runtime, where.ram, where.disk):
            shutil.rmtree(directory, ignore_errors=True)
    if failed:
        os._exit(1)  # closing an open run at exit would start an agent again, in no directory


def child(*arguments: str, check: bool = True) -> str:
    """Run ``python -m arguments`` in a process of its own; returns what it printed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        timeout=CHILD_TIMEOUT_S,
        text=True,
    )
    if check and done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: status {done.returncode}")
    return done.stdout


def memory_bytes(what: str) -> int:
    """Of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


# -- rows ------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to know of this machine, and how busy it is right now."""
    model = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(median(samples), 7),
        "min": round(min(samples), 7),
        "max": round(max(samples), 7),
    }


def row(figure: str, samples: Sequence[float], **how: Any) -> None:
    """Print one figure with the machine and the versions: see ``line``."""
    made = line(figure, samples, **how)
    print(json.dumps({**made, "machine": machine(), "versions": versions()}), flush=True)


def line(
    figure: str,
    samples: Sequence[float],
    *,
    unit: str = "s",
    limit: Sequence[float] = (),
    limit_name: str = "memcpy",
    goal: str = "",
    of_limit: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Return one figure. ``goal`` is ``"ratio <= 1.25"`` or ``"value <= 0.1"``.

    The ratio is of the medians, figure by limit (``of_limit``: limit by figure, for throughput).
    """
    made: dict[str, Any] = {"figure": figure, "unit": unit, **_spread(samples), "n": len(samples)}
    if limit:
        made["limit"] = {"name": limit_name, **_spread(limit)}
        ratio = median(samples) / median(limit)
        made["ratio"] = round(1 / ratio if of_limit else ratio, 3)
    if goal:
        what, relation, bound = goal.split()
        found = made["ratio"] if what == "ratio" else made["median"]
        made["goal"] = goal
        made["met"] = found <= float(bound) if relation == "<=" else found >= float(bound)
    return {**made, **more}


def settle(seconds: float = 0.1) -> None:
    """Between rounds: what runs in the background after a save gets done, as it would in a step."""
    time.sleep(seconds)


def quietly(call: Callable[[], object]) -> float:
    """Seconds that ``call`` takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s
