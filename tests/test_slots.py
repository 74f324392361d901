"""RAM slots: sizes, refusals, leases, and what a kill at every step of every change leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shard_maker import RUN, Shard, fill_slot, flip, make_shard, ram_place, slots_of

from mtckpt import _manifest, _room
from mtckpt._slots import Slot, Slots
from mtckpt._source import Place
from mtckpt._transfer import verify_shard
from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    Damaged,
    FormatTooNew,
    ObjectNotFound,
    TierFull,
    UsageError,
)
from mtckpt.tiers import BytesSource


@pytest.fixture
def place(ram_dir: Path) -> Place:
    return ram_place(ram_dir / "root")


@pytest.fixture
def slots(place: Place) -> Slots:
    return slots_of(place)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return make_shard(tmp_path)


def captured(slots: Slots, shard: Shard, slot_id: str = "a") -> Slot:
    slot = slots.allocate(RUN, slot_id, len(shard.data), len(shard.table))
    fill_slot(slot, shard)
    return slot


def healthy(place: Place, shard: Shard) -> bool:
    return not verify_shard(place, RUN, shard.name, shard.rank).damaged


def test_a_slot_has_exactly_the_size_asked_for_and_is_private(slots: Slots) -> None:
    slot = slots.allocate(RUN, "a", 10_000, 640)
    data, table = os.stat(slot.data_path), os.stat(slot.table_path)
    assert (data.st_size, table.st_size, data.st_ino) == (10_000, 640, slot.inode)
    assert data.st_blocks * 512 >= 10_000  # reserved, not a hole that is a SIGBUS later
    assert (data.st_mode & 0o7777, table.st_mode & 0o7777) == (0o600, 0o600)
    assert not os.path.exists(slot.record_path)
    with pytest.raises(AlreadyExists):
        slots.allocate(RUN, "a", 10, 64)
    assert os.stat(slot.data_path).st_size == 10_000


def test_a_slot_that_does_not_fit_leaves_nothing_and_says_the_arithmetic(
    slots: Slots, place: Place
) -> None:
    with pytest.raises(TierFull) as raised:
        slots.allocate(RUN, "a", 1 << 50, 64)
    error = raised.value
    assert error.details["needed_bytes"] == (1 << 50) + 64
    assert isinstance(error.details["free_bytes"], int)
    assert "GiB short" in str(error)
    assert "remount,size=" in str(error)
    assert "--shm-size=" in str(error)
    assert not list((place.local.path_of(RUN) / ".slots").iterdir())


def test_a_full_tmpfs_is_an_error_and_leaves_nothing(
    slots: Slots, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def full(fd: int, offset: int, size_bytes: int) -> None:
        if size_bytes == 640:
            raise OSError(28, "No space left on device")
        reserve(fd, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TierFull):
        slots.allocate(RUN, "a", 10_000, 640)
    assert not list((place.local.path_of(RUN) / ".slots").iterdir())


def test_memory_that_a_cgroup_does_not_give_is_refused_before_the_kernel_kills(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_room, "memory_left_bytes", lambda: (5_000, "cgroup /x"))
    with pytest.raises(TierFull, match="cgroup /x has no room"):
        slots.allocate(RUN, "a", 10_000, 640)


def test_cgroups_and_meminfo_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 4000\n")
    monkeypatch.setattr(_room, "_own_cgroups", lambda: [group])
    assert _room.memory_left_bytes() == (104_000, f"cgroup {group}")
    (group / "memory.max").write_text("max\n")
    left_bytes, limit = _room.memory_left_bytes()
    assert limit == "this machine"
    assert left_bytes
    assert left_bytes > 104_000


@pytest.mark.parametrize("slot_id", ["", "../a", "a/b", ".a", "a.b", "A", "x" * 65])
def test_slot_ids_never_become_paths(slots: Slots, slot_id: str) -> None:
    with pytest.raises(UsageError):
        slots.allocate(RUN, slot_id, 10, 64)


def test_seal_makes_a_shard_of_the_very_same_file(slots: Slots, place: Place, shard: Shard) -> None:
    slot = captured(slots, shard)
    record, again = slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=True)
    assert (record.save_id, again) == (shard.parsed().save_id, False)
    path = place.local.path_of(f"{RUN}/{shard.name}/rank-00000.safetensors")
    assert path.stat().st_ino == slot.inode
    assert healthy(place, shard)
    assert slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=True)[1]
    with pytest.raises(ObjectNotFound, match="no slot b"):
        slots.seal(RUN, "b", 1, make_name(shard, 11), 0, verify=False)


def make_name(shard: Shard, step: int) -> _manifest.SaveName:
    return _manifest.SaveName(step, shard.name.incarnation, shard.name.short_id)


def test_seal_refuses_another_file_under_the_name_of_the_slot(slots: Slots, shard: Shard) -> None:
    slot = captured(slots, shard)
    with pytest.raises(ObjectNotFound, match="another file"):
        slots.seal(RUN, "a", slot.inode + 1, shard.name, 0, verify=False)
    assert os.path.exists(slot.data_path)


def test_seal_refuses_a_second_slot_as_the_same_shard(
    slots: Slots, place: Place, shard: Shard
) -> None:
    first, second = captured(slots, shard, "a"), captured(slots, shard, "b")
    slots.seal(RUN, "a", first.inode, shard.name, 0, verify=False)
    with pytest.raises(AlreadyExists):
        slots.seal(RUN, "b", second.inode, shard.name, 0, verify=False)
    assert os.path.exists(second.data_path)
    assert healthy(place, shard)


def _break_generation(slot: Slot, shard: Shard) -> None:
    with open(slot.table_path, "r+b") as file:
        file.seek(40)
        file.write(bytes(8))


def _break_table(slot: Slot, shard: Shard) -> None:
    flip(Path(slot.table_path), 70)


def _break_header(slot: Slot, shard: Shard) -> None:
    flip(Path(slot.data_path), 20)


def _break_record(slot: Slot, shard: Shard) -> None:
    flip(Path(slot.record_path), 100)


def _drop_record(slot: Slot, shard: Shard) -> None:
    os.unlink(slot.record_path)


def _break_data(slot: Slot, shard: Shard) -> None:
    flip(Path(slot.data_path), len(shard.data) - 1)


@pytest.mark.parametrize(
    "break_it",
    [_break_generation, _break_table, _break_header, _break_record, _drop_record, _break_data],
)
def test_a_capture_that_is_not_whole_is_refused_and_freed(
    slots: Slots, place: Place, shard: Shard, break_it: object
) -> None:
    slot = captured(slots, shard)
    break_it(slot, shard)  # type: ignore[operator]
    with pytest.raises((Damaged, FormatTooNew)):
        slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=True)
    assert not os.path.exists(slot.data_path)
    assert not list(place.local.list(""))


def test_a_record_of_another_save_or_rank_is_refused(slots: Slots, shard: Shard) -> None:
    slot = captured(slots, shard)
    with pytest.raises(Damaged, match="the record is of"):
        slots.seal(RUN, "a", slot.inode, make_name(shard, 11), 0, verify=False)
    slot = captured(slots, shard, "b")
    with pytest.raises(Damaged, match="the record is of"):
        slots.seal(RUN, "b", slot.inode, shard.name, 1, verify=False)


def test_a_link_in_the_place_of_a_record_is_not_followed(
    slots: Slots, shard: Shard, tmp_path: Path
) -> None:
    slot = captured(slots, shard)
    secret = tmp_path / "secret"
    secret.write_bytes(shard.record)
    os.unlink(slot.record_path)
    os.symlink(secret, slot.record_path)
    with pytest.raises(AccessDenied):
        slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)
    os.unlink(slot.record_path)
    os.link(secret, slot.record_path) if _same_device(secret, slot) else os.mkfifo(slot.record_path)
    with pytest.raises(AccessDenied):
        slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)


def _same_device(path: Path, slot: Slot) -> bool:
    return path.stat().st_dev == os.stat(slot.data_path).st_dev


def test_recycle_keeps_the_inode_and_zeroes_the_generation(
    slots: Slots, place: Place, shard: Shard
) -> None:
    slot = captured(slots, shard)
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)
    place.local.put(f"{RUN}/{shard.name}/metrics-1.json", BytesSource(b"{}"))
    again = slots.recycle(RUN, shard.name, 0, "b")
    assert again is not None
    assert (again.slot_id, again.inode) == ("b", slot.inode)
    assert Path(again.table_path).read_bytes()[40:48] == bytes(8)
    assert not place.local.path_of(f"{RUN}/{shard.name}").exists()
    assert slots.recycle(RUN, shard.name, 0, "b") == again  # the answer was lost
    fill_slot(again, shard)
    slots.seal(RUN, "b", again.inode, shard.name, 0, verify=True)
    assert healthy(place, shard)


def test_a_reader_keeps_a_shard_from_being_recycled(
    slots: Slots, place: Place, shard: Shard
) -> None:
    slot = captured(slots, shard)
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)
    with place.local.lease(f"{RUN}/{shard.name}/rank-00000.safetensors"):
        assert slots.recycle(RUN, shard.name, 0, "a") is None
        assert healthy(place, shard)
    assert slots.recycle(RUN, shard.name, 0, "a") is not None


def test_recycling_one_rank_leaves_the_others(slots: Slots, place: Place, tmp_path: Path) -> None:
    shards = [make_shard(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    for shard in shards:
        slot = captured(slots, shard, f"s{shard.rank}")
        slots.seal(RUN, slot.slot_id, slot.inode, shard.name, shard.rank, verify=False)
    assert slots.recycle(RUN, shards[0].name, 0, "s0") is not None
    assert healthy(place, shards[1])


def test_recycling_one_rank_leaves_another_that_was_sealed_by_half(
    slots: Slots, place: Place, tmp_path: Path
) -> None:
    one, other = (make_shard(tmp_path, rank=rank, world_size=2) for rank in (0, 1))
    first, second = captured(slots, one, "one"), captured(slots, other, "a")
    slots.seal(RUN, "one", first.inode, one.name, 0, verify=False)
    home = place.local.path_of(f"{RUN}/{one.name}")
    os.rename(second.data_path, home / "rank-00001.safetensors")  # killed after this
    assert slots.recycle(RUN, one.name, 0, "one") is not None
    slots.seal(RUN, "a", second.inode, other.name, 1, verify=True)
    assert healthy(place, other)


def test_scan_leaves_a_live_capture_alone(slots: Slots, shard: Shard) -> None:
    slot = slots.allocate(RUN, "a", len(shard.data), len(shard.table))
    Path(slot.record_path + ".new").write_bytes(shard.record[:100])
    for repair in (False, True):
        findings = slots.scan(RUN, repair=repair)
        assert [(found.slot, found.record) for found in findings.slots] == [(slot, None)]
        assert findings.repaired == []
    assert os.path.exists(slot.record_path + ".new")


def test_scan_finds_a_finished_capture(slots: Slots, shard: Shard) -> None:
    slot = captured(slots, shard)
    (found,) = slots.scan(RUN, repair=True).slots
    assert found.slot == slot
    assert found.record is not None
    assert found.generation == _manifest.generation_of(found.record.save_id)
    _break_generation(slot, shard)
    (found,) = slots.scan(RUN, repair=True).slots
    assert found.record is None


# -- a kill at every step --------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from mtckpt._manifest import SaveName
from mtckpt._run_files import RunFiles
from mtckpt._slots import Slots
from mtckpt.tiers import LocalTier, Survives
verb, root, name, inode, *sizes = sys.argv[1:]
tier = LocalTier(root, name="ram", survives=Survives.PROCESS, sync=False)
files = RunFiles(tier)
slots, save = Slots(tier, files), SaveName.parse(name)
if verb == "allocate":
    slots.allocate("run", "b", *map(int, sizes))
elif verb == "seal":
    slots.seal("run", "a", int(inode), save, 0, verify=False)
elif verb == "recycle":
    slots.recycle("run", save, 0, "a")
elif verb == "free":
    slots.free("run", "a")
else:
    files.wipe("run")
"""


