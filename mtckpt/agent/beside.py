"""Directories of slots on a disk, beside the runs of a tier: each agent has one of its own there.

Containers with little memory may share a disk, and so may hosts. Knows what these directories are
called, which of them are nobody's any more, and how what is left of a run there is taken over, or
deleted where its user says so. Does not read what lies in them. All calls block.

One is nobody's if its lock can be had and locks on that disk tell of every process that could have
it: its agent ran under this kernel, which its name says, or the disk is of a kind that one machine
alone has mounted. Of any other, as on NFS after its host is gone, nobody can tell from here: it is
left alone, and said. Only what is left of the very run that is opened is taken over: where the
slower tiers of another one are, as seen from here, only its own job can say.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from typing import Literal

from mtckpt import _probe
from mtckpt._manifest import SaveName, is_record_file
from mtckpt._slots import BESIDE, Slots
from mtckpt._taken import waiting_name
from mtckpt.agent.holding import LOCK, NOTE, Lock, lock
from mtckpt.agent.places import close_place, open_place
from mtckpt.agent.run_config import TierRef
from mtckpt.errors import CheckpointError, TierUnavailable

__all__ = [
    "Left",
    "Taken",
    "delete",
    "has_left",
    "is_asked",
    "is_one",
    "left",
    "make",
    "prune",
    "remove",
    "take_over",
    "tidy",
]

_NAME = re.compile(r"([0-9a-f-]{36}|unknown)\.[0-9a-f]{16}")
# File systems that no two machines have mounted at once: a lock that can be had there is free.
_OF_ONE_MACHINE = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
)


@dataclass(slots=True)
class Taken:
    """What became of a look: ``here`` if the run is in the directory now, ``brought`` if some of it
    has come by this look; ``living`` are directories of agents that live and have some of it,
    ``left`` those whose agent may live; ``refused`` are those of dead ones that it could not be
    brought from, and why."""

    here: bool = False
    brought: bool = False
    living: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Left:
    """A run in the directory of one agent. ``agent``: what can be told of it from here."""

    root: str
    run_key: str
    size_bytes: int
    agent: Literal["lives", "gone", "unknown"]


def is_asked(path: str) -> bool:
    """Whether this is where agents have their directories, on some disk."""
    return os.path.basename(path) == BESIDE


def is_one(root: str) -> bool:
    """Whether this is the directory of one agent beside a disk."""
    parent, name = os.path.split(root)
    return is_asked(parent) and bool(_NAME.fullmatch(name))


def make(place: str, boot_id: str) -> str:
    """A new directory for one agent of this boot of this machine. OSError."""
    os.makedirs(place, mode=0o700, exist_ok=True)
    root = os.path.join(place, f"{boot_id or 'unknown'}.{os.urandom(8).hex()}")
    os.mkdir(root, 0o700)
    return root


def has_left(place: str, run_key: str) -> bool:
    """Whether any directory there has something of a run."""
    return any(os.path.isdir(os.path.join(root, run_key)) for root in _all(place))


def left(place: str, boot_id: str) -> list[Left]:
    """Every run in the directories there, by directory. What cannot be read is left out."""
    found = []
    for root in _all(place):
        with contextlib.suppress(OSError):
            with os.scandir(root) as entries:
                keys = sorted(one.name for one in entries if one.is_dir(follow_symlinks=False))
            agent = _agent_of(root, boot_id) if keys else "lives"
            sizes = [_size_bytes(os.path.join(root, key)) for key in keys]
            found += [Left(root, *one, agent) for one in zip(keys, sizes, strict=True)]
    return found


def delete(place: str, run_key: str, boot_id: str) -> tuple[list[Left], list[Left]]:
    """Delete what agents that are gone have left of a run: what was deleted, and what was kept.
    All is kept while an agent lives that has the run: it may be going to take over the rest.
    Raises TierError."""
    there = [one for one in left(place, boot_id) if one.run_key == run_key]
    if any(one.agent == "lives" for one in there):
        return [], there
    deleted, kept = [], [one for one in there if one.agent == "unknown"]
    for one in there:
        if one in kept:
            continue
        held = _try(one.root)
        if held is None:  # who has it now goes on with the run, or tidies up
            kept.append(one)
            continue
        try:
            opened, files = open_place(TierRef("ram", one.root, label="ram"))
            try:
                assert files is not None  # of a directory
                files.wipe(run_key)
            finally:
                close_place(opened, files)
            remove(one.root, held)
            deleted.append(one)
        finally:
            held.close()
    return deleted, kept


def take_over(place: str, run_key: str, own: str, boot_id: str) -> Taken:
    """Bring what is left of a run into ``own``, from all directories that are nobody's any more.
    The run goes on as the one that has the newest save; what the others have of it becomes a part
    of that when it is looked at next."""
    taken = Taken(os.path.isdir(os.path.join(own, run_key)))
    for root in sorted(_all(place), key=lambda root: _newest(root, run_key), reverse=True):
        if root == own:
            continue
        if (held := _try(root)) is None:
            taken.living += [root] if os.path.isdir(os.path.join(root, run_key)) else []
            continue
        try:
            has_it = os.path.isdir(os.path.join(root, run_key))
            if not _is_dead(root, boot_id):
                taken.left += [root] if has_it else []
                continue
            if has_it:
                _bring(root, run_key, own)
                taken.here = taken.brought = True
            remove(root, held)
        except (CheckpointError, OSError) as error:
            what = error.what if isinstance(error, CheckpointError) else error.strerror
            taken.refused[root] = str(what)
        finally:
            held.close()
    return taken


def _bring(root: str, run_key: str, own: str) -> None:
    target = os.path.join(own, run_key)
    if os.path.isdir(target):
        opened, files = open_place(TierRef("ram", root, label="ram"))
        try:
            assert files is not None  # of a directory
            # What is half done there can be told from what is half moved only there.
            Slots(opened.local, files).scan(run_key, repair=True)
        finally:
            close_place(opened, files)
        target = os.path.join(target, waiting_name())
    os.rename(os.path.join(root, run_key), target)


def tidy(place: str, own: str, boot_id: str) -> None:
    """Remove the directories of others that are nobody's any more and have nothing."""
    for root in _all(place):
        if root != own and (held := _try(root)) is not None:
            try:
                if _is_dead(root, boot_id):
                    remove(root, held)
            finally:
                held.close()


