"""The engine of a process: host memory by the CPU, devices by theirs, in one shard.

Knows which address belongs to whom. Starts nothing of a device's before the first address of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingOf
from typing import TYPE_CHECKING

from mtckpt.capture.addresses import OnDevice, by_device, has_devices
from mtckpt.capture.base import NO_CUTS, Move, Span, nothing
from mtckpt.capture.cpu import CpuEngine
from mtckpt.capture.cuts import batches_of, clipped
from mtckpt.capture.memory import anonymous
from mtckpt.errors import CaptureFailed, UsageError

if TYPE_CHECKING:
    from mtckpt.capture.base import Capture, Mode
    from mtckpt.capture.cuda import CudaEngine
    from mtckpt.capture.memory import Mapping
    from mtckpt.capture.underway import CudaCapture

__all__ = ["AnyEngine"]


# What is gathered in host memory at a time for devices that want rows of it; whole chunks.
_ACROSS_BYTES = 256 << 20


class _Started:
    """Devices still copy; small arrays of the host's wait beside until they have."""

    is_done = False

    def __init__(self, device: CudaCapture, aside: Mapping, places: list[tuple[int, int, int]]):
        self.is_captured = device.is_captured
        self._device = device
        self._aside = aside
        self._places = places

    def finish(self, digests: memoryview) -> bytes:
        """See ``base.Capture``."""
        left = self._device.finish(digests)
        for target, offset, size_bytes in self._places:
            ctypes.memmove(target, self._aside.address + offset, size_bytes)
        return left


