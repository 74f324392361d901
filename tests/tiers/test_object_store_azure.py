"""Azure beyond the suite: who asks and what it is told, what is resumed. Against Azurite."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from stores import ACCOUNT, AzureServer

from mtckpt._access import check_url
from mtckpt.errors import AccessDenied, AlreadyExists, TierUnavailable, UsageError
from mtckpt.tiers import BytesSource, ObjectStoreTier, read_all
from mtckpt.tiers._store import Kind, Refused
from mtckpt.tiers._store_http import Answer

MIB = 1 << 20


@contextlib.contextmanager
def opened(url: str, options: dict[str, Any], **settings: Any) -> Iterator[ObjectStoreTier]:
    with contextlib.closing(
        ObjectStoreTier(url, storage_options=options, timeout_s=10.0, **settings)
    ) as tier:
        yield tier


def signed(azure: AzureServer, rights: str, left_s: float = 600.0) -> str:
    """A shared access signature of the container."""
    from azure.storage.blob import generate_container_sas

    now = datetime.now(timezone.utc)
    return generate_container_sas(
        ACCOUNT,
        "test",
        account_key=azure.key,
        permission=rights,
        start=now - timedelta(hours=1),
        expiry=now + timedelta(seconds=left_s),
    )


class Interrupted:
    """A source that fails from 3 MiB on, as a process that dies would."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)

    def read(self, offset: int, size_bytes: int) -> memoryview:
        if offset >= 3 * MIB:
            raise TierUnavailable("the process dies")
        return memoryview(self._data)[offset : offset + size_bytes]


def test_an_upload_goes_on_where_it_stopped(azure: AzureServer) -> None:
    data = random.Random(1).randbytes(5 * MIB)
    url = f"abfs://{azure.new_prefix()}/"
    with opened(url, azure.options, part_bytes=MIB, concurrency=1) as tier:
        with pytest.raises(TierUnavailable):
            tier.put("run/a", Interrupted(data))
        assert list(tier.list()) == []
        before = tier.counts.requests
        tier.put("run/a", BytesSource(data))
        # A look, uploads, the parts that are there, two parts sent, the list, and a look.
        assert tier.counts.requests - before == 7
        assert read_all(tier, "run/a", max_bytes=len(data)) == data
        # Azure throws away by itself what is never completed: there is nothing to abort.
        assert tier.abort_uploads(older_than_s=-60) == 0


def test_a_signature_opens_what_it_is_for_and_is_never_shown(
    azure: AzureServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    place = azure.new_prefix()
    shown = ""
    for rights, left_s, says in (
        ("racwdl", 600.0, ""),
        ("rl", 600.0, "AuthorizationPermissionMismatch"),
        ("racwdl", -60.0, "AuthorizationFailure"),
    ):
        signature = signed(azure, rights, left_s)
        who = f"SharedAccessSignature={signature}"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure.connection_string(who=who))
        with opened(f"az://{place}", {}) as tier:
            shown += repr(tier)
            if says:
                with pytest.raises(AccessDenied, match=says) as raised:
                    tier.put("run/b", BytesSource(b"y"))
                shown += "".join(traceback.format_exception(raised.value))
            else:
                tier.put("run/a", BytesSource(b"x"))
                with pytest.raises(AlreadyExists):
                    tier.put("run/a", BytesSource(b"y"))
            if left_s > 0:
                assert read_all(tier, "run/a", max_bytes=9) == b"x"
                assert [info.key for info in tier.list()] == ["run/a"]
        secret = signature.rpartition("sig=")[2].partition("&")[0]
        assert len(secret) > 20
        assert secret not in shown + caplog.text


def test_what_is_wrong_is_named(azure: AzureServer) -> None:
    other = AzureServer(azure.url, "b3RoZXJrZXk=")
    with (
        opened(f"az://{azure.new_prefix()}", other.options) as tier,
        pytest.raises(AccessDenied, match="AuthorizationFailure"),
    ):
        tier.stat("a")
    # A container that is not there is no empty one: a run would begin at nought.
    with opened(f"az://nowhere{os.urandom(4).hex()}/x", azure.options) as tier:
        for call in (lambda: list(tier.list()), lambda: tier.put("a", BytesSource(b"x"))):
            with pytest.raises(TierUnavailable, match="ContainerNotFound"):
                call()
    with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        ObjectStoreTier("az://test/x")


