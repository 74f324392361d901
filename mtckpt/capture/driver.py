"""The CUDA driver, called by ctypes: contexts, memory, streams, events, copies, kernels.

Knows addresses, handles (plain integers) and ordinals, which count the devices as this process sees
them. Does not know frameworks: it works in the *primary* context of a device, the one the runtimes
of PyTorch and of JAX work in too, so addresses and streams of theirs are good here. Every call lets
go of the interpreter lock. Nothing is loaded before ``Driver.load()``, and nothing is checked that
the driver checks itself: a wrong address ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, ClassVar, Literal

__all__ = ["ALREADY_REGISTERED", "OUT_OF_MEMORY", "CudaError", "Driver", "giving_back"]

logger = logging.getLogger(__name__)

LIBRARY = "libcuda.so.1"

_OUT_POINTER = POINTER(c_void_p)
_OUT_INT = POINTER(c_int)
_OUT_SIZE = POINTER(c_size_t)

# As cuda.h declares them; what the header maps to a newer symbol is written with its suffix. Host
# addresses and handles are void pointers, device addresses are 64-bit integers.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_OUT_INT,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (_OUT_INT,),
    "cuDeviceGet": (_OUT_INT, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_OUT_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT_POINTER, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT_POINTER,),
    "cuCtxGetStreamPriorityRange": (_OUT_INT, _OUT_INT),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemGetInfo_v2": (_OUT_SIZE, _OUT_SIZE),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_OUT_POINTER, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuStreamCreateWithPriority": (_OUT_POINTER, c_uint, c_int),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamIsCapturing": (c_void_p, _OUT_INT),
    "cuThreadExchangeStreamCaptureMode": (_OUT_INT,),
    "cuEventCreate": (_OUT_POINTER, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuModuleLoadData": (_OUT_POINTER, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_OUT_POINTER, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, _OUT_POINTER, _OUT_POINTER),
}

_SUCCESS = 0
_INVALID_VALUE = 1
OUT_OF_MEMORY = 2
_NOT_READY = 600
ALREADY_REGISTERED = 712
_STREAM_CAPTURE_IMPLICIT = 906

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE and CU_MEMHOSTALLOC_PORTABLE
_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY
_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC = 1
_EVENT_DISABLE_TIMING = 2
_CAPTURE_MODE_RELAXED = 2
_POINTER_MEMORY_TYPE = 2
_POINTER_DEVICE_ORDINAL = 9
_MEMORY_DEVICE = 2
_MULTIPROCESSOR_COUNT = 16
_COMPUTE_CAPABILITY = 75, 76
_PCI_DOMAIN, _PCI_BUS, _PCI_SLOT = 50, 33, 34


class CudaError(Exception):
    """The driver refused a call: ``call`` is its name, ``code`` and ``name`` are what it said."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {name} ({code}): {text}")
        self.call = call
        self.code = code
        self.name = name


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """For what is given back: where the driver refuses it, nobody can do more than log that."""
    try:
        yield
    except CudaError as error:
        logger.warning("not given back to the device: %s", error)


@functools.cache
def _packed(num_arguments: int) -> tuple[Any, Any]:
    return c_uint64 * num_arguments, c_void_p * num_arguments


