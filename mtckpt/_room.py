"""Whether memory for a RAM slot is there, and what to say when it is not.

It knows free space, available memory and the cgroup's limit, all as they are now: somebody else
may take the room a moment later, so reserving can still fail, and then has the same words. It does
not know what a slot is for.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mtckpt._probe import tier_label
from mtckpt.errors import TierFull

__all__ = [
    "bytes_below",
    "check_room",
    "left_bytes_at",
    "memory_left_bytes",
    "ram_full",
    "ranks_full",
]

GIB, MIB = 1 << 30, 1 << 20
_CGROUPS = Path("/sys/fs/cgroup")
# A slot is data and a table, then a record and the directory of the save.
_SLOT_FILES = 4
# Limit, usage, and the cache in it that the kernel takes back: of version 2, and of version 1.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def check_room(path: str, needed_bytes: int) -> None:
    """Raise TierFull unless the tmpfs at ``path`` and memory both have ``needed_bytes``."""
    usage = os.statvfs(path)
    if usage.f_files and usage.f_favail < _SLOT_FILES:
        raise ram_full(path, needed_bytes)
    if usage.f_blocks and usage.f_bavail * usage.f_frsize < needed_bytes:
        raise ram_full(path, needed_bytes)
    if tier_label(path) != "ram":
        return  # beside a disk: its pages are written back where memory is short
    left_bytes, limit = memory_left_bytes()
    if left_bytes is not None and left_bytes < needed_bytes:
        # Said before trying: a tmpfs page over the limit ends in the out-of-memory killer.
        raise TierFull(
            f"{limit} has no room for a RAM slot: {_gib(needed_bytes)} needed,"
            f" {_gib(left_bytes)} left",
            state="nothing was allocated",
            actions=[
                f"raise the limit by {_gib(needed_bytes - left_bytes)} or more",
            ],
            tier="ram",
            needed_bytes=needed_bytes,
            free_bytes=left_bytes,
        )


def ram_full(path: str, needed_bytes: int) -> TierFull:
    """The refusal, with the arithmetic and the commands that would make room."""
    usage = os.statvfs(path)
    free_bytes = usage.f_bavail * usage.f_frsize
    if usage.f_files and usage.f_favail < _SLOT_FILES:
        mount = _mount_point(path)
        return TierFull(
            f"{mount} has no inodes left for a RAM slot: {usage.f_favail} free of {usage.f_files}",
            state="nothing was allocated",
            actions=[
                f"mount -o remount,nr_inodes={2 * usage.f_files} {mount}",
                f"look for what holds them: find {mount} | wc -l",
            ],
            tier="ram",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
    total_bytes = usage.f_blocks * usage.f_frsize
    mount = _mount_point(path)
    arithmetic = (
        f"{_gib(needed_bytes)} needed, {_gib(free_bytes)} free of {_gib(total_bytes)},"
        f" {_gib(max(0, needed_bytes - free_bytes))} short"
    )
    if tier_label(path) != "ram":
        return TierFull(
            f"{mount} has no room for a slot on disk: {arithmetic}",
            state="nothing was allocated",
            actions=[
                "make room there, or give memory enough that slots need not lie on the disk",
                "keep fewer steps: Disk(path, keep=2)",
            ],
            tier="ram",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
            total_bytes=total_bytes,
        )
    # What is used stays used; room for a ring of three, so that the advice need not be taken twice.
    wanted_gib = -(-(total_bytes - free_bytes + 3 * needed_bytes) // GIB)
    return TierFull(
        f"{mount} has no room for a RAM slot: {arithmetic}",
        state="nothing was allocated",
        actions=[
            f"mount -o remount,size={wanted_gib}g {mount}",
            f"in Docker: --shm-size={wanted_gib}g (the default is 64 MiB)",
            "look for what dead jobs left there: mtckpt status, mtckpt rm RUN",
        ],
        tier="ram",
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
    )


def ranks_full(path: str, num_ranks: int, needed_bytes: int, room_bytes: int) -> TierFull:
    """The refusal where one slot may fit, and not those that all ranks of a node need."""
    return TierFull(
        f"{_mount_point(path)} has no room for the slots of {num_ranks} ranks:"
        f" {_gib(needed_bytes)} needed, {_gib(room_bytes)} free",
        state="nothing was allocated",
        tier="ram",
        needed_bytes=needed_bytes,
        free_bytes=room_bytes,
    )


def memory_left_bytes() -> tuple[int | None, str]:
    """Memory that can still be taken, and whose limit that is. None where nothing says."""
    fields = _fields(Path("/proc/meminfo"))
    left: list[tuple[int, str]] = []
    if "MemAvailable:" in fields:
        left.append((1024 * (fields["MemAvailable:"] + fields.get("SwapFree:", 0)), "this machine"))
    for group in _own_cgroups():
        for limit, used, cache in _MEMORY_FILES:
            limit_bytes = _number(group / limit)
            used_bytes = _number(group / used)
            if limit_bytes is not None and used_bytes is not None:
                cache_bytes = _fields(group / "memory.stat").get(cache, 0)
                left.append((limit_bytes - used_bytes + cache_bytes, f"cgroup {group}"))
    return min(left) if left else (None, "")


def left_bytes_at(path: str) -> int | None:
    """What is left in the tmpfs and in memory, whichever is less; None where nothing says."""
    left_bytes, _ = memory_left_bytes()
    try:
        fs = os.statvfs(path)
    except OSError:
        return None
    if left_bytes is None or not fs.f_blocks:  # a tmpfs without a limit
        return left_bytes
    return min(left_bytes, fs.f_bavail * fs.f_frsize)


def bytes_below(path: str) -> int:
    """What the files of a directory take, and those of directories in it; gone ones take none."""
    total_bytes = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total_bytes += bytes_below(entry.path)
            else:
                total_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
    return total_bytes


def _own_cgroups() -> list[Path]:
    """Our cgroups that may limit memory, and those above them; a container's own is a root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = _CGROUPS
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
        else:
            continue
        own = root / path.lstrip("/")
        groups += [group for group in (own, *own.parents) if group.is_relative_to(root)]
    return groups


def _fields(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # Not there, or "max": no limit.


def _mount_point(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _gib(size_bytes: int) -> str:
    if size_bytes < MIB:
        return f"{size_bytes:,} bytes"
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
