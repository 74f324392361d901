"""How a template and a checkpoint differ, and the error that says all of it at once.

Knows paths and lines for people. Does not know trees or frameworks: whoever matches them fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mtckpt.errors import StateMismatch

__all__ = ["Diff"]

_MAX_LINES = 50


@dataclass(slots=True)
class Diff:
    """How a template and a checkpoint differ; every entry is one line for the user."""

    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def raise_any(self, step: int) -> None:
        """Raise StateMismatch with the whole difference, if there is one."""
        if not (self.missing or self.unused or self.differing):
            return
        lines = [f"  missing in the checkpoint: {p}" for p in self.missing[:_MAX_LINES]]
        lines += [f"  not in the template: {p}" for p in self.unused[:_MAX_LINES]]
        lines += [f"  differs: {p}" for p in self.differing[:_MAX_LINES]]
        total = len(self.missing) + len(self.unused) + len(self.differing)
        if total > len(lines):
            lines.append(f"  and {total - len(lines)} more, in the attributes of this error")
        error = StateMismatch(
            "template and checkpoint differ:\n" + "\n".join(lines) + "\n ",
            step=step,
            state="live state unchanged",
            actions=(
                "partial=True restores what both have",
                "rename=function maps or drops (None) paths of the checkpoint",
            ),
        )
        # Attributes only: as details they would be in the text, all 20,000 of them.
        error.__dict__.update(
            missing=tuple(self.missing),
            unused=tuple(self.unused),
            differing=tuple(self.differing),
        )
        raise error
