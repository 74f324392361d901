"""What goes wrong between a tier and its store, one thing at a time, then all at once: nothing
partial is seen, nothing acknowledged is lost, every call ends in time, and no secret is shown."""

from __future__ import annotations

import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from stores import AzureServer, GcsServer, S3Server

from mtckpt.errors import AccessDenied, AlreadyExists, TierError, TierUnavailable
from mtckpt.tiers import BytesSource, ObjectStoreTier, read_all

MIB = 1 << 20
PART = 5 * MIB
# The request that shows an object: a PUT of all, a completion, a composition, an upload, a list.
SHOWS = (
    r"^PUT .*/run/a($|\?X-Amz|\?x-id)|^POST .*uploadId=|/compose|^POST .*/upload/|comp=blocklist$"
)


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


class Scene:
    """A tier behind a proxy in front of a real server, and a tier that sees the truth."""

    def __init__(
        self,
        proxy: FaultProxy,
        open_tier: Callable[[str, dict[str, Any]], ObjectStoreTier],
        upstream: str,
    ) -> None:
        self.proxy = proxy
        self._open = open_tier
        self.tier = self.open()
        self.truth = open_tier(upstream, {})
        # The probe is behind us, and what comes next is what the tests count.
        self.tier.capabilities()
        proxy.seen.clear()

    def open(self, **settings: Any) -> ObjectStoreTier:
        return self._open(self.proxy.url, settings)

    def close(self) -> None:
        self.tier.close()
        self.truth.close()


STORES = ["obstore", "fsspec", "gcs"]
on_each = pytest.mark.parametrize(
    "kind_of_store", [*STORES, pytest.param("azure", marks=pytest.mark.torture)]
)
on_each_always = pytest.mark.parametrize("kind_of_store", [*STORES, "azure"])
on_s3 = pytest.mark.parametrize("kind_of_store", ["obstore", "fsspec"])


@pytest.fixture
def kind_of_store() -> str:
    """What most tests here run on; the others run on each."""
    return "obstore"


@pytest.fixture
def scene(request: pytest.FixtureRequest, seed: int, kind_of_store: str) -> Iterator[Scene]:
    name = kind_of_store if kind_of_store in ("gcs", "azure") else "s3"
    server: Any = request.getfixturevalue(name)
    place = server.new_prefix()

    def open_tier(url: str, settings: dict[str, Any]) -> ObjectStoreTier:
        options = {"timeout_s": 20.0, "stall_s": 1.0, "part_bytes": PART, **settings}
        if isinstance(server, AzureServer):
            own = {"connection_string": server.connection_string(url)}
            return ObjectStoreTier(f"az://{place}", **{"storage_options": own, **options})
        options.setdefault("storage_options", {**server.options, "endpoint_url": url})
        if isinstance(server, GcsServer):
            return ObjectStoreTier(f"gs://{place}", **options)
        return ObjectStoreTier(f"s3://{place}", engine=kind_of_store, **options)  # type: ignore[arg-type]

    with FaultProxy(server.url, seed=seed) as proxy:
        scene = Scene(proxy, open_tier, server.url)
        yield scene
        scene.close()


def test_throttling_is_waited_out(scene: Scene) -> None:
    data = content(11 * MIB)
    scene.proxy.set(Fault("answer", "^(PUT|POST) ", times=4))
    scene.tier.put("run/a", BytesSource(data))
    scene.proxy.set(Fault("answer", "^GET ", times=2))
    assert read_all(scene.tier, "run/a", max_bytes=len(data)) == data
    assert scene.tier.counts.throttled >= 5


def test_after_slow_down_all_threads_pause(scene: Scene) -> None:
    scene.proxy.set(Fault("answer", times=None))
    tier = scene.open(timeout_s=1.5, min_bytes_per_s=1e12)
    with pytest.raises(TierUnavailable) as raised:
        tier.read_into("run/a", memoryview(bytearray(200 * MIB)))
    assert raised.value.details["timeout_s"] == 1.5
    assert "503" in str(raised.value)
    # Eight at the start; then one after each pause. Each by itself would ask some four times.
    assert len(scene.proxy.seen) <= 8 + 5
    tier.close()


