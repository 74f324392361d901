"""What the user gets back: Save, Restored, Step, Status.

Knows stages and how they lie above one another. Does not talk to anybody: a ``Save`` is told what
happened to it and wakes whoever waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mtckpt.errors import CheckpointError, SaveFailed, StageNotPlanned, UsageError, WaitTimeout

__all__ = [
    "Restored",
    "Save",
    "Stage",
    "Status",
    "Step",
    "check_seconds",
    "stage_of_tier",
    "stages_together",
]

Stage = Literal["captured", "staged", "local", "replicated", "durable"]

MAX_SECONDS = 1e9
# A stage is reached with any of these: the diamond of staged < local, replicated < durable.
_AT_OR_ABOVE: dict[str, frozenset[str]] = {
    "captured": frozenset({"captured", "staged", "local", "replicated", "durable"}),
    "staged": frozenset({"staged", "local", "replicated", "durable"}),
    "local": frozenset({"local", "durable"}),
    "replicated": frozenset({"replicated", "durable"}),
    "durable": frozenset({"durable"}),
}
_STAGE_OF_KIND = {"ram": "staged", "disk": "local", "peers": "replicated", "store": "durable"}


def check_seconds(name: str, value: float) -> float:
    """A time that somebody waits at most. Raises UsageError: none is negative, nor without end."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_SECONDS:
        raise UsageError(
            f"{name}={value!r}: must be a number of seconds",
            state="nothing was done",
            actions=(f"for a long time, {name}=86400",),
        )
    return value


def stage_of_tier(label: str) -> str:
    """The stage that a save reaches with a tier, by its kind or its label ("disk-2")."""
    return _STAGE_OF_KIND[label.partition("-")[0]]


def stages_together(of_parts: Collection[frozenset[str]]) -> set[str]:
    """The stages that a save has reached whose parts have reached these, each for itself."""
    return {
        stage
        for stage in set().union(*of_parts)
        if all(_AT_OR_ABOVE[stage] & part for part in of_parts)
    }


class Save:
    """One call of ``save()``. Its set of stages only grows; an error never takes one back.

    ``due`` is False when no tier wanted this step; ``skipped`` says in one sentence why a save
    that was due was called off on every rank.
    """

    def __init__(
        self, step: int, id_: str = "", *, planned: Mapping[str, str] | None = None
    ) -> None:
        self.step = step
        self.id = id_
        self.due = planned is not None
        self.skipped: str | None = None
        # label of a tier -> stage that it gives
        self._planned = dict(planned or {})
        self._condition = threading.Condition()
        self._reached: frozenset[str] = frozenset()
        self._failed: dict[str, CheckpointError] = {}
        self._superseded: frozenset[str] = frozenset()
        self._owed: dict[str, str] = {}
        self._weak = False
        # Two tiers may give one stage: it is reached with the first, the save is done with both.
        self._waiting: frozenset[str] = frozenset()

    @property
    def reached(self) -> frozenset[str]:
        """Stages reached so far."""
        return self._reached

    def wait(self, stage: Stage = "staged", *, timeout_s: float = 600.0) -> None:
        """Return when ``stage``, or one above it, is reached.

        Raises:
            StageNotPlanned: at once, when no tier due at this step gives it.
            SaveFailed: it cannot be reached; the tier's error is the cause.
            WaitTimeout: not reached within ``timeout_s``; the work goes on.
            UsageError: ``timeout_s`` is no number of seconds: no wait is without an end.
        """
        wanted = _AT_OR_ABOVE.get(stage)
        if wanted is None:
            raise StageNotPlanned(f"no such stage: {stage!r}", stage=stage, step=self.step)
        deadline = time.monotonic() + check_seconds("timeout_s", timeout_s)
        with self._condition:
            while not (self._reached & wanted):
                self._raise_if_hopeless(stage, wanted)
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    owed = "; ".join(f"{label}: {why}" for label, why in self._owed.items())
                    raise WaitTimeout(
                        f"step {self.step} is not {stage} yet" + (f" ({owed})" if owed else ""),
                        stage=stage,
                        step=self.step,
                        timeout_s=timeout_s,
                        state="the work goes on",
                        actions=("wait longer, or look at `mtckpt status`",),
                    )
                self._condition.wait(min(remaining_s, 1.0))

    def done(self) -> bool:
        """True once nothing more will happen to this save: all reached, failed or superseded."""
        with self._condition:
            return self._settled()

    def exception(self) -> CheckpointError | None:
        """The error of a tier that this save failed to reach, or None (so far)."""
        with self._condition:
            return next(iter(self._failed.values()), None)

    def __repr__(self) -> str:
        if not self.due:
            return f"Save(step={self.step}, not due)"
        if self.skipped:
            return f"Save(step={self.step}, skipped: {self.skipped})"
        stages = ", ".join(s for s in _AT_OR_ABOVE if s in self._reached) or "nothing yet"
        return f"Save(step={self.step}, {stages}{' (weak)' if self._weak else ''})"

    # -- told by the pipeline -------------------------------------------------------------------

    def _advance(
        self,
        stages: Iterable[str] = (),
        *,
        failed: Mapping[str, CheckpointError] | None = None,
        owed: Mapping[str, str] | None = None,
        superseded: Iterable[str] = (),
        waiting: Iterable[str] | None = None,
        weak: bool = False,
        skipped: str | None = None,
        on_error: Callable[[Save, CheckpointError], None] | None = None,
    ) -> None:
        """Take in news. ``on_error`` has each error that is new before anyone who waits sees it."""
        with self._condition:
            self._reached |= frozenset(stages)
            self._superseded |= frozenset(superseded)
            self._owed = dict(owed or {})
            if waiting is not None:
                self._waiting = frozenset(waiting)
            self._weak = self._weak or weak
            self.skipped = skipped or self.skipped
            fresh = [e for label, e in (failed or {}).items() if label not in self._failed]
            self._failed.update(failed or {})
            if on_error is not None:
                for error in fresh:
                    on_error(self, error)
            self._condition.notify_all()

    def _plan(self, more: Mapping[str, str]) -> None:
        """Tiers that this save is to reach after all (``close()``)."""
        with self._condition:
            self._planned.update(more)
            self._superseded -= more.keys()
            self._waiting |= more.keys()
            for label in more:
                self._failed.pop(label, None)  # it is tried once more

    def _pause(self, seconds: float) -> None:
        """Until something is told, or ``seconds``."""
        with self._condition:
            self._condition.wait(seconds)

    def _settled(self) -> bool:
        if not self.due or self.skipped or "ram" in self._failed:
            return True
        open_labels = self._planned.keys() - self._failed.keys() - self._superseded
        if open_labels & self._waiting:
            return False
        return all(_AT_OR_ABOVE[self._planned[label]] & self._reached for label in open_labels)

    def _raise_if_hopeless(self, stage: str, wanted: frozenset[str]) -> None:
        if self.skipped:
            raise SaveFailed(
                f"the save of step {self.step} was called off: {self.skipped}",
                stage=stage,
                step=self.step,
                state="earlier steps are unchanged",
            )
        labels = [label for label, gives in self._planned.items() if gives in wanted]
        if not labels:
            raise StageNotPlanned(
                f"no tier that is due at step {self.step} gives {stage!r}",
                stage=stage,
                step=self.step,
                actions=(
                    "save(..., tiers='all') makes every tier due",
                    "or wait for a step at which that tier is due",
                ),
            )
        errors = [self._failed[label] for label in labels if label in self._failed]
        if "ram" in self._failed:
            errors = [self._failed["ram"]]
        if errors and ("ram" in self._failed or len(errors) == len(labels)):
            raise SaveFailed(
                f"step {self.step} cannot become {stage}: {errors[0].what}",
                stage=stage,
                step=self.step,
                tier=getattr(errors[0], "tier", None),
                state="earlier steps are unchanged",
            ) from errors[0]
        if all(label in self._superseded or label in self._failed for label in labels):
            raise StageNotPlanned(
                f"step {self.step} was superseded: a newer step took its place on the way to "
                f"{', '.join(labels)}",
                stage=stage,
                step=self.step,
            )


