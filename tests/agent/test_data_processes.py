"""Data processes that have their hands full, are needed no more, or whose agent was stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest
from agent_checks import Own, data_processes, until
from fake_trainer import disk as disk_tier
from pool_checks import staged, with_pool
from shard_maker import RUN, make_shard

from mtckpt._events import EventStream
from mtckpt.agent import flushing, work
from mtckpt.agent.flushing import Flusher
from mtckpt.agent.pool import Pool
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.saves import TierState
from mtckpt.agent.tools import Tools


def test_who_waits_for_a_turn_waits_while_others_get_on(ram_dir: Path, tmp_path: Path) -> None:
    """Two large copies are under way where two can be: what a third command waits is theirs."""
    ram = work.TierRef("ram", str(ram_dir / "root"))
    shard = make_shard(tmp_path, size=40)
    staged(ram, shard)
    slow = work.TierRef("disk", str(tmp_path / "slow"), bytes_per_s=16_000_000)
    flush = work.Flush(RUN, str(shard.name), 0, ram, slow)

    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(slow), 10)
        (pid,) = pool.pids()
        moving = asyncio.Event()
        flushes = [
            asyncio.create_task(pool.call(flush, 20, lambda _: moving.set())) for _ in range(2)
        ]
        await moving.wait()
        start_s = time.monotonic()
        await pool.call(work.Delete(slow, RUN, "step-000000000009.000001.000000000000"), 0.3)
        assert time.monotonic() - start_s > 0.3  # so it did wait
        await asyncio.gather(*flushes)
        assert pool.pids() == [pid]

    with_pool(body)


def test_an_agent_that_was_stopped_gives_nobody_up(ram: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(ram), 10)
        (pid,) = pool.pids()
        asked = asyncio.create_task(pool.call(work.Scan(ram), 0.2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(1.5)  # noqa: ASYNC251 - that is what a stopped process looks like to itself
        assert isinstance(await asked, work.Scanned)
        assert pool.pids() == [pid]

    with_pool(body)


def test_a_place_of_no_use_has_no_process(ram: work.TierRef, disk: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(ram), 10)
        await pool.call(work.Scan(disk), 10)
        of_ram, of_disk = pool.pids()
        os.kill(of_disk, signal.SIGSTOP)
        busy = asyncio.create_task(pool.call(work.Scan(disk), 10))
        await asyncio.sleep(0)
        await pool.keep([ram])
        assert pool.pids() == [of_ram, of_disk]  # somebody waits for it
        os.kill(of_disk, signal.SIGCONT)
        await busy
        await pool.keep([ram])
        assert pool.pids() == [of_ram]
        assert isinstance(await pool.call(work.Scan(disk), 10), work.Scanned)

    with_pool(body)


def test_the_disk_of_a_run_that_is_over_has_no_process(own: Own, tmp_path: Path) -> None:
    """One job after the other, each with a directory of its own, and the agent lives on."""
    first, second = own("a", [disk_tier(tmp_path / "a")]), own("b", [disk_tier(tmp_path / "b")])
    for trainer in (first, second):
        trainer.open()
        trainer.begin(1)
        trainer.save(1, ["disk"])
        trainer.wait_stage(1, "local")
    assert {str(tmp_path / "a"), str(tmp_path / "b")} <= data_processes().keys()
    first.close()
    until(lambda: str(tmp_path / "a") not in data_processes())
    assert str(tmp_path / "b") in data_processes()
    second.close()


def test_what_is_not_put_at_once_costs_no_process(
    disk: work.TierRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that fills the line is not to end because somebody reports a metric."""
    monkeypatch.setattr(flushing, "SMALL_TIMEOUT_S", 0.1)

    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(disk), 10)
        (pid,) = pool.pids()
        nobody = cast(Any, None)
        flusher = Flusher(Tools(pool, Limits(), EventStream()), nobody, nobody, nobody)
        tier = TierState("disk", TierConfig("disk", "disk", disk.path), disk, scanned=True)
        os.kill(pid, signal.SIGSTOP)
        owed = await flusher.put_now([tier], "r/x.json", b"{}")
        assert "within 0.1 s" in owed["disk"]
        assert tier.small_owed == {"r/x.json": b"{}"}
        os.kill(pid, signal.SIGCONT)
        await pool.call(work.PutSmall(disk, "r/x.json", b"{}"), 10)
        assert pool.pids() == [pid]

    with_pool(body)
