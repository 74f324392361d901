"""The shard file and its table: layout, what is refused, what damage is found."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from shard_maker import make_shard
from xxhash import xxh3_64_intdigest

from mtckpt import _shard
from mtckpt._dtypes import DTYPES
from mtckpt._shard import (
    CHUNK_BYTES,
    ShardLayout,
    Table,
    check_chunks,
    chunk_spans,
    parse_layout,
    plan_layout,
    verify_mapped,
)
from mtckpt.errors import Damaged, FormatError, FormatTooNew, UnsupportedState

array_lists = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda row: row[0],
)


def table_of(layout: ShardLayout, data: bytes, generation: int = 7) -> bytes:
    digests = []
    for tensor in layout.tensors:
        body = data[tensor.start : tensor.start + tensor.size_bytes]
        for begin in range(0, len(body), CHUNK_BYTES):
            digests.append(xxh3_64_intdigest(body[begin : begin + CHUNK_BYTES]))
    return Table.header(layout, generation) + struct.pack(f"<{len(digests)}Q", *digests)


def filled(arrays: list[tuple[str, str, tuple[int, ...]]]) -> tuple[ShardLayout, bytes, bytes]:
    layout = plan_layout(arrays)
    body = np.random.default_rng(1).bytes(layout.size_bytes - layout.data_start)
    data = layout.header + body
    return layout, data, table_of(layout, data)


LARGE: list[tuple[str, str, tuple[int, ...]]] = [
    ("a", "float32", (CHUNK_BYTES // 4 + 1,)),
    ("b", "uint8", (CHUNK_BYTES * 2,)),
    ("c", "uint8", (5,)),
    ("d", "float64", (0,)),
]


@given(array_lists)
def test_a_planned_header_is_read_back_as_the_same_layout(
    arrays: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    layout = plan_layout(arrays)
    assert parse_layout(layout.header, layout.size_bytes) == layout
    assert layout.data_start % 4096 == 0
    end = layout.data_start
    for tensor in layout.tensors:
        item_bytes = next(d.stored_item_bytes for d in DTYPES.values() if d.code == tensor.code)
        assert tensor.start == end
        assert tensor.start % item_bytes == 0
        end += tensor.size_bytes
    assert end == layout.size_bytes


@given(array_lists)
def test_the_safetensors_library_reads_what_was_planned(
    arrays: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    layout = plan_layout(arrays)
    data = layout.header + bytes(layout.size_bytes - layout.data_start)
    found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]  # it has no types
    assert set(found) == {name for name, _, _ in arrays}


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", "twice"])
def test_names_that_no_reader_would_take_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedState) as raised:
        plan_layout([("twice", "uint8", (1,)), (name, "uint8", (1,))])
    str(raised.value).encode()


def test_too_much_for_one_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedState, match="cannot have"):
        plan_layout([("a", "float64", (1 << 44,))])
    monkeypatch.setattr(_shard, "MAX_HEADER_BYTES", 8192)
    with pytest.raises(UnsupportedState, match="need a header"):
        plan_layout([(f"t{i:04}", "uint8", (1,)) for i in range(500)])


@given(st.binary(max_size=300), st.integers(0, 1 << 60))
def test_any_bytes_as_a_header_are_a_typed_error_or_a_layout(data: bytes, file_bytes: int) -> None:
    for header in (data, struct.pack("<Q", max(len(data), 8) - 8) + data[8:]):
        try:
            layout = parse_layout(header, file_bytes)
        except FormatError:
            continue
        assert layout.size_bytes == file_bytes


def _entry(code: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("entries", "data_bytes"),
    [
        ({"a": _entry("U8", [4], 4, 8)}, 8),  # a hole in front
        ({"a": _entry("U8", [4], 0, 4), "b": _entry("U8", [4], 2, 6)}, 6),  # overlap
        ({"a": _entry("U8", [4], 0, 4), "b": _entry("U8", [4], 0, 4)}, 8),  # the same place twice
        ({"a": _entry("U8", [4], 0, 8)}, 8),  # longer than its shape
        ({"a": _entry("U8", [4], 0, 4)}, 5),  # bytes behind the data
        ({"a": _entry("U8", [-4, -1], 0, 4)}, 4),
        ({"a": _entry("U8", [1 << 62, 4], 0, 4)}, 4),
        ({"a": _entry("U8", [1] * 65, 0, 1)}, 1),
        ({"a": {"dtype": "U8"}}, 0),
        ({"a": 5}, 0),
        ([], 0),
    ],
)
def test_headers_that_do_not_add_up_are_damage(entries: object, data_bytes: int) -> None:
    text = msgspec.json.encode(entries)
    header = struct.pack("<Q", len(text)) + text
    with pytest.raises(Damaged):
        parse_layout(header, len(header) + data_bytes)


def test_an_unknown_type_is_of_a_later_version() -> None:
    text = msgspec.json.encode({"a": _entry("F3", [4], 0, 4)})
    header = struct.pack("<Q", len(text)) + text
    with pytest.raises(FormatTooNew):
        parse_layout(header, len(header) + 4)


def test_a_header_length_is_refused_before_it_is_allocated() -> None:
    for prefix in (b"", struct.pack("<Q", 1 << 62), struct.pack("<Q", 1000)):
        with pytest.raises(Damaged):
            _shard.header_length(prefix, 500)
    with pytest.raises(Damaged):
        _shard.header_length(struct.pack("<Q", 1 << 30), 1 << 40)


# -- the table -------------------------------------------------------------------------------------


def test_a_table_is_read_back_and_belongs_to_one_layout() -> None:
    layout, _, data = filled(LARGE)
    table = Table.parse(data, layout)
    assert (table.generation, _shard.generation_in(data)) == (7, 7)
    assert len(table.digests) == layout.num_chunks == 5
    assert len(data) == layout.table_bytes
    other = plan_layout([*LARGE[:2], ("x", "uint8", (5,)), LARGE[3]])
    with pytest.raises(Damaged, match="not of this shard"):
        Table.parse(data, other)


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, b"X", Damaged),
        (8, b"\x09", FormatTooNew),
        (12, b"\x01", Damaged),
        (24, b"\x63", Damaged),
    ],
)
def test_a_broken_table_is_refused(offset: int, value: bytes, error: type[Exception]) -> None:
    _, _, data = filled(LARGE)
    with pytest.raises(error):
        Table.parse(data[:offset] + value + data[offset + 1 :])
    for length in (0, 63, len(data) - 1):
        with pytest.raises(Damaged):
            Table.parse(data[:length])


@given(st.binary(max_size=200))
def test_any_bytes_as_a_table_are_a_typed_error(data: bytes) -> None:
    for candidate in (data, _shard.TABLE_MAGIC + data):
        try:
            Table.parse(candidate)
        except FormatError:
            continue
        assert len(candidate) >= _shard.TABLE_HEADER.size


def test_roots_are_one_for_each_tensor_and_change_with_it() -> None:
    layout, data, table_data = filled(LARGE)
    roots = _shard.root_digests(layout, Table.parse(table_data).digests)
    assert len(roots) == 16 * len(layout.tensors)
    tensor = layout.by_name()["b"]
    changed = bytearray(data)
    changed[tensor.start] ^= 1
    others = _shard.root_digests(layout, Table.parse(table_of(layout, bytes(changed))).digests)
    index = layout.tensors.index(tensor)
    same = [roots[i : i + 16] == others[i : i + 16] for i in range(0, len(roots), 16)]
    assert [i for i, equal in enumerate(same) if not equal] == [index]


# -- checking --------------------------------------------------------------------------------------


@given(st.data())
def test_every_chunk_is_checked_exactly_once_however_the_file_is_cut(data: st.DataObject) -> None:
    layout, _, _ = filled(LARGE)
    cuts = data.draw(st.lists(st.integers(0, layout.size_bytes), max_size=6).map(sorted))
    edges = [0, *cuts, layout.size_bytes]
    seen = [
        (tensor.name, chunk)
        for start, stop in pairwise(edges)
        for tensor, first, last in chunk_spans(layout, start, stop)
        for chunk in range(first, last)
    ]
    wanted = [(t.name, chunk) for t in layout.tensors for chunk in range(t.num_chunks)]
    assert seen == wanted


@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(data: st.DataObject) -> None:
    layout, content, table_data = filled(LARGE)
    table = Table.parse(table_data, layout)
    verify_mapped(layout, table, memoryview(content))
    at = data.draw(st.integers(0, layout.size_bytes - 1))
    broken = bytearray(content)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Damaged) as raised:
        verify_mapped(layout, table, memoryview(broken))
    offset = raised.value.details["offset"]
    assert isinstance(offset, int)
    assert 0 <= at - offset < (CHUNK_BYTES if at >= layout.data_start else layout.data_start)


def test_several_threads_find_what_one_finds(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, size=60)
    layout = parse_layout(
        shard.data[: _shard.header_length(shard.data, len(shard.data))], len(shard.data)
    )
    table = Table.parse(shard.table, layout)
    for threads in (1, 2, 3):
        verify_mapped(layout, table, memoryview(shard.data), num_threads=threads)
        broken = bytearray(shard.data)
        broken[-1] ^= 1
        with pytest.raises(Damaged):
            verify_mapped(layout, table, memoryview(broken), num_threads=threads)
    with pytest.raises(Damaged, match="another size"):
        verify_mapped(layout, table, memoryview(shard.data)[:-1])


def test_a_tensor_alone_is_checked_by_its_chunks() -> None:
    layout, data, table_data = filled(LARGE)
    digests = Table.parse(table_data).digests
    tensor = layout.by_name()["b"]
    body = bytearray(data[tensor.start : tensor.start + tensor.size_bytes])
    check_chunks(tensor, digests, memoryview(body))
    body[-1] ^= 1
    check_chunks(tensor, digests, memoryview(body), 0, 1)
    with pytest.raises(Damaged) as raised:
        check_chunks(tensor, digests, memoryview(body))
    assert raised.value.details["tensor"] == "b"
    assert raised.value.details["chunk"] == 1
