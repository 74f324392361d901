"""The fast wire of S3: obstore reads, plain sockets write, botocore says who we are.

It knows obstore, botocore's signing and where S3's users keep credentials, regions and endpoints.
It does not know what the operations mean. Bodies go from the caller's memory to the socket without
a copy: a presigned URL carries the identity, and nothing of the body needs to be signed.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any
from xml.etree import ElementTree

from mtckpt.errors import UsageError
from mtckpt.tiers._store import Kind, Refused, kind_of_status, redacted
from mtckpt.tiers._store_http import Http
from mtckpt.tiers._store_s3 import refused_by_s3
from mtckpt.tiers._store_s3fs import keep_out_of_logs, loader, refused_by_client, secrets_of

__all__ = ["FastWire", "can_serve"]

_IDENTITY = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
}
_OPTIONS = frozenset(
    {*_IDENTITY, "profile", "anon", "endpoint_url", "client_kwargs", "config_kwargs", "use_ssl"}
)
_CLIENT_OPTIONS = frozenset(
    {*_IDENTITY.values(), "region_name", "endpoint_url", "verify", "use_ssl"}
)
_HEADERS = {
    "IfNoneMatch": "If-None-Match",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ChecksumCRC32C": "x-amz-checksum-crc32c",
}
_STATUS = re.compile(r"status(?: code)?:? (\d{3})|\b([45]\d\d) [A-Z][a-z]")
_STATUS_BY_NAME = {
    "FileNotFoundError": 404,
    "PermissionDeniedError": 403,
    "UnauthenticatedError": 401,
}
# obstore asks again when this is over; botocore renews what expires earlier by itself.
CREDENTIALS_AGE = timedelta(minutes=5)
SIGNED_FOR_S = 900


def can_serve(options: Mapping[str, Any]) -> bool:
    """Whether the storage options, in s3fs's words, are all known here."""
    return set(options) <= _OPTIONS and set(options.get("client_kwargs") or ()) <= _CLIENT_OPTIONS


