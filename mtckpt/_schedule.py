"""When a tier is due: the user's tier settings, and pure decisions about steps.

Knows step numbers, intervals and measured times. Does not save anything. Times only ever make a
step that is captured anyway due elsewhere too; clocks never order steps.
"""

from __future__ import annotations

import abc
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import msgspec

from mtckpt._access import Access, Engine, access_of, check_agent_url, check_url
from mtckpt.capture.base import MODES, Mode
from mtckpt.errors import UsageError

__all__ = [
    "Disk",
    "DueTier",
    "ObjectStore",
    "Peers",
    "Ram",
    "Schedule",
    "SlowTier",
    "Tempo",
    "TierSettings",
    "absolute",
    "auto_interval",
    "labels_of",
    "make_schedule",
    "parse_every",
    "split_tiers",
]

AUTO_START_STEPS = 10
MAX_COPIES = 8
AUTO_LOSS = 0.01
AUTO_GROWTH = (
    4  # times the interval before, at most: one slow save must not put off the next for hours
)
AUTO_TOLD = 2  # an interval that has changed by such a factor since the last line is a line
logger = logging.getLogger(__name__)

_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*")
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


class TierSettings:
    """What ``Ram``, ``Disk``, ``Peers`` and ``ObjectStore`` are to a type checker, also in lists.

    ``Checkpointer(tiers=...)`` takes a sequence of these, and at run time only those classes.
    """


