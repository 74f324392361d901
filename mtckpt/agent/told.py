"""What other nodes have said of one save: the last word of each, and what they amount to together.

Put together as the words come, and not when somebody asks: a lead of a thousand nodes is told as
many times of every save, and looks each time at what it has. Does not decide what follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mtckpt.agent.nodes import News
    from mtckpt.agent.protocol import WireError

__all__ = ["Told"]

_T = TypeVar("_T", int, str)


class Told:
    """The last news of each node, by its number. At the lead each node's, elsewhere the lead's."""

    def __init__(self) -> None:
        self._news: dict[int, News] = {}
        self._ranks: dict[str, Counter[int]] = {}
        self._read_back: dict[str, Counter[int]] = {}
        self._words: dict[str, Counter[str]] = {}
        self._failing: dict[int, News] = {}

    def __getitem__(self, node: int) -> News:
        return self._news[node]

    def __setitem__(self, node: int, news: News) -> None:
        before = self._news.get(node)
        if before is not None:
            self._count(before, -1)
        self._count(news, 1)
        self._news[node] = news
        self._failing.pop(node, None)
        if news.failed:
            self._failing[node] = news

    def __iter__(self) -> Iterator[News]:
        return iter(self._news.values())

    def clear(self) -> None:
        """As if nobody had said anything."""
        for kept in (self._news, self._ranks, self._read_back, self._words, self._failing):
            kept.clear()

    def _count(self, news: News, sign: int) -> None:
        for label, ranks in news.parts.items():
            _add(self._ranks.setdefault(label, Counter()), ranks, sign)
            if label in news.read_back:
                _add(self._read_back.setdefault(label, Counter()), ranks, sign)
        for what, labels in (
            ("whole", news.whole),
            ("whole and read back", set(news.whole).intersection(news.read_back)),
            ("damaged", news.damaged),
            ("superseded", news.superseded),
        ):
            _add(self._words.setdefault(what, Counter()), labels, sign)

    def labels(self) -> Collection[str]:
        """Tiers in which other nodes have some of it."""
        return [label for label, ranks in self._ranks.items() if ranks]

    def ranks(self, label: str) -> Collection[int]:
        """Ranks whose records other nodes have in a tier."""
        return self._ranks.get(label, {}).keys()

    def ranks_read_back(self, label: str) -> Collection[int]:
        """Those of them that were read back there."""
        return self._read_back.get(label, {}).keys()

    def is_whole(self, label: str) -> bool:
        """Whether somebody knows that all nodes have theirs in a tier."""
        return label in self._words.get("whole", ())

    def is_whole_and_read_back(self, label: str) -> bool:
        """And that all of it was read back."""
        return label in self._words.get("whole and read back", ())

    def is_damaged(self, label: str) -> bool:
        """Whether somebody has found some of it damaged in a tier."""
        return label in self._words.get("damaged", ())

    def superseded(self) -> Collection[str]:
        """Tiers that take a newer save instead on some node."""
        return self._words.get("superseded", {}).keys()

    def failures(self) -> dict[str, WireError]:
        """Why it does not reach some tiers on some node."""
        return {label: why for news in self._failing.values() for label, why in news.failed.items()}


def _add(counts: Counter[_T], values: Iterable[_T], sign: int) -> None:
    for value in values:
        counts[value] += sign
        if not counts[value]:
            del counts[value]
