"""mtckpt estimate: the sum of a node's memory with copies, the layout, and what is survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mtckpt.cli import main
from mtckpt.cli._estimate import _parsed

GIB = 1 << 30


def estimate(*words: object) -> Result:
    result = CliRunner().invoke(main, ["estimate", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*words: object, code: int = 0) -> dict[str, Any]:
    result = estimate(*words, "--json")
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("words", "needed", "layout"),
    [
        (("10GiB",), 3 * 10, "node"),
        (("10g", "--slots", 2), 2 * 10, "node"),
        (("10GiB", "--nodes", 4, "--copies", 1), (3 + 2 * 1) * 10, "node"),
        (("10GiB", "--nodes", 4, "--copies", 2), (3 + 2 * 2) * 10, "node"),
        (("10GiB", "--nodes", 2, "--copies", 2), (3 + 2 * 1) * 10, "node"),
        (("0", "--shared", "20GiB", "--nodes", 4, "--copies", 1), 3 * 20, "node"),
        (("0", "--shared", "40GiB", "--nodes", 4, "--copies", 1), 3 * 20, "spread"),
        (("4GiB", "--shared", "40GiB", "--nodes", 4, "--copies", 1), 3 * 24 + 2 * 4, "spread"),
    ],
)
def test_slots_and_twice_the_copies(words: tuple[object, ...], needed: int, layout: str) -> None:
    found = as_json(*words, "--room", "100GiB")
    assert (found["needed_bytes"], found["layout"], found["fits"]) == (needed * GIB, layout, True)


def test_a_page_for_people(tmp_path: Path) -> None:
    domains = tmp_path / "domains"
    domains.write_text("".join(f"rack=r{i // 2},zone=a\n" for i in range(8)))
    words = ("1.5TiB", "--copies", 1, "--domains", domains, "--room", "7TiB")
    result = estimate(*words)
    assert result.exit_code == 1
    for text in (
        "memory of a node  7.5 TiB of 7.0 TiB: 512.0 GiB short",
        "layout            node: each node captures all that its ranks need",
        "survives any 1 node and any 1 rack; does not survive zone a",
        "warning: all nodes are in zone a: with it all copies of ranks 0-7 are lost",
    ):
        assert text in result.output
    assert as_json(*words, "--strict", code=2)["error"]["type"] == "PlacementImpossible"


def test_the_room_of_this_node_is_looked_up(ram_dir: Path) -> None:
    assert as_json("1")["room_bytes"] > 0
    assert as_json("900TiB", code=1)["fits"] is False


@pytest.mark.parametrize(
    "words",
    [
        ("much",),
        ("1e9",),
        ("-1GiB",),
        ("1GiB", "--room", "x"),
        ("1GiB", "--nodes", 0),
        ("1GiB", "--nodes", 1_000_000),
        ("1GiB", "--slots", 1),
        ("1GiB", "--copies", 9),
        ("1GiB", "--domains", "/nowhere/at/all"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[object, ...]) -> None:
    assert estimate(*words).exit_code == 2


def test_a_line_that_names_no_domain_is_named(tmp_path: Path) -> None:
    domains = tmp_path / "domains"
    domains.write_text("rack=r0\nrack\n")
    assert "node 1 does not say" in estimate("1", "--domains", domains).output


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("80GB", 80 * 10**9), ("80GiB", 80 << 30), ("80G", 80 << 30), ("7", 7)]
)
def test_units_are_decimal_where_they_say_so(text: str, size_bytes: int) -> None:
    assert _parsed(text, "SIZE") == size_bytes


def test_a_node_is_named_once() -> None:
    assert "does not survive node-0" in estimate("1GiB", "--copies", 0).output
