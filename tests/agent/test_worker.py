"""The data process and its pool: every command, a process that hangs, dies, or is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar, get_args

import pytest
from pool_checks import carry, slot_of, staged, with_pool
from shard_maker import RUN, Shard, fill_slot, flip, make_shard

from mtckpt import _manifest
from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.pool import Pool, Worker
from mtckpt.agent.protocol import TierConfig
from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    CheckpointError,
    Damaged,
    FormatError,
    TierUnavailable,
    UsageError,
)

T = TypeVar("T")


def test_every_command_has_a_line_and_a_place(ram: work.TierRef, disk: work.TierRef) -> None:
    flush = work.Flush(RUN, "x", 0, ram, disk)
    assert work.place_of(flush) == disk
    assert work.place_of(work.Heal(RUN, "x", 0, ram, disk)) == disk
    assert work.place_of(work.Heal(RUN, "x", 0, disk, ram)) == disk
    assert work.place_of(work.Ping()) is None
    assert work.place_of(work.Free(ram, RUN, "a")) == ram
    request = work.Request(7, work.PutSmall(ram, "run/x", b"\x00\xff"))
    line = work.encode_line(request)
    assert line.endswith(b"}\n")
    assert work.decode_request(line) == request
    for bad in (b"{}", b"[", b'{"id":1,"command":{"type":"Exec"}}', b"\xff"):
        with pytest.raises(FormatError):
            work.decode_request(bad)
    for bad in (b"{}", b"[", b'{"id":1,"result":{"type":"Exec"}}', b"\xff"):
        with pytest.raises(FormatError):
            work.decode_reply(bad)
    carried = set(Carrier()._table)
    assert carried == set(get_args(work.Command))


def test_the_life_of_a_save(ram: work.TierRef, disk: work.TierRef, shard: Shard) -> None:
    name = str(shard.name)

    async def body(pool: Pool) -> None:
        async def ask(command: work.Command, want: type[T]) -> T:
            result = await pool.call(command, 10)
            assert isinstance(result, want)
            return result

        command = work.Allocate(ram, RUN, "a", len(shard.data), len(shard.table))
        slot = slot_of(await ask(command, work.SlotFiles))
        fill_slot(slot, shard)
        (found,) = (await ask(work.Scan(ram), work.Scanned)).runs[0].slots
        assert (found.save, found.rank, found.inode) == (name, 0, slot.inode)
        seal = work.SealSlot(ram, RUN, "a", slot.inode, name, 0, verify=True)
        sealed = await ask(seal, work.SealedSlot)
        assert (sealed.save, sealed.step, sealed.again) == (name, 10, False)
        assert (await ask(seal, work.SealedSlot)).again
        news: list[work.Progress] = []
        result = await pool.call(work.Flush(RUN, name, 0, ram, disk), 10, news.append)
        assert isinstance(result, work.Flushed)
        assert result.complete
        assert result.rewritten == []
        assert news
        assert news[-1].total_bytes == len(shard.data)
        (save,) = (await ask(work.Scan(disk, RUN), work.Scanned)).runs[0].saves
        assert (save.save, save.complete, save.ranks) == (name, True, [0])
        verified = await ask(work.Verify(disk, RUN, name, 0), work.Verified)
        assert verified.damaged == []
        assert verified.read_bytes > len(shard.data)
        data = Path(disk.path) / RUN / name / _manifest.shard_file(0)
        flip(data, 5000)
        (damaged,) = (await ask(work.Verify(disk, RUN, name, 0), work.Verified)).damaged
        assert damaged.key.endswith("rank-00000.safetensors")
        healed = await ask(work.Heal(RUN, name, 0, disk, ram), work.Healed)
        assert healed.replaced == [damaged.key]
        assert data.read_bytes() == shard.data
        recycled = await ask(work.Recycle(ram, RUN, name, 0, "b"), work.Recycled)
        assert recycled.files is not None
        assert recycled.files.inode == slot.inode
        assert (await ask(work.Free(ram, RUN, "b"), work.Freed)).freed_bytes > len(shard.data)
        assert (await ask(work.Free(ram, RUN, "b"), work.Freed)).freed_bytes == 0
        assert not (await ask(work.Delete(disk, RUN, name), work.Deleted)).busy
        assert (await ask(work.Scan(disk), work.Scanned)).runs == []
        assert len(pool.pids()) == 2

    with_pool(body)


def test_a_reader_makes_recycle_and_delete_say_busy(ram: work.TierRef, shard: Shard) -> None:
    slot = staged(ram, shard)
    import fcntl

    path = Path(ram.path) / RUN / str(shard.name) / _manifest.shard_file(0)
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert carry(work.Recycle(ram, RUN, str(shard.name), 0, "b")) == work.Recycled(None)
        assert carry(work.Delete(ram, RUN, str(shard.name))) == work.Deleted(busy=True)
    recycled = carry(work.Recycle(ram, RUN, str(shard.name), 0, "b"))
    assert isinstance(recycled, work.Recycled)
    assert recycled.files is not None
    assert recycled.files.inode == slot.inode


def test_a_damaged_capture_of_a_dead_owner_is_freed(ram: work.TierRef, shard: Shard) -> None:
    slot = slot_of(carry(work.Allocate(ram, RUN, "a", len(shard.data), len(shard.table))))
    fill_slot(slot, shard)
    flip(Path(slot.data_path), len(shard.data) - 1)
    with pytest.raises(Damaged):
        carry(work.SealSlot(ram, RUN, "a", slot.inode, str(shard.name), 0, verify=True))
    scanned = carry(work.Scan(ram))
    assert isinstance(scanned, work.Scanned)
    assert [(run.slots, run.saves) for run in scanned.runs] in ([], [([], [])])


def test_small_files_are_written_once(ram: work.TierRef) -> None:
    put = work.PutSmall(ram, f"{RUN}/incarnation-000001.0123456789ab.json", b"one")
    assert carry(put) == work.Stored(already=False)
    assert carry(put) == work.Stored(already=True)
    for other in (b"two", b"longer"):
        with pytest.raises(AlreadyExists):
            carry(work.PutSmall(ram, put.key, other))
    with pytest.raises(UsageError):
        carry(work.PutSmall(ram, "../x", b"two"))


def test_run_configurations_outlive_the_process(ram: work.TierRef) -> None:
    owner = work.Owner("h", 0, 12, 345, incarnation=2)
    config = work.RunConfig(
        RUN, RUN, [TierConfig("disk", "disk", "/d", [{"last": 3}])], [owner], extra={"a": [1, None]}
    )
    carry(work.WriteRunConfig(ram, config))
    newer = work.RunConfig(RUN, RUN, incarnation=3)
    carry(work.WriteRunConfig(ram, newer))
    carry(work.WriteRunConfig(ram, work.RunConfig("other", "other")))
    path = Path(ram.path) / RUN / ".run.json"
    assert path.stat().st_mode & 0o7777 == 0o600
    assert carry(work.ReadRunConfigs(ram)) == work.RunConfigs(
        [work.RunConfig("other", "other"), newer]
    )
    path.write_bytes(b'{"run":')
    result = carry(work.ReadRunConfigs(ram))
    assert isinstance(result, work.RunConfigs)
    assert [config.run for config in result.configs] == ["other"]
    assert result.problems[0].startswith("run: ")


def test_a_configuration_that_somebody_else_may_have_written_is_not_used(
    tmp_path: Path,
) -> None:
    """In a service, whose directories its group writes to."""
    ram = work.TierRef("ram", str(tmp_path / "group"), group_access=True, label="ram")
    names = ("link", "loose", "pipe", "directory", "sound")
    for name in names:
        carry(work.WriteRunConfig(ram, work.RunConfig(name, name)))
        carry(work.WriteJoin(ram, name, b"{}"))
    of = {name: Path(ram.path) / name for name in names}
    assert (of["sound"] / ".run.json").stat().st_mode & 0o7777 == 0o600
    # Nobody else puts, renames or deletes anything in there.
    assert of["sound"].stat().st_mode & 0o7777 == 0o2750
    assert Path(ram.path).stat().st_mode & 0o7777 == 0o2750
    for file in (".run.json", ".join.json"):
        (of["link"] / file).rename(tmp_path / file)
        (of["link"] / file).symlink_to(tmp_path / file)
        (of["loose"] / file).chmod(0o660)
        for name in ("pipe", "directory"):
            (of[name] / file).unlink()
        os.mkfifo(of["pipe"] / file, 0o600)
        (of["directory"] / file).mkdir()
    result = carry(work.ReadRunConfigs(ram))
    assert isinstance(result, work.RunConfigs)
    assert [config.run for config in result.configs] == ["sound"]
    assert list(result.joins) == ["sound"]
    assert sorted(p.partition(":")[0] for p in result.problems) == sorted([*names[:4]] * 2)


def test_a_run_that_is_not_plainly_ours_does_not_hide_the_others(ram: work.TierRef) -> None:
    for name in ("open-to-all", "sound"):
        carry(work.WriteRunConfig(ram, work.RunConfig(name, name)))
    (Path(ram.path) / "open-to-all").chmod(0o777)
    result = carry(work.ReadRunConfigs(ram))
    assert isinstance(result, work.RunConfigs)
    assert [config.run for config in result.configs] == ["sound"]
    scanned = carry(work.Scan(ram))
    assert isinstance(scanned, work.Scanned)
    assert [run.run_key for run in scanned.runs] == ["sound"]
    with pytest.raises(AccessDenied):
        carry(work.Scan(ram, "open-to-all"))


def test_wipe_takes_one_run_and_no_other(ram: work.TierRef, shard: Shard) -> None:
    staged(ram, shard)
    carry(work.Allocate(ram, RUN, "b", 100, 64))
    carry(work.WriteRunConfig(ram, work.RunConfig(RUN, RUN)))
    carry(work.Allocate(ram, "other", "b", 100, 64))
    freed = carry(work.Wipe(ram, RUN))
    assert isinstance(freed, work.Freed)
    assert freed.freed_bytes > len(shard.data)
    assert sorted(os.listdir(ram.path)) == ["other"]
    assert carry(work.Wipe(ram, RUN)) == work.Freed(0)
    with pytest.raises(UsageError):
        carry(work.Wipe(ram, ".."))


def test_a_scan_without_repair_changes_nothing(ram: work.TierRef, shard: Shard) -> None:
    staged(ram, shard)
    record = Path(ram.path) / RUN / str(shard.name) / _manifest.record_file(0)
    record.unlink()
    scanned = carry(work.Scan(ram, repair=False))
    assert isinstance(scanned, work.Scanned)
    assert scanned.runs[0].saves[0].ranks == []
    assert record.with_suffix(".safetensors").exists()
    scanned = carry(work.Scan(ram, repair=True))
    assert isinstance(scanned, work.Scanned)
    assert len(scanned.runs[0].repaired) == 2
    assert not record.parent.exists()


# -- processes -----------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_dead(pid: int, timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if not is_alive(pid):
            return True
        time.sleep(0.01)
    return False


def test_typed_errors_cross_with_their_facts(disk: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        with pytest.raises(CheckpointError) as raised:
            await pool.call(work.Allocate(disk, RUN, "a", 1 << 50, 64), 10)
        assert type(raised.value).__name__ == "TierFull"
        assert raised.value.details["needed_bytes"] == (1 << 50) + 64
        with pytest.raises(UsageError, match="not the name of a save"):
            await pool.call(work.Verify(disk, RUN, "../x", 0), 10)

    with_pool(body)


def test_a_process_that_hangs_is_named_given_up_and_replaced(ram: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(ram), 10)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.raises(TierUnavailable) as raised:
            await pool.call(work.Scan(ram), 0.3)
        assert time.monotonic() - start_s < 2
        assert raised.value.details["verb"] == "Scan"
        assert raised.value.details["timeout_s"] == 0.3
        assert "ram did not answer Scan" in str(raised.value)
        assert await asyncio.to_thread(wait_dead, pid)
        await pool.call(work.Scan(ram), 10)
        assert pool.pids() != [pid]

    with_pool(body)


def test_a_hung_disk_does_not_hold_up_ram(ram: work.TierRef, disk: work.TierRef) -> None:
    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(disk), 10)
        await pool.call(work.Scan(ram), 10)
        os.kill(pool.pids()[0], signal.SIGSTOP)
        stuck = asyncio.create_task(pool.call(work.Scan(disk), 3))
        start_s = time.monotonic()
        for _ in range(20):
            await pool.call(work.Scan(ram), 10)
        assert time.monotonic() - start_s < 2.5
        assert not stuck.done()
        with pytest.raises(TierUnavailable, match="disk-2"):
            await stuck

    with_pool(body)


def test_progress_puts_the_deadline_off(ram_dir: Path, tmp_path: Path) -> None:
    shard = make_shard(tmp_path, size=60)
    ram = work.TierRef("ram", str(ram_dir / "root"))
    staged(ram, shard)
    slow = work.TierRef("disk", str(tmp_path / "slow"), bytes_per_s=16_000_000)
    news: list[work.Progress] = []

    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(slow), 10)
        start_s = time.monotonic()
        flush = work.Flush(RUN, str(shard.name), 0, ram, slow)
        await pool.call(flush, 0.9, news.append)
        assert time.monotonic() - start_s > 0.95

    with_pool(body)
    done = [progress.done_bytes for progress in news]
    assert len(done) > 1
    assert done == sorted(done)
    assert {progress.total_bytes for progress in news} == {len(shard.data)}
    assert done[-1] == len(shard.data)


def test_bytes_that_stop_moving_are_noticed_long_before_all_could_have_been_moved(
    ram_dir: Path, tmp_path: Path
) -> None:
    shard = make_shard(tmp_path, size=60)
    ram = work.TierRef("ram", str(ram_dir / "root"))
    staged(ram, shard)
    slow = work.TierRef("disk", str(tmp_path / "slow"), bytes_per_s=16_000_000)
    flush = work.Flush(RUN, str(shard.name), 0, ram, slow)

    async def body(pool: Pool) -> None:
        await pool.call(work.Scan(slow), 10)
        (pid,) = pool.pids()
        stopped: list[int] = []

        def stop(news: work.Progress) -> None:
            if news.done_bytes and not stopped:
                stopped.append(news.done_bytes)
                os.kill(pid, signal.SIGSTOP)

        start_s = time.monotonic()
        with pytest.raises(TierUnavailable, match="did not answer Flush within 2 s"):
            await pool.call(flush, 600, stop, stall_s=2)
        assert 0 < stopped[0] < len(shard.data)
        assert time.monotonic() - start_s < 30  # and not 600
        await pool.call(flush, 600, stall_s=2)

    with_pool(body)
    verified = carry(work.Verify(slow, RUN, str(shard.name), 0))
    assert isinstance(verified, work.Verified)
    assert verified.damaged == []


def test_the_process_ends_with_the_one_that_started_it(ram: work.TierRef) -> None:
    code = (
        "import asyncio, sys, time\n"
        "from mtckpt.agent import work\n"
        "from mtckpt.agent.pool import Pool\n"
        "async def main():\n"
        "    pool = Pool()\n"
        f"    await pool.call(work.Scan(work.TierRef('ram', {ram.path!r})), 10)\n"
        "    print(pool.pids()[0], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=_environment()
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert wait_dead(pid)


def test_the_end_of_the_socket_ends_it_and_nonsense_does_too() -> None:
    for last_words in (b"", b"nonsense\n"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "mtckpt.agent.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stderr=subprocess.DEVNULL,
            )
            theirs.close()
            ours.sendall(work.encode_line(work.Request(1, work.Ping())))
            assert work.decode_reply(ours.recv(1 << 16)).result == work.Pong(process.pid)
            if last_words:
                ours.sendall(last_words)
            else:
                ours.shutdown(socket.SHUT_WR)
            assert process.wait(5) == (1 if last_words else 0)


def test_it_leaves_without_a_word_when_nobody_takes_its_answers() -> None:
    """The control process was killed with replies unread: the socket is reset, not closed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtckpt.agent.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=_environment(),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.sendall(b"".join(work.encode_line(work.Request(i, work.Ping())) for i in range(50)))
        assert ours.recv(10)
    assert process.communicate(timeout=10)[1] == b""
    assert process.returncode == 0


