"""The engine for CUDA devices: which memory a capture passes through, and when it is waited for.

Knows the driver's lanes, the frameworks' current streams, and what device memory is free. Does not
know states or files. PyTorch lends the arena from a pool of its own, which it may take back when it
runs out; without PyTorch it comes from the driver. Live state is never allocated here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mtckpt.capture import gates
from mtckpt.capture.addresses import OnDevice, must_be_awaited
from mtckpt.capture.bringing import bring
from mtckpt.capture.draining import Draining, Lane
from mtckpt.capture.driver import CudaError, Driver
from mtckpt.capture.gates import Gate
from mtckpt.capture.kernels import Kernels
from mtckpt.capture.landing import land
from mtckpt.capture.windows import WINDOW_BYTES, Spread, arena_of, room_bytes, windows
from mtckpt.errors import CaptureFailed, RestoreFailed

if TYPE_CHECKING:
    from mtckpt.capture.base import Mode, Move, Span

__all__ = ["CudaCapture", "CudaEngine"]

logger = logging.getLogger(__name__)

_FINISH_S = 600.0
# Two of these, rows and digests are what a capture needs that has no arena of its own.
_TURN_BYTES = 24 << 20
_SMALL_TURN_BYTES = 4 << 20  # beside another one


class _Arenas:
    """Device memory for snapshots, lent for one capture at a time."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._driver = driver
        self._ordinal = ordinal
        self._pool: Any = None
        self._pooled_bytes = 0  # what a pool of PyTorch's still holds for us
        self._own = (0, 0)  # address and size of memory of the driver's

    def free_bytes(self) -> tuple[int, int]:
        """What a new arena could have, and the whole memory of the device."""
        free, total = self._driver.memory()
        return free + self._pooled_bytes + self._own[1], total

    def take(self, size_bytes: int) -> tuple[int, object] | None:
        """Memory and what keeps it; None if there is none after all."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return self._of_torch(torch, size_bytes)
        if self._own[1] < size_bytes:
            self.close()
            try:
                self._own = (self._driver.alloc(size_bytes), size_bytes)
            except CudaError:
                return None
        return self._own[0], None

    def _of_torch(self, torch: Any, size_bytes: int) -> tuple[int, object] | None:
        try:
            with self._pool_of(torch):
                memory = torch.empty(
                    size_bytes, dtype=torch.uint8, device=torch.device("cuda", self._ordinal)
                )
        except torch.OutOfMemoryError:
            self._pooled_bytes = 0
            return None
        self._pooled_bytes = max(size_bytes, self._pooled_bytes)
        return memory.data_ptr(), memory

    @contextlib.contextmanager
    def _pool_of(self, torch: Any) -> Iterator[None]:
        """A pool that PyTorch uses for others before it runs out of memory, where it can."""
        if self._pool is None:
            try:
                self._pool = torch.cuda.MemPool(use_on_oom=True)
            except (AttributeError, TypeError):  # PyTorch before 2.8: memory is cached for all
                self._pool = False
        if self._pool is False:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool, device=self._ordinal):
            yield

    def close(self) -> None:
        """Give back memory of the driver's, and the pool."""
        self._pool, self._pooled_bytes = None, 0
        if self._own[0]:
            self._driver.free(self._own[0])
        self._own = (0, 0)


class _Device:
    """What is kept of one device from one save to the next."""

    def __init__(self, driver: Driver, ordinal: int, kernels: Kernels) -> None:
        self.kernels = kernels
        self.lane = Lane(driver, ordinal, kernels)
        self.arenas = _Arenas(driver, ordinal)
        self._spans: Sequence[Span] = ()
        self._chosen: Sequence[int] = ()
        self._spread: Spread | None = None

    def spread(self, spans: Sequence[Span], chosen: list[int]) -> Spread:
        """The chunks of these spans; made anew only if they are others than last time."""
        known = self._spread
        if known is None or self._spans is not spans or self._chosen is not chosen:
            known = self._spread = Spread(spans, chosen)
            self._spans, self._chosen = spans, chosen
        return known


