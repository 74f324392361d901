"""Two nodes bring one shard to a store: its owner, and one that holds a thin copy of it.

Both are about to go, and cannot hear each other. Either may die before any change that it makes,
and do all that it does before any change of the other's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import builders
import numpy as np
import pytest
from shard_maker import RUN, disk_place

from mtckpt import _thinning
from mtckpt._inventory import shard_keys
from mtckpt._manifest import SaveName
from mtckpt._source import OpenShard, Place, open_shard
from mtckpt._transfer import store_shard, verify_shard
from mtckpt.errors import AlreadyExists, ObjectNotFound, TierUnavailable
from mtckpt.tiers import BytesSource, ObjectInfo, PutResult, Source, Survives
from mtckpt.tiers.base import read_all

SHAPE = (40, 100)
CHANGES = range(8)  # more than a node makes


class Died(BaseException):
    """The node that brings it is gone."""


class Store:
    """In memory; ``before`` is called before each change."""

    name = "store"
    survives = Survives.CLUSTER

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.before: Callable[[], None] = lambda: None

    def put(self, key: str, source: Source) -> PutResult:
        self.before()
        if key in self.objects:
            raise AlreadyExists("is there", tier=self.name, key=key)
        self.objects[key] = bytes(source.read(0, source.size_bytes))
        return PutResult(source.size_bytes)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        out[:] = self._at(key)[offset : offset + len(out)]

    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self._at(key)))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(())

    def delete(self, key: str) -> None:
        self.before()
        self.objects.pop(key, None)

    def close(self) -> None:
        """Nothing is open."""

    def _at(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFound("is not there", tier=self.name, key=key)
        return self.objects[key]


@contextlib.contextmanager
def watched(store: Store, look: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Before each change from now on: with its number, and what was to happen before it."""
    outer, numbers = store.before, itertools.count()

    def before() -> None:
        look(next(numbers), outer)
        outer()

    store.before = before
    try:
        yield
    finally:
        store.before = outer


@contextlib.contextmanager
def at_change(store: Store, at: int, happens: Callable[[], None]) -> Iterator[None]:
    """Before so many changes more, once."""

    def look(number: int, outer: Callable[[], None]) -> None:
        if number == at:
            amid, store.before = store.before, outer
            happens()
            store.before = amid

    with watched(store, look):
        yield


@contextlib.contextmanager
def dead_from(store: Store, at: int) -> Iterator[None]:
    """Whoever brings something meanwhile makes so many changes, and none after those."""

    def look(number: int, _: Callable[[], None]) -> None:
        if number >= at:
            raise Died

    with watched(store, look):
        yield


@pytest.fixture
def forms(tmp_path: Path) -> Iterator[tuple[SaveName, OpenShard, OpenShard]]:
    """The shard of rank 0 as it was captured, and without what rank 1 has as well."""
    shared = np.random.default_rng(5).standard_normal(SHAPE)
    for rank in range(2):
        arrays = {"own": np.full(300, float(rank)), "shared": shared}
        path = builders.build_save(
            tmp_path, RUN, 10, arrays, boxes={"shared": ((0, 0), SHAPE)}, rank=rank, world_size=2,
            alike="ab",
        )  # fmt: skip
    name = SaveName.parse(path.name)
    assert name is not None
    tier = disk_place(tmp_path).tier
    place = Place(tier, tier, is_peer=True)
    with open_shard(place, RUN, name, 0) as whole, open_shard(place, RUN, name, 1) as beside:
        thin = _thinning.thinned(whole, _thinning.captured_in([beside.record]))
        assert thin.record.left_out == shared.nbytes
        yield name, whole, thin


@pytest.mark.parametrize("first", ["the owner", "the other"])
def test_what_one_has_brought_stays_whenever_the_other_dies(
    forms: tuple[SaveName, OpenShard, OpenShard], first: str
) -> None:
    name, whole, thin = forms
    one, other = (whole, thin) if first == "the owner" else (thin, whole)
    brought = []
    for preempted, first_dies, second_dies in itertools.product(CHANGES, repeat=3):
        store = Store()
        place = Place(store, store)
        done: list[str] = []

        def bring(shard: OpenShard, dies_at: int, place: Place, done: list[str]) -> None:
            with contextlib.suppress(Died, TierUnavailable):
                with dead_from(cast(Store, place.tier), dies_at):
                    store_shard(shard, place, RUN, name, 0)
                done.append("thin" if shard is thin else "whole")

        with at_change(store, preempted, partial(bring, other, second_dies, place, done)):
            bring(one, first_dies, place, done)
        damaged = verify_shard(place, RUN, name, 0).damaged
        assert not (done and damaged), (done, preempted, first_dies, second_dies, damaged)
        brought += done
    assert {"thin", "whole"} <= set(brought)


def test_what_is_brought_again_replaces_what_is_damaged(
    forms: tuple[SaveName, OpenShard, OpenShard],
) -> None:
    name, whole, thin = forms
    data_key, table_key, record_key = shard_keys(RUN, name, 0)
    for key in (data_key, table_key, record_key):
        store = Store()
        place = Place(store, store)
        store_shard(thin, place, RUN, name, 0)
        assert read_all(store, record_key, max_bytes=1 << 20) == thin.record_data
        store.objects[key] = store.objects[key][:-1] + b"!"
        with pytest.raises(TierUnavailable, match="another node is bringing this part"):
            store_shard(thin, place, RUN, name, 0)
        assert store_shard(whole, place, RUN, name, 0).copied_bytes
        assert not verify_shard(place, RUN, name, 0).damaged
        assert BytesSource(store.objects[record_key]).read(0, 1 << 20) == whole.record_data
