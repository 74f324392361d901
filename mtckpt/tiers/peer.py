"""A tier on another node, read through its agent: RAM or a local disk of that node.

Knows ranges, streams and how to go on where a connection broke. It cannot be written to: a copy is
made by the node that gets it, which reads. Digests are the reader's; so is trying again when the
peer did not answer at all.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mtckpt import _handshake
from mtckpt.errors import (
    AccessDenied,
    AgentUnavailable,
    FormatError,
    ObjectNotFound,
    ShortRead,
    TierError,
    TierReadOnly,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers._peer_http import (
    MIN_BYTES_PER_S,
    PeerConnection,
    read_small,
    refusal_text,
)
from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Survives, check_key

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress

__all__ = ["MAX_RANGE_BYTES", "Listing", "PeerTier", "Stat"]

# One request's: the server holds a lease on the shard while it answers.
MAX_RANGE_BYTES = 32 * 1024 * 1024
MAX_LISTED = 5000
MAX_LISTING_BYTES = MAX_LISTED * 600
MAX_IDLE = 8
# Connections that break one after the other, each before a piece of what was asked for came.
MAX_BREAKS = 3
_PIECE_BYTES = 4 * 1024 * 1024
_T = TypeVar("_T")


class Listing(msgspec.Struct, frozen=True):
    """Keys and sizes in order; ``more``: ask again, after the last key."""

    objects: list[tuple[str, int]]
    more: bool = False


class Stat(msgspec.Struct, frozen=True):
    size_bytes: int


class PeerTier:
    """One place of one run on another node; any number of threads may read at a time.

    Args:
        address: where that node's agent listens.
        run_key: the run that both nodes are of.
        reads: the only run that can be read; that one, if not given.
        secret: what the nodes of the run share.
        place: the label of the peer's tier: "ram", "disk", ...
        timeout_s: how long the peer may be silent. A call may take that long for each 32 MiB that
            are asked for, and the time that its bytes need at 1 MiB/s; what comes slower is ended.
    """

    def __init__(
        self,
        address: PeerAddress,
        run_key: str,
        secret: bytes,
        *,
        place: str = "ram",
        reads: str = "",
        timeout_s: float = 10.0,
    ) -> None:
        self.name = "peers"
        self.survives = Survives.PROCESS | Survives.NODE
        self.address = address
        self.place = place
        self._run_key = check_key(run_key)
        self._reads = check_key(reads or run_key)
        self._secret = secret
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[PeerConnection] = []
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        return f"PeerTier({str(self.address)!r}, {self._run_key!r}, place={self.place!r})"

    # -- the protocol ----------------------------------------------------------------------------

    def put(self, key: str, source: Source) -> PutResult:
        """Refused: copies are made by whoever gets them."""
        raise self._read_only(key)

    def delete(self, key: str) -> None:
        """Refused: its own agent deletes."""
        raise self._read_only(key)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Fill ``out``; see ``Tier.read_into``. A stream that breaks is gone on with."""
        view = memoryview(out).cast("B")
        if view.readonly or offset < 0:
            raise UsageError(f"cannot read {key} into that", readonly=view.readonly, offset=offset)
        check_key(key)
        if not len(view):
            if offset > (size_bytes := self.stat(key).size_bytes):
                raise self._short(key, offset, 0, size_bytes - offset)
            return
        for first in range(0, len(view), MAX_RANGE_BYTES):
            self._read_whole(key, view[first : first + MAX_RANGE_BYTES], offset + first)

    def stat(self, key: str) -> ObjectInfo:
        """Size of the object; see ``Tier.stat``."""
        check_key(key)
        stat = self._small(f"/v1/stat/{self.place}/{key}", Stat, key, _handshake.MAX_SMALL_BYTES)
        return ObjectInfo(key, stat.size_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects of the run in order; see ``Tier.list``."""
        own = f"{self._reads}/"
        if not prefix.startswith(own):
            if not own.startswith(prefix):
                return iter(())
            prefix = own
        return self._list(prefix, self._page(prefix, ""))

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # -- inside ----------------------------------------------------------------------------------

    def _list(self, prefix: str, page: Listing) -> Iterator[ObjectInfo]:
        last = ""
        while True:
            for key, size_bytes in page.objects:
                if key <= last or not key.startswith(prefix):
                    raise self._unavailable("lists what was not asked for", None)
                last = key
                yield ObjectInfo(check_key(key), size_bytes)
            if not page.more or not page.objects:
                return
            page = self._page(prefix, last)

    def _page(self, prefix: str, after: str) -> Listing:
        path = f"/v1/list/{self.place}/{prefix}?after={after}"
        return self._small(path, Listing, None, MAX_LISTING_BYTES)

    def _small(self, path: str, type_: type[_T], key: str | None, max_bytes: int) -> _T:
        with self._connection(key, self._deadline_s(0)) as connection:
            response = connection.ask("GET", path)
            data = read_small(connection, response, max_bytes)
            self._check(response, data, key)
            try:
                return msgspec.json.decode(data, type=type_)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise http.client.HTTPException(f"answer does not parse: {error}") from error

    def _read_whole(self, key: str, view: memoryview, offset: int) -> None:
        """Fill ``view``, which is no more than one range, over as many connections as it takes."""
        deadline_s = self._deadline_s(len(view))
        done_bytes = breaks = 0
        while done_bytes < len(view):
            goes_on = breaks < MAX_BREAKS
            rest = view[done_bytes:]
            got_bytes = self._read_range(key, rest, offset + done_bytes, deadline_s, goes_on)
            breaks = 0 if got_bytes else breaks + 1
            done_bytes += got_bytes

    def _read_range(
        self, key: str, view: memoryview, offset: int, deadline_s: float, goes_on: bool
    ) -> int:
        """The bytes that came: all of ``view``, or what came before the connection broke. That may
        be nothing, if it ``goes_on``."""
        path = f"/v1/objects/{self.place}/{key}"
        headers = {"Range": f"bytes={offset}-{offset + len(view) - 1}"}
        got_bytes, began_s = 0, time.monotonic()
        with self._connection(key, deadline_s) as connection:
            response = connection.ask("GET", path, headers=headers)
            if response.status != 206:
                data = read_small(connection, response, _handshake.MAX_SMALL_BYTES)
                if response.status == 416:
                    raise self._short(key, offset, len(view), 0)
                self._check(response, data, key)
                raise http.client.HTTPException(f"status {response.status} for a range")
            _check_range(response, offset)
            if response.length is None or response.length > len(view):
                raise http.client.HTTPException("answer has another length")
            if response.length < len(view):
                connection.close()
                raise self._short(key, offset, len(view), response.length)
            try:
                while got_bytes < len(view):
                    piece = view[got_bytes : got_bytes + _PIECE_BYTES]
                    if not (size_bytes := response.readinto(piece)):
                        raise http.client.IncompleteRead(b"", len(view) - got_bytes)
                    got_bytes += size_bytes
            except (OSError, http.client.HTTPException) as error:
                now_s = time.monotonic()
                if isinstance(error, TimeoutError):
                    # Who sends a little and then nothing would be gone on with for ever.
                    may_go_on = got_bytes >= MIN_BYTES_PER_S * (now_s - began_s)
                else:
                    may_go_on = bool(got_bytes) or goes_on
                if not may_go_on or now_s >= deadline_s:
                    raise
                connection.close()  # gone on with by the next request, on another connection
            response.close()
        return got_bytes

    @contextlib.contextmanager
    def _connection(self, key: str | None, deadline_s: float) -> Iterator[PeerConnection]:
        """A proved connection, kept if the block left it usable; errors become the tier's."""
        connection: PeerConnection | None = None
        try:
            connection = self._open(key, deadline_s)
            yield connection
        except TierError:
            raise  # an answer, read whole: the connection is as good as before
        except (OSError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            why = "did not answer in time" if isinstance(error, TimeoutError) else f"{error!r}"
            raise self._unavailable(why, key) from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        finally:
            if connection is not None:
                self._give_back(connection)

    def _open(self, key: str | None, deadline_s: float) -> PeerConnection:
        connection = self._take()
        if connection is None:
            connection = PeerConnection(self.address, "data", self._run_key, self._secret)
            connection.silence_s = self._timeout_s
            try:
                connection.open(deadline_s)
            except AccessDenied as error:
                raise self._refused(error, key) from error
            except (AgentUnavailable, FormatError) as error:
                raise self._unavailable(error.what, key) from error
        connection.deadline_s = deadline_s
        return connection

    def _take(self) -> PeerConnection | None:
        """A connection that was used before, if there is one that the peer has not closed."""
        while True:
            with self._lock:
                if self._closed:
                    raise UsageError(f"the tier on {self.address} is closed", tier=self.name)
                if self._pid != os.getpid():  # a fork: they are the parent's conversation
                    self._idle, self._pid = [], os.getpid()
                connection = self._idle.pop() if self._idle else None
            if connection is None or not connection.is_stale():
                return connection
            connection.close()

    def _give_back(self, connection: PeerConnection) -> None:
        with self._lock:
            if connection.sock is not None and not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _check(self, response: http.client.HTTPResponse, data: bytes, key: str | None) -> None:
        """Raise what an answer that is no success means."""
        if response.status in (200, 206):
            return
        what = f"{self.address}: {refusal_text(data)}"
        if response.status == 404:
            raise ObjectNotFound(what, tier=self.name, key=key, place=self.place)
        if response.status == 403:
            raise AccessDenied(what, tier=self.name, key=key, place=self.place)
        raise self._unavailable(f"answers {response.status}: {what}", key)

    def _deadline_s(self, size_bytes: int) -> float:
        return time.monotonic() + self._timeout_s + size_bytes / MIN_BYTES_PER_S

    def _unavailable(self, why: str, key: str | None) -> TierUnavailable:
        return TierUnavailable(
            f"the agent of {self.address}: {why}",
            actions=["see whether that node is up, and its agent: mtckpt status"],
            tier=self.name,
            key=key,
            place=self.place,
            port=self.address.data_port,
        )

    def _refused(self, error: AccessDenied, key: str | None) -> TierError:
        return AccessDenied(
            f"{self.address}: {error.what}",
            state="nothing was read",
            actions=["every rank of a job has to open the run in the same start of it"],
            tier=self.name,
            key=key,
            port=self.address.data_port,
        )

    def _read_only(self, key: str) -> TierReadOnly:
        return TierReadOnly(
            f"{self.address} is only read from here",
            state="nothing was changed",
            tier=self.name,
            key=key,
        )

    def _short(self, key: str, offset: int, wanted_bytes: int, got_bytes: int) -> ShortRead:
        return ShortRead(
            f"{key} ends early at {self.address}",
            tier=self.name,
            key=key,
            offset=offset,
            wanted_bytes=wanted_bytes,
            got_bytes=got_bytes,
        )


def _check_range(response: http.client.HTTPResponse, offset: int) -> None:
    """Bytes of another place in the object must not land here: only what was asked for."""
    if not (response.getheader("Content-Range") or "").startswith(f"bytes {offset}-"):
        raise http.client.HTTPException("answer is of another range")
