"""Every error that mtckpt raises, as one tree.

    CheckpointError
    |-- UsageError (ValueError)      the call itself cannot be right; nothing was done
    |   |-- UnsupportedState           a value that cannot be saved, with its path and type
    |   |-- StageNotPlanned            wait(stage) for a stage that no due tier gives
    |   |-- StepExists                 the same step twice in one incarnation
    |   |-- GroupMissing               more than one rank, and no group that joins them
    |   |-- PlacementImpossible        too few nodes or domains for the copies insisted on
    |   |-- UnsupportedPlatform        saving where the operating system lacks what it needs
    |   |-- ForkedProcess              a Checkpointer used in a fork of the process that opened it
    |   `-- RestoreIgnored             functional state was restored and never read
    |-- SaveFailed                   a save did not reach a stage; its cause is the tier's error
    |   `-- CaptureFailed              the state could not be copied; the step was not started
    |       `-- CaptureStuck             a device did not come to the copy, or to its end, in time
    |-- RankTimeout (TimeoutError)   ranks did not come within the deadline; says which, at what
    |-- StepDisagreement             ranks want different things at the same time; nothing was done
    |-- CloseFailed                  what was still owed when close() gave up; .errors has each
    |-- WaitTimeout (TimeoutError)   a stage was not reached within the deadline; the work goes on
    |-- RestoreError
    |   |-- NoHealthyStep              steps exist and none of them is usable, a line a step
    |   |-- StepNotFound               the step that was asked for is in no tier
    |   |-- RestoreUnavailable         a tier did not answer, and no other one has a step
    |   |-- StateMismatch (ValueError) template and checkpoint differ; live state is unchanged
    |   `-- RestoreFailed              live state may be part old, part new (state="undefined")
    |-- RunLocked                    another live process owns the run, or took it over
    |-- AgentUnavailable             the node agent did not answer within the deadline
    |   `-- AgentTooOld                it speaks another version of the protocol
    |-- NodeDraining                 the node is about to go away: its agent takes nothing new
    |-- TierError                    carries tier, key and step
    |   |-- ObjectNotFound             the tier answered: not there
    |   |-- AlreadyExists              the key is taken; nothing is ever replaced
    |   |-- CommitConflict             another job committed this step in the store
    |   |-- TierUnavailable            the tier did not answer, or not in time
    |   |-- TierFull                   no room, with the arithmetic
    |   |-- TierReadOnly               the tier refuses every write
    |   |-- AccessDenied               this user may not do that, or a path is not safe to follow
    |   `-- ShortRead                  fewer bytes than the object should have
    `-- FormatError                  bytes that are not what they should be
        |-- Damaged                    a digest, size or identity does not match
        `-- FormatTooNew               written by a later version of mtckpt

Every message says what and where with the value, the state the user is left in, and what to do, one
action a line. Attributes carry the same facts for programs. ``docs/errors.md`` has an anchor for
each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "AccessDenied",
    "AgentTooOld",
    "AgentUnavailable",
    "AlreadyExists",
    "CaptureFailed",
    "CaptureStuck",
    "CheckpointError",
    "CloseFailed",
    "CommitConflict",
    "Damaged",
    "ForkedProcess",
    "FormatError",
    "FormatTooNew",
    "GroupMissing",
    "NoHealthyStep",
    "NodeDraining",
    "ObjectNotFound",
    "PlacementImpossible",
    "RankTimeout",
    "RestoreError",
    "RestoreFailed",
    "RestoreIgnored",
    "RestoreUnavailable",
    "RunLocked",
    "SaveFailed",
    "ShortRead",
    "StageNotPlanned",
    "StateMismatch",
    "StepDisagreement",
    "StepExists",
    "StepNotFound",
    "TierError",
    "TierFull",
    "TierReadOnly",
    "TierUnavailable",
    "UnsupportedPlatform",
    "UnsupportedState",
    "UsageError",
    "WaitTimeout",
]

DOCS = "https://mtckpt.readthedocs.io/errors"


class CheckpointError(Exception):
    """The root. ``details`` are the facts the message names; ``actions`` are what the user can do.

    Any keyword becomes an attribute and a ``name=value`` in the text, so that a log line alone is
    enough to find the tier, key, step, rank or leaf path. ``usual_state`` and ``usual_actions`` are
    what a class says where the one who raised it has nothing more precise.
    """

    usual_state: ClassVar[str] = ""
    usual_actions: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, what: str, *, state: str = "", actions: Sequence[str] = (), **details: object
    ) -> None:
        self.what = what
        self.state = state or self.usual_state
        self.actions = tuple(actions) or self.usual_actions
        self.details = {name: value for name, value in details.items() if value is not None}
        for name, value in self.details.items():
            setattr(self, name, value)
        super().__init__(what)

    def __str__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.details.items())
        lines = [f"{self.what} [{facts}]" if facts else self.what]
        if self.state:
            lines.append(f"  state: {self.state}")
        lines += [f"  try: {action}" for action in self.actions]
        lines.append(f"  docs: {DOCS}#{type(self).__name__.lower()}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # An exception travels between processes (multiprocessing, pytest-xdist) by its arguments;
        # ours are keywords, so it is rebuilt from all of them. What was set later (the errors of a
        # CloseFailed, the full diff of a StateMismatch) is in its dict.
        made_from = (type(self), self.what, self.state, self.actions, self.details)
        return (_rebuild, made_from, dict(self.__dict__))


def _rebuild(
    cls: type[CheckpointError],
    what: str,
    state: str,
    actions: tuple[str, ...],
    details: dict[str, object],
) -> CheckpointError:
    return cls(what, state=state, actions=actions, **details)


class UsageError(CheckpointError, ValueError):
    """The call itself cannot be right: nothing was done."""

    usual_state = "nothing was done"
    usual_actions: ClassVar[tuple[str, ...]] = (
        "correct the call: the text above says what it may be",
    )


class UnsupportedState(UsageError):
    """A value in the state has a type that cannot be saved. Carries ``path`` and ``type_name``."""


class StageNotPlanned(UsageError):
    """No tier that is due at this step gives the stage waited for. Carries ``stage``."""


class StepExists(UsageError):
    """This incarnation has saved this step already. Carries ``step``."""


class GroupMissing(UsageError):
    """The job has more than one rank and no group joins them. Carries ``world_size``."""


class PlacementImpossible(UsageError):
    """There are too few nodes or domains for the copies. Carries ``copies``, ``warnings``."""

    usual_state = "nothing was placed"
    usual_actions = (
        "add nodes in other failure domains, or ask for fewer copies",
        "leave strict_placement out: the same is then a warning, and copies go where they can",
    )


class UnsupportedPlatform(UsageError):
    """This operating system can read checkpoints, not take part in a run."""


class ForkedProcess(UsageError):
    """The Checkpointer belongs to the process that opened it. Carries ``owner_pid``, ``pid``."""


class RestoreIgnored(UsageError):
    """``Restored.state`` holds new arrays and was never read before the next save."""


class SaveFailed(CheckpointError):
    """A save cannot reach a stage. Carries ``stage``, ``tier``, ``step``; the cause is attached."""

    usual_state = "earlier steps are unchanged, and training may go on"
    usual_actions = ("see its cause and `mtckpt status`, or open the run with on_failure='warn'",)


class CaptureFailed(SaveFailed):
    """The state could not be copied: the step was not started, the next save works."""

    usual_state = "the step was not started; earlier steps are unchanged; the next save works"
    usual_actions = ("look at the cause of this error: it was raised by the state itself",)


class CaptureStuck(CaptureFailed):
    """A device has not done the copy in time, or what comes before it; its slot is left to it."""

    usual_state = "the step was not saved; earlier steps are unchanged"
    usual_actions = ("see whether a collective of the training step hangs: py-spy dump",)


class RankTimeout(CheckpointError, TimeoutError):
    """Other ranks did not come in time. Carries ``rank``, the first of them, and ``stage``."""

    usual_state = "nothing was done; earlier steps are unchanged"
    usual_actions = (
        "look at that rank: py-spy dump shows where it hangs, its log why it ended",
        "give it longer: Checkpointer(timeout_s=...)",
    )


class StepDisagreement(CheckpointError):
    """Ranks want different things at the same time. Nothing was committed. Carries ``stage``."""

    usual_state = "nothing was committed; earlier steps are unchanged"
    usual_actions = ("call restore and save on every rank, in the same order, with the same steps",)


class CloseFailed(CheckpointError):
    """``close()`` gave up with work still owed. ``errors`` has one error for each piece of it."""

    usual_state = "what was staged stays in memory of this node until it is flushed"
    usual_actions = ("look at `mtckpt status`",)

    errors: tuple[CheckpointError, ...] = ()


class WaitTimeout(CheckpointError, TimeoutError):
    """A stage was not reached in time, the work goes on: ``stage``, ``step``, ``timeout_s``."""

    usual_state = "the work goes on"
    usual_actions = ("wait longer, or look at `mtckpt status`",)


class RestoreError(CheckpointError):
    """A restore that did not happen; live state is as it was unless the class says otherwise."""

    usual_state = "live state unchanged"
    usual_actions = (
        "mtckpt ls --all lists what is there, mtckpt verify --read-data what is wrong with it",
    )


class NoHealthyStep(RestoreError):
    """Steps exist and none is usable. ``reasons`` has one line a step."""


class StepNotFound(RestoreError):
    """The step asked for by number or name is in no tier. Carries ``step``."""


class RestoreUnavailable(RestoreError):
    """A tier could not be looked into, and no other one has a step. Carries ``tiers``."""


class StateMismatch(RestoreError, ValueError):
    """Template and checkpoint differ: ``missing``, ``unused``, ``differing`` are the full diff.

    A ValueError, too, as Orbax raises, and optimizers of torch do.
    """


class RestoreFailed(RestoreError):
    """Live state was being overwritten and no step is left: ``live_state`` is "undefined". Where
    memory or a device failed before, it is "unchanged"."""

    usual_state = "live state is undefined: part old, part new"
    usual_actions = ("do not train on it: build the objects anew, and restore again",)


class RunLocked(CheckpointError):
    """A live process owns this run. Carries ``run``, ``owner_pid``, ``owner_host``."""

    usual_state = "saves of this process are refused; what was saved before is kept"
    usual_actions = ("end the other process, or give this job another run name",)


class AgentUnavailable(CheckpointError):
    """The node agent does not answer. Carries ``socket`` and ``timeout_s``."""

    usual_state = "what was sealed before is kept; training can go on"
    usual_actions = (
        "mtckpt doctor says whether an agent runs, and agent.log beside its socket why not",
    )


class AgentTooOld(AgentUnavailable):
    """The agent speaks another protocol version. Carries ``agent_version``, ``wanted_version``."""


class NodeDraining(CheckpointError):
    """This node is about to go away, and begins nothing new. The text says who said so."""

    usual_state = "nothing was done; what is here is being brought elsewhere"
    usual_actions = (
        "start on another node",
        "or, if the node stays after all: mtckpt agent drain --cancel",
    )


class TierError(CheckpointError):
    """Something a tier said. Carries ``tier``, and ``key`` where there is one."""

    usual_state = "what the tier held before is unchanged"
    usual_actions = ("look at the cause of this error, and at dmesg",)


class ObjectNotFound(TierError):
    """The tier answered, and the object is not there."""

    usual_state = "nothing was changed"
    usual_actions = ("another copy is used where there is one; else look at the key: mtckpt ls",)


class AlreadyExists(TierError):
    """The key is taken. Nothing in a tier is ever replaced."""

    usual_state = "it is unchanged, and nothing was stored"
    usual_actions = ("delete the object first, or choose another key",)


class CommitConflict(TierError):
    """Another save of this step was committed in the store. Carries ``step``, ``other_save_id``."""

    usual_state = "the other save is unchanged, and this one was withdrawn from the store"
    usual_actions = (
        "end one of the two jobs that write this run, or give one of them another run name",
    )


class TierUnavailable(TierError):
    """The tier did not answer, or not in time. Carries ``timeout_s`` where a deadline passed."""

    usual_state = "what the tier held before is unchanged"
    usual_actions = ("see whether the device or mount answers: ls, dmesg",)


class TierFull(TierError):
    """No room. Carries ``needed_bytes`` and ``free_bytes`` where they are known."""

    usual_state = "what the tier held before is unchanged"
    usual_actions = ("make room there, or keep fewer steps",)


class TierReadOnly(TierError):
    """The tier refuses writes (a read-only mount)."""

    usual_state = "nothing was changed"
    usual_actions = ("mount it writable, or open it for writing",)


class AccessDenied(TierError):
    """The user may not do that here, or a path is not safe to follow (link, foreign owner)."""

    usual_state = "nothing was changed"
    usual_actions = ("fix owner and mode of what is named above, or choose another directory",)


class ShortRead(TierError):
    """The object ended early. Carries ``wanted_bytes`` and ``got_bytes``."""

    usual_state = "nothing was changed"
    usual_actions = (
        "mtckpt verify --read-data shows every damaged file; another copy is used if there is one",
    )


class FormatError(CheckpointError):
    """Bytes that are not a file of this format. Carries ``key`` or ``path`` where known."""

    usual_state = "nothing of it was used"
    usual_actions = (
        "mtckpt verify --read-data shows every damaged file; another copy is used if there is one",
    )


class Damaged(FormatError):
    """A digest, size or identity does not match what was saved. Carries ``tier`` and ``key``."""


class FormatTooNew(FormatError):
    """Written by a later version. Carries ``version`` and ``supported``."""

    usual_state = "nothing of it was used"
    usual_actions = ("upgrade mtckpt where this is read",)
