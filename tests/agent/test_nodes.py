"""What nodes tell each other of a save, as tables: who has what, what that amounts to, and when."""

from __future__ import annotations

import pytest

from mtckpt._events import EventStream
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Incarnation, SaveName
from mtckpt.agent import work
from mtckpt.agent.healing import Healer
from mtckpt.agent.nodes import Layout, News, layout_of, named, news_for_lead, news_for_nodes
from mtckpt.agent.protocol import Join, NodeOfRun, TierConfig, WireError
from mtckpt.agent.queue import Limits
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import UsageError

NAME = SaveName(7, 1, "ab" * 4)
ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"


def join(*ranks: list[int], lead: int = 0) -> Join:
    nodes = [
        NodeOfRun(PeerAddress(f"10.0.0.{n}", 1, 2, name=f"host-{n}"), list(each))
        for n, each in enumerate(ranks)
    ]
    return Join("h", "00" * 32, sum(map(len, ranks)), nodes, lead)


def layout(here: int, *ranks: list[int]) -> Layout:
    return layout_of(join(*ranks), ranks[here][0])


def save(**ranks: set[int]) -> SaveState:
    state = SaveState(NAME, ID, world_size=4)
    state.ranks.update(ranks)
    return state


def news(**facts: object) -> News:
    return News(str(NAME), ID, world_size=4, **facts)  # type: ignore[arg-type]


def test_who_speaks_to_whom() -> None:
    lead, other = layout(0, [0, 1], [2], [3]), layout(1, [0, 1], [2], [3])
    assert (lead.is_lead, lead.partners(), sorted(lead.own)) == (True, [1, 2], [0, 1])
    assert (other.is_lead, other.partners(), sorted(other.own)) == (False, [0], [2])
    assert other.node_of(3) == 2
    assert other.describe([1, 3]) == "rank 1 on host-0 (10.0.0.0); rank 3 on host-2 (10.0.0.2)"
    with pytest.raises(UsageError):
        layout_of(join([0, 1]), 2)


def test_the_lead_is_where_the_join_says() -> None:
    found = layout_of(join([2, 3], [0, 1], lead=1), 0)
    assert found.is_lead
    assert found.partners() == [0]


