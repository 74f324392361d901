"""Object stores beyond the suite: large objects in parts, resumed, copied, aborted; what is found
where; and what a tier says when the store refuses. Against real servers."""

from __future__ import annotations

import base64
import itertools
import os
import random
import shutil
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from stores import GcsServer, S3Server

from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    Damaged,
    ObjectNotFound,
    TierError,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers import BytesSource, ObjectStoreTier, read_all
from mtckpt.tiers._checksums import Crc
from mtckpt.tiers._store import now_there_s
from mtckpt.tiers._upload import part_bytes_for

MIB = 1 << 20
PART = 5 * MIB

Make = Callable[..., ObjectStoreTier]


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def set_clock_a_month_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    there_s = time.time() + 30 * 86400
    monkeypatch.setattr(time, "time", lambda: there_s)


class Interrupted:
    """A source that fails from some offset on, as a process that dies would, and counts reads."""

    def __init__(self, data: bytes, error: BaseException | None = None, at: int = 1 << 60) -> None:
        self._data = data
        self._error = error
        self._at = at
        self.size_bytes = len(data)

    def read(self, offset: int, size_bytes: int) -> memoryview:
        if offset >= self._at and self._error is not None:
            raise self._error
        return memoryview(self._data)[offset : offset + size_bytes]


@pytest.fixture
def engine() -> str:
    """The engine of most tests here; the others are run with each."""
    return "obstore"


each_engine = pytest.mark.parametrize("engine", ["obstore", "fsspec"])


@pytest.fixture
def make_s3(s3: S3Server, engine: str) -> Iterator[Make]:
    place = s3.new_prefix()
    made = []

    def make(**settings: Any) -> ObjectStoreTier:
        settings = {"part_bytes": PART, "timeout_s": 20.0, "engine": engine, **settings}
        settings.setdefault("storage_options", s3.options)
        made.append(ObjectStoreTier(settings.pop("url", f"s3://{place}"), **settings))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


@pytest.fixture
def make_gcs(gcs: GcsServer) -> Iterator[Make]:
    place = gcs.new_prefix()
    made = []

    def make(**settings: Any) -> ObjectStoreTier:
        settings = {"part_bytes": MIB, "timeout_s": 20.0, **settings}
        made.append(ObjectStoreTier(f"gs://{place}", storage_options=gcs.options, **settings))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def uploads_of(s3: S3Server, tier: ObjectStoreTier) -> list[Any]:
    bucket, _, prefix = tier.place.partition("://")[2].partition("/")
    found = s3.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return list(found.get("Uploads", ()))


# -- large objects ---------------------------------------------------------------------------------


@each_engine
def test_a_broken_off_upload_goes_on_where_it_stopped(make_s3: Make, s3: S3Server) -> None:
    data = content(23 * MIB)
    first = make_s3(concurrency=1)
    with pytest.raises(TierUnavailable):
        first.put("run/a", Interrupted(data, TierUnavailable("the process dies"), 3 * PART))
    assert len(uploads_of(s3, first)) == 1
    assert list(first.list()) == []

    second = make_s3(concurrency=1)
    before = second.counts.requests
    second.put("run/a", BytesSource(data))
    # A probe (it is there), a look, uploads, parts, two parts sent, completed.
    assert second.counts.requests - before == 7
    assert read_all(second, "run/a", max_bytes=len(data)) == data
    assert uploads_of(s3, second) == []


def test_parts_of_other_content_are_sent_again(make_s3: Make) -> None:
    old, new = content(12 * MIB, 1), content(12 * MIB, 2)
    tier = make_s3(concurrency=1)
    with pytest.raises(TierUnavailable):
        tier.put("run/a", Interrupted(old, TierUnavailable("the process dies"), 2 * PART))
    tier.put("run/a", BytesSource(new))
    assert read_all(tier, "run/a", max_bytes=len(new)) == new


