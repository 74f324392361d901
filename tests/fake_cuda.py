"""The CUDA driver of ``fake_libcuda.cpp``, built once a session, and what tests tell it.

In this process: ``Driver(str(fake.path))`` after ``fake.reset()``. In another one: its folder in
LD_LIBRARY_PATH, where the driver's own name finds it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "mtckpt" / "capture" / "kernels.cu"
COMPILER = shutil.which("g++")
WHY_NOT = "" if COMPILER else "no g++ to build the fake CUDA driver with"


class Mode(IntEnum):
    """When queued work is done: at once, when waited for, or by chance from a seed."""

    IMMEDIATE = 0
    LAZY = 1
    RANDOM = 2


class Counts(NamedTuple):
    """What is held of a driver, and what it still has to do."""

    contexts: int
    allocations: int
    allocated_bytes: int
    pinned: int
    registrations: int
    streams: int
    events: int
    modules: int
    queued: int
    current: int  # contexts on the stack of this thread


def build(source: Path, target: Path) -> Path:
    """Compile C++ that includes the kernels, as KERNELS, into a library."""
    assert COMPILER is not None, WHY_NOT
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [COMPILER, *flags, f'-DKERNELS="{KERNELS}"', "-o", str(target), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return target


class FakeCuda:
    """A built fake. All of it is of this process, whoever loaded it how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "libcuda.so.1"
        if not self.path.exists():
            build(ROOT / "tests" / "fake_libcuda.cpp", self.path)
        self._library = ctypes.CDLL(str(self.path))
        u64, text = ctypes.c_uint64, ctypes.c_char_p
        self._library.fake_mode.argtypes = [ctypes.c_int, u64]
        self._library.fake_memory.argtypes = [u64]
        self._library.fake_fail.argtypes = [text, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        self._library.fake_adopt.argtypes = [u64, u64, ctypes.c_int]
        self._library.fake_capture.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._library.fake_log.argtypes = [text, u64]
        self._library.fake_copied_out.restype = u64

    def reset(self, num_devices: int = 2) -> None:
        """Forget everything; drivers, addresses and handles from before are not to be used."""
        self._library.fake_reset(num_devices)

    def mode(self, mode: Mode, seed: int = 0) -> None:
        self._library.fake_mode(int(mode), seed)

    def memory(self, total_bytes: int) -> None:
        """What each device has; 80 GiB unless said."""
        self._library.fake_memory(total_bytes)

    def capability(self, major: int, minor: int) -> None:
        """The compute capability of all devices; 9.0 unless said."""
        self._library.fake_capability(10 * major + minor)

    def fail(self, call: str, code: int, *, skip: int = 0, times: int = 1) -> None:
        """Let a call fail ``times`` times after it went well ``skip`` times."""
        self._library.fake_fail(call.encode(), code, skip, times)

    def flip(self, *, skip: int = 0) -> None:
        """Change a bit in a copy between host and device, the one after ``skip`` others."""
        self._library.fake_flip(skip)

    def copied_out(self) -> int:
        """Bytes that were to leave devices since the last time this was asked."""
        return int(self._library.fake_copied_out())

    def adopt(self, address: int, size_bytes: int, ordinal: int = 0) -> None:
        """Let memory of an array count as a device's, until ``disown`` or ``reset``."""
        self._library.fake_adopt(address, size_bytes, ordinal)

    def disown(self, address: int) -> None:
        self._library.fake_adopt(address, 0, 0)

    def capture(self, stream: int, *, mode: int = 0) -> None:
        """Let a stream capture a graph: 0 is the mode global, 1 thread-local, 2 relaxed."""
        assert self._library.fake_capture(stream, 1, mode) == 0

    def end_capture(self, stream: int) -> bool:
        """End it; false if somebody's call spoiled it."""
        return bool(self._library.fake_capture(stream, 0, 0) == 1)

    def counts(self) -> Counts:
        counts = (ctypes.c_uint64 * len(Counts._fields))()
        self._library.fake_counts(counts)
        return Counts(*counts)

    def calls(self) -> list[str]:
        """The names of the calls since the last time this was asked."""
        text = ctypes.create_string_buffer(1 << 22)
        assert self._library.fake_log(text, len(text))
        return text.value.decode().split()
