"""Compile mtckpt/capture/kernels.cu into the images beside it. Run it after every change.

It needs no GPU, only NVRTC, three versions of it, each in a folder of its own, and the folders:

    pip install --no-deps --target nvrtc/11.7 nvidia-cuda-nvrtc-cu11==11.7.99
    pip install --no-deps --target nvrtc/11.8 nvidia-cuda-nvrtc-cu11==11.8.89
    pip install --no-deps --target nvrtc/12.8 nvidia-cuda-nvrtc-cu12==12.8.61
    python scripts/compile_kernels.py nvrtc

PTX is for every device since compute capability 7.0; every driver since 515 reads that of NVRTC
11.7, and older drivers refuse what a newer one makes. Machine code spares the driver a compilation
at every start: each by the oldest NVRTC that knows the device. kernels.txt names each image with
its compiler and the SHA-256 of the source and of the image (uncompressed);
tests/capture/test_kernels.py fails when they drift apart.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import zlib
from collections.abc import Iterable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "mtckpt" / "capture" / "kernels.cu"
TABLE = SOURCE.with_suffix(".txt")
PTX = "compute_70"
COMPILERS = {
    PTX: (11, 7),
    "sm_80": (11, 7),
    "sm_86": (11, 7),
    "sm_89": (11, 8),
    "sm_90": (11, 8),
    "sm_100": (12, 8),
    "sm_120": (12, 8),
}
"""Architectures that are shipped, and the version of NVRTC that compiles each."""


def nvrtc_libraries(more: Iterable[Path] = ()) -> list[Path]:
    """Every NVRTC that pip or a toolkit has put on this machine, and those in ``more`` folders."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    folders = [*more, *folders]
    found = [path for folder in folders for path in folder.glob("**/lib/libnvrtc.so.*")]
    found += Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*")
    return sorted(path for path in found if ".alt." not in path.name)


class Nvrtc:
    """The run-time compiler of CUDA C++, by ctypes."""

    def __init__(self, path: Path) -> None:
        for part in path.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(part))  # it is looked for where only the loader's paths are
        self._library = ctypes.CDLL(str(path))
        major, minor = c_int(), c_int()
        self._do("nvrtcVersion", byref(major), byref(minor))
        self.version = major.value, minor.value

    def _do(self, call: str, *arguments: Any) -> None:
        code = getattr(self._library, call)(*arguments)
        if code != 0:
            raise RuntimeError(f"{call} failed with {code}")

    def _result(self, what: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._do(f"nvrtcGet{what}Size", program, byref(size))
        result = ctypes.create_string_buffer(size.value)
        self._do(f"nvrtcGet{what}", program, result)
        return result.raw

    def compile(self, source: bytes, architecture: str = PTX, options: Sequence[str] = ()) -> bytes:
        """PTX, or a cubin for an ``sm_`` architecture. RuntimeError says what the compiler said."""
        program = c_void_p()
        name = c_char_p(SOURCE.name.encode())
        self._do("nvrtcCreateProgram", byref(program), c_char_p(source), name, 0, None, None)
        given = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
        texts = (c_char_p * len(given))(*(option.encode() for option in given))
        try:
            self._do("nvrtcCompileProgram", program, len(given), texts)
        except RuntimeError as error:
            raise RuntimeError(self._result("ProgramLog", program).decode()) from error
        if architecture.startswith("sm_"):
            return self._result("CUBIN", program)
        return self._result("PTX", program).rstrip(b"\0")


def file_of(architecture: str) -> Path:
    """Where the image for an architecture lies: PTX as text, machine code compressed by zlib."""
    if architecture == PTX:
        return SOURCE.with_suffix(".ptx")
    return SOURCE.with_suffix(f".{architecture}.cubin.zlib")


def line_of(architecture: str, source: bytes, image: bytes) -> str:
    """The line of kernels.txt about an image: file, compiler, digests of source and image."""
    version = ".".join(map(str, COMPILERS[architecture]))
    digests = " ".join(hashlib.sha256(data).hexdigest() for data in (source, image))
    return f"{file_of(architecture).name} nvrtc-{version} {digests}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="where to look for NVRTC, too")
    found: dict[tuple[int, int], Nvrtc] = {}
    for path in nvrtc_libraries(parser.parse_args().folders):
        nvrtc = Nvrtc(path)
        found.setdefault(nvrtc.version, nvrtc)
    if missing := set(COMPILERS.values()) - set(found):
        raise SystemExit(f"NVRTC of versions {sorted(missing)} is not here: {__doc__}")
    source = SOURCE.read_bytes()
    lines = []
    for architecture, version in COMPILERS.items():
        image = found[version].compile(source, architecture)
        file = file_of(architecture)
        file.write_bytes(image if architecture == PTX else zlib.compress(image, 9))
        lines.append(line_of(architecture, source, image))
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")
    TABLE.write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