@on_each
@pytest.mark.parametrize("kind", ["lost", "late"])
@pytest.mark.parametrize("size_bytes", [1000, 11 * MIB])
def test_a_lost_answer_is_no_conflict(scene: Scene, kind: Any, size_bytes: int) -> None:
    data = content(size_bytes)
    scene.proxy.set(Fault(kind, SHOWS, status=500, code="InternalError"))
    assert scene.tier.put("run/a", BytesSource(data)).size_bytes == size_bytes
    assert scene.proxy.hits()[kind] == 1
    assert read_all(scene.truth, "run/a", max_bytes=size_bytes) == data
    assert [info.key for info in scene.truth.list()] == ["run/a"]


@on_each
@pytest.mark.parametrize("size_bytes", [1000, 11 * MIB])
def test_the_object_of_another_after_a_lost_answer_is_a_conflict(
    scene: Scene, size_bytes: int
) -> None:
    class Raced:
        """While it is read, another writer stores other bytes of the same size."""

        def __init__(self) -> None:
            self.size_bytes = size_bytes

        def read(self, offset: int, wanted: int) -> memoryview:
            if offset + wanted >= size_bytes:
                scene.truth.put("run/a", BytesSource(content(size_bytes, 2)))
            return memoryview(content(size_bytes, 1))[offset : offset + wanted]

    scene.proxy.set(Fault("refused", SHOWS))
    tier = scene.open(concurrency=1)
    with pytest.raises(AlreadyExists):
        tier.put("run/a", Raced())
    tier.close()
    assert read_all(scene.truth, "run/a", max_bytes=size_bytes) == content(size_bytes, 2)


@on_each
@pytest.mark.parametrize("kind", ["cut", "short", "other_range"])
def test_an_answer_that_is_not_what_was_asked_for_is_asked_again(scene: Scene, kind: Any) -> None:
    data = content(40_000)
    scene.truth.put("run/a", BytesSource(data))
    scene.proxy.set(Fault(kind, "^GET "))
    out = bytearray(20_000)
    scene.tier.read_into("run/a", memoryview(out), 10_000)
    assert out == data[10_000:30_000]
    assert scene.proxy.hits()[kind] == 1


def test_bytes_that_are_wrong_are_not_this_tiers_to_notice(scene: Scene) -> None:
    """A flipped bit passes here, and is found by the digests of whoever asked: one request."""
    data = content(4_000)
    scene.truth.put("run/a", BytesSource(data))
    scene.proxy.set(Fault("wrong", "^GET "))
    out = bytearray(4_000)
    scene.tier.read_into("run/a", memoryview(out))
    assert sum(a != b for a, b in zip(out, data, strict=True)) == 1


@on_each
@pytest.mark.parametrize("verb", ["put", "read", "list"])
def test_a_stalled_connection_is_given_up(scene: Scene, verb: str) -> None:
    data = content(40_000)
    if verb != "put":
        scene.truth.put("run/a", BytesSource(data))
    tier = scene.open(timeout_s=20.0, stall_s=0.5)
    tier.capabilities()
    scene.proxy.set(Fault("stall"))
    start = time.monotonic()
    if verb == "put":
        tier.put("run/a", BytesSource(data))
    elif verb == "read":
        assert read_all(tier, "run/a", max_bytes=len(data)) == data
    elif verb == "stat":
        assert tier.stat("run/a").size_bytes == len(data)
    elif verb == "list":
        assert [info.key for info in tier.list()] == ["run/a"]
    else:
        tier.delete("run/a")
    assert time.monotonic() - start < 20
    assert scene.proxy.hits()["stall"] == 1
    tier.close()


@on_each
def test_a_byte_now_and_then_keeps_no_read_alive(scene: Scene) -> None:
    data = content(40_000)
    scene.truth.put("run/a", BytesSource(data))
    tier = scene.open(timeout_s=20.0, stall_s=0.5, min_bytes_per_s=100 * MIB)
    scene.proxy.set(Fault("trickle", "^GET "))
    out = bytearray(40_000)
    tier.read_into("run/a", memoryview(out))
    assert out == data
    assert scene.proxy.hits()["trickle"] == 1
    tier.close()


def test_a_store_that_stalls_for_ever_is_unavailable_in_time(scene: Scene) -> None:
    tier = scene.open(timeout_s=1.0, stall_s=0.3)
    scene.proxy.set(Fault("stall", times=None))
    with pytest.raises(TierUnavailable):
        tier.stat("run/a")
    with pytest.raises(TierUnavailable):
        list(tier.list())
    tier.close()


