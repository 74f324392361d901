"""From device memory into a slot: packed and digested on the device, then drained over the bus.

Knows the driver, rows and windows. Does not know frameworks or files. One kernel reads every chunk
of live memory once: it copies the chunk to its place in the arena and computes its digest from the
same bytes, before they leave the device. After it the live memory may change; the arena is copied
to the slot in pieces, so that others' copies are not starved. A chunk whose digest is that of what
lies at its place already is left there.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtckpt.capture.buffers import DeviceMemory, PinnedMemory
from mtckpt.capture.driver import giving_back
from mtckpt.capture.passing import Passage
from mtckpt.capture.windows import ROW_WORDS, WINDOW_BYTES, narrowed
from mtckpt.errors import CaptureStuck

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver
    from mtckpt.capture.kernels import Kernels
    from mtckpt.capture.passing import Copy, HostCopy
    from mtckpt.capture.windows import Arena, Spread, Window

__all__ = ["Draining", "Lane"]

_RING = 2
_DEPTH = 3  # copies that are on the way at once
_POLL_S = 0.0002
_MARKS_S = 10.0
_GROUPS = (4, 24)  # windows after which another launch packs
_MAX_COPIES = 512  # of one piece
# Where less than this part of a group could be left as it was, all of it is copied: to look at what
# was left takes the host longer than the copy.
_LEAST_LEFT = 0.25
_WORD_BYTES = 8
_ROW_BYTES = ROW_WORDS * _WORD_BYTES


class Lane:
    """One device's streams and small buffers, kept from one save to the next.

    One capture at a time: it is started once the one before it has finished.
    """

    def __init__(self, driver: Driver, ordinal: int, kernels: Kernels) -> None:
        self.driver = driver
        self.kernels = kernels
        self.ordinal = ordinal
        self._uploaded: np.ndarray[tuple[int, int], np.dtype[np.uint64]] | None = None
        with driver.current(ordinal), driver.relaxed():
            self.packing = driver.stream("highest")
            self.copying = driver.stream("lowest")
            self.captured = driver.event()
            self._ready = driver.event()
            self.digested = driver.event()
            self._packed = [driver.event() for _ in range(_RING)]
            self._groups = [driver.event() for _ in range(len(_GROUPS) + 1)]
            self.copied = [driver.event() for _ in range(max(_RING, _DEPTH))]
            self.host_rows, self.host_digests = PinnedMemory(driver), PinnedMemory(driver)
            self.rows, self.digests = DeviceMemory(driver), DeviceMemory(driver)
        self._passage: Passage | None = None

    def close(self) -> None:
        """Give back all that the lane holds. No copy may be under way, marks of events may."""
        driver = self.driver
        own = self.captured, self._ready, self.digested
        events = (*own, *self._packed, *self._groups, *self.copied)
        with giving_back(), driver.current(self.ordinal), driver.relaxed():
            if not self.is_settled(time.monotonic() + _MARKS_S):
                return  # to be left alone after all
            for stream in (self.packing, self.copying):
                with giving_back():
                    driver.destroy_stream(stream)
            for event in events:
                with giving_back():
                    driver.destroy_event(event)
            for memory in (self.host_rows, self.host_digests, self.rows, self.digests):
                with giving_back():
                    memory.free()
            if self._passage is not None:
                self._passage.close()

    def is_settled(self, deadline_s: float) -> bool:
        """Wait until nothing that was put on the lane is under way; False if it still is then."""
        driver = self.driver
        with driver.current(self.ordinal), driver.relaxed():
            for stream in (self.packing, self.copying):
                while not driver.stream_idle(stream):
                    if time.monotonic() > deadline_s:
                        return False
                    time.sleep(_POLL_S)
        return True

    def until(self, event: int, timeout_s: float) -> None:
        """Wait for an event. Raises CaptureStuck if it is not done in time."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = _POLL_S
        while not self.driver.event_done(event):
            if time.monotonic() > deadline_s:
                raise CaptureStuck(
                    f"device {self.ordinal} has not come to the copy of the state in time",
                    stage="captured",
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.005)

    def start(
        self,
        spread: Spread,
        cut: Sequence[Window],
        arena: Arena,
        arena_address: int,
        sources: Sequence[int],
        base: int,
        producers: Sequence[int],
        host_copy: HostCopy | None,
        timeout_s: float,
    ) -> Draining:
        """Put the packing on the device, and the copies of windows that share a place.

        Values are those after all that ``producers`` (streams) have now been given. With
        ``host_copy`` the driver does not know the slot: that takes what passes through pinned
        memory there. Windows that share a place are waited for then: CaptureStuck if the device
        has not come to one of them in ``timeout_s``. Call within ``current`` and ``relaxed``.
        """
        driver = self.driver
        passage = None if host_copy is None else self._passed(host_copy)
        wait = functools.partial(self.until, timeout_s=timeout_s)
        self._upload(spread, cut, arena, arena_address, sources)
        self.digests.hold((int(spread.numbers.max()) + 1) * _WORD_BYTES)
        for stream in producers:
            driver.record(self._ready, stream)
            driver.wait(self.packing, self._ready)
        turning = len(cut) - arena.num_kept
        for i, window in enumerate(cut[:turning]):
            if arena.after[i] >= 0:
                driver.wait(self.packing, self.copied[i % _RING])
            self._pack(window.first, window.stop)
            driver.record(self._packed[i % _RING], self.packing)
            driver.wait(self.copying, self._packed[i % _RING])
            place = arena_address + arena.places[i]
            copy = base + window.begin, place, window.size_bytes
            if passage is None:
                driver.to_host(*copy, self.copying)
            else:
                passage.put([copy], self.copying, wait)
            driver.record(self.copied[i % _RING], self.copying)
        # The first few in a launch of their own: they are drained while the others are packed.
        groups = []
        for event, (first, stop) in zip(self._groups, _groups(arena.num_kept), strict=False):
            those = cut[turning + first : turning + stop]
            at = [arena_address + place for place in arena.places[turning + first :]]
            self._pack(those[0].first, those[-1].stop)
            driver.record(event, self.packing)
            groups.append(_Group(event, those, at))
        driver.record(self.captured, self.packing)
        if not groups:
            driver.wait(self.copying, self.captured)
        if passage is not None:
            passage.finish(wait)
        return Draining(self, spread, base, groups, passage)

    def _passed(self, host_copy: HostCopy) -> Passage:
        if self._passage is None:
            self._passage = Passage(self.driver, host_copy)
        self._passage.forget()
        return self._passage

    def _pack(self, first: int, stop: int) -> None:
        rows = self.rows.address + first * _ROW_BYTES
        self.kernels.digest_copy(self.packing, rows, stop - first, self.digests.address)

    def _upload(
        self,
        spread: Spread,
        cut: Sequence[Window],
        arena: Arena,
        arena_address: int,
        sources: Sequence[int],
    ) -> None:
        """Bring the rows to the device, unless they are there from the last time."""
        rows = np.empty((len(spread), ROW_WORDS), np.uint64)
        shifts = [
            (arena_address + place - window.begin) % (1 << 64)
            for window, place in zip(cut, arena.places, strict=True)
        ]
        counts = [window.stop - window.first for window in cut]
        rows[:, 0] = spread.addresses(sources)
        rows[:, 1] = spread.begins + np.repeat(np.array(shifts, np.uint64), counts)
        rows[:, 2] = spread.sizes
        rows[:, 3] = spread.numbers
        fresh = self.rows.hold(rows.nbytes)
        if not fresh and self._uploaded is not None and np.array_equal(self._uploaded, rows):
            return
        self._uploaded = None
        self.host_rows.hold(rows.nbytes)
        self.host_rows.words(rows.size)[:] = rows.reshape(-1)
        self.driver.to_device(self.rows.address, self.host_rows.address, rows.nbytes, self.packing)
        self._uploaded = rows


