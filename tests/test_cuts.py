"""Rows out of chunks that are checked as a whole, against copies of one byte after another."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move, Span
from mtckpt.capture.cpu import CpuEngine
from mtckpt.capture.cuts import batches_of, clipped, dealt

SIZE_BYTES = 9 * CHUNK_BYTES // 2


def bytes_of(move: Move) -> dict[int, int]:
    """Where each byte goes, by where it is."""
    return {
        move.source + turn * move.source_step + i: move.target + turn * move.target_step + i
        for turn in range(move.times)
        for i in range(move.size_bytes)
    }


@st.composite
def small_moves(draw: st.DrawFn) -> Move:
    size, times = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    steps = (size + draw(st.integers(0, 5)), size + draw(st.integers(0, 5)))
    return Move(draw(st.integers(0, 40)), 1000, size, times, *(steps if times > 1 else (0, 0)))


@given(small_moves(), st.integers(1, 30))
def test_what_is_cut_at_edges_is_every_byte_once(move: Move, step: int) -> None:
    wanted = bytes_of(move)
    size = max(wanted) + 1
    found: list[tuple[int, int]] = []
    for number, moves in enumerate(dealt([move], size, step)):
        begin, end = number * step, min(size, (number + 1) * step)
        pieces = [piece for one in moves for piece in clipped(one, begin, end)]
        assert all(begin <= at < end for piece in pieces for at in bytes_of(piece))
        assert [*clipped(move, begin, end)] == pieces  # nothing was dealt to another range
        found += [pair for piece in pieces for pair in bytes_of(piece).items()]
    assert sorted(found) == sorted(wanted.items())


def test_batches_are_whole_chunks_within_a_limit() -> None:
    spans = [Span(100, 5 * CHUNK_BYTES + 7, 3), Span(0, 9, 0), Span(50, 2 * CHUNK_BYTES, 1)]
    batches = list(batches_of(spans, [2, 0, 1], 3 * CHUNK_BYTES))
    assert [[(which, begin) for which, begin, _ in batch] for batch in batches] == [
        [(2, 0), (0, 0)],
        [(0, CHUNK_BYTES)],
        [(0, 4 * CHUNK_BYTES), (1, 0)],
    ]
    for which, begin, part in (piece for batch in batches for piece in batch):
        start, _, chunk = spans[which]
        assert (part.start, part.chunk) == (start + begin, chunk + begin // CHUNK_BYTES)
    sizes = [sum(part.size_bytes for _, _, part in batch) for batch in batches]
    assert sum(sizes) == sum(span.size_bytes for span in spans)
    assert max(sizes) <= 3 * CHUNK_BYTES


class Shard:
    """A file with one array of some chunks, after a few bytes of something else."""

    def __init__(self, folder: Path) -> None:
        self.data = np.random.default_rng(8).integers(0, 256, SIZE_BYTES, np.uint8)
        self.path = folder / "shard"
        self.span = Span(24, SIZE_BYTES, 0)
        self.write(self.data)
        digests = np.array(
            [
                xxh3_64_intdigest(self.data[at : at + CHUNK_BYTES].data)
                for at in range(0, SIZE_BYTES, CHUNK_BYTES)
            ],
            np.uint64,
        )
        self.digests = memoryview(bytearray(digests.tobytes())).cast("Q")

    def write(self, data: np.ndarray) -> None:
        self.path.write_bytes(bytes(24) + data.tobytes())


def moves_to(address: int) -> list[Move]:
    """Left and right halves of rows, some bytes that are no rows, and rows of a single byte."""
    return [
        Move(3, address, 3000, 150, 6001, 3000),
        Move(3003, address + 600_000, 3001, 100, 6001, 3001),
        Move(CHUNK_BYTES - 5, address + 1_200_000, 11),
        Move(2 * CHUNK_BYTES, address + 1_300_000, 1, 900, 7, 2),
    ]


def taken(data: np.ndarray, is_sound: np.ndarray) -> np.ndarray:
    """What those moves make of zeros, with only those bytes that are sound."""
    made = np.zeros(1_400_000, np.uint8)
    for source, target, size, times, source_step, target_step in moves_to(0):
        for turn in range(times):
            at, to = source + turn * source_step, target + turn * target_step
            made[to : to + size] = np.where(is_sound[at : at + size], data[at : at + size], 0)
    return made


@settings(max_examples=10)
@given(bad_at=st.none() | st.integers(0, SIZE_BYTES - 1), threads=st.integers(1, 2))
def test_rows_are_placed_out_of_chunks_that_are_sound(
    tmp_path_factory: pytest.TempPathFactory, bad_at: int | None, threads: int
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    shard = Shard(folder)
    is_sound = np.ones(SIZE_BYTES, bool)
    if bad_at is not None:
        data = shard.data.copy()
        data[bad_at] ^= 16
        shard.write(data)
        first = bad_at // (2 * CHUNK_BYTES) * 2 * CHUNK_BYTES  # two chunks are read at a time
        is_sound[first : first + 2 * CHUNK_BYTES] = False
    live = np.zeros(1_400_000, np.uint8)
    cuts = {0: moves_to(live.ctypes.data)}
    touched: list[bool] = []
    fd = os.open(shard.path, os.O_RDONLY)
    try:
        engine = CpuEngine(threads)
        only = fd, [shard.span], [0], shard.digests, lambda _: None
        bad = engine.fetch(*only, cuts=cuts, whole=True, placing=lambda: touched.append(True))
        assert bad == ([] if bad_at is None else [0])
        assert bool(touched) is (bad_at is None)
        if bad_at is not None:
            assert not live.any()  # not a byte unless all is sound
            assert engine.fetch(*only, cuts=cuts, placing=lambda: touched.append(True)) == [0]
            assert touched
    finally:
        os.close(fd)
    assert np.array_equal(live, taken(shard.data, is_sound))