class CudaCapture:
    """See ``base.Capture``."""

    def __init__(self, parts: list[tuple[Draining, object]], passed: list[Gate]) -> None:
        self.is_captured = not passed
        self._parts = parts
        self._gates = passed

    def finish(self, digests: memoryview) -> None:
        """Wait until all bytes and digests are in host memory. Raises CaptureFailed."""
        bytes_per_s = float(os.environ.get("MTCKPT_CAPTURE_BYTES_PER_S", "0"))
        try:
            while self._parts:
                draining, _ = self._parts[0]
                with _as_capture_failed():
                    draining.finish(digests, bytes_per_s, _FINISH_S)
                del draining
                self._parts.pop(0)  # and the memory of its arena
        finally:
            for gate in self._gates:
                gates.close(gate)


class CudaEngine:
    """Captures from devices. One capture at a time, from any thread."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        # By ordinal and whether it is for values that are taken during training.
        self._devices: dict[tuple[int, bool], _Device] = {}
        self._kernels: dict[int, Kernels] = {}
        self._registered: dict[int, int] = {}  # by which device
        self._lock = threading.Lock()
        self._clearing: list[threading.Thread] = []
        self._refused = False

    # -- slots -----------------------------------------------------------------------------------

    def register(self, address: int, size_bytes: int, ordinal: int | None = None) -> bool:
        """Pin memory of a slot, so that devices copy straight to it; False where that is refused.

        Slower then, and said once. It is done by way of a device that is used anyway: ``ordinal``,
        or one that was captured from before; without any, it is left to the capture.
        """
        if ordinal is None:
            ordinal = next((known for known, _ in self._devices), None)
        if address in self._registered or not size_bytes or ordinal is None:
            return address in self._registered
        with self._driver.current(ordinal), self._driver.relaxed():
            try:
                self._driver.register(address, size_bytes)
            except CudaError as error:
                if not self._refused:
                    self._refused = True
                    logger.warning("slots cannot be registered with the device (%s): slower", error)
                return False
        self._registered[address] = ordinal
        return True

    def unregister(self, address: int) -> None:
        """Before the memory is unmapped. Nothing may be under way to it."""
        ordinal = self._registered.pop(address, None)
        if ordinal is not None:
            with self._driver.current(ordinal), self._driver.relaxed():
                self._driver.unregister(address)

    # -- capture ---------------------------------------------------------------------------------

    def capture(
        self,
        sources: Sequence[int],
        spans: Sequence[Span],
        by_device: dict[int, list[int]],
        base: int,
        mode: Mode,
    ) -> tuple[CudaCapture, list[tuple[int, int]]]:
        """Take the values of those ``sources`` that ``by_device`` names, as of now.

        Returns what is to be finished, and the stretches of the shard that its copies cover: bytes
        of others inside of them are overwritten until it has finished. Waits until the devices have
        read everything, in bounded time, where a source is ``awaited``. Raises CaptureFailed.
        """
        parts: list[tuple[Draining, object]] = []
        covered: list[tuple[int, int]] = []
        passed: list[Gate] = []
        late = gates.late_addresses() if "overlap" in mode else set()
        with self._lock, _as_capture_failed():
            streams = {ordinal: self._streams(ordinal) for ordinal in by_device}
            shares = [
                (ordinal, share, is_late)
                for ordinal, chosen in by_device.items()
                for share, is_late in _shares(chosen, sources, late)
            ]
            for ordinal, share, is_late in shares:
                with self._driver.current(ordinal), self._driver.relaxed():
                    device = self._device(ordinal, is_late=is_late)
                    turn_bytes = _TURN_BYTES
                    if late and not is_late:
                        turn_bytes = _SMALL_TURN_BYTES
                    part = self._start(
                        device, share, sources, spans, base, mode, turn_bytes,
                        streams[ordinal], covered, alone=len(shares) == 1,
                    )  # fmt: skip
                    parts.append(part)
                    if is_late:
                        passed.append(Gate(self._driver, ordinal, device.lane.captured))
                        gates.open_one(passed[-1])
                        continue
                    for stream in streams[ordinal]:
                        self._driver.wait(stream, device.lane.captured)
            if must_be_awaited(sources):
                for (draining, _), (_, share, _) in zip(parts, shares, strict=True):
                    if must_be_awaited(sources[i] for i in share):
                        draining.until_read(_FINISH_S)
        return CudaCapture(parts, passed), sorted(covered)

    def _start(
        self,
        device: _Device,
        chosen: list[int],
        sources: Sequence[int],
        spans: Sequence[Span],
        base: int,
        mode: Mode,
        turn_bytes: int,
        streams: Sequence[int],
        covered: list[tuple[int, int]],
        *,
        alone: bool,
    ) -> tuple[Draining, object]:
        spread = device.spread(spans, chosen)
        cut = windows(spread, WINDOW_BYTES, alone=alone)
        wanted = arena_of(cut, sys.maxsize)
        room = room_bytes(mode, wanted.size_bytes, *device.arenas.free_bytes())
        if room < wanted.size_bytes:
            cut = windows(spread, turn_bytes, alone=alone)
        arena = arena_of(cut, room)
        lent = device.arenas.take(arena.size_bytes)
        if lent is None:
            cut = windows(spread, turn_bytes, alone=alone)
            arena = arena_of(cut, 0)
            lent = device.arenas.take(arena.size_bytes)
        if lent is None:
            raise CaptureFailed(
                f"device {device.lane.ordinal} has no memory left to capture through",
                stage="captured",
                needed_bytes=arena.size_bytes,
                actions=("leave some hundred MiB of device memory free",),
            )
        address, owner = lent
        at = sources if len(chosen) == len(sources) else [sources[i] for i in chosen]
        draining = device.lane.start(spread, cut, arena, address, at, base, streams)
        covered += [(window.begin, window.end) for window in cut]
        return draining, owner

    def _streams(self, ordinal: int) -> list[int]:
        """The streams whose work a user expects to be done before what is called now.

        The current one, and the default one, where whoever knows nothing of streams works.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return []  # JAX has none to ask for: its arrays have been computed, and are awaited
        current = torch.cuda.current_stream(ordinal).cuda_stream
        with self._driver.current(ordinal):
            if self._driver.capturing(current):
                raise CaptureFailed(
                    "save() was called while a CUDA graph is captured: there are no values yet",
                    stage="captured",
                    actions=("call save() outside of torch.cuda.graph()",),
                )
            if current == 0 or self._driver.capturing(0):  # by another thread
                return [current]
        return [current, 0]

    # -- restore ---------------------------------------------------------------------------------

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
        *,
        whole: bool,
    ) -> list[int]:
        """See ``base.Engine``, for those targets that are on devices. Raises RestoreFailed."""
        bad: list[int] = []
        by_device = _by_device(targets, spans)
        if whole and len(by_device) > 1:  # each has to wait for what the others say
            nowhere = [type(target)(0) for target in targets]
            bad = self.fetch(fd, spans, nowhere, digests, lambda _: None, whole=False)
            if bad:
                return bad
            whole = False
        with _as_restore_failed():
            for ordinal, chosen in by_device.items():
                self._wait_for_streams(ordinal)
                at = [targets[i] for i in chosen]
                bad += land(
                    self._driver, ordinal, self._kernels_of(ordinal),
                    fd, spans, chosen, at, digests, progress, self._later, whole=whole,
                )  # fmt: skip
        return sorted(bad)

    def copy(self, moves: Sequence[Move], host_copy: Callable[[Sequence[Move]], None]) -> None:
        """See ``base.Engine``, for moves from or to devices. Raises RestoreFailed."""
        by_device: dict[int, list[Move]] = {}
        within: list[Move] = []
        for move in moves:
            if isinstance(move.source, OnDevice):
                within.append(move)
            elif isinstance(move.target, OnDevice):
                by_device.setdefault(move.target.ordinal, []).append(move)
        with _as_restore_failed():
            self._copy_from_devices(within)
            for ordinal, these in by_device.items():
                self._wait_for_streams(ordinal)
                bring(self._driver, ordinal, self._kernels_of(ordinal), these, host_copy)

    def _later(self, work: Callable[[], None]) -> None:
        """Do in the background what nobody has to wait for, before the engine is closed."""
        thread = threading.Thread(target=work, name="mtckpt-clear", daemon=True)
        thread.start()
        self._clearing = [*(one for one in self._clearing if one.is_alive()), thread]

    def _copy_from_devices(self, moves: Sequence[Move]) -> None:
        """One by one: what was restored to one place and is wanted at another, too."""
        for move in moves:
            assert isinstance(move.source, OnDevice)
            with self._driver.current(move.source.ordinal), self._driver.relaxed():
                stream = self._driver.stream()
                to_device = isinstance(move.target, OnDevice)
                copy = self._driver.on_device if to_device else self._driver.to_host
                for turn in range(move.times):
                    source = int(move.source) + turn * move.source_step
                    copy(
                        int(move.target) + turn * move.target_step, source, move.size_bytes, stream
                    )
                self._driver.synchronize(stream)
                self._driver.destroy_stream(stream)

    def _wait_for_streams(self, ordinal: int) -> None:
        """What was put on the device before may still use the memory that is written to now."""
        streams = self._streams(ordinal)
        with self._driver.current(ordinal), self._driver.relaxed():
            for stream in streams:
                self._driver.synchronize(stream)
            for (other, _), device in self._devices.items():
                if other == ordinal:
                    self._driver.synchronize(device.lane.packing)

    def _kernels_of(self, ordinal: int) -> Kernels:
        if ordinal not in self._kernels:
            self._kernels[ordinal] = Kernels(self._driver, ordinal)
        return self._kernels[ordinal]

    def _device(self, ordinal: int, *, is_late: bool) -> _Device:
        key = ordinal, is_late
        if key not in self._devices:
            self._devices[key] = _Device(self._driver, ordinal, self._kernels_of(ordinal))
        return self._devices[key]

    def close(self) -> None:
        """Give back all device memory, streams and registrations. Nothing may be under way."""
        for thread in self._clearing:
            thread.join(_FINISH_S)
        for address in list(self._registered):
            self.unregister(address)
        for (ordinal, _), device in self._devices.items():
            device.lane.close()
            with self._driver.current(ordinal), self._driver.relaxed():
                device.arenas.close()
        self._devices.clear()
        for kernels in self._kernels.values():
            kernels.close()
        self._kernels.clear()