def run_and_kill(point: str, verb: str, root: Path, shard: Shard, inode: int) -> None:
    sizes = [str(len(shard.data)), str(len(shard.table))]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, verb, str(root), str(shard.name), str(inode), *sizes],
        env={**os.environ, "MTCKPT_CRASH_AT": point, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -9, (point, done)  # the point exists and was passed


@pytest.mark.parametrize(
    "point",
    ["seal.checked", "seal.directory", "seal.safetensors", "seal.xxh3", "seal.json"],
)
def test_killed_in_a_seal(slots: Slots, place: Place, shard: Shard, point: str) -> None:
    slot = captured(slots, shard)
    root = place.local.path_of("x").parent
    run_and_kill(point, "seal", root, shard, slot.inode)
    findings = slots.scan(RUN, repair=True)
    if point == "seal.json":
        assert findings.slots == []
    else:
        assert [found.record and found.record.name for found in findings.slots] == [shard.name]
        assert findings.slots[0].slot == slot
        assert not list(place.local.list(""))
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=True)
    assert healthy(place, shard)


@pytest.mark.parametrize("point", [".safetensors", ".xxh3"])
def test_a_seal_goes_on_where_one_was_killed_without_a_scan(
    slots: Slots, place: Place, shard: Shard, point: str
) -> None:
    slot = captured(slots, shard)
    run_and_kill(f"seal{point}", "seal", place.local.path_of("x").parent, shard, slot.inode)
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=True)
    assert healthy(place, shard)


