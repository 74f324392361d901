"""The wire of S3 that s3fs uses: its aiobotocore client, on fsspec's event loop.

It knows s3fs and asyncio. It does not know what the operations mean. Bodies are copied once on
their way out, since aiobotocore signs nothing but bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from mtckpt.tiers._store import Kind, Refused, redacted
from mtckpt.tiers._store_s3 import refused_by_s3

__all__ = [
    "S3fsWire",
    "keep_out_of_logs",
    "loader",
    "new_session",
    "refused_by_client",
    "secrets_of",
]

T = TypeVar("T")

PIECE_BYTES = 256 << 10


class S3fsWire:
    """Operations through ``fs.get_s3()``: the identity, endpoint and region that s3fs found."""

    def __init__(self, fs: Any, secrets: Iterable[str] = ()) -> None:
        self._fs = fs
        self._secrets = tuple(secrets)

    @property
    def endpoint(self) -> str:
        return str(self._fs._s3.meta.endpoint_url) if self._fs._s3 is not None else ""

    def call(self, operation: str, timeout_s: float, **params: Any) -> Mapping[str, Any]:
        async def work() -> Mapping[str, Any]:
            client = await self._client(params["Bucket"])
            answer: Mapping[str, Any] = await getattr(client, operation)(**params)
            return answer

        return self._run(work(), timeout_s)

    def send(
        self, operation: str, view: memoryview, timeout_s: float, **params: Any
    ) -> Mapping[str, Any]:
        return self.call(operation, timeout_s, Body=bytes(view), **params)

    def fetch(self, bucket: str, name: str, out: memoryview, offset: int, timeout_s: float) -> int:
        async def work() -> int:
            client = await self._client(bucket)
            answer = await client.get_object(
                Bucket=bucket, Key=name, Range=f"bytes={offset}-{offset + len(out) - 1}"
            )
            done = 0
            async with answer["Body"] as body:
                _check_range(answer, offset)
                async for piece in body.iter_chunks(PIECE_BYTES):
                    if done + len(piece) > len(out):
                        raise Refused(Kind.CORRUPTED, "more bytes than the range asked for")
                    out[done : done + len(piece)] = piece
                    done += len(piece)
            return done

        return self._run(work(), timeout_s)

    def renew(self) -> bool:
        if self._fs.key is not None:
            return False  # Given in so many words: asking again gives the same.
        # The old client stays open for the requests of other threads, and goes with the last.
        self._run(self._fs.set_session(refresh=True), 30.0)
        return True

    def secrets(self) -> Iterable[str]:
        found = [*self._secrets, self._fs.key, self._fs.secret, self._fs.token]
        credentials = getattr(self._fs.session, "_credentials", None)
        found += secrets_of(credentials)
        return [secret for secret in found if isinstance(secret, str)]

    def close(self) -> None:
        if self._fs._s3 is not None:
            with contextlib.suppress(Refused):
                # What does not close in time is closed by the end of the process.
                self._run(self._fs._s3creator.__aexit__(None, None, None), 5.0)
            self._fs._s3 = None

    async def _client(self, bucket: str) -> Any:
        await self._fs.set_session()
        client = await self._fs.get_s3(bucket)
        web = getattr(getattr(client, "_endpoint", None), "http_session", None)
        for session in (getattr(web, "_sessions", None) or {}).values():
            # aiohttp repeats a PUT by itself when a kept connection breaks. If the first one was
            # carried out, the second finds the key taken, and nobody knows that it was we.
            session._retry_connection = False
        return client

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._fs.loop)
        try:
            return future.result(timeout_s)
        except Refused:
            raise
        except FutureTimeout:
            future.cancel()
            refused = Refused(Kind.UNREACHABLE, f"no whole answer within {timeout_s:.1f} s")
        except Exception as error:  # noqa: BLE001  (aiohttp's, botocore's and the system's)
            refused = refused_by_client(error, self.secrets())
        raise refused


@functools.cache
def loader() -> Any:
    """What botocore reads of S3 from its files, once a process: most of a client's time."""
    from botocore.loaders import create_loader

    return create_loader(os.environ.get("AWS_DATA_PATH"))


def keep_out_of_logs() -> None:
    """At DEBUG botocore logs the headers of every request, a session's token among them. Whoever
    wants to see that asks for the logger "botocore" by its name."""
    its_logger = logging.getLogger("botocore")
    if its_logger.level == logging.NOTSET:
        its_logger.setLevel(logging.INFO)


def new_session(options: Mapping[str, Any]) -> Any:
    """A session for s3fs, which has read nothing yet of who we are."""
    from aiobotocore.session import AioSession

    keep_out_of_logs()
    session = AioSession(**options)
    session.register_component("data_loader", loader())
    return session


def secrets_of(credentials: Any) -> list[Any]:
    """What botocore's credentials hold now: looking it up must not fetch new ones."""
    known = getattr(credentials, "__dict__", {})
    names = ("access_key", "secret_key", "token")
    return [known.get(name) for plain in names for name in (plain, f"_{plain}")]


def _check_range(answer: Mapping[str, Any], offset: int) -> None:
    said = answer.get("ContentRange")
    if said is not None and not said.startswith(f"bytes {offset}-"):
        raise Refused(Kind.CORRUPTED, f"asked from {offset} on, got {said!r}")
    if said is None and offset:
        raise Refused(Kind.CORRUPTED, f"asked from {offset} on, got the whole object")


def refused_by_client(error: Exception, secrets: Iterable[str]) -> Refused:
    """What a botocore client raised, as an answer of ours."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict) and "Error" in answer:
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
        said = answer["Error"]
        return refused_by_s3(
            status, str(said.get("Code", "")), str(said.get("Message", "")), secrets
        )
    if isinstance(error, (AttributeError, NameError, TypeError, AssertionError, LookupError)):
        raise error  # Ours, or of a client that we do not know: to try again would hide it.
    name = type(error).__name__
    kind = Kind.UNREACHABLE
    if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        kind = Kind.DENIED
    elif name in ("CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError"):
        kind = Kind.EXPIRED
    elif name in ("ParamValidationError", "InvalidEndpointDiscoveryConfigurationError"):
        kind = Kind.REFUSED
    return Refused(kind, redacted(f"{name}: {error}", secrets))
