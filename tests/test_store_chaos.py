"""Saves into a real S3 server while requests fail at random: nothing partial, nothing lost.

What the agent's data process does for a save is done here, save after save, through a proxy that
answers "slow down", loses replies of what was done, and returns short, wrong and stale bytes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from builders import build_save
from fault_proxy import Fault, FaultProxy
from stores import S3Server

from mtckpt import _inventory
from mtckpt._manifest import SaveName
from mtckpt._source import Place
from mtckpt._transfer import copy_shard, verify_shard, write_manifest
from mtckpt.tiers import LocalTier, ObjectStoreTier

NUM_SAVES = 60
NUM_TORTURE = 1000
MAX_AMPLIFICATION = 1.3
FAULTS = (
    Fault("answer", times=None, chance=5),
    Fault("lost", match="^PUT", times=None, chance=1),
    Fault("late", match="^PUT", times=None, chance=1, status=500, code="InternalError"),
    Fault("short", match="^GET .*rank-", times=None, chance=1),
    Fault("wrong", match="^GET .*rank-", times=None, chance=1),
    Fault("stale", match="^GET .*list-type", times=None, chance=2),
)


def save(source: Place, target: Place, name: SaveName) -> None:
    """As the agent: once more where a listing was stale, so that the save did not look complete."""
    copied = copy_shard(source, target, "r", name, 0)
    for _ in range(5):
        if write_manifest(target, "r", name, copied.record):
            return
    raise AssertionError(f"{name} does not become complete")


def names_of_saves(root: Path, count: int) -> list[SaveName]:
    found = []
    for step in range(count):
        arrays = {"w": np.random.default_rng(step).integers(0, 255, 30_000, np.uint8)}
        name = SaveName.parse(build_save(root, "r", step, arrays).name)
        assert name is not None
        found.append(name)
    return found


def chaos(server: S3Server, root: Path, seed: int, count: int) -> None:
    url = f"s3://{server.new_prefix()}"
    names = names_of_saves(root, count)
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(server.url, seed=seed))
        options = {**server.options, "endpoint_url": proxy.url}
        store = ObjectStoreTier(url, storage_options=options)
        honest = ObjectStoreTier(url, storage_options=server.options)
        disk = LocalTier(root, read_only=True)
        for tier in (store, honest, disk):
            stack.callback(tier.close)
        source, target = Place(disk, disk), Place(store, store)
        save(source, target, names[0])
        asked = len(proxy.seen)
        save(source, target, names[1])
        usual = len(proxy.seen) - asked
        proxy.set(*FAULTS)
        asked = len(proxy.seen)
        for number, name in enumerate(names[2:], 2):
            save(source, target, name)
            if number % 20 == 0:
                check(honest, names[: number + 1])
        used = len(proxy.seen) - asked
        check(honest, names)
        assert set(proxy.hits()) >= {"answer"}
        assert used <= MAX_AMPLIFICATION * usual * (count - 2), proxy.hits()
        for name in names:
            assert verify_shard(Place(honest, honest), "r", name, 0).damaged == {}


def check(store: ObjectStoreTier, saved: list[SaveName]) -> None:
    """Every save that returned is there, committed; whatever else is there is no save."""
    found = _inventory.scan(store, "r").saves
    assert sorted(found) == sorted(saved)
    assert all(entry.complete and entry.committed for entry in found.values())
    assert not [problem for entry in found.values() for problem in entry.problems]


@pytest.mark.timeout(120)
def test_chaotic_saves(s3: S3Server, tmp_path: Path, seed: int) -> None:
    chaos(s3, tmp_path, seed, NUM_SAVES)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_thousand_chaotic_saves(s3: S3Server, tmp_path: Path, seed: int) -> None:
    chaos(s3, tmp_path, seed, NUM_TORTURE)
