"""Training state without a framework: arrays, plain values, and the tree that joins them.

Knows trees of dicts, lists, tuples, plain values and objects with ``state_dict``, and arrays only
through a ``StateAdapter``. Knows no files, slots or tiers. Does not promise that two runs give a
leaf the same index: paths are the names, indexes live as long as one ``Node``.

A tree is walked in two ways. ``flatten`` builds its ``Node`` from scratch; ``refill`` walks the
next state along an existing ``Node``, and answers False when anything about the structure differs:
so a save costs a microsecond a tensor, and a stale structure can never be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mtckpt._codecs import CODECS, register_codec
from mtckpt._dtypes import size_bytes_of
from mtckpt._node import (
    ARRAY,
    CODEC,
    DICT,
    DROPPED,
    LIST,
    MAPPING_NAMES,
    MAX_DEPTH,
    MAX_INT_BITS,
    OBJECT,
    PLAIN,
    PLAIN_TYPES,
    TUPLE,
    Fields,
    Node,
    decode_plain,
    encode_plain,
    node_from_json,
    node_to_json,
    type_of_key,
)
from mtckpt._refusals import (
    check_name,
    refused,
    refused_depth,
    refused_int,
    refused_key,
    refused_to_tell,
    same_path,
)
from mtckpt._replicas import Replicated
from mtckpt.errors import CheckpointError

__all__ = [
    "ARRAY",
    "CODEC",
    "CODECS",
    "DICT",
    "DROPPED",
    "LIST",
    "OBJECT",
    "PLAIN",
    "PLAIN_TYPES",
    "TUPLE",
    "ArraySpec",
    "ByPath",
    "Flat",
    "Node",
    "Part",
    "StateAdapter",
    "Stateful",
    "decode_plain",
    "encode_plain",
    "escape",
    "flatten",
    "node_from_json",
    "node_to_json",
    "refill",
    "register_codec",
]


class Stateful(Protocol):
    """What most of PyTorch's training objects are, and what any object of a user's can be."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class ArraySpec(NamedTuple):
    """One array, or one box of a global array.

    ``shape`` is what this rank holds. ``offsets`` and ``global_shape`` place it in the global
    array; both are None for an array that is held whole. ``framework`` says which adapter made it,
    and behind a dot what kind of its arrays it was: "numpy.scalar", "jax.weak", "jax.key.rbg"; of
    one in a template also that it is filled from any floating-point type: "jax.cast".
    """

    dtype: str
    shape: tuple[int, ...]
    framework: str
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        return size_bytes_of(self.dtype, self.shape)

    @property
    def is_scalar(self) -> bool:
        """True for what is no array but a number: ``numpy.float64(0.5)``."""
        return self.framework.partition(".")[2] == "scalar"

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the global array; that of the array itself where it is held whole."""
        return self.shape if self.global_shape is None else self.global_shape


class ByPath(dict[str, Any]):
    """A template of nothing but arrays, by their paths in the checkpoint, however that is nested.

    What this rank's record lacks is looked for in those of other ranks, if it is global there.
    """


class Part(NamedTuple):
    """One box of a global array, as one process holds it.

    ``array``, of the same adapter, is the box. ``holders`` are the ranks that hold this very box,
    in order: one of them stores each byte. ``sharers`` all have a box of the array. None of either
    stands for this rank alone.
    """

    spec: ArraySpec
    array: Any
    holders: tuple[int, ...] = ()
    sharers: tuple[int, ...] = ()


class StateAdapter(Protocol):
    """What mtckpt needs from a framework. Lists where it can be: a call a leaf is dear."""

    framework: str
    replaces: bool  # arrays never change: a restored one is a new object, found in Restored.state

    def is_array(self, value: object) -> bool:
        """True for a leaf that this adapter owns; decided by its type alone."""

    def spec(self, value: Any, path: str, *, template: bool = False) -> ArraySpec:
        """Type and shape; with ``template`` of a leaf without memory too (torch's meta device).

        Raises UnsupportedState for what cannot be stored (sparse, quantised).
        """

    def specs(
        self, values: Sequence[Any], paths: Sequence[str]
    ) -> tuple[list[ArraySpec], object | None]:
        """``spec`` of many that are saved; and their ``fingerprint``, if it was taken for that."""

    def misfit(self, live: Any) -> str:
        """Why nothing can be put where a template's array says; empty if there is no reason."""

    def survey(self, state: object) -> None:
        """Told a whole state or template first: what in it says something of the rest."""

    def parts(self, value: Any, path: str, *, template: bool = False) -> Sequence[Part] | None:
        """The boxes of a global array that this process holds; None for an array of its own.

        A save stores the boxes (the same one twice only once), a restore fills the arrays of a
        template's parts, or new ones for them, and calls ``assembled``.
        """

    def rows(self, array: Any, first: int, stop: int) -> Any:
        """``array[first:stop]`` along the first axis, of the same memory where that can be."""

    def assembled(self, live: Any, arrays: Sequence[Any]) -> Any:
        """What stands in the place of a global array whose ``parts`` are now these, in order:
        ``live`` itself where they were filled in its memory."""

    def fingerprint(self, values: Sequence[Any]) -> object:
        """A value that compares equal exactly when dtype, shape, layout and device of all do."""

    def addresses(
        self, values: Sequence[Any], paths: Sequence[str] = (), fingerprint: object = None
    ) -> tuple[list[int], object]:
        """Where the bytes of each array lie, contiguous, in C order.

        An address on a CUDA device is an ``OnDevice``. What lies on another kind of device, or
        otherwise (strides, lazy conjugation), is copied first; the second result keeps those copies
        alive. The address of an empty array is 0.
        ``fingerprint``, if it was just taken of these very values, saves looking at them again;
        ``paths`` are for errors: UnsupportedState for an array whose memory is gone.
        """

    def identity(self, value: Any) -> object | None:
        """Equal for two arrays that are the same bytes with the same shape; None if unknown."""

    def state_of(self, value: object) -> object | None:
        """The tree inside an object that this adapter knows better than ``state_dict()``."""

    def writable_address(self, value: Any) -> int | None:
        """Where bytes can be written straight into this live array, or None."""

    def writable_addresses(
        self, values: Sequence[Any], specs: Sequence[ArraySpec]
    ) -> list[int] | None:
        """``writable_address`` of many; 0 for an empty array.

        None unless each of them has an address, and the type and shape of its spec.
        """

    def new(self, spec: ArraySpec, like: object | None = None) -> tuple[Any, int | None]:
        """A fresh array in memory of its own, and its address. ``like`` gives the kind.

        Without an address it is a promise, which ``reserved`` makes true. Only with ``like``.
        """

    def reserved(self, freshes: Sequence[Any]) -> list[int]:
        """The addresses of fresh arrays that had none, once all that is wanted is known."""

    def finished(self, fresh: Any, spec: ArraySpec) -> Any:
        """What the user gets for a fresh array of this spec, once its bytes are there."""

    def assign(self, live: Any, fresh: Any) -> Any:
        """Copy a fresh host array into a live one; returns what stands in its place."""

    def keeps(self, live: Any) -> bool:
        """True if ``assign`` fills the live array itself, and returns no other."""

    def number(self, live: Any, value: Any) -> Any | None:
        """What stands in the place of ``live`` where a plain number was saved: an array like it, or
        that number itself; None where the two are not the same."""

    def written(self, lives: Sequence[Any]) -> None:
        """Told, in ``finish``, which live arrays had bytes put straight into them."""

    def place_object(self, live: Any, node: Node, path: str, placing: Any) -> Any | None:
        """``Placing.match`` for an object that this adapter knows (a module, an optimizer).

        ``placing`` is a ``Placing``: wants go to ``array_into`` and ``tree``, differences to
        ``missing``, ``unused`` and ``diff``, later work to ``finish``. None: not its object.
        """


@dataclass(slots=True)
class Flat:
    """A state, taken apart. ``paths`` and ``specs`` go with ``arrays``, index for index.

    ``replicas`` has the arrays that are ``Replicated``, and the ranks that hold them.
    """

    root: Node
    arrays: list[Any] = field(default_factory=list)
    owners: list[StateAdapter] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    plain_paths: list[str] = field(default_factory=list)
    replicas: dict[int, tuple[int, ...] | None] = field(default_factory=dict)


_CONTAINERS = frozenset({dict, list, tuple, Fields})
# PyTorch's names, those of Grain's iterators and of NumPy's old generator, and those of Python's.
_ACCESSORS = (
    ("state_dict", "load_state_dict"),
    ("get_state", "set_state"),
    ("getstate", "setstate"),
)


def escape(component: object) -> str:
    """One component of a path; ``/`` separates components and ``@`` starts the offsets of a box."""
    text = str(component)
    if "%" in text or "/" in text or "@" in text:
        text = text.replace("%", "%25").replace("/", "%2F").replace("@", "%40")
    return text


def flatten(state: object, adapters: Sequence[StateAdapter]) -> Flat:
    """Take ``state`` apart. Raises UnsupportedState with path, type and what to do."""
    flat = Flat(root=Node(PLAIN))
    flat.root = _walk(state, "", adapters, flat, 0)
    if len(set(flat.paths)) != len(flat.paths):
        raise same_path(flat.paths)
    return flat


def _walk(value: Any, path: str, adapters: Sequence[StateAdapter], flat: Flat, depth: int) -> Node:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise refused_depth(path, MAX_DEPTH)
    if kind in PLAIN_TYPES:
        return _plain(value, path, flat)
    if kind in CODECS:  # before the adapters: a codec may speak for a kind of array they refuse
        codec = CODECS[kind]
        child = _walk(codec.encode(value), path, adapters, flat, depth + 1)
        return Node(CODEC, type_=kind, children=[child], name=codec.name)
    if kind in _CONTAINERS:  # nothing but what they look like: nobody needs to be asked
        if kind is list or kind is tuple:
            return _walk_sequence(value, path, adapters, flat, depth)
        return _walk_dict(value, path, adapters, flat, depth)
    if kind is Replicated:
        first = len(flat.arrays)
        child = _walk(value.value, path, adapters, flat, depth + 1)
        for index in range(first, len(flat.arrays)):
            flat.replicas.setdefault(index, value.ranks)
        return Node(OBJECT, type_=kind, children=[child], name=repr(value.ranks))
    for adapter in adapters:
        if adapter.is_array(value):
            check_name(path)
            flat.arrays.append(value)
            flat.owners.append(adapter)
            flat.paths.append(path)
            return Node(ARRAY, type_=kind, index=len(flat.arrays) - 1, name=adapter.framework)
    try:
        inner = _inner_state(value, adapters)
    except CheckpointError:
        raise
    except Exception as error:  # a user's state_dict may raise anything
        raise refused_to_tell(kind, path, error) from error
    if inner is not None:
        child = _walk(inner[0], path, adapters, flat, depth + 1)
        return Node(OBJECT, type_=kind, children=[child], is_object=type(inner[0]) is not Fields)
    if isinstance(value, Mapping):
        return _walk_dict(value, path, adapters, flat, depth)
    if isinstance(value, (list, tuple)):
        return _walk_sequence(value, path, adapters, flat, depth)
    if isinstance(value, (bool, int, float, str, bytes)):
        # A subclass (an IntEnum, numpy.float64) would come back as its base: said, not guessed.
        return _plain(value, path, flat)
    raise refused(kind, path)


def _walk_sequence(
    value: Sequence[Any],
    path: str,
    adapters: Sequence[StateAdapter],
    flat: Flat,
    depth: int,
) -> Node:
    prefix = path + "/" if path else ""
    children = [
        _walk(item, f"{prefix}{i}", adapters, flat, depth + 1) for i, item in enumerate(value)
    ]
    return Node(LIST if isinstance(value, list) else TUPLE, type_=type(value), children=children)


def _walk_dict(
    value: Mapping[Any, Any],
    path: str,
    adapters: Sequence[StateAdapter],
    flat: Flat,
    depth: int,
) -> Node:
    prefix = path + "/" if path else ""
    keys = list(value)
    _check_keys(keys, path)
    children = [_walk(value[key], prefix + escape(key), adapters, flat, depth + 1) for key in keys]
    kind = type(value)
    name = MAPPING_NAMES.get(kind, "")
    return Node(DICT, type_=kind, keys=keys, children=children, name=name)


def _check_keys(keys: Sequence[Any], path: str) -> None:
    texts = keys
    if any(type(key) is not str for key in keys):
        for key in keys:
            _check_key(key, path)
        texts = list(map(str, keys))
        if len(set(texts)) != len(texts):
            prefix = f"{path}/" if path else ""
            raise same_path([prefix + escape(text) for text in texts])
    for text in texts:
        if not text.isascii():
            check_name(text, path=path)


def _check_key(key: Any, path: str, depth: int = 0) -> None:
    if type(key) is tuple and depth < MAX_DEPTH:
        for item in key:
            _check_key(item, path, depth + 1)
    elif type(key) is int and key.bit_length() > MAX_INT_BITS:
        raise refused_int(key, path, MAX_INT_BITS)
    elif type(key) is str:
        check_name(key, path=path)
    elif type(key) not in (int, bool, float, type(None)):
        raise refused_key(key, path)


def _plain(value: Any, path: str, flat: Flat) -> Node:
    if type(value) is str:
        check_name(value, path=path)
    elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise refused_int(value, path, MAX_INT_BITS)
    flat.plain.append(value)
    flat.plain_paths.append(path)
    return Node(PLAIN, type_=type(value), index=len(flat.plain) - 1)


def _inner_state(value: Any, adapters: Sequence[StateAdapter]) -> tuple[object] | None:
    """The tree inside an object, in a tuple since that tree may itself be None."""
    if isinstance(value, tuple):
        return (named_fields(value),) if hasattr(value, "_fields") else None
    for adapter in adapters:
        inner = adapter.state_of(value)
        if inner is not None:
            return (inner,)
    access = accessors(value)
    return None if access is None else (access[0](),)


def accessors(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """What an object says its state with, and what it takes it back with; None if it has no two."""
    # Of a dict whose items are attributes, any name may be one, or an error.
    where = type(value) if isinstance(value, Mapping) else value
    for get, put in _ACCESSORS:
        if hasattr(where, get) and hasattr(where, put):
            return getattr(value, get), getattr(value, put)
    return None


def named_fields(value: Any) -> Fields:
    """A named tuple as the dict that stands for it in a checkpoint."""
    return Fields(zip(value._fields, value, strict=True))


def refill(
    node: Node,
    value: Any,
    adapters: Sequence[StateAdapter],
    arrays: list[Any],
    plain: list[Any],
) -> bool:
    """Collect the leaves of ``value`` along ``node``; False as soon as the structure differs."""
    kind = node.kind
    if kind == ARRAY:
        arrays.append(value)
        return type(value) is node.type
    if kind == PLAIN:
        plain.append(value)
        return _is_plain_now(value, node)
    if type(value) is not node.type:
        return False
    if kind == OBJECT:
        if type(value) is Replicated:
            return node.name == repr(value.ranks) and refill(
                node.children[0], value.value, adapters, arrays, plain
            )
        inner = _inner_state(value, adapters)
        return inner is not None and refill(node.children[0], inner[0], adapters, arrays, plain)
    if kind == CODEC:
        return refill(node.children[0], CODECS[type(value)].encode(value), adapters, arrays, plain)
    if kind == DICT:
        if list(value) != node.keys:
            return False
        if node.key_types is not None and list(map(type_of_key, value)) != node.key_types:
            return False
        items: Iterable[Any] = value.values()
    else:
        if len(value) != len(node.children):
            return False
        items = value
    if node.types is not None:
        found = list(items)
        arrays.extend(found)
        return [type(item) for item in found] == node.types
    if node.all_plain:
        found = list(items)
        plain.extend(found)
        return all(map(_is_plain_now, found, node.children))
    for child, item in zip(node.children, items, strict=True):
        if not refill(child, item, adapters, arrays, plain):
            return False
    return True


def _is_plain_now(value: Any, node: Node) -> bool:
    """True if ``flatten`` would take this value without a word."""
    kind = type(value)
    if kind is str:
        if value.isascii():
            return True
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if kind is int:
        return bool(value.bit_length() <= MAX_INT_BITS)
    return kind in PLAIN_TYPES or kind is node.type
