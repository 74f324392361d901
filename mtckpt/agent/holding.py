"""Which agent has a directory of slots: one at a time, whatever the environments of jobs say.

Jobs of one user may look for their agent at different places (XDG_RUNTIME_DIR is set in a login
session, and not in a cron job), and have their memory at the same one. Knows the lock on such a
directory, which ends with its process, and the note in it that says where its agent is. Does not
know what lies there.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from mtckpt.errors import TierUnavailable
from mtckpt.tiers._rooted import let_go

if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK", "NOTE", "Lock", "lock", "noted"]

NOTE = ".agent"
LOCK = ".lock"
MAX_NOTE_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """The lock on a directory, while this is open and its process lives. Raises OSError where there
    can be none, BlockingIOError while somebody else has it."""

    def __init__(self, root: str) -> None:
        self._fds = [os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            self._take(root)
        except OSError:
            self.close()
            raise

    def _take(self, root: str) -> None:
        try:
            fcntl.flock(self._fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            # NFS: what may not be written to is not locked for one alone, and so no directory.
            path = os.path.join(root, LOCK)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fds.append(os.open(path, flags, 0o600))
            fcntl.flock(self._fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(path), os.fstat(self._fds[1])):
                raise BlockingIOError(errno.EAGAIN, "removed by who had it") from None
        if not self.is_of(root):
            raise BlockingIOError(errno.EAGAIN, "removed by who had it")

    def is_of(self, root: str) -> bool:
        """Whether the directory is still the one that was locked. OSError where there is none."""
        return bool(self._fds) and os.path.samestat(os.stat(root), os.fstat(self._fds[0]))

    def close(self) -> None:
        """Let others have it. Idempotent."""
        while self._fds:
            let_go(self._fds.pop())


def lock(root: str) -> Lock | None:
    """The lock on a directory; None while another agent has it. Raises TierUnavailable where it is
    not there or cannot be opened, OSError where the file system has no locks at all."""
    try:
        return Lock(root)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise
        # Out of descriptors, say: whoever has it has it still.
        raise TierUnavailable(f"{root} cannot be had: {error.strerror}", tier="ram") from error


def noted(root: str) -> str:
    """Where the agent of a directory of slots is, or was; "" if nobody says, or somebody else."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(os.path.join(root, NOTE), flags), "rb") as file:
            info = os.fstat(file.fileno())
            is_ours = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
            directory = os.fsdecode(file.read(MAX_NOTE_BYTES)) if is_ours else ""
    except OSError:
        return ""
    return directory if os.path.isabs(directory) and "\0" not in directory else ""