def _groups(count: int) -> list[tuple[int, int]]:
    """``count`` windows in a few groups, each many times the one before it."""
    cuts = [0, *(cut for cut in _GROUPS if cut < count), count]
    return [(first, stop) for first, stop in itertools.pairwise(cuts) if first < stop]


class _Group(NamedTuple):
    """Windows that wait in the arena ``at`` their addresses, once ``packed`` is done."""

    packed: int
    cut: Sequence[Window]
    at: Sequence[int]

    def copies(self, base: int, parts: Iterable[tuple[int, Window]]) -> Iterator[Copy]:
        """Those of parts of the windows, each with the number of its window."""
        for number, part in parts:
            source = self.at[number] + part.begin - self.cut[number].begin
            yield base + part.begin, source, part.size_bytes


def _pieces(copies: Iterable[Copy]) -> Iterator[list[Copy]]:
    """The copies, as many at a time as others' have to wait for."""
    piece: list[Copy] = []
    size_bytes = 0
    for copy in copies:
        if piece and (size_bytes + copy[2] > WINDOW_BYTES or len(piece) == _MAX_COPIES):
            yield piece
            piece, size_bytes = [], 0
        piece.append(copy)
        size_bytes += copy[2]
    if piece:
        yield piece


class Draining:
    """A capture that has been put on the device: what is left to copy, and the digests."""

    def __init__(
        self,
        lane: Lane,
        spread: Spread,
        base: int,
        groups: Sequence[_Group],
        passage: Passage | None,
    ) -> None:
        """``passage``: what copies pass through to a slot that the driver does not know."""
        self._lane = lane
        self._passage = passage
        self._spread = spread
        self._base = base
        self._groups = groups

    def until_read(self, timeout_s: float) -> None:
        """Wait until live memory has been read, after which it may change.

        Raises CaptureStuck if the device has not done it in time, CudaError if it cannot.
        """
        lane = self._lane
        with lane.driver.current(lane.ordinal), lane.driver.relaxed():
            lane.until(lane.captured, timeout_s)

    def finish(
        self, digests: memoryview, left: bytearray | None, bytes_per_s: float, timeout_s: float
    ) -> None:
        """Copy the rest, wait for all, and note the digests. Blocks; not for the training thread.

        With ``left``, a byte a chunk, ``digests`` are those of what lies in the slot: of chunks
        that are left as they are, the bytes in ``left`` are set. Raises CaptureStuck if the device
        has not done the next piece in time, CudaError if it cannot.
        """
        lane, driver = self._lane, self._lane.driver
        count = int(self._spread.numbers.max()) + 1
        started_s, done_bytes = time.monotonic(), 0
        wait = functools.partial(lane.until, timeout_s=timeout_s)
        with driver.current(lane.ordinal), driver.relaxed():
            lane.host_digests.hold(count * _WORD_BYTES)
            for i, piece in enumerate(self._pieces(digests, left, timeout_s)):
                event = lane.copied[i % _DEPTH]
                if i >= _DEPTH:
                    wait(event)
                if bytes_per_s:
                    time.sleep(max(0.0, started_s + done_bytes / bytes_per_s - time.monotonic()))
                if self._passage is None:
                    for copy in piece:
                        driver.to_host(*copy, lane.copying)
                else:
                    self._passage.put(piece, lane.copying, wait)
                done_bytes += sum(size_bytes for _, _, size_bytes in piece)
                driver.record(event, lane.copying)
            driver.to_host(
                lane.host_digests.address, lane.digests.address, count * _WORD_BYTES, lane.copying
            )
            driver.record(lane.copied[0], lane.copying)
            wait(lane.copied[0])
            if self._passage is not None:
                self._passage.finish(wait)
        numbers = self._spread.numbers.astype(np.int64)
        np.frombuffer(digests, np.uint64)[numbers] = lane.host_digests.words(count)[numbers]

    def _pieces(
        self, digests: memoryview, left: bytearray | None, timeout_s: float
    ) -> Iterator[list[Copy]]:
        """What is to be copied of what waits in the arena, when it may be."""
        for group in self._groups:
            self._lane.driver.wait(self._lane.copying, group.packed)
            parts = list(enumerate(group.cut))
            if left is not None:
                parts = self._changed(group, digests, left, timeout_s)
            yield from _pieces(group.copies(self._base, parts))

    def _changed(
        self, group: _Group, digests: memoryview, left: bytearray, timeout_s: float
    ) -> list[tuple[int, Window]]:
        """The parts of the windows whose digests are not those in the slot."""
        lane, spread = self._lane, self._spread
        first, stop = group.cut[0].first, group.cut[-1].stop
        numbers = spread.numbers[first:stop].astype(np.int64)
        begin, end = int(numbers.min()), int(numbers.max()) + 1
        offset, size_bytes = begin * _WORD_BYTES, (end - begin) * _WORD_BYTES
        lane.driver.to_host(
            lane.host_digests.address + offset, lane.digests.address + offset, size_bytes,
            lane.copying,
        )  # fmt: skip
        lane.driver.record(lane.digested, lane.copying)
        lane.until(lane.digested, timeout_s)
        there = np.frombuffer(digests, np.uint64)[numbers]
        parts = narrowed(spread, group.cut, lane.host_digests.words(end)[numbers] != there)
        is_left = np.ones(stop - first, np.bool_)
        for _, part in parts:
            is_left[part.first - first : part.stop - first] = False
        sizes = spread.sizes[first:stop]
        if int(sizes[is_left].sum()) < _LEAST_LEFT * int(sizes.sum()):
            return list(enumerate(group.cut))
        np.frombuffer(left, np.bool_)[numbers[is_left]] = True
        return parts
