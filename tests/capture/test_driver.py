"""The driver by ctypes, on a library that behaves as the driver does and keeps its own books."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, Mode

from mtckpt.capture import driver as module
from mtckpt.capture.driver import SIGNATURES, CudaError, Driver

MIB = 1 << 20


def bytes_at(address: int, size_bytes: int) -> bytes:
    return ctypes.string_at(address, size_bytes)


# ------------------------------------------------------------------------------- load, or not


def in_a_process(code: str, folder: Path | None) -> str:
    path = {"LD_LIBRARY_PATH": str(folder)} if folder else {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return done.stdout.strip()


def test_load_finds_the_driver_under_its_own_name(fake_cuda: FakeCuda) -> None:
    code = """
import os
from mtckpt.capture.driver import Driver
driver = Driver.load()
assert driver is not None and driver is Driver.load()
print(driver.num_devices(), driver.version(), driver.device_name(1), flush=True)
child = os.fork()
if child == 0:
    print(Driver.load(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert in_a_process(code, fake_cuda.folder) == "2 13000 Fake 1\nNone"


def test_importing_the_package_leaves_the_driver_alone(fake_cuda: FakeCuda) -> None:
    code = """
import mtckpt.capture.driver
print("libcuda" in open("/proc/self/maps").read())
"""
    assert in_a_process(code, fake_cuda.folder) == "False"


@pytest.mark.parametrize("num_devices", [0, 2])
def test_there_may_be_no_device_or_a_broken_driver(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, num_devices: int
) -> None:
    monkeypatch.setattr(Driver, "_loaded", None)
    monkeypatch.setattr(module.Driver.__init__, "__defaults__", (str(fake_cuda.path),))
    fake_cuda.reset(num_devices)
    if num_devices:
        fake_cuda.fail("cuInit", 999)
    assert Driver.load() is None
    fake_cuda.reset()
    assert Driver.load() is None  # not asked twice
    monkeypatch.setattr(Driver, "_loaded", None)
    assert Driver.load() is not None


def test_there_may_be_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Driver, "_loaded", None)
    monkeypatch.setattr(module.Driver.__init__, "__defaults__", (str(tmp_path / "no.so"),))
    assert Driver.load() is None


def test_a_library_without_the_symbols_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "_loaded", None)
    monkeypatch.setattr(module.Driver.__init__, "__defaults__", (None,))  # the process itself
    assert Driver.load() is None


# ----------------------------------------------------------------------------------- signatures

HEADERS = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))
C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "const char": ctypes.c_char,
    "char": ctypes.c_char,
    "CUresult": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUpointer_attribute": ctypes.c_int,
    "CUstreamCaptureStatus": ctypes.c_int,
    "CUstreamCaptureMode": ctypes.c_int,
    **{f"CU{kind}": ctypes.c_void_p for kind in ("context", "stream", "event", "module")},
    "CUfunction": ctypes.c_void_p,
}


def c_type(text: str) -> Any:
    """``CUevent *phEvent`` -> a pointer to a void pointer."""
    found = re.fullmatch(r"(.*?)(\**)(\w+)", " ".join(text.split()))
    assert found, text
    name, stars = found[1].strip(), len(found[2])
    kind: Any
    if name in ("void", "const void"):
        kind, stars = ctypes.c_void_p, stars - 1
    elif name in ("char", "const char"):
        kind, stars = ctypes.c_char_p, stars - 1
    else:
        kind = C_TYPES[name]
    for _ in range(stars):
        kind = ctypes.POINTER(kind)
    return kind


@pytest.mark.skipif(not HEADERS, reason="no cuda.h on this machine")
@pytest.mark.parametrize("call", sorted(SIGNATURES))
def test_signatures_are_those_of_the_header(call: str) -> None:
    header = HEADERS[-1].read_text(encoding="utf-8")
    plain = call.removesuffix("_v2")
    mapped = re.search(rf"^#define\s+{plain}\s+(?:__CUDA_API_PT.Z\()?(\w+)", header, re.MULTILINE)
    assert (mapped[1] if mapped and "__CUDA_API" not in mapped[1] else plain) == call
    declared = re.search(rf"^CUresult CUDAAPI {plain}\(([^)]*)\)", header, re.MULTILINE)
    assert declared
    wanted = [c_type(text) for text in declared[1].split(",")]
    ours = list(SIGNATURES[call])
    if call == "cuModuleLoadData":  # text that ends with a NUL, which ctypes adds
        ours[1] = ctypes.c_void_p
    assert ours == wanted


