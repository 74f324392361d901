"""What a service takes of another user's access to a store, and what would be more than its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtckpt._access import Access
from mtckpt.agent.borrowing import lent
from mtckpt.agent.protocol import TierConfig
from mtckpt.errors import UsageError


def store(url: str = "s3://bucket/x", environment: Any = (), **options: Any) -> TierConfig:
    said = json.dumps(options) if options else ""
    return TierConfig(
        "store", "store", url, [{"last": 3}], Access("auto", said, tuple(sorted(environment)))
    )


@pytest.mark.parametrize(
    ("url", "kept", "left"),
    [
        (
            "s3://b/x",
            ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "HTTPS_PROXY"],
            # credential_process of a configuration is a command.
            [
                *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
                *("AWS_PROFILE", "LD_PRELOAD", "PYTHONPATH", "SSL_CERT_FILE", "FSSPEC_S3_PROFILE"),
            ],
        ),
        (
            "gs://b/x",
            ["GOOGLE_CLOUD_PROJECT"],
            [
                *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES"),
                *("CLOUDSDK_PYTHON", "AWS_ACCESS_KEY_ID", "STORAGE_EMULATOR_HOST"),
            ],
        ),
        ("az://b/x", ["AZURE_STORAGE_ACCOUNT_KEY"], ["AZURE_FEDERATED_TOKEN_FILE"]),
    ],
)
def test_values_are_taken_and_files_are_not(
    url: str, kept: list[str], left: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    given = store(url, [(name, f"value of {name}") for name in kept + left])
    taken = lent(given)
    assert [name for name, _ in taken.access.environment] == sorted(kept)
    assert (taken.path, taken.keep) == (given.path, given.keep)
    assert all(name in caplog.text for name in left)
    assert "value of" not in caplog.text


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://b/x", {"key": "k", "secret": "s", "client_kwargs": {"region_name": "x"}}),
        ("s3://b/x", {"config_kwargs": {"retries": {"max_attempts": 1}}, "anon": True}),
        ("gs://b/x", {"token": {"type": "service_account", "private_key": "k"}}),
        ("gs://b/x", {"token": "anon", "endpoint_url": "http://x"}),
        ("abfs://b/x", {"account_name": "a", "account_key": "k"}),
    ],
)
def test_keys_as_values_are_taken(url: str, options: dict[str, Any]) -> None:
    assert lent(store(url, **options)) == store(url, **options)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://b/x", {"profile": "admin"}),
        ("s3://b/x", {"client_kwargs": {"verify": "/etc/shadow"}}),
        ("s3://b/x", {"config_kwargs": {"client_cert": "/keys/one"}}),
        ("s3://b/x", {"key": {"a": 1}}),
        ("gs://b/x", {"token": "/home/agent/key.json"}),
        ("gs://b/x", {"token": "google_default"}),
        ("gs://b/x", {"token": {"type": "external_account"}}),
        ("gs://b/x", {"token": {"credential_source": {"executable": {}}}}),
        ("gs://b/x", {"endpoint_url": "http://attacker"}),
        ("az://b/x", {"account_host": "attacker"}),
    ],
)
def test_what_would_be_the_services_is_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="does not take of other users") as caught:
        lent(store(url, **options))
    assert "/home/agent" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc", "sftp://h/x", "reference://x", "s3://b/x::file:///etc", "dask://x"]
)
def test_other_kinds_of_store_are_the_trainers_own_affair(url: str) -> None:
    with pytest.raises(UsageError, match="reaches no store at"):
        lent(store(url))


def test_a_directory_is_as_it_is() -> None:
    disk = TierConfig("disk", "disk", "/d")
    assert lent(disk) is disk
