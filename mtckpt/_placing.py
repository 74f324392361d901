"""What goes where: a checkpoint's tree matched against the live template, before a byte moves.

Knows trees, live objects and adapters. Does not read files: it says which stored array is wanted
at which host address (``fills``) and what is left to do once the bytes are there (``finish``).
Matching changes nothing that lives; whatever differs is collected in ``diff`` and raised as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtckpt import _state
from mtckpt._state import ArraySpec, Node, StateAdapter, codec_named, escape
from mtckpt.errors import StateMismatch

__all__ = ["Diff", "Fill", "Placing", "Stored", "rename_tree"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One array of a checkpoint: its path, what it is, and whose bytes it has.

    ``bytes_of`` is the index of the array whose stored bytes these are: its own, or that of the
    first path for a tied one.
    """

    path: str
    spec: ArraySpec
    bytes_of: int


@dataclass(frozen=True, slots=True)
class Fill:
    """``size_bytes`` of stored array ``index`` are wanted at host ``address``."""

    index: int
    address: int
    size_bytes: int


@dataclass(slots=True)
class Diff:
    """How a template and a checkpoint differ; every entry is one line for the user."""

    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


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
        self.finish: list[Callable[[], None]] = []
        self.assigned: list[str] = []
        self._fills: dict[int, Fill] = {}
        self._fresh: dict[int, Any] = {}

    @property
    def fills(self) -> list[Fill]:
        """Every wanted array once an address, tied ones not twice."""
        return list(self._fills.values())

    # -- what an adapter asks for -------------------------------------------------------------

    def into(self, index: int, address: int) -> None:
        """Want the bytes of array ``index`` at ``address``, in live memory."""
        stored = self.arrays[index]
        if stored.spec.size_bytes:
            self._fills[address] = Fill(stored.bytes_of, address, stored.spec.size_bytes)

    def fresh(self, index: int, like: object | None = None) -> Any:
        """A new host array for ``index``, filled before ``finish`` runs; the same one if tied."""
        stored = self.arrays[index]
        array = self._fresh.get(stored.bytes_of)
        if array is not None and stored.bytes_of != index:
            return array
        adapter = self._adapter_named(stored.spec.framework)
        array, address = adapter.new(stored.spec, like)
        self.into(index, address)
        self._fresh[index] = array
        return array

    def tree(self, node: Node, path: str = "") -> Any:
        """The subtree as plain containers with fresh arrays: what ``load_state_dict`` takes."""
        if node.kind == _state.ARRAY:
            return self.fresh(node.index)
        if node.kind == _state.PLAIN:
            return self.plain[node.index]
        if node.kind == _state.CODEC:
            return self._decoded(node, path)
        if node.kind == _state.DICT:
            keys = node.keys or []
            return {
                key: self.tree(child, f"{path}/{escape(key)}")
                for key, child in zip(keys, node.children, strict=True)
            }
        items = [self.tree(child, f"{path}/{i}") for i, child in enumerate(node.children)]
        return items if node.kind == _state.LIST else tuple(items)

    def array_into(self, live: Any, node: Node, path: str) -> Any:
        """Place an array onto a live one; returns what stands in its place (``live`` if it can)."""
        owner = next(adapter for adapter in self.adapters if adapter.is_array(live))
        if node.kind != _state.ARRAY:
            self.diff.differing.append(f"{path}: an array here, {node.kind} in the checkpoint")
            return live
        stored = self.arrays[node.index].spec
        wanted = owner.spec(live, path)
        if (stored.shape, stored.dtype) != (wanted.shape, wanted.dtype):
            self.diff.differing.append(
                f"{path}: {wanted.dtype}{list(wanted.shape)} here, "
                f"{stored.dtype}{list(stored.shape)} in the checkpoint"
            )
            return live
        address = owner.writable_address(live)
        if address is not None:
            self.into(node.index, address)
            return live
        array, fresh_address = owner.new(
            ArraySpec(stored.dtype, stored.shape, owner.framework), live
        )
        self.into(node.index, fresh_address)
        return _Later(lambda: owner.assign(live, array))

    def missing(self, path: str) -> None:
        """The template wants what the checkpoint lacks."""
        if not self.partial:
            self.diff.missing.append(path)

    def unused(self, path: str) -> None:
        """The checkpoint has what the template does not want."""
        if not self.partial:
            self.diff.unused.append(path)

    def raise_diff(self, step: int) -> None:
        """Raise StateMismatch with the whole difference, if there is one."""
        diff = self.diff
        if not (diff.missing or diff.unused or diff.differing):
            return
        lines = [f"  missing in the checkpoint: {p}" for p in diff.missing[:50]]
        lines += [f"  not in the template: {p}" for p in diff.unused[:50]]
        lines += [f"  differs: {p}" for p in diff.differing[:50]]
        total = len(diff.missing) + len(diff.unused) + len(diff.differing)
        if total > len(lines):
            lines.append(f"  and {total - len(lines)} more, in the attributes of this error")
        raise StateMismatch(
            "template and checkpoint differ:\n" + "\n".join(lines) + "\n ",
            step=step,
            state="live state unchanged",
            actions=(
                "partial=True restores what both have",
                "rename=function maps or drops (None) paths of the checkpoint",
            ),
            missing=tuple(diff.missing),
            unused=tuple(diff.unused),
            differing=tuple(diff.differing),
        )

    # -- the walk over the template -----------------------------------------------------------

    def match(self, live: Any, node: Node, path: str = "", *, top: bool = True) -> Any:
        """Match ``live`` with ``node``; returns what stands in its place once bytes have arrived.

        The result is resolved by ``settle``: places that are rebuilt later are wrapped until then.
        """
        if type(live) in _state.PLAIN_TYPES:
            if node.kind == _state.PLAIN:
                return self.plain[node.index]
            if live is None:
                return self.tree(node, path)  # the template leaves this place open
            self.diff.differing.append(f"{path}: a plain value here, {node.kind} in the checkpoint")
            return live
        if any(adapter.is_array(live) for adapter in self.adapters):
            return self.array_into(live, node, path)
        if type(live) in _state._codecs:
            return self._decoded(node, path) if node.kind == _state.CODEC else self._differs(live, node, path)
        if any(adapter.place_object(live, node, path, self) for adapter in self.adapters):
            return live
        if hasattr(live, "state_dict") and hasattr(live, "load_state_dict"):
            tree = self.tree(node, path)
            self.finish.append(lambda: live.load_state_dict(tree))
            return live
        if isinstance(live, Mapping):
            return self._match_dict(live, node, path, top)
        if isinstance(live, (list, tuple)):
            return self._match_sequence(live, node, path)
        if node.kind == _state.PLAIN:
            return self.plain[node.index]
        return self._differs(live, node, path)

    def _match_dict(self, live: Mapping[Any, Any], node: Node, path: str, top: bool) -> Any:
        if node.kind != _state.DICT:
            return self._differs(live, node, path)
        saved = dict(zip(node.keys or [], node.children, strict=True))
        prefix = f"{path}/" if path else ""
        changes: dict[Any, Any] = {}
        if not _has_arrays(node) and not top and not _has_objects(live, self.adapters):
            changes = {key: self.tree(child) for key, child in saved.items()}
            return self._rebuilt(live, changes, replace=True)
        for key, value in live.items():
            if key not in saved:
                self.missing(f"{prefix}{escape(key)}")
                continue
            changes[key] = self.match(value, saved[key], f"{prefix}{escape(key)}", top=False)
        for key in saved:
            if key not in live and not top:
                self.unused(f"{prefix}{escape(key)}")
        return self._rebuilt(live, changes, replace=False)

    def _match_sequence(self, live: Sequence[Any], node: Node, path: str) -> Any:
        if node.kind not in (_state.LIST, _state.TUPLE):
            return self._differs(live, node, path)
        if not _has_arrays(node) and not _has_objects(live, self.adapters):
            values = [self.tree(child) for child in node.children]
        elif len(live) != len(node.children):
            self.diff.differing.append(
                f"{path}: {len(live)} items here, {len(node.children)} in the checkpoint"
            )
            return live
        else:
            pairs = zip(live, node.children, strict=True)
            values = [
                self.match(item, child, f"{path}/{i}" if path else str(i), top=False)
                for i, (item, child) in enumerate(pairs)
            ]
        if isinstance(live, MutableSequence):
            self.finish.append(lambda: _assign_items(live, values))
            return live
        make = type(live)
        named = hasattr(live, "_fields")
        return _Later(lambda: make(*map(settle, values)) if named else make(map(settle, values)))  # type: ignore[call-arg]

    def _rebuilt(self, live: Mapping[Any, Any], changes: dict[Any, Any], *, replace: bool) -> Any:
        if isinstance(live, MutableMapping):
            target = live

            def write_back() -> None:
                if replace:
                    for key in [key for key in target if key not in changes]:
                        del target[key]
                for key, value in changes.items():
                    settled = settle(value)
                    if key not in target or target[key] is not settled:
                        target[key] = settled

            self.finish.append(write_back)
            return live
        return _Later(lambda: {**live, **{key: settle(value) for key, value in changes.items()}})

    def _decoded(self, node: Node, path: str) -> Any:
        codec = codec_named(node.name, path)
        tree = self.tree(node.children[0], path)
        return _Later(lambda: codec.decode(tree))

    def _differs(self, live: Any, node: Node, path: str) -> Any:
        self.diff.differing.append(
            f"{path}: {type(live).__qualname__} here, {node.kind} in the checkpoint"
        )
        return live

    def _adapter_named(self, framework: str) -> StateAdapter:
        for adapter in self.adapters:
            if adapter.framework == framework:
                return adapter
        # Saved by a framework that this process does not use: NumPy is always there.
        return next(adapter for adapter in self.adapters if adapter.framework == "numpy")


