"""What the control process asks of a data process, and what it gets back.

Typed JSON, one message a line, over a socket pair: ``Request`` one way, ``Reply`` the other. A
reply says that the command's turn has come, then has progress (any number of times), then exactly
one of result and error. Nothing here moves bytes or decides anything. Both ends are of one version
of mtckpt, so there is none here.

A command is carried out by the data process of ``place_of(command)``: a disk that hangs then holds
up nobody but itself. The control process never has two commands that change the same save in the
same tier under way at once; everything else may run side by side.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from mtckpt import errors
from mtckpt._handshake import PeerAddress
from mtckpt.agent.findings import Roots, RunScan, SaveScan, SlotScan
from mtckpt.agent.protocol import WireError
from mtckpt.agent.run_config import RUN_CONFIG_VERSION, Owner, RunConfig, ServedRun, TierRef
from mtckpt.agent.slot_work import (
    Allocate,
    Free,
    Freed,
    LookAhead,
    Looked,
    Recycle,
    Recycled,
    SealedSlot,
    SealSlot,
    SlotFiles,
)

__all__ = [
    "RUN_CONFIG_VERSION",
    "Allocate",
    "Command",
    "Free",
    "Freed",
    "LookAhead",
    "Looked",
    "Owner",
    "Progress",
    "Recycle",
    "Recycled",
    "Reply",
    "Request",
    "Result",
    "Roots",
    "RunConfig",
    "RunScan",
    "SaveScan",
    "SealSlot",
    "SealedSlot",
    "ServedRun",
    "SlotFiles",
    "SlotScan",
    "TierRef",
    "place_of",
]

# A scan of ten thousand saves of a thousand ranks fits; a stray stream of bytes does not.
MAX_LINE_BYTES = 256 * 1024 * 1024


# -- commands --------------------------------------------------------------------------------------


class Ping(msgspec.Struct, frozen=True, tag=True):
    """-> Pong, whatever else the process is doing."""


class ReadRoots(msgspec.Struct, frozen=True, tag=True):
    """-> Roots: of what a rank has stored and others hold too, ``boxes`` as in ``_twins``."""

    tier: TierRef
    run_key: str
    save: str
    rank: int
    boxes: str


class Scan(msgspec.Struct, frozen=True, tag=True):
    """-> Scanned: every run, or one. ``repair`` undoes what a crash left.

    Only for the owner, at its start: nothing else may be under way in that tier meanwhile.

    A half-sealed slot becomes a finished slot again, a half-recycled one is freed, temporaries of
    dead writers go. Finished slots are reported, not sealed; a save directory without any record
    is reported with no ranks: a flush goes on there, or a Delete ends it."""

    tier: TierRef
    run_key: str | None = None
    repair: bool = True


class Flush(msgspec.Struct, frozen=True, tag=True):
    """-> Flushed: one shard copied and verified on the way, record last; streams Progress.

    Any error leaves nothing on the target that this command stored. Damaged names the tier that
    is damaged, always the source: a damaged copy on the target is set aside and written anew.
    RunLocked: a store has a later incarnation than ``incarnation``, if that is given. ``is_last``:
    it looks then whether the save is complete. ``base``: a save there to copy equal parts from;
    ``reused_bytes`` were, for the ranks before. ``parts``: other parts of it are on other nodes."""

    run_key: str
    save: str
    rank: int
    source: TierRef
    target: TierRef
    incarnation: int = 0
    is_last: bool = True
    base: str = ""
    reused_bytes: int = 0
    parts: bool = False


class Pull(msgspec.Struct, frozen=True, tag=True):
    """-> Flushed: one shard of another node's memory copied to this one's, received and verified by
    several streams, record last; streams Progress. What is there already and right is kept.
    ``beside``: ranks that have captured their shards here; what is in those too, the copy leaves
    out. ``mends``: it is one of those itself, damaged. Any error leaves nothing on the target that
    this stored. TierFull before a byte of it comes. Damaged: what is over there is not that shard.
    """

    tier: TierRef
    run_key: str
    save: str
    rank: int
    address: PeerAddress
    secret: str
    target: TierRef
    beside: list[int] = []
    mends: bool = False

    def __repr__(self) -> str:
        return f"Pull({self.run_key!r}, {self.save!r}, rank={self.rank}, from={self.address})"


class Complete(msgspec.Struct, frozen=True, tag=True):
    """-> Completed: what a flush does last, for a save whose records were all there already.

    ``parts``: other parts of the save are on other nodes. CommitConflict: another save of its step
    was committed in the store; this one is gone from it.
    """

    tier: TierRef
    run_key: str
    save: str
    parts: bool = False


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
    further than the records. ``ranks``, if given: the shards of these, and nothing else."""

    tier: TierRef
    run_key: str
    save: str
    records_only: bool = False
    ranks: list[int] | None = None


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


