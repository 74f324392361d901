"""What a tier may do with the bytes that a source hands it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from mtckpt.tiers import (
    DeadlineTier,
    LocalTier,
    MeteredTier,
    RetryingTier,
    ThrottledTier,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class OneBufferAThread:
    """A source that gives each thread the same memory again and again, as one over a disk does."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._own = threading.local()

    def expected(self, offset: int, size_bytes: int) -> bytes:
        words = range(offset // 4096, -(-(offset + size_bytes) // 4096))
        data = b"".join(word.to_bytes(4, "little") * 1024 for word in words)
        return data[offset % 4096 :][:size_bytes]

    def read(self, offset: int, size_bytes: int) -> memoryview:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = bytearray(32 << 20)
        self._own.buffer[:size_bytes] = self.expected(offset, size_bytes)
        return memoryview(self._own.buffer)[:size_bytes]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tier: tier,
        lambda tier: DeadlineTier(tier, timeout_s=60.0),
        lambda tier: ThrottledTier(tier, bytes_per_s=10e9),
        lambda tier: RetryingTier(MeteredTier(tier), attempts=2),
    ],
    ids=["plain", "deadline", "throttled", "retrying"],
)
def test_a_block_is_done_with_before_the_thread_asks_for_the_next(
    wrap: Callable[[Tier], Tier], tmp_path: Path
) -> None:
    source = OneBufferAThread((40 << 20) + 4321)  # several blocks for each of the threads
    local = LocalTier(tmp_path / "root")
    tier = wrap(local)
    tier.put("a", source)
    assert local.path_of("a").read_bytes() == source.expected(0, source.size_bytes)
    tier.close()
