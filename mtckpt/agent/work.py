"""What the control process asks of a data process, and what it gets back.

Typed JSON, one message a line, over a socket pair: ``Request`` one way, ``Reply`` the other. A
reply has progress (any number of times), then exactly one of result and error. Nothing here
moves bytes or decides anything. Both ends are of one version of mtckpt, so there is none here.

A command is carried out by the data process of ``place_of(command)``: a disk that hangs then holds
up nobody but itself. The control process never has two commands that change the same save in the
same tier under way at once; everything else may run side by side.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from mtckpt import errors
from mtckpt._access import Access
from mtckpt._manifest import Incarnation
from mtckpt.agent.protocol import TierConfig, WireError

__all__ = ["Command", "Progress", "Reply", "Request", "Result", "TierRef", "place_of"]

# A scan of ten thousand saves of a thousand ranks fits; a stray stream of bytes does not.
MAX_LINE_BYTES = 256 * 1024 * 1024
RUN_CONFIG_VERSION = 1


class TierRef(msgspec.Struct, frozen=True):
    """A tier by its place. ``label`` is the name in its errors; ``bytes_per_s`` 0 is no limit."""

    kind: Literal["ram", "disk", "store"]
    path: str
    group_access: bool = False
    label: str = ""
    bytes_per_s: int = 0
    access: Access = Access()


# -- commands --------------------------------------------------------------------------------------


class Ping(msgspec.Struct, frozen=True, tag=True):
    """-> Pong, whatever else the process is doing."""


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """-> SlotFiles, or TierFull with nothing left behind. AlreadyExists: free that id first.
    Given again, it frees what the process that died had made of that id.

    The pages are reserved and charged to the agent, not faulted in: measured, that does not shorten
    the trainer's first capture, whose own page tables are what costs.
    """

    tier: TierRef
    run_key: str
    slot_id: str
    shard_bytes: int
    table_bytes: int


class SealSlot(msgspec.Struct, frozen=True, tag=True):
    """-> SealedSlot: the captured slot becomes the shard of ``rank`` in ``save``.

    ``verify`` reads all data (the owner is dead, or the agent was). Repeating a seal that
    succeeded is answered again. Damaged: the slot is freed and nothing is offered. AlreadyExists:
    another slot was sealed as this shard; both are unchanged. ObjectNotFound: no such slot.
    """

    tier: TierRef
    run_key: str
    slot_id: str
    inode: int
    save: str
    rank: int
    verify: bool = False


class Recycle(msgspec.Struct, frozen=True, tag=True):
    """-> Recycled: the shard stops being one and its files are slot ``slot_id``, not zeroed."""

    tier: TierRef
    run_key: str
    save: str
    rank: int
    slot_id: str


class Free(msgspec.Struct, frozen=True, tag=True):
    """-> Freed: the slot's files are gone. A slot that is not there is no error."""

    tier: TierRef
    run_key: str
    slot_id: str


class Scan(msgspec.Struct, frozen=True, tag=True):
    """-> Scanned: every run, or one. ``repair`` undoes what a crash left.

    Only for the owner, at its start: nothing else may be under way in that tier meanwhile.

    A half-sealed slot becomes a finished slot again, a half-recycled one is freed, temporaries of
    dead writers go. Finished slots are reported, not sealed; a save directory without any record
    is reported with no ranks: a flush goes on there, or a Delete ends it.
    """

    tier: TierRef
    run_key: str | None = None
    repair: bool = True


class Flush(msgspec.Struct, frozen=True, tag=True):
    """-> Flushed: one shard copied and verified on the way, record last; streams Progress.

    Any error leaves nothing on the target that this command stored. Damaged names the tier that
    is damaged, always the source: a damaged copy on the target is set aside and written anew.
    RunLocked: a store has a later incarnation than ``incarnation``, if that is given. ``is_last``:
    it looks then whether the save is complete. ``base``: a save there to copy equal parts from.
    """

    run_key: str
    save: str
    rank: int
    source: TierRef
    target: TierRef
    incarnation: int = 0
    is_last: bool = True
    base: str = ""


class Complete(msgspec.Struct, frozen=True, tag=True):
    """-> Completed: what a flush does last, for a save whose records were all there already.

    CommitConflict: another save of its step was committed in the store; this one is gone from it.
    """

    tier: TierRef
    run_key: str
    save: str