def _shares(
    chosen: list[int], sources: Sequence[int], late: set[int]
) -> Iterator[tuple[list[int], bool]]:
    """What is taken now, and what may be taken later."""
    if not late:
        yield chosen, False
        return
    for share, is_late in (
        ([i for i in chosen if sources[i] not in late], False),
        ([i for i in chosen if sources[i] in late], True),
    ):
        if share:
            yield share, is_late


def _by_device(addresses: Sequence[int], spans: Sequence[Span]) -> dict[int, list[int]]:
    """Which of the addresses are on each device; empty arrays are on none."""
    found: dict[int, list[int]] = {}
    for i, address in enumerate(addresses):
        if isinstance(address, OnDevice) and spans[i].size_bytes:
            found.setdefault(address.ordinal, []).append(i)
    return found


@contextlib.contextmanager
def _as_restore_failed() -> Iterator[None]:
    try:
        yield
    except (CudaError, TimeoutError) as error:
        raise RestoreFailed(
            f"the device refused: {error}",
            live_state="undefined",
            state="live state is undefined: the device failed while it was written",
            actions=("look for an earlier error of the device in the log of the job",),
        ) from error


@contextlib.contextmanager
def _as_capture_failed() -> Iterator[None]:
    try:
        yield
    except CudaError as error:
        raise CaptureFailed(
            f"the device refused: {error}",
            stage="captured",
            actions=("look for an earlier error of the device in the log of the job",),
        ) from error
