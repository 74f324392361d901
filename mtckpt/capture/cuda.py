"""The engine for CUDA devices: which memory a capture passes through, and when it is waited for.

Knows the driver's lanes, the frameworks' current streams, and what may still be under way. Does not
know states or files. Live state is never allocated here.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mtckpt.capture import gates, underway
from mtckpt.capture.addresses import OnDevice, by_device, must_be_awaited
from mtckpt.capture.arenas import Arenas
from mtckpt.capture.base import nothing
from mtckpt.capture.bringing import Bringer
from mtckpt.capture.draining import Lane
from mtckpt.capture.driver import ALREADY_REGISTERED, CudaError, Driver, giving_back
from mtckpt.capture.gates import Gate
from mtckpt.capture.kernels import Kernels
from mtckpt.capture.landing import land
from mtckpt.capture.underway import CudaCapture, as_capture_failed
from mtckpt.capture.windows import WINDOW_BYTES, Spread, arena_of, room_bytes, windows
from mtckpt.errors import CaptureFailed, CaptureStuck, RestoreFailed

if TYPE_CHECKING:
    from mtckpt.capture.base import Mode, Move, Span
    from mtckpt.capture.passing import HostCopy

__all__ = ["CudaEngine"]

logger = logging.getLogger(__name__)

_CLEARING_S = 600.0
_SETTLE_S = 600.0  # of what users have put on a device, before a restore
_POLL_S = 0.0002
# Two of these, rows and digests are what a capture needs that has no arena of its own.
_TURN_BYTES = 24 << 20
_SMALL_TURN_BYTES = 4 << 20  # beside another one


class _Device:
    """What is kept of one device from one save to the next."""

    def __init__(self, driver: Driver, ordinal: int, kernels: Kernels) -> None:
        self.kernels = kernels
        self.lane = Lane(driver, ordinal, kernels)
        self.arenas = Arenas(driver, ordinal)
        self._spans: Sequence[Span] = ()
        self._chosen: Sequence[int] = ()
        self._spread: Spread | None = None

    def spread(self, spans: Sequence[Span], chosen: list[int]) -> Spread:
        """The chunks of these spans; made anew only if they are others than last time."""
        known = self._spread
        if known is None or self._spans is not spans or self._chosen is not chosen:
            known = self._spread = Spread(spans, chosen)
            self._spans, self._chosen = spans, chosen
        return known

    def close(self) -> None:
        """Give back what it holds. Nothing may be under way."""
        self.lane.close()
        driver = self.lane.driver
        with giving_back(), driver.current(self.lane.ordinal), driver.relaxed():
            self.arenas.close()


class CudaEngine:
    """Captures from devices. One capture at a time, from any thread."""

    def __init__(self, driver: Driver, host_copy: HostCopy, bytes_per_s: float = 0.0) -> None:
        """``bytes_per_s``: what a drain takes of the bus at most; 0 is no limit."""
        self.bytes_per_s = bytes_per_s
        self._driver = driver
        self._host_copy = host_copy
        # By ordinal and whether it is for values that are taken during training.
        self._devices: dict[tuple[int, bool], _Device] = {}
        self._kernels: dict[int, Kernels] = {}
        self._registered: dict[int, int] = {}  # by which device
        self._lock = threading.Lock()
        self._clearing: list[threading.Thread] = []
        self._refused = False
        self._under_way: list[CudaCapture] = []  # and those that are lost, for good

    # -- slots -----------------------------------------------------------------------------------

    def register(self, address: int, size_bytes: int, ordinal: int | None = None) -> bool:
        """Pin memory of a slot, so that devices copy straight to it; False where that is refused.

        Copies pass through pinned memory then, which is said once. It is done by way of a device
        that is used anyway: ``ordinal``, or one that was captured from before; without any, it is
        left to the capture.
        """
        if ordinal is None:
            ordinal = next((known for known, _ in self._devices), None)
        if address in self._registered:
            return True
        if self._refused or not size_bytes or ordinal is None:
            return False
        try:
            with self._driver.current(ordinal), self._driver.relaxed():
                self._register(address, size_bytes)
        except CudaError as error:
            self._refused = True
            logger.warning(
                "slots cannot be registered with the device (%s): copies go through other memory,"
                " which is slower",
                error,
            )
            return False
        self._registered[address] = ordinal
        return True

    def _register(self, address: int, size_bytes: int) -> None:
        try:
            self._driver.register(address, size_bytes)
        except CudaError as error:
            if error.code != ALREADY_REGISTERED:
                raise
            # Memory that somebody unmapped without a word: what is there now are other pages.
            self._driver.unregister(address)
            self._driver.register(address, size_bytes)

    def unregister(self, address: int) -> bool:
        """Before the memory is unmapped; False if it has to stay, since a device may use it."""
        if not self._is_quiet():
            return False
        ordinal = self._registered.pop(address, None)
        if ordinal is not None:
            with giving_back(), self._driver.current(ordinal), self._driver.relaxed():
                self._driver.unregister(address)
        return True

    def holds(self, address: int) -> bool:
        """True if a device may still write to the slot at this address."""
        return any(capture.base == address for capture in self._under_way)

    def ended(self, capture: CudaCapture) -> None:
        """Nothing of it is under way any more."""
        self._under_way.remove(capture)

    def forget(self, lanes: Sequence[Lane]) -> None:
        """Use these lanes no more: what was put on them is still under way."""
        self._devices = {
            key: device for key, device in self._devices.items() if device.lane not in lanes
        }

    def _is_quiet(self) -> bool:
        """Whether nothing is under way; a capture that nobody came to finish is waited for."""
        for capture in list(self._under_way):
            if not capture.is_lost:
                capture.abandon()
        return not self._under_way

    # -- capture ---------------------------------------------------------------------------------

    def capture(
        self,
        sources: Sequence[int],
        spans: Sequence[Span],
        there: dict[int, list[int]],
        base: int,
        mode: Mode,
        is_known: bool,
    ) -> tuple[CudaCapture, list[tuple[int, int]]]:
        """Take the values of those ``sources`` that ``there`` names, as of now.

        Returns what is to be finished, and the stretches of the shard that its copies cover: bytes
        of others inside of them are overwritten until it has finished. Waits until the devices have
        read everything, in bounded time, where a source is ``awaited``. Raises CaptureFailed.
        """
        with self._lock:
            if not self._is_quiet() and self.holds(base):
                raise CaptureStuck("a device still writes to this slot", stage="captured")
            capture = CudaCapture(self, base, is_known)
            self._under_way.append(capture)
            try:
                with as_capture_failed():
                    covered = self._begin(capture, sources, spans, there, mode)
            except BaseException as error:
                capture.abandon(error)
                raise
        return capture, sorted(covered)

    def _begin(
        self,
        capture: CudaCapture,
        sources: Sequence[int],
        spans: Sequence[Span],
        there: dict[int, list[int]],
        mode: Mode,
    ) -> list[tuple[int, int]]:
        """Put all parts on their devices."""
        covered: list[tuple[int, int]] = []
        late = gates.late_addresses() if "overlap" in mode else set()
        streams = {ordinal: self._streams(ordinal) for ordinal in there}
        shares = [
            (ordinal, share, is_late)
            for ordinal, chosen in there.items()
            for share, is_late in _shares(chosen, sources, late)
        ]
        for ordinal, share, is_late in shares:
            with self._driver.current(ordinal), self._driver.relaxed():
                device = self._device(ordinal, is_late=is_late)
                turn_bytes = _TURN_BYTES
                if late and not is_late:
                    turn_bytes = _SMALL_TURN_BYTES
                self._start(
                    capture, device, share, sources, spans, mode, turn_bytes,
                    streams[ordinal], covered, alone=len(shares) == 1,
                )  # fmt: skip
                if is_late:
                    capture.open_gate(Gate(self._driver, ordinal, device.lane.captured))
                    continue
                for stream in streams[ordinal]:
                    self._driver.wait(stream, device.lane.captured)
        if must_be_awaited(sources):
            capture.until_read(sources, [share for _, share, _ in shares])
        return covered

    def _start(
        self,
        capture: CudaCapture,
        device: _Device,
        chosen: list[int],
        sources: Sequence[int],
        spans: Sequence[Span],
        mode: Mode,
        turn_bytes: int,
        streams: Sequence[int],
        covered: list[tuple[int, int]],
        *,
        alone: bool,
    ) -> None:
        spread = device.spread(spans, chosen)
        cut = windows(spread, WINDOW_BYTES, alone=alone)
        wanted = arena_of(cut, sys.maxsize)
        room = room_bytes(mode, wanted.size_bytes, *device.arenas.free_bytes())
        if room < wanted.size_bytes:
            cut = windows(spread, turn_bytes, alone=alone)
        arena = arena_of(cut, room)
        lent = device.arenas.take(arena.size_bytes)
        if lent is None:
            cut = windows(spread, turn_bytes, alone=alone)
            arena = arena_of(cut, 0)
            lent = device.arenas.take(arena.size_bytes)
        if lent is None:
            raise CaptureFailed(
                f"device {device.lane.ordinal} has no memory left to capture through",
                stage="captured",
                needed_bytes=arena.size_bytes,
                actions=("leave some hundred MiB of device memory free",),
            )
        address, owner = lent
        at = sources if len(chosen) == len(sources) else [sources[i] for i in chosen]
        capture.uses(device.lane, owner)  # before anything is under way
        host_copy = None if capture.base in self._registered else self._host_copy
        capture.add(
            device.lane.start(
                spread,
                cut,
                arena,
                address,
                at,
                capture.base,
                streams,
                host_copy,
                underway.FINISH_S,
            )
        )
        covered += [(window.begin, window.end) for window in cut]

    def _streams(self, ordinal: int) -> list[int]:
        """The streams whose work a user expects to be done before what is called now.

        The current one, and the default one, where whoever knows nothing of streams works.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return []  # JAX has none to ask for: its arrays have been computed, and are awaited
        current = torch.cuda.current_stream(ordinal).cuda_stream
        with self._driver.current(ordinal):
            if self._driver.capturing(current):
                raise CaptureFailed(
                    "save() was called while a CUDA graph is captured: there are no values yet",
                    stage="captured",
                    actions=("call save() outside of torch.cuda.graph()",),
                )
            if current == 0 or self._driver.capturing(0):  # by another thread
                return [current]
        return [current, 0]

    # -- restore ---------------------------------------------------------------------------------

    def settle(self, ordinals: Sequence[int]) -> None:
        """See ``base.Engine``, for these devices."""
        with _as_restore_failed([]):
            for ordinal in ordinals:
                streams = self._streams(ordinal)
                lanes = [device.lane for (at, _), device in self._devices.items() if at == ordinal]
                with self._driver.current(ordinal), self._driver.relaxed():
                    for stream in (*streams, *(lane.packing for lane in lanes)):
                        self._until_idle(ordinal, stream)

    def _until_idle(self, ordinal: int, stream: int) -> None:
        deadline_s = time.monotonic() + _SETTLE_S
        while not self._driver.stream_idle(stream):
            if time.monotonic() > deadline_s:
                raise RestoreFailed(
                    f"device {ordinal} has not ended what was put on it before the restore",
                    live_state="unchanged",
                    state="live state is unchanged",
                    actions=("see whether a collective hangs: py-spy dump",),
                )
            time.sleep(_POLL_S)

    def fetch(
        self,
        fd: int,
        spans: Sequence[Span],
        targets: Sequence[int],
        digests: memoryview,
        progress: Callable[[int], None],
        *,
        whole: bool,
        placing: Callable[[], None] = nothing,
    ) -> list[int]:
        """See ``base.Engine``, for those targets that are on devices. Raises RestoreFailed."""
        begun: list[bool] = []

        def begin() -> None:
            begun.append(True)
            placing()

        bad: list[int] = []
        there, _ = by_device(targets, spans)
        if whole and len(there) > 1:  # each has to wait for what the others say
            nowhere = [type(target)(0) for target in targets]
            bad = self.fetch(fd, spans, nowhere, digests, lambda _: None, whole=False)
            if bad:
                return bad
            whole = False
        with _as_restore_failed(begun):
            for ordinal, chosen in there.items():
                at = [targets[i] for i in chosen]
                bad += land(
                    self._driver, ordinal, self._kernels_of(ordinal),
                    fd, spans, chosen, at, digests, progress, begin, self._later, whole=whole,
                )  # fmt: skip
        return sorted(bad)

    def copy(
        self, moves: Sequence[Move], on_host: Sequence[Move], placing: Callable[[], None]
    ) -> None:
        """See ``base.Engine``: moves from or to devices, and others. Raises RestoreFailed."""
        there: dict[int, list[Move]] = {}
        within: list[Move] = []
        for move in moves:
            if isinstance(move.source, OnDevice):
                within.append(move)
            elif isinstance(move.target, OnDevice):
                there.setdefault(move.target.ordinal, []).append(move)
        begun: list[bool] = []
        with _as_restore_failed(begun), contextlib.ExitStack() as opened:
            # That there is too little memory somewhere is seen before the first byte is written.
            bringers = []
            for ordinal, these in there.items():
                bringer = Bringer(self._driver, ordinal, self._kernels_of(ordinal), these)
                opened.callback(bringer.close)
                bringers.append(bringer)
            begun.append(True)
            placing()
            self._host_copy(on_host)
            self._copy_from_devices(within)
            for bringer in bringers:
                bringer.bring(self._host_copy)

    def _later(self, work: Callable[[], None]) -> None:
        """Do in the background what nobody has to wait for, before the engine is closed."""
        thread = threading.Thread(target=work, name="mtckpt-clear", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            work()  # No thread to be had: the caller waits for it after all.
            return
        self._clearing = [*(one for one in self._clearing if one.is_alive()), thread]

    def _copy_from_devices(self, moves: Sequence[Move]) -> None:
        """One by one: what was restored to one place and is wanted at another, too."""
        for move in moves:
            assert isinstance(move.source, OnDevice)
            with self._driver.current(move.source.ordinal), self._driver.relaxed():
                stream = self._driver.stream()
                to_device = isinstance(move.target, OnDevice)
                copy = self._driver.on_device if to_device else self._driver.to_host
                for turn in range(move.times):
                    source = int(move.source) + turn * move.source_step
                    copy(
                        int(move.target) + turn * move.target_step, source, move.size_bytes, stream
                    )
                self._driver.synchronize(stream)
                self._driver.destroy_stream(stream)

    def _kernels_of(self, ordinal: int) -> Kernels:
        if ordinal not in self._kernels:
            self._kernels[ordinal] = Kernels(self._driver, ordinal)
        return self._kernels[ordinal]

    def _device(self, ordinal: int, *, is_late: bool) -> _Device:
        key = ordinal, is_late
        if key not in self._devices:
            self._devices[key] = _Device(self._driver, ordinal, self._kernels_of(ordinal))
        return self._devices[key]

    def close(self) -> None:
        """Give back all device memory, streams and registrations, unless a device is stuck."""
        if not self._is_quiet():
            logger.warning("a device is stuck: what it may use is left until this process ends")
            return
        for thread in self._clearing:
            thread.join(_CLEARING_S)
        for address in list(self._registered):
            self.unregister(address)
        for device in self._devices.values():
            device.close()
        self._devices.clear()
        for kernels in self._kernels.values():
            with giving_back():
                kernels.close()
        self._kernels.clear()


def _shares(
    chosen: list[int], sources: Sequence[int], late: set[int]
) -> Iterator[tuple[list[int], bool]]:
    """What is taken now, and what may be taken later."""
    if not late:
        yield chosen, False
        return
    for share, is_late in (
        ([i for i in chosen if sources[i] not in late], False),
        ([i for i in chosen if sources[i] in late], True),
    ):
        if share:
            yield share, is_late


@contextlib.contextmanager
def _as_restore_failed(begun: Sequence[bool]) -> Iterator[None]:
    """``begun``: empty for as long as no live memory has been written to."""
    try:
        yield
    except (CudaError, TimeoutError) as error:
        raise RestoreFailed(
            f"the device refused: {error}",
            live_state="undefined" if begun else "unchanged",
            state="live state is undefined: the device failed while it was written"
            if begun
            else "live state is unchanged",
            actions=("look for an earlier error of the device in the log of the job",),
        ) from error
