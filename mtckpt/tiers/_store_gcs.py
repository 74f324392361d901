"""Google Cloud Storage as a store: its JSON API, asked on plain sockets; gcsfs says who we are.

It knows GCS's requests, generations and compositions. It does not know keys. A large object is
composed from part objects: sent in parallel, each whole or not there, kept for a later attempt, and
made one object by a request that never replaces. They lie below ``.parts/``, which is no key.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

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
from mtckpt.tiers._store_http import Answer, Http, got_from

__all__ = ["GcsStore"]

MIB = 1 << 20
PARTS = ".parts"
MAX_COMPONENTS = 32
_THROTTLED = ("rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded")


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    size_bytes: int
    checksum: str | None
    generation: str
    age_s: float


class GcsStore:
    """One bucket, with the identity and endpoint of a gcsfs file system. See ``Store``."""

    min_part_bytes = 1
    max_parts = MAX_COMPONENTS**2
    can_create: bool | None = True  # ifGenerationMatch is older than anything that lacks it

    def __init__(self, fs: Any, place: str, root: str, *, stall_s: float) -> None:
        self._fs = fs
        self.place = place
        self._root = root.partition("/")[2]
        self._crc = Crc(must_be_c=True)
        self._http = Http(stall_s=stall_s)
        self.parts = self

    # -- objects ---------------------------------------------------------------------------------

    def create(self, path: str, blocks: Iterable[memoryview], timeout_s: float) -> None:
        (view,) = blocks
        checksum = self._crc.of(view)
        self._upload(path, view, checksum, timeout_s, ifGenerationMatch="0")

    def fetch(self, path: str, out: memoryview, offset: int, timeout_s: float) -> int:
        headers = {"Range": f"bytes={offset}-{offset + len(out) - 1}"}
        answer = self._ask("GET", _object(path), timeout_s, {"alt": "media"}, headers, out=out)
        return got_from(answer, offset)

    def head(self, path: str, timeout_s: float) -> Stored:
        found = self._json("GET", _object(path), timeout_s, {"fields": "size,crc32c"})
        return Stored(int(found["size"]), found.get("crc32c"))

    def page(
        self, prefix: str, token: str | None, timeout_s: float
    ) -> tuple[list[Entry], str | None]:
        bucket, _, start = prefix.partition("/")
        query = {"prefix": start, "fields": "items(name,size),nextPageToken"}
        if token:
            query["pageToken"] = token
        answer = self._json("GET", f"/storage/v1/b/{bucket}/o", timeout_s, query)
        entries = [
            Entry(f"{bucket}/{one['name']}", int(one["size"])) for one in answer.get("items", ())
        ]
        return entries, answer.get("nextPageToken") or None

    def delete(self, path: str, timeout_s: float) -> None:
        self._ask("DELETE", _object(path), timeout_s)

    # -- parts -----------------------------------------------------------------------------------

    def checksum_of(self, view: memoryview) -> str:
        return self._crc.of(view)

    def checksum_of_parts(self, parts: list[SentPart]) -> str | None:
        return self._crc.of_joined((part.checksum or "", part.size_bytes) for part in parts)

    def find(self, path: str, timeout_s: float) -> list[Upload]:
        found = self.unfinished(path, timeout_s)
        return [upload for upload in found if upload.path == path]

    def unfinished(self, directory: str, timeout_s: float) -> Iterable[Upload]:
        bucket, _, start = directory.partition("/")
        inside = start.removeprefix(self._root).lstrip("/").replace("/", "~")
        prefix = f"{self._root}/{PARTS}/".lstrip("/")
        youngest: dict[str, float] = {}
        for one in self._objects(bucket, prefix + inside, timeout_s):
            upload = one.name.rpartition("/")[0]
            youngest[upload] = min(one.age_s, youngest.get(upload, one.age_s))
        for upload, age_s in youngest.items():
            name = upload.removeprefix(prefix).partition("/")[0].replace("~", "/")
            yield Upload("/".join(filter(None, (bucket, self._root, name))), upload, age_s)

    def begin(self, path: str, timeout_s: float) -> Upload:
        name = path.partition("/")[2].removeprefix(self._root).lstrip("/").replace("/", "~")
        return Upload(path, f"{self._root}/{PARTS}/{name}/{os.urandom(6).hex()}".lstrip("/"))

    def has_bytes(self, part: SentPart, view: memoryview, checksum: str) -> bool:
        return part.checksum == checksum

    def sent(self, upload: Upload, timeout_s: float) -> list[SentPart]:
        bucket = upload.path.partition("/")[0]
        found = []
        for one in self._objects(bucket, f"{upload.id}/", timeout_s):
            number = one.name.rpartition("/")[2]
            if number.isdigit():
                part = SentPart(int(number), one.size_bytes, one.generation, one.checksum)
                found.append(part)
        return found

    def send(
        self, upload: Upload, number: int, view: memoryview, checksum: str, timeout_s: float
    ) -> SentPart:
        path = f"{upload.path.partition('/')[0]}/{_part_name(upload, number)}"
        stored = self._upload(path, view, checksum, timeout_s)
        return SentPart(number, len(view), str(stored["generation"]), checksum)

    def copy(
        self, upload: Upload, number: int, path: str, start: int, stop: int, timeout_s: float
    ) -> SentPart:
        raise Refused(Kind.REFUSED, "GCS copies whole objects only")

    def complete(self, upload: Upload, parts: list[SentPart], timeout_s: float) -> Stored:
        bucket = upload.path.partition("/")[0]
        names = [(_part_name(upload, part.number), part.tag) for part in parts]
        if not self.completes_atomically:
            self._refuse_taken(upload.path, timeout_s)
        try:
            while len(names) > MAX_COMPONENTS:
                names = self._composed(bucket, upload, names, timeout_s)
            stored = self._compose(upload.path, names, timeout_s, ifGenerationMatch="0")
        except Refused as refused:
            if refused.kind not in (Kind.TAKEN, Kind.UNREACHABLE):
                raise
            # Is it the object that is there, or a part that is no longer the one that was sent?
            has = {part.number: part.tag for part in self.sent(upload, timeout_s)}
            if all(has.get(part.number) == part.tag for part in parts):
                raise
            kept = Refused(Kind.NO_UPLOAD, refused.said, status=refused.status)
        else:
            with contextlib.suppress(Refused):
                self.abort(upload, timeout_s)  # The parts: what stays is removed by its age.
            return Stored(int(stored["size"]), stored.get("crc32c"))
        raise kept

    @property
    def completes_atomically(self) -> bool:
        # fake-gcs-server composes over what is there, whatever the precondition says.
        return ".googleapis.com" in self._fs._location

    def _refuse_taken(self, path: str, timeout_s: float) -> None:
        try:
            self.head(path, timeout_s)
        except Refused as refused:
            if refused.kind is Kind.MISSING:
                return
            raise
        raise Refused(Kind.TAKEN, "it is there")

    def _composed(
        self, bucket: str, upload: Upload, names: list[tuple[str, str]], timeout_s: float
    ) -> list[tuple[str, str]]:
        """Fewer objects, each of up to 32."""
        made = []
        for start in range(0, len(names), MAX_COMPONENTS):
            name = f"{upload.id}/c{len(names)}-{start}"
            group = names[start : start + MAX_COMPONENTS]
            stored = self._compose(f"{bucket}/{name}", group, timeout_s)
            made.append((name, str(stored["generation"])))
        return made

    def _compose(
        self, path: str, names: list[tuple[str, str]], timeout_s: float, **query: str
    ) -> Mapping[str, Any]:
        body = {
            "sourceObjects": [
                {
                    "name": name,
                    "generation": generation,
                    "objectPreconditions": {"ifGenerationMatch": generation},
                }
                for name, generation in names
            ],
            "destination": {"contentType": "application/octet-stream"},
        }
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        return self._json("POST", f"{_object(path)}/compose", timeout_s, query, headers, [data])

    def abort(self, upload: Upload, timeout_s: float) -> None:
        bucket = upload.path.partition("/")[0]
        for one in list(self._objects(bucket, f"{upload.id}/", timeout_s)):
            try:
                self.delete(f"{bucket}/{one.name}", timeout_s)
            except Refused as refused:
                if refused.kind is not Kind.MISSING:
                    raise

    # -- requests --------------------------------------------------------------------------------

    def _objects(self, bucket: str, prefix: str, timeout_s: float) -> Iterator[_Found]:
        query = {
            "prefix": prefix,
            "fields": "items(name,size,crc32c,generation,timeCreated),nextPageToken",
        }
        while True:
            said = self._ask("GET", f"/storage/v1/b/{bucket}/o", timeout_s, query)
            answer = _document(said)
            items = answer.get("items", ())
            made_s = [
                datetime.fromisoformat(one["timeCreated"].replace("Z", "+00:00")).timestamp()
                for one in items
            ]
            now_s = now_there_s(said.headers.get("date"), made_s)
            for one, at_s in zip(items, made_s, strict=True):
                yield _Found(
                    one["name"],
                    int(one["size"]),
                    one.get("crc32c"),
                    str(one.get("generation", "")),
                    now_s - at_s,
                )
            if not answer.get("nextPageToken"):
                return
            query["pageToken"] = answer["nextPageToken"]

    def _upload(
        self, path: str, view: memoryview, checksum: str, timeout_s: float, **query: str
    ) -> Mapping[str, Any]:
        # Of GCS's ways to send an object the one whose checksum is compared before it appears.
        bucket, _, name = path.partition("/")
        about = json.dumps({"name": name, "crc32c": checksum})
        edge = os.urandom(16).hex()
        head = (
            f"--{edge}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n"
            f"--{edge}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        stored = self._json(
            "POST",
            f"/upload/storage/v1/b/{bucket}/o",
            timeout_s,
            {"uploadType": "multipart", **query},
            {"Content-Type": f"multipart/related; boundary={edge}"},
            [head.encode(), view, f"\r\n--{edge}--\r\n".encode()],
        )
        if stored.get("crc32c") not in (None, checksum) or int(stored["size"]) != len(view):
            with contextlib.suppress(Refused):
                self.delete(path, timeout_s)
            raise Refused(Kind.CORRUPTED, f"{stored.get('crc32c')} of what was sent as {checksum}")
        return stored

    def _json(
        self,
        method: str,
        path: str,
        timeout_s: float,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Sequence[memoryview | bytes] = (),
    ) -> Mapping[str, Any]:
        return _document(self._ask(method, path, timeout_s, query, headers, body))

    def _ask(
        self,
        method: str,
        path: str,
        timeout_s: float,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Sequence[memoryview | bytes] = (),
        *,
        out: memoryview | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        try:
            self._fs.credentials.apply(sent)
        except Exception as error:  # noqa: BLE001  (google-auth's, requests' and the system's)
            refused = self._no_identity(error)
        else:
            project = self._fs.requester_pays
            more = dict(query or {})
            if project:
                more["userProject"] = project if isinstance(project, str) else self._fs.project
            url = f"{self._fs._location}{path}{'?' + urlencode(more) if more else ''}"
            answer = self._http.request(method, url, sent, timeout_s=timeout_s, body=body, out=out)
            if answer.status < 300:
                return answer
            refused = self._refused(answer.status, answer.body)
        raise refused

    def _refused(self, status: int, body: bytes) -> Refused:
        message, reason = "", ""
        with contextlib.suppress(ValueError, TypeError, AttributeError, IndexError, KeyError):
            # Whatever is no error document of GCS has a status all the same.
            said = json.loads(body)["error"]
            message = said if isinstance(said, str) else str(said.get("message", ""))
            reason = str(said["errors"][0].get("reason", ""))
        kind = kind_of_status(status)
        if reason in _THROTTLED:
            kind = Kind.THROTTLED
        elif status == 404 and "bucket" in message.lower():
            kind = Kind.NO_BUCKET
        return Refused(
            kind, redacted(f"{status} {reason} {message}", self.secrets()), status=status
        )

    def _no_identity(self, error: Exception) -> Refused:
        if isinstance(error, (AttributeError, NameError, TypeError)):
            raise error  # Ours, or of a gcsfs that we do not know: to try again would hide it.
        name = type(error).__name__
        kind = Kind.EXPIRED if name in ("RefreshError", "HttpError") else Kind.UNREACHABLE
        if name in ("DefaultCredentialsError", "NonRetryableError"):
            kind = Kind.DENIED
        return Refused(kind, redacted(f"{name}: {error}", self.secrets()))

    # -- identity --------------------------------------------------------------------------------

    def renew(self) -> bool:
        credentials = self._fs.credentials
        if credentials.credentials is None or isinstance(credentials.token, str):
            return False  # None, or given in so many words: asking again gives the same.
        try:
            credentials.connect(method=credentials.token)
        except Exception as error:  # noqa: BLE001  (google-auth's, requests' and the system's)
            refused = self._no_identity(error)
        else:
            return True
        raise refused

    def secrets(self) -> Iterable[str]:
        held = getattr(self._fs.credentials.credentials, "__dict__", {})
        names = ("token", "_refresh_token", "_client_secret", "_id_token")
        found = [self._fs.credentials.token, *(held.get(name) for name in names)]
        return [secret for secret in found if isinstance(secret, str) and secret != "anon"]

    def close(self) -> None:
        self._http.close()


def _object(path: str) -> str:
    bucket, _, name = path.partition("/")
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def _document(answer: Answer) -> Mapping[str, Any]:
    try:
        found = json.loads(answer.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refused(Kind.UNREACHABLE, "an answer that is not JSON")
    return found


def _part_name(upload: Upload, number: int) -> str:
    return f"{upload.id}/{number:05d}"