class FastWire:
    """Operations on one bucket, with the storage options of s3fs."""

    def __init__(
        self, bucket: str, options: Mapping[str, Any], *, stall_s: float, longest_s: float
    ) -> None:
        if not can_serve(options):
            unknown = sorted(set(options) - _OPTIONS) or sorted(
                set(options["client_kwargs"]) - _CLIENT_OPTIONS
            )
            raise UsageError(
                f"storage options that engine='obstore' does not know: {', '.join(unknown)}",
                actions=["leave them out, or use engine='fsspec'"],
            )
        self._bucket = bucket
        self._options = dict(options)
        self._stall_s = stall_s
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._http: Http | None = None
        self._client: Any = None
        self._reader: Any = None
        self._credentials: Any = None
        self._replaced: list[Any] = []

    @property
    def endpoint(self) -> str:
        return str(self._signer().meta.endpoint_url)

    # -- operations ------------------------------------------------------------------------------

    def call(self, operation: str, timeout_s: float, **params: Any) -> Mapping[str, Any]:
        try:
            answer: Mapping[str, Any] = getattr(self._signer(), operation)(**params)
        except Exception as error:  # noqa: BLE001  (botocore's, urllib3's and the system's)
            refused = refused_by_client(error, self.secrets())
        else:
            return answer
        raise refused

    def send(
        self, operation: str, view: memoryview, timeout_s: float, **params: Any
    ) -> Mapping[str, Any]:
        headers = {_HEADERS[name]: params[name] for name in params if name in _HEADERS}
        try:
            url = self._signer().generate_presigned_url(
                operation, Params=params, ExpiresIn=SIGNED_FOR_S
            )
        except Exception as error:  # noqa: BLE001  (no credentials, or none to be had now)
            refused = refused_by_client(error, self.secrets())
        else:
            assert self._http is not None
            answer = self._http.request("PUT", url, headers, body=[view], timeout_s=timeout_s)
            if answer.status < 300:
                found = {"ETag": answer.headers.get("etag", "")}
                for name, header in _HEADERS.items():
                    if header in answer.headers:
                        found[name] = answer.headers[header]
                return found
            refused = refused_by_s3(answer.status, *_said(answer.body), self.secrets())
        raise refused

    def fetch(self, bucket: str, name: str, out: memoryview, offset: int, timeout_s: float) -> int:
        import obstore

        try:
            reader = self._opened_reader()
        except Exception as error:  # noqa: BLE001  (no credentials, or none to be had now)
            refused = refused_by_client(error, self.secrets())
        else:
            return self._fetched(obstore, reader, name, out, offset)
        raise refused

    def _fetched(self, obstore: Any, reader: Any, name: str, out: memoryview, offset: int) -> int:
        try:
            result = obstore.get(reader, name, options={"range": (offset, offset + len(out))})
            start, stop = result.range
            if start != offset or stop > offset + len(out):
                raise Refused(Kind.CORRUPTED, f"asked from {offset} on, got {start} to {stop}")
            # In one piece: a stream would be copied once more, into bytes of Python's.
            view = memoryview(result.bytes())
            done = len(view)
            if done > len(out):
                raise Refused(Kind.CORRUPTED, "more bytes than the range asked for")
            out[:done] = view
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001  (obstore's share no base with Python's)
            refused = self._refused_by_obstore(error)
        else:
            return done
        raise refused

    def renew(self) -> bool:
        if self._given_key() is not None:
            return False  # Given in so many words: asking again gives the same.
        with self._lock:
            self._replaced.append(self._client)  # Other threads may be asking with it.
            self._client = self._reader = None
        return True

    def secrets(self) -> Iterable[str]:
        options = {**self._options, **(self._options.get("client_kwargs") or {})}
        found = [options.get(name) for name in (*_IDENTITY, *_IDENTITY.values())]
        found += secrets_of(self._credentials)
        return [secret for secret in found if isinstance(secret, str)]

    def close(self) -> None:
        with self._lock:
            clients, self._replaced = [*self._replaced, self._client], []
            self._client = self._reader = None
            web, self._http = self._http, None
        if web is not None:
            web.close()
        for client in clients:
            if client is not None:
                client.close()

    # -- who we are ------------------------------------------------------------------------------

    def _given_key(self) -> str | None:
        client = self._options.get("client_kwargs") or {}
        found: str | None = self._options.get("key") or client.get("aws_access_key_id")
        return found

    def _signer(self) -> Any:
        """A botocore client: it signs, and asks what carries no payload."""
        with self._lock:
            if self._client is None:
                self._open()
            return self._client

    def _open(self) -> None:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import NoCredentialsError
        from botocore.session import Session

        keep_out_of_logs()
        options = self._options
        extra = dict(options.get("client_kwargs") or {})
        session = Session(profile=options.get("profile"))
        session.register_component("data_loader", loader())
        config = {
            "connect_timeout": min(10.0, self._stall_s),
            "read_timeout": self._stall_s,
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "signature_version": UNSIGNED if options.get("anon") else "s3v4",
            **(options.get("config_kwargs") or {}),
        }
        extra.setdefault("endpoint_url", options.get("endpoint_url"))
        if options.get("endpoint_url"):
            extra["endpoint_url"] = options["endpoint_url"]
        for ours, theirs in _IDENTITY.items():
            if options.get(ours) is not None:
                extra[theirs] = options[ours]
        if "use_ssl" in options:
            extra.setdefault("use_ssl", options["use_ssl"])
        if not (extra.get("region_name") or session.get_config_variable("region")):
            extra["region_name"] = "us-east-1"
        client = session.create_client("s3", config=Config(**config), **extra)
        self._credentials = client._request_signer._credentials
        if self._credentials is None and not options.get("anon"):
            raise NoCredentialsError
        self._verify = extra.get("verify", os.environ.get("AWS_CA_BUNDLE"))
        if self._http is None:
            self._http = Http(stall_s=self._stall_s, verify=self._verify)
        self._client = client

    def _opened_reader(self) -> Any:
        client = self._signer()
        with self._lock:
            if self._reader is None:
                self._reader = self._open_reader(client)
            return self._reader

    def _open_reader(self, client: Any) -> Any:
        from obstore.store import S3Store

        url = client.meta.endpoint_url
        addressing = (client.meta.config.s3 or {}).get("addressing_style", "auto")
        is_amazon = ".amazonaws.com" in url
        virtual = addressing == "virtual" or (addressing == "auto" and is_amazon)
        client_options: Any = {
            "allow_http": url.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(10.0, self._stall_s)),
            "read_timeout": timedelta(seconds=self._stall_s),
            # The whole of one ranged read, however its bytes trickle in.
            "timeout": timedelta(seconds=self._longest_s),
        }
        if self._verify is False:
            client_options["allow_invalid_certificates"] = True
        elif isinstance(self._verify, str) and os.path.isfile(self._verify):
            with open(self._verify, "rb") as file:
                client_options["root_certificate"] = file.read()
        more: dict[str, Any] = {}
        if self._options.get("anon"):
            more["skip_signature"] = True
        else:
            more["credential_provider"] = self._provide
        if not is_amazon:
            more["endpoint"] = _with_bucket(url, self._bucket) if virtual else url
        return S3Store(
            self._bucket,
            region=client.meta.region_name,
            virtual_hosted_style_request=virtual,
            client_options=client_options,
            retry_config={"max_retries": 0},
            **more,
        )

    def _provide(self) -> dict[str, Any]:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + CREDENTIALS_AGE,
        }

    def _refused_by_obstore(self, error: Exception) -> Refused:
        text = str(error)
        name = type(error).__name__
        document = text.find("<?xml")
        if document < 0:
            document = text.find("<Error")
        code, message = _said(text[document : text.rfind(">", 0, text.find("</Error>") + 9) + 1])
        found = _STATUS.search(text)
        status = int(found[1] or found[2]) if found else _STATUS_BY_NAME.get(name, 0)
        if code:
            return refused_by_s3(status, code, message, self.secrets())
        said = redacted(f"{name}: {text}", self.secrets())
        if status:
            return Refused(kind_of_status(status), said, status=status)
        if isinstance(error, (TypeError, AttributeError)):
            raise error  # Ours, or of an obstore that we do not know: to try again would hide it.
        return Refused(Kind.UNREACHABLE, said)


def _with_bucket(url: str, bucket: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{bucket}.{rest}"


def _said(body: bytes | str) -> tuple[str, str]:
    """Code and message of S3's error document; empty where the answer is none."""
    if isinstance(body, str):
        body = body.encode()
    if len(body) > 1 << 16 or b"<!" in body:
        return "", ""  # Nothing that S3 sends: neither so long, nor with a document type.
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return "", ""
    found = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    return found.get("Code", ""), found.get("Message", "")
