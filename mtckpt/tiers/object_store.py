"""A tier in an object store: s3://, gs://, az://, or any URL that fsspec opens.

It knows keys, parts, ranges and time. It does not know what the bytes are, nor a store's own
protocol: a ``Store`` makes single requests, this module decides which, how many at a time and how
often. It does not promise more than the store does: whether a put can replace what another writer
stored at the same moment is said by ``PutResult.atomic``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mtckpt.errors import AlreadyExists, ShortRead, TierError, UsageError
from mtckpt.tiers._blocks import in_threads
from mtckpt.tiers._opening import opened
from mtckpt.tiers._pacing import Bucket, Deadline
from mtckpt.tiers._requests import Counts, Requests, Rules
from mtckpt.tiers._store import Entry, Kind, Refused, SourceFailed
from mtckpt.tiers._upload import Same, Uploading, asked, part_bytes_for
from mtckpt.tiers.base import ObjectInfo, PutResult, Survives, check_key

if TYPE_CHECKING:
    from mtckpt.tiers.base import Source

__all__ = ["Capabilities", "ObjectStoreTier"]

logger = logging.getLogger(__name__)

Engine = Literal["auto", "obstore", "fsspec"]

MIB = 1 << 20
PART_BYTES = 16 * MIB
RANGE_BYTES = 16 * MIB
# Starts with a dot, so no key is it and no listing shows it. It stays: the next process needs then
# one request to learn what this one learned with two, and no right to delete.
PROBE = ".mtckpt-probe"
_PREFIX_END = re.compile(r"(?:[a-z0-9_=-][a-z0-9_.=-]{0,199})?")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the store itself guarantees.

    ``conditional_put``: of several puts of a key one wins, whatever their timing. ``parts``: large
    objects go up in parallel and are resumed. ``checksums``: the store verifies what it receives.
    """

    conditional_put: bool
    parts: bool
    checksums: bool