class AnyEngine:
    """See ``base.Engine``."""

    def __init__(self, host: CpuEngine | None = None) -> None:
        """Raises UsageError for a cap in the environment that is none."""
        self._bytes_per_s = _bytes_per_s()
        self._host = host or CpuEngine()
        self._cuda: CudaEngine | None = None
        self._slots: dict[int, int] = {}  # sizes by address
        # Which of these very lists are on which device: 20,000 are not told apart at every save.
        self._split_of: tuple[object, object] = (None, None)
        self._split: tuple[dict[int, list[int]], list[int]] = ({}, [])

    def capture(
        self,
        sources: Sequence[int],
        spans: Sequence[Span],
        base: int,
        digests: memoryview,
        mode: Mode = "auto",
        *,
        is_known: bool = False,
    ) -> Capture:
        if not has_devices(sources):
            return self._host.capture(sources, spans, base, digests)
        cuda = self._devices()
        if sources is not self._split_of[0] or spans is not self._split_of[1]:
            self._split_of = sources, spans
            self._split = by_device(sources, spans)
        there, on_host = self._split
        if base in self._slots:
            cuda.register(base, self._slots[base], next(iter(there)))
        device, covered = cuda.capture(sources, spans, there, base, mode, is_known)
        try:
            return self._beside(device, covered, sources, spans, on_host, base, digests)
        except BaseException as error:
            device.abandon(error)
            raise

    def _beside(
        self,
        device: CudaCapture,
        covered: list[tuple[int, int]],
        sources: Sequence[int],
        spans: Sequence[Span],
        on_host: list[int],
        base: int,
        digests: memoryview,
    ) -> _Started:
        """The host's part; what devices overwrite until they have finished is put aside."""
        begins = [begin for begin, _ in covered]
        inside: list[int] = []
        outside: list[int] = []
        for i in on_host:
            at = bisect_right(begins, spans[i].start) - 1
            crossed = at >= 0 and spans[i].start < covered[at][1]
            (inside if crossed else outside).append(i)
        self._host.capture(
            [sources[i] for i in outside], [spans[i] for i in outside], base, digests
        )
        aside = anonymous(sum(spans[i].size_bytes for i in inside))
        offset, moved, places = 0, [], []
        for i in inside:
            moved.append(Span(offset, spans[i].size_bytes, spans[i].chunk))
            places.append((base + spans[i].start, offset, spans[i].size_bytes))
            offset += spans[i].size_bytes
        self._host.capture([sources[i] for i in inside], moved, aside.address, digests)
        return _Started(device, aside, places)

    def register(self, address: int, size_bytes: int) -> None:
        """See ``base.Engine``. Done at once if this process has captured from a device."""
        self._slots[address] = size_bytes
        if self._cuda is not None:
            self._cuda.register(address, size_bytes)

    def unregister(self, address: int) -> bool:
        """See ``base.Engine``."""
        self._slots.pop(address, None)
        return self._cuda is None or self._cuda.unregister(address)

    def holds(self, address: int) -> bool:
        """See ``base.Engine``."""
        return self._cuda is not None and self._cuda.holds(address)

    def close(self) -> None:
        """See ``base.Engine``."""
        if self._cuda is not None:
            self._cuda.close()
            self._cuda = None

    def verify(self, base: int, spans: Sequence[Span], digests: memoryview) -> list[int]:
        return self._host.verify(base, spans, digests)

    def settle(self, targets: Iterable[int]) -> None:
        """See ``base.Engine``."""
        ordinals = {kind.ordinal for kind in set(map(type, targets)) if issubclass(kind, OnDevice)}
        if ordinals:
            self._devices().settle(sorted(ordinals))

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
        *,
        cuts: MappingOf[int, Sequence[Move]] = NO_CUTS,
        whole: bool = False,
        placing: Callable[[], None] = nothing,
    ) -> list[int]:
        across = {i for i, moves in cuts.items() if has_devices(move.target for move in moves)}
        if not across and not has_devices(targets):
            return self._host.fetch(
                fd, spans, targets, digests, progress, cuts=cuts, whole=whole, placing=placing
            )
        _, hosts = by_device(targets, spans)
        bad: list[int] = []
        if whole:  # the host's part goes last: it has been looked at first
            here = [spans[i] for i in hosts]
            bad = self._host.fetch(fd, here, [0] * len(here), digests, lambda _: None)
            if bad:
                targets = [type(target)(0) for target in targets]
        waits = whole and not bad  # for all to be sound; else it is only looked at
        there = self._devices().fetch(
            fd, spans, targets, digests, progress, whole=waits, placing=placing
        )
        found = [hosts[i] for i in bad]
        if not (whole and (bad or there)):
            own = [i for i in hosts if i not in across]
            bad = self._host.fetch(
                fd, [spans[i] for i in own], [targets[i] for i in own], digests, progress,
                cuts={at: cuts[i] for at, i in enumerate(own) if i in cuts}, placing=placing,
            )  # fmt: skip
            found = [own[i] for i in bad]
            found += self._fetch_across(
                fd, spans, {i: cuts[i] for i in sorted(across)}, digests, progress, placing
            )
        return sorted({*there, *found})

    def _fetch_across(
        self,
        fd: int,
        spans: Sequence[Span],
        cuts: MappingOf[int, Sequence[Move]],
        digests: memoryview,
        progress: Callable[[int], None],
        placing: Callable[[], None],
    ) -> set[int]:
        """Rows for devices, by way of host memory in which they are checked; returns what differs.

        Every piece of memory on the way is used again, and holds what one copy is worth.
        """
        bad: set[int] = set()
        memory: Mapping | None = None
        for batch in batches_of(spans, cuts, _ACROSS_BYTES):
            parts = [part for _, _, part in batch]
            size_bytes = sum(part.size_bytes for part in parts)
            if memory is None or memory.size_bytes < size_bytes:
                memory = anonymous(size_bytes)
            ends = itertools.accumulate((part.size_bytes for part in parts), initial=memory.address)
            at = list(ends)[:-1]
            wrong = self._host.fetch(fd, parts, at, digests, progress)
            rows = []
            for number, (which, begin, part) in enumerate(batch):
                if number in wrong:
                    bad.add(which)
                    continue
                for move in cuts[which]:
                    rows += [
                        row._replace(source=row.source + at[number] - begin)
                        for row in clipped(move, begin, begin + part.size_bytes)
                    ]
            self.copy(rows, placing)
        return bad

    def copy(self, moves: Sequence[Move], placing: Callable[[], None] = nothing) -> None:
        on_host: list[Move] = []
        there: list[Move] = []
        for move in moves:
            is_there = isinstance(move.source, OnDevice) or isinstance(move.target, OnDevice)
            (there if is_there else on_host).append(move)
        if there:
            self._devices().copy(there, on_host, placing)
        else:
            self._host.copy(on_host, placing)

    def _devices(self) -> CudaEngine:
        if self._cuda is None:
            from mtckpt.capture.cuda import CudaEngine  # brings NumPy along
            from mtckpt.capture.driver import Driver

            driver = Driver.load()
            if driver is None:
                raise CaptureFailed(
                    "arrays are on a CUDA device, and there is no driver for it", stage="captured"
                )
            self._cuda = CudaEngine(driver, self._host.copy, self._bytes_per_s)
        return self._cuda


def _bytes_per_s() -> float:
    """What drains may take of the bus; 0 is no limit."""
    name = "MTCKPT_CAPTURE_BYTES_PER_S"
    text = os.environ.get(name, "0")
    with contextlib.suppress(ValueError):
        if (value := float(text)) >= 0:
            return value
    raise UsageError(
        f"{name}={text!r} is no number of bytes a second",
        state="nothing was done",
        actions=("give digits only: 2e9 is 2 GB a second, and 0 is no cap",),
    )
