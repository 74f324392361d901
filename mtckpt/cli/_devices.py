"""What CUDA devices give to checkpoints here: found or why not, and measured by small copies.

Knows the driver, and a file without a name where slots are made. Does not judge. CUDA is started
only where there is a driver, in this process, which is to end soon: a device holds some hundred MiB
for it meanwhile.
"""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Callable, Iterator
from typing import Any

from mtckpt import _probe
from mtckpt.capture.base import Move
from mtckpt.capture.buffers import PinnedMemory
from mtckpt.capture.cpu import CpuEngine
from mtckpt.capture.driver import CudaError, Driver
from mtckpt.capture.kernels import Kernels
from mtckpt.capture.passing import Passage
from mtckpt.cli._judge import MIB, Gpu

__all__ = ["device_facts"]

_SIZE_BYTES = 64 * MIB
_LEAST_BYTES = 4 * MIB  # two large pages
_REPEATS = 3
_PIECE_BYTES = 16 * MIB
_LIMIT_S = 1.0  # devices beyond are named only


def device_facts(ram_path: str) -> dict[str, Any]:
    """Fields of ``Facts``. ``ram_path`` is the directory that slots are made in."""
    facts: dict[str, Any] = {
        "gpu_driver": "",
        "gpu_problem": "",
        "gpu_nodes": bool(glob.glob("/dev/nvidia[0-9]*")),
        "gpus": (),
        "slot_bytes_per_s": None,
        "slot_problem": "",
    }
    try:
        driver = Driver()
        count = driver.num_devices()
    except (OSError, AttributeError, CudaError) as error:
        return {**facts, "gpu_problem": str(error)}
    version = driver.version()
    facts["gpu_driver"] = f"{version // 1000}.{version % 1000 // 10}"
    if not count:
        return {**facts, "gpu_problem": "the driver shows no device"}
    try:
        with _slot(ram_path) as (address, size_bytes), contextlib.ExitStack() as held:
            facts |= _registered(driver, address, size_bytes, held)
            is_known = facts["slot_bytes_per_s"] is not None
            facts["gpus"] = _measured(driver, count, address, size_bytes, is_known=is_known)
    except OSError:  # no room in the RAM tier, which has a finding of its own
        facts["gpus"] = tuple(Gpu(**_named(driver, ordinal)) for ordinal in range(count))
    except CudaError as error:
        facts["gpu_problem"] = str(error)
    with contextlib.suppress(CudaError):  # the process ends, and its contexts with it
        driver.close()
    return facts


@contextlib.contextmanager
def _slot(ram_path: str) -> Iterator[tuple[int, int]]:
    """Address and size of a file like a slot, no larger than half of what is free."""
    free_bytes, _ = _probe.free_and_total_bytes(ram_path)
    size_bytes = min(_SIZE_BYTES, free_bytes // 2 // _LEAST_BYTES * _LEAST_BYTES)
    if not size_bytes:
        raise OSError(f"{ram_path} has no room to try it")
    with _probe.filled_file(ram_path, size_bytes) as address:
        yield address, size_bytes


def _registered(
    driver: Driver, address: int, size_bytes: int, held: contextlib.ExitStack
) -> dict[str, Any]:
    """Whether the driver pins memory of a slot, and how fast; pinned until ``held`` closes."""
    try:
        held.enter_context(driver.current(0))
        elapsed_s = _timed(lambda: driver.register(address, size_bytes))
    except CudaError as error:
        return {"slot_problem": str(error)}
    held.callback(driver.unregister, address)
    return {"slot_bytes_per_s": size_bytes / elapsed_s}


def _measured(
    driver: Driver, count: int, address: int, size_bytes: int, *, is_known: bool
) -> tuple[Gpu, ...]:
    started_s = time.perf_counter()
    found = []
    for ordinal in range(count):
        gpu = _named(driver, ordinal)
        if time.perf_counter() - started_s < _LIMIT_S:
            try:
                gpu.update(_rates(driver, ordinal, address, size_bytes, is_known=is_known))
            except CudaError as error:
                gpu["problem"] = str(error)
        found.append(Gpu(**gpu))
    return tuple(found)


def _named(driver: Driver, ordinal: int) -> dict[str, Any]:
    major, minor = driver.compute_capability(ordinal)
    node = _probe.numa_node_of_pci(driver.pci_address(ordinal))
    cores = _probe.cores_of_numa_node(node) if node is not None else set()
    return {
        "name": driver.device_name(ordinal),
        "capability": f"{major}.{minor}",
        "numa_node": node,
        "is_near": not cores or bool(cores & _probe.cores()),
    }


def _rates(
    driver: Driver, ordinal: int, address: int, size_bytes: int, *, is_known: bool
) -> dict[str, Any]:
    """Copies both ways, as captures and restores make them: the best of a few.

    To and from memory that is not ``is_known`` to the driver they go through pinned memory.
    """
    with driver.current(ordinal), contextlib.ExitStack() as held:
        kernels = Kernels(driver, ordinal)
        held.callback(kernels.close)
        memory = driver.alloc(size_bytes)
        held.callback(driver.free, memory)
        stream = driver.stream()
        held.callback(driver.destroy_stream, stream)

        host_copy = CpuEngine().copy
        passage = Passage(driver, host_copy)
        held.callback(passage.close)
        pinned = PinnedMemory(driver)
        held.callback(pinned.free)

        def to_host() -> None:
            if is_known:
                driver.to_host(address, memory, size_bytes, stream)
                driver.synchronize(stream)
                return
            for first in range(0, size_bytes, _PIECE_BYTES):
                piece_bytes = min(_PIECE_BYTES, size_bytes - first)
                copy = address + first, memory + first, piece_bytes
                passage.put([copy], stream, driver.event_synchronize)
            passage.finish(driver.event_synchronize)

        def to_device() -> None:
            source = address
            if not is_known:
                pinned.hold(size_bytes)
                host_copy([Move(address, pinned.address, size_bytes)])
                source = pinned.address
            driver.to_device(memory, source, size_bytes, stream)
            driver.synchronize(stream)

        return {
            "memory_bytes": driver.memory()[1],
            "kernels": kernels.image,
            "to_host_bytes_per_s": size_bytes / min(_timed(to_host) for _ in range(_REPEATS)),
            "to_device_bytes_per_s": size_bytes / min(_timed(to_device) for _ in range(_REPEATS)),
        }


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return max(time.perf_counter() - started_s, 1e-9)