class SlowTier(TierSettings, abc.ABC):
    """A tier that the node agent brings saves to."""

    kind: ClassVar[str]
    every: int | str
    keep: Any

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Its directory or URL."""

    @property
    def access(self) -> Access:
        """What it takes to get there, beyond the place."""
        return Access()


@dataclass(frozen=True)
class Ram(TierSettings):
    """Slots in memory of the node: tmpfs files that outlive the training process.

    Args:
        path: a directory on a tmpfs; by default one of this user in /dev/shm.
        every: steps between saves, or "auto": the fewest for which saving costs under 1 % of
            training time, starting at 10.
        slots: saves that fit in memory at once (2 or more); "auto" takes 3 where there is room.
        capture: how arrays leave a device. "snapshot" copies them within the device first, as many
            as its free memory allows, and "auto" does too; "blocking" needs 64 MiB of device memory
            and makes the device wait until all have left it; "overlap" needs as little and lets
            training go on meanwhile: only the next ``optimizer.step()`` of an optimizer in the
            state waits. Parameters and moments must then not be changed by anything else before
            that. "snapshot-overlap" lets it go on while they are copied within the device.
    """

    path: str | os.PathLike[str] | None = None
    every: int | Literal["auto"] = field(default="auto", kw_only=True)
    slots: int | Literal["auto"] = field(default="auto", kw_only=True)
    capture: Mode = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.every != "auto":
            parse_every(self.every, times=False)
        if self.slots != "auto" and (not isinstance(self.slots, int) or self.slots < 2):
            raise UsageError(
                f"Ram(slots={self.slots!r}): one slot is written while the newest save is in "
                "another, so 2 are the least",
                state="nothing was done",
            )
        if self.capture not in MODES:
            raise UsageError(
                f"Ram(capture={self.capture!r}): must be one of {', '.join(MODES)}",
                state="nothing was done",
            )


@dataclass(frozen=True)
class Disk(SlowTier):
    """Files on a local disk, flushed to it by the node agent.

    Args:
        path: a directory; each run gets one of its own inside it.
        every: steps, or a time such as "10min"; 1 takes every step that is staged.
        keep: how many of the newest to keep, or a sequence of KeepLast, KeepEvery, KeepBest.
    """

    kind = "disk"
    path: str | os.PathLike[str]
    every: int | str = field(default=1, kw_only=True)
    keep: Any = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        parse_every(self.every, times=True)

    @property
    def place(self) -> str:
        return absolute(self.path)


@dataclass(frozen=True)
class Peers(SlowTier):
    """Memory of other nodes of the job: what is there survives the loss of a node.

    Each node's partners pull its parts of a save into their own memory, where they take as much
    room as the parts themselves, twice while a newer save arrives. Which nodes those are follows
    from the failure domains that nodes say they are in.

    Args:
        copies: on how many other nodes each byte is to be.
        every: steps, or a time such as "10min"; 1 takes every step that is staged.
        strict_placement: where there are too few nodes for the copies, or one failure domain has
            all of something, the first ``restore`` or ``save`` is PlacementImpossible. By default
            that is a warning.
    """

    kind = "peers"
    copies: int = field(default=1, kw_only=True)
    every: int | str = field(default=1, kw_only=True)
    strict_placement: bool = field(default=False, kw_only=True)
    keep: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        parse_every(self.every, times=True)
        if not isinstance(self.copies, int) or not 1 <= self.copies <= MAX_COPIES:
            raise UsageError(
                f"Peers(copies={self.copies!r}): must be 1 to {MAX_COPIES}",
                state="nothing was done",
            )

    @property
    def place(self) -> str:
        return f"{self.copies} other node{'s' if self.copies > 1 else ''}"


@dataclass(frozen=True)
class ObjectStore(SlowTier):
    """An object store, written to by the node agent: what it has survives the loss of every node.

    Args:
        url: where checkpoints go: ``s3://bucket/prefix``, ``gs://``, ``az://``, or any URL that
            fsspec knows; each run gets a prefix of its own below it.
        every: steps, or a time such as "10min"; 1 takes every step that is captured.
        keep: as for ``Disk``. By default nothing is ever deleted from a store.
        engine: "obstore" or "fsspec"; "auto" takes the faster one that is installed.
        storage_options: for that engine, JSON values only. By default credentials come from where
            the store's users keep them: environment, configuration files, the machine's role. They
            are never written or shown.
        reuse: parts whose bytes the newest save in the store has are copied inside the store, where
            it can; each shard there is whole all the same.
    """

    kind = "store"
    url: str
    every: int | str = field(default=1, kw_only=True)
    keep: Any = field(default=None, kw_only=True)
    engine: Engine = field(default="auto", kw_only=True)
    storage_options: Mapping[str, Any] | None = field(
        default=None, kw_only=True, repr=False, hash=False
    )
    reuse: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        parse_every(self.every, times=True)
        check_agent_url(self.url)
        if self.engine not in ("auto", "obstore", "fsspec"):
            raise UsageError(
                f"engine={self.engine!r}: must be 'auto', 'obstore' or 'fsspec'",
                state="nothing was done",
            )
        for name, value in (self.storage_options or {}).items():
            try:
                msgspec.json.encode({name: value})
            except (TypeError, ValueError):
                # Without its cause: that could show the value.
                raise UsageError(
                    f"storage_options[{name!r}] is a {type(value).__name__}: it has to reach the"
                    " agent, which is another process, as JSON",
                    state="nothing was done",
                ) from None

    @property
    def place(self) -> str:
        return check_url(self.url)

    @property
    def access(self) -> Access:
        return access_of(self.url, self.engine, self.storage_options)


def absolute(path: str | os.PathLike[str]) -> str:
    """The path from the root, a ``~`` before it being whose home that is.

    Raises UsageError for what is no path, where there is none, or none that JSON can hold.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise UsageError(f"path={path!r}: must be a text or a Path", state="nothing was done")
    if not os.fspath(path):
        raise UsageError(
            "path='' names no directory",
            state="nothing was done",
            actions=("for the current directory: '.'",),
        )
    try:
        place = os.path.abspath(os.path.expanduser(path))
        place.encode()
    except FileNotFoundError as error:
        raise UsageError(
            f"{os.fspath(path)!r} is relative to the current directory, which was deleted",
            state="nothing was done",
            actions=("give the tier an absolute path", "or change to a directory that exists"),
        ) from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path of a tier must be UTF-8, not {os.fsencode(place)!r}",
            state="nothing was done",
            actions=("give the tier another path", "or change to a directory with another name"),
        ) from error
    return place


