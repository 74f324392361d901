"""Records, manifests, incarnations and names: nothing flipped passes, nothing odd gets through."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_maker import make_shard
from xxhash import xxh3_128_hexdigest

from mtckpt import _manifest
from mtckpt._manifest import (
    Incarnation,
    Manifest,
    Metrics,
    Record,
    SaveName,
    decode_sealed,
    encode_sealed,
    is_complete,
    newest_line,
    on_line,
    run_key,
    save_id,
)
from mtckpt.errors import Damaged, FormatError, FormatTooNew, UsageError
from mtckpt.tiers import check_key

ID = str(uuid.UUID(int=5))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return make_shard(tmp_path_factory.mktemp("record")).parsed()


def test_sealed_files_are_read_back(record: Record) -> None:
    values: list[Record | Incarnation | Metrics | Manifest] = [
        record,
        Incarnation(1, "run", 2, ID, (1, 10), "host", 7),
        Metrics(1, 5, ID, {"loss": 1.5}),
        Manifest(1, "run", 5, 1, ID, 1, [_manifest.ManifestEntry(0, 10, "x")]),
    ]
    for value in values:
        data = encode_sealed(value)
        kind: Any = type(value)
        assert decode_sealed(data, kind) == value
        for other in values:
            if type(other) is not type(value):
                other_kind: Any = type(other)
                with pytest.raises(Damaged):
                    decode_sealed(data, other_kind)


def test_no_flipped_bit_in_a_record_passes(record: Record) -> None:
    data = bytearray(encode_sealed(record))
    for at in range(len(data) - 1):  # the last byte is the newline, which says nothing
        data[at] ^= 1 << (at % 8)
        with pytest.raises(FormatError):
            decode_sealed(bytes(data), Record)
        data[at] ^= 1 << (at % 8)
    assert decode_sealed(bytes(data), Record) == record


@given(st.binary(max_size=100))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_sealed(data, Record)
    with pytest.raises(FormatError):
        decode_sealed(b"[" * 5000 + data, Record)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", 10**12 + 1),
        ("rank", -1),
        ("rank", 100_000),
        ("world_size", 0),
        ("world_size", 10**9),
        ("incarnation", -1),
        ("incarnation", 10**9),
        ("save_id", "../../etc/passwd"),
        ("save_id", ""),
        ("run", 5),
        ("shard", {}),
    ],
)
def test_a_record_with_impossible_numbers_is_refused(
    record: Record, name: str, value: object
) -> None:
    body = msgspec.json.decode(msgspec.json.encode(record))
    assert decode_sealed(_sealed(body), Record) == record
    with pytest.raises(Damaged):
        decode_sealed(_sealed(body | {name: value}), Record)


def _sealed(body: dict[str, object]) -> bytes:
    """A record by somebody who can compute a digest."""
    raw = msgspec.json.encode(body)
    digest = xxh3_128_hexdigest(b"record" + raw)
    return msgspec.json.encode({"kind": "record", "digest": digest, "body": msgspec.Raw(raw)})


def test_a_later_version_is_said_to_be_one(record: Record) -> None:
    later = msgspec.structs.replace(record, version=2)
    with pytest.raises(FormatTooNew) as raised:
        decode_sealed(encode_sealed(later), Record)
    assert raised.value.details == {"version": 2, "supported": 1}


def test_leaves_are_decoded_on_demand_and_checked(record: Record) -> None:
    assert [entry.path for entry in record.array_entries()] == ["large", "small", "empty", "wide"]
    assert len(record.root_bytes()) == 16 * 4
    for arrays in (
        b"5",
        b'[{"path":1}]',
        b'[{"path":"a","dtype":"f","shape":[],"framework":"n","same_as":1}]',
    ):
        with pytest.raises(Damaged):
            msgspec.structs.replace(record, arrays=msgspec.Raw(arrays)).array_entries()
    with pytest.raises(Damaged):
        msgspec.structs.replace(record, roots="***").root_bytes()


# -- names -----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.text(max_size=150))
def test_any_run_name_becomes_one_safe_directory(run: str) -> None:
    if not run:
        with pytest.raises(UsageError):
            run_key(run)
        return
    key = run_key(run)
    assert check_key(key) == key
    assert "/" not in key
    assert key == run or key.rpartition("-")[2] != ""


def test_different_runs_have_different_directories() -> None:
    runs = ["a", "A", "a b", "a-b", "a/b", "ä", "..", ".", "a.", "x" * 101, "x" * 102, "a\0"]
    assert len({run_key(run) for run in runs}) == len(runs)
    with pytest.raises(UsageError):
        run_key("x" * 1001)


@given(st.integers(0, 10**12), st.integers(0, 10**9 - 1), st.uuids())
def test_names_of_saves_are_read_back_and_sort_by_step(
    step: int, incarnation: int, id_: uuid.UUID
) -> None:
    name = _manifest.save_name(step, incarnation, str(id_))
    assert SaveName.parse(str(name)) == name
    assert check_key(str(name))
    assert name < _manifest.save_name(step + 1, 0, str(id_))
    assert 0 < _manifest.generation_of(str(id_)) < 2**64


@pytest.mark.parametrize(
    "name", ["", "step-1.1.a", "step-000000000001.000001.0123456789AB", "../x", "step-x"]
)
def test_other_names_are_no_saves(name: str) -> None:
    assert SaveName.parse(name) is None


def test_save_ids_are_derived_alike_on_every_rank() -> None:
    assert save_id(ID, 10, 0) == save_id(ID, 10, 0)
    assert len({save_id(ID, step, attempt) for step in range(5) for attempt in range(5)}) == 25


def test_file_names_are_read_back() -> None:
    assert _manifest.parse_record_file(_manifest.record_file(123)) == 123
    assert _manifest.parse_record_file("rank-123.json") is None
    name = _manifest.incarnation_file(7, ID)
    assert _manifest.parse_incarnation_file(name) == 7
    assert _manifest.parse_incarnation_file(name + "x") is None


# -- decisions -------------------------------------------------------------------------------------


def test_a_save_is_complete_when_every_rank_of_one_save_is_there(tmp_path: Path) -> None:
    parts = [make_shard(tmp_path, rank=rank, world_size=3).parsed() for rank in range(3)]
    records = dict(enumerate(parts))
    assert is_complete(records)
    assert not is_complete({})
    for rank in range(3):
        assert not is_complete({r: part for r, part in records.items() if r != rank})
    other = msgspec.structs.replace(parts[1], save_id=ID)
    assert not is_complete(records | {1: other})
    huge = msgspec.structs.replace(parts[0], world_size=10**5)
    assert not is_complete({0: huge})


def test_parts_of_different_plans_are_no_save(tmp_path: Path) -> None:
    parts = [make_shard(tmp_path, rank=rank, world_size=2).parsed() for rank in range(2)]
    assert is_complete(dict(enumerate(parts)))
    other = msgspec.structs.replace(parts[1], plan_digest="0" * 32)
    assert not is_complete({0: parts[0], 1: other})


def started(number: int, parent: tuple[int, int] | None = None, id_: int = 0) -> Incarnation:
    return Incarnation(1, "run", number, str(uuid.UUID(int=id_ or number)), parent)


def test_the_line_leaves_out_what_was_rolled_back() -> None:
    line = newest_line([started(1), started(2, (1, 500))])
    assert line == [(2, None), (1, 500)]
    name = SaveName(1000, 1, "0" * 12)
    assert not on_line(name, line)
    assert on_line(SaveName(500, 1, "0" * 12), line)
    assert on_line(SaveName(510, 2, "0" * 12), line)
    assert newest_line([]) == []


def test_a_branch_of_a_branch_keeps_the_lowest_limit() -> None:
    line = newest_line(
        [started(1), started(2, (1, 100)), started(3, (2, 150)), started(4, (1, 50))]
    )
    assert line == [(4, None), (1, 50)]


def test_lost_and_twin_incarnations_are_decided_alike_everywhere() -> None:
    assert newest_line([started(3, (2, 20))]) == [(3, None), (2, 20)]
    twins = [started(2, (1, 5), id_=9), started(2, (1, 7), id_=8)]
    assert newest_line(twins) == newest_line(twins[::-1]) == [(2, None), (1, 5)]


@given(
    st.lists(
        st.builds(
            started,
            st.integers(0, 6),
            st.one_of(st.none(), st.tuples(st.integers(0, 6), st.integers(0, 9))),
            st.integers(1, 99),
        ),
        max_size=8,
    )
)
def test_any_parents_make_a_line_that_ends(incarnations: list[Incarnation]) -> None:
    line = newest_line(incarnations)
    assert len(line) <= len(incarnations) + 1
    assert not incarnations or line[0] == (max(i.number for i in incarnations), None)
