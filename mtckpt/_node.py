"""The shape of a state: nodes, and the JSON that a record keeps them in.

Knows kinds of places, keys and indexes. Does not know values, arrays or frameworks. Reading JSON
never builds anything but nodes and plain values, whatever the JSON says.
"""

from __future__ import annotations

import base64
import functools
import math
import unicodedata
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, overload

import msgspec

from mtckpt._refusals import refused_int
from mtckpt.errors import FormatError, UnsupportedState

__all__ = [
    "ARRAY",
    "CODEC",
    "DICT",
    "DROPPED",
    "LIST",
    "MAPPINGS",
    "MAPPING_NAMES",
    "MAX_DEPTH",
    "OBJECT",
    "PLAIN",
    "PLAIN_TYPES",
    "TUPLE",
    "ArrayNodes",
    "Fields",
    "Node",
    "array_indexes",
    "decode_plain",
    "encode_plain",
    "is_of_kind",
    "node_from_json",
    "node_to_json",
    "type_of_key",
]

MAX_DEPTH = 64
# What is written has to be read again: 4,096 characters at most.
MAX_INT_BITS = 13_600

ARRAY, PLAIN, DICT, LIST, TUPLE, CODEC, OBJECT = (
    "array",
    "plain",
    "dict",
    "list",
    "tuple",
    "codec",
    "object",
)
DROPPED = "dropped"  # a gap in a list, made by rename and never saved


class Fields(dict[str, Any]):
    """The values of a named tuple by the names of its fields, in order."""


def _named_tuple(values: dict[Any, Any]) -> tuple[Any, ...]:
    """A named tuple with these fields; of which type it was, no checkpoint says."""
    # As Python has names itself: else two could become one.
    names = tuple(unicodedata.normalize("NFKC", str(name)) for name in values)
    made: tuple[Any, ...] = _tuple_type(names)(*values.values())
    return made


@functools.lru_cache(maxsize=1000)
def _tuple_type(names: tuple[str, ...]) -> Any:
    return namedtuple("Fields", names, rename=True)  # a name that none can have: its number


# Dicts that can do more than a dict, what they are called in a record, and what makes them of one.
# Whose state has one may count on that: MultiStepLR does on its Counter.
MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "ordered": OrderedDict,
    "counter": Counter,
    "fields": _named_tuple,
}
MAPPING_NAMES: dict[type, str] = {OrderedDict: "ordered", Counter: "counter", Fields: "fields"}
PLAIN_TYPES = frozenset({int, float, str, bool, type(None), bytes})


class Node(msgspec.Struct, eq=False):
    """One place in a tree. ``index`` counts arrays or plain values in the order of the walk.

    ``name`` is that of a codec, of an adapter, or of a kind of dict in ``MAPPINGS``. ``is_object``:
    here stood something with a state of its own, and what is below is that state.

    What follows from the others is set with them: ``types`` has the types of a container's items
    where all are arrays, ``key_types`` those of its keys unless all are texts.
    """

    kind: str
    type_: Any = object
    keys: list[Any] | None = None
    children: Sequence[Node] = []
    index: int = -1
    name: str = ""
    is_object: bool = False
    key_types: list[Any] | None = None
    types: list[type] | None = None
    all_plain: bool = False

    def __post_init__(self) -> None:
        if self.keys:
            # 1, 1.0 and True are equal keys and not the same; texts are equal only to texts.
            key_types = list(map(type_of_key, self.keys))
            self.key_types = None if key_types.count(str) == len(self.keys) else key_types
        if self.children and type(self.children) is not ArrayNodes:
            # A container of nothing but arrays, or of nothing but plain values, is walked in one go
            kinds = {child.kind for child in self.children}
            if kinds == {ARRAY} and not any(child.is_object for child in self.children):
                self.types = [child.type_ for child in self.children]
            else:
                self.all_plain = kinds == {PLAIN}

    @property
    def has_objects(self) -> bool:
        """True if here or below stood something with a state of its own."""
        if type(self.children) is ArrayNodes:
            return self.is_object
        return self.is_object or any(child.has_objects for child in self.children)

    @property
    def type(self) -> Any:
        """The type of the value that stood here."""
        return self.type_


class ArrayNodes(Sequence[Node]):
    """The children of a container of nothing but arrays, as a record has them: made when asked for.

    Thousands of arrays in one container are matched by ``indexes`` alone.
    """

    __slots__ = ("indexes",)

    def __init__(self, indexes: list[int]) -> None:
        self.indexes = indexes

    def __len__(self) -> int:
        return len(self.indexes)

    def __iter__(self) -> Iterator[Node]:
        return (Node(ARRAY, index=index) for index in self.indexes)

    @overload
    def __getitem__(self, which: int) -> Node: ...
    @overload
    def __getitem__(self, which: slice) -> ArrayNodes: ...
    def __getitem__(self, which: int | slice) -> Node | ArrayNodes:
        if isinstance(which, slice):
            return ArrayNodes(self.indexes[which])
        return Node(ARRAY, index=self.indexes[which])


def array_indexes(nodes: Sequence[Node]) -> list[int] | None:
    """The indexes of nodes that all are arrays; else None."""
    if isinstance(nodes, ArrayNodes):
        return nodes.indexes
    if {node.kind for node in nodes} != {ARRAY}:
        return None
    return [node.index for node in nodes]