class Restored:
    """What a restore did. ``bool()`` says whether a step was restored; step 0 is one.

    ``step`` is None and ``next_step`` 0 when there was nothing. ``sources`` counts bytes by tier;
    ``skipped`` maps newer unusable steps and silent tiers to the reason.
    """

    def __init__(
        self,
        step: int | None,
        state: Any,
        *,
        sources: Mapping[str, int] | None = None,
        skipped: Mapping[str, str] | None = None,
        elapsed_s: float = 0.0,
        id_: str = "",
    ) -> None:
        self.step = step
        self.next_step = 0 if step is None else step + 1
        self.sources = dict(sources or {})
        self.skipped = dict(skipped or {})
        self.elapsed_s = elapsed_s
        self.id = id_
        self._state = state
        self._incarnation = 0
        self._every = 0
        self._saved = ""  # by whom and when, for the log
        self._must_read = False  # new arrays are in the state, and nobody has looked

    @property
    def state(self) -> Any:
        """The restored state. Live objects are the ones given; functional state is new."""
        self._must_read = False
        return self._state

    def __bool__(self) -> bool:
        return self.step is not None

    def __repr__(self) -> str:
        if self.step is None:
            return "Restored(nothing)"
        return f"Restored(step={self.step}, {self._origin()}, {self.elapsed_s:.2f} s)"

    def __str__(self) -> str:
        if self.step is None:
            lines = ["nothing to restore: starting at step 0"]
        else:
            lines = [f"restored step {self.step} from {self._origin()} in {self.elapsed_s:.2f} s"]
        lines += [f"  passed over {what}: {why}" for what, why in self.skipped.items()]
        return "\n".join(lines)

    def _origin(self) -> str:
        parts = [f"{tier} ({size_text(size)})" for tier, size in self.sources.items()]
        return ", ".join(parts) or "no bytes"


def size_text(size_bytes: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Step:
    """One saved step. ``damaged`` has one line for every problem that is known of it."""

    step: int
    id: str
    tiers: tuple[str, ...]
    stages: tuple[str, ...]
    size_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    incarnation: int = 0
    abandoned: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """What each tier of a run holds and owes, as the agent told it."""

    run: str
    incarnation: int
    tiers: tuple[Mapping[str, Any], ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    every: int | None = None

    def __repr__(self) -> str:
        return f"Status({', '.join([repr(self.run), *self._words()])})"

    def _words(self) -> Iterator[str]:
        if self.incarnation:
            yield f"incarnation {self.incarnation}"
        for tier in self.tiers:
            newest, owed = tier.get("newest_step"), len(tier.get("owed") or ())
            words = f"{tier.get('label')}: {'nothing' if newest is None else f'step {newest}'}"
            if owed:
                words += f", owes {owed} step{'s' if owed > 1 else ''}"
            if tier.get("problem"):
                words += f": {str(tier['problem'])[:200]}"
            yield words
