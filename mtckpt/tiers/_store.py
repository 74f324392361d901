"""What the object-store tier asks of a store: one request at a time, and how requests fail.

It knows paths, bytes and what kind of answer a failure is; a table says which error of ours each
kind becomes. It does not know keys, retries or waiting: whoever implements ``Store`` makes one
request a call, within the time that it is given, and the tier above decides what is done next.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    ObjectNotFound,
    TierError,
    TierFull,
    TierUnavailable,
)

__all__ = [
    "Entry",
    "Kind",
    "PartStore",
    "Refused",
    "SentPart",
    "SourceFailed",
    "Store",
    "StoreSaid",
    "Stored",
    "Upload",
    "error_of",
    "kind_of_status",
    "now_there_s",
    "redacted",
]


class Kind(enum.Enum):
    """What an answer that is no success means."""

    MISSING = "the object is not there"
    TAKEN = "the key is taken"
    RANGE = "the object ends before the range begins"
    NO_BUCKET = "there is no such bucket"
    DENIED = "the store refuses this identity"
    EXPIRED = "the credentials have expired"
    SKEWED = "the clock of this machine is too far from the store's"
    THROTTLED = "the store asks for fewer requests"
    UNREACHABLE = "no answer, or one that says to try again: it may have been carried out"
    CORRUPTED = "the store received or returned other bytes"
    NO_UPLOAD = "the multipart upload or one of its parts is gone"
    FULL = "a quota is used up"
    REFUSED = "the store refuses the request as it is"


class Refused(Exception):
    """One request did not succeed. ``said`` is what the store said, without anything secret."""

    def __init__(self, kind: Kind, said: str, *, status: int | None = None) -> None:
        self.kind = kind
        self.said = said
        self.status = status
        super().__init__(said)


class SourceFailed(BaseException):
    """The source raised while a store read its blocks: ``error`` goes to the caller as it is, past
    whatever looks for failures of the store."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(str(error))


