"""What is said of a node that is about to go: the messages of ``POST /v1/drain``, and the note that
it was said to be safe to go, beside the agent's socket. Does not know when that is said."""

from __future__ import annotations

import contextlib
import logging
import os
import stat

import msgspec

__all__ = ["Drain", "Drained", "DrainedRun", "Note"]

logger = logging.getLogger(__name__)

FILE = "safe-to-go.json"
MAX_BYTES = 4096


class Drain(msgspec.Struct, frozen=True):
    """The node is about to go: nothing new is taken, and what is here is brought elsewhere within
    ``timeout_s``. ``cancel``: it stays after all."""

    timeout_s: float = 60.0
    cancel: bool = False


class DrainedRun(msgspec.Struct, frozen=True):
    """``step`` is the newest that is whole, with its stages; ``safe`` whether the loss of this node
    takes nothing along, ``detail`` where it is, ``lacking`` what did not get where it should."""

    run: str
    step: int | None
    stages: list[str]
    safe: bool
    detail: str
    lacking: list[str] = []


class Drained(msgspec.Struct, frozen=True):
    safe: bool
    runs: list[DrainedRun] = []


class _Noted(msgspec.Struct, frozen=True):
    boot_id: str
    reason: str


class Note:
    """For the agent that is started where this one was killed: what was brought away stays the
    newest only as long as nothing new is begun here. It is of one start of the machine."""

    def __init__(self, directory: str, boot_id: str) -> None:
        self._path = os.path.join(directory, FILE)
        self._boot_id = boot_id

    def read(self) -> str:
        """Why the node is about to go; "" if nobody has said so, or somebody else."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with open(os.open(self._path, flags), "rb") as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                    return ""
                noted = msgspec.json.decode(file.read(MAX_BYTES), type=_Noted)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return ""
        return noted.reason if self._boot_id and noted.boot_id == self._boot_id else ""

    def write(self, reason: str) -> None:
        """From now on an agent that is killed does not forget it."""
        temporary = f"{self._path}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(msgspec.json.encode(_Noted(self._boot_id, reason)))
            os.replace(temporary, self._path)
        except OSError as error:
            logger.warning("another agent here will not know that the node goes: %s", error)

    def remove(self) -> None:
        """The node stays, or its agent ends in good order. Idempotent."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