def test_a_killed_upload_is_not_seen(scene: Scene) -> None:
    scene.proxy.set(
        Fault("answer", r"^POST .*uploadId=|/compose", times=None, status=500, code="InternalError")
    )
    tier = scene.open(timeout_s=0.5, min_bytes_per_s=100 * MIB)
    with pytest.raises(TierUnavailable):
        tier.put("run/a", BytesSource(content(11 * MIB)))
    assert list(scene.truth.list()) == []
    scene.proxy.set()
    tier.put("run/a", BytesSource(content(11 * MIB)))
    assert read_all(scene.truth, "run/a", max_bytes=11 * MIB) == content(11 * MIB)
    assert scene.truth.abort_uploads(older_than_s=-60) == 0
    tier.close()


def test_a_store_that_replaces_is_weak(scene: Scene) -> None:
    """One that answers 200 to every put, as those do that know no conditions."""
    tier = scene.open()
    put = tier._store._wire.send  # type: ignore[attr-defined]  # the request, without its condition

    def unconditional(*args: Any, IfNoneMatch: str = "", **params: Any) -> Any:
        return put(*args, **params)

    tier._store._wire.send = unconditional  # type: ignore[attr-defined]
    assert not tier.capabilities().conditional_put
    assert not tier.put("run/a", BytesSource(b"x")).atomic
    with pytest.raises(AlreadyExists):
        tier.put("run/a", BytesSource(b"y"))
    assert read_all(scene.truth, "run/a", max_bytes=1) == b"x"
    tier.close()