def test_parts_of_another_size_are_not_used(
    make_s3: Make, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(14 * MIB)
    tier = make_s3(concurrency=1)
    with pytest.raises(TierUnavailable):
        tier.put("run/a", Interrupted(data, TierUnavailable("the process dies"), 2 * PART))
    other = make_s3(part_bytes=6 * MIB)
    other.put("run/a", BytesSource(data))
    assert read_all(tier, "run/a", max_bytes=len(data)) == data
    assert len(uploads_of(s3, tier)) == 1, "somebody's upload in flight is left alone"
    set_clock_a_month_ahead(monkeypatch)
    assert tier.abort_uploads(older_than_s=3600) == 0
    assert tier.abort_uploads("other/", older_than_s=-60) == 0
    assert tier.abort_uploads("run/", older_than_s=-60) == 1
    assert uploads_of(s3, tier) == []


def test_a_damaged_source_leaves_no_parts(make_s3: Make, s3: S3Server) -> None:
    tier = make_s3()
    with pytest.raises(Damaged):
        tier.put("run/a", Interrupted(content(12 * MIB), Damaged("a digest differs"), PART))
    assert uploads_of(s3, tier) == []


def test_racing_uploads_of_one_key_make_no_mixture(make_s3: Make, s3: S3Server) -> None:
    """One winner, or more where the server says that they may be: never parts of two."""
    datas = [content(11 * MIB, seed) for seed in range(3)]
    tier = make_s3()
    outcomes: list[object] = [None] * 3

    def put(index: int) -> None:
        try:
            outcomes[index] = tier.put("run/a", BytesSource(datas[index]))
        except TierError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=put, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winners = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
    assert winners, outcomes
    assert not any(getattr(outcomes[i], "atomic", True) for i in winners), "only Amazon says that"
    assert all(isinstance(o, AlreadyExists) for o in outcomes if isinstance(o, Exception)), outcomes
    assert read_all(tier, "run/a", max_bytes=11 * MIB) in [datas[i] for i in winners]
    assert uploads_of(s3, tier) == []


def test_what_is_there_is_refused_before_anything_is_sent(make_s3: Make) -> None:
    tier = make_s3()
    tier.put("run/a", BytesSource(b"x"))
    with pytest.raises(AlreadyExists):
        tier.put("run/a", Interrupted(content(11 * MIB), AssertionError("asked for"), 0))


def test_the_same_parts_are_copied_inside_the_store(make_s3: Make) -> None:
    old = bytearray(content(21 * MIB))
    tier = make_s3()
    tier.put("step-1/a", BytesSource(old))
    new = bytearray(old)
    new[7 * MIB] ^= 1

    def same(start: int, stop: int) -> tuple[str, int] | None:
        return ("step-1/a", start) if new[start:stop] == old[start:stop] else None

    result = tier.put_reusing("step-2/a", BytesSource(new), same)
    assert result.copied_bytes == 16 * MIB
    tier.delete("step-1/a")
    assert read_all(tier, "step-2/a", max_bytes=len(new)) == bytes(new)


def test_a_promise_of_same_bytes_is_not_believed(make_s3: Make) -> None:
    old, new = content(12 * MIB, 1), content(12 * MIB, 2)
    tier = make_s3()
    tier.put("step-1/a", BytesSource(old))
    result = tier.put_reusing("step-2/a", BytesSource(new), lambda start, _: ("step-1/a", start))
    assert result.copied_bytes == 0
    assert read_all(tier, "step-2/a", max_bytes=len(new)) == new
    result = tier.put_reusing("step-3/a", BytesSource(new), lambda start, _: ("gone/a", start))
    assert result.copied_bytes == 0
    assert read_all(tier, "step-3/a", max_bytes=len(new)) == new


def test_parts_are_as_large_as_their_number_allows(make_s3: Make) -> None:
    tier = make_s3()
    assert tier.part_ranges(3) == [(0, 3)]
    assert tier.part_ranges(11 * MIB) == [(0, PART), (PART, 2 * PART), (2 * PART, 11 * MIB)]
    store = tier._store.parts
    assert store is not None
    for size_bytes in (PART, 50_000 * MIB, 5_000_000 * MIB):
        step = part_bytes_for(size_bytes, PART, store)
        assert -(-size_bytes // step) <= 10_000
        assert step >= PART


def test_no_more_parts_are_held_than_are_in_flight(make_s3: Make) -> None:
    held = peak = 0
    lock = threading.Lock()

    class Counted:
        size_bytes = 40 * MIB
        last = threading.local()

        def read(self, offset: int, size_bytes: int) -> memoryview:
            nonlocal held, peak
            with lock:
                held += not getattr(self.last, "has", False)
                self.last.has = True
                peak = max(peak, held)
            return memoryview(bytes(size_bytes))

    make_s3(concurrency=3).put("run/a", Counted())
    assert 1 <= peak <= 3


def test_gcs_composes_more_parts_than_one_request_takes(make_gcs: Make) -> None:
    tier = make_gcs()
    data = content(35 * MIB + 5)
    tier.put("run/a", BytesSource(data))
    assert read_all(tier, "run/a", max_bytes=len(data)) == data
    assert [info.key for info in tier.list()] == ["run/a"]
    assert tier.abort_uploads(older_than_s=-60) == 0, "parts are left over"


def test_gcs_goes_on_where_an_upload_stopped(
    make_gcs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(5 * MIB)
    tier = make_gcs(concurrency=1)
    with pytest.raises(TierUnavailable):
        tier.put("run/a", Interrupted(data, TierUnavailable("the process dies"), 3 * MIB))
    assert list(tier.list()) == []
    before = tier.counts.requests
    tier.put("run/a", BytesSource(data))
    # A look, uploads, parts there, two parts sent, composed.
    assert tier.counts.requests - before == 6
    assert read_all(tier, "run/a", max_bytes=len(data)) == data
    with pytest.raises(TierUnavailable):
        tier.put("run/b/c", Interrupted(data, TierUnavailable("the process dies"), 3 * MIB))
    set_clock_a_month_ahead(monkeypatch)
    assert tier.abort_uploads("run/b", older_than_s=3600) == 0
    assert tier.abort_uploads("run/a", older_than_s=-60) == 0
    assert tier.abort_uploads("run/b/", older_than_s=-60) == 1


@pytest.mark.parametrize(
    ("date", "now_s"),
    [("Thu, 01 Jan 1970 01:00:00 GMT", 3600.0), (None, 9.0), ("noon", 9.0)],
)
def test_ages_are_by_the_clock_of_the_store(date: str | None, now_s: float) -> None:
    assert now_there_s(date, [3.0, 9.0]) == now_s


def test_over_tls_certificates_are_checked(
    make_s3: Make, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultProxy(s3.url, tls=context) as proxy:
        options = {**s3.options, "endpoint_url": proxy.url}
        stranger = make_s3(storage_options=options, timeout_s=1.0)
        for call in every_verb(stranger)[:3]:
            with pytest.raises(TierUnavailable, match=r"(?i)certificate|ssl|error"):
                call()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        tier = make_s3(storage_options=options)
        data = content(11 * MIB)
        tier.put("run/a", BytesSource(data))
        assert read_all(tier, "run/a", max_bytes=len(data)) == data
        assert [info.key for info in tier.list()] == ["run/a"]


# -- checksums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("must_be_c", [False, True])
def test_checksums_of_parts_make_that_of_the_whole(must_be_c: bool) -> None:
    crc = Crc(must_be_c=must_be_c)
    data = content(3 * MIB + 11)
    for cuts in ([], [1], [0, 0], [MIB, MIB + 1, 2 * MIB]):
        edges = [0, *cuts, len(data)]
        parts = [data[a:b] for a, b in itertools.pairwise(edges)]
        assert crc.of_joined((crc.of(part), len(part)) for part in parts) == crc.of(data)


def test_without_awscrt_checksums_are_no_less_right(monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(3 * MIB + 11)
    fast = Crc()
    monkeypatch.setitem(__import__("sys").modules, "awscrt", None)
    assert Crc(must_be_c=True).of(data) == fast.of(data)
    assert base64.b64decode(Crc().of(b"123456789")) == bytes.fromhex("cbf43926")
    assert Crc().algorithm == "CRC32"


# -- listing ---------------------------------------------------------------------------------------


def test_lists_more_than_a_page_in_order_of_keys(make_s3: Make, s3: S3Server) -> None:
    tier = make_s3()
    tier._store.max_keys = 50  # type: ignore[attr-defined]  # a page of S3, smaller
    bucket, _, prefix = tier.place.partition("://")[2].partition("/")
    keys = sorted(f"{a}{b}{i}" for a in ("s", "s-1", "s.1", "t") for b in "/-." for i in range(36))
    client = s3.client()
    for key in keys:
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"x")
    client.put_object(Bucket=bucket, Key=f"{prefix}/Not a key", Body=b"x")
    client.put_object(Bucket=bucket, Key=f"{prefix}-other/s", Body=b"x")
    assert [info.key for info in tier.list()] == keys
    assert [info.key for info in tier.list("s-1/")] == sorted(f"s-1/{i}" for i in range(36))


def every_verb(tier: ObjectStoreTier) -> list[Callable[[], object]]:
    return [
        lambda: tier.put("a", BytesSource(b"x")),
        lambda: tier.read_into("a", memoryview(bytearray(1))),
        lambda: tier.stat("a"),
        lambda: list(tier.list()),
        lambda: tier.delete("a"),
    ]


# -- refusals --------------------------------------------------------------------------------------


@each_engine
def test_a_wrong_secret_is_access_denied_at_once(make_s3: Make, s3: S3Server) -> None:
    secret = "canary" + os.urandom(8).hex()
    tier = make_s3(storage_options={**s3.options, "secret": secret})
    for call in every_verb(tier):
        with pytest.raises(AccessDenied) as raised:
            call()
        assert secret not in f"{raised.value}{raised.value.__cause__}"
    assert tier.counts.again == 0


@each_engine
def test_who_has_no_credentials_is_told_so(
    make_s3: Make, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    options = {k: v for k, v in s3.options.items() if k not in ("key", "secret")}
    tier = make_s3(storage_options=options)
    for call in every_verb(tier):
        with pytest.raises(AccessDenied, match="NoCredentialsError"):
            call()
    # Where users of S3 keep them:
    (tmp_path / "config").write_text("[profile other]\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[other]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert make_s3(storage_options=options).put("a", BytesSource(b"x")).atomic


def test_a_token_of_gcs_that_cannot_be_checked_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, gcs: GcsServer
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    options = {**gcs.options, "token": "canary-of-a-token"}
    with pytest.raises(AccessDenied) as raised:
        ObjectStoreTier(f"gs://{gcs.new_prefix()}", storage_options=options)
    assert "canary" not in "".join(traceback.format_exception(raised.value))


def test_who_may_only_read_is_told_so(make_s3: Make, s3: S3Server) -> None:
    make_s3().put("a", BytesSource(b"x"))
    options = {**s3.options, "key": "readkey", "secret": "readsecret12"}
    reader = make_s3(storage_options=options)
    assert read_all(reader, "a", max_bytes=1) == b"x"
    assert [info.key for info in reader.list()] == ["a"]
    for size_bytes in (1, 11 * MIB):
        with pytest.raises(AccessDenied):
            reader.put("b", BytesSource(bytes(size_bytes)))
    with pytest.raises(AccessDenied):
        reader.delete("a")


@each_engine
def test_a_missing_bucket_is_no_empty_tier(make_s3: Make) -> None:
    tier = make_s3(url=f"s3://no-such-bucket-{os.urandom(4).hex()}/ckpt")
    with pytest.raises(TierUnavailable, match="bucket"):
        list(tier.list())


@each_engine
@pytest.mark.parametrize("where", ["http://127.0.0.1:9", "http://no-such-host.invalid:80"])
def test_a_store_that_is_not_there_is_unavailable_in_time(make_s3: Make, where: str) -> None:
    options = {"endpoint_url": where, "key": "k", "secret": "canary-secret"}
    tier = make_s3(storage_options=options, timeout_s=0.6)
    for call in every_verb(tier):
        with pytest.raises(TierUnavailable) as raised:
            call()
        assert not isinstance(raised.value, ObjectNotFound)
        assert "canary" not in f"{raised.value}{raised.value.__cause__}"


@pytest.mark.parametrize(
    ("url", "settings", "says"),
    [
        ("bucket/prefix", {}, "not the URL"),
        ("s3://b//c", {}, "no bucket"),
        ("s3://bucket/a/../c", {}, "no bucket"),
        ("s3://bucket/c", {"engine": "boto"}, "not an engine"),
        ("gs://bucket/c", {"engine": "obstore"}, "no faster there"),
        ("az://bucket/c", {"engine": "obstore"}, "s3:// only"),
        ("s3://bucket/c", {"engine": "obstore", "storage_options": {"acl": 1}}, "acl"),
        ("nosuch://bucket/c", {}, "cannot open"),
    ],
)
def test_what_cannot_be_right_is_refused(url: str, settings: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ObjectStoreTier(url, **settings)


def test_a_password_in_a_url_is_never_shown() -> None:
    with pytest.raises(UsageError) as raised:
        ObjectStoreTier("nosuch://user:canary-password@host/path")
    assert "canary" not in str(raised.value)


def test_a_closed_tier_is_closed(make_s3: Make) -> None:
    tier = make_s3()
    tier.close()
    with pytest.raises(UsageError, match="closed"):
        tier.stat("a")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    hidden = {"obstore", "s3fs", "gcsfs", "adlfs"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    with pytest.raises(UsageError, match=r"mtckpt\[fast\]"):
        ObjectStoreTier("s3://bucket/c", engine="obstore")
    with pytest.raises(UsageError, match=r"mtckpt\[s3\]"):
        ObjectStoreTier("s3://bucket/c")
    with pytest.raises(UsageError, match=r"mtckpt\[gcs\]"):
        ObjectStoreTier("gs://bucket/c")
