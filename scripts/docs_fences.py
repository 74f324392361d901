"""A Markdown extension: words behind the language of a code block are for the tests.

The blocks of the documentation are run by ``tests/test_docs.py``. One that is not run, or not on
its own, says so behind its language: ``python no-run: needs a GPU``. GitHub shows such a block as
any other, but the Markdown parser of the documentation takes it for text. So these words are
removed before that parser sees them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

if TYPE_CHECKING:
    from markdown import Markdown

_FENCE = re.compile(r"^(\s*(?:`{3,}|~{3,})\w+) +(?:no-run|continues|raises)\b.*$")


class _Fences(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [_FENCE.sub(r"\1", line) for line in lines]


class FencesExtension(Extension):
    """Removes what the tests read from the first line of every code block."""

    def extendMarkdown(self, md: Markdown) -> None:  # the name is Python-Markdown's
        # Above 25, at which fenced blocks are taken out of the text.
        md.preprocessors.register(_Fences(md), "docs_fences", 100)


def makeExtension(**options: object) -> FencesExtension:  # the name is Python-Markdown's
    """Return the extension; Python-Markdown calls this."""
    return FencesExtension(**options)
