"""Checkpoints of other libraries in a directory, told by the names of their files.

Knows names that Orbax and torch.distributed write. Opens no file, so it may be wrong: it is said to
people who find nothing, and decides nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex

from mtckpt._patience import NoThread, in_time

__all__ = ["hints"]

# Name -> whose it is, and what reads it.
_MARKS = {
    "_METADATA": ("Orbax", "mtckpt import {path} LOCATION --run NAME"),
    ".metadata": ("torch.distributed", "mtckpt import {path} LOCATION --run NAME --unpickle"),
}
_DEPTH = 2  # a manager of Orbax has steps, and items in them
_MAX_ENTRIES = 64  # of each directory
_LOOK_TIMEOUT_S = 2.0


def hints(path: str | os.PathLike[str]) -> list[str]:
    """A line that says whose checkpoints are in a directory, and how to bring them into a run;
    nothing where there are none, or where that is not known in time."""
    found: list[str | None] = []
    with contextlib.suppress(NoThread):
        found = in_time(lambda: _mark_in(os.fspath(path), _DEPTH), _LOOK_TIMEOUT_S, name="mtckpt")
    lines = []
    for mark in found:
        if mark is not None:
            whose, command = _MARKS[mark]
            how = command.format(path=shlex.quote(os.fspath(path)))
            lines.append(f"{os.fspath(path)} has a checkpoint of {whose}, to be imported: {how}")
    return lines


def _mark_in(path: str, depth: int) -> str | None:
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError), os.scandir(path) as found:
        entries = list(itertools.islice(found, _MAX_ENTRIES))
    for entry in entries:
        if entry.name in _MARKS:
            return entry.name
    for entry in entries if depth else ():
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False) and (mark := _mark_in(entry.path, depth - 1)):
                return mark
    return None
