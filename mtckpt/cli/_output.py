"""How the commands speak: tables for people, one JSON object for programs, errors without traces.

Knows terminals, widths and exit codes. Does not know checkpoints. Text from a checkpoint never
reaches a terminal as it is: control characters are escaped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from mtckpt.errors import CheckpointError, UsageError

__all__ = [
    "Reported",
    "confirmed",
    "json_option",
    "print_json",
    "print_line",
    "print_removed",
    "print_table",
    "printable",
    "reporting",
]

JSON_VERSION = 1
FINE, WRONG, MISUSED = 0, 1, 2
_INTERRUPTED = 130

Reported = Callable[..., int]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with a version, for programs."
)


def reporting(command: Reported) -> Callable[..., None]:
    """Turn what a command returns or raises into an exit code and one readable message."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            code = command(**options)
        except CheckpointError as error:
            code = MISUSED if isinstance(error, UsageError) else WRONG
            if options.get("as_json"):
                print_json({"error": as_object(error)})
            else:
                print_line(f"{type(error).__name__}: {error}", err=True)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        click.get_current_context().exit(code)

    return run


def as_object(error: CheckpointError) -> dict[str, Any]:
    """An error for programs."""
    return {
        "type": type(error).__name__,
        "what": error.what,
        "state": error.state,
        "actions": list(error.actions),
        "details": {name: _plain(value) for name, value in error.details.items()},
    }


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)


def print_json(body: Mapping[str, Any]) -> None:
    """One object on standard output; numbers that JSON lacks become null."""
    import msgspec

    data = msgspec.json.encode({"version": JSON_VERSION, **body})
    click.echo(msgspec.json.format(data, indent=2).decode())


def print_line(text: str = "", *, err: bool = False) -> None:
    """Text with newlines of ours; whatever the terminal cannot show is escaped."""
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = "\n".join(printable(line) for line in text.split("\n"))
    click.echo(lines.encode(encoding, "backslashreplace").decode(encoding), err=err)


def printable(text: object) -> str:
    """Text without anything that moves a cursor or changes a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def confirmed(lines: Sequence[str], *, as_json: bool) -> bool:
    """Whether somebody who reads these lines wants it. Raises UsageError where nobody is there."""
    if as_json or not sys.stdin.isatty():
        raise UsageError(
            "nobody is there to be asked", state="nothing was removed", actions=("add --yes",)
        )
    print_line("\n".join(lines))
    return click.confirm("really?", default=False)


def print_removed(run: str, removed: Sequence[str], kept: Sequence[str], *, as_json: bool) -> int:
    """What became of what was to be removed; the exit status for it."""
    if as_json:
        print_json({"run": run, "removed": removed, "kept": kept})
    else:
        for name in removed:
            print_line(f"removed {name}")
        for name in kept:
            print_line(f"kept {name}")
    return WRONG if kept else FINE


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], right: str = "") -> None:
    """Columns under ``head``, by rich on a terminal where it is installed.

    ``right`` has an "r" for each column whose numbers are to end at the same place.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and _print_rich(head, cells, right):
        return
    widths = [max([len(title), *(len(row[i]) for row in cells)]) for i, title in enumerate(head)]
    for row in [list(head), *cells]:
        columns = [
            cell.rjust(width) if right[i : i + 1] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print_line("  ".join(columns).rstrip())


def _print_rich(head: Sequence[str], cells: Sequence[Sequence[str]], right: str) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(head):
        table.add_column(
            title, justify="right" if right[i : i + 1] == "r" else "left", overflow="fold"
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are no markup
    Console().print(table)
    return True
