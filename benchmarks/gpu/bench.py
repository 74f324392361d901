"""What the GPU benchmarks share: a device, a budget of time, rows, states of known bits.

All of it runs on a CPU too (``--device cpu``): a dry run that shows that a script works; figures of
such a run say nothing. A figure that cannot be taken is a row with its reason, and the next one
goes on. Nothing here knows what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measuring

if TYPE_CHECKING:
    import torch

    import mtckpt

GIB = 1 << 30
RUN = "bench"
GPT_MIB = 5766  # 10 layers of width 2048 with Adam's moments: 5.63 GiB
_SALT = 1_000_003


class Skipped(Exception):
    """This figure cannot be taken here; says why."""


# -- one run ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """The options of a run. ``deadline_s`` is on the monotonic clock, ``failed`` counts rows."""

    device: str
    chosen: argparse.Namespace
    deadline_s: float
    failed: int = 0

    @property
    def rounds(self) -> int:
        return int(self.chosen.rounds)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def size_mib(self, usual: int = GPT_MIB) -> int:
        """``--size-mib``, or what the figure is defined for."""
        return int(self.chosen.size_mib or usual)

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def sync(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def row(self, figure: str, samples: Sequence[float], **how: Any) -> None:
        """Print one figure, as ``measuring.line`` makes it."""
        show(measuring.line(figure, samples, **how))

    def attempt(
        self, figure: str, measure: Callable[..., object], *arguments: Any, needs_s: float = 0.0
    ) -> None:
        """Run ``measure``; what it raises becomes a row, so that the next figure is taken."""
        if self.left_s() < needs_s:
            show({"figure": figure, "skipped": f"{self.left_s():.0f} s left, {needs_s:.0f} needed"})
            return
        try:
            measure(*arguments)
        except Skipped as why:
            show({"figure": figure, "skipped": str(why)})
        except (Exception, SystemExit) as error:
            # Whatever a framework or a device raises: one figure is lost, not those behind it.
            self.failed += 1
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            show({"figure": figure, "error": f"{type(error).__name__}: {error}"[:800]})
        self._collect()

    def _collect(self) -> None:
        """Give the memory of the last figure back to the device."""
        torch = sys.modules.get("torch")
        if self.on_gpu and torch is not None:
            gc.collect()
            torch.cuda.empty_cache()

    def arguments(self) -> list[str]:
        """The options again, for a process of this one's."""
        mine = vars(self.chosen) | {"device": self.device, "seconds": max(1.0, self.left_s())}
        skip = {"only", "role", "json"}
        return [f"--{k.replace('_', '-')}={v}" for k, v in mine.items() if k not in skip]


def show(row: Mapping[str, Any]) -> None:
    print(json.dumps(row), flush=True)


_OPTIONS: dict[str, Any] = {
    "device": "auto",  # cuda where there is one
    "size_mib": 0,  # 0: what each figure is defined for
    "rounds": 7,
    "seconds": 600.0,  # for the whole run
    "seed": 0,
    "tensors": 20_000,  # of `small`
    "kills": 4,
    "compile": 1,  # 0: `stress` compiles no step, which takes a minute
    "times": 100,  # saves and restores of `memory`
    "peers": 0,  # 1: those too
    "fraction": 0.25,  # of the device's memory, of `big`; the goals are stated for 0.6
    "only": "",
    "role": "",
    "where": "",  # of a process that another one starts
    "json": "",
}


def options(description: str | None, arguments: Sequence[str] | None = None) -> Bench | None:
    """Read the options; None, and a line that says so, where a device is wanted and none is there.

    ``--size-mib 0`` takes the size that a figure is defined for.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    for name, default in _OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    chosen = parser.parse_args(arguments)
    device = chosen.device
    if device != "cpu":
        if not _gpus():
            print("skipped: no GPU (a dry run: --device cpu --size-mib 16)")
            return None
        device = "cuda"
    return Bench(device, chosen, time.monotonic() + chosen.seconds)


def _gpus() -> int:
    """How many the driver sees; asking it is quicker than importing a framework."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


# -- states of known bits --------------------------------------------------------------------------


