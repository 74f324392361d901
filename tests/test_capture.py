"""The copy engine against plain copies and the digest library, for sizes around every edge."""

from __future__ import annotations

import array
import ctypes
import errno
import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move, Span
from mtckpt.capture.cpu import CpuEngine
from mtckpt.capture.memory import anonymous, map_file, view_at

EDGES = [0, 1, 7, 4095, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5]


def make(sizes: list[int]) -> tuple[list[ctypes.Array[ctypes.c_char]], list[int], list[Span], int]:
    buffers, spans, start, chunk = [], [], 64, 0
    for i, size in enumerate(sizes):
        pattern = bytes((i + j) % 251 for j in range(min(size, 997)))
        data = (pattern * (size // max(len(pattern), 1) + 1))[:size]
        buffers.append(ctypes.create_string_buffer(data, max(size, 1)))
        spans.append(Span(start, size, chunk))
        start += size
        chunk += -(-size // CHUNK_BYTES)
    return buffers, [ctypes.addressof(b) for b in buffers], spans, chunk


def digests_of(chunks: int) -> memoryview:
    return memoryview(array.array("Q", [0] * max(chunks, 1)))


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_and_digests_are_those_of_the_source(threads: int) -> None:
    sizes = [*EDGES, 20 * 2**20 + 3]
    buffers, sources, spans, chunks = make(sizes)
    target = anonymous(64 + sum(sizes))
    digests = digests_of(chunks)
    CpuEngine(threads).capture(sources, spans, target.address, digests)
    for buffer, span in zip(buffers, spans, strict=True):
        want = bytes(memoryview(buffer).cast("B")[: span.size_bytes])
        assert bytes(target.view[span.start : span.start + span.size_bytes]) == want
        for i in range(-(-span.size_bytes // CHUNK_BYTES)):
            piece = want[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
            assert digests[span.chunk + i] == xxh3_64_intdigest(piece)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(EDGES), min_size=1, max_size=8), st.data())
def test_one_flipped_bit_is_found_in_its_span_only(sizes: list[int], data: st.DataObject) -> None:
    _, sources, spans, chunks = make(sizes)
    target = anonymous(64 + sum(sizes))
    digests = digests_of(chunks)
    engine = CpuEngine(2)
    engine.capture(sources, spans, target.address, digests)
    assert engine.verify(target.address, spans, digests) == []
    filled = [i for i, span in enumerate(spans) if span.size_bytes]
    if filled:
        which = data.draw(st.sampled_from(filled))
        at = spans[which].start + data.draw(st.integers(0, spans[which].size_bytes - 1))
        target.view[at] ^= 1 << data.draw(st.integers(0, 7))
        assert engine.verify(target.address, spans, digests) == [which]


def test_changed_values_at_the_same_addresses_are_captured_anew() -> None:
    buffers, sources, spans, chunks = make([100, 5000])
    target = anonymous(64 + 5100)
    engine, digests = CpuEngine(1), digests_of(chunks)
    engine.capture(sources, spans, target.address, digests)
    before = list(digests)
    buffers[1][17] = b"\xff"
    engine.capture(sources, spans, target.address, digests)
    assert digests[0] == before[0]
    assert digests[1] != before[1]
    assert target.view[spans[1].start + 17] == 0xFF


def test_copies_go_where_they_should() -> None:
    source, target = anonymous(2**20), anonymous(2**20)
    source.view[:] = bytes(range(256)) * 4096
    CpuEngine(2).copy(
        [
            Move(source.address, target.address + 10, 5),
            Move(source.address, target.address + 2**19, 2**19),
            Move(source.address + 7, target.address + 100, 3, 4, 10, 5),
        ]
    )
    assert bytes(view_at(target.address + 10, 5)) == bytes(range(5))
    rows = [bytes(range(first, first + 3)) for first in (7, 17, 27, 37)]
    assert bytes(view_at(target.address + 100, 20)) == b"".join(row + b"\0\0" for row in rows)
    assert target.view[2**19 :] == source.view[: 2**19]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(EDGES), min_size=1, max_size=8), st.data())
def test_what_is_fetched_is_checked_before_it_is_placed(
    sizes: list[int], data: st.DataObject
) -> None:
    _, sources, spans, chunks = make(sizes)
    end = 64 + sum(sizes)
    image, digests = anonymous(end), digests_of(chunks)
    engine = CpuEngine(2)
    engine.capture(sources, spans, image.address, digests)
    places = [anonymous(max(size, 1)) for size in sizes]
    wanted = [data.draw(st.booleans()) for _ in sizes]
    targets = [p.address if want else 0 for p, want in zip(places, wanted, strict=True)]
    filled = [i for i, size in enumerate(sizes) if size]
    bad_at = -1
    which = data.draw(st.sampled_from([*filled, -1]))
    if which >= 0:
        bad_at = data.draw(st.integers(0, sizes[which] - 1))
        image.view[spans[which].start + bad_at] ^= 1
    with tempfile.TemporaryFile() as file:
        file.write(image.view)
        file.flush()
        seen: list[int] = []
        bad = engine.fetch(file.fileno(), spans, targets, digests, seen.append)
    assert bad == ([which] if which >= 0 else [])
    assert sum(seen) == sum(sizes)
    for i, (size, place) in enumerate(zip(sizes, places, strict=True)):
        got, source = bytes(place.view[:size]), ctypes.string_at(sources[i], size)
        if not wanted[i]:
            assert got == bytes(size)  # an address of 0 is none: nothing was placed anywhere
        elif i == which:
            low = bad_at // CHUNK_BYTES * CHUNK_BYTES
            high = min(low + CHUNK_BYTES, size)
            assert got == source[:low] + bytes(high - low) + source[high:]
        else:
            assert got == source


@pytest.mark.parametrize("has_memfd", [True, False])
def test_small_arrays_go_where_they_should(
    has_memfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than one call takes, some not wanted, one damaged."""

    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no memfd")

    if not has_memfd:
        monkeypatch.setattr(os, "memfd_create", refused)
    sizes = [1 + i % 7 for i in range(5000)]
    _, sources, spans, chunks = make(sizes)
    image, digests = anonymous(64 + sum(sizes)), digests_of(chunks)
    engine = CpuEngine(2)
    engine.capture(sources, spans, image.address, digests)
    image.view[spans[4001].start] ^= 1
    places = anonymous(16 * len(sizes))
    targets = [places.address + 16 * i if i % 100 else 0 for i in range(len(sizes))]
    with tempfile.TemporaryFile() as file:
        file.write(image.view)
        file.flush()
        assert engine.fetch(file.fileno(), spans, targets, digests, lambda _: None) == [4001]
    for i, size in enumerate(sizes):
        want = ctypes.string_at(sources[i], size) if i % 100 and i != 4001 else bytes(size)
        assert bytes(places.view[16 * i : 16 * i + 16]) == want + bytes(16 - size)


def test_a_place_that_cannot_be_written_to_is_an_error() -> None:
    _, sources, spans, chunks = make([100, 100])
    image, digests = anonymous(64 + 200), digests_of(chunks)
    engine = CpuEngine(1)
    engine.capture(sources, spans, image.address, digests)
    with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="Bad address"):
        file.write(image.view)
        file.flush()
        there = map_file(file.fileno(), 264, writable=False)
        engine.fetch(file.fileno(), spans, [image.address, there.address], digests, lambda _: None)


@pytest.mark.parametrize("size", [5000, 3 * CHUNK_BYTES + 5, 20 * 2**20])
def test_a_file_that_ends_early_gives_nothing_of_what_it_lacks(size: int) -> None:
    _, sources, spans, chunks = make([100, size])
    image, digests = anonymous(64 + 100 + size), digests_of(chunks)
    engine = CpuEngine(2)
    engine.capture(sources, spans, image.address, digests)
    places = [anonymous(100), anonymous(size)]
    with tempfile.TemporaryFile() as file:
        file.write(image.view[:-1])
        file.flush()
        addresses = [place.address for place in places]
        bad = engine.fetch(file.fileno(), spans, addresses, digests, lambda _: None)
    assert bad == [1]
    assert bytes(places[0].view) == ctypes.string_at(sources[0], 100)
    assert places[1].view[size - 1] == 0