class ObjectStoreTier:
    """Objects under ``url``, one for each key.

    Every call ends within ``timeout_s`` plus the time its bytes take at ``min_bytes_per_s``, or
    raises ``TierUnavailable``. Until then throttling, lost connections and wrong answers are tried
    again; after "slow down" no thread of this tier asks before one common pause is over.

    Credentials, region and endpoint are found where the store's users keep them (environment,
    profiles, metadata service); ``storage_options`` are those of s3fs, gcsfs, adlfs or the file
    system that fsspec opens for the URL. No error, log line or ``repr`` shows any of them.

    Args:
        url: ``s3://bucket/prefix``, ``gs://``, ``az://``, or any other that fsspec opens.
        engine: "obstore", a fast path for s3:// only; "fsspec"; or the fastest that is installed.
        timeout_s: for each call, besides the time for its bytes. Listing: for each page.
        min_bytes_per_s: the slowest rate that still counts as alive.
        stall_s: a connection that moves no byte for so long is given up, and the request repeated.
        part_bytes: how much one request carries; larger objects are sent in parts of it.
        concurrency: how many requests one call has in flight, and so how many parts in memory.
        max_bytes_per_s: a cap on what is sent and read, over all threads; None: no cap.

    Raises:
        UsageError: a URL or option that cannot be right, or a package that is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        engine: Engine = "auto",
        storage_options: Mapping[str, Any] | None = None,
        name: str = "store",
        timeout_s: float = 60.0,
        min_bytes_per_s: float = MIB,
        stall_s: float = 20.0,
        part_bytes: int = PART_BYTES,
        concurrency: int = 8,
        max_bytes_per_s: float | None = None,
    ) -> None:
        self.name = name
        self.survives = Survives.PROCESS | Survives.POWER | Survives.NODE | Survives.CLUSTER
        self._store, self._root, self.engine = opened(
            url,
            engine,
            dict(storage_options or {}),
            stall_s=stall_s,
            longest_s=stall_s + RANGE_BYTES / min_bytes_per_s,
        )
        self._part_bytes = part_bytes
        self._concurrency = concurrency
        self._requests = Requests(
            tier=name,
            place=self._store.place,
            rules=Rules(timeout_s, stall_s, min_bytes_per_s),
            renew=self._store.renew,
            bucket=Bucket(max_bytes_per_s, part_bytes) if max_bytes_per_s else None,
        )
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"ObjectStoreTier({self._store.place!r}, name={self.name!r}, engine={self.engine!r})"

    @property
    def place(self) -> str:
        """The URL without anything secret, for messages."""
        return self._store.place

    @property
    def counts(self) -> Counts:
        """Requests made so far by this object."""
        return self._requests.counts

    # -- the protocol ----------------------------------------------------------------------------

    def put(self, key: str, source: Source) -> PutResult:
        """Create ``key``; see ``Tier.put``."""
        return self.put_reusing(key, source, None)

    def put_reusing(
        self,
        key: str,
        source: Source,
        same: Callable[[int, int], tuple[str, int] | None] | None,
    ) -> PutResult:
        """Create ``key``, copying inside the store the parts whose bytes it has already.

        In parts, not every server makes the last step atomic where it makes a small put so: see
        ``PutResult.atomic``.

        ``same(start, stop)`` is asked once for each of ``part_ranges(source.size_bytes)``; it
        returns the key and offset of an object of this tier that has just these bytes there, or
        None. What is copied is read from the source all the same, and compared by checksum; where
        the store cannot copy, the part is sent. ``PutResult.copied_bytes`` were not sent.
        """
        path = self._path(check_key(key))
        atomic = self._creates(key)
        size_bytes = source.size_bytes
        deadline = self._requests.deadline(size_bytes)
        parts = self._store.parts
        if parts is None or size_bytes <= self._part_bytes:
            self._create(key, path, source, deadline)
            return PutResult(size_bytes, atomic)
        self._refuse_taken(key, path, deadline)
        uploading = Uploading(
            store=self._store,
            parts=parts,
            requests=self._requests,
            key=key,
            path=path,
            source=source,
            part_bytes=part_bytes_for(size_bytes, self._part_bytes, parts),
            concurrency=self._concurrency,
            same=self._same_paths(same),
        )
        uploading.run(deadline)
        atomic = atomic and parts.completes_atomically
        return PutResult(size_bytes, atomic, uploading.copied_bytes)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Fill ``out``, large ranges by several requests at a time; see ``Tier.read_into``."""
        view = memoryview(out).cast("B")
        if view.readonly or offset < 0:
            raise UsageError(f"cannot read {key} into that", readonly=view.readonly, offset=offset)
        path = self._path(check_key(key))
        deadline = self._requests.deadline(len(view))
        if not len(view):
            self._requests.make("look up", key, deadline, lambda t: self._store.head(path, t))
            return
        starts = itertools.count(0, RANGE_BYTES)
        stopped = False

        def work(_: int) -> None:
            nonlocal stopped
            try:
                for start in starts:
                    if stopped or start >= len(view):
                        return
                    part = view[start : start + RANGE_BYTES]
                    self._read(key, path, part, offset + start, deadline)
            except BaseException:
                stopped = True
                raise

        in_threads(min(self._concurrency, -(-len(view) // RANGE_BYTES)), work)

    def stat(self, key: str) -> ObjectInfo:
        """Size of the object; see ``Tier.stat``."""
        path = self._path(check_key(key))
        deadline = self._requests.deadline()
        stored = self._requests.make("look up", key, deadline, lambda t: self._store.head(path, t))
        return ObjectInfo(key, stored.size_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in order, read when the first is asked for; see ``Tier.list``."""
        self._check_open()
        *directories, last = prefix.split("/")
        try:
            if directories:
                check_key("/".join(directories))
        except UsageError:
            return iter(())  # No key begins like this.
        if not _PREFIX_END.fullmatch(last):
            return iter(())
        return self._list(prefix)

    def delete(self, key: str) -> None:
        """Remove the object; see ``Tier.delete``."""
        path = self._path(check_key(key))
        deadline = self._requests.deadline()
        try:
            self._requests.ask("delete", key, deadline, lambda t: self._store.delete(path, t))
        except Refused as refused:
            if refused.kind is Kind.MISSING:
                return
            error = self._requests.error(refused, "delete", key, deadline)
        else:
            return
        raise error

    def close(self) -> None:
        """Release connections. Calls in flight end normally or with an error. Idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._store.close()

    # -- beyond the protocol ---------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """What the store guarantees; the first call asks it, with a request or two."""
        return Capabilities(
            conditional_put=self._creates(None),
            parts=self._store.parts is not None,
            checksums=self._store.parts is not None,
        )

    def part_ranges(self, size_bytes: int) -> Sequence[tuple[int, int]]:
        """The parts in which an object of this size goes up: start and stop of each."""
        parts = self._store.parts
        if parts is None or size_bytes <= self._part_bytes:
            return [(0, size_bytes)]
        step = part_bytes_for(size_bytes, self._part_bytes, parts)
        return [(start, min(start + step, size_bytes)) for start in range(0, size_bytes, step)]

    def abort_uploads(self, prefix: str = "", *, older_than_s: float) -> int:
        """Throw away unfinished uploads below ``prefix`` that began so long ago, by the store's
        clock; the number of them. What is younger may be in flight, here or elsewhere."""
        parts = self._store.parts
        if parts is None:
            return 0
        deadline = self._requests.deadline()
        start = self._root + "/" + prefix
        found = self._requests.make(
            "list uploads", None, deadline, lambda t: [*parts.unfinished(start, t)]
        )
        aborted = 0
        for upload in found:
            if upload.age_s >= older_than_s:
                self._requests.make(
                    "abort an upload",
                    None,
                    deadline,
                    lambda t, u=upload: parts.abort(u, t),  # type: ignore[misc]  # a default is how the loop's upload is kept
                )
                aborted += 1
        return aborted

    # -- inside ----------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        self._check_open()
        return f"{self._root}/{key}"

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the tier is closed", tier=self.name)

    def _same_paths(self, same: Same | None) -> Same | None:
        if same is None:
            return None

        def of(start: int, stop: int) -> tuple[str, int] | None:
            found = same(start, stop)
            return None if found is None else (self._path(check_key(found[0])), found[1])

        return of

    def _creates(self, key: str | None) -> bool:
        """Whether the store itself refuses to replace, asked once: see ``PROBE``."""
        self._check_open()
        with self._lock:
            if self._store.can_create is None:
                self._store.can_create = self._probe(key)
                if not self._store.can_create:
                    logger.warning(
                        "%s: %s cannot create only what is absent: two writers of one key are"
                        " noticed late",
                        self.name,
                        self.place,
                    )
            return self._store.can_create

    def _probe(self, key: str | None) -> bool:
        path = f"{self._root}/{PROBE}"
        content = memoryview(b"This object shows whether the store replaces what is there.\n")
        deadline = self._requests.deadline()
        for _ in range(2):
            try:
                self._requests.ask(
                    "probe", key, deadline, lambda t: self._store.create(path, [content], t)
                )
            except Refused as refused:
                if refused.kind is Kind.TAKEN:
                    return True
                error = self._requests.error(refused, "take a probe", key, deadline)
            else:
                continue
            raise error
        return False

    def _refuse_taken(self, key: str, path: str, deadline: Deadline) -> None:
        """Before gigabytes are sent for nothing. The store refuses again when they are shown."""
        try:
            self._requests.ask("look up", key, deadline, lambda t: self._store.head(path, t))
        except Refused as refused:
            if refused.kind is Kind.MISSING:
                return
            error = self._requests.error(refused, "look up", key, deadline)
        else:
            error = self._taken(key)
        raise error

    def _taken(self, key: str) -> TierError:
        return AlreadyExists(f"{key} is there already", tier=self.name, key=key)

    def _create(self, key: str, path: str, source: Source, deadline: Deadline) -> None:
        """One request. What is there after a lost answer is ours if it has our bytes."""
        size_bytes = source.size_bytes
        view = memoryview(b"")
        if size_bytes <= self._part_bytes and size_bytes:
            view = asked(source, 0, size_bytes)
        unsure = False

        def hear(refused: Refused) -> None:
            nonlocal unsure
            unsure = unsure or refused.kind is not Kind.THROTTLED

        def create(timeout_s: float) -> None:
            blocks = [view] if size_bytes == len(view) else _blocks(source, self._part_bytes)
            self._store.create(path, blocks, timeout_s)

        if self._store.can_create is False:
            self._refuse_taken(key, path, deadline)
        try:
            self._requests.ask("store", key, deadline, create, size_bytes=size_bytes, again=hear)
        except SourceFailed as failed:
            raise failed.error from None
        except Refused as refused:
            if refused.kind is Kind.TAKEN:
                if unsure and self._has(key, path, view, deadline):
                    return
                error = self._taken(key)
            else:
                error = self._requests.error(refused, "store the object", key, deadline)
        else:
            return
        raise error

    def _has(self, key: str, path: str, view: memoryview, deadline: Deadline) -> bool:
        out = memoryview(bytearray(len(view)))
        with contextlib.suppress(ShortRead):
            size_bytes = self._requests.make(
                "look up", key, deadline, lambda t: self._store.head(path, t)
            ).size_bytes
            if size_bytes != len(view):
                return False
            if size_bytes:
                self._read(key, path, out, 0, deadline)
            return out == view
        return False

    def _read(self, key: str, path: str, out: memoryview, offset: int, deadline: Deadline) -> None:
        """One range, whole. Fewer bytes than the object has there are no answer."""

        def fetch(timeout_s: float) -> int:
            got = self._store.fetch(path, out, offset, timeout_s)
            if got == len(out):
                return got
            size_bytes = self._store.head(path, timeout_s).size_bytes
            if offset + len(out) <= size_bytes:
                raise Refused(Kind.CORRUPTED, f"{got} bytes for a range of {len(out)}")
            return max(0, size_bytes - offset)

        try:
            got = self._requests.ask("read", key, deadline, fetch, size_bytes=len(out))
        except Refused as refused:
            if refused.kind is not Kind.RANGE:
                error = self._requests.error(refused, "give the object", key, deadline)
            else:
                error = self._short(key, offset, len(out), self._left(key, path, offset, deadline))
        else:
            if got == len(out):
                return
            error = self._short(key, offset, len(out), got)
        raise error

    def _left(self, key: str, path: str, offset: int, deadline: Deadline) -> int:
        stored = self._requests.make("look up", key, deadline, lambda t: self._store.head(path, t))
        return max(0, stored.size_bytes - offset)

    def _short(self, key: str, offset: int, wanted_bytes: int, got_bytes: int) -> TierError:
        return ShortRead(
            f"{key} ends early",
            tier=self.name,
            key=key,
            offset=offset,
            wanted_bytes=wanted_bytes,
            got_bytes=min(got_bytes, wanted_bytes - 1),
        )

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        # All pages before the first entry: not every store lists in the order of whole keys.
        found: dict[str, int] = {}
        token: str | None = None
        while True:
            entries, token = self._page(prefix, token)
            for entry in entries:
                key = entry.path[len(self._root) + 1 :]
                if key.startswith(prefix) and _is_key(key):
                    found[key] = entry.size_bytes
            if token is None:
                break
        for key in sorted(found):
            yield ObjectInfo(key, found[key])

    def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        start = f"{self._root}/{prefix}"
        deadline = self._requests.deadline()
        return self._requests.make(
            "list", prefix or None, deadline, lambda t: self._store.page(start, token, t)
        )


def _blocks(source: Source, block_bytes: int) -> Iterator[memoryview]:
    for start in range(0, source.size_bytes, block_bytes):
        try:
            block = asked(source, start, min(block_bytes, source.size_bytes - start))
        except BaseException as error:
            raise SourceFailed(error) from error
        yield block


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except UsageError:
        return False
    return True
