"""``mtckpt estimate``: what a job's saves will take of each node, and what they will survive.

Sums and placement only: nothing is looked at but the size of this node's RAM tier, where no other
room is given.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, reporting
from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from mtckpt._placement import Layout, Placement
    from mtckpt._survival import Node

__all__ = ["estimate"]

MAX_NODES = 100_000
MAX_FILE_BYTES = 16 << 20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", re.IGNORECASE)


@click.command(short_help="Say what saves will take of each node, and what they survive.")
@click.argument("size")
@click.option("--shared", default="0", help="What all nodes hold alike, as under DDP. Default: 0.")
@click.option("--nodes", "num_nodes", default=1, show_default=True, help="How many nodes.")
@click.option("--copies", default=0, show_default=True, help="Copies on other nodes.")
@click.option("--slots", default=3, show_default=True, help="Saves in memory at once.")
@click.option("--room", help="Memory of a node for all this. Default: of this node's RAM tier.")
@click.option(
    "--domains",
    "domains_path",
    type=click.Path(dir_okay=False),
    help="A file with a line for each node, such as rack=r1,zone=a; instead of --nodes.",
)
@click.option("--strict", is_flag=True, help="Copies that cannot be placed well are an error.")
@json_option
@reporting
def estimate(
    size: str,
    shared: str,
    num_nodes: int,
    copies: int,
    slots: int,
    room: str | None,
    domains_path: str | None,
    strict: bool,
    as_json: bool,
) -> int:
    """Say what memory saves take of each node, and which losses they survive.

    SIZE is what the ranks of one node hold of their own: parameters and optimizer state of their
    shards, such as 80GiB or 80GB; 0 where all is shared. Exit status 1 if memory does not hold it.
    """
    from mtckpt._placement import choose_layout, held_in, place

    if not 2 <= slots <= 64:
        raise UsageError(f"--slots must be 2 to 64, not {slots}", state="nothing was estimated")
    private_bytes, shared_bytes = _parsed(size, "SIZE"), _parsed(shared, "--shared")
    room_bytes = _parsed(room, "--room") if room is not None else _room_here()
    nodes = _nodes(num_nodes, domains_path)
    layout = choose_layout(
        private_bytes,
        shared_bytes,
        len(nodes),
        copies=copies,
        slots=slots,
        room_bytes=room_bytes,
    )
    held = held_in(layout.name, nodes, private_bytes, shared_bytes, copies)
    placement = place(nodes, held, copies, strict=strict)
    if as_json:
        print_json(_as_object(layout, placement, room_bytes, slots))
    else:
        _print(layout, placement, room_bytes, private_bytes + shared_bytes)
    return _output.FINE if layout.fits else _output.WRONG


def _parsed(text: str, what: str) -> int:
    """A size such as 80GiB, 512M or 1.5T, in bytes. Units are binary but for KB, MB, GB and TB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > 40:
        raise UsageError(
            f"{what} is no size: {text!r}",
            state="nothing was estimated",
            actions=("write a number and a unit: 80GiB, 512MiB, 1.5TiB",),
        )
    number, unit, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** " KMGT".index(unit.upper() or " "))


def _room_here() -> int:
    from mtckpt import _probe
    from mtckpt.agent.protocol import ram_base

    path = os.environ.get("MTCKPT_RAM_DIR") or os.path.dirname(ram_base())
    return _probe.free_and_total_bytes(path)[1]


def _nodes(num_nodes: int, path: str | None) -> list[Node]:
    from mtckpt._domains import parse_domains
    from mtckpt._survival import Node

    lines = [""] * min(num_nodes, MAX_NODES + 1)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read(MAX_FILE_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path} cannot be read: {error}", state="nothing was estimated", path=path
            ) from error
        lines = [line for line in lines if line.strip()]
    if not 1 <= len(lines) <= MAX_NODES:
        raise UsageError(f"there must be 1 to {MAX_NODES} nodes", state="nothing was estimated")
    return [
        Node(f"node-{i}", f"node-{i}", (i,), parse_domains(line, f"{path}, node {i}"))
        for i, line in enumerate(lines)
    ]


def _as_object(layout: Layout, placement: Placement, room_bytes: int, slots: int) -> dict[str, Any]:
    report = placement.as_json()
    del report["partners"], report["pulled_bytes"]  # names of nodes that are none
    return {
        "layout": layout.name,
        "needed_bytes": layout.needed_bytes,
        "room_bytes": room_bytes,
        "fits": layout.fits,
        "reason": layout.reason,
        "slots": slots,
        "num_nodes": len(placement.nodes),
        **report,
    }


def _print(layout: Layout, placement: Placement, room_bytes: int, node_bytes: int) -> None:
    from mtckpt._handle import size_text

    fits = "fits" if layout.fits else f"{size_text(layout.needed_bytes - room_bytes)} short"
    rows = [
        (
            "memory of a node",
            f"{size_text(layout.needed_bytes)} of {size_text(room_bytes)}: {fits}",
        ),
        ("layout", f"{layout.name}: {layout.reason}"),
        ("of one save", f"{size_text(node_bytes)} on the ranks of a node"),
        ("a save", placement.survival.text),
    ]
    for name, value in rows:
        print_line(f"{name:<17} {value}")
    for line in (*placement.warnings, *placement.notes):
        print_line(f"warning: {line}" if line in placement.warnings else line, err=True)
