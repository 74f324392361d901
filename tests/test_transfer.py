"""Copying, verifying, healing and deleting shards: damage and kills anywhere, a full target."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_maker import (
    RUN,
    Shard,
    disk_place,
    flip,
    make_shard,
    put_shard,
    ram_place,
)

from mtckpt import _inventory, _manifest
from mtckpt._manifest import Manifest
from mtckpt._source import Place
from mtckpt._transfer import copy_shard, delete_save, heal_shard, verify_shard, write_manifest
from mtckpt.errors import Damaged, FormatTooNew, ObjectNotFound, TierFull, TierUnavailable
from mtckpt.tiers import BytesSource, PutResult, Source, ThrottledTier
from mtckpt.tiers._rooted import temporary_name


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return make_shard(tmp_path)


@pytest.fixture
def ram(ram_dir: Path, shard: Shard) -> Place:
    put_shard(ram_dir / "root", shard)
    return ram_place(ram_dir / "root")


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    return disk_place(tmp_path / "disk")


def files_of(place: Place, shard: Shard) -> tuple[Path, Path, Path]:
    keys = _inventory.shard_keys(RUN, shard.name, shard.rank)
    data, table, record = (place.local.path_of(key) for key in keys)
    return data, table, record


def holds(place: Place, shard: Shard) -> bool:
    wanted = (shard.data, shard.table, shard.record)
    return all(
        p.read_bytes() == data for p, data in zip(files_of(place, shard), wanted, strict=True)
    )


def listed(place: Place) -> list[str]:
    return [info.key for info in place.local.list("")]


def test_a_copy_is_the_same_bytes_with_the_record_last(
    ram: Place, disk: Place, shard: Shard
) -> None:
    seen: list[int] = []
    result = copy_shard(ram, disk, RUN, shard.name, 0, progress=seen.append)
    assert holds(disk, shard)
    assert sum(seen) == len(shard.data)
    assert result.copied_bytes == len(shard.data) + len(shard.table) + len(shard.record)
    times = [path.stat().st_mtime_ns for path in files_of(disk, shard)]
    assert times == sorted(times)
    assert copy_shard(ram, disk, RUN, shard.name, 0).copied_bytes == 0
    assert write_manifest(disk, RUN, shard.name)
    manifest = _manifest.decode_sealed(
        disk.local.path_of(f"{RUN}/{shard.name}/manifest.json").read_bytes(), Manifest
    )
    assert (manifest.save_id, manifest.world_size) == (shard.parsed().save_id, 1)


def test_a_large_shard_is_checked_in_blocks_by_two_threads(ram_dir: Path, tmp_path: Path) -> None:
    large = make_shard(tmp_path, size=60)  # 24 MB
    put_shard(ram_dir / "root", large)
    ram, disk = ram_place(ram_dir / "root"), disk_place(tmp_path / "disk")
    copy_shard(ram, disk, RUN, large.name, 0)
    assert holds(disk, large)
    again = ram_place(ram_dir / "again")
    copy_shard(disk, again, RUN, large.name, 0)
    assert holds(again, large)
    for place in (ram, disk):
        path = files_of(place, large)[0]
        for offset in (len(large.data) - 1, 8 << 20, (8 << 20) - 1, 16 << 20, 4096):
            flip(path, offset)
            result = verify_shard(place, RUN, large.name, 0)
            assert list(result.damaged) == [f"{RUN}/{large.name}/rank-00000.safetensors"], offset
            flip(path, offset)
        assert not verify_shard(place, RUN, large.name, 0).damaged


def test_a_manifest_waits_for_every_rank(ram_dir: Path, tmp_path: Path, disk: Place) -> None:
    shards = [make_shard(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    for shard in shards:
        put_shard(ram_dir / "root", shard)
    ram = ram_place(ram_dir / "root")
    copy_shard(ram, disk, RUN, shards[0].name, 0)
    key = _inventory.save_key(RUN, shards[0].name, _manifest.MANIFEST_FILE)
    assert not write_manifest(disk, RUN, shards[0].name)
    with pytest.raises(ObjectNotFound):
        disk.tier.stat(key)
    # Unless the rest is known to lie on other nodes: what is here is noted, and it is no save.
    assert not write_manifest(disk, RUN, shards[0].name, parts=True)
    assert not _inventory.scan(disk.tier, RUN).saves[shards[0].name].unfinished
    disk.tier.delete(key)
    copy_shard(ram, disk, RUN, shards[0].name, 1)
    assert write_manifest(disk, RUN, shards[0].name)
    assert write_manifest(disk, RUN, shards[0].name)  # the other rank's flush has written it


# -- damage ----------------------------------------------------------------------------------------


def _flip_data(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[0], len(shard.data) - 5)
    return 0


def _flip_header(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[0], 100)
    return 0


def _flip_length(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[0], 6)
    return 0


def _zero_page(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    with open(files[0], "r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    return 0


def _cut_data(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    os.truncate(files[0], len(shard.data) - 100)
    return 0


def _empty_data(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    os.truncate(files[0], 0)
    return 0


def _longer_data(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    os.truncate(files[0], len(shard.data) + 4096)
    return 0


def _flip_table(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[1], 80)
    return 1


def _flip_generation(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[1], 41)
    return 1


def _cut_table(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    os.truncate(files[1], 60)
    return 1


def _flip_record(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    flip(files[2], len(shard.record) // 2)
    return 2


def _empty_record(shard: Shard, files: tuple[Path, Path, Path]) -> int:
    os.truncate(files[2], 0)
    return 2


DAMAGES = [
    _flip_data, _flip_header, _flip_length, _zero_page, _cut_data, _empty_data, _longer_data,
    _flip_table, _flip_generation, _cut_table, _flip_record, _empty_record,
]  # fmt: skip
Damage = Callable[[Shard, tuple[Path, Path, Path]], int]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_damage_is_found_never_copied_and_healed(
    ram: Place, disk: Place, shard: Shard, tmp_path: Path, where: str, damage: Damage
) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    bad, good = (ram, disk) if where == "ram" else (disk, ram)
    bad_key = _inventory.shard_keys(RUN, shard.name, 0)[damage(shard, files_of(bad, shard))]

    assert list(verify_shard(bad, RUN, shard.name, 0).damaged) == [bad_key]
    elsewhere = disk_place(tmp_path / "elsewhere")
    with pytest.raises((Damaged, FormatTooNew)) as raised:
        copy_shard(bad, elsewhere, RUN, shard.name, 0)
    assert raised.value.details["tier"] == bad.local.name
    assert raised.value.details["key"] == bad_key
    assert listed(elsewhere) == []
    with pytest.raises(Damaged, match="the copy to heal from"):
        heal_shard(good, bad, RUN, shard.name, 0)
    assert holds(good, shard)

    assert bad_key in heal_shard(bad, good, RUN, shard.name, 0)
    assert holds(bad, shard)
    assert not verify_shard(bad, RUN, shard.name, 0).damaged
    aside = list(bad.local.quarantined())
    assert [item.key for item in aside] == ([] if where == "ram" else [bad_key])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_on_the_target_is_written_anew(
    ram: Place, disk: Place, shard: Shard, damage: Damage
) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    bad_key = _inventory.shard_keys(RUN, shard.name, 0)[damage(shard, files_of(disk, shard))]
    assert copy_shard(ram, disk, RUN, shard.name, 0).rewritten == [bad_key]
    assert holds(disk, shard)


def test_a_missing_file_is_damage_and_is_healed(ram: Place, disk: Place, shard: Shard) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    for path in files_of(disk, shard):
        path.unlink()
        assert list(verify_shard(disk, RUN, shard.name, 0).damaged.values()) == ["is not there"]
        heal_shard(disk, ram, RUN, shard.name, 0)
        assert holds(disk, shard)


def test_a_shard_of_another_step_under_the_right_name_is_found(
    ram: Place, shard: Shard, tmp_path: Path
) -> None:
    other = make_shard(tmp_path, step=20, seed=1)
    assert len(other.data) == len(shard.data)
    data, table, record = files_of(ram, shard)
    data.write_bytes(other.data)
    assert list(verify_shard(ram, RUN, shard.name, 0).damaged)
    table.write_bytes(other.table)
    assert list(verify_shard(ram, RUN, shard.name, 0).damaged)
    record.write_bytes(other.record)
    (reason,) = verify_shard(ram, RUN, shard.name, 0).damaged.values()
    assert str(other.name) in reason


# -- targets that do not take it -------------------------------------------------------------------


class _Refusing:
    """Passes puts on until the one that is to fail."""

    def __init__(self, place: Place, key: str, error: Exception) -> None:
        self._place, self._key, self._error = place, key, error

    def put(self, key: str, source: Source) -> PutResult:
        if key == self._key:
            raise self._error
        return self._place.local.put(key, source)

    def __getattr__(self, name: str) -> object:
        return getattr(self._place.local, name)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_target_that_fails_holds_nothing_of_the_save(
    ram: Place, disk: Place, shard: Shard, which: int
) -> None:
    key = _inventory.shard_keys(RUN, shard.name, 0)[which]
    refusing = Place(disk.local, _Refusing(disk, key, TierFull("no room")), in_memory=False)  # type: ignore[arg-type]
    with pytest.raises(TierFull):
        copy_shard(ram, refusing, RUN, shard.name, 0)
    assert listed(disk) == []
    copy_shard(ram, disk, RUN, shard.name, 0)
    assert holds(disk, shard)


def test_what_was_there_before_stays_when_a_target_fails(
    ram: Place, disk: Place, shard: Shard
) -> None:
    data_key, _, record_key = _inventory.shard_keys(RUN, shard.name, 0)
    disk.local.put(data_key, BytesSource(shard.data))
    error = TierUnavailable("gone")
    refusing = Place(disk.local, _Refusing(disk, record_key, error), in_memory=False)  # type: ignore[arg-type]
    with pytest.raises(TierUnavailable):
        copy_shard(ram, refusing, RUN, shard.name, 0)
    assert listed(disk) == [data_key]


def test_an_unreadable_sector_is_damage_and_a_dead_device_is_not(
    ram: Place, disk: Place, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    for number, damaged in ((5, True), (107, False)):

        def fail(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr("mtckpt._held.os.preadv", fail)
            if damaged:
                (reason,) = verify_shard(disk, RUN, shard.name, 0).damaged.values()
                assert "EIO" in reason
            else:
                with pytest.raises(TierUnavailable):
                    verify_shard(disk, RUN, shard.name, 0)


def test_puts_go_through_a_throttle(ram: Place, disk: Place, shard: Shard) -> None:
    waits: list[float] = []
    now = [0.0]

    def sleep(wait_s: float) -> None:
        waits.append(wait_s)
        now[0] += wait_s

    slow = ThrottledTier(
        disk.local, bytes_per_s=100_000, burst_bytes=1, sleep=sleep, clock=lambda: now[0]
    )
    copy_shard(ram, Place(disk.local, slow, in_memory=False), RUN, shard.name, 0)
    assert holds(disk, shard)
    assert sum(waits) == pytest.approx(len(shard.data) / 100_000, rel=0.1)


# -- deleting, and a kill at every step ------------------------------------------------------------


def test_delete_waits_for_readers_and_takes_everything(
    ram: Place, disk: Place, shard: Shard
) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    write_manifest(disk, RUN, shard.name)
    disk.local.put(f"{RUN}/{shard.name}/metrics-1.json", BytesSource(b"{}"))
    with disk.local.lease(_inventory.shard_keys(RUN, shard.name, 0)[0]):
        assert delete_save(disk, RUN, shard.name) == (True, 0)
        assert holds(disk, shard)
    flip(files_of(disk, shard)[0], 5000)
    copy_shard(ram, disk, RUN, shard.name, 0)
    assert len(list(disk.local.quarantined())) == 1
    busy, freed_bytes = delete_save(disk, RUN, shard.name)
    assert not busy
    assert freed_bytes > 2 * len(shard.data)
    assert not disk.local.path_of(f"{RUN}/{shard.name}").exists()
    assert delete_save(disk, RUN, shard.name) == (False, 0)


def test_delete_takes_what_failed_calls_left(disk: Place, shard: Shard) -> None:
    """A put whose own clean-up failed too, and a deletion that could not remove the directory."""
    home = disk.local.path_of(f"{RUN}/{shard.name}")
    home.mkdir(parents=True)
    assert delete_save(disk, RUN, shard.name) == (False, 0)
    assert not home.exists()
    home.mkdir(parents=True)
    (home / temporary_name()).write_bytes(b"left")
    with open(home / temporary_name(), "wb") as in_flight:
        fcntl.flock(in_flight, fcntl.LOCK_SH)
        assert delete_save(disk, RUN, shard.name) == (False, 0)
        assert [str(path) for path in home.iterdir()] == [in_flight.name]
    assert delete_save(disk, RUN, shard.name) == (False, 0)
    assert not home.exists()


# No shard_maker in it: NumPy would take longer to load than all the rest.
_SCRIPT = """
import sys
from mtckpt._manifest import SaveName
from mtckpt._source import Place
from mtckpt._transfer import copy_shard, delete_save, heal_shard, write_manifest
from mtckpt.tiers import LocalTier
verb, ram, disk, name = sys.argv[1:]
ram, disk, name = LocalTier(ram, sync=False), LocalTier(disk), SaveName.parse(name)
ram, disk = Place(ram, ram, in_memory=True), Place(disk, disk, in_memory=False)
if verb == "flush":
    copy_shard(ram, disk, "run", name, 0)
    write_manifest(disk, "run", name)
