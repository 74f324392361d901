"""Whether the places of a run's tiers can be used as they are: asked when it is opened.

Refuses what no tier would ever be written to; what may be away for now is left to the agent, which
tries again. Looks at each place in bounded time, leaves nothing behind, and reads no record.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mtckpt._manifest import run_key
from mtckpt._media import Medium, medium_of
from mtckpt._patience import NoThread, in_time
from mtckpt.agent import address, known_runs
from mtckpt.errors import AccessDenied, TierError, UsageError
from mtckpt.tiers._rooted import Root, temporary_name

__all__ = ["check_places"]

_LOOK, _LOOK_TIMEOUT_S = "mtckpt-look", 2.0
# What mkdir says of a place where it will not say anything else the next time.
_NEVER = {
    errno.ENOENT,  # a file system that makes no directories, such as /proc
    errno.ENOTDIR,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EOPNOTSUPP,
}


class _Seen(NamedTuple):
    """One look at a place: its path without links; why it is not to be used; what it lies on;
    whether the run has been there."""

    real: str
    refusal: AccessDenied | None = None
    medium: Medium | None = None
    has_run: bool = False


def check_places(run: str, paths: Mapping[str, str]) -> dict[str, Medium]:
    """Refuse tiers of a run, label to path, that could not be used as they are: UsageError,
    AccessDenied. What the Disk tiers lie on, where that can be known."""
    agent = address.find()
    seen = {label: _seen(label, path, run, agent.service) for label, path in paths.items()}
    _refuse_one_directory(seen)
    for each in seen.values():
        if each.refusal is not None:
            raise each.refusal
    # What a service can make, this process may not; and what is far from here may know the run.
    known = agent.service or any(label.startswith(("store", "peers")) for label in paths)
    known = known or any(each.has_run for each in seen.values())
    if not known and not any(each.run == run for each in known_runs.read(agent.directory)):
        _refuse_unmade(paths)
    return {label: each.medium for label, each in seen.items() if each.medium is not None}


def _seen(label: str, path: str, run: str, group_access: bool) -> _Seen:
    """As far as a device answers in time, and somebody can be sent to look: the path as it is, or
    without links, or all. ``group_access``: a service writes there, which lets its group in."""
    path = path.removeprefix("file://")
    seen = _Seen(os.path.abspath(path))

    def look() -> None:
        nonlocal seen
        seen = _Seen(
            os.path.realpath(path), has_run=os.path.isdir(os.path.join(path, run_key(run)))
        )
        if label.startswith("disk"):
            refusal = _refusal(label, path, group_access)
            seen = _Seen(seen.real, refusal, medium_of(Path(path)), seen.has_run)

    with contextlib.suppress(NoThread):
        in_time(look, _LOOK_TIMEOUT_S, name=_LOOK)
    return seen


def _refuse_one_directory(seen: Mapping[str, _Seen]) -> None:
    """Raise UsageError if two tiers are the same directory by whatever name.

    A second copy in the place of the first is none, and what memory recycles is no disk's to keep.
    """
    labels: dict[str, str] = {}
    for label, each in seen.items():
        if labels.setdefault(each.real, label) != label:
            raise UsageError(
                f"the tiers {labels[each.real]} and {label} are one directory: {each.real}",
                state="nothing was done",
                actions=("give each tier a directory of its own, on devices that fail apart",),
                path=each.real,
            )


def _refuse_unmade(paths: Mapping[str, str]) -> None:
    """Raise UsageError for a directory that cannot be made. For a run that is new: a disk that it
    has had may come back, and training goes on without it."""
    for label, path in paths.items():
        for unmade in _tried(path) if label.startswith("disk") else ():
            raise UsageError(
                f"{label}: the directory {path} cannot be made: {unmade.strerror}",
                state="nothing was done",
                actions=(
                    "give the tier a directory in one that you may write to",
                    "if it is on a disk that is not mounted: mount that",
                ),
                path=path,
                os_error=errno.errorcode.get(unmade.errno or 0),
            ) from unmade


def _tried(path: str) -> list[OSError]:
    """See ``_unmade``, alone in a list; nothing where the device does not answer in time."""
    with contextlib.suppress(NoThread):
        found = in_time(functools.partial(_unmade, path), _LOOK_TIMEOUT_S, name=_LOOK)
        return [error for error in found if error is not None]
    return []


def _refusal(label: str, path: str, group_access: bool) -> AccessDenied | None:
    """Why a directory that is there is none that a tier would ever be written to: everybody can
    change what is in it, or it is somebody else's."""
    try:
        root = Root(Path(path), tier=label, sync=False, group_access=group_access, read_only=True)
        with contextlib.closing(root):
            root.check_writable()
    except AccessDenied as refused:
        alone = "to restore from it, and save elsewhere: restore(source=...), or mtckpt.load"
        refused.actions = (*refused.actions, alone)
        return refused
    except TierError:
        return None  # not there yet, say; who writes to it is told
    return None


def _unmade(path: str) -> OSError | None:
    """Why no directory can be made at ``path``, now or later; tried with another one beside it."""
    if os.path.lexists(path):
        return None
    above = os.path.dirname(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    trial = os.path.join(above, temporary_name())
    try:
        os.mkdir(trial, 0o700)
        os.rmdir(trial)
    except OSError as error:
        # Somebody may have taken away what it was to be in.
        return error if error.errno in _NEVER and os.path.lexists(above) else None
    return None
