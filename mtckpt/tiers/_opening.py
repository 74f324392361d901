"""From a URL to a store: which client is used for it, and what to say where none is installed.

It knows URLs, packages and storage options. It does not know requests. Clients are imported here
and no earlier: importing mtckpt must not cost their seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtckpt.errors import AccessDenied, TierUnavailable, UsageError
from mtckpt.tiers._store import redacted

if TYPE_CHECKING:
    from mtckpt.tiers._store import Store

__all__ = ["opened"]

_S3 = ("s3", "s3a")
_GCS = ("gs", "gcs")
_AZURE = ("az", "abfs", "abfss")
_NO_PREFIX = re.compile(r"\\|//|(^|/)\.\.?(/|$)")  # what some stores take for another path
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")


def opened(
    url: str, engine: str, options: Mapping[str, Any], *, stall_s: float, longest_s: float
) -> tuple[Store, str, str]:
    """The store, the path of its root (bucket first), and the engine that was chosen.

    No request waits ``stall_s`` for a byte, and none of a read takes more than ``longest_s``.
    """
    if engine not in ("auto", "obstore", "fsspec"):
        raise UsageError(f"not an engine: {engine!r}", actions=["auto, obstore or fsspec"])
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme:
        raise UsageError(
            f"not the URL of a store: {redacted(url.partition('?')[0])!r}",
            actions=["write it as s3://bucket/prefix, or use Disk(path) for a directory"],
        )
    if "?" in rest or "#" in rest:
        raise UsageError(
            f"the URL of a store has no query: {redacted(url.partition('?')[0].partition('#')[0])}",
            actions=["give credentials by environment, configuration file or storage_options="],
        )
    place = redacted(url.rstrip("/"))
    if scheme in _S3:
        return _open_s3(place, _bucket_path(rest, place), engine, options, stall_s, longest_s)
    if scheme in _GCS:
        if engine == "obstore":
            raise UsageError(
                f"engine='obstore' is not for {scheme}://: it is no faster there than the sockets"
                " that mtckpt reads GCS with, and takes more processor time",
                actions=["use engine='auto'"],
            )
        return _open_gcs(place, _bucket_path(rest, place), options, stall_s)
    if engine == "obstore":
        raise UsageError(
            f"engine='obstore' is for s3:// only, not for {scheme}://",
            actions=["use engine='auto': others go through fsspec"],
        )
    if scheme in _AZURE:
        return _open_azure(url, place, options, stall_s)
    return _open_other(url, place, options)


def _bucket_path(rest: str, place: str) -> str:
    path = rest.strip("/")
    bucket, _, prefix = path.partition("/")
    if not _BUCKET.fullmatch(bucket) or _NO_PREFIX.search(prefix):
        raise UsageError(
            f"no bucket and prefix: {place}",
            actions=["write it as s3://bucket/prefix, without backslash and empty parts, . and .."],
        )
    return path


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _open_s3(
    place: str,
    path: str,
    engine: str,
    options: Mapping[str, Any],
    stall_s: float,
    longest_s: float,
) -> tuple[Store, str, str]:
    from mtckpt.tiers._store_s3 import S3Store

    bucket = path.partition("/")[0]
    fast = _has("obstore") and _has("botocore")
    if engine == "obstore" and not fast:
        raise UsageError("obstore is not installed", actions=["pip install 'mtckpt[fast]'"])
    if engine != "fsspec" and fast:
        from mtckpt.tiers._store_obstore import FastWire, can_serve

        if engine == "obstore" or can_serve(options):
            wire = FastWire(bucket, options, stall_s=stall_s, longest_s=longest_s)
            return S3Store(wire, place), path, "obstore"
    if not _has("s3fs"):
        raise UsageError(
            "s3:// needs a client that is not installed",
            actions=["pip install 'mtckpt[fast]'", "or pip install 'mtckpt[s3]'"],
        )
    import s3fs

    from mtckpt.tiers._store_s3fs import S3fsWire, new_session

    config = dict(options.get("config_kwargs") or {})
    config.setdefault("connect_timeout", min(10.0, stall_s))
    config.setdefault("read_timeout", stall_s)
    # Tried again by the tier, which knows of all threads; checksums are sent where they matter.
    config.setdefault("retries", {"total_max_attempts": 1, "mode": "standard"})
    config.setdefault("request_checksum_calculation", "when_required")
    config.setdefault("response_checksum_validation", "when_required")
    config.setdefault("max_pool_connections", 32)
    try:
        fs = s3fs.S3FileSystem(**{**options, "config_kwargs": config, "skip_instance_cache": True})
        if fs.session is None:
            # As s3fs would make it, and sharing what all of them read from botocore's files.
            fs.session = new_session(fs.kwargs)
    except TypeError as error:
        said = redacted(error, _texts_in(options))
        raise UsageError(
            f"s3fs does not take these storage options: {said}",
            actions=["see the names in its API"],
        ) from None
    return S3Store(S3fsWire(fs), place), path, "fsspec"


def _open_gcs(
    place: str, path: str, options: Mapping[str, Any], stall_s: float
) -> tuple[Store, str, str]:
    if not _has("gcsfs"):
        raise UsageError(
            "gs:// needs a client that is not installed", actions=["pip install 'mtckpt[gcs]'"]
        )
    # Read when gcsfs is imported: without it every request first asks an API over gRPC whether the
    # bucket is a hierarchical one, for a minute where that is not answered.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    from mtckpt.tiers._store_gcs import GcsStore

    secrets = _texts_in(options.get("token"))
    try:
        fs = gcsfs.GCSFileSystem(**options)
    except Exception as error:  # noqa: BLE001  (it signs in: google-auth's, requests', its own)
        said = redacted(f"{type(error).__name__}: {error}", secrets)
    else:
        return GcsStore(fs, place, path, stall_s=stall_s), path, "fsspec"
    raise AccessDenied(f"cannot sign in to {place}: {said}", actions=["check the token"])


def _open_azure(
    url: str, place: str, options: Mapping[str, Any], stall_s: float
) -> tuple[Store, str, str]:
    if not _has("adlfs"):
        raise UsageError(
            f"{url.partition('://')[0]}:// needs a client that is not installed",
            actions=["pip install 'mtckpt[azure]'"],
        )
    import adlfs

    from mtckpt.tiers._store_azure import AzureStore

    kind = adlfs.AzureBlobFileSystem
    path = _bucket_path(kind._strip_protocol(url), place)
    given = {**kind._get_kwargs_from_urls(url), **options, "skip_instance_cache": True}
    try:
        fs = kind(**given)
    except Exception as error:  # noqa: BLE001  (azure-storage's, azure-identity's, its own)
        said = redacted(f"{type(error).__name__}: {error}", _texts_in(options))
    else:
        return AzureStore(fs, f"az://{path}", stall_s=stall_s), path, "fsspec"
    raise UsageError(
        f"cannot open {place}: {said}",
        actions=["set AZURE_STORAGE_ACCOUNT_NAME, or AZURE_STORAGE_CONNECTION_STRING"],
    )


def _open_other(url: str, place: str, options: Mapping[str, Any]) -> tuple[Store, str, str]:
    import fsspec

    from mtckpt.tiers._store_fsspec import FsspecStore

    secrets = _texts_in(options)
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except Exception as error:  # noqa: BLE001  (some connect and sign in: whatever that raises)
        said = redacted(error, secrets)
        is_away = isinstance(error, OSError)
    else:
        return FsspecStore(fs, place, secrets), path.rstrip("/"), "fsspec"
    if is_away:
        raise TierUnavailable(f"cannot open {place}: {said}", actions=["check the network"])
    raise UsageError(
        f"cannot open {place}: {said}",
        actions=["install the package, or correct the option, that is named above"],
    )


def _texts_in(options: Any) -> list[str]:
    """Every text among storage options, however deep: any of them may be secret."""
    if isinstance(options, Mapping):
        return [text for value in options.values() for text in _texts_in(value)]
    if isinstance(options, (list, tuple)):
        return [text for value in options for text in _texts_in(value)]
    return [options] if isinstance(options, str) else []
