"""Many nodes: what a lead is told costs it the same however many others tell it too.

Counted, not timed: how often it makes its word anew, and how often it looks through ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import agreed
from mtckpt.agent import links
from mtckpt.agent.nodes import News, news_for_nodes
from mtckpt.agent.protocol import WireError
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.agent.told import Told

LABELS = (RAM, "disk")
labels = st.lists(st.sampled_from(LABELS), unique=True)
words = st.builds(
    News,
    save=st.just("step"),
    save_id=st.just("id"),
    parts=st.dictionaries(st.sampled_from(LABELS), st.lists(st.integers(0, 3))),
    whole=labels,
    read_back=labels,
    damaged=labels,
    superseded=labels,
    failed=st.dictionaries(st.sampled_from(LABELS), st.just(WireError("TierFull", "no room"))),
)


@given(st.lists(st.tuples(st.integers(0, 3), words | st.just("clear"))))
def test_what_is_put_together_is_what_the_last_words_say(said: list[tuple[int, Any]]) -> None:
    told, last = Told(), dict[int, News]()
    for node, news in said:
        if news == "clear":
            told.clear()
            last.clear()
        else:
            told[node] = last[node] = news
    assert list(told) == list(last.values())
    every = list(last.values())
    for label in LABELS:
        assert set(told.ranks(label)) == {r for n in every for r in n.parts.get(label, ())}
        read_back = [n for n in every if label in n.read_back]
        far = {r for n in read_back for r in n.parts.get(label, ())}
        assert set(told.ranks_read_back(label)) == far
        assert told.is_whole(label) == any(label in n.whole for n in every)
        assert told.is_whole_and_read_back(label) == any(label in n.whole for n in read_back)
        assert told.is_damaged(label) == any(label in n.damaged for n in every)
    assert set(told.superseded()) == {label for n in every for label in n.superseded}
    assert told.failures().keys() == {label for n in every for label in n.failed}


def test_a_lead_makes_its_word_once_for_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    made: list[str] = []

    def make(save: SaveState) -> News | None:
        made.append(str(save.name))
        return news_for_nodes(save)

    monkeypatch.setattr(links, "news_for_nodes", make)
    for num_nodes in (10, 80):
        made.clear()
        found = agreed.agree(num_nodes * agreed.PER_NODE)
        assert found["messages"] == 4  # with the answers to both
        counts.append(len(made) / num_nodes)
    assert counts[1] < 2 * counts[0]