def remove(root: str, held: Lock) -> None:
    """Remove a directory, if no run has anything in it; and the last one's place. Its lock may end
    by that."""
    prune(root)
    with contextlib.suppress(OSError):
        names = set(os.listdir(root))
        if names <= {NOTE, LOCK}:
            for name in names:
                os.unlink(os.path.join(root, name))
            try:
                os.rmdir(root)
            except OSError:
                if LOCK not in names:
                    raise
                # NFS has a file under another name while it is open. Who locks a directory by one
                # makes it first: what somebody has meanwhile is not empty.
                held.close()
                os.rmdir(root)
            os.rmdir(os.path.dirname(root))


def prune(root: str) -> None:
    """Remove directories of runs that have nothing in them: what was deleted there, somebody still
    had open."""
    for path, _, _ in os.walk(root, topdown=False):
        if path != root:
            with contextlib.suppress(OSError):  # refused while there is anything
                os.rmdir(path)


def _try(root: str) -> Lock | None:
    """The lock, where it can be had and says something."""
    with contextlib.suppress(OSError, TierUnavailable):
        return lock(root)
    return None


def _all(place: str) -> list[str]:
    """The directories of all agents there; what somebody else could have put there is none."""
    roots = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if _is_ours(place):
            roots = sorted(os.path.join(place, name) for name in os.listdir(place))
    return [root for root in roots if is_one(root) and _is_ours(root)]


def _agent_of(root: str, boot_id: str) -> Literal["lives", "gone", "unknown"]:
    held = _try(root)
    if held is None:
        return "lives"
    try:
        return "gone" if _is_dead(root, boot_id) else "unknown"
    finally:
        held.close()


def _size_bytes(directory: str) -> int:
    """What the files below take of the disk, as far as it can be read."""
    total_bytes = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total_bytes += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total_bytes


def _newest(root: str, run_key: str) -> tuple[int, int]:
    """Incarnation and step of the newest save of a run there that has a record: any other was cut
    off, or is just being given up."""
    run = os.path.join(root, run_key)
    names = filter(None, map(SaveName.parse, _names(run)))
    sealed = (n for n in names if any(map(is_record_file, _names(os.path.join(run, str(n))))))
    return max(((name.incarnation, name.step) for name in sealed), default=(0, 0))


def _names(path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(path)
    return []


def _is_ours(path: str) -> bool:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False  # another agent has tidied up meanwhile
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def _is_dead(root: str, boot_id: str) -> bool:
    """Whether nobody can have a directory whose lock is ours."""
    started_in = os.path.basename(root).partition(".")[0]
    if boot_id and started_in == boot_id:
        return True
    mount = _probe.mount_at(root)
    return mount is not None and mount.kind in _OF_ONE_MACHINE
