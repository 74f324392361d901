"""What a planted bug is; see ``planted_bugs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent


class Edit(Protocol):
    """One text of one file of the package, and what stands there instead."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def replacement(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Bug:
    """One edit. ``quick``: nothing has to hang for it to be caught."""

    name: str
    file: str
    text: str
    replacement: str
    caught_by: tuple[str, ...]
    quick: bool = True


def edited(bug: Edit) -> str:
    """The file with the bug in it. Fails where the text to replace is not there just once."""
    source = (ROOT / "mtckpt" / bug.file).read_text()
    count = source.count(bug.text) if bug.text else 0
    assert count == 1, f"{bug.name}: its text is {count} times in {bug.file}, not once: renew it"
    with_bug = source.replace(bug.text, bug.replacement)
    compile(with_bug, bug.file, "exec")
    return with_bug