def parse_every(every: int | str, *, times: bool) -> tuple[int | None, float | None]:
    """``(steps, None)`` or ``(None, seconds)``. Raises UsageError."""
    if isinstance(every, int) and not isinstance(every, bool) and every >= 1:
        return every, None
    match = _TIME.fullmatch(every) if isinstance(every, str) else None
    if match and times and float(match[1]) > 0:
        return None, float(match[1]) * _SECONDS[match[2]]
    allowed = 'steps (1 or more) or a time such as "10min"' if times else "steps (1 or more)"
    raise UsageError(f"every={every!r}: must be {allowed}", state="nothing was done")


@dataclass(slots=True)
class DueTier:
    """One tier's schedule. ``last_step`` is when it was last due in this run."""

    label: str
    every_steps: int | None
    every_s: float | None
    last_step: int = 0
    last_s: float = 0.0

    def due_at(self, step: int) -> bool:
        every = self.every_steps
        return every is not None and step // every > self.last_step // every


@dataclass(slots=True)
class Schedule:
    """All tiers of a run, the capturing one first.

    The first tier decides which steps are captured. A slower tier with ``every=1`` takes each of
    those; with more steps it has a rhythm of its own and is captured for; with a time it takes the
    first captured step after that time has passed.
    """

    tiers: list[DueTier] = field(default_factory=list)
    auto: bool = False
    next_every: int | None = None
    told_every: int | None = None  # by the log

    @property
    def every_to_carry(self) -> int:
        """The automatic interval that the next start of the job begins with; 0 if it is fixed."""
        return (self.next_every or self.tiers[0].every_steps or 0) if self.auto else 0

    def due(self, step: int, now_s: float) -> list[str]:
        """Labels of the tiers due at ``step``; empty when there is nothing to do."""
        first = self.tiers[0]
        captured = first.due_at(step)
        own = [
            tier
            for tier in self.tiers[1:]
            if tier.every_steps is not None and tier.every_steps > 1 and tier.due_at(step)
        ]
        if not captured and not own:
            return []
        timed = [
            tier
            for tier in self.tiers[1:]
            if (tier.every_s is not None and now_s - tier.last_s >= tier.every_s)
            or (tier.every_steps == 1 and tier.due_at(step) and captured)
        ]
        chosen = ([first] if captured else []) + own + timed
        return [tier.label for tier in self.tiers if tier in chosen]

    def wanted(self, step: int, tiers: str, *, keeps_time: bool) -> list[str]:
        """Labels of the tiers to save ``step`` for. Raises UsageError.

        Times are told by one clock: a rank that does not keep it leaves them to the one that does,
        and what is due there is captured on all.
        """
        if tiers == "all":
            return [tier.label for tier in self.tiers]
        if tiers != "due":
            raise UsageError(f"tiers={tiers!r}: must be 'due' or 'all'", state="nothing was done")
        return self.due(step, time.monotonic() if keeps_time else -math.inf)

    def adapt(self, every: int | None, run: str, *, at_once: bool) -> None:
        """Take over an interval that was measured: now, or to carry where ranks have to agree."""
        if every is None or not self.auto:
            return
        old = self.tiers[0].every_steps or every
        every = min(every, AUTO_GROWTH * old)
        if not at_once:
            self.next_every = every
            return
        if every > old or every < 0.8 * old:
            self.tiers[0].every_steps = every
            # Short steps are measured with so much noise that each save would have a line.
            told = self.told_every = self.told_every or old
            if not told / AUTO_TOLD < every < told * AUTO_TOLD:
                logger.info("run %s: saving every %d steps (was %d)", run, every, told)
                self.told_every = every

    def is_due(self, step: int, now_s: float) -> bool:
        """The quick question of every step: no list, no allocation."""
        for tier in self.tiers:
            every = tier.every_steps
            if every is None or step // every <= tier.last_step // every:
                continue
            if tier is self.tiers[0] or every > 1:
                return True
        return False

    def done(self, step: int, labels: Sequence[str], now_s: float) -> None:
        """Note that ``labels`` were due at ``step``."""
        for tier in self.tiers:
            if tier.label in labels:
                tier.last_step = step
                tier.last_s = now_s

    def resumed(self, step: int, now_s: float) -> None:
        """Go on from a restored step: due again at the steps at which it would have been."""
        for tier in self.tiers:
            tier.last_step = step
            tier.last_s = now_s


