"""What a service takes of another user's access to a store: values, and nothing that names a file.

A data process reaches a store with the environment and the options that a trainer gave. In a
service it runs as a user who may do more than the trainer: a file named there would be read, and a
command in it run, with the rights of that user; and where no keys are given, the service's own
would be sent to whatever host is named. Pure. Does not know stores, nor who asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from mtckpt._access import ALL_KINDS, Access, scheme_of
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from mtckpt.agent.protocol import TierConfig

__all__ = ["lent"]

logger = logging.getLogger(__name__)

_S3 = {
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("AWS_EC2_METADATA_DISABLED", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
    *("FSSPEC_S3_KEY", "FSSPEC_S3_SECRET", "FSSPEC_S3_TOKEN", "FSSPEC_S3_ENDPOINT_URL"),
}
_GCS = {"GOOGLE_CLOUD_PROJECT", "NO_GCE_CHECK"}
_AZURE = {
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ANON"),
    *("AZURE_STORAGE_TENANT_ID", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET"),
    *("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
}
_IDENTITY = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
# Names of options, and of those inside them; None: any simple value.
_S3_OPTIONS: dict[str, set[str] | None] = {
    **dict.fromkeys(("key", "secret", "token", "anon", "endpoint_url", "use_ssl")),
    "client_kwargs": {*_IDENTITY, "region_name", "endpoint_url", "use_ssl"},
    "config_kwargs": {
        *("connect_timeout", "read_timeout", "max_pool_connections", "signature_version"),
        *("region_name", "s3", "retries", "use_dualstack_endpoint", "use_fips_endpoint"),
        *("request_checksum_calculation", "response_checksum_validation", "tcp_keepalive"),
    },
}
_GCS_OPTIONS: dict[str, set[str] | None] = {
    **dict.fromkeys(("project", "access", "endpoint_url", "requester_pays")),
    "token": {
        *("type", "project_id", "private_key_id", "private_key", "client_email", "client_id"),
        *("client_secret", "refresh_token", "token_uri", "auth_uri", "universe_domain"),
        *("auth_provider_x509_cert_url", "client_x509_cert_url", "access_token"),
    },
}
_AZURE_OPTIONS: dict[str, set[str] | None] = dict.fromkeys(
    (
        *("account_name", "account_key", "sas_token", "connection_string", "anon"),
        *("tenant_id", "client_id", "client_secret"),
    )
)
_KINDS = {
    **dict.fromkeys(("s3", "s3a"), (_S3, _S3_OPTIONS)),
    **dict.fromkeys(("gs", "gcs"), (_GCS, _GCS_OPTIONS)),
    **dict.fromkeys(("az", "abfs", "abfss"), (_AZURE, _AZURE_OPTIONS)),
}
# Of what names files among the variables of every kind: whom to trust is the service's to say.
_VALUES = frozenset(name for name in ALL_KINDS if name.lower().endswith("proxy"))


def lent(config: TierConfig) -> TierConfig:
    """The tier as a service may reach it for another user.

    Variables that name files stay behind, which is logged by their names. Raises UsageError for a
    kind of store, or an option, that could make more of the service's rights.
    """
    if config.kind != "store":
        return config
    scheme = scheme_of(config.path)
    if scheme not in _KINDS or "::" in config.path:
        raise UsageError(
            f"a service reaches no store at {scheme[:40]}:// for other users",
            state="nothing was done",
            actions=[
                f"schemes that it knows: {', '.join(sorted(_KINDS))}",
                "or let the trainer have an agent of its own: unset MTCKPT_AGENT_SOCKET",
            ],
            tier=config.label,
        )
    names, options = _KINDS[scheme]
    _check(config, options)
    kept = [(k, v) for k, v in config.access.environment if k in names or k in _VALUES]
    left = sorted({k for k, _ in config.access.environment} - {k for k, _ in kept})
    if left:
        logger.warning("tier %s: not taken of another user: %s", config.label, ", ".join(left))
    access: Access = msgspec.structs.replace(config.access, environment=tuple(kept))
    return msgspec.structs.replace(config, access=access)


def _check(config: TierConfig, known: Mapping[str, set[str] | None]) -> None:
    try:
        given = msgspec.json.decode(config.access.options or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("storage_options= is no JSON object", tier=config.label) from error
    refused = [
        name
        for name, value in given.items()
        if name not in known or not _may_be(name, value, known[name])
    ]
    if known is _GCS_OPTIONS and "endpoint_url" in given and "token" not in given:
        refused.append("endpoint_url")  # the service's own token would go there
    if refused:
        raise UsageError(
            f"storage_options= has what a service does not take of other users: "
            f"{', '.join(name[:40] for name in refused[:10])}",
            state="nothing was done",
            actions=["give keys as values: what names a file or a profile would be the service's"],
            tier=config.label,
        )


def _may_be(name: str, value: Any, inside: set[str] | None) -> bool:
    if inside is None:
        return value is None or isinstance(value, (bool, int, float, str))
    if not isinstance(value, dict):  # of Google's: a text is the path of a file, but for this one
        return name == "token" and value == "anon"
    kinds = ("service_account", "authorized_user", None)
    return set(value) <= inside and (name != "token" or value.get("type") in kinds)
