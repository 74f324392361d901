"""Which source brings which range, where several have the same bytes. Pure.

Knows ranges, sources by number, how fast each has been so far, and which have failed. Reads
nothing and has no clock: it is told what came, and how long that took. A range goes to the source
that is likely to be the first to have brought it, given what that is busy with; as all of them are
measured while they bring something, the shares are made anew with every range.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mtckpt._shard import CHUNK_BYTES
from mtckpt.capture.base import Span

__all__ = ["Piece", "Stripes", "cut"]

# How much a source's last range says about its speed, against those before.
_WEIGHT = 0.5


class Piece(NamedTuple):
    """One range of a shard, to be had at once.

    ``wants`` has what of it is wanted: which number, and whole chunks of that. ``shifts`` has, by
    source, how much further on the range lies there.
    """

    start: int
    stop: int
    wants: tuple[tuple[int, Span], ...]
    shifts: Mapping[int, int]

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


def cut(
    wanted: Mapping[int, Span], there: Sequence[Mapping[int, Span]], piece_bytes: int
) -> list[Piece]:
    """The ranges that make up what is ``wanted``, which comes in the order of the file.

    ``there`` has for each source where it has what of it. Small gaps are part of a range.
    """
    found: list[Piece] = []
    for number, span in wanted.items():
        shifts = {
            source: spans[number].start - span.start
            for source, spans in enumerate(there)
            if number in spans
        }
        step = max(1, piece_bytes // CHUNK_BYTES)
        for first in range(0, -(-span.size_bytes // CHUNK_BYTES), step):
            at = first * CHUNK_BYTES
            size_bytes = min(step * CHUNK_BYTES, span.size_bytes - at)
            part = number, Span(span.start + at, size_bytes, span.chunk + first)
            start, stop = span.start + at, span.start + at + size_bytes
            last = found[-1] if found else None
            if (
                last is not None
                and last.shifts == shifts
                and start <= last.stop + CHUNK_BYTES
                and stop - last.start <= piece_bytes
            ):
                found[-1] = Piece(last.start, stop, (*last.wants, part), last.shifts)
            else:
                found.append(Piece(start, stop, (part,), shifts))
    return found


class Stripes:
    """What is still to come, and who is bringing what. ``rates`` are bytes a second by source, of
    those that were measured; the first range that another brings is what measures it.

    ``brought`` has every range that has come, with its source; ``left`` what has not. Once a source
    ``is_idle`` for good it is not asked any more. Not for several threads at a time.
    """

    def __init__(self, pieces: Sequence[Piece], rates: Mapping[int, float]) -> None:
        self.left = deque(pieces)
        self.rates = dict(rates)
        self.brought: list[tuple[int, Piece]] = []
        self._left_bytes = sum(piece.size_bytes for piece in pieces)
        self._failed: set[int] = set()
        self._busy: dict[int, list[Piece]] = {}
        self._refused: set[tuple[int, int]] = set()

    def take(self, source: int) -> Piece | None:
        """What a source is to bring next; None if nothing, or nothing now."""
        if source in self._failed or (source not in self.rates and self._busy.get(source)):
            return None
        for index, piece in enumerate(self.left):
            if self._can(source, piece):
                if not self._is_best(source, piece):
                    return None
                del self.left[index]
                self._left_bytes -= piece.size_bytes
                self._busy.setdefault(source, []).append(piece)
                return piece
        return None

    def is_idle(self, source: int) -> bool:
        """Whether there is nothing more that this source could be asked for, whatever happens."""
        under_way = (piece for busy in self._busy.values() for piece in busy)
        return not any(self._can(source, piece) for piece in (*self.left, *under_way))

    def came(self, source: int, piece: Piece, seconds: float) -> None:
        """A range is here, and sound."""
        beside = len(self._busy[source])
        self._busy[source].remove(piece)
        self.brought.append((source, piece))
        rate = beside * piece.size_bytes / max(seconds, 1e-6)
        before = self.rates.get(source, rate)
        self.rates[source] = before + _WEIGHT * (rate - before)

    def refuse(self, source: int, piece: Piece) -> None:
        """What a source brought is not what was asked for: another one is to bring it."""
        self._refused.add((source, piece.start))
        self._back(source, piece)

    def fail(self, source: int, piece: Piece) -> None:
        """A source did not answer: what it was asked for, and all else, is others' from now on."""
        self._failed.add(source)
        self._back(source, piece)

    def _back(self, source: int, piece: Piece) -> None:
        self._busy[source].remove(piece)
        self.left.appendleft(piece)
        self._left_bytes += piece.size_bytes

    def _can(self, source: int, piece: Piece) -> bool:
        return (
            source in piece.shifts
            and source not in self._failed
            and (source, piece.start) not in self._refused
        )

    def _is_best(self, source: int, piece: Piece) -> bool:
        """Whether no other source would have brought the range before this one: one alone, or all
        of them after everything else that is left."""
        rate = self.rates.get(source)
        others = [s for s in self.rates if s != source and self._can(s, piece)]
        if rate is None or not others:
            return True
        size_bytes = piece.size_bytes
        alone_s = min((self._busy_bytes(s) + size_bytes) / self.rates[s] for s in others)
        rest_bytes = self._left_bytes + sum(self._busy_bytes(s) for s in others)
        after_all_s = rest_bytes / sum(self.rates[s] for s in others)
        return (self._busy_bytes(source) + size_bytes) / rate <= max(alone_s, after_all_s)

    def _busy_bytes(self, source: int) -> int:
        return sum(piece.size_bytes for piece in self._busy.get(source, ()))