def auto_interval(stall_s: float, step_s: float) -> int:
    """The fewest steps between saves for which ``stall_s`` a save stays under 1 % of training."""
    if step_s <= 0 or stall_s <= 0:
        return 1
    return max(1, min(10_000, math.ceil(stall_s / (AUTO_LOSS * step_s))))


class Tempo:
    """Measures what saving costs against what a step takes."""

    def __init__(self) -> None:
        self._last_step: int | None = None
        self._last_s = 0.0
        self._stalls: list[float] = []

    def note(self, step: int, stall_s: float) -> int | None:
        """After a save: the interval that keeps the loss under 1 %, once it can be known."""
        now_s = time.perf_counter()
        wanted = None
        if self._last_step is not None and step > self._last_step:
            step_s = (now_s - stall_s - self._last_s) / (step - self._last_step)
            # The first stall has the slots' first touch in it: the median of the last five counts.
            self._stalls = [*self._stalls[-4:], stall_s]
            wanted = auto_interval(sorted(self._stalls)[(len(self._stalls) - 1) // 2], step_s)
        self._last_step, self._last_s = step, now_s
        return wanted


def labels_of(tiers: Sequence[SlowTier]) -> list[str]:
    """A name for each: "disk", "disk-2", "store"; unique in a run."""
    seen: Counter[str] = Counter()
    labels = []
    for tier in tiers:
        seen[tier.kind] += 1
        labels.append(tier.kind if seen[tier.kind] == 1 else f"{tier.kind}-{seen[tier.kind]}")
    return labels


def make_schedule(ram: Ram, tiers: Sequence[SlowTier], labels: Sequence[str]) -> Schedule:
    auto = ram.every == "auto"
    now_s = time.monotonic()
    first = DueTier("ram", AUTO_START_STEPS if auto else int(ram.every), None, last_s=now_s)
    slower = [
        DueTier(label, *parse_every(tier.every, times=True), last_s=now_s)
        for label, tier in zip(labels, tiers, strict=True)
    ]
    return Schedule([first, *slower], auto=auto)


def split_tiers(tiers: Sequence[TierSettings] | None) -> tuple[Ram, list[SlowTier]]:
    """The RAM tier, which there always is, and the others; those of a run that names none.

    Raises UsageError for tiers that cannot be together.
    """
    if tiers is None:
        return Ram(), [Disk("checkpoints")]
    if not isinstance(tiers, Sequence):
        raise UsageError(
            f"tiers={tiers!r}: must be a list",
            state="nothing was done",
            actions=("put it into one: tiers=[Ram(), Disk(...)]",),
        )
    rams = [tier for tier in tiers if isinstance(tier, Ram)]
    slow = [tier for tier in tiers if isinstance(tier, SlowTier)]
    peers = sum(isinstance(tier, Peers) for tier in slow)
    if len(rams) + len(slow) != len(tiers) or not tiers or max(len(rams), peers) > 1:
        raise UsageError(
            f"tiers={list(tiers)!r}: give at most one Ram and one Peers, and any number of Disk and"
            " ObjectStore",
            state="nothing was done",
        )
    if rams:
        return rams[0], slow
    steps, _ = parse_every(slow[0].every, times=True)
    if steps is None:
        raise UsageError(
            f"{type(slow[0]).__name__}(every={slow[0].every!r}): the first tier needs steps, since"
            " clocks differ between ranks",
            state="nothing was done",
            actions=("put Ram(every=...) first, or give steps",),
        )
    return Ram(every=steps), slow