@pytest.mark.parametrize(
    ("status", "code", "detail", "kind"),
    [
        (403, "AuthenticationFailed", "Expiry [Fri, 27 Nov 2026]", Kind.EXPIRED),
        (401, "InvalidAuthenticationInfo", "", Kind.EXPIRED),
        (403, "AuthenticationFailed", "Request date header too old: 'Fri, 27 Nov'", Kind.SKEWED),
        (403, "AuthenticationFailed", "The MAC signature is another one", Kind.DENIED),
        (409, "BlobImmutableDueToPolicy", "", Kind.DENIED),
        (409, "BlobAlreadyExists", "", Kind.TAKEN),
        (412, "ConditionNotMet", "", Kind.TAKEN),
        (404, "", "", Kind.MISSING),
        (503, "ServerBusy", "", Kind.THROTTLED),
        (500, "OperationTimedOut", "", Kind.UNREACHABLE),
    ],
)
def test_answers_of_azure(status: int, code: str, detail: str, kind: Kind) -> None:
    """Of which Azurite gives but some."""
    tier = ObjectStoreTier("az://test/x", storage_options={"account_name": "x", "anon": True})
    store: Any = tier._store
    about = f"<AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail>"
    body = f"\ufeff<?xml version='1.0'?><Error><Code>{code}</Code>{about}</Error>".encode()
    answer = Answer(status, {"x-ms-error-code": code}, body if detail else b"", 0)
    assert store._refused(answer).kind is kind


def test_the_store_compares_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back of a large object is what was said of it: only this compares its bytes."""
    tier = ObjectStoreTier("az://test/x", storage_options={"account_name": "x", "anon": True})
    store: Any = tier._store
    view = memoryview(b"some bytes")
    checksum = store.checksum_of(view)
    sent: list[str] = []
    kept = {"content-md5": checksum}

    def request(method: str, url: str, headers: Mapping[str, str], **_: Any) -> Answer:
        sent.append(headers["Content-MD5"])
        return Answer(201, {"x-ms-request-id": "1", **kept}, b"", 0)

    monkeypatch.setattr(store._http, "request", request)
    upload = store.begin("test/x/a", 5.0)
    store.create("test/x/a", [view], 5.0)
    assert store.send(upload, 1, view, checksum, 5.0).checksum == checksum
    assert sent == [checksum, checksum]
    kept["content-md5"] = store.checksum_of(memoryview(b"other"))
    for call, arguments in (
        (store.create, ("test/x/a", [view], 5.0)),
        (store.send, (upload, 1, view, checksum, 5.0)),
    ):
        with pytest.raises(Refused) as refused:
            call(*arguments)
        assert refused.value.kind is Kind.CORRUPTED


def test_an_account_may_stand_in_the_url() -> None:
    """As Azure's own tools write it: that is a place, and no secret. A password would be one."""
    url = "abfss://container@account.dfs.core.windows.net/some/where"
    assert check_url(f"{url}/") == url
    with opened(url, {"anon": True}) as tier:
        assert tier.place == "az://container/some/where"
        assert "//account.blob." in tier._store._fs.service_client.url  # type: ignore[attr-defined]
    for wrong in ("abfss://a:b@account.dfs.core.windows.net/x", "abfss://a@b/x", "s3://a@b/x"):
        with pytest.raises(UsageError, match="more in it than a place"):
            check_url(wrong)


@pytest.mark.parametrize("kind", ["az", "abfs", "abfss"])
def test_keys_may_have_any_prefix(azure: AzureServer, kind: str) -> None:
    url = f"{kind}://{azure.new_prefix()}/a b/100%25/é"
    with opened(url, azure.options) as tier:
        tier.put("run/a", BytesSource(b"x"))
        assert read_all(tier, "run/a", max_bytes=9) == b"x"
        assert [info.key for info in tier.list("run/")] == ["run/a"]
        tier.delete("run/a")
        assert list(tier.list()) == []
