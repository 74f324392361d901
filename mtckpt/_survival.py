"""What the loss of a node, a rack or a zone would take along, in words and numbers. Pure.

Knows nodes, the failure domains they are in, and which nodes have which bytes. Does not know who
decided that, nor what the bytes are. Domains are nested: rack r1 of zone a is not rack r1 of zone
b. Nothing is claimed of two losses at different levels at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mtckpt.errors import UsageError

__all__ = ["Levels", "Loss", "Node", "Part", "Survival", "levels_of", "ranges", "survival_of"]

GIB = 1 << 30
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its agent's name, unique in the job, and the ranks that it serves.

    ``domains`` are wider and wider: ``{"rack": "r1", "zone": "a"}``. Two nodes of one ``boot_id``
    are on one host, unless a domain "host" says otherwise. ``failures`` are copies that did not
    verify there; one that is ``leaving`` is about to go.
    """

    name: str
    boot_id: str
    ranks: tuple[int, ...]
    domains: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    leaving: bool = False


class Part(NamedTuple):
    """Bytes of some ranks, and where they are: nodes by their place in the list of all.

    ``captured`` have them from the start; ``pulls`` are copies, each ``(from node, to node)``.
    """

    ranks: tuple[int, ...]
    size_bytes: int
    captured: tuple[int, ...]
    pulls: tuple[tuple[int, int], ...] = ()

    @property
    def holders(self) -> tuple[int, ...]:
        """All nodes that have them."""
        return self.captured + tuple(target for _, target in self.pulls)


class Levels(NamedTuple):
    """Kinds of failure domains, narrowest first, and the domain of each node at each of them.

    ``titles[level][domain]`` is what people call it. ``unlabelled`` are the kinds that some nodes
    have no label for, and which are not used: each with one of those nodes.
    """

    names: tuple[str, ...]
    domains: tuple[tuple[int, ...], ...]
    titles: tuple[tuple[str, ...], ...]
    unlabelled: tuple[tuple[str, str], ...] = ()


def levels_of(nodes: Sequence[Node]) -> Levels:
    """The kinds of domains of these nodes: "node" always, "host" where one has several nodes.

    Other kinds are those that all nodes have a label for, in the order of the first node's. Raises
    UsageError for two nodes of one name.
    """
    names = [node.name for node in nodes]
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"two nodes are called {twice}", state="nothing was placed", node=twice)
    kinds = [kind for node in nodes[:1] for kind in node.domains if kind != "host"]
    kinds += sorted({k for node in nodes for k in node.domains if k != "host"} - {*kinds})
    lacking = {
        kind: next((node.name for node in nodes if kind not in node.domains), None)
        for kind in kinds
    }
    used = [kind for kind in kinds if lacking[kind] is None]
    wider = [tuple(node.domains[kind] for kind in reversed(used)) for node in nodes]
    hosts = [
        (*path, node.domains.get("host", node.boot_id))
        for path, node in zip(wider, nodes, strict=True)
    ]
    columns: list[tuple[str, list[tuple[str, ...]], list[str]]] = [
        ("node", [(name,) for name in names], names)
    ]
    if len(set(hosts)) < len(nodes):
        called = [node.domains.get("host", node.name) for node in nodes]
        columns.append(("host", hosts, called))
    for position, kind in enumerate(used):
        paths = [path[: len(used) - position] for path in wider]
        columns.append((kind, paths, [path[-1] for path in paths]))
    numbered = [_numbered(paths, called) for _, paths, called in columns]
    return Levels(
        tuple(name for name, _, _ in columns),
        tuple(domains for domains, _ in numbered),
        tuple(titles for _, titles in numbered),
        tuple((kind, name) for kind, name in lacking.items() if name is not None),
    )


def _numbered(
    paths: Sequence[tuple[str, ...]], called: Sequence[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The domain of each node as a number, and the title of each: longer where it is ambiguous."""
    number: dict[tuple[str, ...], int] = {}
    title: dict[tuple[str, ...], str] = {}
    for path, name in zip(paths, called, strict=True):
        number.setdefault(path, len(number))
        title.setdefault(path, name)
    often = Counter(title.values())
    titles = tuple(
        name if often[name] == 1 else "/".join((*path[:-1], name)) for path, name in title.items()
    )
    return tuple(number[path] for path in paths), titles


class Loss(NamedTuple):
    """What is lost with one domain: all copies of these ranks' bytes."""

    level: str
    domain: str
    ranks: tuple[int, ...]
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.level} {self.domain}"


@dataclass(frozen=True, slots=True)
class Survival:
    """What is survived: of each level ``any`` so many domains at once; ``losses`` if one is none.

    ``any[level]`` is exact: so many domains of the level may go, whichever they are, and one more
    of them may not.
    """

    any: Mapping[str, int]
    losses: tuple[Loss, ...]

    @property
    def text(self) -> str:
        """One sentence: "survives any 1 node and any 1 rack; does not survive zone a"."""
        good = [
            f"any {number} {level}{'s' if number > 1 else ''}"
            for level, number in self.any.items()
            if number
        ]
        bad = [_named(level, self.lost(level)) for level, number in self.any.items() if not number]
        sentences = [f"survives {_and(good)}"] if good else []
        if bad:
            sentences.append(f"does not survive {_or(bad)}")
        return "; ".join(sentences) or "nothing is there to be lost"

    def lost(self, level: str) -> list[Loss]:
        """The losses at one level."""
        return [loss for loss in self.losses if loss.level == level]

    def as_json(self) -> dict[str, Any]:
        """The same for programs; ranks as text such as "0-7,12"."""
        return {
            "text": self.text,
            "survives": dict(self.any),
            "losses": [{**loss._asdict(), "ranks": ranges(loss.ranks)} for loss in self.losses],
        }


def survival_of(levels: Levels, parts: Iterable[Part]) -> Survival:
    """What of ``parts`` is left when domains are lost, whole ones, of one level at a time."""
    parts = list(parts)
    least: dict[str, int] = {}
    losses: list[Loss] = []
    for name, domains, titles in zip(levels.names, levels.domains, levels.titles, strict=True):
        fewest: int | None = None
        taken: dict[int, tuple[list[int], int]] = {}
        for part in parts:
            spread = {domains[node] for node in part.holders}
            fewest = len(spread) if fewest is None else min(fewest, len(spread))
            if len(spread) == 1:
                (domain,) = spread
                ranks, size_bytes = taken.get(domain, ([], 0))
                taken[domain] = ([*ranks, *part.ranks], size_bytes + part.size_bytes)
        if fewest is not None:
            least[name] = fewest - 1
        losses += [
            Loss(name, titles[domain], tuple(sorted(set(ranks))), size_bytes)
            for domain, (ranks, size_bytes) in sorted(taken.items())
        ]
    return Survival(least, tuple(losses))


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: "0-7,12"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _named(level: str, losses: Sequence[Loss]) -> str:
    names = [loss.domain for loss in losses]
    if len(names) > _MAX_NAMED:
        names = [*names[: _MAX_NAMED - 1], f"{len(names) - _MAX_NAMED + 1} more"]
    if all(loss.domain.startswith(level) for loss in losses):
        return _or(names)  # node-0 says what it is
    return f"{level} {_or(names)}"


def _and(words: Sequence[str]) -> str:
    return _joined(words, "and")


def _or(words: Sequence[str]) -> str:
    return _joined(words, "or")


def _joined(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
