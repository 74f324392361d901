"""Azure Blob Storage as a store: its REST API, asked on plain sockets; adlfs says who we are.

It knows Azure's requests, signatures and blocks. It does not know keys. A large object is put
together from blocks: sent in parallel, each whole or not there, seen by nobody until a list of them
makes one blob, which never replaces. A block's id says which upload it is of, and its checksum.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from xml.etree import ElementTree

from mtckpt.tiers._store import (
    Entry,
    Kind,
    Refused,
    SentPart,
    Stored,
    Upload,
    kind_of_status,
    redacted,
)
from mtckpt.tiers._store_http import Answer, Http, got_from

__all__ = ["AzureStore"]

VERSION = "2021-12-02"
SCOPE = "https://storage.azure.com/.default"
ID_BYTES, NUMBER_BYTES, MD5_BYTES = 6, 4, 16
# Of all blocks together: what the store says of a blob that it has put together is a size.
PARTS = "x-ms-meta-mtckptparts"
_SIGNED = (
    "content-encoding", "content-language", "content-length", "content-md5", "content-type", "date",
    "if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range",
)  # fmt: skip

_BY_CODE: Mapping[str, Kind] = {
    "BlobNotFound": Kind.MISSING,
    "ContainerNotFound": Kind.NO_BUCKET,
    "ContainerBeingDeleted": Kind.NO_BUCKET,
    "ContainerDisabled": Kind.NO_BUCKET,
    "BlobAlreadyExists": Kind.TAKEN,
    "UnauthorizedBlobOverwrite": Kind.TAKEN,
    "InvalidBlockList": Kind.NO_UPLOAD,
    "InvalidBlobOrBlock": Kind.NO_UPLOAD,
    "InvalidRange": Kind.RANGE,
    "Md5Mismatch": Kind.CORRUPTED,
    "BlobImmutableDueToPolicy": Kind.DENIED,
    "BlobImmutableDueToLegalHold": Kind.DENIED,
    "LeaseIdMissing": Kind.DENIED,
    "SnapshotsPresent": Kind.REFUSED,
    "BlockCountExceedsLimit": Kind.REFUSED,
    "BlobOperationNotSupported": Kind.REFUSED,
    "InvalidBlobType": Kind.REFUSED,
}


class AzureStore:
    """One container, with the identity and endpoint of an adlfs file system. See ``Store``."""

    min_part_bytes = 1
    max_parts = 50_000
    completes_atomically = True
    can_create: bool | None = True  # If-None-Match is older than anything that lacks it

    def __init__(self, fs: Any, place: str, *, stall_s: float) -> None:
        self._fs = fs
        self.place = place
        self._http = Http(stall_s=stall_s)
        self.parts = self

    # -- objects ---------------------------------------------------------------------------------

    def create(self, path: str, blocks: Iterable[memoryview], timeout_s: float) -> None:
        (view,) = blocks
        checksum = self.checksum_of(view)
        headers = {"x-ms-blob-type": "BlockBlob", "If-None-Match": "*"}
        try:
            self._put(path, view, checksum, timeout_s, headers=headers)
        except Refused as refused:
            # Azurite takes blocks that are of no blob yet for one. A list of blocks knows better.
            if refused.kind is not Kind.TAKEN or not self._blocks(path, timeout_s):
                raise
            upload = self.begin(path, timeout_s)
            parts = [self.send(upload, 1, view, checksum, timeout_s)] if len(view) else []
            self.complete(upload, parts, timeout_s)

    def fetch(self, path: str, out: memoryview, offset: int, timeout_s: float) -> int:
        headers = {"x-ms-range": f"bytes={offset}-{offset + len(out) - 1}"}
        return got_from(self._ask("GET", path, timeout_s, headers=headers, out=out), offset)

    def head(self, path: str, timeout_s: float) -> Stored:
        headers = self._ask("HEAD", path, timeout_s).headers
        checksum = headers.get(PARTS) or headers.get("content-md5")
        return Stored(int(headers["content-length"]), checksum)

    def page(
        self, prefix: str, token: str | None, timeout_s: float
    ) -> tuple[list[Entry], str | None]:
        container, _, start = prefix.partition("/")
        query = {"restype": "container", "comp": "list", "prefix": start}
        if token:
            query["marker"] = token
        found = _document(self._ask("GET", container, timeout_s, query))
        entries = []
        for blob in found.iterfind("Blobs/Blob"):
            # In a hierarchical account a directory is listed as well, as a blob of no bytes.
            if blob.findtext("Properties/ResourceType") != "directory":
                size_bytes = int(blob.findtext("Properties/Content-Length") or 0)
                entries.append(Entry(f"{container}/{blob.findtext('Name')}", size_bytes))
        return entries, found.findtext("NextMarker") or None

    def delete(self, path: str, timeout_s: float) -> None:
        self._ask("DELETE", path, timeout_s)

    # -- parts -----------------------------------------------------------------------------------

    def checksum_of(self, view: memoryview) -> str:
        return base64.b64encode(hashlib.md5(view, usedforsecurity=False).digest()).decode()

    def checksum_of_parts(self, parts: list[SentPart]) -> str | None:
        digests = b"".join(base64.b64decode(part.checksum or "") for part in parts)
        return f"{self.checksum_of(memoryview(digests))}-{len(parts)}"

    def find(self, path: str, timeout_s: float) -> list[Upload]:
        return [Upload(path, id) for id in sorted(self._blocks(path, timeout_s))]

    def unfinished(self, directory: str, timeout_s: float) -> Iterable[Upload]:
        return []  # Azure itself removes blocks that no blob was made of, a week after the last.

    def begin(self, path: str, timeout_s: float) -> Upload:
        return Upload(path, os.urandom(ID_BYTES).hex())

    def has_bytes(self, part: SentPart, view: memoryview, checksum: str) -> bool:
        return part.checksum == checksum

    def sent(self, upload: Upload, timeout_s: float) -> list[SentPart]:
        return self._blocks(upload.path, timeout_s).get(upload.id, [])

    def send(
        self, upload: Upload, number: int, view: memoryview, checksum: str, timeout_s: float
    ) -> SentPart:
        id = _block_id(upload, number, checksum)
        query = {"comp": "block", "blockid": id}
        self._put(upload.path, view, checksum, timeout_s, query)
        return SentPart(number, len(view), id, checksum)

    def copy(
        self, upload: Upload, number: int, path: str, start: int, stop: int, timeout_s: float
    ) -> SentPart:
        raise Refused(Kind.REFUSED, "Azure copies only what it may read by an address of its own")

    def complete(self, upload: Upload, parts: list[SentPart], timeout_s: float) -> Stored:
        listed = "".join(f"<Uncommitted>{part.tag}</Uncommitted>" for part in parts)
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
        headers = {"If-None-Match": "*", "Content-Type": "application/xml"}
        headers[PARTS] = self.checksum_of_parts(parts) or ""
        self._ask("PUT", upload.path, timeout_s, {"comp": "blocklist"}, headers, [body])
        return Stored(sum(part.size_bytes for part in parts))

    def abort(self, upload: Upload, timeout_s: float) -> None:
        """Nothing: only a blob in their place would take blocks away, those of others as well."""

    def _blocks(self, path: str, timeout_s: float) -> dict[str, list[SentPart]]:
        """What was sent of a blob and is of none yet, by upload."""
        query = {"comp": "blocklist", "blocklisttype": "uncommitted"}
        try:
            found = _document(self._ask("GET", path, timeout_s, query))
        except Refused as refused:
            if refused.kind is not Kind.MISSING:
                raise
            return {}
        uploads: dict[str, list[SentPart]] = {}
        for block in found.iterfind("UncommittedBlocks/Block"):
            tag = block.findtext("Name") or ""
            id = base64.b64decode(tag)
            if len(id) == ID_BYTES + NUMBER_BYTES + MD5_BYTES:  # Else it is none of ours.
                number = int.from_bytes(id[ID_BYTES:-MD5_BYTES], "big")
                checksum = base64.b64encode(id[-MD5_BYTES:]).decode()
                part = SentPart(number, int(block.findtext("Size") or 0), tag, checksum)
                uploads.setdefault(id[:ID_BYTES].hex(), []).append(part)
        return uploads

    # -- requests --------------------------------------------------------------------------------

    def _put(
        self,
        path: str,
        view: memoryview,
        checksum: str,
        timeout_s: float,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send bytes, which the store compares with their checksum before it has them."""
        sent = {**(headers or {}), "Content-MD5": checksum}
        answer = self._ask("PUT", path, timeout_s, query, sent, [view])
        kept = answer.headers.get("content-md5", checksum)
        if kept != checksum:
            raise Refused(Kind.CORRUPTED, f"checksum {kept} of what was sent as {checksum}")

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
        sent = {**(headers or {}), "x-ms-version": VERSION}
        sent["x-ms-date"] = email.utils.formatdate(usegmt=True)
        try:
            url = self._signed(method, path, dict(query or {}), sent, sum(map(len, body)))
        except Exception as error:  # noqa: BLE001  (azure-identity's, msal's and the system's)
            refused = self._no_identity(error)
        else:
            answer = self._http.request(method, url, sent, timeout_s=timeout_s, body=body, out=out)
            if answer.status >= 300:
                refused = self._refused(answer)
            elif "x-ms-request-id" in answer.headers:
                return answer
            else:
                refused = Refused(Kind.UNREACHABLE, f"{answer.status}, but it is no store's")
        raise refused

    def _refused(self, answer: Answer) -> Refused:
        code = answer.headers.get("x-ms-error-code", "")
        message, detail = "", ""
        if answer.body:
            try:
                found = _document(answer)
            except Refused:
                pass  # Whatever is no error document of Azure has a status all the same.
            else:
                code = code or found.findtext("Code") or ""
                message = (found.findtext("Message") or "").partition("\n")[0]
                detail = found.findtext("AuthenticationErrorDetail") or ""
        kind = _BY_CODE.get(code) or kind_of_status(answer.status)
        if code == "AuthenticationFailed" and "expir" in f"{message} {detail}".lower():
            kind = Kind.EXPIRED
        elif code == "AuthenticationFailed" and "date header" in detail.lower():
            kind = Kind.SKEWED
        said = redacted(f"{answer.status} {code} {message}", self.secrets())
        return Refused(kind, said, status=answer.status)

    # -- identity --------------------------------------------------------------------------------

    def _signed(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], size: int
    ) -> str:
        """The URL to ask, with what says who asks: in it, or added to the headers."""
        client = self._fs.service_client
        parts = urlsplit(client.primary_endpoint)
        target = f"{parts.path.rstrip('/')}/{quote(path)}"
        key = getattr(client.credential, "account_key", None)
        if key is not None:
            name = client.credential.account_name
            text = _string_to_sign(method, name, target, query, headers, size)
            mac = hmac.digest(base64.b64decode(key), text.encode(), "sha256")
            headers["Authorization"] = f"SharedKey {name}:{base64.b64encode(mac).decode()}"
        elif self._fs.sync_credential is not None:
            token = self._fs.sync_credential.get_token(SCOPE).token
            headers["Authorization"] = f"Bearer {token}"
        words = "&".join(filter(None, (urlencode(query, quote_via=quote), parts.query)))
        return f"{parts.scheme}://{parts.netloc}{target}{'?' + words if words else ''}"

    def _no_identity(self, error: Exception) -> Refused:
        if isinstance(error, (AttributeError, NameError, TypeError)):
            raise error  # Ours, or of an adlfs that we do not know: to try again would hide it.
        name = type(error).__name__
        kind = Kind.UNREACHABLE
        if name in ("ClientAuthenticationError", "CredentialUnavailableError", "Error"):
            kind = Kind.DENIED  # "Error": binascii's, of a key that is not base64.
        return Refused(kind, redacted(f"{name}: {error}", self.secrets()))

    def renew(self) -> bool:
        return False  # Tokens are renewed by azure-identity; what was given in words stays.

    def secrets(self) -> Iterable[str]:
        client = self._fs.service_client
        signature = dict(parse_qsl(urlsplit(client.primary_endpoint).query)).get("sig", "")
        names = ("account_key", "sas_token", "connection_string", "client_secret", "credential")
        held = [getattr(self._fs, name, None) for name in names]
        key = getattr(client.credential, "account_key", None)
        found = [*held, key, signature, quote(signature, safe="")]
        return [secret for secret in found if isinstance(secret, str)]

    def close(self) -> None:
        self._http.close()


def _block_id(upload: Upload, number: int, checksum: str) -> str:
    """Of one length for all blocks, as Azure wants it: upload, number and MD5."""
    raw = (
        bytes.fromhex(upload.id) + number.to_bytes(NUMBER_BYTES, "big") + base64.b64decode(checksum)
    )
    return base64.b64encode(raw).decode()


def _string_to_sign(
    method: str,
    account: str,
    target: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    size_bytes: int,
) -> str:
    known = {name.lower(): value for name, value in headers.items()}
    known["content-length"] = str(size_bytes or "")
    own = sorted(name for name in known if name.startswith("x-ms-"))
    return "\n".join(
        [
            method,
            *(known.get(name, "") for name in _SIGNED),
            *(f"{name}:{known[name]}" for name in own),
            f"/{account}{target}",
            *(f"{name}:{query[name]}" for name in sorted(query)),
        ]
    )


def _document(answer: Answer) -> ElementTree.Element:
    if b"<!" not in answer.body:  # Nothing that Azure sends has a document type.
        try:
            return ElementTree.fromstring(answer.body)
        except ElementTree.ParseError:
            pass
    raise Refused(Kind.UNREACHABLE, "an answer that is not XML")
