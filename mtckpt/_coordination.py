"""The ranks of a job, and the few words they exchange: to restore together and to start together.

Knows what a group is and when a job needs one. Does not know frameworks: what joins ranks lives
with their adapters. Never on the path of a save: from the start of an incarnation on, each rank
speaks to the agent of its node only. Every exchange has a deadline and names who did not come.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import msgspec

from mtckpt.errors import CheckpointError, GroupMissing, StepDisagreement, UsageError

__all__ = ["Group", "Single", "choose", "exchange", "same", "together"]


@runtime_checkable
class Group(Protocol):
    """What joins the ranks of a job. One object a process, used by one thread at a time."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        """Give ``value``, and get what every rank gave, by rank. All ranks call it alike.

        Raises RankTimeout with the ranks that did not come within ``timeout_s``.
        """


class Single:
    """A job of one rank."""

    rank = 0
    world_size = 1

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        """What was given."""
        del stage, timeout_s
        return [value]


def choose(given: object, find: Callable[[], Group | None]) -> Group:
    """The group of this job: ``given``, else the one that ``find`` finds.

    Raises GroupMissing for a job of several ranks without one: never N single runs under one name.
    """
    if given is not None:
        if not isinstance(given, Group):
            raise UsageError(
                f"group={given!r}: must have rank, world_size and exchange()",
                actions=("leave it out: torch.distributed is found by itself",),
            )
        return given
    found = find()
    if found is not None:
        return found
    text = os.environ.get("WORLD_SIZE", "1")
    world_size = int(text) if text.isdigit() else 1
    if world_size > 1:
        raise GroupMissing(
            f"the launcher says that this job has {world_size} ranks, and nothing joins them",
            world_size=world_size,
            state="nothing was done",
            actions=(
                "call torch.distributed.init_process_group() before the first restore or save",
                "or give Checkpointer(group=...)",
                "or unset WORLD_SIZE, if this process trains by itself",
            ),
        )
    return Single()


def exchange(group: Group, stage: str, value: object, timeout_s: float) -> list[object]:
    """``Group.exchange`` of anything that JSON has."""
    if group.world_size == 1:
        return [value]
    data = group.exchange(stage, msgspec.json.encode(value), timeout_s)
    return [msgspec.json.decode(each) for each in data]


def same(group: Group, stage: str, what: str, value: object, timeout_s: float) -> None:
    """Raise StepDisagreement, on every rank, unless all of them have the same value."""
    values = [str(each) for each in exchange(group, stage, value, timeout_s)]
    if len(set(values)) > 1:
        others = [rank for rank, each in enumerate(values) if each != values[0]]
        raise StepDisagreement(
            f"ranks have different {what}: rank 0 has {values[0]}, rank {others[0]} has"
            f" {values[others[0]]}",
            stage=stage,
            ranks=others,
            state="nothing was done",
            actions=("call restore and save on every rank, with the same arguments",),
        )


@contextlib.contextmanager
def together(
    group: Group,
    stage: str,
    timeout_s: float,
    foreign: Callable[[int, str, str], CheckpointError],
) -> Iterator[None]:
    """Do what is inside on all ranks or on none.

    An error of ours on this rank is raised as it is, after the others were told. One of another
    rank is raised as ``foreign(rank, class name, text)``.
    """
    failure: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        failure = error
    told = None if failure is None else [type(failure).__name__, failure.what]
    try:
        answers = exchange(group, stage, told, timeout_s)
    except CheckpointError:
        if failure is not None:
            raise failure from None  # it explains more than that others did not come to hear it
        raise
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if isinstance(answer, list):
            raise foreign(rank, str(answer[0]), str(answer[1]))