class _Later:
    """A value that exists only once the bytes have arrived."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def settle(value: Any) -> Any:
    """What stands in a place, after the bytes have arrived. Called once a place."""
    if isinstance(value, _Later):
        return value.make()
    if type(value) is dict:
        return {key: settle(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(settle(item) for item in value)
    return value


def _assign_items(live: MutableSequence[Any], values: list[Any]) -> None:
    live[:] = [settle(value) for value in values]


def _has_arrays(node: Node) -> bool:
    return node.kind == _state.ARRAY or any(map(_has_arrays, node.children))


def _has_objects(live: Any, adapters: Sequence[StateAdapter]) -> bool:
    """True if a container holds arrays or stateful objects, which are never just replaced."""
    items = live.values() if isinstance(live, Mapping) else live
    for item in items:
        if type(item) in _state.PLAIN_TYPES:
            continue
        if isinstance(item, (Mapping, list, tuple)) and not any(a.is_array(item) for a in adapters):
            if _has_objects(item, adapters):
                return True
        else:
            return True
    return False


def rename_tree(
    root: Node,
    arrays: Sequence[Stored],
    plain_paths: Sequence[str],
    rename: Callable[[str], str | None],
) -> tuple[Node, list[Stored]]:
    """The tree with every leaf moved to where ``rename`` says; None drops it.

    A leaf that keeps its path keeps its place. A moved one lands in dicts whose keys are the
    components of its new path.
    """
    moved: list[tuple[str, Node]] = []
    stored = list(arrays)

    def keep(node: Node, path: str) -> Node | None:
        if node.kind in (_state.ARRAY, _state.PLAIN):
            new = rename(path)
            if new == path:
                return node
            if new is not None:
                moved.append((new, node))
            return None
        prefix = f"{path}/" if path else ""
        names = node.keys if node.kind == _state.DICT else list(range(len(node.children)))
        kept = [
            (key, keep(child, path if node.kind == _state.CODEC else prefix + escape(key)))
            for key, child in zip(names or [], node.children, strict=True)
        ]
        alive = [(key, child) for key, child in kept if child is not None]
        if node.children and not alive:
            return None
        return Node(
            node.kind,
            type_=node.type,
            keys=[key for key, _ in alive] if node.kind == _state.DICT else None,
            children=[child for _, child in alive],
            name=node.name,
        )

    new_root = keep(root, "") or Node(_state.DICT, keys=[])
    for path, node in moved:
        new_root = _insert(new_root, path.split("/"), node)
        if node.kind == _state.ARRAY:
            old = stored[node.index]
            stored[node.index] = Stored(path, old.spec, old.bytes_of)
    return new_root, stored


def _insert(node: Node, components: list[str], leaf: Node) -> Node:
    keys = list(node.keys or []) if node.kind == _state.DICT else []
    children = list(node.children) if node.kind == _state.DICT else []
    head, rest = components[0], components[1:]
    position = next((i for i, key in enumerate(keys) if escape(key) == head), None)
    if position is None:
        keys.append(head.replace("%40", "@").replace("%2F", "/").replace("%25", "%"))
        children.append(leaf if not rest else _insert(Node(_state.DICT, keys=[]), rest, leaf))
    else:
        children[position] = leaf if not rest else _insert(children[position], rest, leaf)
    return Node(_state.DICT, type_=dict, keys=keys, children=children)
