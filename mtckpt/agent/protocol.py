"""What trainers and the node agent say to each other: typed JSON over HTTP on a unix socket.

Every message is a struct below; unknown fields are ignored, missing ones refused, sizes capped
(``MAX_MESSAGE_BYTES``). One version number for all: an agent refuses what is newer than itself and
says which one it speaks. Payload bytes never travel here; they lie in slot files.

    POST /v1/runs/{key}/open           Open        -> Opened      RunLocked: a live owner (409)
    POST /v1/runs/{key}/incarnation    Begin -> Begun  RunLocked: a higher number is known (409)
    POST /v1/runs/{key}/slots          WantSlots   -> Slots       TierFull with the arithmetic
    POST /v1/runs/{key}/seal           Seal        -> Sealed      Damaged, RunLocked, StepExists
    POST /v1/runs/{key}/release        Release     -> Done        a capture that did not happen
    POST /v1/runs/{key}/calloff        CallOff     -> Done        and so no rank saves this step
    POST /v1/runs/{key}/report         Report      -> Done        metrics known later
    POST /v1/runs/{key}/damage         Damage      -> Done        a reader met a bad copy
    POST /v1/runs/{key}/flush          Flush       -> Done        the newest staged save, everywhere
    POST /v1/runs/{key}/fetch          Fetch       -> Fetched     from a store, to this node
    POST /v1/runs/{key}/close          Close       -> Done        nothing more will come
    POST /v1/runs/{key}/rm             Remove      -> Removed
    POST /v1/runs/{key}/listen         Listen      -> PeerAddress  for agents of other nodes
    POST /v1/runs/{key}/join           Join        -> Done        who the other nodes are
    GET  /v1/runs/{key}/changes?since=N&timeout_s=T  -> Changes   long poll
    GET  /status  /metrics  /events    POST /v1/stop  Stop -> Done
    POST /v1/drain                     Drain       -> Drained     the node is about to go
    GET  /healthz  /readyz           -> Done        for a supervisor's probes
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from mtckpt import errors
from mtckpt._access import Access
from mtckpt._handshake import PeerAddress
from mtckpt._manifest import Bytes, IncarnationNumber, Rank, Step, Uuid, WorldSize
from mtckpt._schedule import ObjectStore, Peers

if TYPE_CHECKING:
    from mtckpt._schedule import SlowTier

__all__ = [
    "PROTOCOL_VERSION",
    "PeerAddress",
    "decode",
    "encode",
    "error_from_wire",
    "error_to_wire",
]

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_SLOTS = 1024
SOCKET_NAME = "agent.sock"
PID_NAME = "agent.pid"
LOG_NAME = "agent.log"


class TierConfig(msgspec.Struct, frozen=True):
    """One slower tier of a run. ``label`` is unique in the run ("disk", "disk-2").

    ``keep`` is a list of retention rules: ``{"last": n}``, ``{"every": n}``, ``{"every_s": s,
    "within_s": s}``, ``{"best": n, "metric": m, "mode": "min"}``; empty keeps everything. ``path``
    is the URL of a store, and ``access`` how it is reached. ``copies`` are those on other nodes, of
    a tier of kind "peers".
    """

    label: str
    kind: str
    path: str
    keep: list[dict[str, Any]] = []
    access: Access = Access()
    reuse: bool = False
    copies: int = 0


def tier_config(label: str, tier: SlowTier, keep: list[dict[str, Any]]) -> TierConfig:
    """The settings of a tier as the agent gets them."""
    reuse = isinstance(tier, ObjectStore) and tier.reuse
    copies = tier.copies if isinstance(tier, Peers) else 0
    return TierConfig(label, tier.kind, tier.place, keep, tier.access, reuse, copies)


class Open(msgspec.Struct, frozen=True):
    """A Checkpointer comes. ``start_ticks`` is field 22 of /proc/pid/stat (a pid alone recurs).

    ``holder`` is drawn per Checkpointer: a new holder in the same process fences the older one.
    A process that lost its agent opens again with the same holder, its ``incarnation``, and the
    slots it has mapped (``held``: slot id -> inode)."""

    protocol: int
    run: str
    holder: str
    rank: Rank
    world_size: WorldSize
    pid: int
    start_ticks: int
    parent_pid: int
    ram_path: str
    tiers: list[TierConfig]
    incarnation: IncarnationNumber = 0
    held: dict[str, int] = {}
    token: str = ""
    patience_s: float = 1.0  # how long the answer may take


class NodeOfRun(msgspec.Struct, frozen=True):
    """One node of a run, and the ranks that are on it."""

    address: PeerAddress
    ranks: list[Rank]


class Others(msgspec.Struct, frozen=True):
    """The nodes besides this one that had the run when its ranks once joined, and the secret by
    which they let it in."""

    nodes: list[NodeOfRun]
    secret: str

    def __repr__(self) -> str:
        return f"Others(nodes={self.nodes!r}, ...)"


class Opened(msgspec.Struct, frozen=True):
    """``finished`` names saves that the agent sealed for an owner that died. ``others``: nodes of
    earlier starts of the job, the last first. ``checks_left``: it looks at what a seal has left.
    ``unlooked``: why slots on a disk are passed over. ``highest`` start, written or not."""

    protocol: int
    agent_id: str
    boot_id: str
    pid: int
    ram_root: str
    finished: list[str] = []
    fenced_pid: int = 0
    others: list[Others] = []
    checks_left: bool = False
    unlooked: str = ""
    highest: int = 0


class Begin(msgspec.Struct, frozen=True):
    """Start an incarnation; the agent writes it to every tier before it answers. ``host`` and
    ``pid`` are rank 0's: agents of several nodes write the same file."""

    holder: str
    number: IncarnationNumber
    id: Uuid
    parent: tuple[int, int] | None = None
    host: str = ""
    pid: int = 0


