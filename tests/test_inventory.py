"""What a tier is said to hold: records believed, names and manifests not."""

from __future__ import annotations

from pathlib import Path

import builders
import msgspec
import pytest
from shard_maker import RUN, Shard, disk_place, flip, make_shard, put_shard, write

from mtckpt import _inventory, _manifest, _shard
from mtckpt._inventory import check_identity, check_record, scan, scan_save
from mtckpt._manifest import SaveName
from mtckpt._source import Place
from mtckpt.errors import Damaged


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return make_shard(tmp_path)


@pytest.fixture
def place(tmp_path: Path, shard: Shard) -> Place:
    put_shard(tmp_path / "disk", shard)
    return disk_place(tmp_path / "disk")


def files_of(place: Place, shard: Shard) -> list[Path]:
    return [place.local.path_of(key) for key in _inventory.shard_keys(RUN, shard.name, shard.rank)]


def test_a_save_is_its_records(place: Place, shard: Shard, tmp_path: Path) -> None:
    builders.build_incarnation(tmp_path / "disk", RUN, 1)
    other = make_shard(tmp_path, step=20, rank=1, world_size=2)
    put_shard(tmp_path / "disk", other)
    found = scan(place.local, RUN)
    assert sorted(found.saves) == [shard.name, other.name]
    assert [save.complete for _, save in sorted(found.saves.items())] == [True, False]
    assert found.saves[shard.name].size_bytes == len(shard.data)
    assert [incarnation.number for incarnation in found.incarnations] == [1]
    assert found.problems == []
    assert scan_save(place.local, RUN, other.name).records.keys() == {1}
    assert scan_save(place.local, RUN, SaveName(99, 1, "0" * 12)).records == {}


def test_a_manifest_vouches_for_nothing_and_its_absence_hides_nothing(
    place: Place, shard: Shard
) -> None:
    record = files_of(place, shard)[2]
    builders.build_manifest(record.parent)
    assert scan_save(place.local, RUN, shard.name).complete
    data = record.read_bytes()
    record.unlink()
    assert not scan_save(place.local, RUN, shard.name).complete
    write(record, data)
    (record.parent / "manifest.json").unlink()
    assert scan_save(place.local, RUN, shard.name).complete


def test_a_record_is_not_believed_about_another_place(place: Place, shard: Shard) -> None:
    name = SaveName(11, shard.name.incarnation, shard.name.short_id)
    record = files_of(place, shard)[2]
    record.parent.rename(record.parent.parent / str(name))
    found = scan_save(place.local, RUN, name)
    assert not found.records
    assert "the record is of step-000000000010" in found.problems[0]
    with pytest.raises(Damaged):
        check_record(shard.parsed(), shard.name, 1)


def test_damage_is_a_problem_of_its_save_alone(place: Place, shard: Shard, tmp_path: Path) -> None:
    other = make_shard(tmp_path, step=20)
    put_shard(tmp_path / "disk", other)
    data, _, record = files_of(place, shard)
    flip(record, 50)
    found = scan(place.local, RUN)
    assert found.saves[other.name].complete
    assert not found.saves[shard.name].complete
    assert found.saves[shard.name].problems
    flip(record, 50)
    data.write_bytes(shard.data[:-1])
    assert "bytes where the record says" in scan_save(place.local, RUN, shard.name).problems[0]
    data.unlink()
    assert "its shard is gone" in scan_save(place.local, RUN, shard.name).problems[0]


def test_metrics_reported_later_count(place: Place, shard: Shard) -> None:
    home = files_of(place, shard)[2].parent
    path = builders.build_metrics(home, {"loss": 0.5})
    assert scan_save(place.local, RUN, shard.name).metrics == {"loss": 0.5}
    flip(path, 40)
    found = scan_save(place.local, RUN, shard.name)
    assert found.complete
    assert found.metrics == {}
    assert "metrics-1.json" in found.problems[0]


def test_damaged_incarnations_are_problems(place: Place, tmp_path: Path) -> None:
    flip(builders.build_incarnation(tmp_path / "disk", RUN, 1), 60)
    found = scan(place.local, RUN)
    assert found.incarnations == []
    assert len(found.problems) == 1


def test_incarnations_of_several_tiers_are_joined_once(tmp_path: Path) -> None:
    for tier in ("a", "b"):
        builders.build_incarnation(tmp_path / tier, RUN, 1)
    builders.build_incarnation(tmp_path / "b", RUN, 2, (1, 5))
    found = [scan(disk_place(tmp_path / tier).local, RUN) for tier in ("a", "b")]
    assert [i.number for i in _inventory.all_incarnations(found)] == [1, 2]


def test_three_files_must_be_of_one_save(shard: Shard, tmp_path: Path) -> None:
    other = make_shard(tmp_path, step=20, seed=3)
    record, size_bytes = shard.parsed(), len(shard.data)
    header = shard.data[: _shard.header_length(shard.data, size_bytes)]
    layout, table = check_identity(record, header, size_bytes, shard.table)
    assert layout.size_bytes == size_bytes
    assert table.generation == _manifest.generation_of(record.save_id)
    broken = bytearray(header)
    broken[30] ^= 1
    later = shard.table[:40] + bytes([1] * 8) + shard.table[48:]
    entry = msgspec.structs.replace(record.shard, table_digest=_shard.table_digest(later))
    with pytest.raises(Damaged, match="another save"):
        check_identity(msgspec.structs.replace(record, shard=entry), header, size_bytes, later)
    for arguments, kind in (
        ((record, header, size_bytes, other.table), "table"),
        ((record, header, size_bytes + 1, shard.table), "data"),
        ((record, bytes(broken), size_bytes, shard.table), "data"),
        ((other.parsed(), header, size_bytes, shard.table), "table"),
    ):
        with pytest.raises(Damaged) as raised:
            check_identity(*arguments)
        assert raised.value.details["kind"] == kind
