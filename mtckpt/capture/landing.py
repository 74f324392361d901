"""From a file to device memory: over the bus to a staging place, checked there, then placed.

Knows the driver, rows and windows. Does not know frameworks or steps. A chunk comes to its target
only from a staging place where its digest was found right, on the device: what the bus did to it is
checked along, and nothing bad reaches live memory. A file in memory of large pages is mapped and
made known to the driver as it goes; any other is read into pinned memory by a few threads.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtckpt.capture.buffers import DeviceMemory, PinnedMemory
from mtckpt.capture.driver import OUT_OF_MEMORY, CudaError, giving_back
from mtckpt.capture.memory import Mapping, map_file, read_at, view_at
from mtckpt.capture.windows import ROW_WORDS, Spread, Window, room_bytes, windows
from mtckpt.tiers._blocks import in_threads

if TYPE_CHECKING:
    from mtckpt.capture.base import Span
    from mtckpt.capture.driver import Driver
    from mtckpt.capture.kernels import Kernels

__all__ = ["land"]

_ROW_BYTES = 8 * ROW_WORDS
_ALIGN_BYTES = 512
_READ_BYTES = 4 << 20  # what a thread reads at a time
_WINDOW_BYTES = 32 << 20  # what is copied from a mapping at a time
_MAP_BYTES = 64 << 20  # what of it is made known to the driver at a time
_NUM_THREADS = 8
_READ_PLACES = 2  # of each thread
_MAPPED_PLACES = 3
_LAND_S = 600.0
_POLL_S = 0.0002
_PAGE_BYTES = 4096


class _Job:
    """What one call has to bring: rows and digests on the device, and the flags of bad chunks."""

    def __init__(
        self,
        driver: Driver,
        kernels: Kernels,
        spread: Spread,
        cut: Sequence[Window],
        num_places: int,
        digests: memoryview,
        *,
        waits: bool,
    ) -> None:
        """``waits``: what is sound is placed at the end."""
        self.waits = waits
        self.driver = driver
        self.kernels = kernels
        self.spread = spread
        self.cut = cut
        self.turn_bytes = _turn_bytes(cut)
        self.staging, self.rows = DeviceMemory(driver), DeviceMemory(driver)
        self.expected, self.flags = DeviceMemory(driver), DeviceMemory(driver)
        self.pinned = PinnedMemory(driver)
        self.num_places = num_places
        self.count = int(spread.numbers.max()) + 1
        self.placed = np.empty((0, ROW_WORDS), np.uint64)
        self.stream = 0
        self.digests = digests

    def open(self) -> None:
        """Get what it needs; within ``current`` and ``relaxed``, as all that follows."""
        driver, spread, count = self.driver, self.spread, self.count
        self.staging.hold(self.num_places * self.turn_bytes)
        self.rows.hold(len(spread) * _ROW_BYTES)
        self.expected.hold(8 * count)
        self.flags.hold(8 * (count // 8 + 1))
        self.pinned.hold(max(8 * count, len(spread) * _ROW_BYTES))
        self.stream = driver.stream("highest")
        self._put(self.expected.address, np.frombuffer(self.digests, np.uint64)[:count])
        self._put(self.flags.address, np.zeros(count // 8 + 1, np.uint64))

    def _put(self, target: int, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self.pinned.words(len(words))[:] = words
        self.driver.to_device(target, self.pinned.address, 8 * len(words), self.stream)
        self.driver.synchronize(self.stream)

    def aim(self, targets: Sequence[int], place_of: Sequence[int]) -> None:
        """Bring the rows: from the staging place of their window to their targets."""
        rows = np.empty((len(self.spread), ROW_WORDS), np.uint64)
        shifts = [
            (self.at(place, window) - window.begin) % (1 << 64)
            for window, place in zip(self.cut, place_of, strict=True)
        ]
        counts = [window.stop - window.first for window in self.cut]
        rows[:, 0] = self.spread.begins + np.repeat(np.array(shifts, np.uint64), counts)
        rows[:, 1] = self.spread.addresses(targets)  # an address of 0 is none, for every chunk
        rows[:, 2] = self.spread.sizes
        rows[:, 3] = self.spread.numbers
        self._put(self.rows.address, rows.reshape(-1))
        self.placed = rows if all(targets) else rows[rows[:, 1] != 0]

    def at(self, place: int, window: Window) -> int:
        """Where the first byte of a window is staged."""
        return self.staging.address + place * self.turn_bytes + window.begin % _ALIGN_BYTES

    def place(self, window: Window, stream: int) -> None:
        """Check what is staged, and bring what is sound to its targets."""
        rows = self.rows.address + window.first * _ROW_BYTES
        check = self.kernels.verify if self.waits else self.kernels.place
        check(stream, rows, window.stop - window.first, self.expected.address, self.flags.address)

    def place_all(self) -> None:
        """Bring all that waited to its targets, where it has one."""
        if len(self.placed) < len(self.spread):
            self._put(self.rows.address, self.placed.reshape(-1))
        self.kernels.gather(self.stream, self.rows.address, len(self.placed))
        self.driver.synchronize(self.stream)

    def bad(self) -> list[int]:
        """Which of the chosen spans have a chunk that did not match, once all is done."""
        size_bytes = 8 * (self.count // 8 + 1)
        self.driver.to_host(self.pinned.address, self.flags.address, size_bytes, self.stream)
        self.driver.synchronize(self.stream)
        flags = np.frombuffer(view_at(self.pinned.address, self.count), np.uint8)
        return self.spread.spans_of(flags[self.spread.numbers.astype(np.int64)] != 0)

    def close(self) -> None:
        if self.stream:
            self.driver.synchronize(self.stream)
            self.driver.destroy_stream(self.stream)
        for memory in (self.staging, self.rows, self.expected, self.flags, self.pinned):
            memory.free()


def land(
    driver: Driver,
    ordinal: int,
    kernels: Kernels,
    fd: int,
    spans: Sequence[Span],
    chosen: list[int],
    targets: Sequence[int],
    digests: memoryview,
    progress: Callable[[int], None],
    placing: Callable[[], None],
    later: Callable[[Callable[[], None]], None],
    *,
    whole: bool = False,
) -> list[int]:
    """Bring the chosen spans of a file to ``targets`` (one a chosen span) on one device.

    ``placing`` is told before live memory is written to; ``later`` what is to be cleared away,
    which takes a third as long as all else. With ``whole`` nothing is placed unless all of it is
    sound: it waits in free memory of the device, or, where there is too little, it is read twice.

    Returns the indexes among ``spans`` of those with a bad or missing chunk; no such chunk reached
    its target. Raises OSError as reading does, CudaError as the device does.
    """
    spread = Spread(spans, chosen)
    mapped = _has_large_pages(fd)
    cut = windows(spread, _WINDOW_BYTES if mapped else _READ_BYTES, alone=True)
    num_threads = 1 if mapped else min(_NUM_THREADS, max(1, (os.cpu_count() or 1) - 1), len(cut))
    num_places = _MAPPED_PLACES if mapped else _READ_PLACES * num_threads
    with driver.current(ordinal), driver.relaxed():
        job = None
        if whole:
            needed_bytes = len(cut) * _turn_bytes(cut)
            if needed_bytes <= room_bytes("snapshot", needed_bytes, *driver.memory()):
                job = _opened(_Job(driver, kernels, spread, cut, len(cut), digests, waits=True))
            if job is None:
                nowhere = [0] * len(targets)
                more: Any = (fd, spans, chosen, nowhere, digests, lambda _: None, placing, later)
                if bad := land(driver, ordinal, kernels, *more):
                    return bad
        if job is None:
            job = _opened(_Job(driver, kernels, spread, cut, num_places, digests, waits=False))
            if job is None:
                num_threads = 1
                fewest = _Job(driver, kernels, spread, cut, _READ_PLACES, digests, waits=False)
                job = _opened(fewest, insists=True)
        assert job is not None
        try:
            return _bring(
                job, ordinal, fd, targets, num_threads, progress, placing, later, mapped=mapped
            )
        finally:
            job.close()


def _opened(job: _Job, *, insists: bool = False) -> _Job | None:
    """The job, or None if there is no memory for it; with ``insists`` that is a CudaError, too."""
    try:
        job.open()
    except BaseException as error:
        # Whatever it is, nothing that was got before stays behind.
        job.close()
        if insists or not (isinstance(error, CudaError) and error.code == OUT_OF_MEMORY):
            raise
        return None
    return job


def _bring(
    job: _Job,
    ordinal: int,
    fd: int,
    targets: Sequence[int],
    num_threads: int,
    progress: Callable[[int], None],
    placing: Callable[[], None],
    later: Callable[[Callable[[], None]], None],
    *,
    mapped: bool,
) -> list[int]:
    """All windows through their places; the spans with a bad or missing chunk."""
    if any(targets) and not job.waits:
        placing()
    missing: set[int] = set()
    try:
        if not mapped:
            raise _NotRegistered
        job.aim(targets, [i % job.num_places for i in range(len(job.cut))])
        _through_mapping(job, ordinal, fd, missing, progress, later)
    except _NotRegistered:
        _through_threads(job, ordinal, fd, targets, num_threads, missing, progress)
    bad = sorted({*job.bad(), *missing})
    if job.waits and not bad and any(targets):
        placing()
        job.place_all()
    return bad


def _turn_bytes(cut: Sequence[Window]) -> int:
    """What a place takes, whichever window is in it."""
    turn = max((window.size_bytes for window in cut), default=0)
    return -(-(turn + _ALIGN_BYTES) // _ALIGN_BYTES) * _ALIGN_BYTES


class _NotRegistered(Exception):
    """The driver does not take this mapping."""


def _through_mapping(
    job: _Job,
    ordinal: int,
    fd: int,
    missing: set[int],
    progress: Callable[[int], None],
    later: Callable[[Callable[[], None]], None],
) -> None:
    """Register a stretch of the mapping while the one before it is copied."""
    driver = job.driver
    file_bytes = os.fstat(fd).st_size
    mapping, read_only = _mapped(driver, fd, file_bytes)
    done = [driver.event() for _ in range(job.num_places)]
    checking = driver.stream("highest")
    copied = driver.event()
    known = 0  # bytes of the mapping that the driver knows
    registered: list[int] = []
    deadline_s = time.monotonic() + _LAND_S
    try:
        for i, window in enumerate(job.cut):
            if window.end > file_bytes:
                missing.update(job.spread.spans_between(window.first, window.stop))
                continue
            while known < window.end:
                size_bytes = min(_MAP_BYTES, mapping.size_bytes - known)
                try:
                    driver.register(mapping.address + known, size_bytes, read_only=read_only)
                except CudaError as error:
                    raise _NotRegistered from error
                registered.append(mapping.address + known)
                known += size_bytes
            place = i % job.num_places
            if i >= job.num_places:
                driver.wait(job.stream, done[place])
            for begin, end in _split(window.begin, window.end):
                target = job.at(place, window) + begin - window.begin
                driver.to_device(target, mapping.address + begin, end - begin, job.stream)
            driver.record(copied, job.stream)
            driver.wait(checking, copied)
            job.place(window, checking)
            driver.record(done[place], checking)
            progress(window.size_bytes)
        for event in done:
            _until(driver, event, deadline_s)
    finally:
        driver.synchronize(job.stream)
        driver.synchronize(checking)
        driver.destroy_stream(checking)
        for event in (*done, copied):
            driver.destroy_event(event)
        later(functools.partial(_let_go, driver, ordinal, mapping, registered))


def _let_go(driver: Driver, ordinal: int, mapping: Mapping, registered: Sequence[int]) -> None:
    with giving_back(), driver.current(ordinal), driver.relaxed():
        for address in registered:
            with giving_back():
                driver.unregister(address)
    mapping.close()


def _mapped(driver: Driver, fd: int, file_bytes: int) -> tuple[Mapping, bool]:
    """The file as memory that the driver takes, and whether it is to be told that it is read-only.

    Some devices know no read-only memory: the file is then mapped writable, where it may be, and
    not written to.
    """
    mapping = map_file(fd, file_bytes, writable=False)
    try:
        driver.register(mapping.address, min(_PAGE_BYTES, file_bytes), read_only=True)
    except CudaError as error:
        mapping.close()
        try:
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise _NotRegistered from error
        try:
            return map_file(again, file_bytes, writable=True), False
        finally:
            os.close(again)
    driver.unregister(mapping.address)
    return mapping, True


def _split(begin: int, end: int) -> list[tuple[int, int]]:
    """A stretch of the file, cut where one registration ends and the next begins."""
    cuts = range(begin // _MAP_BYTES * _MAP_BYTES + _MAP_BYTES, end, _MAP_BYTES)
    return list(zip([begin, *cuts], [*cuts, end], strict=True))


def _through_threads(
    job: _Job,
    ordinal: int,
    fd: int,
    targets: Sequence[int],
    num_threads: int,
    missing: set[int],
    progress: Callable[[int], None],
) -> None:
    """Each thread reads into pinned memory of its own while the piece before it is copied."""
    # Windows go to threads in turn; a place belongs to one thread, or to one window.
    turns = list(range(len(job.cut)))
    if not job.waits:
        turns = [i % num_threads * _READ_PLACES + i // num_threads % _READ_PLACES for i in turns]
    job.aim(targets, turns)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with job.driver.current(ordinal), job.driver.relaxed():
                _read_share(job, fd, number, num_threads, turns, missing, progress, failures)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
            failures.append(error)

    in_threads(num_threads, work)
    if failures:
        raise failures[0]


def _read_share(
    job: _Job,
    fd: int,
    number: int,
    num_threads: int,
    turns: Sequence[int],
    missing: set[int],
    progress: Callable[[int], None],
    failures: list[BaseException],
) -> None:
    driver = job.driver
    places = _READ_PLACES
    stream = driver.stream("highest")
    done = [driver.event() for _ in range(places)]
    pinned = PinnedMemory(driver)
    deadline_s = time.monotonic() + _LAND_S
    try:
        pinned.hold(places * job.turn_bytes)
        for turn, i in enumerate(range(number, len(job.cut), num_threads)):
            if failures:
                return
            window, slot = job.cut[i], turn % places
            if turn >= places:
                _until(driver, done[slot], deadline_s)
            view = view_at(pinned.address + slot * job.turn_bytes, window.size_bytes)
            if read_at(fd, view, window.begin) < window.size_bytes:
                missing.update(job.spread.spans_between(window.first, window.stop))
                continue
            target = job.at(turns[i], window)
            source = pinned.address + slot * job.turn_bytes
            driver.to_device(target, source, window.size_bytes, stream)
            job.place(window, stream)
            driver.record(done[slot], stream)
            progress(window.size_bytes)
    finally:
        driver.synchronize(stream)
        driver.destroy_stream(stream)
        for event in done:
            driver.destroy_event(event)
        pinned.free()


def _until(driver: Driver, event: int, deadline_s: float) -> None:
    while not driver.event_done(event):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the device has not taken what was read for it in {_LAND_S:.0f} s")
        time.sleep(_POLL_S)


def _has_large_pages(fd: int) -> bool:
    """True for a file on a tmpfs whose pages are large ones where they can be."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                mount, _, rest = line.partition(" - ")
                if mount.split()[2] == wanted:
                    options = rest.split()[2].split(",")
                    return any(
                        option.startswith("huge=") and option != "huge=never" for option in options
                    )
    except (OSError, IndexError):  # no /proc, or not as it is on Linux
        return False
    return False
