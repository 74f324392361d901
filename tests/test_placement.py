"""Placement held against brute force: every domain is lost, and what is left is counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtckpt._placement import (
    LEMON_FAILURES,
    Held,
    Placement,
    choose_layout,
    held_in,
    memory_bytes,
    place,
)
from mtckpt._survival import Node, ranges
from mtckpt.errors import PlacementImpossible, UsageError


def line_up(*domains: dict[str, str], ranks_per_node: int = 1) -> list[Node]:
    """Nodes n0, n1, ... in these domains, with the ranks in turn."""
    return [
        Node(f"n{i}", f"boot{i}", tuple(range(i * ranks_per_node, (i + 1) * ranks_per_node)), where)
        for i, where in enumerate(domains)
    ]


def own(nodes: Sequence[Node], size_bytes: int = 100) -> list[Held]:
    return [Held((rank,), size_bytes) for node in nodes for rank in node.ranks]


@st.composite
def clusters(draw: st.DrawFn, lemons: bool = False) -> list[Node]:
    """Nodes in racks in zones; some share a host, some have no label."""
    nodes = []
    for i in range(draw(st.integers(1, 9))):
        where = {"rack": draw(st.sampled_from("12")), "zone": draw(st.sampled_from("abc"))}
        if draw(st.integers(0, 19)) == 0:
            del where["rack"]
        boot = draw(st.sampled_from((f"boot{i}", "shared")))
        failures = draw(st.sampled_from((0, 1, LEMON_FAILURES))) if lemons else 0
        nodes.append(Node(f"n{i}", boot, (2 * i, 2 * i + 1), where, failures))
    return draw(st.permutations(nodes))


@st.composite
def held_by(draw: st.DrawFn, nodes: Sequence[Node]) -> list[Held]:
    ranks = [rank for node in nodes for rank in node.ranks]
    sharers = st.lists(st.sampled_from(ranks), min_size=1, unique=True).map(tuple)
    sizes = st.integers(0, 50)
    shared = draw(st.lists(st.builds(Held, sharers, sizes), max_size=4))
    return [*(Held((rank,), draw(sizes)) for rank in ranks), *shared]


scenes = clusters(lemons=True).flatmap(
    lambda nodes: st.tuples(st.just(nodes), held_by(nodes), st.integers(0, 3))
)


def names_with(placement: Placement) -> list[tuple[Held, set[str]]]:
    """All bytes and who has them, by names, as somebody would count them who knows the outcome."""
    return [
        (
            Held(part.ranks, part.size_bytes),
            {placement.nodes[seat].name for seat in part.captured}
            | {placement.nodes[target].name for _, target in part.pulls},
        )
        for part in placement.parts
    ]


def domains_of(nodes: Sequence[Node]) -> dict[str, dict[tuple[str, ...], set[str]]]:
    """Level -> domain -> names of its nodes, from the labels alone."""
    used = [kind for kind in ("rack", "zone") if all(kind in node.domains for node in nodes)]
    found: dict[str, dict[tuple[str, ...], set[str]]] = {}
    for node in nodes:
        path = [node.domains[kind] for kind in used]
        places = {"node": (node.name,), "host": (*path, node.boot_id)}
        places |= {kind: tuple(path[i:]) for i, kind in enumerate(used)}
        for level, domain in places.items():
            found.setdefault(level, {}).setdefault(domain, set()).add(node.name)
    if len(found["host"]) == len(nodes):
        del found["host"]
    return found


@given(scenes)
def test_the_report_is_what_is_really_lost(scene: tuple[list[Node], list[Held], int]) -> None:
    nodes, held, copies = scene
    placement = place(nodes, held, copies)
    bytes_of = names_with(placement)
    domains = domains_of(nodes)
    assert set(placement.survival.any) == set(domains)
    for level, members in domains.items():
        lost = [
            (sum(h.size_bytes for h, names in bytes_of if names <= gone), ranks)
            for gone in members.values()
            if (ranks := {r for h, names in bytes_of if names <= gone for r in h.ranks})
        ]
        said = [(loss.size_bytes, set(loss.ranks)) for loss in placement.survival.lost(level)]
        assert sorted(said, key=str) == sorted(lost, key=str)
        # So many domains of a level may be lost, whichever they are, and no more.
        number = placement.survival.any[level]
        for count, is_survived in ((number, True), (number + 1, False)):
            fates = [
                any(names <= set().union(*gone) for _, names in bytes_of)
                for gone in itertools.combinations(members.values(), count)
            ]
            assert any(fates) != is_survived


@given(scenes)
def test_every_byte_is_where_it_was_asked_for(scene: tuple[list[Node], list[Held], int]) -> None:
    nodes, held, copies = scene
    placement = place(nodes, held, copies)
    wanted = min(1 + copies, len(nodes))
    node_of = {rank: node.name for node in nodes for rank in node.ranks}
    assert sum(h.size_bytes for h in held) == sum(h.size_bytes for h, _ in names_with(placement))
    for ranks, _ in held:
        owners = {node_of[rank] for rank in ranks}
        part = next(
            part
            for part in placement.parts
            if {placement.nodes[seat].name for seat in part.captured} == owners
        )
        assert set(ranks) <= set(part.ranks)
        assert len(set(part.holders)) == len(part.holders) >= min(wanted, len(owners) + copies)
        assert len(part.pulls) <= copies
        if len(owners) == 1:
            assert len(part.holders) == wanted
        for source, _ in part.pulls:
            assert source in part.captured
    pulled = {node.name: placement.pulled_by(node.name) for node in nodes}
    assert placement.pulled_bytes() == {
        name: sum(size_bytes for _, _, size_bytes in pulls) for name, pulls in pulled.items()
    }


@given(scenes, st.randoms())
def test_the_order_of_the_nodes_decides_nothing(
    scene: tuple[list[Node], list[Held], int], random: object
) -> None:
    nodes, held, copies = scene
    other = place(sorted(nodes, key=lambda node: node.name), held[::-1], copies)
    assert place(nodes, held, copies) == other


@given(clusters(), st.integers(1, 3))
def test_the_ring_is_as_good_as_any_that_is_balanced(nodes: list[Node], copies: int) -> None:
    """All hold alike; and a domain is survived unless it has too many nodes for that."""
    placement = place(nodes, own(nodes), copies)
    fewer = min(copies, len(nodes) - 1)
    assert set(placement.pulled_bytes().values()) == {200 * fewer}
    most = len(nodes) - -(-len(nodes) // (1 + fewer))
    for level, members in domains_of(nodes).items():
        too_large = sum(len(names) > most for names in members.values())
        assert len(placement.survival.lost(level)) == too_large


@given(scenes)
def test_lemons_hold_copies_only_where_nobody_else_can(
    scene: tuple[list[Node], list[Held], int],
) -> None:
    nodes, held, copies = scene
    placement = place(nodes, held, copies)
    lemons = {node.name for node in nodes if node.failures >= LEMON_FAILURES}
    partners = {name for names in placement.partners.values() for name in names}
    if len(nodes) - len(lemons) > min(copies, len(nodes) - 1):
        assert not partners & lemons
    for name in lemons:
        assert any(note.startswith(f"{name} is avoided") for note in placement.notes)
    for _, names in names_with(placement):
        if copies and len(lemons) < len(nodes):
            assert names - lemons


@given(clusters(), st.integers(1, 2), st.data())
def test_a_replaced_node_moves_its_own_copies_and_no_others(
    nodes: list[Node], copies: int, data: st.DataObject
) -> None:
    first = place(nodes, own(nodes), copies)
    index = data.draw(st.integers(0, len(nodes) - 1))
    where = {"rack": data.draw(st.sampled_from("12")), "zone": data.draw(st.sampled_from("abc"))}
    lost = nodes[index]
    nodes[index] = replace(lost, name="new", boot_id="new", domains=where)
    second = place(nodes, own(nodes), copies, before=first.partners)
    fresh = place(nodes, own(nodes), copies)
    for level, number in fresh.survival.any.items():
        assert second.survival.any[level] >= number
    if second.partners == fresh.partners or first.survival.any != fresh.survival.any:
        return  # what could not be survived before can be now, or the other way round
    for ranks, partners in second.partners.items():
        old = first.partners[ranks]
        if ranks != lost.ranks:
            assert set(partners) - set(old) <= {"new"} | (
                {*partners} if lost.name in old else set()
            )


def test_the_same_node_under_another_name_takes_over_what_the_old_one_held() -> None:
    domains = [{"rack": f"r{i // 4}", "zone": f"z{i // 8}"} for i in range(16)]
    nodes = line_up(*domains)
    first = place(nodes, own(nodes), 2)
    nodes[5] = replace(nodes[5], name="new", boot_id="new")
    second = place(nodes, own(nodes), 2, before=first.partners)
    for ranks, names in first.partners.items():
        wanted = {"new" if name == "n5" else name for name in names}
        assert set(second.partners[ranks]) == wanted


def test_a_lemon_moves_its_copies_only() -> None:
    nodes = line_up(*({"rack": f"r{i // 4}"} for i in range(16)))
    first = place(nodes, own(nodes), 1)
    nodes[5] = replace(nodes[5], failures=LEMON_FAILURES)
    second = place(nodes, own(nodes), 1, before=first.partners)
    moved = [ranks for ranks in first.partners if first.partners[ranks] != second.partners[ranks]]
    assert [first.partners[ranks] for ranks in moved] == [("n5",)]
    assert second.survival.any == {"node": 1, "rack": 1}


# -- data parallel --------------------------------------------------------------------------------


def test_what_all_nodes_capture_is_never_copied() -> None:
    """Plain data parallel over 4 nodes: no byte travels, and three nodes may go."""
    nodes = line_up({}, {}, {}, {}, ranks_per_node=2)
    placement = place(nodes, [Held(tuple(range(8)), 1000)], 1)
    assert set(placement.pulled_bytes().values()) == {0}
    assert placement.survival.text == "survives any 3 nodes"


def test_replicas_in_one_rack_are_copied_to_another() -> None:
    """Each half of the model is on two nodes of one rack: that is one copy, and not enough."""
    nodes = line_up({"rack": "r0"}, {"rack": "r0"}, {"rack": "r1"}, {"rack": "r1"})
    held = [Held((0, 1), 500), Held((2, 3), 500)]
    placement = place(nodes, held, 1)
    assert placement.survival.any == {"node": 2, "rack": 1}
    assert sum(placement.pulled_bytes().values()) == 1000
    across = place(nodes, [Held((0, 2), 500), Held((1, 3), 500)], 1)
    assert sum(across.pulled_bytes().values()) == 0
    assert across.survival.text == "survives any 1 node and any 1 rack"


# -- words ----------------------------------------------------------------------------------------


def test_words_and_json_say_the_same() -> None:
    nodes = line_up(*({"rack": f"r{i}", "zone": "a"} for i in range(3)))
    placement = place(nodes, own(nodes), 1)
    text = "survives any 1 node and any 1 rack; does not survive zone a"
    assert placement.survival.text == text
    assert placement.as_json() == {
        "copies": 1,
        "text": text,
        "survives": {"node": 1, "rack": 1, "zone": 0},
        "losses": [{"level": "zone", "domain": "a", "ranks": "0-2", "size_bytes": 300}],
        "warnings": [
            "all nodes are in zone a: with it all copies of ranks 0-2 are lost (0.00 GiB)"
        ],
        "notes": [],
        "partners": {"0": ["n1"], "1": ["n2"], "2": ["n0"]},
        "pulled_bytes": {"n0": 100, "n1": 100, "n2": 100},
    }


@pytest.mark.parametrize(
    ("copies", "text"),
    [
        (0, "does not survive node n0, n1 or 3 more or rack r0"),
        (1, "survives any 1 node; does not survive rack r0"),
        (3, "survives any 3 nodes; does not survive rack r0"),
    ],
)
def test_a_sentence(copies: int, text: str) -> None:
    nodes = line_up(*({"rack": "r0"} for _ in range(5)))
    assert place(nodes, own(nodes), copies).survival.text == text


def test_two_nodes_on_one_host_are_one_loss() -> None:
    nodes = [replace(node, boot_id="same") for node in line_up({}, {})]
    placement = place(nodes, own(nodes), 1)
    assert placement.survival.text == "survives any 1 node; does not survive host n0"
    apart = [replace(node, domains={"host": node.name}) for node in nodes]
    assert place(apart, own(apart), 1).survival.text == "survives any 1 node"


def test_a_rack_of_one_zone_is_not_that_of_another() -> None:
    nodes = line_up(*({"rack": rack, "zone": zone} for zone in "ab" for rack in "12"))
    placement = place(nodes, own(nodes), 1)
    assert placement.survival.any == {"node": 1, "rack": 1, "zone": 1}
    assert place(nodes, own(nodes), 0).survival.lost("rack")[0].domain == "a/1"


def test_a_label_that_a_node_lacks_is_not_used() -> None:
    nodes = line_up({"rack": "r0"}, {}, {"rack": "r1"})
    placement = place(nodes, own(nodes), 1)
    assert placement.survival.any == {"node": 1}
    assert placement.notes == ("rack is not used: n1 has no label for it",)


@pytest.mark.parametrize(
    ("nodes", "copies", "warning"),
    [
        (line_up({}), 1, "copies=1 needs 2 nodes, and there is 1"),
        (line_up({}, {}), 2, "copies=2 needs 3 nodes, and there are 2"),
        (
            line_up({"rack": "r0"}, {"rack": "r0"}, {"rack": "r1"}),
            1,
            "2 of 3 nodes are in rack r0: with it all copies of ranks",
        ),
    ],
)
def test_what_cannot_be_had_is_warned_of_or_refused(
    nodes: list[Node], copies: int, warning: str
) -> None:
    assert warning in place(nodes, own(nodes), copies).warnings[0]
    with pytest.raises(PlacementImpossible, match="may be lost") as raised:
        place(nodes, own(nodes), copies, strict=True)
    assert warning in str(raised.value)
    assert place(nodes, own(nodes), 0, strict=True).warnings == ()


@pytest.mark.parametrize(
    ("nodes", "held", "copies", "message"),
    [
        (line_up({}), [], -1, "copies must be 0 to 8, not -1"),
        (line_up({}) * 2, [], 1, "two nodes are called n0"),
        (line_up({}), [Held((7, 8), 1)], 1, "ranks 7-8 are on no node"),
    ],
)
def test_what_makes_no_sense_is_refused(
    nodes: list[Node], held: list[Held], copies: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        place(nodes, held, copies)


@given(st.sets(st.integers(0, 30)))
def test_ranges_are_read_as_they_were_meant(numbers: set[int]) -> None:
    found: Counter[int] = Counter()
    for part in filter(None, ranges(numbers).split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    assert found == Counter(numbers)


def test_ten_thousand_ranks_are_placed_at_once() -> None:
    """1,250 nodes of 8 ranks; what is quadratic in them would meet the time limit of the tests."""
    domains = ({"rack": f"r{i // 16}", "zone": f"z{i // 320}"} for i in range(1250))
    nodes = line_up(*domains, ranks_per_node=8)
    held = own(nodes)
    first = place(nodes, held, 2)
    nodes[700] = replace(nodes[700], name="new", boot_id="new")
    second = place(nodes, held, 2, before=first.partners)
    assert first.survival.any == second.survival.any == {"node": 2, "rack": 2, "zone": 2}
    assert sum(first.partners[ranks] != second.partners[ranks] for ranks in first.partners) == 2


# -- memory ---------------------------------------------------------------------------------------


def test_memory_of_a_node_is_slots_and_twice_the_copies() -> None:
    nodes = line_up({}, {}, {})
    pulled = place(nodes, own(nodes), 2).pulled_bytes()["n0"]
    assert memory_bytes(100, 3, pulled) == (3 + 2 * 2) * 100


@given(
    st.integers(0, 100), st.integers(0, 100), st.integers(1, 6), st.integers(0, 3), st.integers(0)
)
def test_the_layout_is_the_first_that_fits(
    private: int, shared: int, num_nodes: int, copies: int, room: int
) -> None:
    layout = choose_layout(private, shared, num_nodes, copies=copies, slots=3, room_bytes=room)
    fewer = min(copies, num_nodes - 1)
    whole = (3 + 2 * fewer) * private + 3 * shared
    part_bytes = -(-shared // num_nodes)
    part = (3 + 2 * fewer) * private + 3 * (1 + fewer) * part_bytes
    if layout.name == "node":
        assert layout.needed_bytes == whole
        assert whole <= room or part >= whole or num_nodes % (1 + fewer)
    else:
        # Where nodes fall into groups of partners, those have captured the same, and copy nothing.
        more = layout.needed_bytes - part
        assert more == 0 if num_nodes % (1 + fewer) == 0 else more > 0
        assert whole > max(room, layout.needed_bytes)
    assert layout.fits == (layout.needed_bytes <= room)
    assert layout.reason


def test_data_parallel_on_four_nodes_takes_half_of_each() -> None:
    layout = choose_layout(0, 1 << 30, 4, copies=1, slots=2, room_bytes=1 << 30)
    assert (layout.name, layout.needed_bytes, layout.fits) == ("spread", 1 << 30, True)
    assert "what 4 nodes hold alike is captured by 2 of them" in layout.reason


@given(clusters(), st.integers(0, 3), st.integers(0, 100), st.sampled_from(("node", "spread")))
def test_a_layout_leaves_every_byte_on_enough_nodes(
    nodes: list[Node], copies: int, shared: int, layout: Literal["node", "spread"]
) -> None:
    """Of what all nodes capture nothing is copied; what is spread survives as a ring does."""
    held = held_in(layout, nodes, 0, shared, copies)
    assert sum(h.size_bytes for h in held) == shared
    fewer = min(copies, len(nodes) - 1)
    if layout == "node" or not shared:
        placement = place(nodes, held, 0)
        assert placement.survival.any.get("node", -1) == (len(nodes) - 1 if shared else -1)
    else:
        placement = place(nodes, held, copies)
        ring = place(nodes, own(nodes), copies)
        assert placement.survival.any["node"] >= fewer
        # More, where those that have captured a part anyway are all in one domain.
        assert all(placement.survival.any[at] >= n for at, n in ring.survival.any.items())
    with_own = place(nodes, held_in(layout, nodes, 7, shared, copies), copies)
    assert min(with_own.pulled_bytes().values()) >= 7 * fewer
