"""Reading checkpoints where they lie: ``load()`` and ``steps()``, without a run or an agent.

Knows which save of a directory is meant and how the shards of all ranks join into whole arrays.
Does not know live training state: ``Checkpointer.restore`` does. Writes nothing, and promises
nothing about a directory that somebody changes while it is read, other than an error.

Every byte is compared with its digest before it is handed out. A loaded save holds a lease on each
of its shards, so that training, which goes on, does not recycle them meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mtckpt import _bands, _codecs, _foreign, _inventory, _node, _probe, _reading, _state
from mtckpt._manifest import ArrayEntry, Record, SaveEntry, SaveName, on_line
from mtckpt._places import Location, Place, open_places, unusable
from mtckpt._steps import list_steps
from mtckpt.adapters import array_maker
from mtckpt.errors import (
    Damaged,
    FormatError,
    NoHealthyStep,
    ObjectNotFound,
    StepNotFound,
    UsageError,
)

if TYPE_CHECKING:
    from mtckpt._handle import Step
    from mtckpt._inventory import Inventory
    from mtckpt._node import Node
    from mtckpt._reading import OpenShard

__all__ = ["Checkpoint", "load", "steps"]

logger = logging.getLogger(__name__)

# A save may be recycled between listing and opening it; each further look needs a new race.
_MAX_LOOKS = 5
_MAX_REASONS = 20


def load(
    location: Location,
    *,
    step: int | str = "latest",
    framework: Literal["numpy", "torch", "jax"] = "numpy",
) -> Checkpoint:
    """Open a saved step for reading, lazily, and hold it until it is closed.

        with mtckpt.load("checkpoints/gpt-small") as checkpoint:
            weight = checkpoint["model/wte.weight"]

    Args:
        location: a tier's directory that holds one run, a run's directory, one save, or a copy;
            or the URL of any of these in a store.
        step: "latest" (the newest complete one on the line of incarnations), a number, or the id
            of a save as ``mtckpt ls`` shows it.
        framework: what arrays are: "numpy", "torch" or "jax", which is imported only then.

    Raises:
        UsageError: there is no such directory, or it holds several runs.
        StepNotFound: no such step is there. NoHealthyStep: none can be read, a line a step with
            the reason: damaged, incomplete, or written by a later version of mtckpt.
        TierError: the directory could not be read.
    """
    make = array_maker(framework)
    place = _only_run(location)
    try:
        return open_checkpoint(place, step, make)
    except BaseException:
        place.close()
        raise


def open_checkpoint(place: Place, step: int | str, make: Any) -> Checkpoint:
    """Open the save that ``step`` means at a place. What it raises leaves the place open."""
    for look in range(_MAX_LOOKS):
        shards, save, skipped = _open_newest(place, step, last=look == _MAX_LOOKS - 1)
        if shards is not None:
            for reason in skipped:
                logger.warning("passed over %s", reason)
            return Checkpoint(place, save, shards, make, skipped)
    raise AssertionError("the last look opens a save or raises")


def steps(location: Location) -> list[Step]:
    """What is saved at ``location``, oldest first, damaged and abandoned saves too.

    What is not whole yet, or was called off, is left out (``mtckpt ls`` tells of it). Reads records
    only: ``mtckpt verify`` reads the bytes. Raises UsageError as ``load`` does.
    """
    places = open_places(location, _probe.tier_label(os.fspath(location)))
    try:
        if len(places) > 1:
            raise _several(location, places)
        return list_steps([places[0].scan()]) if places else []
    finally:
        for place in places:
            place.close()


def _only_run(location: Location) -> Place:
    places = open_places(location, _probe.tier_label(os.fspath(location)))
    if len(places) == 1:
        return places[0]
    for place in places:
        place.close()
    if places:
        raise _several(location, places)
    raise StepNotFound(
        f"{os.fspath(location)} holds no run and no save",
        state="nothing was read",
        actions=(
            "give a tier's directory, a run in it, or one save of that",
            *_foreign.hints(location),
        ),
    )


def _several(location: Location, places: Sequence[Place]) -> UsageError:
    names = [place.name for place in places]
    return UsageError(
        f"{os.fspath(location)} holds {len(names)} runs",
        state="nothing was read",
        actions=[f"name one: {os.path.join(os.fspath(location), name)}" for name in names[:10]],
    )


# -- which save ------------------------------------------------------------------------------------


def _order(name: SaveName) -> tuple[int, int]:
    return name.incarnation, name.step


def candidates(inventory: Inventory, step: int | str) -> list[SaveEntry]:
    """The saves that ``step`` may mean, best first. Raises StepNotFound when there are none."""
    line = _inventory.incarnation_line([inventory])
    saves = sorted(inventory.saves.values(), key=lambda save: _order(save.name), reverse=True)
    if step == "latest":
        chosen = [save for save in saves if on_line(save.name, line) and not save.aborted]
    elif isinstance(step, str):
        chosen = [save for save in saves if _is_named(save, step)]
    else:
        chosen = [save for save in saves if save.name.step == step and not save.aborted]
        chosen.sort(key=lambda save: not on_line(save.name, line))
    if not chosen:
        there = sorted({save.name.step for save in saves})
        raise StepNotFound(
            "no step is there" if step == "latest" else f"step {step} is not there",
            step=step,
            state="nothing was read",
            actions=[f"steps that are there: {', '.join(map(str, there[-20:]))}"] if there else (),
        )
    return chosen


def _is_named(save: SaveEntry, text: str) -> bool:
    """Whether ``text`` is the save's id, the first 12 digits of it, or its directory's name."""
    if text == str(save.name):
        return True
    digits = text.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{12,32}", digits):
        return False
    ids = {record.save_id.replace("-", "") for record in save.records.values()}
    return digits == save.name.short_id or any(id_.startswith(digits) for id_ in ids)


def _open_newest(
    place: Place, step: int | str, *, last: bool
) -> tuple[list[OpenShard] | None, SaveEntry, tuple[str, ...]]:
    """The best save that opens, with what was passed over. None: one vanished, so look again."""
    reasons = []
    first: FormatError | None = None
    chosen = candidates(place.scan(), step)
    for save in chosen:
        called = f"step {save.name.step} (incarnation {save.name.incarnation})"
        by_name = isinstance(step, str) and step != "latest"
        faults = unusable(save)
        if by_name and save.aborted and save.complete:
            faults = list(save.problems)  # A save called off is offered by its name.
        if faults and not save.complete:
            reasons.append(f"{called}: {'; '.join(faults[:3])}")
            continue
        try:
            return open_shards(place, save), save, tuple(reasons)
        except ObjectNotFound as error:
            if not last:
                return None, save, ()
            reasons.append(f"{called}: {error.what}")
        except FormatError as error:
            first = first or error
            where = f" ({error.details['key']})" if "key" in error.details else ""
            reasons.append(f"{called}: {error.what}{where}")
    raise NoHealthyStep(
        f"no step at {place.where} can be read"
        if step == "latest"
        else f"step {step} at {place.where} cannot be read",
        state="nothing was read",
        actions=[f"know that {line}" for line in reasons[:_MAX_REASONS]],
        reasons=tuple(reasons),
    ) from first


def open_shards(place: Place, save: SaveEntry) -> list[OpenShard]:
    """All shards of a complete save, by rank; all or none stay open."""
    shards = []
    with contextlib.ExitStack() as undo:
        for rank in sorted(save.records):
            shard = _reading.open_shard(place, save.name, save.records[rank])
            undo.callback(shard.close)
            shards.append(shard)
        undo.pop_all()
    return shards


# -- a save that is open ---------------------------------------------------------------------------


class Checkpoint(Mapping[str, Any]):
    """One saved step: a mapping from path to array. Made by ``load``.

    Arrays are whole, joined over all ranks, read and verified when they are asked for, each time
    anew; they own their memory and outlive ``close``. A plain array that several ranks hold is the
    one of the first of them; ``read`` and ``tree`` take another rank's.

    complex32 comes as float16 with one more axis of 2 in NumPy, and packed types (two values in a
    byte) as uint8.
    """

    def __init__(
        self,
        place: Place,
        save: SaveEntry,
        shards: Sequence[OpenShard],
        make: Any,
        skipped: Sequence[str] = (),
    ) -> None:
        self._place = place
        self._shards = shards
        self._make = make
        self._closed = False
        self.record = record = shards[0].record
        self.run = record.run
        self.step = record.step
        self.id = record.save_id
        self.incarnation = record.incarnation
        self.metrics = MappingProxyType(dict(save.metrics))
        self.size_bytes = save.size_bytes
        # Newer saves that could not be read, each with the reason.
        self.skipped = tuple(skipped)
        self._where: dict[str, list[tuple[OpenShard, int]]] = {}
        for shard in shards:
            for index, entry in enumerate(shard.entries):
                self._where.setdefault(entry.path, []).append((shard, index))

    def __getitem__(self, path: str) -> Any:
        return self.read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, path: object) -> bool:
        return path in self._where

    def __repr__(self) -> str:
        return (
            f"Checkpoint({self._place.where!r}, step={self.step},"
            f" {len(self)} arrays{', closed' if self._closed else ''})"
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter what this needs may be gone, and the kernel closes all.
        if hasattr(self, "_closed") and not is_ending():  # not set where __init__ was refused
            self.close()

    def close(self) -> None:
        """Give all leases back. Arrays that were read stay valid. Idempotent."""
        if not self._closed:
            self._closed = True
            for shard in self._shards:
                shard.close()
            self._place.close()

    def read(self, path: str, *, rank: int | None = None) -> Any:
        """The array at ``path``, as the given rank has it where ranks may differ.

        Raises:
            KeyError: no such path. Damaged: its bytes differ from their digest.
            UnsupportedState: the framework lacks its type.
        """
        if self._closed:
            raise UsageError(
                f"the checkpoint of step {self.step} is closed", actions=("load it again",)
            )
        parts, entry = self._parts(path, rank)
        raw = _bands.joined(parts, entry)
        return self._make(raw, entry.dtype, _bands.whole_shape(entry), path, entry.framework)

    def _read_bands(
        self, path: str, max_bytes: int, *, rank: int | None = None
    ) -> Iterator[tuple[tuple[int, ...], Any]]:
        """The array at ``path`` in bands of up to so many bytes, each with its offsets.

        Raises as ``read``.
        """
        parts, entry = self._parts(path, rank)
        for box, raw in _bands.bands(parts, entry, max_bytes):
            yield box.offsets, self._make(raw, entry.dtype, box.shape, path, entry.framework)

    def _parts(self, path: str, rank: int | None) -> tuple[list[_bands.Part], ArrayEntry]:
        """Where the array lies that a rank has at ``path``, and its entry there."""
        if path not in self._where:
            below = [each for each in self._where if each.startswith(f"{path}/")]
            where = f": {len(below)} lie below it, such as {below[0]}" if below else ""
            raise KeyError(f"no array has the path {path}{where}")
        parts = sorted(self._where[path], key=lambda part: part[0].record.rank != rank)
        shard, index = parts[0]
        entry = shard.entries[index]
        if entry.global_shape is not None:
            parts = [part for part in parts if part[0].entries[part[1]].ranks == entry.ranks]
        elif rank is not None and shard.record.rank != rank:
            raise KeyError(f"{path} of rank {rank}")
        return parts, entry

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of the whole array, without reading it."""
        shard, index = self._where[path][0]
        return _bands.whole_shape(shard.entries[index])

    def dtype(self, path: str) -> str:
        """Name of the element type, without reading the array."""
        shard, index = self._where[path][0]
        return shard.entries[index].dtype

    def ranks(self, path: str) -> tuple[int, ...]:
        """The ranks that hold a part of the array, or one of their own."""
        return tuple(dict.fromkeys(shard.record.rank for shard, _ in self._where[path]))

    def same_as(self, path: str) -> str | None:
        """The path under which the bytes of a tied array are stored; None for its own."""
        shard, index = self._where[path][0]
        twin = shard.entries[index].same_as
        return None if twin is None else shard.entries[twin].path

    @property
    def plain(self) -> Mapping[str, Any]:
        """Plain values by path, as rank 0 had them."""
        values: dict[str, Any] = {}
        _collect(*state_of(self._shards[0]), "", values)
        return MappingProxyType(values)

    def tree(self, *, rank: int = 0) -> Any:
        """The whole state as it was nested, all arrays read; a tied array is one object.

        Values of a type that ``register_codec`` described need it registered here as well.
        """
        shard = self._shard(rank)
        root, plain = state_of(shard)
        arrays: dict[int, Any] = {}

        def array(index: int) -> Any:
            entry = shard.entries[index]
            first = index if entry.same_as is None else entry.same_as
            if first not in arrays:
                arrays[first] = self.read(shard.entries[first].path, rank=rank)
            return arrays[first]

        return _build(root, array, plain, "")

    def _shard(self, rank: int) -> OpenShard:
        if not 0 <= rank < len(self._shards):
            raise UsageError(f"no rank {rank}: the save has {len(self._shards)}", rank=rank)
        return self._shards[rank]


