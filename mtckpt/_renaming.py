"""A checkpoint's tree with its leaves moved to other paths, before it meets a template.

Knows nodes and paths. Does not know what the paths mean to anyone. A moved leaf keeps the kinds of
containers that it came from for as much of its path, counted from the end, as stayed the same: a
prefix can be exchanged, and lists, tuples, codecs and keys that are numbers stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mtckpt import _state
from mtckpt._node import MAX_DEPTH
from mtckpt._state import ArraySpec, Node, escape
from mtckpt.errors import UsageError

__all__ = ["Stored", "rename_tree"]

MAX_GAPS = 100_000


class Stored(NamedTuple):
    """One array of a checkpoint: its path, what it is, and whose bytes it has.

    ``bytes_of`` is the index of the array whose stored bytes these are: its own, or that of the
    first path for a tied one.
    """

    path: str
    spec: ArraySpec
    bytes_of: int


@dataclass(frozen=True, slots=True)
class _Step:
    """From a container, by what it is, to what stands at ``key``, through codecs.

    The outermost codec comes first.
    """

    kind: str
    key: object
    codecs: tuple[str, ...]
    name: str = ""
    is_object: bool = False


@dataclass(slots=True)
class _Draft:
    """A container that is being put together; ``leaf`` makes it a leaf."""

    kind: str = ""
    name: str = ""
    is_object: bool = False
    codecs: tuple[str, ...] = ()
    entries: dict[str, tuple[object, _Draft]] = field(default_factory=dict)  # by path component
    leaf: Node | None = None


def rename_tree(
    root: Node,
    arrays: Sequence[Stored],
    plain_paths: Sequence[str],
    rename: Callable[[str], str | None],
) -> tuple[Node, list[Stored]]:
    """The tree with every leaf where ``rename`` says; None drops it. Empty containers are leaves.

    An item dropped from a list leaves a gap, so that those after it keep their places. Raises
    UsageError if two leaves land on one path, or a leaf where a container has to be, or too deep.
    """
    del plain_paths  # the walk knows them
    if not callable(rename):
        raise UsageError(
            f"rename is a {type(rename).__name__}: it has to be a function of a path",
            state="live state unchanged",
            actions=("for a dict of paths: rename=lambda path: paths.get(path, path)",),
        )
    stored = list(arrays)
    draft = _Draft()
    codecs, top = _unwrapped(root)
    draft.codecs = codecs
    moved = []
    for path, steps, leaf in _leaves(top, "", ()):
        new = rename(path)
        if not isinstance(new, str | None):
            raise UsageError(
                f"rename gives a {type(new).__name__}: it has to be a path, or None to drop it",
                path=path[:200],
                state="live state unchanged",
            )
        if new == path:
            _insert(draft, steps, leaf, path)
        elif new is not None:
            if new.count("/") > 2 * MAX_DEPTH:
                raise UsageError(
                    "rename gives a path that is nested too deeply",
                    path=new[:200],
                    max_depth=2 * MAX_DEPTH,
                    state="live state unchanged",
                )
            moved.append((new, steps, leaf))
    for path, steps, leaf in moved:  # after those that stay: their containers are what they were
        if leaf.kind == _state.ARRAY:
            old = stored[leaf.index]
            stored[leaf.index] = Stored(path, old.spec, old.bytes_of)
        _insert(draft, _moved(steps, path), leaf, path)
    if not draft.kind and draft.leaf is None:
        draft.kind = _state.DICT
    return _built(draft), stored


def _unwrapped(node: Node) -> tuple[tuple[str, ...], Node]:
    """The codecs around a node, outermost first, and what is inside them."""
    codecs = []
    while node.kind in (_state.CODEC, _state.OBJECT):
        if node.kind == _state.CODEC:
            codecs.append(node.name)
        node = node.children[0]
    return tuple(codecs), node


def _leaves(
    node: Node, path: str, steps: tuple[_Step, ...]
) -> list[tuple[str, tuple[_Step, ...], Node]]:
    """Every leaf with its path and the way to it, in order."""
    if not node.children:
        return [(path, steps, node)]
    prefix = f"{path}/" if path else ""
    keys = node.keys if node.kind == _state.DICT else list(range(len(node.children)))
    found = []
    for key, child in zip(keys or [], node.children, strict=True):
        codecs, inner = _unwrapped(child)
        step = _Step(node.kind, key, codecs, node.name, node.is_object)
        found += _leaves(inner, prefix + escape(key), (*steps, step))
    return found


def _moved(steps: tuple[_Step, ...], path: str) -> tuple[_Step, ...]:
    """The way to a new path, along the old steps counted from the end while they agree."""
    moved: list[_Step] = []
    agree = True
    components = path.split("/")
    for back, component in enumerate(reversed(components), 1):
        old = steps[-back] if back <= len(steps) else None
        if agree and old is not None and escape(old.key) == component:
            moved.append(old)
            continue
        codecs = old.codecs if agree and old is not None else ()
        in_list = agree and old is not None and old.kind in (_state.LIST, _state.TUPLE)
        if in_list and old is not None and component.isdecimal():
            moved.append(_Step(old.kind, int(component), codecs))
        else:
            text = component.replace("%40", "@").replace("%2F", "/").replace("%25", "%")
            moved.append(_Step(_state.DICT, text, codecs))
        agree = False
    return tuple(reversed(moved))


def _insert(draft: _Draft, steps: tuple[_Step, ...], leaf: Node, path: str) -> None:
    for step in steps:
        if draft.leaf is not None:
            raise _taken(path)
        if not draft.kind:
            draft.kind, draft.name, draft.is_object = step.kind, step.name, step.is_object
        # Where leaves that came another way have made the container, its kind and keys count.
        text = escape(step.key)
        if draft.kind != _state.DICT and not text.isdecimal():
            raise _taken(path)
        draft = draft.entries.setdefault(text, (step.key, _Draft()))[1]
        draft.codecs = draft.codecs or step.codecs
    if draft.leaf is not None or draft.kind:
        raise _taken(path)
    draft.leaf = leaf


def _taken(path: str) -> UsageError:
    return UsageError(
        "rename gives a path that another leaf has, or needs for a container",
        path=path,
        state="live state unchanged",
        actions=("give every leaf of the checkpoint a path of its own, or None to drop it",),
    )


def _built(draft: _Draft) -> Node:
    if draft.leaf is not None:
        node = draft.leaf
    elif draft.kind == _state.DICT:
        node = Node(
            _state.DICT,
            keys=[key for key, _ in draft.entries.values()],
            children=[_built(child) for _, child in draft.entries.values()],
            name=draft.name,
            is_object=draft.is_object,
        )
    else:
        items = {int(text): child for text, (_, child) in draft.entries.items()}
        length = max(items) + 1
        if length > MAX_GAPS + len(items):
            raise UsageError("rename gives a list an index far beyond its end", index=length - 1)
        gap = _Draft(leaf=Node(_state.DROPPED))
        children = [_built(items.get(i, gap)) for i in range(length)]
        node = Node(draft.kind, children=children, is_object=draft.is_object)
    for name in reversed(draft.codecs):
        node = Node(_state.CODEC, children=[node], name=name)
    return node
