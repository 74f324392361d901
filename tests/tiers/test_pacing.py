"""How fast a store is asked, on a clock of the test's own."""

from __future__ import annotations

import threading

import pytest

from mtckpt.errors import TierUnavailable
from mtckpt.tiers._pacing import Backoff, Bucket, Deadline
from mtckpt.tiers._requests import Requests, Rules
from mtckpt.tiers._store import Kind, Refused, error_of, kind_of_status, redacted


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_backoff(clock: Clock) -> Backoff:
    return Backoff(sleep=clock.sleep, clock=clock, seed=1)


def test_every_refusal_doubles_the_pause_and_every_success_halves_it(clock: Clock) -> None:
    backoff = make_backoff(clock)
    pauses = []
    for _ in range(9):
        backoff.throttled()
        backoff.throttled()  # By a request that was asked before the pause: it says nothing new.
        pauses.append(backoff.pause_left_s())
        clock.now_s += pauses[-1]
    expected_s = [min(10.0, 0.1 * 2**turn) for turn in range(9)]
    assert all(e / 2 <= p <= e * 1.5 for p, e in zip(pauses, expected_s, strict=True)), pauses
    for _ in range(8):
        backoff.went_well()
    deadline = Deadline(10.0, clock)
    with backoff.turn(deadline), backoff.turn(deadline):
        pass  # Two at a time again.


def test_one_request_asks_for_all_after_a_pause(clock: Clock) -> None:
    backoff = make_backoff(clock)
    backoff.throttled()
    clock.now_s += 1.0
    inside = threading.Event()
    entered: list[int] = []

    def second() -> None:
        with backoff.turn(Deadline(30.0)):
            entered.append(2)
        inside.set()

    with backoff.turn(Deadline(30.0)):
        entered.append(1)
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert not inside.wait(0.05)
        backoff.went_well()
    assert inside.wait(10)
    thread.join(10)
    assert entered == [1, 2]


def test_a_pause_that_outlasts_the_deadline_is_not_begun(clock: Clock) -> None:
    backoff = make_backoff(clock)
    assert backoff.pause(1, Deadline(1.0, clock))
    assert not backoff.pause(20, Deadline(1.0, clock))
    assert len(clock.slept) == 1


def test_time_spent_keeping_within_a_cap_is_not_held_against_the_store(clock: Clock) -> None:
    bucket = Bucket(10.0, 0.0, clock.sleep, clock)
    requests = Requests("store", "s3://b", Rules(5.0, 1.0, 100.0), lambda: False, bucket)
    deadline = Deadline(5.0, clock)
    assert requests.ask("send", "a", deadline, lambda _: "done", size_bytes=300) == "done"
    assert clock.slept == [30.0]
    assert deadline.left_s == pytest.approx(5.0)


def test_what_is_final_is_asked_once_and_the_rest_until_the_deadline(clock: Clock) -> None:
    rules = Rules(5.0, 0.1, 1e9)
    backoff = make_backoff(clock)
    requests = Requests("store", "s3://b", rules, lambda: True, backoff=backoff)
    tried: list[Kind] = []

    def fail(kind: Kind) -> None:
        tried.append(kind)
        raise Refused(kind, "no")

    final = set(Kind) - {Kind.THROTTLED, Kind.UNREACHABLE, Kind.CORRUPTED, Kind.EXPIRED}
    for kind in set(Kind) - {Kind.THROTTLED}:  # whose pause is waited for on the real clock
        tried.clear()
        deadline = Deadline(5.0, clock)
        with pytest.raises(Refused):
            requests.ask("ask", "a", deadline, lambda _, kind=kind: fail(kind))  # type: ignore[misc]
        assert (len(tried) == 1) == (kind in final), kind
        if kind is Kind.EXPIRED:
            assert len(tried) == 2, "credentials are read again once"
    with pytest.raises(TierUnavailable) as raised:
        requests.make("ask", "a", Deadline(5.0, clock), lambda _: fail(Kind.UNREACHABLE))
    assert raised.value.details["timeout_s"] == 5.0


def test_every_kind_is_an_error_of_ours() -> None:
    for kind in Kind:
        error = error_of(Refused(kind, "said"), "what", tier="store", key="a")
        assert error.details["tier"] == "store"
        assert str(error.__cause__) == "said"
    for status in (400, 401, 403, 404, 408, 409, 412, 416, 429, 500, 502, 503, 599):
        assert kind_of_status(status) in Kind


@pytest.mark.parametrize(
    "text",
    [
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=CANARY%2F2026&X-Amz-Signature=CANARY1",
        "headers={'Authorization': 'AWS4-HMAC-SHA256 Credential=CANARY/x, Signature=CANARY'}",
        "Authorization: Bearer ya29.CANARY",
        "x-amz-security-token: CANARY",
        "<AWSAccessKeyId>CANARY</AWSAccessKeyId><StringToSign>CANARY</StringToSign>",
        "https://user:CANARY@host/path",
        "https://oauth2.googleapis.com/tokeninfo?access_token=CANARY",
        '{"refresh_token": "CANARY", "client": 1}',
        "sig=CANARY&se=2026",
        "the secret CANARY itself",
    ],
)
def test_what_carries_a_credential_is_hidden(text: str) -> None:
    assert "CANARY" not in redacted(text, ["CANARY"] if text.startswith("the") else [])
    assert redacted("404 NoSuchKey: The specified key does not exist.").startswith("404 NoSuchKey")
