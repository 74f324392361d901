"""Data processes that die, anywhere in a command: the next one does it, or a typed error."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pool_checks import carry, slot_of, staged, with_pool
from shard_maker import RUN, Shard, fill_slot, flip

from mtckpt import _manifest
from mtckpt.agent import work
from mtckpt.errors import TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtckpt.agent.pool import Pool


def test_what_is_under_way_in_a_process_that_dies_is_done_by_the_next(ram: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(ram), 10)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(pool.call(work.Scan(ram), 30)) for _ in range(5)]
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        for task in waiting:
            assert isinstance(await task, work.Scanned)
        assert pool.worker(ram).starts == 2

    with_pool(body)


def test_a_process_that_is_given_up_is_not_asked_again(ram: work.TierRef) -> None:
    """It may still do what it was told, so whoever else waits for it gets a typed error."""

    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(ram), 10)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        patient = asyncio.create_task(pool.call(work.Scan(ram), 30))
        await asyncio.sleep(0)
        with pytest.raises(TierUnavailable, match="did not answer"):
            await pool.call(work.Scan(ram), 0.3)
        with pytest.raises(TierUnavailable, match="did not answer"):
            await patient
        assert pool.worker(ram).starts == 1

    with_pool(body)


CRASH_POINTS = (
    *(f"allocate{suffix}" for suffix in (".safetensors", ".xxh3")),
    "seal.checked",
    "seal.directory",
    *(f"seal{suffix}" for suffix in (".safetensors", ".xxh3", ".json")),
    "recycle.record",
    "recycle.generation",
    "recycle.xxh3",
    "recycle.safetensors",
    "recycle.done",
    *(f"free{suffix}" for suffix in (".json", ".json.new", ".xxh3", ".safetensors")),
    "config.written",
    "wipe.records",
    *(f"put.{point}" for point in ("created", "written", "synced", "linked", "unlinked", "done")),
    *(f"flush.{point}" for point in ("data", "table", "record", "manifest")),
    "heal.aside",
    *(f"delete.{index}" for index in range(3)),
)


MANY_MORE = ("free", "put.w", "put.s", "put.u", "put.d", "delete.1", "delete.2", "recycle.d")


def prepared(
    point: str, ram: work.TierRef, disk: work.TierRef, shard: Shard
) -> tuple[work.Command, Callable[[work.Result], None]]:
    """A command that passes ``point``, all before it done, and what must hold once it has ended."""
    name, verb = str(shard.name), point.partition(".")[0]
    allocate = work.Allocate(ram, RUN, "a", len(shard.data), len(shard.table))

    def healthy(tier: work.TierRef) -> Callable[[work.Result], None]:
        def check(_: work.Result) -> None:
            verified = carry(work.Verify(tier, RUN, name, 0))
            assert isinstance(verified, work.Verified)
            assert verified.damaged == []
            (save,) = carry(work.Scan(tier, RUN)).runs[0].saves  # type: ignore[union-attr]  # a Scan is answered so
            assert save.complete

        return check

    def is_slot(files: work.Result | None) -> None:
        assert isinstance(files, work.SlotFiles)
        assert os.stat(files.data_path).st_ino == files.inode
        assert os.listdir(Path(ram.path) / RUN) == [".slots"]

    if verb == "allocate":
        return allocate, is_slot
    if verb == "config":
        config = work.RunConfig(RUN, RUN, incarnation=3)
        return work.WriteRunConfig(ram, config), lambda _: _same(
            carry(work.ReadRunConfigs(ram)), work.RunConfigs([config])
        )
    if verb == "seal":
        slot = slot_of(carry(allocate))
        fill_slot(slot, shard)
        return work.SealSlot(ram, RUN, "a", slot.inode, name, 0), healthy(ram)
    staged(ram, shard)
    if verb == "recycle":
        return work.Recycle(ram, RUN, name, 0, "a"), lambda result: is_slot(
            result.files if isinstance(result, work.Recycled) else None
        )
    if verb == "free":
        carry(work.Allocate(ram, RUN, "b", 4096, 64))
        slots = Path(ram.path) / RUN / ".slots"
        return work.Free(ram, RUN, "b"), lambda _: _same(os.listdir(slots), [])
    if verb == "wipe":
        return work.Wipe(ram, RUN), lambda _: _same(os.listdir(ram.path), [])
    flush = work.Flush(RUN, name, 0, ram, disk)
    if verb in ("put", "flush"):
        return flush, healthy(disk)
    carry(flush)
    if verb == "delete":
        return work.Delete(disk, RUN, name), lambda _: _same(os.listdir(disk.path), [])
    flip(Path(disk.path) / RUN / name / _manifest.shard_file(0), len(shard.data) - 5)
    return work.Heal(RUN, name, 0, disk, ram), healthy(disk)


def _same(found: object, wanted: object) -> None:
    assert found == wanted


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=[pytest.mark.torture] if point.startswith(MANY_MORE) else [])
        for point in CRASH_POINTS
    ],
)
def test_a_command_whose_process_dies_anywhere_in_it_is_done_all_the_same(
    point: str,
    ram: work.TierRef,
    disk: work.TierRef,
    shard: Shard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, check = prepared(point, ram, disk, shard)

    async def body(pool: Pool) -> work.Result:
        place = work.place_of(command)
        assert place is not None
        monkeypatch.setenv("MTCKPT_CRASH_AT", point)
        await pool.worker(place).call(work.Ping(), 10)
        monkeypatch.delenv("MTCKPT_CRASH_AT")
        result = await pool.call(command, 10)
        assert pool.worker(place).starts == 2, f"{point} was not passed"
        return result

    check(with_pool(body))


def test_a_process_that_always_dies_is_started_less_and_less_often(
    ram: work.TierRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MTCKPT_CRASH_AT", "config.written")
    log_path = tmp_path / "log"

    async def body(pool: Pool) -> int:
        command = work.WriteRunConfig(ram, work.RunConfig(RUN, RUN))
        refused = 0
        for _ in range(6):
            with pytest.raises(TierUnavailable) as raised:
                await pool.call(command, 10)
            refused += "retry_in_s" in raised.value.details
        assert pool.worker(ram).starts < 6
        monkeypatch.delenv("MTCKPT_CRASH_AT")
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            try:
                await pool.call(work.Scan(ram), 10)
                await pool.call(command, 10)
                return refused
            except TierUnavailable:
                await asyncio.sleep(0.05)
        raise AssertionError("it never came back")

    assert with_pool(body, log_path) > 0