def test_many_names_are_cut_short() -> None:
    assert named(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."
    many = layout(0, *([rank] for rank in range(20)))
    assert many.describe(range(20)).endswith("rank 7 on host-7 (10.0.0.7) and 12 more nodes")


@pytest.mark.parametrize(
    ("ranks", "incarnation", "parts"),
    [
        ({RAM: {2}}, 1, None),  # one of this node's two is still to come
        ({RAM: {2, 3}}, 1, {RAM: [2, 3]}),
        ({RAM: {2, 3}, "disk": {2}}, 1, {RAM: [2, 3]}),
        ({RAM: {2, 3}, "disk": {0, 1, 2, 3}}, 1, {RAM: [2, 3], "disk": [0, 1, 2, 3]}),
        ({RAM: {1}}, 2, {RAM: [1]}),  # of an earlier start, when ranks were elsewhere
        ({"disk": set()}, 1, None),
    ],
)
def test_a_node_tells_what_all_its_ranks_have(
    ranks: dict[str, set[int]], incarnation: int, parts: dict[str, list[int]] | None
) -> None:
    told = news_for_lead(save(**ranks), layout(1, [0, 1], [2, 3]), incarnation)
    assert (told.parts if told else None) == parts


def test_a_node_that_calls_a_save_off_has_no_part_of_it() -> None:
    state = save(ram={2, 3})
    state.called_off = "rank 3: no slot is free"
    told = news_for_lead(state, layout(1, [0, 1], [2, 3]), 1)
    assert told is not None
    assert (told.parts, told.called_off) == ({}, state.called_off)


def test_doubt_is_no_news() -> None:
    state = save(ram={2, 3})
    state.failed[RAM] = WireError("RankTimeout", "the lead is silent")
    told = news_for_lead(state, layout(1, [0, 1], [2, 3]), 1)
    assert told is not None
    assert told.failed == {}


@pytest.mark.parametrize(
    ("here", "told", "complete"),
    [
        ({0, 1}, {}, False),
        ({0, 1}, {1: news(parts={RAM: [2, 3]})}, True),
        ({0, 1}, {1: news(parts={RAM: [2]}), 2: news(parts={RAM: [3]})}, True),
        ({0, 1}, {1: news(parts={"disk": [2, 3]})}, False),
        ({2, 3}, {0: news(whole=[RAM])}, True),
        ({2, 3}, {0: news(whole=["disk"])}, False),
        (set(), {0: news(whole=[RAM])}, False),  # this node has let go of it
        (set(), {1: news(parts={RAM: [0, 1, 2, 3]})}, False),
    ],
)
def test_complete_is_what_all_nodes_have_together(
    here: set[int], told: dict[int, News], complete: bool
) -> None:
    state = save(ram=here)
    for node, each in told.items():
        state.told[node] = each
    assert state.is_complete(RAM) is complete
    assert state.is_staged is complete
    state.disputed = True
    assert not state.is_complete(RAM)


def test_what_is_lacking_is_what_no_node_has() -> None:
    state = save(ram={0})
    assert state.lacking() == [1, 2, 3]
    state.told[1] = news(parts={RAM: [2, 3]})
    assert state.lacking() == [1]
    assert state.is_open
    only_far = save()
    only_far.told[1] = news(parts={RAM: [2, 3]})
    assert only_far.is_open


@pytest.mark.parametrize(
    ("here", "told", "verified"),
    [
        ({"disk"}, {}, False),
        ({"disk"}, {1: news(parts={"disk": [2, 3]})}, False),
        ({"disk"}, {1: news(parts={"disk": [2, 3]}, read_back=["disk"])}, True),
        (set(), {1: news(parts={"disk": [2, 3]}, read_back=["disk"])}, False),
        ({"disk"}, {0: news(whole=["disk"])}, False),
        ({"disk"}, {0: news(whole=["disk"], read_back=["disk"])}, True),
    ],
)
def test_read_back_is_what_each_node_has_read_back(
    here: set[str], told: dict[int, News], verified: bool
) -> None:
    state = save(disk={0, 1})
    state.verified |= here
    for node, each in told.items():
        state.told[node] = each
    assert state.is_verified("disk") is verified


def test_what_fails_on_one_node_fails_on_all() -> None:
    state = save(ram={0, 1})
    state.due |= {"disk", "nfs", "store"}
    why = WireError("TierFull", "no room")
    state.told[1] = news(
        parts={RAM: [2, 3]}, failed={"disk": why}, superseded=["nfs"], damaged=["store"]
    )
    assert state.owed == {"store"}
    assert state.change().failed == {"disk": why}
    assert state.change().superseded == ["nfs"]
    assert state.is_damaged("store")
    told = news_for_nodes(state)
    assert told is not None
    assert (told.whole, told.failed, told.superseded) == ([RAM], {"disk": why}, ["nfs"])


def test_the_lead_says_nothing_of_what_is_not_settled() -> None:
    state = save(ram={0, 1}, store={0, 1})
    assert news_for_nodes(state) is None
    state.told[1] = news(parts={RAM: [2, 3], "store": [2, 3]})
    state.uncommitted.add("store")  # all of it is there, and nobody has said so in the store
    told = news_for_nodes(state)
    assert told is not None
    assert told.whole == [RAM]


def test_a_lead_tells_what_others_have_whole_though_it_has_no_part_of_it() -> None:
    """Of an earlier start, on other nodes: their rules count it then."""
    state = save()
    parts, failed = {RAM: [0, 1], "disk": [0, 1]}, {"store": WireError("TierFull", "no room")}
    state.told[1] = news(parts=parts, failed=failed, read_back=["disk"])
    state.told[2] = news(parts={"disk": [2, 3]}, damaged=["disk"])
    told = news_for_nodes(state)
    assert told is not None
    assert (told.whole, told.read_back, told.damaged) == (["disk"], [], ["disk"])
    assert not state.is_complete("disk")
    state.told[2] = news(parts={"disk": [2, 3]}, read_back=["disk"])
    told = news_for_nodes(state)
    assert told is not None
    assert (told.read_back, told.damaged) == (["disk"], [])


def test_what_was_restored_from_was_whole() -> None:
    state = save(ram={2, 3})
    state.chosen = True
    assert state.is_complete(RAM)
    assert not save(disk={2, 3}).is_complete("disk")


def test_what_other_nodes_may_still_send_to_a_store_is_no_remains() -> None:
    store = work.TierRef("store", "file:///store", label="store")
    config = TierConfig("store", "store", store.path, [{"last": 2}])
    tier = TierState("store", config, store)
    run = RunState("r", "r", work.TierRef("ram", "/ram"), {"store": tier})
    run.incarnations[1] = Incarnation(1, "r", 1, "id")
    for step in (1, 2, 3, 4):
        state = SaveState(SaveName(step, 1, "0" * 12), f"save {step}", world_size=2)
        state.ranks["store"] = {0} if step == 1 else {0, 1}
        state.verified.add("store")
        run.saves[str(state.name)] = state
    healer = Healer(Tools(None, Limits(), EventStream()))  # type: ignore[arg-type]  # no bytes move
    steps = [run.saves[name].name.step for name in healer.not_kept(run, tier)]
    assert steps == [1, 2]  # all ranks are here: nobody will bring the rest of step 1
    run.layout = layout(0, [0], [1])
    assert [run.saves[name].name.step for name in healer.not_kept(run, tier)] == [2]
    first = next(iter(run.saves.values()))
    first.ranks["store"] = set()  # its records were deleted
    assert [run.saves[name].name.step for name in healer.not_kept(run, tier)] == [1, 2]
    first.ranks["store"] = {0}
    run.incarnations[2] = Incarnation(1, "r", 2, "id", (1, 4))
    assert [run.saves[name].name.step for name in healer.not_kept(run, tier)] == [1, 2]