RECYCLE_POINTS = [".record", ".generation", ".xxh3", ".safetensors", ".done"]


@pytest.mark.parametrize("point", RECYCLE_POINTS)
@pytest.mark.parametrize("scanned", [True, False])
def test_killed_in_a_recycle(
    slots: Slots, place: Place, shard: Shard, point: str, scanned: bool
) -> None:
    slot = captured(slots, shard)
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)
    run_and_kill(f"recycle{point}", "recycle", place.local.path_of("x").parent, shard, slot.inode)
    assert not list(place.local.list("x"))
    if not scanned:
        again = slots.recycle(RUN, shard.name, 0, "a")
        assert again is not None
        assert again.inode == slot.inode
        return
    findings = slots.scan(RUN, repair=True)
    whole = point in (".safetensors", ".done")
    assert [found.slot.inode for found in findings.slots] == ([slot.inode] if whole else [])
    assert all(found.record is None and found.generation == 0 for found in findings.slots)
    assert not list(place.local.list(""))  # nothing is offered, and no memory is held in secret
    assert not place.local.path_of(f"{RUN}/{shard.name}").exists()
    assert len(list((place.local.path_of(RUN) / ".slots").iterdir())) == (2 if whole else 0)


@pytest.mark.parametrize("point", [".safetensors", ".xxh3"])
def test_killed_in_an_allocation(slots: Slots, place: Place, shard: Shard, point: str) -> None:
    run_and_kill(f"allocate{point}", "allocate", place.local.path_of("x").parent, shard, 0)
    findings = slots.scan(RUN, repair=True)
    left = list((place.local.path_of(RUN) / ".slots").iterdir())
    assert (len(findings.slots), len(left)) == ((1, 2) if point == ".xxh3" else (0, 0))


@pytest.mark.parametrize("point", [".json", ".xxh3", ".safetensors"])
def test_killed_in_a_free(slots: Slots, place: Place, shard: Shard, point: str) -> None:
    slot = captured(slots, shard)
    run_and_kill(f"free{point}", "free", place.local.path_of("x").parent, shard, slot.inode)
    findings = slots.scan(RUN, repair=True)
    assert all(found.record is None for found in findings.slots)
    slots.free(RUN, "a")
    assert not list((place.local.path_of(RUN) / ".slots").iterdir())


def test_killed_in_a_wipe(slots: Slots, place: Place, shard: Shard) -> None:
    slot = captured(slots, shard)
    slots.seal(RUN, "a", slot.inode, shard.name, 0, verify=False)
    run_and_kill("wipe.records", "wipe", place.local.path_of("x").parent, shard, slot.inode)
    slots.scan(RUN, repair=True)
    assert not list(place.local.list(""))
