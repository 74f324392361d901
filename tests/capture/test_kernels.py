"""The kernels, compiled for the host and launched as on a device, against the digest library."""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fake_cuda import KERNELS, ROOT, FakeCuda, Mode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.driver import CudaError, Driver
from mtckpt.capture.kernels import ROW, Kernels, machine_code_for
from scripts.compile_kernels import COMPILERS, PTX, TABLE, Nvrtc, file_of, line_of, nvrtc_libraries

SPACE_BYTES = 4 * CHUNK_BYTES
UNTOUCHED = 0xEE
EDGES = [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 1023, 1024, 1025, 65536]


class Scene:
    """A device with sources, targets, a table and digests, each in memory that it may use."""

    def __init__(self, driver: Driver, fake: FakeCuda) -> None:
        fake.mode(Mode.IMMEDIATE)
        self.kernels = Kernels(driver, 0)
        self.driver = driver
        self.fake = fake
        self.source = ctypes.create_string_buffer(random.Random(1).randbytes(SPACE_BYTES))
        self.target = ctypes.create_string_buffer(SPACE_BYTES)
        self.source_address = ctypes.addressof(self.source)
        self.target_address = ctypes.addressof(self.target)
        for address in (self.source_address, self.target_address):
            fake.adopt(address, SPACE_BYTES)

    def table(self, rows: Sequence[tuple[int, int, int, int]]) -> int:
        """A table in device memory, for the rest of the test."""
        packed = array.array("Q", [value for row in rows for value in row])
        assert packed.tobytes() == b"".join(ROW.pack(*row) for row in rows)
        address = self.driver.alloc(max(len(packed) * 8, 1))
        ctypes.memmove(address, packed.buffer_info()[0], len(packed) * 8)
        return address

    def digests(self, rows: Sequence[tuple[int, int, int, int]]) -> list[int]:
        with self.driver.current(0):
            found = self.driver.alloc(8 * max(len(rows), 1))
            self.kernels.digest_copy(0, self.table(rows), len(rows), found)
            return list((ctypes.c_uint64 * len(rows)).from_address(found))

    def bytes_of(self, row: tuple[int, int, int, int]) -> bytes:
        return ctypes.string_at(row[0], row[2])


@pytest.fixture
def scene(driver: Driver, fake_cuda: FakeCuda) -> Iterator[Scene]:
    scene = Scene(driver, fake_cuda)
    yield scene
    scene.kernels.close()
    scene.kernels.close()
    assert fake_cuda.counts().modules == 0


# ----------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("alignment", [16, 8, 4, 2, 1])
def test_digests_are_those_of_the_library(scene: Scene, alignment: int) -> None:
    """Every size around every rule of the algorithm, with and without a copy."""
    begin = scene.source_address + -scene.source_address % 16 + alignment % 16
    sizes = [*range(2050), *EDGES]
    rows = [(begin, 0, size, i) for i, size in enumerate(sizes)]
    assert scene.digests(rows) == [xxh3_64_intdigest(scene.bytes_of(row)) for row in rows]
    for shift in (0, 1, 4):
        target = scene.target_address + shift
        for size in (300, 5000, CHUNK_BYTES - 3):
            row = (begin, target, size, 0)
            assert scene.digests([row]) == [xxh3_64_intdigest(scene.bytes_of(row))]
            assert ctypes.string_at(target, size) == scene.bytes_of(row)


