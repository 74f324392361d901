"""How an object store is reached: engine, options, and the part of an environment that is for it.

Knows which variables the users of each kind of store keep credentials in, and how little of all
this may be seen: it travels to the agent's data process in memory, and is in no file, log, error or
``repr``. Does not know what is stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from typing import Any

    from mtckpt.tiers import Tier

__all__ = [
    "ALL_KINDS",
    "Access",
    "access_of",
    "check_agent_url",
    "check_url",
    "environment_for",
    "open_store",
    "scheme_of",
]

Engine = Literal["auto", "obstore", "fsspec"]
# Of every kind: how to get out of the house, and whom to trust there.
ALL_KINDS = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
_GCS = (
    *("GOOGLE_", "GCSFS_", "GCE_", "NO_GCE_CHECK", "CLOUDSDK_", "FSSPEC_G"),
    "STORAGE_EMULATOR_HOST",
)
_IN_AZURE = ("az", "abfs", "abfss")
# The last three: where a machine of Azure's is told who it is.
_AZURE = ("AZURE_", "FSSPEC_A", "IDENTITY_", "MSI_", "IMDS_")
# Azure's own way to say where: a container of an account, and no secret.
_AZURE_PLACE = re.compile(r"[a-z0-9$-]+@[a-z0-9]+\.(dfs|blob)\.core\.windows\.net(/[^@?#]*)?")
_PREFIXES = {
    "s3": ("AWS_", "FSSPEC_S3"),
    "s3a": ("AWS_", "FSSPEC_S3"),
    "gs": _GCS,
    "gcs": _GCS,
    **dict.fromkeys(_IN_AZURE, _AZURE),
}


class Access(msgspec.Struct, frozen=True):
    """``options`` is JSON of the storage options. ``withheld``: whoever wrote this down left the
    rest out, so the store has to wait for a process that brings it."""

    engine: Engine = "auto"
    options: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    withheld: bool = False

    def __repr__(self) -> str:
        return "Access(...)"

    def to_note(self) -> Access:
        """What may be written to a file."""
        return Access(self.engine, withheld=self.withheld or bool(self.options or self.environment))

    def use_environment(self) -> None:
        """Put the variables into this process's environment, before any library looks at it."""
        os.environ.update(self.environment)


def access_of(url: str, engine: Engine, storage_options: Mapping[str, Any] | None) -> Access:
    """What the agent's data process needs to reach the store as this process would."""
    return Access(
        engine,
        msgspec.json.encode(dict(storage_options)).decode() if storage_options else "",
        tuple(sorted(environment_for(url, os.environ).items())),
    )


def environment_for(url: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that this kind of store is reached by; none for one in a local directory."""
    scheme = scheme_of(url)
    if scheme in ("file", "local"):
        return {}
    known = _PREFIXES.get(scheme)
    prefixes = known or tuple(prefix for each in _PREFIXES.values() for prefix in each)
    return {
        name: value
        for name, value in environment.items()
        if name in ALL_KINDS or name.startswith(prefixes)
    }


def scheme_of(url: str) -> str:
    return url.partition("://")[0].lower()


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises UsageError, which does not show it whole."""
    scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    # A secret may have any of these in it: only what comes after the last one is a place.
    place = (rest if separator else scheme).partition("?")[0].partition("#")[0]
    shown = f"{scheme if separator else ''}{separator}{place.rpartition('@')[2]}"
    if not separator or not scheme or not rest.strip("/"):
        raise UsageError(
            f"{shown[:200]!r} is not the URL of a store, such as s3://bucket/checkpoints",
            state="nothing was done",
            actions=("for a directory: Disk(path), or file:// and the path from the root",),
        )
    is_place = scheme_of(url) in _IN_AZURE and _AZURE_PLACE.fullmatch(rest)
    if not is_place and ("@" in rest or "?" in rest or "#" in rest):
        raise UsageError(
            f"the URL of {shown[:200]} has more in it than a place",
            state="nothing was done",
            actions=("give credentials by environment, configuration file or storage_options=",),
        )
    return url.rstrip("/")


def check_agent_url(url: str) -> None:
    """Refuse what means another place to the agent, which writes there, than to who gives it."""
    place = check_url(url).partition("://")[2]
    if scheme_of(url) in ("file", "local") and not place.startswith("/"):
        raise UsageError(
            f"{url[:200]!r} is no place of its own: the agent has another working directory",
            state="nothing was done",
            actions=("give the whole path: file:///mnt/checkpoints",),
        )
    if scheme_of(url) == "memory":
        raise UsageError(
            "what lies at memory:// is seen by one process alone, and ends with it",
            state="nothing was done",
            actions=("use Ram() to keep steps in memory, or file:// for a directory",),
        )


def open_store(
    url: str,
    access: Access,
    *,
    name: str = "store",
    timeout_s: float = 60.0,
    max_bytes_per_s: float | None = None,
) -> Tier:
    """The store as a tier. Libraries are imported here, not before."""
    from mtckpt.tiers.object_store import ObjectStoreTier

    options = msgspec.json.decode(access.options, type=dict) if access.options else None
    return ObjectStoreTier(
        url,
        engine=access.engine,
        storage_options=options,
        name=name,
        timeout_s=timeout_s,
        max_bytes_per_s=max_bytes_per_s,
    )