elif verb == "heal":
    heal_shard(disk, ram, "run", name, 0)
else:
    delete_save(disk, "run", name)
"""


def run_and_kill(point: str, verb: str, ram: Place, disk: Place, shard: Shard) -> None:
    roots = [str(place.local.path_of("x").parent) for place in (ram, disk)]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, verb, *roots, str(shard.name)],
        env={**os.environ, "MTCKPT_CRASH_AT": point, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -9, (point, done)


def offered(place: Place) -> list[str]:
    saves = _inventory.scan(place.local, RUN).saves
    return [str(name) for name, save in saves.items() if save.complete]


@pytest.mark.parametrize(
    ("point", "is_offered"),
    [
        ("put.written", False),
        ("put.linked:1", False),
        ("flush.data", False),
        ("put.linked:2", False),
        ("flush.table", False),
        ("put.linked:3", True),
        ("flush.record", True),
        ("flush.manifest", True),
    ],
)
def test_killed_in_a_flush(
    ram: Place, disk: Place, shard: Shard, point: str, is_offered: bool
) -> None:
    run_and_kill(point, "flush", ram, disk, shard)
    assert offered(disk) == ([str(shard.name)] if is_offered else [])
    if is_offered:
        assert holds(disk, shard)
    disk.local.sweep_temporaries()
    copy_shard(ram, disk, RUN, shard.name, 0)
    assert holds(disk, shard)
    assert write_manifest(disk, RUN, shard.name)


@pytest.mark.parametrize("point", ["heal.aside", "flush.data", "flush.record"])
def test_killed_in_a_heal(ram: Place, disk: Place, shard: Shard, point: str) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    flip(files_of(disk, shard)[0], 9000)
    run_and_kill(point, "heal", ram, disk, shard)
    heal_shard(disk, ram, RUN, shard.name, 0)
    assert holds(disk, shard)


@pytest.mark.parametrize("index", range(4))
def test_killed_in_a_delete(ram: Place, disk: Place, shard: Shard, index: int) -> None:
    copy_shard(ram, disk, RUN, shard.name, 0)
    write_manifest(disk, RUN, shard.name)
    run_and_kill(f"delete.{index}", "delete", ram, disk, shard)
    assert offered(disk) == []
    assert not files_of(disk, shard)[2].exists()  # first of all, whatever else is still there
    with pytest.raises(ObjectNotFound):
        copy_shard(disk, ram, RUN, shard.name, 0)
    assert delete_save(disk, RUN, shard.name)[0] is False
    assert listed(disk) == []
