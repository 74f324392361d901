"""One large object, part by part: parallel, resumed where an earlier attempt broke off, then shown.

It knows parts, sources and the order of requests. It does not know which store it is. A part is
read once, in one piece, by the thread that sends it, so memory is bounded by the parts in flight.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from mtckpt._crash import crash_point
from mtckpt.errors import AlreadyExists, TierError, TierUnavailable
from mtckpt.tiers._blocks import in_threads
from mtckpt.tiers._store import Kind, PartStore, Refused, SentPart, Store, Stored, Upload

if TYPE_CHECKING:
    from mtckpt.tiers._pacing import Deadline
    from mtckpt.tiers._requests import Requests
    from mtckpt.tiers.base import Source

__all__ = ["Same", "Uploading", "asked", "part_bytes_for"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIB = 1 << 20
# Another process may abort what we have begun; to begin anew more than once is a fight.
MAX_BEGINNINGS = 3

Same = Callable[[int, int], "tuple[str, int] | None"]
"""For a range of the new object: path and offset of the same bytes in an object that is there."""


def part_bytes_for(size_bytes: int, wanted_bytes: int, parts: PartStore) -> int:
    """The size of all parts but the last: as wanted, unless there would be too many of them."""
    least = -(-size_bytes // parts.max_parts)
    return max(wanted_bytes, parts.min_part_bytes, -(-least // MIB) * MIB)


def asked(source: Source, offset: int, size_bytes: int) -> memoryview:
    """A block of the source, which is as long as it was asked for."""
    view = memoryview(source.read(offset, size_bytes)).cast("B")
    if len(view) != size_bytes:
        raise ValueError(
            f"source.read({offset}, {size_bytes}) returned {len(view)} bytes: a source gives"
            " what it is asked for, or raises"
        )
    return view


class _OfAnother(Exception):
    """A broken-off upload of this key holds other bytes: it is left alone, perhaps in flight."""


class _Gone(Exception):
    """The multipart upload that we send to is no longer there."""


@dataclass(slots=True)
class Uploading:
    """One put of a large object. ``run`` once."""

    store: Store
    parts: PartStore
    requests: Requests
    key: str
    path: str
    source: Source
    part_bytes: int
    concurrency: int
    same: Same | None = None
    copied_bytes: int = 0
    _resumes: bool = True
    _sent: dict[int, SentPart] = field(default_factory=dict)
    _checksums: dict[int, str] = field(default_factory=dict)

    def run(self, deadline: Deadline) -> None:
        """Upload and show, or raise with nothing to be seen under the key."""
        for turn in range(MAX_BEGINNINGS):
            upload, has = self._begun(deadline)
            try:
                self._send_all(upload, has, deadline)
                crash_point("upload.sent")
                self._complete(upload, bool(has), deadline)
            except (_Gone, _OfAnother) as gone:
                self._resumes = self._resumes and isinstance(gone, _Gone)
                self._sent.clear()
                self._checksums.clear()
                if turn + 1 == MAX_BEGINNINGS:
                    raise self._error(Refused(Kind.NO_UPLOAD, str(gone)), deadline) from None
            except AlreadyExists:
                self._abort(upload, deadline)  # Whoever shares it cannot complete it either.
                raise
            except BaseException as error:
                if not has and not _is_for_later(error):
                    self._abort(upload, deadline)
                raise
            else:
                crash_point("upload.done")
                return

    # -- beginning, or going on --------------------------------------------------------------------

    def _begun(self, deadline: Deadline) -> tuple[Upload, dict[int, SentPart]]:
        """An upload to send to, and the parts that it has: the fullest that fits, or a new one."""
        found: list[Upload] = []
        if self._resumes:
            found = self._make("look for broken-off uploads", deadline, self._find)
        best: tuple[Upload, dict[int, SentPart]] | None = None
        for upload in found:
            has = self._parts_of(upload, deadline)
            if has is not None and (best is None or len(has) > len(best[1])):
                best = upload, has
        if best is not None and best[1]:
            logger.info(
                "%s: upload of %s goes on: %d parts are there",
                self.requests.tier,
                self.key,
                len(best[1]),
            )
            return best
        crash_point("upload.begin")
        return self._make("begin an upload", deadline, lambda t: self.parts.begin(self.path, t)), {}

    def _find(self, timeout_s: float) -> list[Upload]:
        try:
            return self.parts.find(self.path, timeout_s)
        except Refused as refused:
            if refused.kind is not Kind.DENIED:
                raise
            return []  # May write, may not list uploads: then nothing is resumed.

    def _parts_of(self, upload: Upload, deadline: Deadline) -> dict[int, SentPart] | None:
        """The parts an upload has; None if it was made for parts of another size."""
        try:
            sent = self.requests.ask(
                "list parts", self.key, deadline, lambda t: self.parts.sent(upload, t)
            )
        except Refused:
            return None  # Gone meanwhile, or not ours to see.
        for part in sent:
            start, stop = self._range(part.number)
            if part.size_bytes != stop - start:
                return None
        return {part.number: part for part in sent}

    # -- parts -----------------------------------------------------------------------------------

    def _range(self, number: int) -> tuple[int, int]:
        start = (number - 1) * self.part_bytes
        return start, max(start, min(start + self.part_bytes, self.source.size_bytes))

    @property
    def _num_parts(self) -> int:
        return -(-self.source.size_bytes // self.part_bytes)

    def _send_all(self, upload: Upload, has: dict[int, SentPart], deadline: Deadline) -> None:
        # What is there first: if it is not ours, nothing of ours must be sent to it.
        self._each(sorted(has), lambda number: self._kept(number, has[number]))
        missing = [number for number in range(1, self._num_parts + 1) if number not in has]
        self._each(missing, lambda number: self._part(upload, number, deadline))

    def _each(self, numbers: Sequence[int], get: Callable[[int], SentPart]) -> None:
        left = iter(numbers)
        lock = threading.Lock()
        stopped = False

        def work(_: int) -> None:
            nonlocal stopped
            try:
                while not stopped:
                    with lock:
                        number = next(left, None)
                    if number is None:
                        return
                    self._sent[number] = get(number)
            except BaseException:
                stopped = True
                raise

        if numbers:
            in_threads(min(self.concurrency, len(numbers)), work)

    def _read(self, number: int) -> tuple[memoryview, str]:
        start, stop = self._range(number)
        view = asked(self.source, start, stop - start)
        checksum = self._checksums[number] = self.parts.checksum_of(view)
        return view, checksum

    def _kept(self, number: int, has: SentPart) -> SentPart:
        view, checksum = self._read(number)
        if not self.parts.has_bytes(has, view, checksum):
            raise _OfAnother(f"part {number} has other bytes")
        return replace(has, checksum=checksum)

    def _part(self, upload: Upload, number: int, deadline: Deadline) -> SentPart:
        view, checksum = self._read(number)
        copied = self._copied(upload, number, checksum, deadline)
        if copied is not None:
            return copied
        part = self._for_upload(
            f"take part {number}",
            deadline,
            lambda t: self.parts.send(upload, number, view, checksum, t),
            size_bytes=len(view),
        )
        crash_point("upload.part")
        return part

    def _copied(
        self, upload: Upload, number: int, checksum: str, deadline: Deadline
    ) -> SentPart | None:
        """The part copied inside the store, if its bytes are there and come out right."""
        start, stop = self._range(number)
        known = self.same(start, stop) if self.same is not None else None
        if known is None:
            return None
        path, offset = known
        try:
            part = self.requests.ask(
                f"copy part {number}",
                self.key,
                deadline,
                lambda t: self.parts.copy(upload, number, path, offset, offset + stop - start, t),
            )
        except Refused as refused:
            if refused.kind is Kind.NO_UPLOAD:
                raise _Gone(refused.said) from None
            return None  # Gone, too old, or a store that cannot: then it is sent.
        if part.checksum != checksum:
            return None  # Not what was promised, or the store does not say: its bytes are replaced.
        self.copied_bytes += stop - start
        return part

    # -- showing it ------------------------------------------------------------------------------

    def _complete(self, upload: Upload, shared: bool, deadline: Deadline) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]
        expected = self.parts.checksum_of_parts(parts)
        unsure = False

        def hear(_: Refused) -> None:
            nonlocal unsure
            unsure = True

        try:
            stored = self.requests.ask(
                "complete the upload",
                self.key,
                deadline,
                lambda t: self.parts.complete(upload, parts, t),
                again=hear,
            )
        except Refused as refused:
            # If the answer to an earlier attempt was lost, it may be our own object that is there.
            gone = refused.kind in (Kind.NO_UPLOAD, Kind.MISSING)
            if (
                unsure
                and (gone or refused.kind is Kind.TAKEN)
                and self._is_there(expected, deadline)
            ):
                return
            if gone:
                raise _Gone(refused.said) from None
            error = self._error(refused, deadline)
        else:
            self._check(stored, expected, shared, deadline)
            return
        raise error

    def _check(
        self, stored: Stored, expected: str | None, shared: bool, deadline: Deadline
    ) -> None:
        """What the store has made of the parts is what was sent; else it is taken away again.

        An upload that was there before may be in use by another writer as well: whose object it is
        then says its content alone, and it is not ours to take away.
        """
        if stored.checksum is None or expected is None:
            stored = self._make("look it up", deadline, lambda t: self.store.head(self.path, t))
        is_right = stored.size_bytes == self.source.size_bytes and (
            expected is None or stored.checksum in (None, expected)
        )
        if shared and (not is_right or stored.checksum is None):
            if self._is_there(expected, deadline):
                return
            raise self._error(Refused(Kind.TAKEN, "another writer completed it"), deadline)
        if is_right:
            return
        self._make("delete", deadline, lambda t: self.store.delete(self.path, t))
        said = f"{stored.size_bytes} bytes, checksum {stored.checksum}, sent with {expected}"
        raise self._error(Refused(Kind.CORRUPTED, said), deadline)

    def _is_there(self, expected: str | None, deadline: Deadline) -> bool:
        """Whether the object under our key has our bytes: by its checksum, else by reading it."""
        try:
            stored = self.requests.ask(
                "look it up", self.key, deadline, lambda t: self.store.head(self.path, t)
            )
            if stored.size_bytes != self.source.size_bytes:
                return False
            if stored.checksum is not None and stored.checksum == expected:
                return True
            return all(self._reads_as_sent(number, deadline) for number in sorted(self._sent))
        except Refused as refused:
            if refused.kind is Kind.MISSING:
                return False
            error = self._error(refused, deadline)
        raise error

    def _reads_as_sent(self, number: int, deadline: Deadline) -> bool:
        start, stop = self._range(number)
        out = memoryview(bytearray(stop - start))
        got = self.requests.ask(
            "read it back",
            self.key,
            deadline,
            lambda t: self.store.fetch(self.path, out, start, t),
            size_bytes=len(out),
        )
        return got == len(out) and self.parts.checksum_of(out) == self._checksums[number]

    # -- inside ----------------------------------------------------------------------------------

    def _abort(self, upload: Upload, deadline: Deadline) -> None:
        with contextlib.suppress(Refused):
            # What cannot be aborted now is aborted by age: see ``abort_uploads``.
            self.parts.abort(upload, max(1.0, min(10.0, deadline.left_s)))

    def _for_upload(
        self, what: str, deadline: Deadline, request: Callable[[float], T], *, size_bytes: int = 0
    ) -> T:
        try:
            return self.requests.ask(what, self.key, deadline, request, size_bytes=size_bytes)
        except Refused as refused:
            if refused.kind in (Kind.NO_UPLOAD, Kind.MISSING):
                raise _Gone(refused.said) from None
            error = self._error(refused, deadline)
        raise error

    def _make(self, what: str, deadline: Deadline, request: Callable[[float], T]) -> T:
        return self.requests.make(what, self.key, deadline, request)

    def _error(self, refused: Refused, deadline: Deadline) -> TierError:
        return self.requests.error(refused, "store the object", self.key, deadline)


def _is_for_later(error: BaseException) -> bool:
    """Whether the parts that were sent are worth keeping: the next attempt goes on with them."""
    return isinstance(error, TierUnavailable)
