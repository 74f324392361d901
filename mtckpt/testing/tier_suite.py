"""The contract of a tier as tests: subclass ``TierSuite``, say how to make yours, run pytest.

    class TestMyTier(TierSuite):
        def make_tier(self, tmp_path):
            return MyTier(tmp_path / "objects")

It knows the protocol and nothing of any tier. It does not test how durable a tier is (only pulling
the plug does), nor how fast.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import signal
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mtckpt.errors import (
    AlreadyExists,
    Damaged,
    ObjectNotFound,
    ShortRead,
    UsageError,
)
from mtckpt.tiers.base import BytesSource, ObjectInfo, Survives, Tier, read_all

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TierSuite"]

MIB = 1 << 20
JOIN_S = 30.0
BAD_KEYS = [
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.hidden", "A",
    "a b", "a\0b", "a\n", "a\\b", "c:", "~", "\u00e4", "\u0430", "a" * 201, "a/" * 256 + "a",
]  # fmt: skip


def content(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere and are the same every time."""
    return random.Random(seed).randbytes(size_bytes)


class RecordingSource:
    """Remembers what was asked for, and calls ``before`` each time with the end of the block."""

    def __init__(self, data: bytes, before: Callable[[int], None] = lambda _: None) -> None:
        self._data = data
        self._before = before
        self.requests: list[tuple[int, int]] = []

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read(self, offset: int, size_bytes: int) -> memoryview:
        self.requests.append((offset, size_bytes))
        self._before(offset + size_bytes)
        return memoryview(self._data)[offset : offset + size_bytes]


def in_threads(*calls: Callable[[], None]) -> list[BaseException | None]:
    """Run all calls at the same moment, each in a thread; what each one raised."""
    barrier = threading.Barrier(len(calls))
    raised: list[BaseException | None] = [None] * len(calls)

    def run(index: int, call: Callable[[], None]) -> None:
        try:
            barrier.wait(JOIN_S)
            call()
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            raised[index] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive(), "a call did not end"
    return raised


def in_forks(*calls: Callable[[], None]) -> list[str]:
    """Run each call in a child process at the same moment; "" or the name of what it raised."""
    start_read, start_write = os.pipe()
    children: list[tuple[int, int]] = []
    for call in calls:
        result_read, result_write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The child does this one call, and uses no thread.
            pid = os.fork()
        if not pid:
            os.close(start_write)
            _child(call, start_read, result_write)
        os.close(result_write)
        children.append((pid, result_read))
    os.close(start_read)
    os.close(start_write)
    return [_outcome(pid, fd) for pid, fd in children]


def _child(call: Callable[[], None], start_fd: int, result_fd: int) -> None:
    outcome = b"died"
    try:
        os.read(start_fd, 1)  # End of file for all children at once.
        call()
        outcome = b"-"
    except BaseException as error:  # noqa: BLE001  (reported to the parent, which asserts on it)
        outcome = type(error).__name__.encode()
    finally:
        os.write(result_fd, outcome)
        os._exit(0)


def _outcome(pid: int, fd: int) -> str:
    try:
        if not select.select([fd], [], [], JOIN_S)[0]:
            os.kill(pid, signal.SIGKILL)
        return os.read(fd, 100).decode().removeprefix("-")
    finally:
        os.close(fd)
        os.waitpid(pid, 0)


