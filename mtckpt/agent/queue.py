"""What to do next: which save a tier takes, which slot is recycled, what a failure means. Pure.

Knows saves and slots as facts in frozen records, and nothing of processes, files or time other
than what it is given. Everything here can be tested by a table.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from mtckpt import errors

__all__ = [
    "Limits",
    "Pick",
    "SaveFacts",
    "SlotState",
    "backoff_s",
    "blocks_recycling",
    "is_owed",
    "pick_flush",
    "pick_recycle",
]


# Saves that a disk holds on to, beyond its own rules, for a store that does not answer.
MAX_BACKLOG = 4


class SlotState(enum.Enum):
    """FREE -> CAPTURING -> SEALED -> COMMITTED -> FREE; only the agent frees."""

    FREE = "free"
    CAPTURING = "capturing"
    SEALED = "sealed"
    COMMITTED = "committed"


class SaveFacts(msgspec.Struct, frozen=True):
    """A save in RAM. ``order`` sorts saves: (incarnation, step). ``owed`` are the labels that it is
    due at and that neither have it nor gave up; ``writing`` those being written to just now.
    ``copied``: other nodes have copies of what is here; ``replicated``: of all there is of it.
    ``on_line``: no restore of an older step has abandoned it."""

    name: str
    order: tuple[int, int]
    staged: bool
    owed: frozenset[str] = frozenset()
    writing: frozenset[str] = frozenset()
    readers: int = 0
    copied: bool = False
    replicated: bool = False
    on_line: bool = True

    @property
    def worth(self) -> tuple[bool, tuple[int, int]]:
        """What is abandoned is older than anything on the line, whatever its step."""
        return (self.on_line, self.order)


@dataclass(frozen=True, slots=True)
class Pick:
    """A save for a tier, and the older ones that it stands for there."""

    name: str
    superseded: tuple[str, ...] = ()


def pick_flush(label: str, saves: Iterable[SaveFacts], wanted: Collection[str] = ()) -> Pick | None:
    """The newest staged save that a tier is owed; older ones that it is owed are superseded.

    Those of ``wanted`` are not, as far as the backlog goes: they come later. None while that tier
    is being written: what is being written is never superseded midway.
    """
    saves = list(saves)
    if any(label in save.writing for save in saves):
        return None
    kept = backlog(label, saves, wanted)
    if not kept:
        return None
    owed = sorted((s for s in saves if s.staged and label in s.owed), key=lambda s: s.worth)
    return Pick(kept[0], tuple(s.name for s in owed if s.name not in kept))


def backlog(label: str, saves: Iterable[SaveFacts], wanted: Collection[str]) -> list[str]:
    """What a tier still gets of what it is owed, newest first: the newest, and then of ``wanted``.

    However long it does not answer, that is no more than MAX_BACKLOG saves.
    """
    owed = sorted((s for s in saves if s.staged and label in s.owed), key=lambda s: s.worth)
    newest_first = [s.name for s in reversed(owed)]
    return [*newest_first[:1], *(n for n in newest_first[1:] if n in wanted)][:MAX_BACKLOG]


def blocks_recycling(save: SaveFacts, saves: Sequence[SaveFacts]) -> str:
    """Why the slot of a save may not be recycled, in words; empty if it may."""
    newer = [s for s in saves if s.worth > save.worth and s.staged]
    if not newer:
        return "is the newest in RAM"
    if save.writing:
        return f"is being written to {', '.join(sorted(save.writing))}"
    if save.readers:
        return "is being read"
    owed = [label for label in sorted(save.owed) if not any(label in s.owed for s in newer)]
    if owed:
        return f"is owed to {', '.join(owed)}"
    if save.copied and not any(s.replicated for s in newer):
        # With another node its copies of this save may go: then the parts in RAM make it whole.
        return "is the newest that other nodes have"
    return ""


def pick_recycle(saves: Sequence[SaveFacts], busy: frozenset[str] = frozenset()) -> str | None:
    """The save whose slot is recycled next: the oldest that may be. ``busy`` were found leased."""
    for save in sorted(saves, key=lambda s: s.worth):
        if save.name not in busy and not blocks_recycling(save, saves):
            return save.name
    return None


def is_owed(error: BaseException) -> bool:
    """True for what is retried (no answer, not in time), False for what is reported as failed."""
    if isinstance(error, (errors.TierFull, errors.TierReadOnly, errors.AccessDenied)):
        return False
    return isinstance(error, (errors.TierUnavailable, errors.ShortRead, TimeoutError))


def backoff_s(attempt: int, jitter: float) -> float:
    """Seconds before attempt number ``attempt`` (from 1); ``jitter`` is in [0, 1). At most 60 s."""
    return float(min(60.0, 0.5 * 2.0 ** min(attempt - 1, 10)) * (0.5 + jitter))


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines, periods and rates, each from its MTCKPT_ variable if that is a number above zero.

    ``store_bytes_per_s`` 0 is no cap.
    """

    min_bytes_per_s: float = field(default=8.0 * 2**20, metadata={"env": "MTCKPT_MIN_BYTES_PER_S"})
    min_store_bytes_per_s: float = field(
        default=float(2**20), metadata={"env": "MTCKPT_MIN_STORE_BYTES_PER_S"}
    )
    store_bytes_per_s: float = field(default=0.0, metadata={"env": "MTCKPT_STORE_BYTES_PER_S"})
    call_timeout_s: float = field(default=30.0, metadata={"env": "MTCKPT_CALL_TIMEOUT_S"})
    owed_s: float = field(default=7200.0, metadata={"env": "MTCKPT_OWED_S"})
    scrub_s: float = field(default=3600.0, metadata={"env": "MTCKPT_SCRUB_S"})
    ram_ttl_s: float = field(default=86400.0, metadata={"env": "MTCKPT_RAM_TTL_S"})
    rank_s: float = field(default=60.0, metadata={"env": "MTCKPT_RANK_S"})
    takeover_s: float = field(default=5.0, metadata={"env": "MTCKPT_TAKEOVER_S"})
    idle_s: float = field(default=30.0, metadata={"env": "MTCKPT_AGENT_IDLE_S"})
    grace_s: float = field(default=25.0, metadata={"env": "MTCKPT_GRACE_S"})
    delete_grace_s: float = field(default=60.0, metadata={"env": "MTCKPT_DELETE_GRACE_S"})

    @staticmethod
    def from_environment() -> Limits:
        values = {}
        for name, spec in Limits.__dataclass_fields__.items():
            try:
                value = float(os.environ.get(spec.metadata["env"], ""))
            except ValueError:
                continue
            if value > 0:
                values[name] = value
        return Limits(**values)

    def deadline_s(self, size_bytes: int = 0, *, store: bool = False) -> float:
        """How long one piece of work over so many bytes may take.

        A store's own deadline is over before that: it says then what it was waiting for.
        """
        if store:
            # A cap is shared by what goes on side by side.
            capped = self.store_bytes_per_s / 4 or self.min_store_bytes_per_s
            return 2 * self.call_timeout_s + size_bytes / min(self.min_store_bytes_per_s, capped)
        return self.call_timeout_s + size_bytes / self.min_bytes_per_s
