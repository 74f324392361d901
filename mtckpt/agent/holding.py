"""Which agent has a directory of slots: one at a time, whatever the environments of jobs say.

Jobs of one user may look for their agent at different places (XDG_RUNTIME_DIR is set in a login
session, and not in a cron job), and have their memory at the same one. Knows the lock on that
directory, which ends with its process, and the note in it that says where its agent is. Does not
know what lies there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import sys
import time

from mtckpt.errors import AgentUnavailable, TierUnavailable
from mtckpt.tiers._rooted import let_go

if sys.platform != "win32":
    import fcntl

__all__ = ["Roots", "noted"]

logger = logging.getLogger(__name__)

NOTE = ".agent"
MAX_NOTE_BYTES = 4096
# An agent that ends may still be writing there.
WAIT_S = 3.0
_POLL_S = 0.05


def lock(root: str) -> int | None:
    """A descriptor that has the lock on a directory; None while another agent has it. Raises
    TierUnavailable where there is none."""
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TierUnavailable(f"{root} went away: {error.strerror}", tier="ram") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        let_go(fd)
        return None
    except OSError as error:
        logger.warning("%s cannot be locked: %s; one agent alone must use it", root, error.strerror)
    return fd


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


class Roots:
    """The directories of slots that this agent has. ``directory`` is where it is reached."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fds: dict[str, int] = {}

    async def take(self, root: str) -> None:
        """Have a directory that is there for this agent alone. Raises AgentUnavailable."""
        deadline_s = time.monotonic() + WAIT_S
        while root not in self._fds and not self._try(root):
            if time.monotonic() >= deadline_s:
                other = noted(root) or "another directory"
                raise AgentUnavailable(
                    f"another agent of this user, at {other}, has the memory in {root}",
                    state="nothing was done",
                    actions=[
                        f"let this job use that one: MTCKPT_RUNTIME_DIR={other}",
                        "or give it memory of its own: MTCKPT_RAM_DIR",
                    ],
                    path=root,
                )
            await asyncio.sleep(_POLL_S)

    def renew(self) -> None:
        """Take directories again that somebody has removed, and that were made anew."""
        for root, fd in list(self._fds.items()):
            with contextlib.suppress(OSError, TierUnavailable):  # it is not there: nobody has it
                if not os.path.samestat(os.stat(root), os.fstat(fd)) and not self._try(root):
                    logger.warning("%s was made anew, and another agent has it", root)

    def close(self) -> None:
        """Let others have them. Idempotent."""
        for root, fd in self._fds.items():
            with contextlib.suppress(OSError):
                if noted(root) == self._directory:
                    os.unlink(os.path.join(root, NOTE))
            let_go(fd)
        self._fds.clear()

    def _try(self, root: str) -> bool:
        fd = lock(root)
        if fd is None:
            return False
        if root in self._fds:
            let_go(self._fds[root])
        self._fds[root] = fd
        with contextlib.suppress(OSError):  # full: a hint less
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(os.path.join(root, NOTE), flags, 0o600), "wb") as file:
                file.write(os.fsencode(self._directory))
        return True