@st.composite
def places(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Offsets of sources and of targets that do not overlap, and sizes."""
    sizes = draw(st.lists(st.integers(0, 9000) | st.sampled_from(EDGES[:3]), max_size=12))
    found, at = [], 0
    for size in sizes:
        at += draw(st.integers(0, 17))
        if at + size > SPACE_BYTES:
            break
        found.append((draw(st.integers(0, SPACE_BYTES - size)), at, size))
        at += size
    return found


def layout(scene: Scene, found: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    ctypes.memset(scene.target_address, UNTOUCHED, SPACE_BYTES)
    count = len(found)
    return [
        (scene.source_address + source, scene.target_address + target, size, count - 1 - i)
        for i, (source, target, size) in enumerate(found)
    ]


def wanted_target(scene: Scene, found: list[tuple[int, int, int]]) -> bytes:
    wanted = bytearray([UNTOUCHED]) * SPACE_BYTES
    for source, target, size in found:
        wanted[target : target + size] = ctypes.string_at(scene.source_address + source, size)
    return bytes(wanted)


SHARED = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@SHARED
@given(found=places(), data=st.data())
def test_rows_are_copied_and_nothing_else(
    scene: Scene, found: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    rows = layout(scene, found)
    if data.draw(st.booleans()):
        wanted = [xxh3_64_intdigest(scene.bytes_of(row)) for row in reversed(rows)]
        assert scene.digests(rows) == wanted
    else:
        with scene.driver.current(0):
            scene.kernels.gather(0, scene.table(rows), len(rows))
    assert ctypes.string_at(scene.target_address, SPACE_BYTES) == wanted_target(scene, found)


@SHARED
@given(found=places(), data=st.data())
def test_rows_that_differ_are_found_and_not_placed(
    scene: Scene, found: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    rows = layout(scene, found)
    digests = scene.digests([(source, 0, size, index) for source, _, size, index in rows])
    wrong = data.draw(st.sets(st.integers(0, max(len(rows) - 1, 0)))) if rows else set()
    for index in wrong:
        digests[index] ^= 1 << data.draw(st.integers(0, 63))
    placing = data.draw(st.booleans())
    with scene.driver.current(0):
        expected = scene.driver.alloc(8 * len(rows) + 8)
        ctypes.memmove(expected, array.array("Q", digests).tobytes(), 8 * len(rows))
        bad = scene.driver.alloc(len(rows) + 1)
        ctypes.memset(bad, 0, len(rows) + 1)
        launch = scene.kernels.place if placing else scene.kernels.verify
        launch(0, scene.table(rows), len(rows), expected, bad)
    flags = ctypes.string_at(bad, len(rows) + 1)
    assert [i for i, flag in enumerate(flags) if flag] == sorted(wrong)
    placed = [place for place, row in zip(found, rows, strict=True) if row[3] not in wrong]
    wanted = wanted_target(scene, placed if placing else [])
    assert ctypes.string_at(scene.target_address, SPACE_BYTES) == wanted


def test_nothing_outside_a_row_is_read(scene: Scene) -> None:
    """Rows at both ends of memory between pages that may not be touched."""
    page = mmap.PAGESIZE
    size = 3 * page
    with mmap.mmap(-1, size + 2 * page) as memory:
        whole = ctypes.c_char.from_buffer(memory)
        begin = ctypes.addressof(whole) + page
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        memory[page : page + size] = os.urandom(size)
        for guard in (begin - page, begin + size):
            assert protect(guard, page, 0) == 0
        scene.fake.adopt(begin, size)
        sizes = [*range(1, 300), 1023, 1024, 1025, 1087, 1088, 1089, 2048, 5001, size]
        for rows in (
            [(begin, 0, size, i) for i, size in enumerate(sizes)],
            [(begin + size - few, 0, few, i) for i, few in enumerate(sizes)],
        ):
            wanted = [xxh3_64_intdigest(scene.bytes_of(row)) for row in rows]
            assert scene.digests(rows) == wanted
        for guard in (begin - page, begin + size):
            assert protect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        del whole


def test_no_rows_are_no_launch(scene: Scene) -> None:
    scene.fake.calls()
    scene.kernels.gather(0, 0, 0)
    assert scene.fake.calls() == []


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((7, 0), "kernels.ptx"),
        ((7, 5), "kernels.ptx"),
        ((8, 0), "kernels.sm_80.cubin.zlib"),
        ((8, 6), "kernels.sm_86.cubin.zlib"),
        ((8, 7), "kernels.sm_86.cubin.zlib"),
        ((8, 9), "kernels.sm_89.cubin.zlib"),
        ((9, 0), "kernels.sm_90.cubin.zlib"),
        ((10, 0), "kernels.sm_100.cubin.zlib"),
        ((10, 3), "kernels.sm_100.cubin.zlib"),
        ((11, 0), "kernels.ptx"),
        ((12, 1), "kernels.sm_120.cubin.zlib"),
    ],
)
def test_a_device_gets_machine_code_if_there_is_some_for_it(
    driver: Driver, fake_cuda: FakeCuda, capability: tuple[int, int], wanted: str
) -> None:
    """The fake takes a cubin that says it is for the device, and has all four kernels."""
    fake_cuda.capability(*capability)
    kernels = Kernels(driver, 0)
    assert kernels.image == wanted
    assert fake_cuda.counts().modules == 1
    kernels.close()


def test_machine_code_is_that_of_the_nearest_older_device_of_a_generation() -> None:
    files = [f"kernels.sm_{number}.cubin.zlib" for number in (80, 86, 100, 103)]
    files += ["kernels.sm_89.cubin", "kernels.sm_.cubin.zlib", "kernels.ptx"]
    assert machine_code_for((8, 9), files) == "kernels.sm_86.cubin.zlib"
    assert machine_code_for((8, 5), files) == "kernels.sm_80.cubin.zlib"
    assert machine_code_for((10, 9), files) == "kernels.sm_103.cubin.zlib"
    assert machine_code_for((1, 0), files) is None
    assert machine_code_for((9, 0), files) is None


@pytest.mark.parametrize("code", [200, 209, 300])
def test_machine_code_that_the_driver_refuses_gives_way_to_ptx(
    driver: Driver, fake_cuda: FakeCuda, code: int
) -> None:
    fake_cuda.fail("cuModuleLoadData", code)
    kernels = Kernels(driver, 0)
    assert kernels.image == "kernels.ptx"
    kernels.close()
    assert fake_cuda.counts().modules == 0


def test_kernels_that_the_driver_refuses_are_an_error(driver: Driver, fake_cuda: FakeCuda) -> None:
    fake_cuda.fail("cuModuleLoadData", 218, times=2)
    with pytest.raises(CudaError, match="cuModuleLoadData"):
        Kernels(driver, 0)
    assert fake_cuda.counts().current == 0


def test_the_benchmark_for_devices_runs_here_too(fake_cuda: FakeCuda) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--size-mib=4", "--values=1"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_cuda.folder)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("ok") for row in rows] == [None, True, True, True], done.stdout


# ------------------------------------------------------------------------------ what is shipped


def shipped(architecture: str) -> bytes:
    held = file_of(architecture).read_bytes()
    return held if architecture == PTX else zlib.decompress(held)


def test_the_shipped_kernels_are_of_this_source() -> None:
    source = KERNELS.read_bytes()
    lines = TABLE.read_text(encoding="ascii").splitlines()
    wanted = [line_of(architecture, source, shipped(architecture)) for architecture in COMPILERS]
    assert lines == wanted, "kernels.cu was changed: run scripts/compile_kernels.py"
    files = {file_of(architecture) for architecture in COMPILERS}
    assert files == {*KERNELS.parent.glob("*.ptx"), *KERNELS.parent.glob("*.cubin*")}


@pytest.mark.parametrize("architecture", COMPILERS)
def test_the_shipped_kernels_are_what_the_compiler_makes(architecture: str) -> None:
    for path in nvrtc_libraries():
        nvrtc = Nvrtc(path)
        if nvrtc.version == COMPILERS[architecture]:
            assert nvrtc.compile(KERNELS.read_bytes(), architecture) == shipped(architecture)
            return
    pytest.skip("no NVRTC of the version that compiles it")


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_shipped_kernels_assemble(tmp_path: Path, architecture: str) -> None:
    target = str(tmp_path / "kernels.cubin")
    command = ["ptxas", f"-arch={architecture}", str(file_of(PTX)), "-o", target]
    subprocess.run(command, check=True, timeout=50)
