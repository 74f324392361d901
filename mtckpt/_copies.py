"""The shards of one save, opened where they lie: which places have a sound copy of which.

Knows places, records and descriptions. Does not read the bytes of tensors, nor know what is wanted
of them. A place of this node is looked into whenever a shard is opened; one that is far away only
when no place before it has a sound copy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from mtckpt import _inventory
from mtckpt._delivery import Copy, Loaded, Place, describe
from mtckpt._holdings import whole_of
from mtckpt.errors import Damaged, FormatError, NoHealthyStep, TierError

if TYPE_CHECKING:
    from mtckpt._choice import Candidate
    from mtckpt._delivery import Attempt, Within
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import ArrayEntry, Record
    from mtckpt._state import ByPath, StateAdapter
    from mtckpt.capture.base import Engine

__all__ = ["Scope", "Shards", "Together"]

logger = logging.getLogger(__name__)

# How many ranks' records are read to find more sources of what is large.
_MAX_LOOKS = 16


class Together(Protocol):
    """What the ranks of a job do at the same time: it succeeds on all of them or on none.

    Entered with the name of a stage; leaving it waits for all ranks. An error of this rank is
    raised as it is, one of another rank names that rank.
    """

    def __call__(self, stage: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Scope:
    """What a restore is about and how it reads: the same for every save that it tries.

    ``inventories`` are of places that this process has scanned itself. ``rank`` is this process's;
    ``together`` joins it with the others.
    """

    run_key: str
    places: Mapping[str, Place]
    inventories: Mapping[str, Inventory]
    adapters: Sequence[StateAdapter]
    engine: Engine
    within: Within
    rank: int = 0
    together: Together = lambda _: nullcontext()


class Shards:
    """See the module. ``usable`` has the places whose small files agree, by rank.

    Of some ranks a place has a copy only that leaves out what is in others' shards there. Where
    that comes first, and those others are not there any more, a shard that leaves nothing out is
    counted beyond the ranks: ``rank`` and as many as there are ranks.

    ``base`` is the rank whose private state this one takes: its own where the save has one, and
    else the one that ``rank`` is modulo the number of ranks that saved.
    """

    def __init__(self, candidate: Candidate, scope: Scope, attempt: Attempt) -> None:
        self._candidate = candidate
        self._scope = scope
        self._attempt = attempt
        self._loaded: dict[int, Loaded] = {}
        self._records: dict[tuple[str, int], Record | None] = {}
        self._far: dict[int, list[Place]] = {}
        self._variants: dict[int, list[Copy]] = {}
        self.usable: dict[int, list[Place]] = {}
        self.reasons: list[str] = []
        self._world_size = world_size = len(candidate.sources)
        self.base = scope.rank % world_size
        if scope.rank >= world_size > 1:
            logger.warning(
                "step %d has %d ranks: rank %d takes the private state of rank %d",
                candidate.name.step, world_size, scope.rank, self.base,
            )  # fmt: skip

    def keys(self, rank: int) -> tuple[str, str, str]:
        rank %= self._world_size
        return _inventory.shard_keys(self._scope.run_key, self._candidate.name, rank)

    def fetched(self, rank: int) -> str:
        """The store from which a shard was brought to its first place just now; "" if from none."""
        return self._candidate.fetched.get(rank % self._world_size, "")

    def levels(self) -> list[Iterable[int]]:
        """All ranks, in groups: those whose shards are near, those far away; in each the one first
        whose shard is read anyway. Last what is counted beyond the ranks."""
        return [*self._levels(), self._whole()]

    def _whole(self) -> Iterator[int]:
        for rank in sorted(self._candidate.sources):
            try:
                if self.record(rank).left_out:
                    self.record(rank + self._world_size)
                    yield rank + self._world_size
            except NoHealthyStep:
                continue  # nobody has more of it

    def _levels(self) -> list[list[int]]:
        near: list[int] = []
        far: list[int] = []
        for rank in sorted(self._candidate.sources):
            (near if any(place.near for place in self._places(rank)) else far).append(rank)
        levels = [near, far]
        for level in levels:
            if self.base in level:
                level.remove(self.base)
                levels.insert(levels.index(level), [self.base])
                break
        return levels

    def entries(self, rank: int) -> Sequence[ArrayEntry]:
        """What a rank has, from the first sound record of it. Raises NoHealthyStep."""
        loaded = self._loaded.get(rank)
        if loaded is not None:
            return loaded.entries[: len(loaded.numbers)]  # without those of ``open_with``
        return self.record(rank).array_entries()

    def record(self, rank: int) -> Record:
        """The first sound record of a rank. Raises NoHealthyStep."""
        loaded = self._loaded.get(rank)
        if loaded is not None:
            return loaded.record
        for place in self._places(rank):
            record = self._record(place, rank)
            if record is not None and not (record.left_out and rank >= self._world_size):
                return record
        raise self._nothing(rank)

    def open_with(self, wanted: ByPath) -> Loaded:
        """The base shard's description, and after its entries what only other ranks have.

        Raises NoHealthyStep.
        """
        loaded = self.open(self.base)
        lacking = set(wanted).difference(entry.path for entry in loaded.entries)
        others: dict[str, ArrayEntry] = {}
        for rank in itertools.chain(*self._levels()) if lacking else ():
            for entry in self.entries(rank):
                if entry.path in lacking and entry.offsets is not None:
                    others.setdefault(entry.path, entry)
        if others:
            # Whoever it is tied to is an entry of another record.
            more = [msgspec.structs.replace(entry, same_as=None) for entry in others.values()]
            loaded = dataclasses.replace(loaded, entries=[*loaded.entries, *more])
            self._loaded[self.base] = loaded
        return loaded

    def open(self, rank: int) -> Loaded:
        """A shard's description. Raises NoHealthyStep where no place has a sound one."""
        if rank in self._loaded:
            return self._loaded[rank]
        self.usable[rank] = []
        places = self._places(rank)
        self._far[rank] = [place for place in places if not place.near]
        for place in places:
            if place.near:
                self._look(rank, place)
        if rank not in self._loaded:
            next(self.further(rank), None)
        if rank not in self._loaded:
            raise self._nothing(rank)
        return self._loaded[rank]

    def is_staged(self, rank: int) -> bool:
        """Whether a shard comes first from a place whose bytes are brought to memory of their own
        before they are placed. Raises NoHealthyStep."""
        self.open(rank)
        return not (self.usable[rank] and self.usable[rank][0].mapped)

    def further(self, rank: int) -> Iterator[Place]:
        """Places that are far away, each once it is known to be usable too."""
        far = self._far[rank]
        while far:
            place = far.pop(0)
            if place.label not in self._attempt.silent and self._look(rank, place):
                yield place

    def peers(self, rank: int, names: set[str]) -> Iterator[Copy]:
        """What other nodes have of a shard: further copies of it, then shards of ranks that hold
        tensors of these names alike. No store is looked at, and no more than a few shards."""
        far = self._far[rank]
        while far and far[0].node:
            place = far.pop(0)
            if place.label not in self._attempt.silent and self._look(rank, place):
                yield Copy(place, self.keys(rank)[0], self._loaded[rank])
        yield from (copy for copy in self._variants.get(rank, ()) if copy.place.node)
        if not self._has_alike(rank, names):
            return
        own, num_ranks = rank % self._world_size, self._world_size
        ranks = (other % num_ranks for other in range(own + 1, own + num_ranks))
        for other in itertools.islice(ranks, _MAX_LOOKS):
            places = self._places(other)
            if not places or not places[0].node:
                continue  # what is near was asked before
            try:
                thin = bool(self.record(other).left_out)
                for each in (other, other + num_ranks) if thin else (other,):
                    if self._has_alike(each, names):
                        loaded = self.open(each)
                        for place in [place for place in self.usable[each] if place.node]:
                            yield Copy(place, self.keys(each)[0], loaded)
            except NoHealthyStep:
                continue

    def _has_alike(self, rank: int, names: set[str]) -> bool:
        """Whether a rank has something under these names that others hold too."""
        return any(
            entry.alike and 0 not in entry.shape and entry.stored_name in names
            for entry in self.entries(rank)
        )

    def others(self, rank: int, names: set[str]) -> Iterator[Copy]:
        """Other shards that may have tensors of these names as ``rank`` has them: other copies of
        its own, which leave out more or less, then what ranks have that hold the same arrays."""
        yield from self._variants.get(rank, ())
        for other in itertools.chain(*self.levels()):
            try:
                if other == rank or not any(
                    entry.offsets is not None
                    and 0 not in entry.shape
                    and entry.stored_name in names
                    for entry in self.entries(other)
                ):
                    continue
                loaded = self.open(other)
            except NoHealthyStep:
                continue
            for place in itertools.chain(self.usable[other], self.further(other)):
                yield Copy(place, self.keys(other)[0], loaded)

    def _places(self, rank: int) -> list[Place]:
        """Where the shard is said to be, without the places that have stopped answering."""
        return [
            self._scope.places[label]
            for label in self._candidate.sources[rank % self._world_size]
            if label in self._scope.places and label not in self._attempt.silent
        ]

    def _look(self, rank: int, place: Place) -> bool:
        record = self._record(place, rank)
        if record is None or (record.left_out and rank >= self._world_size):
            return False
        look = functools.partial(describe, place, self.keys(rank), record)
        try:
            found: Loaded = self._scope.within(place.label, look, record.shard.data_start)
        except (FormatError, TierError) as error:
            self._refuse(place, rank, error)
            return False
        loaded = self._loaded.setdefault(rank, found)
        if found.record.shard != loaded.record.shard:
            first = self.usable[rank][0].label
            self.reasons.append(f"{place.label}: another shard than {first} has")
            self._variants.setdefault(rank, []).append(Copy(place, self.keys(rank)[0], found))
            return False
        self.usable[rank].append(place)
        return True

    def _record(self, place: Place, rank: int) -> Record | None:
        """The record at a place, from what was scanned or read now; None where it is not sound."""
        rank %= self._world_size
        name = self._candidate.name
        inventory = self._scope.inventories.get(place.label)
        if inventory is not None and name in inventory.saves:
            record = inventory.saves[name].records.get(rank)
            if record is not None and whole_of(record) == self._candidate.whole:
                return record
        if (place.label, rank) not in self._records:
            self._records[place.label, rank] = self._read_record(place, rank)
        return self._records[place.label, rank]

    def _read_record(self, place: Place, rank: int) -> Record | None:
        read = functools.partial(
            _inventory.read_record, place.tier, self._scope.run_key, self._candidate.name, rank
        )
        try:
            found: Record = self._scope.within(place.label, read)
            if whole_of(found) != self._candidate.whole:
                raise Damaged("the record is of another plan", key=self.keys(rank)[2])
        except (FormatError, TierError) as error:
            self._refuse(place, rank, error)
            return None
        return found

    def _refuse(self, place: Place, rank: int, error: FormatError | TierError) -> None:
        key = getattr(error, "key", None) or self.keys(rank)[0]
        self._attempt.refuse(place, key, error)
        self.reasons.append(f"{place.label}: {error.what}")

    def _nothing(self, rank: int) -> NoHealthyStep:
        silent = [f"{label}: {why}" for label, why in self._attempt.silent.items()]
        reasons = self.reasons or silent or [f"no place has the shard of rank {rank}"]
        return NoHealthyStep("; ".join(reasons), step=self._candidate.name.step)
