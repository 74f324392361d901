"""Compile mtckpt/capture/kernels.cu into the kernels.ptx beside it. Run it after every change.

It needs no GPU, only NVRTC: `pip install nvidia-cuda-nvrtc-cu11==11.7.99`, whose PTX every driver
since 515 reads; a newer NVRTC makes PTX that older drivers refuse. The first line of the result
names the source by its digest; tests/capture/test_kernels.py fails when they drift apart.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "mtckpt" / "capture" / "kernels.cu"
TARGET = SOURCE.with_suffix(".ptx")
ARCHITECTURE = "compute_70"
VERSION = 11, 7


def nvrtc_libraries() -> list[Path]:
    """Every NVRTC that pip or a toolkit has put on this machine."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in folder.glob("**/lib/libnvrtc.so.*")]
    found += Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*")
    return sorted(path for path in found if ".alt." not in path.name)


class Nvrtc:
    """The run-time compiler of CUDA C++, by ctypes."""

    def __init__(self, path: Path) -> None:
        for part in path.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(part))  # newer ones look for it where only the loader's paths are
        self._library = ctypes.CDLL(str(path))
        major, minor = c_int(), c_int()
        self._do("nvrtcVersion", byref(major), byref(minor))
        self.version = major.value, minor.value

    def _do(self, call: str, *arguments: Any) -> None:
        code = getattr(self._library, call)(*arguments)
        if code != 0:
            raise RuntimeError(f"{call} failed with {code}")

    def _text(self, what: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._do(f"nvrtcGet{what}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._do(f"nvrtcGet{what}", program, text)
        return text.value

    def compile(
        self, source: bytes, architecture: str = ARCHITECTURE, options: Sequence[str] = ()
    ) -> bytes:
        """PTX of a source. Raises RuntimeError with what the compiler said."""
        program = c_void_p()
        name = c_char_p(SOURCE.name.encode())
        self._do("nvrtcCreateProgram", byref(program), c_char_p(source), name, 0, None, None)
        given = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
        texts = (c_char_p * len(given))(*(option.encode() for option in given))
        try:
            self._do("nvrtcCompileProgram", program, len(given), texts)
        except RuntimeError as error:
            raise RuntimeError(self._text("ProgramLog", program).decode()) from error
        return self._text("PTX", program)


def shipped(nvrtc: Nvrtc, source: bytes) -> bytes:
    """What kernels.ptx is to be, its first line included."""
    digest = hashlib.sha256(source).hexdigest()
    major, minor = nvrtc.version
    head = (
        f"// {SOURCE.name} {digest}, compiled by scripts/compile_kernels.py, NVRTC {major}.{minor}"
    )
    return head.encode() + b"\n" + nvrtc.compile(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvrtc", type=Path, help="libnvrtc.so.* to use; else the one installed")
    chosen = parser.parse_args().nvrtc
    for path in [chosen] if chosen else nvrtc_libraries():
        nvrtc = Nvrtc(path)
        if nvrtc.version == VERSION or chosen:
            TARGET.write_bytes(shipped(nvrtc, SOURCE.read_bytes()))
            print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")
            return
    raise SystemExit(f"NVRTC {VERSION[0]}.{VERSION[1]} is not here: {__doc__}")


if __name__ == "__main__":
    main()
