"""Faults on purpose happen when told, every time the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtckpt.errors import ObjectNotFound, ShortRead, TierFull, TierUnavailable
from mtckpt.testing import CrashPoint, Fault, FaultyTier
from mtckpt.tiers import BytesSource, LocalTier

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def local(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "root", sync=False)
    tier.put("a", BytesSource(bytes([255]) * 20_000))
    return tier


def read(tier: FaultyTier, offset: int = 0, size_bytes: int = 20_000) -> bytearray:
    out = bytearray(size_bytes)
    tier.read_into("a", memoryview(out), offset)
    return out


def test_the_nth_call_fails_once_or_for_ever(local: LocalTier) -> None:
    rules = [Fault("stat", TierUnavailable, nth=2), Fault("delete", TierFull, nth=3, times=None)]
    tier = FaultyTier(local, rules=rules)
    tier.stat("a")
    with pytest.raises(TierUnavailable) as raised:
        tier.stat("a")
    assert (raised.value.details["tier"], raised.value.details["key"]) == ("disk", "a")
    tier.stat("a")
    tier.delete("x")
    tier.delete("x")
    for _ in range(3):
        with pytest.raises(TierFull):
            tier.delete("x")
    assert [(i.fault.verb, i.key, i.call) for i in tier.injected] == [
        ("stat", "a", 2), ("delete", "x", 3), ("delete", "x", 4), ("delete", "x", 5),
    ]  # fmt: skip


def test_only_keys_with_the_prefix_count(local: LocalTier) -> None:
    tier = FaultyTier(local, rules=[Fault("put", TierFull, key_prefix="run/")])
    tier.put("b", BytesSource(b"x"))
    with pytest.raises(TierFull):
        tier.put("run/b", BytesSource(b"x"))
    tier.put("run/b", BytesSource(b"x"))


def test_an_answer_can_be_lost(local: LocalTier) -> None:
    tier = FaultyTier(local, rules=[Fault("put", TierUnavailable, after_call=True)])
    with pytest.raises(TierUnavailable):
        tier.put("b", BytesSource(b"x"))
    assert tier.stat("b").size_bytes == 1


def test_an_error_can_be_any(local: LocalTier) -> None:
    tier = FaultyTier(local, rules=[Fault("stat", lambda: ValueError("mine"))])
    with pytest.raises(ValueError, match="mine"):
        tier.stat("a")
    with pytest.raises(ObjectNotFound):
        tier.stat("absent")


def test_a_flip_changes_one_bit(local: LocalTier) -> None:
    def flipped(seed: int) -> list[int]:
        tier = FaultyTier(local, seed=seed, rules=[Fault("read_into", corrupt="flip")])
        return [255 ^ byte for byte in read(tier)]

    changed = [bits for bits in flipped(1) if bits]
    assert len(changed) == 1
    assert changed[0].bit_count() == 1
    assert flipped(1) == flipped(1)
    assert len({tuple(flipped(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("offset", [0, 100])
def test_a_zero_page_is_a_page_of_the_object(local: LocalTier, offset: int) -> None:
    for seed in range(20):
        tier = FaultyTier(local, seed=seed, rules=[Fault("read_into", corrupt="zero_page")])
        out = read(tier, offset, 16_384)
        zeros = [offset + index for index, byte in enumerate(out) if not byte]
        assert zeros
        first, last = zeros[0], zeros[-1]
        assert zeros == list(range(first, last + 1))
        assert first % 4096 == 0 or first == offset
        assert (last + 1) % 4096 == 0 or last + 1 == offset + 16_384
        assert first // 4096 == last // 4096


def test_a_truncated_object_is_short(local: LocalTier) -> None:
    tier = FaultyTier(local, rules=[Fault("read_into", corrupt="truncate")])
    with pytest.raises(ShortRead):
        read(tier)
    assert read(tier) == bytes([255]) * 20_000


@pytest.mark.parametrize(("nth", "printed"), [(1, "0\n"), (2, "0\n1\n"), (3, "0\n1\n2\n")])
def test_a_crash_point_kills_at_the_chosen_pass(nth: int, printed: str) -> None:
    code = """
from mtckpt._crash import crash_point
for turn in range(3):
    print(turn, flush=True)
    crash_point("other")
    crash_point("here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**CrashPoint("here", nth).environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, printed)
