"""What an OSError means for a tier: one table from errno to an error of ours.

It knows errno values and what a user can do about them. It does not know which call failed beyond
the words it is given, and it does not decide whether anything is tried again.
"""

from __future__ import annotations

import errno
import os

from mtckpt.errors import AccessDenied, TierError, TierFull, TierReadOnly, TierUnavailable

__all__ = ["free_bytes_at", "tier_error", "tier_full"]

NOTHING_STORED = "nothing was stored, and what the tier held before is unchanged"


def free_bytes_at(fd: int) -> int | None:
    """Bytes an ordinary user can still write on the file system of ``fd``; None if it won't say."""
    try:
        usage = os.fstatvfs(fd)
    except OSError:
        return None
    # Some FUSE file systems and a tmpfs without a limit report no blocks at all.
    return usage.f_bavail * usage.f_frsize if usage.f_blocks else None


def tier_full(
    *, tier: str, key: str | None, place: str, needed_bytes: int, free_bytes: int | None
) -> TierFull:
    """No room, with the arithmetic."""
    actions = [f"free space in {place}, or keep fewer steps in this tier"]
    if free_bytes is None:
        text = f"{place} has no room for {needed_bytes} bytes"
    elif free_bytes >= needed_bytes:
        text = f"{place} refused {needed_bytes} bytes with {free_bytes} bytes free"
        actions.insert(0, f"look for inodes that ran out (df -i {place}) or another busy writer")
    else:
        short_bytes = needed_bytes - free_bytes
        text = (
            f"{place} has no room: {needed_bytes} bytes needed - {free_bytes} bytes free"
            f" = {short_bytes} bytes short"
        )
        actions[0] = f"free at least {short_bytes} bytes in {place}, or keep fewer steps there"
    return TierFull(
        text,
        state=NOTHING_STORED,
        actions=actions,
        tier=tier,
        key=key,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


def _quota(error: OSError, tier: str, key: str | None, place: str, needed_bytes: int) -> TierFull:
    if error.errno == errno.EDQUOT:
        text, action = "the disk quota is used up", "see `quota -s`, free space or ask for more"
    else:
        text = "the object is larger than this process or file system allows a file to be"
        action = "raise `ulimit -f`, or use a file system with larger files"
    return TierFull(
        f"{text}: {place}",
        state=NOTHING_STORED,
        actions=[action],
        tier=tier,
        key=key,
        needed_bytes=needed_bytes,
        os_error=errno.errorcode.get(error.errno or 0),
    )


def tier_error(
    error: OSError,
    *,
    doing: str,
    tier: str,
    key: str | None,
    place: str,
    needed_bytes: int = 0,
    free_bytes: int | None = None,
) -> TierError:
    """The error of ours for ``error``. The caller raises it ``from`` the OSError."""
    code = error.errno or 0
    if code == errno.ENOSPC:
        return tier_full(
            tier=tier, key=key, place=place, needed_bytes=needed_bytes, free_bytes=free_bytes
        )
    if code in (errno.EDQUOT, errno.EFBIG):
        return _quota(error, tier, key, place, needed_bytes)
    kind: type[TierError] = TierUnavailable
    text = f"{place} did not {doing}: {error.strerror or error}"
    actions: list[str] = []
    if code == errno.EROFS:
        kind, actions = TierReadOnly, [f"mount {place} writable; see `dmesg` if it was before"]
    elif code in (errno.EACCES, errno.EPERM):
        kind, actions = AccessDenied, [f"check owner and mode: ls -ld {place}"]
    elif code == errno.ELOOP:
        kind, actions = AccessDenied, [f"remove the symbolic link inside {place}"]
    elif code == errno.ENAMETOOLONG:
        kind, actions = TierError, ["use a file system that allows names of 255 bytes"]
    elif code in (errno.EMFILE, errno.ENFILE):
        actions = ["raise the limit of open files: ulimit -n"]
    elif code in (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE):
        actions = ["look at `dmesg`: the device or the mount may be gone"]
    return kind(
        text,
        actions=actions,
        tier=tier,
        key=key,
        os_error=errno.errorcode.get(code, str(code)),
    )