class Verify(msgspec.Struct, frozen=True, tag=True):
    """-> Verified: read back and checked; past the page cache where that is possible."""

    tier: TierRef
    run_key: str
    save: str
    rank: int
    read_data: bool = True


class Delete(msgspec.Struct, frozen=True, tag=True):
    """-> Deleted: a save and all in its directory, records first. Not a shard of it is half gone:
    ``busy`` means that a reader has a lease and nothing was changed. ``records_only`` goes no
    further than the records."""

    tier: TierRef
    run_key: str
    save: str
    records_only: bool = False


class Heal(msgspec.Struct, frozen=True, tag=True):
    """-> Healed: the bad files of ``bad`` replaced by verified copies from ``good``.

    ``good`` is verified whole first; if it is damaged too, nothing is changed and Damaged names it.
    A slot that is healed has a new inode.
    """

    run_key: str
    save: str
    rank: int
    bad: TierRef
    good: TierRef


class PutSmall(msgspec.Struct, frozen=True, tag=True):
    """-> Stored: an incarnation or metrics file. The same bytes again are fine, others are not."""

    tier: TierRef
    key: str
    data: bytes


class Owner(msgspec.Struct, frozen=True):
    """One Checkpointer of a run, as the next agent needs to know it."""

    holder: str
    rank: int
    pid: int
    start_ticks: int
    incarnation: int = 0
    world_size: int = 1
    parent_pid: int = 0


class RunConfig(msgspec.Struct, frozen=True):
    """What an agent must know of a run to go on where another stopped. Kept in the RAM tier.

    ``extra`` belongs to the control process alone.
    """

    run: str
    run_key: str
    tiers: list[TierConfig] = []
    owners: list[Owner] = []
    incarnation: int = 0
    incarnation_id: str = ""
    extra: dict[str, Any] = {}
    version: int = RUN_CONFIG_VERSION


class WriteRunConfig(msgspec.Struct, frozen=True, tag=True):
    """-> Stored: replaces the run's configuration, whole or not at all."""

    tier: TierRef
    config: RunConfig


class ReadRunConfigs(msgspec.Struct, frozen=True, tag=True):
    """-> RunConfigs: of every run in the RAM tier; unreadable ones are listed as problems."""

    tier: TierRef


class Wipe(msgspec.Struct, frozen=True, tag=True):
    """-> Freed: everything of a run in this tier: saves, slots, configuration."""

    tier: TierRef
    run_key: str


Command: TypeAlias = (
    Ping
    | Allocate
    | SealSlot
    | Recycle
    | Free
    | Scan
    | Flush
    | Complete
    | Verify
    | Delete
    | Heal
    | PutSmall
    | WriteRunConfig
    | ReadRunConfigs
    | Wipe
)


_SLOWNESS = {"ram": 0, "disk": 1, "store": 2}


def place_of(command: Command) -> TierRef | None:
    """The tier whose data process carries the command out; None for Ping, which any answers."""
    if isinstance(command, Ping):
        return None
    if isinstance(command, Flush):
        return max(command.target, command.source, key=lambda ref: _SLOWNESS[ref.kind])
    if isinstance(command, Heal):
        # Whichever end may hang: RAM is healed by the process of the disk it is healed from.
        return max(command.bad, command.good, key=lambda ref: _SLOWNESS[ref.kind])
    return command.tier


# -- results ---------------------------------------------------------------------------------------


class Pong(msgspec.Struct, frozen=True, tag=True):
    pid: int


class SlotFiles(msgspec.Struct, frozen=True, tag=True):
    """A slot and what a trainer opens. ``inode`` is the data file's; the record is empty."""

    slot_id: str
    inode: int
    data_path: str
    table_path: str
    record_path: str
    shard_bytes: int
    table_bytes: int


class SealedSlot(msgspec.Struct, frozen=True, tag=True):
    """What the record says. ``again``: it was sealed before."""

    save: str
    save_id: str
    step: int
    incarnation: int
    incarnation_id: str
    rank: int
    world_size: int
    size_bytes: int
    due: list[str] = []
    metrics: dict[str, float] = {}
    aborted: str = ""
    plan_digest: str = ""
    again: bool = False


class Recycled(msgspec.Struct, frozen=True, tag=True):
    """``files`` is None while a reader holds a lease; nothing was changed then."""

    files: SlotFiles | None


class Freed(msgspec.Struct, frozen=True, tag=True):
    freed_bytes: int


