"""Rows of a box, cut at the edges of what is read at a time. Pure.

Knows moves and ranges of their sources. Does not know files, buffers or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Move, Span

__all__ = ["batches_of", "clipped", "dealt"]


def clipped(move: Move, begin: int, end: int) -> Iterator[Move]:
    """What of a move has its sources from ``begin`` to ``end``: whole rows, and up to two parts."""
    source, target, size_bytes, times, source_step, target_step = move
    if times == 1:
        first, last = max(source, begin), min(source + size_bytes, end)
        if first < last:
            yield Move(first, target + (first - source), last - first)
        return
    # Rows from ``whole`` to ``stop`` lie in the range; the one before and that one may reach in.
    whole = min(times, max(0, -((source - begin) // source_step)))
    stop = min(times, max(whole, (end - size_bytes - source) // source_step + 1))
    if whole:
        yield from clipped(_row(move, whole - 1), begin, end)
    if whole < stop:
        at = source + whole * source_step, target + whole * target_step
        yield Move(*at, size_bytes, stop - whole, source_step, target_step)
    if stop < times:
        yield from clipped(_row(move, stop), begin, end)


def _row(move: Move, number: int) -> Move:
    return Move(
        move.source + number * move.source_step,
        move.target + number * move.target_step,
        move.size_bytes,
    )


def dealt(moves: Sequence[Move], size_bytes: int, step_bytes: int) -> list[list[Move]]:
    """Which moves have sources in each range of ``step_bytes``, of ``size_bytes`` from 0 on."""
    found: list[list[Move]] = [[] for _ in range(-(-size_bytes // step_bytes))]
    for move in moves:
        stop = move.source + (move.times - 1) * move.source_step + move.size_bytes
        for number in range(move.source // step_bytes, -(-stop // step_bytes)):
            found[number].append(move)
    return found


def batches_of(
    spans: Sequence[Span], chosen: Iterable[int], limit_bytes: int
) -> Iterator[list[tuple[int, int, Span]]]:
    """Some spans, as many whole chunks of them at a time as have ``limit_bytes``, a chunk at least.

    Of each part the span's number, where the part begins in the span, and its own place.
    """
    batch: list[tuple[int, int, Span]] = []
    room = limit_bytes
    for which in chosen:
        start, size_bytes, chunk = spans[which]
        begin = 0
        while begin < size_bytes:
            if batch and room < min(CHUNK_BYTES, size_bytes - begin):
                yield batch
                batch, room = [], limit_bytes
            take = min(size_bytes - begin, max(room // CHUNK_BYTES, 1) * CHUNK_BYTES)
            part = Span(start + begin, take, chunk + begin // CHUNK_BYTES)
            batch.append((which, begin, part))
            begin, room = begin + take, room - take
    if batch:
        yield batch
