"""Parts that did not change are copied inside the store; what lies there is whole all the same."""

from __future__ import annotations

import array
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_save
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from stores import S3Server

import mtckpt
from mtckpt import _inventory, _shard
from mtckpt._manifest import SaveName
from mtckpt._reuse import changed_ranges, same_parts
from mtckpt._source import Place, open_shard
from mtckpt._transfer import copy_shard, verify_shard, write_manifest
from mtckpt.cli import main
from mtckpt.tiers import LocalTier, ObjectStoreTier

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
PART_BYTES = 5 * MIB


@pytest.fixture
def store(s3: S3Server) -> Iterator[ObjectStoreTier]:
    url = f"s3://{s3.new_prefix()}"
    with contextlib.closing(
        ObjectStoreTier(url, storage_options=s3.options, part_bytes=PART_BYTES)
    ) as tier:
        yield tier


def build(root: Path, step: int, data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> SaveName:
    arrays: dict[str, Any] = {"frozen": data, "head": np.arange(step * 1000, step * 1000 + 300)}
    name = SaveName.parse(build_save(root, "r", step, arrays).name)
    assert name is not None
    return name


def test_only_what_changed_is_sent(store: ObjectStoreTier, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 255, 60 * MIB, np.uint8)
    first = build(tmp_path, 1, data)
    data[20 * MIB : 22 * MIB] ^= 1
    second = build(tmp_path, 2, data)
    grown = build(tmp_path, 3, np.concatenate([data, data[:MIB]]))
    with contextlib.closing(LocalTier(tmp_path, read_only=True)) as disk:
        source, target = Place(disk, disk), Place(store, store)
        assert copy_shard(source, target, "r", first, 0).reused_bytes == 0
        copied = copy_shard(source, target, "r", second, 0, base=first)
        # The parts with the change, and the first, which has the small tensor in it.
        assert copied.reused_bytes >= 60 * MIB - 3 * PART_BYTES
        # Another layout, and a save that is not there: sent whole.
        assert copy_shard(source, target, "r", grown, 0, base=second).reused_bytes == 0
    for name in (first, second, grown):
        assert write_manifest(target, "r", name)
        assert verify_shard(target, "r", name, 0).damaged == {}
    store.delete(_inventory.shard_keys("r", first, 0)[0])
    assert verify_shard(target, "r", second, 0).damaged == {}  # it needs nobody else's


def test_a_base_that_is_gone_or_damaged_is_not_used(tmp_path: Path) -> None:
    data = np.zeros(MIB, np.uint8)
    name, other = build(tmp_path, 1, data), build(tmp_path, 2, data)
    with contextlib.closing(LocalTier(tmp_path)) as disk:
        place = Place(disk, disk)
        with open_shard(place, "r", name, 0) as shard:
            assert same_parts(disk, "r", other, 0, shard) is not None
            table = disk.path_of(_inventory.shard_keys("r", other, 0)[1])
            content = bytearray(table.read_bytes())
            content[-1] ^= 1
            table.write_bytes(content)
            assert same_parts(disk, "r", other, 0, shard) is None
            table.unlink()
            assert same_parts(disk, "r", other, 0, shard) is None


@given(st.sets(st.integers(0, 9 * 1024 - 1), max_size=6), st.data())
def test_a_range_is_the_same_only_if_its_bytes_are(changed: set[int], draw: st.DataObject) -> None:
    """Against the bytes themselves, with a chunk of 1 KiB for each of 256."""
    chunk = _shard.CHUNK_BYTES
    layout = _shard.plan_layout([("a", "uint8", (5 * chunk + 7,)), ("b", "uint8", (3 * chunk,))])
    size = layout.size_bytes
    places = {layout.data_start + at * 256 % (size - layout.data_start) for at in changed}
    digests = [0] * sum(-(-t.size_bytes // chunk) for t in layout.tensors)
    for place in places:
        tensor = next(t for t in layout.tensors if t.start <= place < t.start + t.size_bytes)
        digests[tensor.first_chunk + (place - tensor.start) // chunk] = 1
    starts, stops = changed_ranges(layout, table_of(digests), table_of([0] * len(digests)))
    start = draw.draw(st.integers(0, size - 1))
    stop = draw.draw(st.integers(start + 1, size))
    touched = any(s < stop and start < e for s, e in zip(starts, stops, strict=True))
    assert touched or not [place for place in places if start <= place < stop]


def table_of(digests: list[int]) -> _shard.Table:
    return _shard.Table(0, 1, memoryview(array.array("Q", digests)))


def test_a_run_says_what_it_did_not_send(
    tmp_path: Path, runtime_dir: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    url = f"s3://{s3.new_prefix()}"
    store = mtckpt.ObjectStore(url, every=1, reuse=True)
    state = {"frozen": np.arange(20 * MIB, dtype=np.float32), "w": np.zeros(10, np.float32)}
    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), store], timeout_s=20) as run:
        for step in (1, 2):
            state["w"] += 1
            run.save(step, state).wait("durable", timeout_s=40)
        reused_bytes = run.status().counters["reused_bytes"]
        assert reused_bytes >= 32 * MIB
    assert shown(url, 2)["reused_bytes"] == reused_bytes
    assert shown(url, 1)["reused_bytes"] == 0
    said = CliRunner().invoke(main, ["show", url, "--step", "2"]).stdout
    assert "were copied inside the store" in said


def shown(url: str, step: int) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["show", url, "--step", str(step), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    return found
