"""What a planted bug is; see ``planted_bugs``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bug:
    """One edit. ``quick``: nothing has to hang for it to be caught."""

    name: str
    file: str
    text: str
    replacement: str
    caught_by: tuple[str, ...]
    quick: bool = True
