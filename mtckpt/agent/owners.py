"""Who owns a run: processes, whether they live, and who may take a run from whom.

Knows /proc and pidfds. Does not know slots or saves. A death is a pidfd that became readable,
which no forked child can hold back, unlike an open connection or an flock; across pid namespaces
without SO_PEERPIDFD it is a closed connection and silence after it.
"""

from __future__ import annotations

import enum
import functools
import os
import socket
import time
from dataclasses import dataclass, field

__all__ = [
    "Claim",
    "Owner",
    "Process",
    "Verdict",
    "boot_id",
    "is_left",
    "judge",
    "peer_pidfd",
    "read_process",
    "uptime_s",
]

_SO_PEERPIDFD = 77  # Linux 6.5
_PF_EXITING = 0x4
# Without a pidfd: silence that counts as death, after it has listened to us, and before.
SILENCE_S = 10.0
SILENCE_BEFORE_LISTENING_S = 600.0


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc says of a process. ``state`` is the letter of ps: Z and X are dead."""

    pid: int
    state: str
    parent_pid: int
    start_ticks: int
    exiting: bool


def read_process(pid: int) -> Process | None:
    """None if there is no such process here (dead, or of another namespace)."""
    if pid <= 0:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        exiting = bool(int(fields[6]) & _PF_EXITING)
        return Process(pid, fields[0].decode(), int(fields[1]), int(fields[19]), exiting)
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def boot_id() -> str:
    """What the kernel calls this start of the machine; "" if it does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def uptime_s() -> float:
    """Seconds since this machine started, as every agent counts them that sees the same memory:
    whatever the clock of the day is set to, and through a sleep of the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def peer_pidfd(connection: socket.socket) -> int | None:
    """A descriptor of the process that connected, of whatever namespace; None before Linux 6.5."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return None


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A descriptor of process ``pid`` if it is still the one that started then."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    process = read_process(pid)
    if process is None or process.start_ticks != start_ticks or process.state in "ZX":
        os.close(fd)
        return None
    return fd


@dataclass(slots=True, eq=False)
class Owner:
    """One Checkpointer. ``pid`` is as this agent sees it; ``pidfd`` is -1 where it has none.

    ``seen`` is False for a process of another pid namespace: its pid is a stranger's here.
    """

    holder: str
    rank: int
    pid: int
    start_ticks: int
    parent_pid: int
    host: str
    uid: int = -1
    world_size: int = 1
    incarnation: int = 0
    incarnation_id: str = ""
    last_step: int = -1  # the newest that it sealed or called off in this incarnation
    left: bytes = b""  # chunks that it left in the slot of its last save, a bit each
    pidfd: int = -1
    seen: bool = True
    # Known from a file of the agent before; it has not opened the run with this one yet.
    absent: bool = False
    dead: bool = False
    fenced_by: int = 0
    listening: int = 0
    listened: bool = False
    heard_s: float = field(default_factory=lambda: time.monotonic())

    def close(self) -> None:
        fd, self.pidfd = self.pidfd, -1
        if fd >= 0:
            os.close(fd)

    def is_silent(self, now_s: float) -> bool:
        """For an owner without a pidfd: whether it has been silent long enough to be dead."""
        if self.pidfd >= 0 or self.dead or self.listening:
            return False
        limit_s = SILENCE_S if self.listened else SILENCE_BEFORE_LISTENING_S
        return now_s - self.heard_s > limit_s

    @property
    def is_out(self) -> bool:
        """Whether it is to be given nothing more."""
        return self.dead or bool(self.fenced_by)

    def has_hung_up(self) -> bool:
        """For an owner without a pidfd: whether it listened to us and its connection is closed."""
        return self.pidfd < 0 and self.listened and not self.listening

    def process(self) -> Process | None:
        """What /proc says of it, where that is about it."""
        found = read_process(self.pid) if self.seen else None
        return found if found is not None and found.start_ticks == self.start_ticks else None

    def is_same(self, other: Claim) -> bool:
        """Whether a claim comes from the process that this owner is."""
        return (self.pid, self.start_ticks) == (other.pid, other.start_ticks)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who wants a run now."""

    holder: str
    pid: int
    start_ticks: int


class Verdict(enum.Enum):
    """What becomes of a claim to a run that has an owner."""

    REOPEN = "the same Checkpointer comes back"
    FENCE = "the older owner is fenced"
    WAIT = "the older owner may be dying"
    REFUSE = "the older owner is alive and well"


# An owner that cannot mean it any more gets a fifth of the patience.
_SHORT = 0.2
# From when an owner has been silent for long enough until somebody has looked, and settled it.
_NOTICED_S = 5.0


def is_left(owner: Owner, process: Process | None) -> bool:
    """Whether it cannot mean it any more: left behind by a launcher that was killed (it has another
    parent now), or stopped. Pure."""
    return process is not None and (
        process.state in "ZXTt" or process.parent_pid != owner.parent_pid
    )


def judge(
    owner: Owner, process: Process | None, claim: Claim, waited_s: float, patience_s: float = 5.0
) -> Verdict:
    """Decide on a claim while ``owner`` is not known to be dead. Pure.

    A process that got SIGKILL takes a while to give its memory back, so there is some patience.
    An owner that cannot mean it any more is fenced, see ``is_left``, or that is the same process
    with a newer Checkpointer.
    """
    if owner.is_same(claim):
        return Verdict.REOPEN if owner.holder == claim.holder else Verdict.FENCE
    if process is not None and process.exiting:
        return Verdict.WAIT if waited_s < patience_s else Verdict.FENCE
    if is_left(owner, process):
        return Verdict.WAIT if waited_s < patience_s * _SHORT else Verdict.FENCE
    if owner.has_hung_up():
        # Its silence is going to say whether it lives; until then nothing does.
        patience_s = max(patience_s, SILENCE_S + _NOTICED_S)
    return Verdict.WAIT if waited_s < patience_s else Verdict.REFUSE
