"""Every error that mtckpt raises, as one tree.

    CheckpointError
    |-- UsageError (ValueError)      the call itself cannot be right; nothing was done
    |   |-- UnsupportedState           a value in the state that cannot be saved, with its path and type
    |   |-- StageNotPlanned            wait(stage) for a stage that no due tier gives
    |   |-- StepExists                 the same step twice in one incarnation
    |   |-- GroupMissing               more than one rank, and no group that joins them
    |   |-- UnsupportedPlatform        saving where the operating system lacks what it needs
    |   |-- ForkedProcess              a Checkpointer used in a fork of the process that opened it
    |   `-- RestoreIgnored             functional state was restored and never read
    |-- SaveFailed                   a save did not reach a stage; its cause is the tier's error
    |   `-- CaptureFailed              the state could not be copied; the step was not started
    |-- CloseFailed                  what was still owed when close() gave up; .errors has each
    |-- WaitTimeout (TimeoutError)   a stage was not reached within the deadline; the work goes on
    |-- RestoreError
    |   |-- NoHealthyStep              steps exist and none of them is usable, a line a step
    |   |-- StepNotFound               the step that was asked for is in no tier
    |   |-- RestoreUnavailable         a tier did not answer, and no other one has a step
    |   |-- StateMismatch              the template and the checkpoint differ; live state is unchanged
    |   `-- RestoreFailed              live state may be part old, part new (state="undefined")
    |-- RunLocked                    another live process owns the run, or took it over
    |-- AgentUnavailable             the node agent did not answer within the deadline
    |   `-- AgentTooOld                it speaks another version of the protocol
    |-- TierError                    carries tier, key and step
    |   |-- ObjectNotFound             the tier answered: not there
    |   |-- AlreadyExists              the key is taken; nothing is ever replaced
    |   |-- TierUnavailable            the tier did not answer, or not in time
    |   |-- TierFull                   no room, with the arithmetic
    |   |-- TierReadOnly               the tier refuses every write
    |   |-- AccessDenied               this user may not do that, or a path is not safe to follow
    |   `-- ShortRead                  fewer bytes than the object should have
    `-- FormatError                  bytes that are not what they should be
        |-- Damaged                    a digest, size or identity does not match
        `-- FormatTooNew               written by a later version of mtckpt

Every message says what and where with the value, the state the user is left in, and what to do, one
action a line. Attributes carry the same facts for programs. ``docs/errors.md`` has an anchor a class.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AccessDenied",
    "AgentTooOld",
    "AgentUnavailable",
    "AlreadyExists",
    "CaptureFailed",
    "CheckpointError",
    "CloseFailed",
    "Damaged",
    "ForkedProcess",
    "FormatError",
    "FormatTooNew",
    "GroupMissing",
    "NoHealthyStep",
    "ObjectNotFound",
    "RestoreError",
    "RestoreFailed",
    "RestoreIgnored",
    "RestoreUnavailable",
    "RunLocked",
    "SaveFailed",
    "ShortRead",
    "StageNotPlanned",
    "StateMismatch",
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
    enough to find the tier, key, step, rank or leaf path.
    """

    def __init__(
        self, what: str, *, state: str = "", actions: Sequence[str] = (), **details: object
    ) -> None:
        self.what = what
        self.state = state
        self.actions = tuple(actions)
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
        # ours are keywords, so it is rebuilt from all of them.
        return (_rebuild, (type(self), self.what, self.state, self.actions, self.details))


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


class UnsupportedState(UsageError):
    """A value in the state has a type that cannot be saved. Carries ``path`` and ``type_name``."""


class StageNotPlanned(UsageError):
    """No tier that is due at this step gives the stage waited for. Carries ``stage``."""


class StepExists(UsageError):
    """This incarnation has saved this step already. Carries ``step``."""


class GroupMissing(UsageError):
    """The job has more than one rank and no group joins them. Carries ``world_size``."""


class UnsupportedPlatform(UsageError):
    """This operating system can read checkpoints, not take part in a run."""


class ForkedProcess(UsageError):
    """The Checkpointer belongs to the process that opened it. Carries ``owner_pid``, ``pid``."""


class RestoreIgnored(UsageError):
    """``Restored.state`` holds new arrays and was never read before the next save."""


class SaveFailed(CheckpointError):
    """A save cannot reach a stage. Carries ``stage``, ``tier``, ``step``; the cause is attached."""


class CaptureFailed(SaveFailed):
    """The state could not be copied: the step was not started, the next save works."""


class CloseFailed(CheckpointError):
    """``close()`` gave up with work still owed. ``errors`` has one error for each piece of it."""

    errors: tuple[CheckpointError, ...] = ()


class WaitTimeout(CheckpointError, TimeoutError):
    """A stage was not reached in time; the work goes on. Carries ``stage``, ``step``, ``timeout_s``."""


class RestoreError(CheckpointError):
    """A restore that did not happen; live state is as it was unless the class says otherwise."""


class NoHealthyStep(RestoreError):
    """Steps exist and none is usable. ``reasons`` has one line a step."""


class StepNotFound(RestoreError):
    """The step asked for by number or name is in no tier. Carries ``step``."""


class RestoreUnavailable(RestoreError):
    """A tier could not be looked into, and no other one has a step. Carries ``tiers``."""


class StateMismatch(RestoreError):
    """Template and checkpoint differ. ``missing``, ``unused`` and ``differing`` are the full diff."""


class RestoreFailed(RestoreError):
    """Live state was being overwritten and no step is left: ``live_state`` is "undefined"."""


class RunLocked(CheckpointError):
    """A live process owns this run. Carries ``run``, ``owner_pid``, ``owner_host``."""


class AgentUnavailable(CheckpointError):
    """The node agent does not answer. Carries ``socket`` and ``timeout_s``."""


class AgentTooOld(AgentUnavailable):
    """The agent speaks another protocol version. Carries ``agent_version``, ``wanted_version``."""


class TierError(CheckpointError):
    """Something a tier said. Carries ``tier``, and ``key`` where there is one."""


class ObjectNotFound(TierError):
    """The tier answered, and the object is not there."""


class AlreadyExists(TierError):
    """The key is taken. Nothing in a tier is ever replaced."""


class TierUnavailable(TierError):
    """The tier did not answer, or not in time. Carries ``timeout_s`` where a deadline passed."""


class TierFull(TierError):
    """No room. Carries ``needed_bytes`` and ``free_bytes`` where they are known."""


class TierReadOnly(TierError):
    """The tier refuses writes (a read-only mount)."""


class AccessDenied(TierError):
    """The user may not do that here, or a path is not safe to follow (link, foreign owner)."""


class ShortRead(TierError):
    """The object ended early. Carries ``wanted_bytes`` and ``got_bytes``."""


class FormatError(CheckpointError):
    """Bytes that are not a file of this format. Carries ``key`` or ``path`` where known."""


class Damaged(FormatError):
    """A digest, size or identity does not match what was saved. Carries ``tier`` and ``key``."""


class FormatTooNew(FormatError):
    """Written by a later version. Carries ``version`` and ``supported``."""
