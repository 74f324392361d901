"""The ranks of a job, and the few words they exchange: to restore together and to start together.

Knows what a group is and when a job needs one. Does not know frameworks: what joins ranks lives
with their adapters. Never on the path of a save: from the start of an incarnation on, each rank
speaks to the agent of its node only. Every exchange has a deadline and names who did not come.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from mtckpt.errors import CheckpointError, GroupMissing, RankTimeout, StepDisagreement, UsageError

__all__ = [
    "Group",
    "Meeting",
    "Single",
    "Store",
    "StoreGroup",
    "choose",
    "exchange",
    "leave",
    "together",
]

_PAUSE_S = (0.001, 0.1)
_LAST_READ_S = 2.0
# What a rank takes to meet the others, however little time it has: else they would not hear of it.
_MEETING_S = 1.0
_LEFT = "left"
_MAX_WHY = 500


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


class Store(Protocol):
    """Small values under keys that all ranks can see. Raises RuntimeError, whatever goes wrong.

    A call may block for as long as the store's host does not answer.
    """

    place: str
    """Where its host is, to name in errors; "" if that is not known."""

    def put(self, key: str, value: bytes) -> None:
        """Set a key, whatever it was before."""

    def have(self, directory: str, names: Sequence[str]) -> bool:
        """Whether all of ``directory/name`` are there."""

    def read(self, directory: str, names: Sequence[str]) -> dict[str, bytes]:
        """Those of ``directory/name`` that are there, by name."""

    def delete(self, key: str) -> None:
        """Remove a key."""


def host_of(group: Group) -> str:
    """Where the ranks of a job meet, by what joins them; "" if that does not say."""
    host, _, port = str(getattr(group, "place", "")).rpartition(":")
    return host.strip("[]") if port.isdigit() else ""


class StoreGroup:
    """Ranks that are joined by a key-value store. ``name`` keeps the runs of a job apart.

    It polls, so a rank that hangs does not take the others along, and who is missing can be said.

    A launcher may keep the store when it starts the ranks again (torchrun does), and in it what
    those before them gave. So they meet in a directory of a name that rank 0 has drawn, and it
    tells that only to who asks with a word that was drawn as well: nobody hears of another start.
    """

    def __init__(self, store: Store, rank: int, world_size: int, name: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self.place = store.place
        self._name = name
        self._door = f"mtckpt/{name}"
        self._directory = f"{self._door}/{_word()}" if rank == 0 else ""
        # That rank 0 may still have to let in, and the words of those that it has.
        self._strangers = [str(other) for other in range(1, world_size)] if rank == 0 else []
        self._known: set[bytes] = set()
        self._has_met = False
        self._turn = 0

    def exchange(self, stage: str, value: bytes, timeout_s: float) -> list[bytes]:
        """See ``Group.exchange``. What was exchanged before the last time is deleted."""
        turn = None
        if self._directory:
            turn, self._turn = self._turn, self._turn + 1
        deadline_s = time.monotonic() + timeout_s
        found: list[dict[str, bytes]] = []
        failure: list[BaseException] = []

        def talk() -> None:
            try:
                found.append(self._talk(turn, value, deadline_s))
            except BaseException as error:  # noqa: BLE001 - raised by the caller below
                failure.append(error)

        # What a store blocks in has its own idea of time, or none: it is left behind.
        thread = threading.Thread(target=talk, name="mtckpt-ranks", daemon=True)
        try:
            thread.start()
            thread.join(timeout_s + _LAST_READ_S)
        except RuntimeError as error:  # no thread is to be had
            failure.append(error)
        if failure and not isinstance(failure[0], RuntimeError):
            raise failure[0]
        if not found:
            raise self._silent(stage, timeout_s, failure) from (failure[0] if failure else None)
        return self._by_rank(stage, found[0], timeout_s)

    def _talk(self, turn: int | None, value: bytes, deadline_s: float) -> dict[str, bytes]:
        """Give ``value``, and wait until the deadline for what others give: what is there then.
        ``turn`` is None where this rank has not met them yet."""
        names = [str(rank) for rank in range(self.world_size)]
        if not self._has_met:
            deadline_s = max(deadline_s, time.monotonic() + _MEETING_S)
        if turn is None:
            turn = self._enter(deadline_s)
            if turn is None:  # all that is known is that rank 0 is not there
                return dict.fromkeys(names[1:], b"")
            self._turn = turn + 1
        directory = f"{self._directory}/{turn}"
        self._store.put(f"{directory}/{self.rank}", value)
        for _ in _pauses(deadline_s):
            if self._store.have(directory, names):
                break
            self._let_in(turn)
        found = self._store.read(directory, names)
        if len(found) == self.world_size:
            self._has_met, self._strangers = True, []
            if turn:
                # Everybody has come to this turn, so everybody has read the one before.
                self._store.delete(f"{self._directory}/{turn - 1}/{self.rank}")
        return found

    def _enter(self, deadline_s: float) -> int | None:
        """Find out where the others meet, and which turn it is; None where nobody says so."""
        word, answers = _word(), f"{self._door}/answers"
        self._store.put(f"{self._door}/asks/{self.rank}", word.encode())
        for _ in _pauses(deadline_s):
            if self._store.have(answers, [word]):
                # What it asked stays: rank 0 may just be reading it, and would wait for it.
                told = self._store.read(answers, [word])[word].decode()
                self._store.delete(f"{answers}/{word}")
                self._directory, _, turn = told.rpartition(" ")
                return int(turn)
        return None

    def _let_in(self, turn: int) -> None:
        """Tell those who ask where ranks meet: rank 0 does. One that is gone does not hear it."""
        if not self._strangers:
            return
        for word in self._store.read(f"{self._door}/asks", self._strangers).values():
            if word not in self._known:
                self._known.add(word)
                told = f"{self._directory} {turn}"
                self._store.put(f"{self._door}/answers/{word.decode()}", told.encode())

    def _silent(self, stage: str, timeout_s: float, failure: list[BaseException]) -> RankTimeout:
        where = f" at {self._store.place}" if self._store.place else ""
        why = f": {failure[0]}" if failure else f" within {timeout_s:.1f} s"
        return RankTimeout(
            f"{stage}: the host{where} of the store that joins the ranks did not answer{why}",
            stage=stage,
            rank=self.rank,
            timeout_s=round(timeout_s, 1),
            actions=(
                "look at the process that hosts it: the launcher, or rank 0",
                "give it longer: Checkpointer(timeout_s=...)",
            ),
        )

    def _by_rank(self, stage: str, found: dict[str, bytes], timeout_s: float) -> list[bytes]:
        names = [str(rank) for rank in range(self.world_size)]
        missing = [rank for rank, name in enumerate(names) if name not in found]
        if missing:
            same = () if self._has_met else (f"see that all ranks open the run {self._name!r}",)
            raise RankTimeout(
                f"{stage}: {_listed(missing)} of {self.world_size} did not come"
                f" within {timeout_s:.1f} s",
                stage=stage,
                rank=missing[0],
                ranks=missing,
                timeout_s=round(timeout_s, 1),
                actions=(*same, *RankTimeout.usual_actions),
            )
        return [found[name] for name in names]


def _word() -> str:
    return os.urandom(8).hex()


def _pauses(deadline_s: float) -> Iterator[None]:
    """Once at least, and until the deadline: ever longer pauses between looks."""
    pause_s, most_s = _PAUSE_S
    yield
    while time.monotonic() < deadline_s:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, most_s)
        yield


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


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
                actions=("leave it out: torch.distributed and jax.distributed are found",),
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
                "call torch.distributed.init_process_group() (or jax.distributed.initialize())"
                " before the first restore or save",
                "or give Checkpointer(group=...)",
                "or unset WORLD_SIZE, if this process trains by itself",
            ),
        )
    return Single()


def exchange(group: Group, stage: str, value: object, timeout_s: float) -> list[object]:
    """``Group.exchange`` of anything that JSON has.

    Raises StepDisagreement with the ranks that are at another stage: each would take what the
    others gave for something else; RankTimeout where one said that it does not come.
    """
    if group.world_size == 1:
        return [value]
    data = group.exchange(stage, msgspec.json.encode((stage, value)), timeout_s)
    told = [msgspec.json.decode(each, type=tuple[str, Any]) for each in data]
    for rank, (at, why) in enumerate(told):
        if at == _LEFT:
            raise RankTimeout(
                f"{stage}: rank {rank} does not come: {why}",
                stage=stage,
                rank=rank,
                ranks=[rank],
                actions=("look at the log of that rank",),
            )
    elsewhere = [rank for rank, (at, _) in enumerate(told) if at != stage]
    if elsewhere:
        first = elsewhere[0]
        raise StepDisagreement(
            f"rank {first} is at {told[first][0]!r} while rank {group.rank} is at {stage!r}",
            stage=stage,
            rank=first,
            ranks=elsewhere,
        )
    return [each for _, each in told]


def leave(group: Group, error: BaseException) -> None:
    """Tell the others, who wait for this rank or are about to, that it does not come, and why. It
    does not wait for them, nor for long for what joins them."""
    if group.world_size == 1:
        return
    why = type(error).__name__
    # Whatever keeps it from saying so, the error that it leaves by is the one to be raised.
    with contextlib.suppress(Exception):
        text = error.what if isinstance(error, CheckpointError) else f"{why}: {error}"
        why = text[:_MAX_WHY].encode(errors="replace").decode()
    with contextlib.suppress(Exception):
        group.exchange(_LEFT, msgspec.json.encode((_LEFT, why)), 0.0)


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


class Meeting:
    """Whether all ranks know of the error that ends what they do together."""

    def __init__(self) -> None:
        self._heard = False

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Around what they exchange: errors of ours that end it are known to all of them."""
        self._heard = False
        try:
            yield
        except CheckpointError:
            self._heard = True
            raise

    @contextlib.contextmanager
    def of(self, group: Group) -> Iterator[None]:
        """Around all of it: a rank that leaves it, interrupted or by an error that is its own,
        tells the others, who would wait for it until their time-out."""
        self._heard = False
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if not self._heard:
                self._heard = True
                leave(group, error)
            raise
