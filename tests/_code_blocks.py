"""The code blocks of a Markdown page, and what they say about being run.

Behind the language of a block may stand

- ``no-run: REASON``: it is shown only;
- ``continues``: it runs behind the block before it (and what that one continues);
- ``raises: ClassName``: it ends with that error.

A comment that begins with ``<!-- setup`` and ends with ``-->`` on a line of its own holds code for
the next block that the page does not show.
Blocks inside a list or a tab are found too.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>\w*)(?P<words>.*)$")
_DIRECTIVE = re.compile(r"\b(?P<name>no-run|continues|raises)\b(?:: *(?P<value>.+))?")
_SETUP = re.compile(r"<!-- *setup\b")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; ``code`` has the lines of its setup and of what it continues before it."""

    line: int
    language: str
    code: str
    no_run: str | None
    raises: str | None


def blocks(text: str) -> Iterator[Block]:
    """Yield the blocks of a page from top to bottom.

    Raises:
        ValueError: a block is not closed, continues nothing, or is not run without a reason.
    """
    lines = iter(enumerate(text.splitlines(), 1))
    setup = previous = ""
    for number, line in lines:
        if _SETUP.match(line.strip()):
            setup = _until(lines, number, "-->")
            continue
        opening = _FENCE.match(line)
        if not opening:
            continue
        body = _until(lines, number, opening["fence"])
        said = _directives(number, opening["words"])
        code = setup + textwrap.dedent(body)
        if "continues" in said:
            if not previous:
                raise ValueError(f"line {number}: there is no block that this one could continue")
            code = previous + code
        setup = ""
        if opening["language"] == "python" and "no-run" not in said:
            previous = code
        yield Block(number, opening["language"], code, said.get("no-run"), said.get("raises"))


def _until(lines: Iterator[tuple[int, str]], start: int, end: str) -> str:
    body: list[str] = []
    for _, line in lines:
        if line.strip() == end:
            return "".join(f"{line}\n" for line in body)
        body.append(line)
    raise ValueError(f"line {start}: what begins here is not closed")


def _directives(number: int, words: str) -> dict[str, str]:
    found = _DIRECTIVE.search(words)
    if not found:
        return {}
    name, value = found["name"], (found["value"] or "").strip()
    if name != "continues" and not value:
        raise ValueError(f"line {number}: {name} has to say why, or which: '{name}: ...'")
    return {name: value}
