"""Shards and slots for tests of the data plane, with bytes that the test knows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import builders
import numpy as np

from mtckpt import _manifest
from mtckpt._manifest import Record, SaveName
from mtckpt._run_files import RunFiles
from mtckpt._slots import Slot, Slots
from mtckpt._source import Place
from mtckpt.tiers import LocalTier, Survives

RUN = "run"


def arrays(seed: int = 0, num_elements: int = 100_000) -> dict[str, np.ndarray]:
    """A few tensors: more than a chunk, less than one, and nothing at all."""
    random = np.random.default_rng(seed)
    return {
        "large": random.standard_normal(num_elements, dtype=np.float32),
        "small": random.integers(0, 255, 1000, dtype=np.uint8),
        "empty": np.zeros((0, 3), dtype=np.float64),
        "wide": random.standard_normal((3, 5)),
    }


@dataclass(frozen=True, slots=True)
class Shard:
    """The three files of one shard as bytes."""

    name: SaveName
    rank: int
    data: bytes
    table: bytes
    record: bytes

    def parsed(self) -> Record:
        return _manifest.decode_sealed(self.record, Record)


def make_shard(
    scratch: Path, step: int = 10, rank: int = 0, world_size: int = 1, seed: int = 0, size: int = 1
) -> Shard:
    """One shard; ``size`` multiplies the 400 KB that it has."""
    home = scratch / f"made-{step}-{rank}-{world_size}-{seed}-{size}"
    content = arrays(seed + 1000 * rank, size * 100_000)
    save_dir = builders.build_save(home, RUN, step, content, rank=rank, world_size=world_size)
    name = SaveName.parse(save_dir.name)
    assert name is not None
    files = (_manifest.shard_file, _manifest.table_file, _manifest.record_file)
    return Shard(name, rank, *((save_dir / file(rank)).read_bytes() for file in files))


def put_shard(root: Path, shard: Shard) -> Path:
    """Lay a shard into the tier below ``root``; the path of its data."""
    home = root / RUN / str(shard.name)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    (root / RUN).chmod(0o700)
    for file, data in (
        (_manifest.shard_file(shard.rank), shard.data),
        (_manifest.table_file(shard.rank), shard.table),
        (_manifest.record_file(shard.rank), shard.record),
    ):
        write(home / file, data)
    return home / _manifest.shard_file(shard.rank)


def fill_slot(slot: Slot, shard: Shard) -> None:
    """What a trainer does: data, table, record, and last the generation word."""
    for path, data in ((slot.data_path, shard.data), (slot.table_path, shard.table)):
        with open(path, "r+b") as file:
            file.write(data[:40] + bytes(8) + data[48:] if path == slot.table_path else data)
    write(Path(slot.record_path + ".new"), shard.record)
    os.rename(slot.record_path + ".new", slot.record_path)
    with open(slot.table_path, "r+b") as file:
        file.seek(40)
        file.write(shard.table[40:48])


def write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def ram_place(root: Path) -> Place:
    tier = LocalTier(root, name="ram", survives=Survives.PROCESS, sync=False)
    return Place(tier, tier, in_memory=True)


def disk_place(root: Path) -> Place:
    tier = LocalTier(root, name="disk")
    return Place(tier, tier, in_memory=False)


def slots_of(place: Place) -> Slots:
    return Slots(place.local, RunFiles(place.local))


def flip(path: Path, offset: int) -> None:
    """Flip one bit, in place: what a tired cell does."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