# -- structure and plain values --------------------------------------------------------------------


def state_of(shard: OpenShard) -> tuple[Node, list[Any]]:
    """The structure of a rank's state and its plain values. Raises FormatError."""
    record: Record = shard.record
    try:
        values = msgspec.json.decode(record.plain, type=list[Any])
        structure = msgspec.json.decode(record.structure)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"record does not parse: {error}", step=record.step) from error
    try:
        plain = [_node.decode_plain(value) for value in values]
        return _node.node_from_json(structure, len(shard.entries), len(plain)), plain
    except FormatError as error:
        key = shard.key.rpartition(".")[0] + ".json"
        raise type(error)(error.what, tier=shard.tier, key=key, step=record.step) from error


def _children(node: Node, path: str) -> Iterator[tuple[Any, Node, str]]:
    keys = node.keys if node.kind == _node.DICT else range(len(node.children))
    for key, child in zip(keys or (), node.children, strict=True):
        yield key, child, f"{path}/{_state.escape(key)}" if path else _state.escape(key)


def _collect(node: Node, plain: Sequence[Any], path: str, out: dict[str, Any]) -> None:
    if node.kind == _node.PLAIN:
        out[path] = plain[node.index]
    elif node.kind == _node.CODEC:
        _collect(node.children[0], plain, path, out)
    else:
        for _, child, child_path in _children(node, path):
            _collect(child, plain, child_path, out)


def _build(node: Node, array: Any, plain: Sequence[Any], path: str) -> Any:
    if node.kind == _node.ARRAY:
        return array(node.index)
    if node.kind == _node.PLAIN:
        return plain[node.index]
    if node.kind == _node.CODEC:
        codec = _codecs.codec_named(node.name, path)
        return codec.decode(_build(node.children[0], array, plain, path))
    built = [
        (key, _build(child, array, plain, child_path))
        for key, child, child_path in _children(node, path)
    ]
    if node.kind == _node.DICT:
        return _node.MAPPINGS.get(node.name, dict)(dict(built))
    values = [value for _, value in built]
    return tuple(values) if node.kind == _node.TUPLE else values
