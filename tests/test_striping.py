"""Which source brings which range: by what each has been fast at, and without those that fail."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import pytest

from mtckpt._shard import CHUNK_BYTES
from mtckpt._striping import Piece, Stripes, cut
from mtckpt.capture.base import Span

STREAMS = 4
MIB = 1 << 20


def spans(*chunks: int, first: int = 0, gap: int = 0) -> dict[int, Span]:
    """Tensors of so many chunks, one after the other."""
    found, start, chunk = {}, first, 0
    for number, count in enumerate(chunks):
        found[number] = Span(start, count * CHUNK_BYTES, chunk)
        start, chunk = start + count * CHUNK_BYTES + gap, chunk + count
    return found


def pieces(count: int, sources: int) -> list[Piece]:
    wanted = spans(count)
    return cut(wanted, [wanted] * sources, CHUNK_BYTES)


def play(
    stripes: Stripes, speeds: Mapping[int, float], dies: Mapping[int, float] = {}
) -> tuple[float, dict[int, int]]:
    """Sources as they would be, each with a line that its streams share; when all was there.

    ``dies`` has when a source answers no more. Also says how many bytes each brought.
    """
    now_s, number = 0.0, 0
    free = dict.fromkeys(speeds, 0.0)  # when its line is
    events: list[tuple[float, int, int, float, Piece]] = []
    idle = dict.fromkeys(speeds, STREAMS)
    while True:
        for source in speeds:
            while idle[source] and (piece := stripes.take(source)) is not None:
                idle[source] -= 1
                free[source] = max(free[source], now_s) + piece.size_bytes / speeds[source]
                number += 1
                heapq.heappush(events, (free[source], number, source, now_s, piece))
        if not events:
            break
        now_s, _, source, began_s, piece = heapq.heappop(events)
        idle[source] += 1
        if now_s >= dies.get(source, float("inf")):
            stripes.fail(source, piece)
        else:
            stripes.came(source, piece, now_s - began_s)
    brought = dict.fromkeys(speeds, 0)
    for source, piece in stripes.brought:
        brought[source] += piece.size_bytes
    return now_s, brought


def test_ranges_are_of_whole_chunks_and_lie_where_each_source_has_them() -> None:
    wanted = spans(5, 1, 1, first=1000, gap=64)
    elsewhere = {n: Span(s.start + 77, s.size_bytes, s.chunk) for n, s in wanted.items() if n != 1}
    found = cut(wanted, [wanted, elsewhere], 2 * CHUNK_BYTES)
    assert [(p.start, p.stop) for p in found] == [
        (1000, 1000 + 2 * CHUNK_BYTES),
        (1000 + 2 * CHUNK_BYTES, 1000 + 4 * CHUNK_BYTES),
        (1000 + 4 * CHUNK_BYTES, 1000 + 5 * CHUNK_BYTES),
        (1064 + 5 * CHUNK_BYTES, 1064 + 6 * CHUNK_BYTES),
        (1128 + 6 * CHUNK_BYTES, 1128 + 7 * CHUNK_BYTES),
    ]
    assert [dict(p.shifts) for p in found] == [{0: 0, 1: 77}] * 3 + [{0: 0}, {0: 0, 1: 77}]
    assert [p.wants[0][1].chunk for p in found] == [0, 2, 4, 5, 6]


def test_small_tensors_come_together() -> None:
    wanted = {n: Span(n * 100, 60, n) for n in range(50)}
    (only,) = cut(wanted, [wanted], MIB)
    assert (only.start, only.stop, len(only.wants)) == (0, 4960, 50)


@pytest.mark.parametrize("slow", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("known", [True, False])
def test_shares_follow_what_sources_bring_in_a_second(slow: float, known: bool) -> None:
    speeds = {0: 100.0 * MIB, 1: slow * 100 * MIB}
    took_s, brought = play(Stripes(pieces(400, 2), speeds if known else {}), speeds)
    assert sum(brought.values()) == 100 * MIB
    best_s = 100 * MIB / sum(speeds.values())
    # At most what one source needs for a range too many, which is how the slow one is measured.
    assert took_s <= best_s * 1.05 + CHUNK_BYTES / speeds[1]
    assert brought[1] / brought[0] == pytest.approx(slow, rel=0.2, abs=0.01)


def test_what_a_source_that_fails_was_to_bring_others_bring() -> None:
    speeds = {0: 100.0 * MIB, 1: 100.0 * MIB, 2: 50.0 * MIB}
    stripes = Stripes(pieces(400, 3), {})
    _, brought = play(stripes, speeds, dies={0: 0.2})
    assert not stripes.left
    assert 0 < brought[0] < 25 * MIB
    assert sum(brought.values()) == 100 * MIB
    _, brought = play(stripes := Stripes(pieces(9, 2), {}), {0: 1e6, 1: 1e6}, dies={0: 0, 1: 0})
    assert len(stripes.left) == 9
    assert all(stripes.is_idle(source) for source in speeds)


def test_what_came_damaged_is_not_asked_of_the_same_source_again() -> None:
    stripes = Stripes(pieces(1, 2), {0: 1.0, 1: 0.001})
    piece = stripes.take(0)
    assert piece is not None
    assert stripes.take(1) is None
    assert not stripes.is_idle(1)  # as just now, it may yet be needed
    stripes.refuse(0, piece)
    assert stripes.take(0) is None
    assert stripes.is_idle(0)
    assert stripes.take(1) == piece
    stripes.refuse(1, piece)
    assert stripes.is_idle(1)
    assert list(stripes.left) == [piece]
