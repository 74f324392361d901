"""A save of several ranks is brought back from a store whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from pool_checks import carry, with_pool
from shard_maker import RUN, Shard, make_shard, put_shard

from mtckpt import _manifest
from mtckpt._events import EventStream
from mtckpt.agent import protocol, work
from mtckpt.agent.fetching import Fetcher
from mtckpt.agent.nodes import News
from mtckpt.agent.pool import Pool
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import CheckpointError, TierFull
from mtckpt.tiers.object_store import PART_BYTES

SIZES = [1, 3]


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return [
        make_shard(tmp_path, rank=rank, world_size=len(SIZES), size=size)
        for rank, size in enumerate(SIZES)
    ]


@pytest.fixture
def run(ram: work.TierRef, tmp_path: Path, shards: list[Shard]) -> RunState:
    """One whose only save is in a store."""
    source = work.TierRef("disk", str(tmp_path / "made"), label="disk")
    store = work.TierRef("store", f"file://{tmp_path}/store", label="store")
    for shard in shards:
        put_shard(Path(source.path), shard)
    for rank in range(len(SIZES)):
        carry(work.Flush(RUN, str(shards[0].name), rank, source, store))
    run = RunState(RUN, RUN, ram)
    run.tiers["store"] = TierState("store", TierConfig("store", "store", store.path), store)
    scanned = carry(work.Scan(store, RUN))
    assert isinstance(scanned, work.Scanned)
    run.note_scan("store", scanned.runs[0])
    carry(work.Scan(ram))  # makes its directory
    return run


def fetch(run: RunState) -> str:
    (name,) = run.saves

    async def body(pool: Pool) -> str:
        fetcher = Fetcher(Tools(pool, Limits(), EventStream()))
        return (await fetcher.fetch(run, protocol.Fetch("holder", name, 10.0))).label

    return with_pool(body)


def in_ram(run: RunState) -> list[str]:
    return sorted(p.name for p in Path(run.ram.path).glob(f"{RUN}/step-*/*"))


def test_slots_of_what_was_fetched_have_the_sizes_of_its_shards(
    run: RunState, shards: list[Shard]
) -> None:
    assert fetch(run) == RAM
    sizes = {slot.rank: slot.shard_bytes for slot in run.slots.values()}
    assert sizes == {shard.rank: len(shard.data) for shard in shards}
    assert _manifest.shard_file(1) in in_ram(run)


def test_a_fetch_that_fails_at_its_second_rank_leaves_nothing(
    run: RunState, tmp_path: Path
) -> None:
    (second,) = (tmp_path / "store").glob(f"**/{_manifest.shard_file(1)}")
    second.unlink()
    with pytest.raises(CheckpointError):
        fetch(run)
    assert in_ram(run) == []
    assert run.slots == {}


def test_what_other_nodes_brought_to_the_store_is_fetched_with_the_rest(run: RunState) -> None:
    """This one knows of its own parts, and that the others' are there."""
    (save,) = run.saves.values()
    save.ranks["store"] = {0}
    del save.shard_bytes[1]
    save.told[1] = News(str(save.name), save.save_id, world_size=2, parts={"store": [1]})
    assert fetch(run) == RAM
    assert _manifest.shard_file(1) in in_ram(run)
    assert {slot.rank: slot.shard_bytes for slot in run.slots.values()} == save.shard_bytes


def test_a_cap_on_what_is_sent_does_not_slow_a_fetch(ram: work.TierRef, tmp_path: Path) -> None:
    """With it, this would take months."""
    shard = make_shard(tmp_path, size=80)
    source = work.TierRef("disk", str(tmp_path / "made"), label="disk")
    put_shard(Path(source.path), shard)
    store = work.TierRef("store", f"file://{tmp_path}/store", label="store", bytes_per_s=1)
    carry(
        work.Flush(RUN, str(shard.name), 0, source, msgspec.structs.replace(store, bytes_per_s=0))
    )
    carry(work.Scan(ram))
    done = carry(work.Flush(RUN, str(shard.name), 0, store, ram))
    assert isinstance(done, work.Flushed)
    assert done.copied_bytes > len(shard.data) > PART_BYTES


def test_room_is_looked_for_before_the_first_rank_is_fetched(run: RunState) -> None:
    (save,) = run.saves.values()
    save.shard_bytes[1] = 1 << 60  # what a store says of a shard that no memory holds
    with pytest.raises(TierFull):
        fetch(run)
    assert not (Path(run.ram.path) / RUN / str(save.name)).exists()
