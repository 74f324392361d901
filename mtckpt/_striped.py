"""What is wanted of a shard, brought into memory of its own by several sources side by side.

Knows copies, threads and the engine; which source brings what is decided in ``_striping``. Each
range is compared with its digests as soon as it is here, so that it is known whose is bad.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt._striping import Stripes, cut
from mtckpt.capture.memory import anonymous
from mtckpt.errors import FormatError, TierError
from mtckpt.tiers._blocks import in_threads

if TYPE_CHECKING:
    from mtckpt._describing import Copy, Loaded
    from mtckpt._striping import Piece
    from mtckpt.capture.base import Engine, Span
    from mtckpt.capture.memory import Mapping as MemoryMapping
    from mtckpt.errors import CheckpointError

__all__ = ["STRIPED_BYTES", "Striped", "bring", "choose"]

# Less than this one source brings before another has been asked what it has.
STRIPED_BYTES = 32 * 1024 * 1024
PIECE_BYTES = 4 * 1024 * 1024
MAX_NODES = 4
MAX_COPIES = 8


def choose(
    copies: Iterable[Copy], alike: Callable[[Loaded], Mapping[int, Span]]
) -> tuple[list[Copy], list[Copy]]:
    """Copies to read side by side, on a few nodes, and those of them that are not needed for it.

    ``alike`` says what a shard has of what is wanted. A node's further copies count where they have
    what its others lack. As many copies are looked at as that takes.
    """
    chosen: list[Copy] = []
    spare: list[Copy] = []
    held: dict[str, set[int]] = {}
    for copy in copies:
        node = copy.place.node
        there = set(alike(copy.loaded))
        is_new = node not in held and len(held) < MAX_NODES
        if there - held.get(node, set()) and (is_new or node in held):
            held.setdefault(node, set()).update(there)
            chosen.append(copy)
        else:
            spare.append(copy)
        if len(chosen) == MAX_COPIES:
            break
    return chosen, spare


@dataclass(slots=True)
class Striped:
    """What came. ``left`` are the numbers of what did not come whole; ``bytes_by`` and ``rates``
    are by source, ``bad`` has what came damaged, by source, and ``errors`` what sources said."""

    memory: MemoryMapping
    left: set[int] = field(default_factory=set)
    bytes_by: dict[int, int] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    bad: dict[int, set[int]] = field(default_factory=dict)
    errors: dict[int, CheckpointError] = field(default_factory=dict)


def bring(
    copies: Sequence[Copy],
    wanted: Mapping[int, Span],
    there: Sequence[Mapping[int, Span]],
    engine: Engine,
    digests: memoryview,
    rates: Mapping[int, float],
    count: Callable[[int], None],
) -> Striped:
    """Bring what is ``wanted``, in the order of the file that ``digests`` are of, to its place in
    memory of that size; ``there`` has, by source, where it lies.

    Runs in a thread that may be given up: it touches nothing but what it returns.
    """
    memory = anonymous(max(span.start + span.size_bytes for span in wanted.values()))
    stripes = Stripes(cut(wanted, there, PIECE_BYTES), rates)
    done = Striped(memory)
    changed = threading.Condition()

    def read(source: int, piece: Piece) -> set[int]:
        """The numbers of what of it came damaged."""
        tier, key, at = copies[source].place.tier, copies[source].key, piece.shifts[source]
        tier.read_into(key, memory.view[piece.start : piece.stop], piece.start + at)
        spans = [span for _, span in piece.wants]
        return {piece.wants[i][0] for i in engine.verify(memory.address, spans, digests)}

    def work(thread: int) -> None:
        source = thread % len(copies)
        while True:
            with changed:
                while (piece := stripes.take(source)) is None:
                    if stripes.is_idle(source):
                        return
                    changed.wait()
            began_s = time.monotonic()
            error: BaseException | None = None
            bad: set[int] = set()
            try:
                bad = read(source, piece)
            except BaseException as raised:  # noqa: BLE001 - kept, or raised below once others know
                error = raised
            with changed:
                if error is not None:
                    stripes.fail(source, piece)
                elif bad:
                    stripes.refuse(source, piece)
                    done.bad.setdefault(source, set()).update(bad)
                else:
                    stripes.came(source, piece, time.monotonic() - began_s)
                    count(piece.size_bytes)
                changed.notify_all()
                if isinstance(error, (FormatError, TierError)):
                    done.errors.setdefault(source, error)
                elif error is not None:
                    raise error

    in_threads(sum(copy.place.streams for copy in copies), work)
    done.rates = stripes.rates
    done.left = {number for piece in stripes.left for number, _ in piece.wants}
    for source, piece in stripes.brought:
        size_bytes = sum(span.size_bytes for n, span in piece.wants if n not in done.left)
        done.bytes_by[source] = done.bytes_by.get(source, 0) + size_bytes
    return done
