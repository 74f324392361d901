"""What a save, a look and a listing cost in requests, counted at a real S3 server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import build_save
from stores import S3Server

from mtckpt import _inventory
from mtckpt._manifest import SaveName
from mtckpt._source import Place
from mtckpt._transfer import copy_shard, write_manifest
from mtckpt.tiers import LocalTier, ObjectStoreTier

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
NUM_SHARDS = 3


@pytest.fixture
def store(s3: S3Server) -> Iterator[ObjectStoreTier]:
    url = f"s3://{s3.new_prefix()}"
    with contextlib.closing(
        ObjectStoreTier(url, storage_options=s3.options, part_bytes=5 * MIB)
    ) as tier:
        tier.capabilities()  # asked once for each process, not for each save
        yield tier


@pytest.mark.parametrize("num_parts", [1, 3])
def test_requests_of_a_save_and_of_a_look(
    store: ObjectStoreTier, tmp_path: Path, num_parts: int
) -> None:
    size = num_parts * 5 * MIB - 2 * MIB
    for rank in range(NUM_SHARDS):
        arrays = {"w": np.random.default_rng(rank).integers(0, 255, size, np.uint8)}
        save_dir = build_save(tmp_path, "r", 7, arrays, rank=rank, world_size=NUM_SHARDS)
    name = SaveName.parse(save_dir.name)
    assert name is not None
    with contextlib.closing(LocalTier(tmp_path, read_only=True)) as disk:
        source, target = Place(disk, disk), Place(store, store)
        before = store.counts.requests
        _inventory.check_newest(store, "r", 1)
        for rank in range(NUM_SHARDS):
            copied = copy_shard(source, target, "r", name, rank)
        assert write_manifest(target, "r", name, copied.record)
    used = store.counts.requests - before
    assert used <= NUM_SHARDS * (num_parts + 6) + 6, used
    before = store.counts.requests
    found = _inventory.scan(store, "r").saves[name]
    assert found.complete
    assert found.committed
    assert store.counts.requests - before <= 1 + NUM_SHARDS