class StoreSaid(Exception):
    """What the store or its client said, redacted: the cause of an error of ours."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as the store describes it. ``checksum`` is in the store's own form, or none."""

    size_bytes: int
    checksum: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that is not completed. ``age_s`` by the store's clock."""

    path: str
    id: str
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the store has. ``checksum`` as of the store; none where it does not say."""

    number: int
    size_bytes: int
    tag: str
    checksum: str | None = None


class PartStore(Protocol):
    """Large objects, part by part: nothing is seen before ``complete``, which never replaces.

    ``completes_atomically``: not even where two complete at the same moment.
    """

    @property
    def min_part_bytes(self) -> int: ...
    @property
    def max_parts(self) -> int: ...
    @property
    def completes_atomically(self) -> bool: ...

    def checksum_of(self, view: memoryview) -> str: ...
    def find(self, path: str, timeout_s: float) -> list[Upload]: ...
    def begin(self, path: str, timeout_s: float) -> Upload: ...
    def has_bytes(self, part: SentPart, view: memoryview, checksum: str) -> bool: ...
    def sent(self, upload: Upload, timeout_s: float) -> list[SentPart]: ...
    def send(
        self, upload: Upload, number: int, view: memoryview, checksum: str, timeout_s: float
    ) -> SentPart: ...
    def copy(
        self, upload: Upload, number: int, path: str, start: int, stop: int, timeout_s: float
    ) -> SentPart: ...
    def complete(self, upload: Upload, parts: list[SentPart], timeout_s: float) -> Stored: ...
    def abort(self, upload: Upload, timeout_s: float) -> None: ...
    def unfinished(self, directory: str, timeout_s: float) -> Iterable[Upload]: ...
    def checksum_of_parts(self, parts: list[SentPart]) -> str | None: ...


class Store(Protocol):
    """One request a call. Each raises ``Refused``, and nothing else for what a store can do.

    ``create`` gets one view, except where ``parts`` is None: there a large object comes in several,
    each good until the next.
    """

    place: str
    can_create: bool | None
    """Whether ``create`` is refused by the store itself where the key is taken; None: probe it."""

    @property
    def parts(self) -> PartStore | None: ...

    def create(self, path: str, blocks: Iterable[memoryview], timeout_s: float) -> None: ...
    def fetch(self, path: str, out: memoryview, offset: int, timeout_s: float) -> int: ...
    def head(self, path: str, timeout_s: float) -> Stored: ...
    def page(
        self, prefix: str, token: str | None, timeout_s: float
    ) -> tuple[list[Entry], str | None]: ...
    def delete(self, path: str, timeout_s: float) -> None: ...
    def renew(self) -> bool: ...
    def secrets(self) -> Iterable[str]: ...
    def close(self) -> None: ...


_BY_STATUS: Mapping[int, Kind] = {
    401: Kind.EXPIRED,
    403: Kind.DENIED,
    404: Kind.MISSING,
    408: Kind.UNREACHABLE,
    409: Kind.UNREACHABLE,
    412: Kind.TAKEN,
    416: Kind.RANGE,
    429: Kind.THROTTLED,
    503: Kind.THROTTLED,
}


def kind_of_status(status: int) -> Kind:
    """What an HTTP status means where the answer says nothing more precise."""
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return Kind.UNREACHABLE if status >= 500 else Kind.REFUSED


_NOTHING_STORED = "nothing was stored, and what the tier held before is unchanged"

_ERRORS: Mapping[Kind, tuple[type[TierError], str, tuple[str, ...]]] = {
    Kind.MISSING: (ObjectNotFound, "", ()),
    Kind.TAKEN: (AlreadyExists, "", ()),
    Kind.RANGE: (TierError, "", ()),
    Kind.NO_BUCKET: (TierUnavailable, "", ("create the bucket, or correct the URL of the tier",)),
    Kind.DENIED: (
        AccessDenied,
        "",
        ("check which identity is used, and that it may read, write, list and delete there",),
    ),
    Kind.EXPIRED: (
        AccessDenied,
        "",
        ("renew the credentials where your store's tools keep them: they are read again",),
    ),
    Kind.SKEWED: (
        AccessDenied,
        "",
        ("set the clock of this machine, by NTP best: requests are signed with the time",),
    ),
    Kind.THROTTLED: (TierUnavailable, "", ("save less often there, or ask for a higher limit",)),
    Kind.UNREACHABLE: (
        TierUnavailable,
        "",
        ("check the endpoint and the network: the store must be reachable from this machine",),
    ),
    Kind.CORRUPTED: (TierUnavailable, "", ("look at memory and network of this machine",)),
    Kind.NO_UPLOAD: (TierUnavailable, _NOTHING_STORED, ("try again: it is begun anew",)),
    Kind.FULL: (TierFull, _NOTHING_STORED, ("raise the quota, or keep fewer steps there",)),
    Kind.REFUSED: (TierError, "", ("see what the store said, below",)),
}


def error_of(
    refused: Refused, what: str, *, tier: str, key: str | None, **details: object
) -> TierError:
    """The error of ours for an answer; its cause is what the store said."""
    kind, state, actions = _ERRORS[refused.kind]
    error = kind(what, state=state, actions=actions, tier=tier, key=key, **details)
    error.__cause__ = StoreSaid(refused.said)
    return error


def now_there_s(date: str | None, stamps_s: Iterable[float]) -> float:
    """What time it is by a store's clock, in seconds since 1970: as the ``Date`` of an answer says;
    where none does, not before the newest of the ``stamps_s`` in it. No clock of this machine is
    asked: one that is ahead would make an upload in flight an old one."""
    from email.utils import parsedate_to_datetime  # Here, since it costs milliseconds.

    try:
        return parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return max(stamps_s, default=0.0)


_HIDDEN = "<hidden>"
# What carries or names a credential in the texts of clients and servers, whoever wrote them.
_TELLING = re.compile(
    r"""(?ix)
    (?P<name> (?: authorization | x-amz-security-token | x-amz-credential | x-amz-signature
      | x-goog-signature | x-goog-credential | awsaccesskeyid | googleaccessid | signature
      | access_?token | refresh_?token | secret(?:_?access)?_?key | session_?token | sig | password
      | stringtosign | signatureprovided | canonicalrequest
      )["']? \s* (?: [=:>] | %3d ) \s* ["']? )
    (?: bearer \s+ | AWS4-HMAC-SHA256 \s+ )?
    [^\s&"'<>,;)]+ (?: , \s* (?:SignedHeaders|Signature)=[^\s&"'<>]+ )*
    """
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_BEARER = re.compile(r"(?i)(bearer\s+)[\w.~+/=-]{8,}")
MAX_SAID = 500


def redacted(text: object, secrets: Iterable[str] = ()) -> str:
    """A text of a client or server without credentials, and not longer than a few lines."""
    said = str(text)
    for secret in secrets:
        if len(secret) >= 4:
            said = said.replace(secret, _HIDDEN)
    said = _TELLING.sub(lambda match: match["name"] + _HIDDEN, said)
    said = _BEARER.sub(rf"\1{_HIDDEN}", said)
    said = _USER_INFO.sub(f"{_HIDDEN}@", said)
    said = " ".join(said.split())
    return said if len(said) <= MAX_SAID else said[:MAX_SAID] + " ..."
