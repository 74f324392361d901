"""What the wrappers add, on a clock of the test's own where time is involved."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtckpt import errors
from mtckpt.errors import AlreadyExists, ObjectNotFound, TierFull, TierUnavailable
from mtckpt.testing import Fault, FaultyTier
from mtckpt.tiers import (
    BytesSource,
    DeadlineTier,
    LocalTier,
    MeteredTier,
    ObjectInfo,
    PutResult,
    RetryingTier,
    Source,
    ThrottledTier,
    Tier,
    read_all,
)
from mtckpt.tiers.wrappers import same_bytes

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that passes only in ``sleep``."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now_s += duration_s


@pytest.fixture
def local(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "root", sync=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def retrying(inner: Tier, clock: Clock, **options: object) -> RetryingTier:
    return RetryingTier(inner, sleep=clock.sleep, clock=clock, seed=1, **options)  # type: ignore[arg-type]


# -- retry -----------------------------------------------------------------------------------------


def test_retries_what_was_not_answered(local: LocalTier, clock: Clock) -> None:
    faults = [
        Fault(verb, TierUnavailable, times=3)
        for verb in ("put", "read_into", "stat", "list", "delete")
    ]
    faulty = FaultyTier(local, rules=faults)
    tier = retrying(faulty, clock)
    assert tier.put("a", BytesSource(b"abc")).size_bytes == 3
    out = bytearray(3)
    tier.read_into("a", memoryview(out))
    assert out == b"abc"
    assert tier.stat("a") == ObjectInfo("a", 3)
    assert list(tier.list()) == [ObjectInfo("a", 3)]
    tier.delete("a")
    assert list(local.list()) == []
    assert len(faulty.injected) == 15


def test_waits_longer_each_time_with_jitter(local: LocalTier, clock: Clock) -> None:
    faulty = FaultyTier(local, rules=[Fault("stat", TierUnavailable, times=None)])
    tier = retrying(faulty, clock, attempts=6, first_delay_s=1.0, max_delay_s=4.0)
    with pytest.raises(TierUnavailable, match="gave up after 6 attempts") as raised:
        tier.stat("a")
    assert raised.value.details["attempts"] == 6
    assert isinstance(raised.value.__cause__, TierUnavailable)
    for slept, delay_s in zip(clock.slept, (1, 2, 4, 4, 4), strict=True):
        assert 0.5 * delay_s <= slept <= 1.5 * delay_s
    assert (
        len({slept / delay for slept, delay in zip(clock.slept, (1, 2, 4, 4, 4), strict=True)}) > 3
    )


def test_one_deadline_covers_all_attempts(local: LocalTier, clock: Clock) -> None:
    faulty = FaultyTier(local, rules=[Fault("stat", TierUnavailable, times=None)])
    tier = retrying(faulty, clock, attempts=1000, first_delay_s=1.0, deadline_s=30)
    with pytest.raises(TierUnavailable) as raised:
        tier.stat("a")
    assert clock.now_s <= 30
    assert raised.value.details["timeout_s"] == 30
    assert len(faulty.injected) < 20


@pytest.mark.parametrize(
    "kind", [TierFull, ObjectNotFound, AlreadyExists, errors.AccessDenied, errors.TierReadOnly]
)
def test_an_answer_is_not_asked_for_again(
    local: LocalTier, clock: Clock, kind: type[errors.TierError]
) -> None:
    faulty = FaultyTier(local, rules=[Fault("put", kind, times=None)])
    with pytest.raises(kind):
        retrying(faulty, clock).put("a", BytesSource(b"x"))
    assert len(faulty.injected) == 1
    assert clock.slept == []


def test_a_broken_listing_goes_on_after_the_last_key(local: LocalTier, clock: Clock) -> None:
    for number in range(8):
        local.put(f"{number}", BytesSource(b""))
    faulty = FaultyTier(local, rules=[Fault("list", TierUnavailable, after_call=True, times=2)])
    keys = [info.key for info in retrying(faulty, clock).list()]
    assert keys == [f"{number}" for number in range(8)]
    assert len(faulty.injected) == 2


def lost_answer(local: LocalTier) -> FaultyTier:
    """The first put is carried out, and nobody hears of it."""
    return FaultyTier(local, rules=[Fault("put", TierUnavailable, after_call=True)])


def test_a_put_with_a_lost_answer_is_ours_only_when_confirmed(
    local: LocalTier, clock: Clock
) -> None:
    with pytest.raises(AlreadyExists):
        retrying(lost_answer(local), clock).put("a", BytesSource(b"abc"))
    tier = retrying(lost_answer(local), clock, confirm=same_bytes)
    assert tier.put("b", BytesSource(b"abc")) == PutResult(3)
    refused = retrying(lost_answer(local), clock, confirm=lambda *_: False)
    with pytest.raises(AlreadyExists):
        refused.put("c", BytesSource(b"abc"))


class Overtaken(FaultyTier):
    """No answer, and before the next attempt somebody else puts the key."""

    def __init__(self, inner: Tier, theirs: bytes) -> None:
        super().__init__(inner)
        self._theirs = theirs

    def put(self, key: str, source: Source) -> PutResult:
        if not list(self.inner.list()):
            self.inner.put(key, BytesSource(self._theirs))
            raise TierUnavailable("no answer", tier=self.name, key=key)
        return self.inner.put(key, source)


@pytest.mark.parametrize("theirs", [b"xyz", b"other size", b""])
def test_an_object_of_somebody_else_is_never_taken_for_ours(
    local: LocalTier, clock: Clock, theirs: bytes
) -> None:
    tier = retrying(Overtaken(local, theirs), clock, confirm=same_bytes)
    with pytest.raises(AlreadyExists):
        tier.put("a", BytesSource(b"abc"))
    assert read_all(local, "a", max_bytes=20) == theirs


def test_what_was_there_at_the_first_attempt_is_not_ours(local: LocalTier, clock: Clock) -> None:
    local.put("a", BytesSource(b"abc"))
    asked = []

    def confirm(*details: object) -> bool:
        asked.append(details)
        return True

    with pytest.raises(AlreadyExists):
        retrying(local, clock, confirm=confirm).put("a", BytesSource(b"abc"))
    assert asked == []


# -- throttle --------------------------------------------------------------------------------------


def test_bytes_move_at_the_rate_that_was_set(local: LocalTier, clock: Clock) -> None:
    tier = ThrottledTier(
        local, bytes_per_s=1 << 20, burst_bytes=1 << 20, sleep=clock.sleep, clock=clock
    )
    data = os.urandom(5 << 20)
    tier.put("a", BytesSource(data))
    assert clock.now_s == pytest.approx(4.0)  # The first MiB was saved up.
    assert read_all(tier, "a", max_bytes=len(data)) == data
    assert clock.now_s == pytest.approx(9.0)
    tier.stat("a")
    list(tier.list())
    tier.delete("a")
    assert clock.now_s == pytest.approx(9.0)


def test_all_threads_share_one_rate(local: LocalTier) -> None:
    tier = ThrottledTier(local, bytes_per_s=10e6, burst_bytes=1)
    start = time.monotonic()
    threads = [
        threading.Thread(target=tier.put, args=(f"{i}", BytesSource(bytes(500_000))), daemon=True)
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert 0.15 <= time.monotonic() - start < 5
    assert len(list(local.list())) == 4


# -- metering --------------------------------------------------------------------------------------


def test_counts_calls_bytes_seconds_and_errors(local: LocalTier, clock: Clock) -> None:
    faulty = FaultyTier(local, rules=[Fault("stat", TierUnavailable, nth=2)])

    class Slow(FaultyTier):
        def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
            clock.sleep(2.0)
            super().read_into(key, out, offset)

    tier = MeteredTier(Slow(faulty), clock=clock)
    tier.put("a", BytesSource(b"abc"))
    tier.put("b", BytesSource(b"de"))
    with pytest.raises(AlreadyExists):
        tier.put("a", BytesSource(b"abc"))
    tier.read_into("a", memoryview(bytearray(3)))
    tier.stat("a")
    with pytest.raises(TierUnavailable):
        tier.stat("a")
    assert len(list(tier.list())) == 2
    tier.delete("a")
    before = tier.snapshot()
    tier.delete("b")
    assert {verb: (c.calls, c.size_bytes, dict(c.errors)) for verb, c in before.items()} == {
        "put": (3, 5, {"AlreadyExists": 1}),
        "read_into": (1, 3, {}),
        "stat": (2, 0, {"TierUnavailable": 1}),
        "list": (1, 0, {}),
        "delete": (1, 0, {}),
    }
    assert before["read_into"].elapsed_s == 2.0


# -- deadline --------------------------------------------------------------------------------------


class Stuck:
    """A tier whose device answers only after ``release``."""

    def __init__(self, inner: LocalTier) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self.released = threading.Event()
        self.ended = threading.Semaphore(0)

    def _wait(self) -> None:
        assert self.released.wait(30)

    def put(self, key: str, source: Source) -> PutResult:
        try:
            first = source.read(0, 10)
            self._wait()
            return self.inner.put(key, BytesSource(first))
        finally:
            self.ended.release()

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        try:
            self._wait()
            self.inner.read_into(key, out, offset)
        finally:
            self.ended.release()

    def stat(self, key: str) -> ObjectInfo:
        self._wait()
        return self.inner.stat(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._wait()
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self._wait()
        self.inner.delete(key)

    def close(self) -> None:
        self._wait()


@pytest.fixture
def stuck(local: LocalTier) -> Iterator[Stuck]:
    stuck = Stuck(local)
    yield stuck
    stuck.released.set()


def test_every_verb_ends_in_time_and_says_which(stuck: Stuck) -> None:
    tier = DeadlineTier(stuck, timeout_s=0.05)
    calls: list[tuple[str, str | None, Callable[[], object]]] = [
        ("put", "a", lambda: tier.put("a", BytesSource(bytes(10)))),
        ("read_into", "a", lambda: tier.read_into("a", memoryview(bytearray(10)))),
        ("stat", "a", lambda: tier.stat("a")),
        ("list", None, lambda: tier.list()),
        ("delete", "a", lambda: tier.delete("a")),
        ("close", None, tier.close),
    ]
    for verb, key, call in calls:
        start = time.monotonic()
        with pytest.raises(TierUnavailable, match=f"{verb} did not end within 0.05 s") as raised:
            call()
        assert 0.04 < time.monotonic() - start < 2
        details = raised.value.details
        assert (details["tier"], details.get("key"), details["timeout_s"]) == ("disk", key, 0.05)


def test_a_bounded_number_of_threads_is_left_behind(stuck: Stuck, local: LocalTier) -> None:
    stuck.name = "counted"
    tier = DeadlineTier(stuck, timeout_s=0.02, max_stuck=2)
    local.put("a", BytesSource(b"x"))

    def left_behind() -> int:
        return sum("counted" in thread.name for thread in threading.enumerate())

    for _ in range(2):
        with pytest.raises(TierUnavailable, match="did not end"):
            tier.stat("a")
    for _ in range(50):
        with pytest.raises(TierUnavailable, match="2 earlier calls are stuck") as raised:
            tier.stat("a")
        assert raised.value.details["stuck"] == 2
    assert left_behind() == 2
    stuck.released.set()
    end = time.monotonic() + 10
    while left_behind():
        assert time.monotonic() < end
        time.sleep(0.005)
    assert DeadlineTier(stuck, timeout_s=20).stat("a").size_bytes == 1
    assert not tier._stuck


def test_a_late_read_touches_no_memory_of_the_caller(stuck: Stuck, local: LocalTier) -> None:
    local.put("a", BytesSource(b"0123456789"))
    out = bytearray(10)
    with pytest.raises(TierUnavailable):
        DeadlineTier(stuck, timeout_s=0.02).read_into("a", memoryview(out))
    stuck.released.set()
    assert stuck.ended.acquire(timeout=10)
    assert out == bytes(10)
    out.clear()  # Nobody has a view of it.


def test_a_late_put_stores_what_was_to_be_stored(stuck: Stuck, local: LocalTier) -> None:
    buffer = bytearray(b"0123456789")
    with pytest.raises(TierUnavailable):
        DeadlineTier(stuck, timeout_s=0.02).put("a", BytesSource(buffer))
    buffer[:] = b"RECYCLED!!"
    stuck.released.set()
    assert stuck.ended.acquire(timeout=10)
    assert read_all(local, "a", max_bytes=10) == b"0123456789"


def test_a_put_that_was_given_up_gets_no_more_bytes(local: LocalTier) -> None:
    blocked = threading.Event()
    ended = threading.Event()
    raised: list[BaseException] = []

    class TwoReads(FaultyTier):
        def put(self, key: str, source: Source) -> PutResult:
            source.read(0, 1)
            assert blocked.wait(30)
            try:
                return self.inner.put(key, source)
            except BaseException as error:
                raised.append(error)
                raise
            finally:
                ended.set()

    with pytest.raises(TierUnavailable):
        DeadlineTier(TwoReads(local), timeout_s=0.02).put("a", BytesSource(bytes(10)))
    blocked.set()
    assert ended.wait(10)
    assert isinstance(raised[0], TierUnavailable)
    assert list(local.list()) == []


def test_a_read_in_many_chunks_keeps_them_apart(local: LocalTier) -> None:
    class Numbered(FaultyTier):
        """Every MiB holds its number, and is there at once."""

        def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
            for start in range(0, len(out), 1 << 20):
                number = (offset + start) >> 20
                out[start : start + (1 << 20)] = bytes([number]) * len(
                    out[start : start + (1 << 20)]
                )

    size_bytes = (70 << 20) + 5
    out = bytearray(size_bytes)
    DeadlineTier(Numbered(local), timeout_s=30).read_into("a", memoryview(out))
    assert [len(set(out[n << 20 : (n + 1) << 20])) for n in range(71)] == [1] * 71
    assert out[:: 1 << 20] == bytes(range(71))


def test_large_transfers_get_time_for_their_bytes(local: LocalTier) -> None:
    slow = FaultyTier(local, rules=[Fault("put", delay_s=0.2), Fault("stat", delay_s=0.2)])
    tier = DeadlineTier(slow, timeout_s=0.02, min_bytes_per_s=1e6)
    tier.put("a", BytesSource(bytes(10_000_000)))
    with pytest.raises(TierUnavailable):
        tier.stat("a")


def test_errors_come_through_as_they_are(local: LocalTier) -> None:
    tier = DeadlineTier(local, timeout_s=20)
    with pytest.raises(ObjectNotFound):
        tier.read_into("absent", memoryview(bytearray(5)))
    with pytest.raises(errors.UsageError):
        tier.stat("NOT A KEY")


def test_a_stuck_thread_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    code = """
import sys, time
from mtckpt.errors import TierUnavailable
from mtckpt.testing import Fault, FaultyTier
from mtckpt.tiers import DeadlineTier, LocalTier

faulty = FaultyTier(LocalTier(sys.argv[1]), rules=[Fault("stat", delay_s=60)])
try:
    DeadlineTier(faulty, timeout_s=0.05).stat("a")
except TierUnavailable:
    print("in time")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "root")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == "in time\n"


def test_importing_tiers_stays_light() -> None:
    code = (
        "import sys; import mtckpt.tiers;"
        "print(*{'numpy', 'asyncio', 'torch', 'jax', 'fsspec', 'pytest', 'http', 'random',"
        " 'ssl', 'hashlib', 'subprocess', 'concurrent.futures'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.split() == []
