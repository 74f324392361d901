"""S3 as a store: the requests, in the names that botocore gives them, and what their answers mean.

It knows S3's operations, its error codes and its checksums. It does not know how a request reaches
the server: a ``Wire`` carries it, that of s3fs or the fast one, and both give the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from mtckpt.tiers._checksums import Crc
from mtckpt.tiers._store import (
    Entry,
    Kind,
    Refused,
    SentPart,
    Stored,
    Upload,
    kind_of_status,
    now_there_s,
    redacted,
)

__all__ = ["S3Store", "Wire", "refused_by_s3"]

PROTOCOLS = ("s3", "s3a")
MIB = 1 << 20
_OF_A_LISTING = {"Name", "KeyCount", "IsTruncated", "Contents"}

_BY_CODE: Mapping[str, Kind] = {
    "AccessDenied": Kind.DENIED,
    "InvalidAccessKeyId": Kind.DENIED,
    "SignatureDoesNotMatch": Kind.DENIED,
    "AuthorizationHeaderMalformed": Kind.DENIED,
    "AllAccessDisabled": Kind.DENIED,
    "AccountProblem": Kind.DENIED,
    "RequestTimeTooSkewed": Kind.SKEWED,
    "ExpiredToken": Kind.EXPIRED,
    "ExpiredTokenException": Kind.EXPIRED,
    "TokenRefreshRequired": Kind.EXPIRED,
    "InvalidToken": Kind.EXPIRED,
    "SlowDown": Kind.THROTTLED,
    "ServiceUnavailable": Kind.THROTTLED,
    "TooManyRequests": Kind.THROTTLED,
    "RequestLimitExceeded": Kind.THROTTLED,
    "Throttling": Kind.THROTTLED,
    "NoSuchKey": Kind.MISSING,
    "NoSuchBucket": Kind.NO_BUCKET,
    "NoSuchUpload": Kind.NO_UPLOAD,
    "InvalidPart": Kind.NO_UPLOAD,
    "InvalidPartOrder": Kind.NO_UPLOAD,
    "EntityTooSmall": Kind.REFUSED,
    "PreconditionFailed": Kind.TAKEN,
    "ConditionalRequestConflict": Kind.UNREACHABLE,
    "OperationAborted": Kind.UNREACHABLE,
    "InvalidRange": Kind.RANGE,
    "BadDigest": Kind.CORRUPTED,
    "InvalidDigest": Kind.CORRUPTED,
    "XAmzContentChecksumMismatch": Kind.CORRUPTED,
    "XAmzContentSHA256Mismatch": Kind.CORRUPTED,
    "IncompleteBody": Kind.UNREACHABLE,
    "RequestTimeout": Kind.UNREACHABLE,
    "InternalError": Kind.UNREACHABLE,
    "QuotaExceeded": Kind.FULL,
    "XMinioStorageFull": Kind.FULL,
    "InsufficientStorage": Kind.FULL,
}


def refused_by_s3(status: int, code: str, message: str, secrets: Iterable[str] = ()) -> Refused:
    """An error answer of S3 as one of ours; codes say more than the status does."""
    kind = _BY_CODE.get(code) or kind_of_status(status)
    if status == 403 and code in ("", "403", "Forbidden"):
        kind = Kind.DENIED
    said = f"{status} {code}" + (f": {message}" if message and message != code else "")
    return Refused(kind, redacted(said, secrets), status=status)


class Wire(Protocol):
    """Carries operations of S3. Raises ``Refused`` for every answer that is no success."""

    @property
    def endpoint(self) -> str: ...
    def call(self, operation: str, timeout_s: float, **params: Any) -> Mapping[str, Any]: ...
    def send(
        self, operation: str, view: memoryview, timeout_s: float, **params: Any
    ) -> Mapping[str, Any]: ...
    def fetch(
        self, bucket: str, name: str, out: memoryview, offset: int, timeout_s: float
    ) -> int: ...
    def renew(self) -> bool: ...
    def secrets(self) -> Iterable[str]: ...
    def close(self) -> None: ...


class S3Store:
    """One bucket. See ``Store`` and ``PartStore``."""

    min_part_bytes = 5 * MIB
    max_parts = 10_000
    max_keys = 1000
    can_create: bool | None = None

    def __init__(self, wire: Wire, place: str) -> None:
        self._wire = wire
        self.place = place
        self._crc = Crc()
        self._field = f"Checksum{self._crc.algorithm}"
        self.parts = self

    # -- objects ---------------------------------------------------------------------------------

    def create(self, path: str, blocks: Iterable[memoryview], timeout_s: float) -> None:
        (view,) = blocks
        checksum = self._crc.of(view)
        answer = self._wire.send(
            "put_object",
            view,
            timeout_s,
            **_at(path),
            IfNoneMatch="*",
            **{self._field: checksum},
        )
        kept = answer.get(self._field)
        if kept is None and self.head(path, timeout_s).size_bytes != len(view):
            raise Refused(Kind.CORRUPTED, "another size than was sent")
        if kept is not None and kept != checksum:
            raise Refused(Kind.CORRUPTED, f"checksum {kept} of what was sent as {checksum}")

    def fetch(self, path: str, out: memoryview, offset: int, timeout_s: float) -> int:
        bucket, _, name = path.partition("/")
        return self._wire.fetch(bucket, name, out, offset, timeout_s)

    def head(self, path: str, timeout_s: float) -> Stored:
        try:
            answer = self._wire.call("head_object", timeout_s, **_at(path), ChecksumMode="ENABLED")
        except Refused as refused:
            if refused.status in (400, 403):
                # No body, so no code: whether credentials expired, say, a GET tells.
                self.fetch(path, memoryview(bytearray(1)), 0, timeout_s)
            raise
        return Stored(int(answer["ContentLength"]), answer.get(self._field))

    def page(
        self, prefix: str, token: str | None, timeout_s: float
    ) -> tuple[list[Entry], str | None]:
        bucket, _, start = prefix.partition("/")
        more = {"ContinuationToken": token} if token else {}
        answer = self._wire.call(
            "list_objects_v2", timeout_s, Bucket=bucket, Prefix=start, MaxKeys=self.max_keys, **more
        )
        follows = answer.get("NextContinuationToken") if answer.get("IsTruncated") else None
        if not answer.keys() & _OF_A_LISTING or (answer.get("IsTruncated") and not follows):
            raise Refused(Kind.UNREACHABLE, "200, but it is no store's listing, or not all of one")
        entries = [
            Entry(f"{bucket}/{one['Key']}", int(one["Size"])) for one in answer.get("Contents", ())
        ]
        return entries, follows

    def delete(self, path: str, timeout_s: float) -> None:
        self._wire.call("delete_object", timeout_s, **_at(path))

    @property
    def completes_atomically(self) -> bool:
        # Amazon says so. Of two that completed one key at once SeaweedFS 4.48 let both win, now and
        # then, though its single puts are atomic; what other servers do is not known.
        return ".amazonaws.com" in self._wire.endpoint

    # -- parts -----------------------------------------------------------------------------------

    def checksum_of(self, view: memoryview) -> str:
        return self._crc.of(view)

    def checksum_of_parts(self, parts: list[SentPart]) -> str | None:
        checksums = [part.checksum for part in parts]
        known = [checksum for checksum in checksums if checksum is not None]
        return self._crc.of_digests(known) if len(known) == len(parts) else None

    def find(self, path: str, timeout_s: float) -> list[Upload]:
        return [upload for upload in self._uploads(path, timeout_s) if upload.path == path]

    def unfinished(self, directory: str, timeout_s: float) -> Iterable[Upload]:
        return self._uploads(directory, timeout_s)

    def _uploads(self, path: str, timeout_s: float) -> list[Upload]:
        bucket, _, prefix = path.partition("/")
        found: list[Upload] = []
        more: dict[str, Any] = {}
        while True:
            answer = self._wire.call(
                "list_multipart_uploads", timeout_s, Bucket=bucket, Prefix=prefix, **more
            )
            found += _aged(bucket, answer)
            if not answer.get("IsTruncated"):
                return found
            more = {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer["NextUploadIdMarker"],
            }

    def begin(self, path: str, timeout_s: float) -> Upload:
        answer = self._wire.call(
            "create_multipart_upload",
            timeout_s,
            **_at(path),
            ChecksumAlgorithm=self._crc.algorithm,
        )
        return Upload(path, answer["UploadId"])

    def has_bytes(self, part: SentPart, view: memoryview, checksum: str) -> bool:
        if part.checksum is not None:
            return part.checksum == checksum
        # Not every store lists checksums; the tag of a part is its MD5 unless it is encrypted.
        md5 = hashlib.md5(view, usedforsecurity=False).hexdigest()
        return part.tag.strip('"') == md5

    def sent(self, upload: Upload, timeout_s: float) -> list[SentPart]:
        found: list[SentPart] = []
        more: dict[str, Any] = {}
        while True:
            answer = self._wire.call("list_parts", timeout_s, **_in(upload), **more)
            found += [
                SentPart(one["PartNumber"], one["Size"], one["ETag"], one.get(self._field))
                for one in answer.get("Parts", ())
            ]
            if not answer.get("IsTruncated"):
                return found
            more = {"PartNumberMarker": answer["NextPartNumberMarker"]}

    def send(
        self, upload: Upload, number: int, view: memoryview, checksum: str, timeout_s: float
    ) -> SentPart:
        answer = self._wire.send(
            "upload_part",
            view,
            timeout_s,
            **_in(upload),
            PartNumber=number,
            **{self._field: checksum},
        )
        kept = answer.get(self._field)
        if kept is not None and kept != checksum:
            raise Refused(Kind.CORRUPTED, f"checksum {kept} of a part sent as {checksum}")
        return SentPart(number, len(view), answer["ETag"], checksum)

    def copy(
        self, upload: Upload, number: int, path: str, start: int, stop: int, timeout_s: float
    ) -> SentPart:
        answer = self._wire.call(
            "upload_part_copy",
            timeout_s,
            **_in(upload),
            PartNumber=number,
            CopySource=path,
            CopySourceRange=f"bytes={start}-{stop - 1}",
        )
        result = answer["CopyPartResult"]
        return SentPart(number, stop - start, result["ETag"], result.get(self._field))

    def complete(self, upload: Upload, parts: list[SentPart], timeout_s: float) -> Stored:
        listed = []
        for part in parts:
            entry = {"PartNumber": part.number, "ETag": part.tag}
            if part.checksum is not None:
                entry[self._field] = part.checksum
            listed.append(entry)
        answer = self._wire.call(
            "complete_multipart_upload",
            timeout_s,
            **_in(upload),
            MultipartUpload={"Parts": listed},
            IfNoneMatch="*",
        )
        if answer.get("Error"):
            # S3 may answer 200 at once, and say only in the body that it went wrong.
            said = answer["Error"]
            raise refused_by_s3(500, said.get("Code", ""), said.get("Message", ""))
        return Stored(sum(part.size_bytes for part in parts), answer.get(self._field))

    def abort(self, upload: Upload, timeout_s: float) -> None:
        try:
            self._wire.call("abort_multipart_upload", timeout_s, **_in(upload))
        except Refused as refused:
            if refused.kind not in (Kind.NO_UPLOAD, Kind.MISSING):
                raise

    # -- credentials -----------------------------------------------------------------------------

    def renew(self) -> bool:
        return self._wire.renew()

    def secrets(self) -> Iterable[str]:
        return self._wire.secrets()

    def close(self) -> None:
        self._wire.close()


def _at(path: str) -> dict[str, str]:
    bucket, _, name = path.partition("/")
    return {"Bucket": bucket, "Key": name}


def _aged(bucket: str, answer: Mapping[str, Any]) -> list[Upload]:
    """The uploads of a listing; one of which nobody says when it began is as old as nothing."""
    uploads = answer.get("Uploads", ())
    began_s = [one["Initiated"].timestamp() if one.get("Initiated") else None for one in uploads]
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    now_s = now_there_s(date, [at_s for at_s in began_s if at_s is not None])
    return [
        Upload(f"{bucket}/{one['Key']}", one["UploadId"], 0.0 if at_s is None else now_s - at_s)
        for one, at_s in zip(uploads, began_s, strict=True)
    ]


def _in(upload: Upload) -> dict[str, str]:
    return {**_at(upload.path), "UploadId": upload.id}