class Begun(msgspec.Struct, frozen=True):
    """``owed`` maps the tiers that could not be written to the reason."""

    owed: dict[str, str] = {}


class WantSlots(msgspec.Struct, frozen=True):
    """``count`` slots are the ring wanted; what is there counts. ``wait_s`` for a free one.

    ``held`` are the slots that the holder is writing to, None if it does not say: others that were
    granted to it never arrived, and are given again.
    """

    holder: str
    shard_bytes: Bytes
    table_bytes: Bytes
    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_SLOTS)]
    wait_s: float = 0.0
    held: list[str] | None = None


class SlotGrant(msgspec.Struct, frozen=True):
    """One slot in state CAPTURING, of this holder. Paths are of the data, table and record file."""

    slot_id: str
    inode: int
    data_path: str
    table_path: str
    record_path: str


class Slots(msgspec.Struct, frozen=True):
    """``grant`` is None when all are in use; ``reason`` then says by what, in one sentence."""

    grant: SlotGrant | None
    reason: str = ""


class Seal(msgspec.Struct, frozen=True):
    """The trainer has written data, table (generation word last) and the record into the slot.

    ``left``: chunks that had these digests before, a bit each from the lowest on: not written.
    """

    holder: str
    slot_id: str
    inode: int
    save_id: Uuid
    step: Step
    due: list[str] = []
    left: bytes = b""


class WireError(msgspec.Struct, frozen=True):
    """A typed error as it travels; the class is looked up in a fixed table, never imported."""

    error: str
    what: str
    state: str = ""
    actions: list[str] = []
    details: dict[str, Any] = {}


class Sealed(msgspec.Struct, frozen=True):
    """``next_slot`` spares the next save() a call; None when no slot is free now.

    ``staged`` is False while other ranks have not sealed their parts. ``called_off`` says why the
    save was called off, ``failed`` that this is an error; the slot is free again then.
    """

    save: str
    next_slot: SlotGrant | None = None
    staged: bool = True
    called_off: str = ""
    failed: WireError | None = None


class Release(msgspec.Struct, frozen=True):
    """A slot handed back unused."""

    holder: str
    slot_id: str


class CallOff(msgspec.Struct, frozen=True):
    """This rank does not take part in a save, so nobody does. ``reason`` is one sentence."""

    holder: str
    save_id: Uuid
    step: Step
    reason: str


class Report(msgspec.Struct, frozen=True):
    holder: str
    step: Step
    metrics: dict[str, float]


class Damage(msgspec.Struct, frozen=True):
    """A reader found ``key`` of ``tier`` (its label) damaged."""

    tier: str
    key: str
    reason: str


class Flush(msgspec.Struct, frozen=True):
    """Make the newest staged save due in every tier."""

    holder: str


class Lend(msgspec.Struct, frozen=True):
    """Other nodes of the run may read another one on this node, which all of them restore from."""

    holder: str
    run_key: str


class Fetch(msgspec.Struct, frozen=True):
    """Bring a save from a store to this node, all of it or the shards of some ranks; asked again
    until it is there."""

    holder: str
    save: str
    wait_s: float = 1.0
    ranks: list[Rank] = []


class Fetched(msgspec.Struct, frozen=True):
    """``label`` is the tier that has it now; empty while it is on its way."""

    label: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class Close(msgspec.Struct, frozen=True):
    """The holder leaves. ``free_ram``: slots and RAM saves go once a slower tier has the newest.
    The answer comes when they have gone, ``wait_s`` later at most."""

    holder: str
    free_ram: bool = True
    wait_s: float = 0.0


class Closed(msgspec.Struct, frozen=True):
    """``kept``: which tiers keep memory from being freed yet; "" where none does."""

    kept: str = ""


class Remove(msgspec.Struct, frozen=True):
    """Delete saves of a run: one step, or all of it; ``tiers`` are labels, empty means all."""

    step: int | None = None
    tiers: list[str] = []


class Removed(msgspec.Struct, frozen=True):
    removed: list[str]
    kept: list[str] = []


class Listen(msgspec.Struct, frozen=True):
    """Let agents of other nodes in; answered with the PeerAddress where they find this one.

    ``host`` is an address of this node or an interface's name; without it the one that leads to
    ``towards`` is taken, which is where the job's ranks meet.
    """

    holder: str
    host: str = ""
    towards: str = ""