@on_s3
@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied", "RequestTimeTooSkewed"])
def test_expired_credentials_are_read_once_more(
    scene: Scene, s3: S3Server, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    options = {k: v for k, v in s3.options.items() if k not in ("key", "secret")}
    tier = scene.open(storage_options={**options, "endpoint_url": scene.proxy.url})
    tier.put("run/a", BytesSource(b"x"))
    status = 400 if code == "ExpiredToken" else 403
    scene.proxy.set(Fault("answer", "^PUT ", times=1, status=status, code=code))
    if code == "ExpiredToken":
        tier.put("run/b", BytesSource(b"x"))
        scene.proxy.set(Fault("answer", "^PUT ", times=None, status=status, code=code))
    scene.proxy.seen.clear()
    with pytest.raises(AccessDenied, match=code):
        tier.put("run/c", BytesSource(b"x"))
    assert len(scene.proxy.seen) == (2 if code == "ExpiredToken" else 1), "no retry storm"
    # The answer to HEAD has no body, and so no code: "400 Bad Request" is all that S3 says there.
    faults = [Fault("answer", f"^{verb} ", status=status, code=code) for verb in ("HEAD", "GET")]
    scene.proxy.set(*faults)
    if code == "ExpiredToken":
        assert tier.stat("run/a").size_bytes == 1
    else:
        with pytest.raises(AccessDenied, match=code) as raised:
            tier.stat("run/a")
        assert ("clock" in str(raised.value)) == (code == "RequestTimeTooSkewed")
    tier.close()


def test_a_stale_listing_hides_nothing_for_ever(scene: Scene) -> None:
    scene.truth.put("run/a", BytesSource(b"x"))
    assert [info.key for info in scene.tier.list()] == ["run/a"]
    scene.truth.put("run/b", BytesSource(b"y"))
    scene.proxy.set(Fault("stale", r"^GET .*(list-type|/o\?)"))
    assert [info.key for info in scene.tier.list()] == ["run/a"]
    # A key that is asked for by its name is found whatever a listing says.
    assert scene.tier.stat("run/b").size_bytes == 1
    assert [info.key for info in scene.tier.list()] == ["run/a", "run/b"]


@pytest.mark.parametrize(
    "kind_of_store", ["obstore", "fsspec", pytest.param("azure", marks=pytest.mark.torture)]
)
def test_a_page_of_something_else_is_no_empty_listing(scene: Scene) -> None:
    """A proxy that wants a password answers 200 as well, with a text of its own."""
    scene.truth.put("run/a", BytesSource(b"x"))
    scene.proxy.set(Fault("answer", "^GET ", times=2, status=200, code="SignInHere"))
    assert [info.key for info in scene.tier.list()] == ["run/a"]
    assert scene.proxy.hits()["answer"] == 2
    scene.proxy.set(Fault("answer", "^GET ", times=None, status=200, code="SignInHere"))
    tier = scene.open(timeout_s=0.5)
    with pytest.raises(TierUnavailable, match="200, but it is no store's"):
        list(tier.list())
    tier.close()


def chaos() -> list[Fault]:
    return [
        Fault("answer", times=None, chance=5),
        Fault("lost", "^(PUT|POST) ", times=None, chance=1),
        Fault("late", "^(PUT|POST) ", times=None, chance=1, status=500, code="InternalError"),
        Fault("cut", "^GET ", times=None, chance=1),
        Fault("short", "^GET ", times=None, chance=1),
    ]


def run_chaos(scene: Scene, seed: int, turns: int) -> None:
    """Puts, reads and deletes under faults: a dict says what has to be there."""
    chance = random.Random(seed)
    tier = scene.open(timeout_s=30.0, concurrency=4)
    tier.capabilities()
    scene.proxy.set(*chaos())
    scene.proxy.seen.clear()
    model: dict[str, bytes] = {}
    for turn in range(turns):
        key = f"run/{turn}"
        large = turn % 20 == 19
        data = content(11 * MIB if large else chance.randrange(100_000), seed + turn)
        tier.put(key, BytesSource(data))
        model[key] = data
        again = chance.choice(sorted(model))
        assert read_all(tier, again, max_bytes=len(model[again])) == model[again]
        with pytest.raises(AlreadyExists):
            tier.put(again, BytesSource(b"another"))
        if chance.random() < 0.2:
            gone = chance.choice(sorted(model))
            tier.delete(gone)
            del model[gone]
    listed = {info.key: info.size_bytes for info in tier.list()}
    assert listed == {key: len(data) for key, data in model.items()}
    for key, data in model.items():
        assert read_all(scene.truth, key, max_bytes=len(data)) == data
    faults = sum(1 for one in scene.proxy.seen if one.fault is not None)
    assert len(scene.proxy.seen) <= 1.3 * (len(scene.proxy.seen) - faults)
    tier.close()


@on_each_always
def test_chaos(scene: Scene, seed: int) -> None:
    run_chaos(scene, seed, 20)


@pytest.mark.torture
@pytest.mark.timeout(3600)
@on_each
def test_much_chaos(scene: Scene, seed: int) -> None:
    run_chaos(scene, seed, 1000)


def every_verb(tier: ObjectStoreTier) -> list[Callable[[], object]]:
    return [
        lambda: tier.put("a", BytesSource(b"x")),
        lambda: tier.read_into("a", memoryview(bytearray(1))),
        lambda: tier.stat("a"),
        lambda: list(tier.list()),
        lambda: tier.delete("a"),
    ]


@on_each_always
def test_no_secret_is_shown_whatever_goes_wrong(
    scene: Scene,
    request: pytest.FixtureRequest,
    kind_of_store: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Canaries as key, secret and token, through every kind of failure, at the loudest logging."""
    canaries = [f"canary{os.urandom(8).hex()}" for _ in range(3)]
    options = {"token": canaries[0], "project": "test", "endpoint_url": scene.proxy.url}
    if kind_of_store == "gcs":
        monkeypatch.setenv("FETCH_RAW_TOKEN_EXPIRY", "false")
    elif kind_of_store == "azure":
        azure: AzureServer = request.getfixturevalue("azure")
        who = f"SharedAccessSignature=sv=2021-12-02&sp=rwl&sig={canaries[0]}%2B{canaries[1]}"
        options = {"connection_string": azure.connection_string(scene.proxy.url, who)}
    else:
        s3: S3Server = request.getfixturevalue("s3")
        given = dict(zip(("key", "secret", "token"), canaries, strict=True))
        options = {**s3.options, **given, "endpoint_url": scene.proxy.url}
    shown = []
    caplog.set_level(logging.DEBUG)
    kinds: list[Fault] = [
        Fault("answer", times=None, status=403, code="SignatureDoesNotMatch"),
        Fault("answer", times=None, status=400, code="ExpiredToken"),
        Fault("answer", times=None),
        Fault("answer", times=None, status=301, code="PermanentRedirect"),
        Fault("refused", times=None),
        Fault("stall", times=None),
    ]
    if kind_of_store != "gcs":  # which lets everybody in
        kinds += [Fault("cut", times=None), Fault("answer", nth=10_000)]
    for fault in kinds:
        scene.proxy.set(fault)
        tier = scene.open(storage_options=options, timeout_s=0.15, stall_s=0.1)
        shown.append(repr(tier))
        for call in every_verb(tier):
            with pytest.raises(TierError) as raised:
                call()
            shown += traceback.format_exception(raised.value)
            shown.append(repr(vars(raised.value)))
        tier.close()
    text = "".join(shown) + caplog.text
    assert len(text) > 10_000
    for canary in canaries:
        assert canary not in text
