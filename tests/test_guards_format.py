"""What planted bugs showed of files and names: each is one promise, and one test of it."""

from __future__ import annotations

import array
import os
import tracemalloc
import uuid
from pathlib import Path

import builders
import msgspec
import numpy as np
import pytest
from shard_maker import RUN, disk_place, flip, make_shard, put_shard
from xxhash import xxh3_64_intdigest

from mtckpt import _inventory, _manifest, _shard
from mtckpt._dtypes import DTYPES
from mtckpt._manifest import (
    Incarnation,
    Record,
    decode_sealed,
    encode_sealed,
    newest_line,
)
from mtckpt._transfer import verify_shard
from mtckpt.errors import (
    Damaged,
)
from mtckpt.tiers import LocalTier, check_key

pytestmark = pytest.mark.timeout(60)


def test_every_tensor_is_aligned_to_its_elements() -> None:
    names = sorted(DTYPES)
    layout = _shard.plan_layout((f"{i:02}-{name}", name, (3,)) for i, name in enumerate(names))
    for tensor in layout.tensors:
        item_bytes = DTYPES[tensor.name.partition("-")[2]].stored_item_bytes
        assert tensor.start % item_bytes == 0, tensor
    ends = [tensor.start + tensor.size_bytes for tensor in layout.tensors]
    assert [tensor.start for tensor in layout.tensors[1:]] == ends[:-1]


@pytest.mark.parametrize("run", ["a/b", "../a", "/etc/passwd", "a/../../b", "..", ".a", "a\0b"])
def test_a_run_of_any_name_lies_right_in_its_tier(run: str, tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "tier")
    path = tier.path_of(check_key(_manifest.run_key(run)))
    tier.close()
    assert path.parent == tmp_path / "tier"
    assert not path.name.startswith(".")


def test_a_record_of_any_size_costs_no_memory(tmp_path: Path) -> None:
    save_dir = builders.build_save(tmp_path, "r", 1, {"w": np.zeros(3)})
    os.truncate(save_dir / _manifest.record_file(0), _manifest.MAX_RECORD_BYTES + 1)
    tier = LocalTier(tmp_path, read_only=True)
    tracemalloc.start()
    try:
        (save,) = _inventory.scan(tier, "r").saves.values()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        tier.close()
    assert not save.records
    assert "larger than anything of its kind" in save.problems[0]
    assert peak_bytes < 16 << 20


@pytest.mark.parametrize("odd", ["{id}\n", "{id}\0", " {id}", "{id}{id}"])
def test_an_id_is_an_id_to_its_end(tmp_path: Path, odd: str) -> None:
    record = make_shard(tmp_path).parsed()
    assert decode_sealed(encode_sealed(record), Record) == record
    changed = msgspec.structs.replace(record, save_id=odd.format(id=record.save_id))
    with pytest.raises(Damaged):
        decode_sealed(encode_sealed(changed), Record)


def test_a_table_that_was_made_of_the_damaged_bytes_blesses_nothing(tmp_path: Path) -> None:
    """Whoever digests a later copy anew gets a shard that agrees with itself, and is not it."""
    shard = make_shard(tmp_path)
    path = put_shard(tmp_path / "tier", shard)
    layout = _shard.parse_layout(_header(shard.data), len(shard.data))
    tensor = layout.by_name()["small"]
    flip(path, tensor.start + 5)
    data = path.read_bytes()
    table = bytearray(shard.table)
    at = _shard.TABLE_HEADER.size + 8 * tensor.first_chunk
    body = data[tensor.start : tensor.start + tensor.size_bytes]
    table[at : at + 8] = xxh3_64_intdigest(body).to_bytes(8, "little")
    path.with_name(_manifest.table_file(0)).write_bytes(table)
    found = verify_shard(disk_place(tmp_path / "tier"), RUN, shard.name, 0)
    assert list(found.damaged) == [f"{RUN}/{shard.name}/{_manifest.table_file(0)}"]
    with pytest.raises(Damaged) as raised:
        _inventory.check_identity(shard.parsed(), layout.header, len(data), bytes(table))
    assert raised.value.details["kind"] == "table"


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1, _shard.CHUNK_BYTES - 1])
def test_the_last_byte_of_a_tensor_has_a_digest(num_chunks: int, extra: int) -> None:
    size_bytes = (num_chunks - 1) * _shard.CHUNK_BYTES + extra
    layout = _shard.plan_layout([("w", "uint8", (size_bytes,)), ("x", "uint8", (1,))])
    tensor, behind = layout.tensors
    assert layout.num_chunks == -(-size_bytes // _shard.CHUNK_BYTES) + 1
    data = bytearray(layout.header + bytes(size_bytes + 1))
    digests = array.array("Q", [0] * layout.num_chunks)
    for chunk in range(layout.num_chunks - 1):
        at = tensor.start + chunk * _shard.CHUNK_BYTES
        digests[chunk] = xxh3_64_intdigest(
            data[at : min(at + _shard.CHUNK_BYTES, tensor.start + size_bytes)]
        )
    digests[-1] = xxh3_64_intdigest(b"\0")
    table = _shard.Table(0, 1, memoryview(digests))
    _shard.verify_mapped(layout, table, memoryview(data))
    for at in {behind.start, behind.start - (size_bytes > 0)}:
        data[at] ^= 1
        with pytest.raises(Damaged):
            _shard.verify_mapped(layout, table, memoryview(data))
        data[at] ^= 1


def _header(data: bytes) -> bytes:
    return data[: _shard.header_length(data, len(data))]


def test_a_branch_from_before_its_parent_began_counts_no_step_after_it() -> None:
    def started(number: int, parent: tuple[int, int] | None = None) -> Incarnation:
        return Incarnation(1, "run", number, str(uuid.UUID(int=number)), parent)

    line = newest_line([started(1), started(2, (1, 200)), started(3, (2, 150))])
    assert line == [(3, None), (2, 150), (1, 150)]
