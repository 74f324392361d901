"""How ranks of a simulated job read: the shards of all ranks, from wherever each of them is sound.

Knows how another node's memory is reached. Which save is read, and from where, the package decides.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtckpt import _holdings, _manifest, _restore
from mtckpt._inventory import shard_keys
from mtckpt._manifest import Record
from mtckpt.errors import Damaged, FormatError, NoHealthyStep, TierError, TierUnavailable
from mtckpt.testing._devices import (
    DATA_BYTES,
    Directory,
    are_alike,
    content_of,
    is_sound,
    thin_content_of,
)

if TYPE_CHECKING:
    from mtckpt._choice import Candidate
    from mtckpt.agent import protocol
    from mtckpt.testing.cluster import Node, World

__all__ = ["PeerPlace", "Read", "restore_from"]


class PeerPlace:
    """In the place of ``PeerTier``: another node's memory or disk, as far as it is reached."""

    def __init__(
        self,
        world: World,
        address: protocol.PeerAddress,
        run_key: str,
        secret: bytes,
        *,
        place: str,
        reads: str,
        timeout_s: float,
    ) -> None:
        del timeout_s, reads
        self.name = "peers"
        self._address = address
        self._key = run_key
        self._secret = secret
        self._label = place
        self._world = world

    def _reached(self) -> Directory:
        fiber = self._world.loop.fiber
        assert fiber is not None
        here: Node = fiber.owner.node
        listener = self._world.listeners.get((self._address.host, self._address.control_port))
        if listener is None or not self._world.reaches(here.name, listener.agent.node.name):
            raise TierUnavailable(f"{self._address} does not answer", tier="peers")
        if listener.secret_of(self._key) != self._secret:
            raise TierUnavailable(f"{self._address} knows another secret", tier="peers")
        node: Node = listener.agent.node
        return node.ram if self._label == "ram" else node.disk

    def close(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name == "lease":  # a has_leases() that is true: nothing is read by threads
            return self._reached
        return getattr(self._reached(), name)


@dataclass(slots=True)
class Read:
    """What a rank has read in a restore: the save of each shard."""

    name: Any
    world_size: int
    save_ids: dict[int, str] = field(default_factory=dict)
    labels: dict[str, None] = field(default_factory=dict)  # in the order they came up


def restore_from(world: World) -> Callable[..., Any]:
    """In the place of ``_restore.restore_from``: reads the shards of all ranks, each from the first
    place that has a sound copy."""

    def restore(
        candidate: Candidate,
        scope: Any,
        state: Any,
        *,
        partial: bool,
        rename: Any,
        attempt: Any,
        last: bool,
        progress: Any = None,
    ) -> Any:
        del partial, rename, last, progress
        read = Read(candidate.name, candidate.whole[1])
        records = {}
        with scope.together("read"):
            for rank in candidate.sources:
                records[rank] = _read_one(candidate, scope, attempt, rank, read)
        state["read"] = read
        sources = dict.fromkeys(read.labels, DATA_BYTES)
        return _restore.Outcome(candidate.name, records[0], state, sources, replaced=False)

    return restore


def _read_one(candidate: Candidate, scope: Any, attempt: Any, rank: int, read: Read) -> Record:
    keys = shard_keys(scope.run_key, candidate.name, rank)
    reasons = []
    for label in candidate.sources[rank]:
        place = scope.places.get(label)
        if place is None or label in attempt.silent:
            continue
        try:
            record = _sound(place.tier, keys)
        except (FormatError, TierError) as error:
            attempt.refuse(place, keys[0], error)
            reasons.append(f"{label}: {error.what}")
            continue
        if _holdings.whole_of(record) != candidate.whole:
            reasons.append(f"{label}: of another plan")
            continue
        if record.left_out and not _has_rest(candidate, scope, attempt, record):
            reasons.append(f"{label}: what it leaves out is nowhere")
            continue
        read.save_ids[rank] = record.save_id
        read.labels[label] = None
        return record
    raise NoHealthyStep("; ".join(reasons) or f"no place has rank {rank}", step=candidate.name.step)


def _has_rest(candidate: Candidate, scope: Any, attempt: Any, thin: Record) -> bool:
    """Whether some place has what a copy leaves out."""
    for rank in filter(functools.partial(are_alike, thin), candidate.sources):
        keys = shard_keys(scope.run_key, candidate.name, rank)
        for label in candidate.sources[rank]:
            place = scope.places.get(label)
            if place is not None and label not in attempt.silent:
                with contextlib.suppress(FormatError, TierError):
                    if not _sound(place.tier, keys).left_out:
                        return True
    return False


def _sound(tier: Any, keys: tuple[str, str, str]) -> Record:
    data, table, record_data = (tier.file(key).content for key in keys)
    record = _manifest.decode_sealed(record_data, Record)
    if not is_sound(record, data, table):
        raise Damaged("the shard differs from its digest", tier=tier.name, key=keys[0])
    wanted = thin_content_of if record.left_out else content_of
    if data != wanted(record.save_id, record.rank):
        raise AssertionError(f"{keys[0]} has the bytes of {data!r}")
    return record