class WriteRunConfig(msgspec.Struct, frozen=True, tag=True):
    """-> Stored: replaces the run's configuration, whole or not at all."""

    tier: TierRef
    config: RunConfig


class ReadRunConfigs(msgspec.Struct, frozen=True, tag=True):
    """-> RunConfigs: of every run in the RAM tier; unreadable ones are listed as problems."""

    tier: TierRef


class WriteJoin(msgspec.Struct, frozen=True, tag=True):
    """-> Stored: replaces what the run's nodes have agreed on, which has a secret in it."""

    tier: TierRef
    run_key: str
    data: bytes

    def __repr__(self) -> str:
        return f"WriteJoin({self.run_key!r}, ...)"


class ServePeers(msgspec.Struct, frozen=True, tag=True):
    """-> Serving: other nodes may read these runs, and no others, from now on. ``port`` 0: any."""

    tier: TierRef
    agent_id: str
    host: str
    port: int = 0
    runs: list[ServedRun] = []


class Wipe(msgspec.Struct, frozen=True, tag=True):
    """-> Freed: everything of a run in this tier: saves, slots, configuration."""

    tier: TierRef
    run_key: str


Command: TypeAlias = (
    Ping
    | Allocate
    | SealSlot
    | ReadRoots
    | LookAhead
    | Recycle
    | Free
    | Scan
    | Flush
    | Pull
    | Complete
    | Verify
    | Delete
    | Heal
    | PutSmall
    | WriteRunConfig
    | ReadRunConfigs
    | WriteJoin
    | ServePeers
    | Wipe
)


_SLOWNESS = {"ram": 0, "disk": 1, "peers": 2, "store": 3}


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


class Scanned(msgspec.Struct, frozen=True, tag=True):
    """``swept`` counts temporaries removed; ``quarantined`` what is set aside (keys)."""

    runs: list[RunScan] = []
    swept: int = 0
    quarantined: list[str] = []
    free_bytes: int = 0
    total_bytes: int = 0


class Flushed(msgspec.Struct, frozen=True, tag=True):
    """Of a Pull, ``reread_bytes`` had to be asked for again: they came otherwise than they went.
    ``complete``: every rank's record is there now. ``rewritten``: keys that were damaged. ``weak``:
    the store could not make the commit atomic. ``reused_bytes`` were not sent, or left out."""

    copied_bytes: int
    elapsed_s: float
    complete: bool
    rewritten: list[str] = []
    weak: bool = False
    reused_bytes: int = 0
    reread_bytes: int = 0


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
    """``joins`` has, by run key, what ``WriteJoin`` wrote."""

    configs: list[RunConfig] = []
    problems: list[str] = []
    joins: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"RunConfigs({self.configs!r}, {self.problems!r}, ...)"


class Serving(msgspec.Struct, frozen=True, tag=True):
    port: int


Result: TypeAlias = (
    Pong
    | SlotFiles
    | SealedSlot
    | Looked
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
    | Serving
    | Roots
)


# -- lines -----------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    """One line to a data process; ``id`` comes back in every reply. ``again``: a process that died
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
    """One line from a data process. ``begun``: the command's turn has come, and nothing else."""

    id: int
    progress: Progress | None = None
    result: Result | None = None
    error: WireError | None = None
    begun: bool = False


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
