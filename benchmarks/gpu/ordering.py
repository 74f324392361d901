"""What the driver promises about order, tried beside PyTorch's own streams and graphs.

The design of capture rests on these answers; each is a line of booleans, with the time a call took.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mtckpt.capture.driver import CudaError, Driver

BUSY_CYCLES = 60_000_000  # some 35 ms


def figures(driver: Driver) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and experiments; nothing where PyTorch does not see the device."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    yield "contexts and pointers", lambda: _contexts(driver, torch)
    yield "what calls cost", lambda: _calls(driver, torch)
    yield "other threads while a graph is captured", lambda: _beside_capture(driver, torch)


def _contexts(driver: Driver, torch: Any) -> dict[str, Any]:
    torch.cuda.init()
    tensor = torch.zeros(1000, device="cuda")
    pinned = torch.zeros(1000, pin_memory=True)
    plain = torch.zeros(1000)
    found: dict[str, Any] = {}

    def elsewhere() -> None:
        """In a thread that has no context."""
        found["device"] = driver.ordinal_of(tensor.data_ptr() + 3000)
        found["pinned"] = driver.ordinal_of(pinned.data_ptr())
        found["host"] = driver.ordinal_of(plain.data_ptr())
        with driver.current(0):
            event = driver.event()
            driver.record(event, torch.cuda.Stream().cuda_stream)
            driver.event_synchronize(event)
            driver.destroy_event(event)
        found["a_stream_of_torch_is_good_here"] = True

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    found["default_stream_handle"] = torch.cuda.current_stream().cuda_stream
    return found


def _calls(driver: Driver, torch: Any) -> dict[str, Any]:
    """Microseconds a call, from Python, with nothing under way."""
    torch.cuda.synchronize()
    stream, event = driver.stream(), driver.event()
    host, there = driver.alloc_host(1 << 20), driver.alloc(1 << 20)
    _others = [torch.cuda.Stream() for _ in range(8)]

    def nothing() -> None:
        with driver.current(0):
            pass

    calls: dict[str, Callable[[], object]] = {
        "current": nothing,
        "record": lambda: driver.record(event, stream),
        "wait": lambda: driver.wait(stream, event),
        "event_done": lambda: driver.event_done(event),
        "capturing": lambda: driver.capturing(stream),
        "ordinal_of": lambda: driver.ordinal_of(there),
        "to_host": lambda: driver.to_host(host, there, 4096, stream),
        "memory": driver.memory,
    }
    found = {}
    for name, call in calls.items():
        call()
        started = time.perf_counter()
        for _ in range(200):
            call()
        found[f"{name}_us"] = round((time.perf_counter() - started) / 200 * 1e6, 2)
        driver.synchronize(stream)
    return found


def _spoils(torch: Any, act: Callable[[], None], *, in_thread: bool = True) -> dict[str, Any]:
    """Does a graph that is being captured survive what is done meanwhile, and what did that say?"""
    torch.cuda.synchronize()
    tensor = torch.zeros(8, device="cuda")
    said = "went well"

    def attempt() -> None:
        nonlocal said
        try:
            act()
        except CudaError as error:
            said = error.name

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):  # in the mode global
            tensor.add_(1)
            if in_thread:
                thread = threading.Thread(target=attempt)
                thread.start()
                thread.join()
            else:
                attempt()
            tensor.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        survived = tensor.tolist() == [2.0] * 8
    except RuntimeError as error:
        survived = False
        said += f"; capture: {str(error).splitlines()[0][:90]}"
    return {"survived": survived, "said": said}


def _beside_capture(driver: Driver, torch: Any) -> dict[str, Any]:
    stream, event = driver.stream(), driver.event()
    host, there = driver.alloc_host(1 << 20), driver.alloc(1 << 20)
    more = ctypes.create_string_buffer(1 << 20)
    driver.record(event, stream)

    def relaxed(act: Callable[[], object]) -> Callable[[], None]:
        def inside() -> None:
            with driver.current(0), driver.relaxed():
                act()

        return inside

    def strict(act: Callable[[], object]) -> Callable[[], None]:
        def inside() -> None:
            with driver.current(0):
                act()

        return inside

    def copied() -> None:
        driver.to_host(host, there, 1 << 20, stream)
        driver.record(event, stream)
        while not driver.event_done(event):
            time.sleep(0)

    def registered() -> None:
        driver.register(ctypes.addressof(more), 1 << 20)
        driver.unregister(ctypes.addressof(more))

    acts: dict[str, Callable[[], object]] = {
        "copy and ask": copied,
        "ask": lambda: driver.event_done(event),
        "sleep until done": lambda: driver.event_synchronize(event),
        "register": registered,
        "allocate": lambda: driver.free(driver.alloc(1 << 20)),
    }
    found: dict[str, Any] = {}
    for name, act in acts.items():
        found[f"relaxed: {name}"] = _spoils(torch, relaxed(act))
        found[f"not relaxed: {name}"] = _spoils(torch, strict(act))
    capturing: list[bool] = []

    def asked() -> None:
        capturing.append(driver.capturing(torch.cuda.current_stream().cuda_stream))
        capturing.append(driver.capturing(stream))
        capturing.append(driver.capturing(0))

    found["capturing"] = {**_spoils(torch, asked, in_thread=False), "is": capturing}
    return found
