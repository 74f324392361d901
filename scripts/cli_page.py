"""Write the reference part of docs/cli.md from the help texts of the commands themselves.

Run it after changing a command, an option or its help; tests/test_reference.py fails until then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
MARK = "<!-- From here on written by scripts/cli_page.py. -->\n"


def commands(group: Any, context: click.Context) -> Iterator[tuple[str, Any]]:
    """Every command below a group, in the group's order, with its full name."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        full_name = f"{context.info_name} {name}"
        if hasattr(command, "list_commands"):
            yield from commands(command, click.Context(command, info_name=full_name))
        else:
            yield full_name, command


def section(name: str, command: Any) -> str:
    """Usage, help text and a table of options of one command."""
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"## {name}", "", "```", usage, "```", ""]
    lines += [inspect.cleandoc(command.help or "").replace("\b\n", ""), ""]
    rows = [
        " | ".join(cell.replace("|", "/") for cell in record)
        for parameter in command.params
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context))
    ]
    if rows:
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{row.replace(' | ', '` | ', 1)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def reference() -> str:
    from mtckpt.cli import main as mtckpt_command

    context = click.Context(mtckpt_command, info_name="mtckpt")
    return "\n".join(section(*item) for item in commands(mtckpt_command, context))


def main() -> None:
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{head}{MARK}\n{reference()}", encoding="utf-8")


if __name__ == "__main__":
    main()