def make_state(size_mib: int, device: str) -> dict[str, torch.Tensor]:
    """Parameters and Adam's moments of a GPT of 10 layers, float32, not filled: 180 tensors."""
    import torch

    width = max(64, int((size_mib * measuring.MIB / 1440) ** 0.5) // 64 * 64)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(10):
        shapes[f"h.{layer}.qkv"] = (3 * width, width)
        shapes[f"h.{layer}.proj"] = (width, width)
        shapes[f"h.{layer}.up"] = (4 * width, width)
        shapes[f"h.{layer}.down"] = (width, 4 * width)
        shapes[f"h.{layer}.ln_1"] = shapes[f"h.{layer}.ln_2"] = (width,)
    return {
        f"{part}.{name}": torch.empty(shape, device=device)
        for part in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def small_state(count: int, device: str) -> dict[str, torch.Tensor]:
    """``count`` float32 tensors of 8 KiB, each in memory of its own."""
    import torch

    return {f"t{i:05}": torch.empty(2048, device=device) for i in range(count)}


def scramble(state: Mapping[str, torch.Tensor], seed: int) -> None:
    """Give every float32 tensor random bits that any process with such a device can make again."""
    import torch

    generator: torch.Generator | None = None
    for number, tensor in enumerate(state.values()):
        if generator is None or tensor.device != generator.device:
            generator = torch.Generator(tensor.device)
        generator.manual_seed(seed * _SALT + number)
        tensor.view(torch.int32).random_(generator=generator)


def differing(state: Mapping[str, torch.Tensor], seed: int) -> list[str]:
    """The names of the tensors that do not have the bits that ``scramble`` gave."""
    import torch

    found = []
    generator: torch.Generator | None = None
    for number, (name, tensor) in enumerate(state.items()):
        if generator is None:
            generator = torch.Generator(tensor.device)
        generator.manual_seed(seed * _SALT + number)
        wanted = torch.empty_like(tensor).view(torch.int32).random_(generator=generator)
        if not torch.equal(tensor.view(torch.int32), wanted):
            found.append(name)
    return found


def bits_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of all tensors on their device, as bytes: equal bits are equal, NaN too."""
    import torch

    return {
        name: tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        for name, tensor in state.items()
    }


def size_of(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


# -- mtckpt ----------------------------------------------------------------------------------------


def ram(capture: str = "", **settings: Any) -> mtckpt.Ram:
    """A RAM tier due at every save, of two slots. Raises Skipped for a mode that is not there."""
    import mtckpt

    if capture:
        if "capture" not in {field.name for field in dataclasses.fields(mtckpt.Ram)}:
            raise Skipped(f"this mtckpt has no Ram(capture={capture!r})")
        settings["capture"] = capture
    return mtckpt.Ram(**{"every": 1, "slots": 2, **settings})


@contextlib.contextmanager
def opened(tier: mtckpt.Ram, run: str = RUN) -> Iterator[mtckpt.Checkpointer]:
    """A Checkpointer of this one tier. At the end the run is closed and removed with its slots."""
    import mtckpt

    checkpointer = mtckpt.Checkpointer(run, [tier], max_stall_s=60)
    try:
        yield checkpointer
    finally:
        checkpointer.close(timeout_s=60)
        forget(run)


def forget(run: str) -> None:
    """Remove a run, whose newest step would stay in memory: the next figure needs the room."""
    command = [sys.executable, "-m", "mtckpt.cli", "rm", run, "--yes"]
    subprocess.run(command, cwd=measuring.ROOT, capture_output=True, timeout=60)


def saved(checkpointer: mtckpt.Checkpointer, step: int, state: Any) -> mtckpt.Save:
    """``save``, and an error if it was called off: that would be no figure."""
    save = checkpointer.save(step, state)
    if save.skipped:
        raise RuntimeError(f"the save of step {step} was called off: {save.skipped}")
    return save


# -- places ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted_huge(size_bytes: int) -> Iterator[str]:
    """A directory on a tmpfs of its own with huge pages. Raises Skipped where we may not mount."""
    path = tempfile.mkdtemp(prefix="mtb-huge-")
    options_ = f"huge=always,size={size_bytes + GIB},mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options_, "mtckpt-bench", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        os.rmdir(path)
        raise Skipped(f"no tmpfs with huge pages may be mounted: {done.stderr.strip()}")
    try:
        yield path
    finally:
        lazily = ["umount", "-l", path]  # an agent that is just dying may still hold it
        subprocess.run(lazily, capture_output=True, timeout=20)
        with contextlib.suppress(OSError):
            os.rmdir(path)


def machine(bench: Bench) -> dict[str, Any]:
    """The row that describes the machine."""
    row: dict[str, Any] = {"figure": "machine", **measuring.machine()}
    row["versions"] = measuring.versions()
    row["shm"] = _first_line(["df", "-h", "--output=size,avail", "/dev/shm"], 1)
    pages = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    with contextlib.suppress(OSError):
        row["shmem_huge_pages"] = pages.read_text().partition("[")[2].partition("]")[0]
    row["device"] = f"dry run on {platform.machine()}"
    if bench.on_gpu:
        fields = "name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        row["device"], _, row["device_facts"] = _first_line(query, 0).partition(", ")
    return row


def _first_line(command: list[str], number: int) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()[number].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return ""
