"""A tier against a dict, by hypothesis: any sequence of calls has the outcome the dict predicts.

It knows the protocol only. Keys never lie below one another: whether ``a`` and ``a/b`` can both be
objects is left to the tier.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from mtckpt.errors import AlreadyExists, ObjectNotFound, ShortRead
from mtckpt.tiers.base import BytesSource, ObjectInfo, Tier

__all__ = ["run_against_model"]

KEYS = st.sampled_from(["a", "a-b", "a.b", "b/c", "b/d", "b/e/f", "b=/c", "c/d/e"])
PREFIXES = st.sampled_from(["", "a", "a.", "b", "b/", "b/e", "b=", "c/d/e", "z"])


def run_against_model(make_tier: Callable[[], Tier], num_sequences: int) -> None:
    """Find a sequence of calls for which tier and dict differ, or return."""

    class TierMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.tier = make_tier()
            self.model: dict[str, bytes] = {}

        @rule(key=KEYS, data=st.binary(max_size=5000))
        def put(self, key: str, data: bytes) -> None:
            try:
                result = self.tier.put(key, BytesSource(data))
            except AlreadyExists:
                assert key in self.model
            else:
                assert key not in self.model
                assert result.size_bytes == len(data)
                self.model[key] = data

        @rule(key=KEYS, offset=st.integers(0, 6000), size_bytes=st.integers(1, 6000))
        def read(self, key: str, offset: int, size_bytes: int) -> None:
            out = bytearray(size_bytes)
            try:
                self.tier.read_into(key, memoryview(out), offset)
            except ObjectNotFound:
                assert key not in self.model
            except ShortRead:
                assert offset + size_bytes > len(self.model[key])
            else:
                assert self.model[key][offset : offset + size_bytes] == out

        @rule(key=KEYS)
        def stat(self, key: str) -> None:
            try:
                info = self.tier.stat(key)
            except ObjectNotFound:
                assert key not in self.model
            else:
                assert info == ObjectInfo(key, len(self.model[key]))

        @rule(key=KEYS)
        def delete(self, key: str) -> None:
            self.tier.delete(key)
            self.model.pop(key, None)

        @rule(prefix=PREFIXES)
        def list(self, prefix: str) -> None:
            expected = [
                ObjectInfo(key, len(data))
                for key, data in sorted(self.model.items())
                if key.startswith(prefix)
            ]
            assert [*self.tier.list(prefix)] == expected

        def teardown(self) -> None:
            self.tier.close()

    run_state_machine_as_test(
        TierMachine,
        settings=settings(
            max_examples=num_sequences,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
