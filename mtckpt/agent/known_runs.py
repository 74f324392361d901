"""Which runs were opened on this node, and where their slower tiers are: for who asks by a name.

A run that was closed is in its slower tiers alone, and the agent has forgotten it, or is gone. What
is here is a hint, in a small file beside the agent's socket; nothing that is promised rests on it.
Does not know whether anything is left at those places.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mtckpt.agent.address import trusted_uids

if TYPE_CHECKING:
    from mtckpt.agent.protocol import TierConfig

__all__ = ["KnownRun", "KnownTier", "forget", "note", "read"]

FILE = "runs.json"
MAX_RUNS = 200
MAX_BYTES = 1024 * 1024


class KnownTier(msgspec.Struct, frozen=True):
    """A place: a directory or a URL. ``keep`` are the rules that it was opened with."""

    label: str
    path: str
    keep: list[dict[str, Any]] = []


class KnownRun(msgspec.Struct, frozen=True):
    run: str
    tiers: list[KnownTier] = []


def read(directory: str) -> list[KnownRun]:
    """The runs that were opened last, in order; none where nothing is known, or what is there was
    written by somebody whose agent would not be talked to."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path = os.path.join(directory, FILE)
        with open(os.open(path, flags), "rb") as file:
            info = os.fstat(file.fileno())
            is_safe = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o022
            if not is_safe or info.st_uid not in trusted_uids(path):
                return []
            return msgspec.json.decode(file.read(MAX_BYTES), type=list[KnownRun])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []  # a hint less


def note(directory: str, run: str, tiers: Sequence[TierConfig]) -> None:
    """A run was opened with these tiers. Those on other nodes are no place of this one."""
    here = [KnownTier(t.label, t.path, t.keep) for t in tiers if t.kind in ("disk", "store")]
    known = read(directory)
    found = KnownRun(run, here)
    if found not in known:
        others = [each for each in known if each.run != run]
        _write(directory, [*others[1 - MAX_RUNS :], found])


def forget(directory: str, run: str) -> None:
    """A run was removed, wherever it was."""
    known = read(directory)
    left = [each for each in known if each.run != run]
    if left != known:
        _write(directory, left)


def _write(directory: str, runs: list[KnownRun]) -> None:
    data = msgspec.json.encode(runs)
    temporary = os.path.join(directory, f"{FILE}.{os.getpid()}")
    if len(data) > MAX_BYTES:
        return
    with contextlib.suppress(OSError):  # a hint less
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, os.path.join(directory, FILE))
