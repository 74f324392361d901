"""A capture that devices are at: what it uses, until nothing of it is under way.

Knows lanes, parts and gates. Does not know how a capture is divided, nor states or files. A slot
that a device may still write to is never given back, and neither is memory that it reads: what a
device does not come to the end of is lost, and kept for good.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mtckpt.capture import gates
from mtckpt.capture.addresses import must_be_awaited
from mtckpt.capture.driver import CudaError
from mtckpt.capture.windows import bits_of
from mtckpt.errors import CaptureFailed, CaptureStuck

if TYPE_CHECKING:
    from mtckpt.capture.draining import Draining, Lane
    from mtckpt.capture.gates import Gate

__all__ = ["FINISH_S", "CudaCapture", "Owner", "as_capture_failed"]

logger = logging.getLogger(__name__)

FINISH_S = 600.0
_SETTLE_S = 60.0  # after an error, until nothing is under way


class Owner(Protocol):
    """Who keeps captures for as long as they are under way."""

    bytes_per_s: float

    def ended(self, capture: CudaCapture) -> None:
        """Nothing of it is under way any more."""

    def forget(self, lanes: Sequence[Lane]) -> None:
        """Use these lanes no more: what was put on them is still under way."""


class CudaCapture:
    """See ``base.Capture``. Whatever it uses is kept until nothing of it is under way."""

    def __init__(self, owner: Owner, base: int, is_known: bool = False) -> None:
        self.base = base
        self._is_known = is_known
        self.is_captured = True
        self.is_lost = False  # kept for good: a device did not come to the end of it
        self._owner = owner
        self._lanes: list[Lane] = []
        self._arenas: list[object] = []
        self._parts: list[Draining] = []
        self._gates: list[Gate] = []

    def uses(self, lane: Lane, arena: object) -> None:
        """The next part is about to be put on a lane, through an arena that ``arena`` keeps."""
        self._lanes.append(lane)
        self._arenas.append(arena)

    def add(self, part: Draining) -> None:
        """A part that has been put on its lane."""
        self._parts.append(part)

    def open_gate(self, gate: Gate) -> None:
        """Whoever changes guarded values waits for this, until the capture has ended."""
        self.is_captured = False
        self._gates.append(gate)
        gates.open_one(gate)

    def until_read(self, sources: Sequence[int], shares: Sequence[list[int]]) -> None:
        """Wait for those parts whose sources are ``awaited``; the shares go with the parts."""
        for part, share in zip(self._parts, shares, strict=True):
            if must_be_awaited(sources[i] for i in share):
                part.until_read(FINISH_S)

    def finish(self, digests: memoryview) -> bytes:
        """Wait until all bytes and digests are in host memory. Raises CaptureFailed."""
        left = bytearray(len(digests)) if self._is_known else None
        try:
            while self._parts:
                with as_capture_failed():
                    self._parts[0].finish(digests, left, self._owner.bytes_per_s, FINISH_S)
                del self._parts[0], self._arenas[0]
        except BaseException as error:
            self.abandon(error)
            raise
        self._end()
        return bits_of(left) if left and any(left) else b""

    def abandon(self, error: BaseException | None = None) -> None:
        """After an error: return once nothing is under way, neither to the slot nor in the arena.

        Raises CaptureStuck, in bounded time, if that does not come: all it uses is then left alone.
        """
        for gate in self._gates:
            gates.close(gate)
        self.is_lost = True  # in case this is interrupted
        is_stuck = isinstance(error, CaptureStuck)
        if not is_stuck and self._is_settled(time.monotonic() + _SETTLE_S):
            self._end()
            return
        self._owner.forget(self._lanes)
        logger.error("a device still copies to a slot: its memory is left to it")
        if isinstance(error, Exception) and not is_stuck:
            raise CaptureStuck(
                f"a capture failed ({error}), and the device has not ended its copies",
                stage="captured",
            ) from error

    def _is_settled(self, deadline_s: float) -> bool:
        try:
            return all(lane.is_settled(deadline_s) for lane in self._lanes)
        except CudaError:  # it says nothing of what is under way
            return False

    def _end(self) -> None:
        for gate in self._gates:
            gates.close(gate)
        self._parts, self._arenas, self._lanes = [], [], []
        self._owner.ended(self)


@contextlib.contextmanager
def as_capture_failed() -> Iterator[None]:
    """What the driver says, as what a save raises."""
    try:
        yield
    except CudaError as error:
        raise CaptureFailed(
            f"the device refused: {error}",
            stage="captured",
            actions=("look for an earlier error of the device in the log of the job",),
        ) from error