class TierSuite(ABC):
    """Every test a tier must pass. Override ``make_tier``, and the attributes where they differ."""

    survives: Survives | None = None
    """What the tier is expected to say; None: anything but nothing."""

    several_processes = True
    """Whether ``make_tier(tmp_path)`` in another process opens the same objects."""

    num_sequences = 20
    """How many random sequences of calls are compared with those of a dict."""

    sizes: tuple[int, ...] = (0, 1, 4095, 4096, 4097, 3 * MIB + 17, 20 * MIB + 4097)
    """Sizes in bytes for the round trip."""

    @abstractmethod
    def make_tier(self, tmp_path: Path) -> Tier:
        """Open a tier for which ``tmp_path`` is the place, or stands for it."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """A new, empty tier."""
        tier = self.make_tier(tmp_path)
        yield tier
        tier.close()

    # -- members ---------------------------------------------------------------------------------

    def test_says_who_it_is_and_what_it_survives(self, tier: Tier) -> None:
        assert tier.name
        assert isinstance(tier.name, str)
        assert isinstance(tier.survives, Survives)
        assert tier.survives if self.survives is None else tier.survives == self.survives

    def test_close_is_idempotent(self, tier: Tier) -> None:
        tier.put("a", BytesSource(b"x"))
        tier.close()
        tier.close()

    # -- what comes back -------------------------------------------------------------------------

    def test_what_was_put_comes_back(self, tier: Tier) -> None:
        for seed, size_bytes in enumerate(self.sizes):
            key = f"run/{size_bytes}"
            data = content(size_bytes, seed)
            assert tier.put(key, BytesSource(data)).size_bytes == size_bytes
            assert tier.stat(key) == ObjectInfo(key, size_bytes)
            assert read_all(tier, key, max_bytes=size_bytes) == data
        listed = {info.key: info.size_bytes for info in tier.list()}
        assert listed == {f"run/{size_bytes}": size_bytes for size_bytes in self.sizes}

    def test_a_source_is_asked_for_every_byte_once(self, tier: Tier) -> None:
        for size_bytes in self.sizes:
            source = RecordingSource(content(size_bytes))
            tier.put(f"{size_bytes}", source)
            end = 0
            for offset, asked_bytes in sorted(r for r in source.requests if r[1]):
                assert offset == end
                end += asked_bytes
            assert end == size_bytes

    def test_reads_from_an_offset_into_part_of_a_buffer(self, tier: Tier) -> None:
        data = content(10_000)
        tier.put("a", BytesSource(data))
        for offset, size_bytes in ((0, 1), (1, 4096), (4096, 4096), (9_999, 1), (3, 9_997)):
            out = bytearray(b"\xaa" * (size_bytes + 20))
            tier.read_into("a", memoryview(out)[10 : 10 + size_bytes], offset)
            assert out[10:-10] == data[offset : offset + size_bytes]
            assert out[:10] == out[-10:] == b"\xaa" * 10

    def test_reads_into_any_item_type(self, tier: Tier) -> None:
        tier.put("a", BytesSource(content(64)))
        out = bytearray(64)
        tier.read_into("a", memoryview(out).cast("I"))
        assert out == content(64)

    def test_a_read_past_the_end_is_short(self, tier: Tier) -> None:
        tier.put("a", BytesSource(content(100)))
        for offset, size_bytes in ((0, 101), (90, 11), (100, 1), (1000, 5), (0, 9 * MIB)):
            with pytest.raises(ShortRead) as raised:
                tier.read_into("a", memoryview(bytearray(size_bytes)), offset)
            assert (raised.value.details["tier"], raised.value.details["key"]) == (tier.name, "a")
            details = raised.value.details
            assert 0 <= details["got_bytes"] < details["wanted_bytes"] <= size_bytes  # type: ignore[operator]  # details are objects, these are numbers

    def test_keeps_nothing_of_the_source(self, tier: Tier) -> None:
        buffer = bytearray(content(100_000))
        source = RecordingSource(b"")
        source._data = buffer  # type: ignore[assignment]  # a buffer that can be resized
        gone = weakref.ref(source)
        tier.put("a", source)
        buffer[:10] = b"0123456789"
        assert read_all(tier, "a", max_bytes=MIB) == content(100_000)
        del source
        gc.collect()
        assert gone() is None
        buffer.clear()  # BufferError if anybody still has a view of it.

    def test_keeps_nothing_of_the_buffer_read_into(self, tier: Tier) -> None:
        tier.put("a", BytesSource(content(100)))
        out = bytearray(100)
        tier.read_into("a", memoryview(out))
        gc.collect()
        out.clear()

    # -- what is not there -----------------------------------------------------------------------

    def test_what_is_not_there_is_not_found(self, tier: Tier) -> None:
        tier.put("a/b", BytesSource(b"x"))
        for key in ("b", "a", "a/c", "b/c/d"):
            with pytest.raises(ObjectNotFound) as raised:
                tier.stat(key)
            assert (raised.value.details["tier"], raised.value.details["key"]) == (tier.name, key)
            with pytest.raises(ObjectNotFound):
                tier.read_into(key, memoryview(bytearray(1)))
            with pytest.raises(ObjectNotFound):
                tier.read_into(key, memoryview(bytearray(0)))
            tier.delete(key)
        assert [info.key for info in tier.list()] == ["a/b"]

    def test_delete_is_idempotent_and_frees_the_key(self, tier: Tier) -> None:
        tier.put("run/a", BytesSource(b"old"))
        tier.put("run/b", BytesSource(b"other"))
        tier.delete("run/a")
        tier.delete("run/a")
        with pytest.raises(ObjectNotFound):
            tier.stat("run/a")
        assert [info.key for info in tier.list()] == ["run/b"]
        tier.put("run/a", BytesSource(b"new"))
        assert read_all(tier, "run/a", max_bytes=9) == b"new"

    # -- never replaced --------------------------------------------------------------------------

    def test_put_never_replaces(self, tier: Tier) -> None:
        tier.put("run/a", BytesSource(b"first"))
        for data in (b"second", b"", b"first"):
            with pytest.raises(AlreadyExists) as raised:
                tier.put("run/a", BytesSource(data))
            assert raised.value.details["tier"] == tier.name
            assert raised.value.details["key"] == "run/a"
        assert read_all(tier, "run/a", max_bytes=9) == b"first"

    def _needs_atomic_put(self, tier: Tier) -> None:
        if not tier.put("probe", BytesSource(b"")).atomic:
            pytest.skip("this tier says that it can only look, then write")
        tier.delete("probe")

    @pytest.mark.parametrize("size_bytes", [10, 3 * MIB])
    def test_racing_threads_have_one_winner(self, tier: Tier, size_bytes: int) -> None:
        self._needs_atomic_put(tier)
        data = [content(size_bytes, seed) for seed in range(3)]
        for turn in range(8):
            key = f"run/{turn}"

            def put(index: int, key: str = key) -> None:
                tier.put(key, BytesSource(data[index]))

            raised = in_threads(*(partial(put, i) for i in range(3)))
            winners = [index for index, error in enumerate(raised) if error is None]
            assert len(winners) == 1, raised
            assert all(isinstance(error, AlreadyExists) for error in raised if error)
            assert read_all(tier, key, max_bytes=size_bytes) == data[winners[0]]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_racing_processes_have_one_winner(self, tier: Tier, tmp_path: Path) -> None:
        if not self.several_processes:
            pytest.skip("this tier lives in one process")
        self._needs_atomic_put(tier)
        data = [content(MIB, seed) for seed in range(2)]
        for turn in range(8):
            key = f"run/{turn}"

            def put(index: int, key: str = key) -> None:
                self.make_tier(tmp_path).put(key, BytesSource(data[index]))

            raised = in_forks(*(partial(put, i) for i in range(2)))
            assert sorted(raised) == ["", "AlreadyExists"]
            assert read_all(tier, key, max_bytes=MIB) == data[raised.index("")]

    # -- whole or not at all ---------------------------------------------------------------------

    @pytest.mark.parametrize("size_bytes", [10, 3 * MIB, 20 * MIB])
    def test_a_source_that_raises_leaves_nothing(self, tier: Tier, size_bytes: int) -> None:
        def fail_in_the_last_part(end: int) -> None:
            if end >= size_bytes:
                raise Damaged("a digest differs")

        for _ in range(2):
            with pytest.raises(Damaged, match="a digest differs"):
                tier.put("run/a", RecordingSource(content(size_bytes), fail_in_the_last_part))
            assert list(tier.list()) == []
            with pytest.raises(ObjectNotFound):
                tier.stat("run/a")
        tier.put("run/a", BytesSource(b"x"))
        assert read_all(tier, "run/a", max_bytes=9) == b"x"

    def test_errors_of_a_source_pass_unchanged(self, tier: Tier) -> None:
        def fail(_: int) -> None:
            raise OSError(28, "the source's own disk")

        with pytest.raises(OSError, match="the source's own disk"):
            tier.put("a", RecordingSource(b"x", fail))
        assert list(tier.list()) == []

    def test_a_put_in_flight_is_not_seen(self, tier: Tier) -> None:
        seen: list[object] = []

        def look(_: int) -> None:
            seen.extend(tier.list())
            with contextlib.suppress(ObjectNotFound):
                seen.append(tier.stat("run/a"))

        source = RecordingSource(content(3 * MIB), look)
        tier.put("run/a", source)
        assert source.requests
        assert seen == []

    # -- keys ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_what_is_no_key_is_refused(self, tier: Tier, key: str) -> None:
        for call in (
            lambda: tier.put(key, BytesSource(b"x")),
            lambda: tier.read_into(key, memoryview(bytearray(1))),
            lambda: tier.stat(key),
            lambda: tier.delete(key),
        ):
            with pytest.raises(UsageError):
                call()
        assert list(tier.list()) == []

    def test_long_keys_work(self, tier: Tier) -> None:
        for key in ("a" * 200, "/".join(["d" * 100] * 5), "-", "=", "_.=-", "0/1/2/3/4/5/6/7"):
            tier.put(key, BytesSource(b"x"))
            assert tier.stat(key).key == key

    # -- listing ---------------------------------------------------------------------------------

    def test_lists_in_order_of_keys(self, tier: Tier) -> None:
        keys = ["a", "a-b", "a.b", "a0", "a=b", "b/c", "b/c.d", "b-c/d", "b=c/d", "c/d/e/f", "c0/d"]
        for key in random.Random(0).sample(keys, len(keys)):
            tier.put(key, BytesSource(key.encode()))
        for prefix in ("", "a", "a.", "b", "b/", "b/c", "b-", "c/d/", "c/d/e/f", "c0", "x", "b/x"):
            expected = sorted(key for key in keys if key.startswith(prefix))
            assert [info.key for info in tier.list(prefix)] == expected
        assert [info.size_bytes for info in tier.list("b/")] == [3, 5]

    def test_any_text_is_a_prefix(self, tier: Tier) -> None:
        tier.put("a/b", BytesSource(b"x"))
        for prefix in ("..", "../", "/", "a//", ".", "A", "\0", "a/b/c", "a" * 1000):
            assert list(tier.list(prefix)) == []

    def test_deleting_while_listing(self, tier: Tier) -> None:
        keys = [f"{step}/{name}" for step in range(5) for name in "ab"]
        for key in keys:
            tier.put(key, BytesSource(b"x"))
        entries = iter(tier.list())
        seen = [next(entries).key]
        for key in keys:
            tier.delete(key)
        seen += [info.key for info in entries]
        assert seen[0] == keys[0]
        assert seen == sorted(set(seen))
        assert set(seen) <= set(keys)
        assert list(tier.list()) == []

    # -- threads ---------------------------------------------------------------------------------

    def test_many_threads_share_a_tier(self, tier: Tier) -> None:
        """Each thread has keys of its own, all in the same directories, which come and go."""
        end = time.monotonic() + JOIN_S

        def work(thread: int) -> None:
            for turn in range(12):
                assert time.monotonic() < end
                key = f"shared/{turn % 2}/{thread}"
                data = content(5000, seed=thread * 100 + turn)
                tier.put(key, BytesSource(data))
                assert read_all(tier, key, max_bytes=5000) == data
                assert key in [info.key for info in tier.list("shared/")]
                tier.delete(key)

        raised = in_threads(*(partial(work, i) for i in range(8)))
        assert raised == [None] * 8
        assert list(tier.list()) == []

    # -- against a model -------------------------------------------------------------------------

    def test_behaves_like_a_dict_that_never_replaces(self, tmp_path: Path) -> None:
        pytest.importorskip("hypothesis")
        from mtckpt.testing._model import run_against_model

        made = 0

        def make() -> Tier:
            nonlocal made
            made += 1
            place = tmp_path / f"{made}"
            place.mkdir()
            return self.make_tier(place)

        run_against_model(make, self.num_sequences)