# -------------------------------------------------------------------------------------- contexts


def test_a_context_is_retained_once_and_given_back(driver: Driver, fake_cuda: FakeCuda) -> None:
    def use(ordinal: int) -> None:
        for _ in range(5):
            with driver.current(ordinal), driver.current(1 - ordinal):
                driver.memory()

    threads = [threading.Thread(target=use, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert fake_cuda.counts().contexts == 2
    assert fake_cuda.calls().count("cuDevicePrimaryCtxRetain") == 2
    driver.close()
    driver.close()
    assert fake_cuda.counts() == (0,) * 10


def test_what_fails_inside_leaves_no_context_behind(driver: Driver, fake_cuda: FakeCuda) -> None:
    with pytest.raises(ZeroDivisionError), driver.current(1):
        assert fake_cuda.counts().current == 1
        _ = 1 / 0
    assert fake_cuda.counts().current == 0
    with pytest.raises(CudaError, match=r"cuMemAlloc_v2: CUDA_ERROR_INVALID_CONTEXT \(201\)"):
        driver.alloc(1)
    with pytest.raises(CudaError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        driver.current(2).__enter__()


def test_errors_say_which_call_and_what_the_driver_said(
    driver: Driver, fake_cuda: FakeCuda
) -> None:
    fake_cuda.memory(MIB)
    with driver.current(0), pytest.raises(CudaError) as caught:
        driver.alloc(2 * MIB)
    error = caught.value
    assert (error.call, error.code, error.name) == (
        "cuMemAlloc_v2",
        2,
        "CUDA_ERROR_OUT_OF_MEMORY",
    )
    fake_cuda.fail("cuEventCreate", 12345)
    with driver.current(0), pytest.raises(CudaError, match=r"unknown error \(12345\)"):
        driver.event()


# ---------------------------------------------------------------------------------------- memory


def test_every_address_has_its_device(driver: Driver, fake_cuda: FakeCuda) -> None:
    array = ctypes.create_string_buffer(64)
    with driver.current(1):
        ours = driver.alloc(100)
        pinned = driver.alloc_host(100)
        assert driver.memory(1)[0] == driver.memory(0)[0] - 100
    assert driver.ordinal_of(ours + 99) == 1
    assert driver.ordinal_of(ours + 100) is None
    assert driver.ordinal_of(pinned) is None
    assert driver.ordinal_of(ctypes.addressof(array)) is None
    fake_cuda.adopt(ctypes.addressof(array), 64, 0)
    assert driver.ordinal_of(ctypes.addressof(array)) == 0
    fake_cuda.fail("cuPointerGetAttribute", 4)
    with pytest.raises(CudaError, match="cuPointerGetAttribute"):
        driver.ordinal_of(ours)
    with driver.current(1):
        driver.free(ours)
        driver.free_host(pinned)
    assert fake_cuda.counts()[1:5] == (0, 0, 0, 0)


def test_memory_is_registered_once(driver: Driver) -> None:
    array = ctypes.create_string_buffer(64)
    address = ctypes.addressof(array)
    with driver.current(0):
        driver.register(address, 64)
        for begin in (address, address + 63):
            with pytest.raises(CudaError, match="HOST_MEMORY_ALREADY_REGISTERED"):
                driver.register(begin, 64)
        driver.unregister(address)
        with pytest.raises(CudaError, match="HOST_MEMORY_NOT_REGISTERED"):
            driver.unregister(address)


# ---------------------------------------------------------------------- streams, events, copies


def test_a_copy_is_there_when_its_event_is(driver: Driver, fake_cuda: FakeCuda) -> None:
    with driver.current(0):
        stream, event = driver.stream(), driver.event(blocking=True)
        assert driver.event_done(event)  # never recorded
        source, there, back = driver.alloc_host(MIB), driver.alloc(MIB), driver.alloc_host(MIB)
        ctypes.memset(source, 7, MIB)
        driver.to_device(there, source, MIB, stream)
        driver.to_host(back, there, MIB, stream)
        driver.record(event, stream)
        assert bytes_at(back, MIB) != b"\7" * MIB
        assert not driver.stream_idle(stream)
        polls = 0
        while not driver.event_done(event):
            polls += 1
        assert polls > 0
        assert bytes_at(back, MIB) == b"\7" * MIB
        assert driver.stream_idle(stream)
        ctypes.memset(source, 8, MIB)
        driver.to_device(there, source, MIB, stream)
        driver.on_device(there, there + MIB // 2, MIB // 2, stream)
        driver.to_host(back, there, MIB, stream)
        driver.record(event, stream)
        driver.event_synchronize(event)
        assert bytes_at(back, MIB) == b"\x08" * MIB
        driver.destroy_event(event)
        driver.destroy_stream(stream)
        for address in (source, back):
            driver.free_host(address)
        driver.free(there)
    driver.close()
    assert fake_cuda.counts() == (0,) * 10


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("seed", range(5))
def test_streams_wait_for_events_of_one_another(
    driver: Driver, fake_cuda: FakeCuda, mode: Mode, seed: int
) -> None:
    """A chain of copies over streams: each reads what the one before has written."""
    fake_cuda.mode(mode, seed)
    rng = random.Random(seed)
    with driver.current(0):
        streams = [driver.stream(rng.choice(["lowest", "highest"])) for _ in range(3)] + [0]
        host = driver.alloc_host(64)
        places = [driver.alloc(64) for _ in range(20)]
        ctypes.memset(host, 42, 64)
        before = streams[0]
        driver.to_device(places[0], host, 64, before)
        for source, target in itertools.pairwise(places):
            event, stream = driver.event(), rng.choice(streams)
            driver.record(event, before)
            driver.wait(stream, event)
            driver.destroy_event(event)
            driver.on_device(target, source, 64, stream)
            before = stream
        driver.to_host(host, places[-1], 64, before)
        ctypes.memset(host, 43 if mode == Mode.IMMEDIATE else 42, 64)
        driver.synchronize(before)
        assert bytes_at(host, 1) == (b"\x2b" if mode == Mode.IMMEDIATE else b"\x2a")


def test_a_thread_can_leave_the_captures_of_others_alone(
    driver: Driver, fake_cuda: FakeCuda
) -> None:
    with driver.current(0):
        stream, other = driver.stream(), driver.stream()
        event = driver.event()
        driver.record(event, other)
        fake_cuda.capture(stream)
        assert (driver.capturing(stream), driver.capturing(other)) == (True, False)
        with driver.relaxed():
            assert driver.event_done(event)
            driver.free(driver.alloc(64))
        assert fake_cuda.end_capture(stream)
        fake_cuda.capture(stream)
        with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
            driver.event_done(event)
        assert not fake_cuda.end_capture(stream)
        fake_cuda.fail("cuStreamIsCapturing", 906)
        assert driver.capturing(0)


def test_a_device_that_failed_says_so_ever_after(driver: Driver) -> None:
    with driver.current(0):
        stream, host, there = driver.stream(), driver.alloc_host(64), driver.alloc(64)
        driver.to_host(host, there, 64, stream)
        driver.free(there)
        with pytest.raises(CudaError, match="cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS"):
            driver.synchronize(stream)
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            driver.alloc(1)


def test_devices_do_not_share_streams(driver: Driver) -> None:
    with driver.current(0):
        stream, there, host = driver.stream(), driver.alloc(8), driver.alloc_host(8)
    with driver.current(1), pytest.raises(CudaError, match="INVALID_CONTEXT"):
        driver.to_host(host, there, 8, stream)
    with driver.current(1):
        event = driver.event()
        with pytest.raises(CudaError, match="INVALID_HANDLE"):
            driver.record(event, stream)
        driver.record(event, driver.stream())
    with driver.current(0):
        driver.wait(stream, event)


def test_modules_are_text_with_kernels(driver: Driver, fake_cuda: FakeCuda) -> None:
    with driver.current(0):
        with pytest.raises(CudaError, match="cuModuleLoadData"):
            driver.load_module(b"nothing")
        loaded = driver.load_module(b".version 7.0\n.visible .entry mtckpt_gather(\n)")
        with pytest.raises(CudaError, match="cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
            driver.function(loaded, "mtckpt_verify")
        assert driver.function(loaded, "mtckpt_gather")
        driver.unload(loaded)
    assert fake_cuda.counts().modules == 0