def is_of_kind(node: Node, live: Any) -> bool:
    """True for a container whose type gives what a record would keep as this node."""
    if isinstance(live, MutableMapping):
        return node.kind == DICT and node.name == MAPPING_NAMES.get(type(live), "")
    return isinstance(live, (list, tuple)) and node.kind == (
        LIST if isinstance(live, list) else TUPLE
    )


def encode_plain(value: Any) -> Any:
    """JSON for one plain value; what JSON lacks is an object with a single key."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, bool) or value is None:
        return bool(value) if value is not None else None
    if isinstance(value, int):
        number = int(value)
        if -(2**63) <= number < 2**63:
            return number
        if number.bit_length() > MAX_INT_BITS:
            raise refused_int(number, "", MAX_INT_BITS)
        return {"int": str(number)}
    if isinstance(value, float):
        number_f = float(value)
        return number_f if math.isfinite(number_f) else {"float": repr(number_f)}
    if isinstance(value, str):
        return str.__str__(value)
    raise UnsupportedState(
        f"not a plain value: {type(value).__qualname__}",
        path="",
        type_name=type(value).__qualname__,
    )


def _encode_key(key: Any) -> Any:
    """JSON for a key of a dict: a plain value, or a tuple of keys."""
    return {TUPLE: list(map(_encode_key, key))} if type(key) is tuple else encode_plain(key)


def type_of_key(key: Any) -> Any:
    """What tells two keys apart that are equal: (1, 2) and (True, 2.0) are."""
    return tuple(map(type_of_key, key)) if type(key) is tuple else type(key)


def decode_plain(value: Any) -> Any:
    """The opposite of ``encode_plain``. Raises FormatError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((tag, text),) = value.items()
        if isinstance(text, str):
            try:
                if tag == "bytes":
                    return base64.b64decode(text, validate=True)
                if tag == "float" and text in ("nan", "inf", "-inf"):
                    return float(text)
                if tag == "int" and len(text) <= 4096:
                    return int(text)
            except ValueError as error:
                raise FormatError(f"not a plain value: {text[:60]!r}") from error
    raise FormatError(f"not a plain value: {str(value)[:60]!r}")


def _decode_key(value: Any, depth: int = 0) -> Any:
    items = value.get(TUPLE) if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(items, list) and depth < MAX_DEPTH:
        return tuple(_decode_key(item, depth + 1) for item in items)
    return decode_plain(value)


def node_to_json(node: Node) -> Any:
    """The structure as JSON: every place is an object with a single key, its kind."""
    found = _bare_json(node)
    return {OBJECT: found} if node.is_object and OBJECT not in found else found


def _bare_json(node: Node) -> Any:
    if node.kind in (ARRAY, PLAIN):
        return {node.kind: node.index}
    if node.kind == OBJECT:
        return node_to_json(node.children[0])
    if node.kind == DICT:
        keys = node.keys or []
        if node.key_types is not None:  # else all are texts
            keys = list(map(_encode_key, keys))
        children: Iterable[Any] = map(node_to_json, node.children)
        if node.types is not None:
            children = ({ARRAY: child.index} for child in node.children)
        return {node.name or DICT: list(map(list, zip(keys, children, strict=True)))}
    if node.kind == CODEC:
        return {CODEC: [node.name, node_to_json(node.children[0])]}
    return {node.kind: [node_to_json(child) for child in node.children]}


def node_from_json(tree: Any, num_arrays: int, num_plain: int, depth: int = 0) -> Node:
    """Read a structure. Raises FormatError for anything that ``node_to_json`` would not write."""
    if depth > 2 * MAX_DEPTH or not isinstance(tree, dict) or len(tree) != 1:
        raise FormatError("not a structure of a state")
    ((kind, body),) = tree.items()
    if kind in (ARRAY, PLAIN):
        limit = num_arrays if kind == ARRAY else num_plain
        if type(body) is not int or not 0 <= body < limit:
            raise FormatError(f"{kind} index out of range")
        return Node(kind, index=body)
    if kind == OBJECT:
        inner = node_from_json(body, num_arrays, num_plain, depth + 1)
        inner.is_object = True
        return inner
    if not isinstance(body, list):
        raise FormatError("not a structure of a state")
    if kind == DICT or kind in MAPPINGS:
        if not {list}.issuperset(map(type, body)) or not {2}.issuperset(map(len, body)):
            raise FormatError("not a structure of a state")
        keys = [key if type(key) is str else _decode_key(key) for key, _ in body]
        children = _children([place for _, place in body], num_arrays, num_plain, depth)
        return Node(DICT, keys=keys, children=children, name=kind if kind in MAPPINGS else "")
    if kind == CODEC:
        if len(body) != 2 or not isinstance(body[0], str):
            raise FormatError("not a structure of a state")
        child = node_from_json(body[1], num_arrays, num_plain, depth + 1)
        return Node(CODEC, children=[child], name=body[0])
    if kind in (LIST, TUPLE):
        return Node(kind, children=_children(body, num_arrays, num_plain, depth))
    raise FormatError(f"not a structure of a state: {kind[:40]!r}")


def _children(places: list[Any], num_arrays: int, num_plain: int, depth: int) -> Sequence[Node]:
    if {dict}.issuperset(map(type, places)) and {1}.issuperset(map(len, places)):
        indexes = [place.get(ARRAY) for place in places]
        if set(map(type, indexes)) == {int} and 0 <= min(indexes) <= max(indexes) < num_arrays:
            return ArrayNodes(indexes)
    return [node_from_json(place, num_arrays, num_plain, depth + 1) for place in places]
