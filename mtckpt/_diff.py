"""How a template and a checkpoint differ, and the error that says all of it at once.

Knows paths, specs and lines for people. Does not know trees or frameworks: whoever matches them
fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt._dtypes import DTYPES
from mtckpt.errors import StateMismatch

if TYPE_CHECKING:
    from mtckpt._state import ArraySpec

__all__ = ["Diff", "described", "difference", "is_number", "is_same"]

_MAX_LINES = 50
_OF_NAMES = (
    "what is new or gone: partial=True takes what both have, and leaves the rest as it is",
    "what was renamed: rename=function gives each path of the checkpoint its new one",
)
_OF_SHAPES = (
    "what has another shape or type: drop it, by partial=True and a rename=function that gives None"
    " for its path, or leave its top-level key out of the template",
)
_CAST = "cast"
# One number each; of a packed pair nobody but torch makes two.
_FLOATS = frozenset(
    name for name in DTYPES if name.startswith(("float", "bfloat")) and not name.endswith("_x2")
)
# What the names of element types begin with that hold such numbers.
_NUMBERS: dict[type, tuple[str, ...]] = {
    bool: ("bool",),
    int: ("int", "uint"),
    float: ("float", "bfloat"),
}


@dataclass(slots=True)
class Diff:
    """How a template and a checkpoint differ; every entry is one line for the user."""

    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def raise_any(self, step: int) -> None:
        """Raise StateMismatch with the whole difference, if there is one."""
        found = (self.missing, self.unused, self.differing)
        # Several ways into one object may have found the same.
        missing, unused, differing = (tuple(dict.fromkeys(each)) for each in found)
        total = len(missing) + len(unused) + len(differing)
        if not total:
            return
        lines = [f"  missing in the checkpoint: {p}" for p in missing[:_MAX_LINES]]
        lines += [f"  not in the template: {p}" for p in unused[:_MAX_LINES]]
        lines += [f"  differs: {p}" for p in differing[:_MAX_LINES]]
        if total > len(lines):
            lines.append(f"  and {total - len(lines)} more, in the attributes of this error")
        error = StateMismatch(
            "template and checkpoint differ:\n" + "\n".join(lines) + "\n ",
            step=step,
            state="live state unchanged",
            actions=(
                *(_OF_NAMES if missing or unused else ()),
                *(_OF_SHAPES if differing else ()),
                "what is another model: give this run another name",
            ),
        )
        # Attributes only: as details they would be in the text, all 20,000 of them.
        error.__dict__.update(
            missing=missing,
            unused=unused,
            differing=differing,
        )
        raise error


def is_same(stored: ArraySpec, wanted: ArraySpec) -> bool:
    """True if a saved array can stand where one of a template does."""
    if stored.whole_shape != wanted.whole_shape:
        return False
    first, _, kind = stored.framework.partition(".")
    second, _, other_kind = wanted.framework.partition(".")
    if other_kind == _CAST:
        return stored.dtype in _FLOATS
    if stored.is_scalar and wanted.is_scalar:
        return True  # as with plain numbers, of which any takes the place of any
    # Two kinds of one framework: the keys of two random number generators.
    differ = first == second and bool(kind) and bool(other_kind) and kind != other_kind
    return stored.dtype == wanted.dtype and not differ


def is_number(stored: ArraySpec, kind: type, *, exactly: bool) -> bool:
    """True if a saved array is one number, and can stand where a plain one of type ``kind`` does.

    Any number can, as with plain ones; ``exactly``: only one of that type.
    """
    if kind not in _NUMBERS or stored.whole_shape:
        return False
    return not exactly or stored.dtype.startswith(_NUMBERS[kind])


def difference(stored: ArraySpec, wanted: ArraySpec, misfit: str) -> str:
    """Why a saved array cannot stand where one of a template does; empty if it can.

    ``misfit`` is why none can, whatever was saved.
    """
    if is_same(stored, wanted):
        return misfit
    types = f"{described(wanted)} here, {described(stored)} in the checkpoint"
    return f"{types}; {misfit}" if misfit else types


def described(spec: ArraySpec) -> str:
    """Type, shape and kind, for people."""
    kind = spec.framework.partition(".")[2]
    return f"{spec.dtype}{list(spec.whole_shape)}{f' ({kind})' if kind else ''}"
