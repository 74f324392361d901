"""What goes where: a checkpoint's tree matched against the live template, before a byte moves.

Knows trees, live objects and adapters. Does not read files: it says which stored array is wanted
at which address (``_wanted``), and what is left once the bytes are there (``finish``).
Matching changes nothing that lives; whatever differs is collected in ``diff`` and raised as one.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from enum import Enum
from typing import Any

from mtckpt import _state
from mtckpt._aliases import Aliases
from mtckpt._boxes import Box
from mtckpt._codecs import DEQUE, codec_named
from mtckpt._diff import Diff, difference, is_number
from mtckpt._node import MAPPINGS, array_indexes, is_of_kind
from mtckpt._renaming import Stored, rename_tree
from mtckpt._replicas import Replicated
from mtckpt._sequences import assign_items, check_deque, items_of, sequence_like, unfillable
from mtckpt._settling import has_objects, later, refilled, settle
from mtckpt._state import CODECS, ArraySpec, Node, StateAdapter, escape
from mtckpt._wanted import Wanted
from mtckpt.errors import UnsupportedState

__all__ = ["Diff", "Placing", "Stored", "later", "rename_tree", "settle"]


class Placing:
    """The plan of one restore in this process. ``arrays`` and ``plain`` are the checkpoint's."""

    def __init__(
        self,
        arrays: Sequence[Stored],
        plain: Sequence[Any],
        adapters: Sequence[StateAdapter],
        *,
        partial: bool = False,
    ) -> None:
        self.arrays = arrays
        self.plain = plain
        self.adapters = adapters
        self.partial = partial
        self.diff = Diff()
        self.finish: list[Callable[[], object]] = []
        self.replaced = False  # something restored is a new object, to be read from the result
        self._has_boxes = any(stored.spec.offsets is not None for stored in arrays)
        self._owners: dict[type, StateAdapter | None] = {}
        self._fresh: dict[int, Any] = {}
        # What has no address yet: whose it is, the array, and what is wanted there.
        self._promised: list[tuple[StateAdapter, Any, int, Box | None]] = []
        self._aliases = Aliases(arrays, plain)
        self._wanted = Wanted(arrays, self._aliases)
        self._in_place: dict[str, tuple[StateAdapter, list[Any]]] = {}

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """See ``Wanted.addresses``."""
        return self._wanted.addresses

    @property
    def boxes(self) -> list[tuple[int, int, Box]]:
        """See ``Wanted.boxes``."""
        return self._wanted.boxes

    @property
    def changes_live(self) -> bool:
        """Whether bytes go into arrays that live, and not only into what nobody has seen."""
        return bool(self._in_place)

    # -- what an adapter asks for -------------------------------------------------------------

    def fresh(self, index: int, like: object | None = None) -> Any:
        """A new host array for ``index``, filled before ``finish`` runs; the same one if tied."""
        stored = self.arrays[index]
        array = self._fresh.get(stored.bytes_of)
        if array is None:
            spec = stored.spec
            if spec.offsets is not None:
                spec = ArraySpec(spec.dtype, spec.whole_shape, spec.framework)
            owner = self._adapter_named(spec.framework)
            array = self._new(owner, spec, stored.path, like, index)
            self._fresh[stored.bytes_of] = array
        return array

    def tree(self, node: Node, path: str = "") -> Any:
        """The subtree as plain containers with fresh arrays: what ``load_state_dict`` takes.

        Pass the result through ``settle`` in ``finish``: some of it exists only then.
        """
        if node.kind == _state.ARRAY:
            return self._fresh_leaf(node.index)
        if node.kind == _state.PLAIN:
            return self.plain[node.index]
        if node.kind == _state.CODEC:
            return self._decoded(node, path)
        if node.kind == _state.OBJECT:
            return self.tree(node.children[0], path)
        if node.kind == _state.DROPPED:
            self.missing(path)
            return None
        prefix = f"{path}/" if path else ""
        if node.kind == _state.DICT:
            found = {
                key: self.tree(child, prefix + escape(key))
                for key, child in zip(node.keys or [], node.children, strict=True)
            }
            return later(lambda: MAPPINGS[node.name](settle(found))) if node.name else found
        items = [self.tree(child, f"{prefix}{i}") for i, child in enumerate(node.children)]
        return items if node.kind == _state.LIST else tuple(items)

    def fits(self, live: Any, node: Node, path: str, *, quiet: bool = False) -> bool:
        """True if a saved array has the type and shape of a live one; else it is a difference."""
        if node.kind != _state.ARRAY:
            line = f"{path}: an array here, {node.kind} in the checkpoint"
        else:
            owner = self._owner(live)
            wanted = owner.spec(live, path, template=True)
            what = difference(self.arrays[node.index].spec, wanted, owner.misfit(live))
            if not what:
                return True
            line = f"{path}: {what}"
        if not quiet:
            self.diff.differing.append(line)
        return False

    def array_into(self, live: Any, node: Node, path: str) -> Any:
        """Place an array onto a live one; returns what stands in its place (``live`` if it can).

        An array of a type that has a codec is matched by that.
        """
        if type(live) in CODECS:
            return self.match(live, node, path, top=False)
        if not self.fits(live, node, path):
            return live
        owner = self._owner(live)
        parts = owner.parts(live, path, template=True)
        if parts is None:
            return self._one_into(owner, live, node.index, None)
        arrays = [
            self._one_into(
                owner, part.array, node.index, Box(part.spec.offsets or (), part.spec.shape)
            )
            for part in parts
        ]
        return later(lambda: owner.assembled(live, [settle(array) for array in arrays]))

    def _one_into(self, owner: StateAdapter, live: Any, index: int, box: Box | None) -> Any:
        """Place an array, or one box of it, onto a live array of that very shape."""
        address = owner.writable_address(live)
        if address is not None:
            self._wanted.into(index, address, box)
            self._note_in_place(owner, [live])
            return live
        path, stored, _ = self.arrays[index]
        shape = stored.whole_shape if box is None else box.shape
        is_own = stored.framework.partition(".")[0] == owner.framework
        framework = stored.framework if is_own else owner.framework
        spec = ArraySpec(stored.dtype, shape, framework)
        array = self._new(owner, spec, path, live, index, box)
        self.replaced = self.replaced or owner.replaces
        if box is None and owner.keeps(live):
            self._aliases.fill(owner.identity(live), index)
        return later(lambda: owner.assign(live, array))

    def _new(
        self,
        owner: StateAdapter,
        spec: ArraySpec,
        path: str,
        like: object | None,
        index: int,
        box: Box | None = None,
    ) -> Any:
        """``StateAdapter.new``, whose errors get the path, wanted for array ``index``."""
        try:
            array, address = owner.new(spec, like)
        except UnsupportedState as error:
            facts = {**error.details, "path": path}
            told: dict[str, Any] = {"state": error.state, "actions": error.actions, **facts}
            raise UnsupportedState(error.what, **told) from error
        if address is None:
            self._promised.append((owner, array, index, box))
        else:
            self._wanted.into(index, address, box)
        return array

    def reserve(self) -> None:
        """Once all is matched: get the memory that is wanted, and know where it is."""
        promised, self._promised = self._promised, []
        for owner in {id(owner): owner for owner, *_ in promised}.values():
            own = [(array, index, box) for other, array, index, box in promised if other is owner]
            addresses = owner.reserved([array for array, _, _ in own])
            for (_, index, box), address in zip(own, addresses, strict=True):
                self._wanted.into(index, address, box)

    def arrays_into(
        self, lives: Sequence[Any], nodes: Sequence[Node], paths: Sequence[str]
    ) -> list[Any]:
        """``array_into`` for many, all at once where all fit."""
        if self._all_into(lives, nodes):
            return list(lives)
        return [
            self.array_into(live, node, path)
            for live, node, path in zip(lives, nodes, paths, strict=True)
        ]

    def _all_into(self, lives: Sequence[Any], nodes: Sequence[Node]) -> bool:
        """Place arrays onto live ones if all of them fit and can be written; else do nothing."""
        examples = dict(zip(map(type, lives), lives, strict=True))
        if self._has_boxes or not all(map(self._is_array, examples.values())):
            return False
        owners = {self._owner(live) for live in examples.values()}
        indexes = array_indexes(nodes)
        if len(owners) != 1 or indexes is None:
            return False
        (owner,) = owners
        addresses = owner.writable_addresses(lives, [self.arrays[i].spec for i in indexes])
        if addresses is None:
            return False
        self._wanted.all_into(indexes, addresses)
        self._note_in_place(owner, lives)
        return True

    def missing(self, path: str) -> None:
        """The template wants what the checkpoint lacks."""
        if not self.partial:
            self.diff.missing.append(path)

    def unused(self, path: str) -> None:
        """The checkpoint has what the template does not want."""
        if not self.partial:
            self.diff.unused.append(path)

    def tied(self, one: Node, other: Node) -> None:
        """What was saved at two places is wanted in one array."""
        self._aliases.tie(one, other)

    def tell_apart(
        self, is_same: Callable[[int, int], bool], reads_same: Callable[[int, int], bool]
    ) -> None:
        """Once all is matched: what is one array here has the same bytes in the checkpoint."""
        self.diff.differing += self._aliases.apart(is_same, reads_same)

    def raise_diff(self, step: int) -> None:
        """Raise StateMismatch with the whole difference, if there is one."""
        self.diff.raise_any(step)

    def differs(self, live: Any, node: Node, path: str) -> Any:
        """The checkpoint has something else here than the template; returns ``live``."""
        self.diff.differing.append(
            f"{path}: {type(live).__qualname__} here, {node.kind} in the checkpoint"
        )
        return live

    # -- the walk over the template -----------------------------------------------------------

    def match(self, live: Any, node: Node, path: str = "", *, top: bool = True) -> Any:
        """Match ``live`` with ``node``; what stands in its place is ``settle`` of the result.

        ``settle`` may be called once the bytes have arrived and ``finish`` has run, in order.
        """
        kind = type(live)
        if node.kind == _state.DROPPED:
            self.missing(path)
            return live
        if kind in _state.PLAIN_TYPES:
            if node.kind == _state.PLAIN:
                return self.plain[node.index]
            if live is None:
                return self.tree(node, path)  # the template leaves this place open
            if self._is_number(kind, node):
                return self._fresh_leaf(node.index)
            return self.differs(live, node, path)
        if kind is Replicated:
            result = self.match(live.value, node, path, top=False)
            self.finish.append(lambda: setattr(live, "value", settle(result)))
            return live
        if kind is deque and (node.kind != _state.CODEC or node.name == DEQUE):
            return self._match_sequence(live, node, path)
        if kind in CODECS:
            same = node.kind == _state.CODEC and node.name == CODECS[kind].name
            return self._decoded(node, path) if same else self.differs(live, node, path)
        owner = self._owner_of(kind, live)
        if owner is not None:
            number = (
                owner.number(live, self.plain[node.index]) if node.kind == _state.PLAIN else None
            )
            return self.array_into(live, node, path) if number is None else number
        for adapter in self.adapters:
            placed = adapter.place_object(live, node, path, self)
            if placed is not None:
                return placed
        access = _state.accessors(live)
        if access is not None:
            tree = self.tree(node, path)
            self.finish.append(lambda: access[1](settle(tree)))
            return live
        if isinstance(live, Mapping):
            return self._match_dict(live, node, path, top)
        if isinstance(live, (list, tuple)):
            return self._match_sequence(live, node, path)
        if node.kind == _state.PLAIN:
            value = self.plain[node.index]
            if not isinstance(live, Enum):
                return value
            if value in kind._value2member_map_:
                return kind(value)
        return self.differs(live, node, path)

    def _match_dict(self, live: Mapping[Any, Any], node: Node, path: str, top: bool) -> Any:
        if node.kind != _state.DICT:
            return self.differs(live, node, path)
        live = self._own(live, node)
        if (
            isinstance(live, MutableMapping)
            and node.keys == list(live)
            and {str}.issuperset(map(type, live))  # 1 and True are equal, and have other paths
            and self._all_into(list(live.values()), node.children)
        ):
            return live  # every byte goes into what is there: nothing is left to do
        pairs = list(zip(node.keys or [], node.children, strict=True))
        prefix = f"{path}/" if path else ""
        if not top and self._takes_all(live, node):
            values = {
                key: self._taken(live.get(key), child, prefix + escape(key)) for key, child in pairs
            }
            return refilled(live, values, self.finish, replace=True)
        saved = {escape(key): child for key, child in pairs}
        changes: dict[Any, Any] = {}
        keys: list[Any] = []
        paths: list[str] = []
        arrays: list[Any] = []
        nodes: list[Node] = []
        for key, value in live.items():
            text = escape(key)
            child = saved.pop(text, None)
            if child is None:
                self.missing(prefix + text)
            elif child.kind == _state.ARRAY and self._is_array(value):
                keys.append(key)
                paths.append(prefix + text)
                arrays.append(value)
                nodes.append(child)
            else:
                changes[key] = self.match(value, child, prefix + text, top=False)
        if not top:
            for text in saved:
                self.unused(prefix + text)
        placed = self.arrays_into(arrays, nodes, paths)
        if any(map(operator.is_not, placed, arrays)) or not isinstance(live, MutableMapping):
            changes.update(zip(keys, placed, strict=True))
        elif not changes:
            return live  # every byte goes into what is there: nothing is left to do
        return refilled(live, changes, self.finish, replace=False)

    def _match_sequence(self, live: Sequence[Any], node: Node, path: str) -> Any:
        if not live and node.kind == _state.PLAIN and self.plain[node.index] is None:
            return live  # Orbax has None where there is nothing
        if node.kind == _state.CODEC and node.name == DEQUE:
            check_deque(node, self.plain)
        node = items_of(node)
        if node.kind == _state.DICT and hasattr(live, "_fields"):
            return self._match_fields(_state.named_fields(live), live, node, path)
        if node.kind not in (_state.LIST, _state.TUPLE):
            return self.differs(live, node, path)
        live = self._own(live, node)
        prefix = f"{path}/" if path else ""
        takes_all = self._takes_all(live, node)
        if why := unfillable(live, node, takes_all=takes_all):
            self.diff.differing.append(f"{path}: {why}")
            return live
        if takes_all:
            here = () if isinstance(live, deque) else live  # whose items move on
            pairs = enumerate(itertools.zip_longest(node.children, here[: len(node.children)]))
            values = [self._taken(item, child, f"{prefix}{i}") for i, (child, item) in pairs]
        else:
            values = self._match_items(live, node.children, prefix)
        if isinstance(live, MutableSequence):
            self.finish.append(lambda: assign_items(live, values))
            return live
        return later(lambda: sequence_like(live, [settle(value) for value in values]))

    def _taken(self, live: Any, node: Node, path: str) -> Any:
        """What was saved, within a container that takes all: in the place of what is like it."""
        if is_of_kind(node, live):
            return self.match(live, node, path, top=False)
        return self.tree(node, path)

    def _match_fields(
        self, fields: Mapping[str, Any], live: Sequence[Any], node: Node, path: str
    ) -> Any:
        prefix = f"{path}/" if path else ""
        saved = dict(zip(map(escape, node.keys or []), node.children, strict=True))
        values = []
        for name, value in fields.items():
            child = saved.pop(name, None)
            if child is None:
                self.missing(prefix + name)
                values.append(value)
            else:
                values.append(self.match(value, child, prefix + name, top=False))
        for name in saved:
            self.unused(prefix + name)
        return later(lambda: sequence_like(live, [settle(value) for value in values]))

    def _match_items(self, live: Sequence[Any], children: Sequence[Node], prefix: str) -> list[Any]:
        if all(node.kind == _state.ARRAY for node in children) and all(map(self._is_array, live)):
            return self.arrays_into(live, children, [f"{prefix}{i}" for i in range(len(live))])
        return [
            self.match(item, child, f"{prefix}{i}", top=False)
            for i, (item, child) in enumerate(zip(live, children, strict=True))
        ]

    def _own(self, live: Any, node: Node) -> Any:
        """What is filled in the place of a container: itself where it can be."""
        own = self._aliases.own(live, node)
        self.replaced = self.replaced or own is not live
        return own

    def _decoded(self, node: Node, path: str) -> Any:
        codec = codec_named(node.name, path)
        if node.name == DEQUE:
            check_deque(node, self.plain)
        tree = self.tree(node.children[0], path)
        return later(lambda: codec.decode(settle(tree)))

    def _fresh_leaf(self, index: int) -> Any:
        """A fresh array that is handed out as what it was: a NumPy scalar is no array."""
        spec = self.arrays[index].spec
        array = self.fresh(index)
        owner = self._adapter_named(spec.framework)
        return later(lambda: owner.finished(array, spec))

    def _note_in_place(self, owner: StateAdapter, more: Sequence[Any]) -> None:
        known = self._in_place.get(owner.framework)
        if known is None:
            known = self._in_place[owner.framework] = (owner, [])
            self.finish.insert(0, functools.partial(owner.written, known[1]))
        known[1].extend(more)

    def _owner(self, live: Any) -> StateAdapter:
        owner = self._owner_of(type(live), live)
        assert owner is not None
        return owner

    def _is_number(self, kind: type, node: Node) -> bool:
        """True for one element where a plain number is wanted."""
        if node.kind != _state.ARRAY:
            return False
        spec = self.arrays[node.index].spec
        replaces = self._adapter_named(spec.framework).replaces
        # Where a framework replaces arrays, a number and an array of it are the same.
        found = is_number(spec, kind, exactly=replaces)
        self.replaced = self.replaced or (found and replaces)
        return found

    def _takes_all(self, live: Any, node: Node) -> bool:
        """True for a container in which what was saved is what is wanted, whatever it was.

        There are nothing but plain values on either side, or it is empty or a deque, and nothing
        that was saved had a type that only a template knows.
        """
        if type(live) is deque or (not live and isinstance(live, MutableSequence | MutableMapping)):
            return not any(child.has_objects for child in node.children)
        return not self._has_arrays(node) and not has_objects(live, self._is_array)

    def _has_arrays(self, node: Node) -> bool:
        """True if anywhere below is an array that is more than a number."""
        if node.kind == _state.ARRAY:
            return not self.arrays[node.index].spec.is_scalar
        return any(map(self._has_arrays, node.children))

    def _is_array(self, value: Any) -> bool:
        return type(value) not in CODECS and self._owner_of(type(value), value) is not None

    def _owner_of(self, kind: type, value: Any) -> StateAdapter | None:
        """The adapter whose array a value of this type is, or None; asked once for each type."""
        try:
            return self._owners[kind]
        except KeyError:
            owner = next((each for each in self.adapters if each.is_array(value)), None)
            self._owners[kind] = owner
            return owner

    def _adapter_named(self, framework: str) -> StateAdapter:
        name = framework.partition(".")[0]
        for adapter in self.adapters:
            if adapter.framework == name:
                return adapter
        # Saved by a framework that this process does not use: NumPy is always there.
        return next(adapter for adapter in self.adapters if adapter.framework == "numpy")
