"""What a save holds, in the words of Orbax: a tree of shapes and types, as its managers tell it.

Knows records and the classes of ``ocp.metadata``. Does not read arrays. Where they were is not in a
record, so it stands in a file of its own beside the pointer; a tree's definition is nowhere: there
are dicts and lists.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import msgspec
import numpy as np
import orbax.checkpoint as ocp

from mtckpt import _state
from mtckpt.adapters.jax.leaves import KEY, PLAIN
from mtckpt.adapters.jax.nodes import key_name
from mtckpt.errors import Damaged, FormatError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._manifest import ArrayEntry, Record
    from mtckpt._state import Node

__all__ = [
    "PLACEMENT",
    "is_divided",
    "of_record",
    "placed",
    "placed_again",
    "placements",
    "template_of",
    "write_placements",
]

PLACEMENT = "mtckpt-shardings.json"
MAX_PLACEMENT_BYTES = 64 * 1024 * 1024
_KINDS: dict[type, Any] = {
    jax.sharding.NamedSharding: ocp.metadata.NamedShardingMetadata,
    jax.sharding.SingleDeviceSharding: ocp.metadata.SingleDeviceShardingMetadata,
}


def placements(tree: Any) -> list[tuple[Any, Any]]:
    """Key path and sharding of every array: what is kept of a tree that may soon be gone.

    Where there is but one sharding, no paths are told: they take longer than all the rest.
    """
    found = {leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)}
    if len(found) < 2:
        return [((), sharding) for sharding in found]
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(keys, leaf.sharding) for keys, leaf in leaves if isinstance(leaf, jax.Array)]


def write_placements(found: list[tuple[Any, Any]], directory: Any) -> None:
    """Write them beside the pointer, each sharding once."""
    numbers: dict[Any, int] = {}
    of: dict[str, int] = {}
    for keys, sharding in found:
        if type(sharding) in _KINDS:
            name = ".".join(str(key_name(key)) for key in keys)
            of[name] = numbers.setdefault(sharding, len(numbers))
    shardings = [_KINDS[type(each)].from_jax_sharding(each) for each in numbers]
    body = {"shardings": [json.loads(each.to_serialized_string()) for each in shardings], "of": of}
    (directory / PLACEMENT).write_text(json.dumps(body))


def _placements_in(directory: Any) -> dict[str, Any]:
    """The name of an array -> its sharding. Raises FormatError for a file of another kind."""
    path = directory / PLACEMENT
    try:
        data = path.read_bytes()
        body = json.loads(data) if len(data) <= MAX_PLACEMENT_BYTES else {}
        shardings = [
            _KINDS[
                jax.sharding.SingleDeviceSharding
                if "device_str" in each
                else jax.sharding.NamedSharding
            ].from_deserialized_dict(each)
            for each in body["shardings"]
        ]
        return {name: shardings[number] for name, number in body["of"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise FormatError(f"not the shardings of a save: {error}", path=str(path)) from error


def is_divided(directory: Any) -> bool:
    """True if arrays of the save were on several devices, and there are such devices."""
    return any(placed_again(each) is not None for each in _placements_in(directory).values())


def of_record(record: Record, item: str, directory: Any, custom: Any = None) -> Any:
    """The ``TreeMetadata`` of one item of a save. Raises Damaged where the save has no such."""
    # Orbax has no public way to make one.
    from orbax.checkpoint._src.metadata.tree import build_default_tree_metadata

    tree = _told_by(_Described, record, item, directory)
    return build_default_tree_metadata(tree, custom_metadata=custom)


def placed(record: Record, item: str, directory: Any) -> Any:
    """A template of one item of a save: its containers as they were, and its arrays where they
    were; None for what was nowhere, or where there is nothing now.
    """
    return _told_by(_Placed, record, item, directory)


def placed_again(sharding: Any) -> Any:
    """What an array was divided by, where there are such devices; None where there are not, and for
    what was on one: it may be anywhere.
    """
    try:
        found = None if sharding is None else sharding.to_jax_sharding()
    except ValueError:
        return None
    return found if found is not None and len(found.device_set) > 1 else None


def _told_by(describe: type[_Described], record: Record, item: str, directory: Any) -> Any:
    entries = record.array_entries()
    plain = [_state.decode_plain(v) for v in msgspec.json.decode(record.plain, type=list[Any])]
    root = _state.node_from_json(msgspec.json.decode(record.structure), len(entries), len(plain))
    items = dict(zip(root.keys or [], root.children, strict=True))
    if item not in items:
        raise Damaged(f"the save has no item {item!r}", step=record.step)
    return describe(entries, plain, directory, _placements_in(directory)).tree(items[item], ())


class _Described:
    """Makes the metadata of leaves. Sequences are lists there, and named tuples dicts."""

    def __init__(
        self,
        entries: Sequence[ArrayEntry],
        plain: Sequence[Any],
        directory: Any,
        placed: dict[str, Any],
    ) -> None:
        self._entries = entries
        self._plain = plain
        self._directory = directory
        self._placed = placed

    def tree(self, node: Node, keys: tuple[str, ...]) -> Any:
        name = ".".join(keys)
        if node.kind == _state.ARRAY:
            return self._array(self._entries[node.index], name)
        if node.kind == _state.PLAIN:
            return self._value(self._plain[node.index], name)
        if node.kind in (_state.CODEC, _state.OBJECT):
            return self.tree(node.children[0], keys)
        if node.kind == _state.DICT:
            pairs = zip(node.keys or [], node.children, strict=True)
            return {key: self.tree(child, (*keys, str(key))) for key, child in pairs}
        items = [self.tree(child, (*keys, str(i))) for i, child in enumerate(node.children)]
        return self._sequence(items, node.kind)

    def _sequence(self, items: list[Any], kind: str) -> Any:
        del kind
        return items

    def _value(self, value: Any, name: str) -> Any:
        if value is None:
            return None
        if isinstance(value, (str, bytes)):
            return ocp.metadata.StringMetadata(name, self._directory)
        return ocp.metadata.ScalarMetadata(name, self._directory, dtype=np.asarray(value).dtype)

    def _array(self, entry: ArrayEntry, name: str) -> Any:
        shape = entry.shape if entry.global_shape is None else entry.global_shape
        dtype: Any = np.dtype(getattr(ml_dtypes, entry.dtype, entry.dtype))
        if entry.framework.startswith(KEY):
            impl = entry.framework[len(KEY) :]
            numbers: Any = jax.ShapeDtypeStruct
            keys = jax.eval_shape(
                lambda data: jax.random.wrap_key_data(data, impl=impl), numbers(shape, dtype)
            )
            shape, dtype = tuple(keys.shape), keys.dtype
        sharding = None
        if entry.framework.partition(".")[0] == PLAIN:
            sharding = self._placed.get(name, self._placed.get(""))  # that of all
        return ocp.metadata.ArrayMetadata(name, self._directory, shape, sharding, dtype)


class _Placed(_Described):
    """Makes a template."""

    def _sequence(self, items: list[Any], kind: str) -> Any:
        return tuple(items) if kind == _state.TUPLE else items

    def _value(self, value: Any, name: str) -> Any:
        """None: whatever it was."""

    def _array(self, entry: ArrayEntry, name: str) -> Any:
        made = super()._array(entry, name)
        sharding = placed_again(made.sharding)
        make: Any = jax.ShapeDtypeStruct
        return None if sharding is None else make(made.shape, made.dtype, sharding=sharding)


def template_of(tree: Any) -> Any:
    """A template in which metadata stands for what it describes; all other leaves stay."""
    if hasattr(tree, "custom_metadata") and hasattr(tree, "tree"):
        tree = tree.tree
    return jax.tree.map(_described, tree)


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, ocp.metadata.value.Metadata):
        return leaf
    sharding: Any = getattr(leaf, "sharding", None)
    if sharding is None:
        return None  # left open: it comes as what it was saved as
    if hasattr(sharding, "to_jax_sharding"):
        try:
            sharding = sharding.to_jax_sharding()
        except ValueError as error:
            raise UsageError(
                f"{leaf.name} cannot be where it was: {error}",
                state="nothing was restored",
                actions=("give a template with shardings of the devices that there are",),
            ) from error
    make: Any = jax.ShapeDtypeStruct
    return make(leaf.shape, leaf.dtype, sharding=sharding)