class Join(msgspec.Struct, frozen=True):
    """Who the nodes of a run are, the same from each rank. ``secret`` is hexadecimal; ``lead`` is
    the index of the node of rank 0."""

    holder: str
    secret: str
    world_size: WorldSize
    nodes: list[NodeOfRun]
    lead: int = 0

    def __repr__(self) -> str:
        return f"Join(world_size={self.world_size}, nodes={self.nodes!r}, ...)"


class Stop(msgspec.Struct, frozen=True):
    """``drain`` finishes what is owed first."""

    drain: bool = False
    timeout_s: float = 60.0


class Done(msgspec.Struct, frozen=True):
    detail: str = ""


class SaveChange(msgspec.Struct, frozen=True):
    """Where a save stands. ``stages`` only grows. ``failed`` maps tier labels to their errors;
    ``owed`` maps labels that are retried to the reason; ``superseded`` lists labels that took a
    newer save instead; ``waiting`` those that are to get this one and do not have it yet; ``weak``
    stores that could not make its commit atomic. ``called_off`` says why no rank saves it."""

    save_id: str
    step: int
    stages: list[str]
    failed: dict[str, WireError] = {}
    owed: dict[str, str] = {}
    superseded: list[str] = []
    waiting: list[str] = []
    called_off: str = ""
    weak: list[str] = []


class Changes(msgspec.Struct, frozen=True):
    """All saves of the holder's incarnation that changed since ``since``."""

    seq: int
    saves: list[SaveChange] = []
    fenced: WireError | None = None


class TierStatus(msgspec.Struct, frozen=True):
    """What one tier holds and owes. ``newest_age_s`` is None when it holds nothing; ``not_deleted``
    says why a store still has what its rules let go."""

    label: str
    kind: str
    path: str
    steps: list[int] = []
    newest_step: int | None = None
    newest_age_s: float | None = None
    size_bytes: int = 0
    owed: list[int] = []
    problem: str = ""
    bytes_per_s: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0
    weak: bool = False
    keep: list[dict[str, Any]] = []
    not_deleted: str = ""


class SlotStatus(msgspec.Struct, frozen=True):
    slot_id: str
    state: str
    size_bytes: int
    step: int | None = None


class RunStatus(msgspec.Struct, frozen=True):
    run: str
    incarnation: int
    owner_pid: int
    owner_alive: bool
    tiers: list[TierStatus] = []
    slots: list[SlotStatus] = []
    counters: dict[str, int] = {}


class AgentStatus(msgspec.Struct, frozen=True):
    """``bounded_by`` says what may end the agent before the node does, ``draining`` why it takes
    nothing new."""

    version: int
    mtckpt: str
    agent_id: str
    boot_id: str
    pid: int
    mode: str
    host: str
    uptime_s: float
    bounded_by: str = ""
    runs: list[RunStatus] = []
    draining: str = ""


_T = TypeVar("_T")
# Attributes of an error itself, which no detail may replace.
_OWN_NAMES = {*dir(errors.CheckpointError("")), "actions", "state", "what"}
_ERRORS = {name: getattr(errors, name) for name in errors.__all__}


def encode(message: Any) -> bytes:
    return msgspec.json.encode(message)


def decode(data: bytes, type_: type[_T]) -> _T:
    """Read a message. Raises FormatError; never more than MAX_MESSAGE_BYTES."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise errors.FormatError("message is larger than any can be", got_bytes=len(data))
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.FormatError(f"message does not parse: {error}") from error


def error_to_wire(error: BaseException) -> WireError:
    """Any error as it travels; a foreign one becomes a CheckpointError that names its type."""
    if isinstance(error, errors.CheckpointError):
        details = {
            name: value if isinstance(value, (str, int, float, bool)) else str(value)
            for name, value in error.details.items()
        }
        name = type(error).__name__
        return WireError(name, error.what, error.state, list(error.actions), details)
    return WireError("CheckpointError", f"{type(error).__name__}: {error}")


def error_from_wire(wire: WireError) -> errors.CheckpointError:
    """The typed error. A name that this version does not know is a plain CheckpointError."""
    cls = _ERRORS.get(wire.error, errors.CheckpointError)
    details = {
        name: value
        for name, value in wire.details.items()
        if name.isidentifier() and name not in _OWN_NAMES
    }
    error: errors.CheckpointError = cls(
        wire.what, state=wire.state, actions=wire.actions, **details
    )
    return error


def runtime_dir() -> str:
    """Where the agent's socket, pid file and log lie: MTCKPT_RUNTIME_DIR, else one of this user."""
    chosen = os.environ.get("MTCKPT_RUNTIME_DIR")
    if chosen:
        return chosen
    uid = os.getuid()
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        return os.path.join(base, "mtckpt")
    if uid == 0 and os.path.isdir("/run"):
        return "/run/mtckpt/0"
    return f"/tmp/mtckpt-{uid}"


def ram_base() -> str:
    """The tmpfs that slots live in: MTCKPT_RAM_DIR, else /dev/shm, in a directory of this user."""
    return os.path.join(os.environ.get("MTCKPT_RAM_DIR") or "/dev/shm", f"mtckpt-{os.getuid()}")