class Driver:
    """The driver library of this process. Methods raise CudaError; all may be called by any thread.

    What belongs to a context (memory, streams, events, modules) is made, used and given back inside
    ``with driver.current(ordinal)``.
    """

    _loaded: ClassVar[tuple[int, Driver | None] | None] = None
    _loading = threading.Lock()

    def __init__(self, library: str = LIBRARY) -> None:
        """Load and start the driver; OSError, AttributeError or CudaError where that fails."""
        found = ctypes.CDLL(library)
        self._functions = {
            name: _typed(found, name, arguments) for name, arguments in SIGNATURES.items()
        }
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._do("cuInit", 0)

    @classmethod
    def load(cls) -> Driver | None:
        """The driver of this process, or None where there is none or no device. Kept per process.

        A fork of a process that uses CUDA gets None: the driver does not work there.
        """
        with cls._loading:
            if cls._loaded is None or cls._loaded[0] != os.getpid():
                cls._loaded = os.getpid(), cls._try_to_load()
            return cls._loaded[1]

    @classmethod
    def _try_to_load(cls) -> Driver | None:
        try:
            driver = cls()
            return driver if driver.num_devices() else None
        except (OSError, AttributeError, CudaError) as error:
            logger.debug("no CUDA here: %s", error)
            return None

    def _do(self, call: str, *arguments: Any) -> None:
        code = self._functions[call](*arguments)
        if code != _SUCCESS:
            raise self._error(call, code)

    def _done(self, call: str, handle: int) -> bool:
        code = self._functions[call](handle)
        if code == _NOT_READY:
            return False
        if code != _SUCCESS:
            raise self._error(call, code)
        return True

    def _made(self, call: str, *arguments: Any) -> int:
        out = c_void_p()
        self._do(call, byref(out), *arguments)
        return out.value or 0

    def _asked(self, call: str, *arguments: Any) -> int:
        out = c_int()
        self._do(call, byref(out), *arguments)
        return out.value

    def _error(self, call: str, code: int) -> CudaError:
        texts = []
        for question in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._functions[question](code, byref(text))
            texts.append((text.value or b"unknown error").decode("ascii", "replace"))
        return CudaError(call, code, *texts)

    # ------------------------------------------------------------------- devices and contexts

    def version(self) -> int:
        """The CUDA version the driver is for: 1000 times the major plus 10 times the minor one."""
        return self._asked("cuDriverGetVersion")

    def num_devices(self) -> int:
        return self._asked("cuDeviceGetCount")

    def device_name(self, ordinal: int) -> str:
        name = ctypes.create_string_buffer(256)
        self._do("cuDeviceGetName", name, len(name), self._asked("cuDeviceGet", ordinal))
        return name.value.decode("ascii", "replace")

    def num_multiprocessors(self, ordinal: int) -> int:
        return self._attribute(ordinal, _MULTIPROCESSOR_COUNT)

    def compute_capability(self, ordinal: int) -> tuple[int, int]:
        """What generation a device is of, as major and minor number."""
        major, minor = _COMPUTE_CAPABILITY
        return self._attribute(ordinal, major), self._attribute(ordinal, minor)

    def pci_address(self, ordinal: int) -> str:
        """Where a device is, as the kernel names it: 0000:1b:00.0."""
        places = (_PCI_DOMAIN, _PCI_BUS, _PCI_SLOT)
        domain, bus, slot = (self._attribute(ordinal, place) for place in places)
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def _attribute(self, ordinal: int, attribute: int) -> int:
        device = self._asked("cuDeviceGet", ordinal)
        return self._asked("cuDeviceGetAttribute", attribute, device)

    @contextlib.contextmanager
    def current(self, ordinal: int) -> Iterator[None]:
        """The primary context of a device is this thread's within the block.

        It is made if nobody has made it, and kept until ``close``.
        """
        self._do("cuCtxPushCurrent_v2", self._context(ordinal))
        try:
            yield
        finally:
            # It only fails where every other call does, and what failed in the block says more.
            self._functions["cuCtxPopCurrent_v2"](byref(c_void_p()))

    def _context(self, ordinal: int) -> int:
        context = self._contexts.get(ordinal)
        if context is None:
            with self._lock:
                context = self._contexts.get(ordinal)
                if context is None:
                    device = self._asked("cuDeviceGet", ordinal)
                    context = self._made("cuDevicePrimaryCtxRetain", device)
                    self._contexts[ordinal] = context
        return context

    def close(self) -> None:
        """Let the contexts go. They live on as long as somebody else uses them."""
        with self._lock:
            while self._contexts:
                ordinal, _ = self._contexts.popitem()
                device = self._asked("cuDeviceGet", ordinal)
                self._do("cuDevicePrimaryCtxRelease_v2", device)

    # ---------------------------------------------------------------------------------- memory

    def ordinal_of(self, address: int) -> int | None:
        """The device whose memory lies at ``address``, or None if it is no device's memory."""
        out = c_int()
        attribute = self._functions["cuPointerGetAttribute"]
        code = attribute(byref(out), _POINTER_MEMORY_TYPE, address)
        if code == _INVALID_VALUE or (code == _SUCCESS and out.value != _MEMORY_DEVICE):
            return None
        if code == _SUCCESS:
            code = attribute(byref(out), _POINTER_DEVICE_ORDINAL, address)
        if code != _SUCCESS:
            raise self._error("cuPointerGetAttribute", code)
        return out.value

    def memory(self, ordinal: int | None = None) -> tuple[int, int]:
        """Free and total bytes of a device; without ``ordinal``, of the current context's."""
        if ordinal is not None:
            with self.current(ordinal):
                return self.memory()
        free, total = c_size_t(), c_size_t()
        self._do("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def register(self, address: int, size_bytes: int, *, read_only: bool = False) -> None:
        """Pin mapped memory, for the copies of all devices.

        ``read_only`` memory, which no device may write to, is refused by some devices.
        """
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        self._do("cuMemHostRegister_v2", address, size_bytes, flags)

    def unregister(self, address: int) -> None:
        """Let go of pages that ``register`` pinned, before they are unmapped."""
        self._do("cuMemHostUnregister", address)

    def alloc(self, size_bytes: int) -> int:
        """Device memory, until ``free``."""
        out = c_uint64()
        self._do("cuMemAlloc_v2", byref(out), size_bytes)
        return out.value

    def free(self, address: int) -> None:
        """Waits for whatever the device is doing."""
        self._do("cuMemFree_v2", address)

    def alloc_host(self, size_bytes: int) -> int:
        """Pinned host memory, until ``free_host``."""
        return self._made("cuMemHostAlloc", size_bytes, _PORTABLE)

    def free_host(self, address: int) -> None:
        self._do("cuMemFreeHost", address)

    # --------------------------------------------------------------------- streams and events

    def stream(self, priority: Literal["lowest", "highest"] = "lowest") -> int:
        """A stream that does not wait for the default stream, nor makes it wait."""
        lowest, highest = c_int(), c_int()
        self._do("cuCtxGetStreamPriorityRange", byref(lowest), byref(highest))
        chosen = lowest if priority == "lowest" else highest
        return self._made("cuStreamCreateWithPriority", _NON_BLOCKING, chosen.value)

    def destroy_stream(self, stream: int) -> None:
        """Work that was put on it is still done."""
        self._do("cuStreamDestroy_v2", stream)

    def stream_idle(self, stream: int) -> bool:
        return self._done("cuStreamQuery", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all that was put on the stream."""
        self._do("cuStreamSynchronize", stream)

    def capturing(self, stream: int) -> bool:
        """Whether work put on the stream becomes part of a graph instead of being done.

        True of the default stream, too, while it cannot be used because another one is capturing.
        """
        out = c_int()
        code = self._functions["cuStreamIsCapturing"](stream, byref(out))
        if code == _STREAM_CAPTURE_IMPLICIT:
            return True
        if code != _SUCCESS:
            raise self._error("cuStreamIsCapturing", code)
        return out.value != 0

    @contextlib.contextmanager
    def relaxed(self) -> Iterator[None]:
        """Calls of this thread do not spoil a graph that another thread captures meanwhile.

        Without it, allocating, registering or asking for an event while any thread captures in the
        default mode ends that capture. Nothing is to be put on a capturing stream within the block.
        """
        mode = c_int(_CAPTURE_MODE_RELAXED)
        self._do("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            self._do("cuThreadExchangeStreamCaptureMode", byref(mode))

    def event(self, *, blocking: bool = False) -> int:
        """An event without a time. ``blocking``: ``event_synchronize`` sleeps instead of spinning.

        One that was never recorded counts as done.
        """
        flags = _EVENT_DISABLE_TIMING | (_EVENT_BLOCKING_SYNC if blocking else 0)
        return self._made("cuEventCreate", flags)

    def destroy_event(self, event: int) -> None:
        self._do("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """The event is done when all that was put on the stream so far is."""
        self._do("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What is put on the stream from now on waits for the event as recorded now."""
        self._do("cuStreamWaitEvent", stream, event, 0)

    def event_done(self, event: int) -> bool:
        return self._done("cuEventQuery", event)

    def event_synchronize(self, event: int) -> None:
        """Wait for the event."""
        self._do("cuEventSynchronize", event)

    # ---------------------------------------------------------------------- copies and kernels

    def to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy device memory to host memory; asynchronously only if that is pinned."""
        self._do("cuMemcpyDtoHAsync_v2", target, source, size_bytes, stream)

    def to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy host memory to device memory; asynchronously only if that is pinned."""
        self._do("cuMemcpyHtoDAsync_v2", target, source, size_bytes, stream)

    def on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy device memory to device memory, asynchronously."""
        self._do("cuMemcpyDtoDAsync_v2", target, source, size_bytes, stream)

    def load_module(self, image: bytes) -> int:
        """Kernels from a cubin, or from PTX text, which the driver compiles for the device."""
        return self._made("cuModuleLoadData", image)

    def unload(self, module: int) -> None:
        self._do("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        return self._made("cuModuleGetFunction", module, name.encode("ascii"))

    def launch(
        self, function: int, grid: int, block: int, shared_bytes: int, stream: int, *arguments: int
    ) -> None:
        """Put a kernel on a stream. Its parameters are 64 bits wide, every one."""
        values_type, pointers_type = _packed(len(arguments))
        values = values_type(*arguments)
        first = ctypes.addressof(values)
        pointers = pointers_type(*range(first, first + 8 * len(arguments), 8))
        shape = grid, 1, 1, block, 1, 1
        self._do("cuLaunchKernel", function, *shape, shared_bytes, stream, pointers, None)


def _typed(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> Any:
    function = library[name]  # a function object of its own, whatever others set on theirs
    function.argtypes = list(arguments)
    function.restype = c_int
    return function