def test_it_is_small_and_loads_little(ram: work.TierRef) -> None:
    def look(pid: int) -> tuple[int, str]:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        private_kib = sum(int(fields[f"Private_{kind}"].split()[0]) for kind in ("Clean", "Dirty"))
        return private_kib, Path(f"/proc/{pid}/maps").read_text()

    async def body(pool: Pool) -> tuple[int, str]:
        await pool.call(work.Scan(ram), 10)
        return look(pool.pids()[0])

    private_kib, maps = with_pool(body)
    assert private_kib <= 15 * 1024
    for name in ("numpy", "_ssl", "_asyncio", "torch", "jax"):
        assert name not in maps


def test_a_closed_pool_leaves_no_process_and_answers_nobody(ram: work.TierRef) -> None:
    async def body() -> None:
        pool = Pool()
        worker = pool.worker(ram)
        assert isinstance(worker, Worker)
        assert isinstance(await worker.call(work.Ping(), 10), work.Pong)
        (pid,) = pool.pids()
        await pool.close()
        await pool.close()
        assert not os.path.exists(f"/proc/{pid}")  # noqa: ASYNC240
        with pytest.raises(TierUnavailable, match="closed"):
            await pool.call(work.Scan(ram), 10)
        with pytest.raises(ValueError, match="Ping"):
            await pool.call(work.Ping(), 10)

    asyncio.run(body())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd()}