class SaveScan(msgspec.Struct, frozen=True):
    """One save in one tier. No ranks: a directory without a record, no save (yet, or any more).

    ``committed``: a store has its marker. ``saved_at_s`` is the writer's clock: for a rule in hours
    and for people, never for order. ``shard_bytes`` is in the order of ``ranks``.
    """

    save: str
    step: int
    incarnation: int
    ranks: list[int] = []
    world_size: int = 0
    complete: bool = False
    size_bytes: int = 0
    save_id: str = ""
    incarnation_id: str = ""
    due: list[str] = []
    metrics: dict[str, float] = {}
    problems: list[str] = []
    aborted: str = ""
    saved_at_s: float = 0.0
    committed: bool = False
    shard_bytes: list[int] = []


class SlotScan(msgspec.Struct, frozen=True):
    """One slot in the slots' directory. ``save`` is set where the capture is finished: the record
    parses, fits the sizes, and the table carries its generation; the data was not read."""

    slot_id: str
    inode: int
    shard_bytes: int
    table_bytes: int
    generation: int = 0
    save: str = ""
    save_id: str = ""
    rank: int = -1
    step: int = -1
    incarnation: int = 0
    due: list[str] = []


class RunScan(msgspec.Struct, frozen=True):
    """One run in one tier. ``repaired`` has a line for each thing that a crash had left."""

    run_key: str
    saves: list[SaveScan] = []
    incarnations: list[Incarnation] = []
    slots: list[SlotScan] = []
    repaired: list[str] = []
    problems: list[str] = []


class Scanned(msgspec.Struct, frozen=True, tag=True):
    """``swept`` counts temporaries removed; ``quarantined`` what is set aside (keys)."""

    runs: list[RunScan] = []
    swept: int = 0
    quarantined: list[str] = []
    free_bytes: int = 0
    total_bytes: int = 0


class Flushed(msgspec.Struct, frozen=True, tag=True):
    """``complete``: every rank's record is there now. ``rewritten``: keys that were damaged.
    ``weak``: the store could not make the commit atomic. ``reused_bytes`` were not sent."""

    copied_bytes: int
    elapsed_s: float
    complete: bool
    rewritten: list[str] = []
    weak: bool = False
    reused_bytes: int = 0


class Completed(msgspec.Struct, frozen=True, tag=True):
    complete: bool
    weak: bool = False


class DamagedKey(msgspec.Struct, frozen=True):
    key: str
    reason: str


class Verified(msgspec.Struct, frozen=True, tag=True):
    read_bytes: int
    elapsed_s: float
    damaged: list[DamagedKey] = []


class Deleted(msgspec.Struct, frozen=True, tag=True):
    busy: bool = False
    freed_bytes: int = 0


class Healed(msgspec.Struct, frozen=True, tag=True):
    """``replaced`` are the keys that were bad."""

    replaced: list[str]
    copied_bytes: int = 0


class Stored(msgspec.Struct, frozen=True, tag=True):
    """``already``: the same bytes were there before."""

    already: bool = False


class RunConfigs(msgspec.Struct, frozen=True, tag=True):
    configs: list[RunConfig] = []
    problems: list[str] = []


Result: TypeAlias = (
    Pong
    | SlotFiles
    | SealedSlot
    | Recycled
    | Freed
    | Scanned
    | Flushed
    | Completed
    | Verified
    | Deleted
    | Healed
    | Stored
    | RunConfigs
)


# -- lines -----------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    """One line to a data process. ``id`` comes back in every reply. ``again``: a process that died
    was given the same command, and may have done a part of it."""

    id: int
    command: Command
    again: bool = False


class Progress(msgspec.Struct, frozen=True):
    """Without a total: the command's turn has come, and small things are done first. With none of
    the total done, or all of it, a single step may take as long as there are bytes."""

    done_bytes: int
    total_bytes: int

    @property
    def is_start(self) -> bool:
        return self.total_bytes == 0


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from a data process."""

    id: int
    progress: Progress | None = None
    result: Result | None = None
    error: WireError | None = None


_REQUESTS = msgspec.json.Decoder(Request)
_REPLIES = msgspec.json.Decoder(Reply)


def encode_line(message: Request | Reply) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a line from the control process. Raises FormatError."""
    try:
        return _REQUESTS.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.FormatError(f"request does not parse: {error}") from error


def decode_reply(line: bytes) -> Reply:
    """Read a line from a data process. Raises FormatError."""
    try:
        return _REPLIES.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.FormatError(f"reply does not parse: {error}") from error
