"""Records, manifests and incarnations: the small files that say what a save is.

Knows their fields, versions and names (``docs/format.md``) and the one commit rule: a save is
complete in a tier when every record that its plan names is there and parses. A manifest is that
fact cached: its absence hides nothing, its presence vouches for nothing. Does not read or write
files. Every file is sealed: JSON with the digest of its own body, so that no flipped bit in it
goes unseen.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_128

from mtckpt.errors import Damaged, FormatTooNew, UsageError

__all__ = [
    "Bytes",
    "Incarnation",
    "IncarnationNumber",
    "Manifest",
    "Rank",
    "Record",
    "SaveName",
    "Step",
    "WorldSize",
    "decode_sealed",
    "encode_sealed",
    "newest_line",
    "run_key",
    "save_id",
]

FORMAT_VERSION = 1
MAX_RECORD_BYTES = 256 * 1024 * 1024
MAX_SMALL_BYTES = 16 * 1024 * 1024
MAX_STEP = 10**12
MAX_INCARNATION = 10**9 - 1
MAX_WORLD_SIZE = 100_000

# Checked while decoding, so that nothing further on meets a number or an id that cannot be.
Step = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
IncarnationNumber = Annotated[int, msgspec.Meta(ge=0, le=MAX_INCARNATION)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_WORLD_SIZE)]
WorldSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_WORLD_SIZE)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**46)]
# With \Z: a $ would let a newline through.
Uuid = Annotated[
    str, msgspec.Meta(pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\\Z")
]


class ArrayEntry(msgspec.Struct, omit_defaults=True, frozen=True, gc=False):
    """One leaf, in the order of the walk. ``same_as`` is the entry whose bytes a tied leaf has.

    ``ranks`` are those that a global array is spread over; None stands for all of the save. Under
    one path there may be an array for each of several groups of ranks.

    ``alike`` is there if other ranks hold the same box: the same for all of those, and of no other
    meaning. Where several of them store it, it has to be the same bytes.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    framework: str
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    same_as: int | None = None
    ranks: tuple[int, ...] | None = None
    alike: str = ""

    @property
    def stored_name(self) -> str:
        """The tensor's name in the file: its path, with the offsets of a box."""
        if self.offsets is None:
            return self.path
        return f"{self.path}@{','.join(map(str, self.offsets))}"


class ShardEntry(msgspec.Struct, frozen=True):
    """The shard file that a record belongs to; ``table_digest`` is the XXH3-128 of its table."""

    size_bytes: Bytes
    data_start: Bytes
    header_digest: str
    table_digest: str
    chunk_bytes: int


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one rank saved at one step. ``roots`` is base64 of 16 bytes a stored tensor.

    ``plan_digest`` is of what all ranks have to have alike: the same in all records of a save.

    ``due`` names the slower tiers that this save is to reach, so that the next agent knows what an
    agent that died still owed. ``aborted`` says why a save was called off. ``saved_at_s`` (Unix
    time) is for people to read; nothing is ordered by it. ``every`` carries the automatic interval.

    ``left_out``: of a copy that was made without arrays which the shards beside it have as well:
    how many bytes. Of those arrays it has empty boxes.
    """

    version: int
    run: str
    step: Step
    incarnation: IncarnationNumber
    incarnation_id: str
    save_id: Uuid
    rank: Rank
    world_size: WorldSize
    plan_digest: str
    shard: ShardEntry
    roots: str
    arrays: msgspec.Raw
    structure: msgspec.Raw
    plain: msgspec.Raw
    writer: str = ""
    host: str = ""
    saved_at_s: float = 0.0
    every: int = 0
    metrics: dict[str, float] = {}
    due: tuple[str, ...] = ()
    aborted: str = ""
    left_out: Bytes = 0

    @property
    def name(self) -> SaveName:
        return save_name(self.step, self.incarnation, self.save_id)

    def array_entries(self) -> list[ArrayEntry]:
        """Decoded on demand: listing a thousand saves does not need a million leaves."""
        try:
            entries = msgspec.json.decode(self.arrays, type=list[ArrayEntry])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Damaged(f"record does not parse: {error}", step=self.step) from error
        for index, entry in enumerate(entries):
            if entry.same_as is not None and not 0 <= entry.same_as < len(entries):
                raise Damaged("record has a tied leaf without its twin", leaf=entry.path, at=index)
        return entries

    def root_bytes(self) -> bytes:
        try:
            return base64.b64decode(self.roots, validate=True)
        except ValueError as error:
            raise Damaged("record has roots that are not base64", step=self.step) from error


class ManifestEntry(msgspec.Struct, frozen=True):
    """One shard of a complete save."""

    rank: Rank
    size_bytes: Bytes
    record_digest: str


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A complete save, cached. Derived from the records, and never believed without them.

    ``reused_bytes``: how many the store copied itself, as far as the writer of the manifest knows.
    """

    version: int
    run: str
    step: Step
    incarnation: IncarnationNumber
    save_id: Uuid
    world_size: WorldSize
    shards: list[ManifestEntry]
    metrics: dict[str, float] = {}
    reused_bytes: Bytes = 0


class Commit(msgspec.Struct, frozen=True):
    """The marker of a save in a store. ``manifest_digest`` is the XXH3-128 of the manifest."""

    version: int
    run: str
    step: Step
    incarnation: IncarnationNumber
    save_id: Uuid
    manifest_digest: str

    @property
    def name(self) -> SaveName:
        return save_name(self.step, self.incarnation, self.save_id)


class Incarnation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One start of the job. ``parent`` is the (incarnation number, step) it went on from."""

    version: int
    run: str
    number: IncarnationNumber
    id: Uuid
    parent: tuple[IncarnationNumber, Step] | None = None
    host: str = ""
    pid: int = 0


class Metrics(msgspec.Struct, frozen=True):
    """Metrics reported after the save."""

    version: int
    step: Step
    save_id: str
    metrics: dict[str, float]


class _Sealed(NamedTuple):
    """The parts of a sealed file."""

    kind: str
    digest: str
    body: memoryview


class _AnySealed(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    digest: str
    body: msgspec.Raw


_T = TypeVar("_T", Record, Manifest, Commit, Incarnation, Metrics)


# As ``encode_sealed`` begins; between it and the last two bytes lies the body.
_HEAD = re.compile(rb'\{"kind":"([a-z]+)","digest":"([0-9a-f]{32})","body":')
_TAIL = b"}\n"


def encode_sealed(value: Record | Manifest | Commit | Incarnation | Metrics) -> bytes:
    """JSON of ``value`` with its kind and the XXH3-128 of its body."""
    body = msgspec.json.encode(value)
    kind = type(value).__name__.lower()
    head = f'{{"kind":"{kind}","digest":"{_digest(kind, body)}","body":'
    return b"".join((head.encode(), body, _TAIL))


def decode_sealed(data: bytes | memoryview, type_: type[_T]) -> _T:
    """Read what ``encode_sealed`` wrote. Raises Damaged, or FormatTooNew for a later version."""
    kind = type_.__name__.lower()
    sealed = _opened(data, kind)
    if sealed.kind != kind or sealed.digest != _digest(kind, sealed.body):
        raise Damaged(f"{kind} does not match its digest")
    try:
        value = msgspec.json.decode(sealed.body, type=type_)
        version = value.version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        version = _version_in(sealed.body)
        if version <= FORMAT_VERSION:
            raise Damaged(f"{kind} does not parse: {error}") from error
    if version > FORMAT_VERSION:
        raise FormatTooNew(
            f"{kind} of a later version of mtckpt", version=version, supported=FORMAT_VERSION
        )
    return value


def _opened(data: bytes | memoryview, kind: str) -> _Sealed:
    """The parts of a sealed file. Cut where it looks as it is written: parsing walks through all.

    A body that was cut is one JSON value for sure only once its digest was compared.
    """
    head = _HEAD.match(data)
    if head is not None and data[-len(_TAIL) :] == _TAIL:
        body = memoryview(data)[head.end() : -len(_TAIL)]
        return _Sealed(head[1].decode(), head[2].decode(), body)
    try:
        sealed = msgspec.json.decode(data, type=_AnySealed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"{kind} does not parse: {error}") from error
    return _Sealed(sealed.kind, sealed.digest, memoryview(sealed.body))


def _digest(kind: str, body: bytes | memoryview) -> str:
    digest = xxh3_128(kind.encode())
    digest.update(body)
    return digest.hexdigest()


def _version_in(body: memoryview) -> int:
    """The version of a body that is none of this version, or 0."""
    try:
        return msgspec.json.decode(body, type=_Version).version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


class _Version(msgspec.Struct):
    version: int


# -- names --------------------------------------------------------------------------------------

_PLAIN_RUN = re.compile(r"[a-z0-9][a-z0-9_.=-]{0,99}")


def run_key(run: str) -> str:
    """The directory of a run: its name if that is one, else a slug with the name's digest."""
    if not isinstance(run, str) or not 0 < len(run) <= 1000:
        what = f"a run needs a name of 1 to 1000 characters, not {run!r:.80}"
        raise UsageError(what, state="nothing was done")
    try:
        run.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"a run's name must be UTF-8, not {run[:100]!a}",
            state="nothing was done",
            actions=("a name from the environment is read as UTF-8 with PYTHONUTF8=1",),
        ) from error
    if _PLAIN_RUN.fullmatch(run) and run != "." and not run.endswith("."):
        return run
    slug = re.sub(r"[^a-z0-9_=-]+", "-", run.lower()).strip("-")[:60] or "run"
    return f"{slug}-{xxh3_64_hexdigest(run.encode())}"


_SAVE = re.compile(r"step-(\d{12,13})\.(\d{6,9})\.([0-9a-f]{12})")
_COMMIT = re.compile(r"(\d{12,13})\.(\d{6,9})")
_RECORD = re.compile(r"rank-(\d{5})\.json")
_INCARNATION = re.compile(r"incarnation-(\d{6,9})\.[0-9a-f]{12}\.json")


class SaveName(msgspec.Struct, frozen=True, order=True, gc=False):
    """The directory of one save; sorts by step, then incarnation."""

    step: int
    incarnation: int
    short_id: str

    def __str__(self) -> str:
        return f"step-{self.step:012d}.{self.incarnation:06d}.{self.short_id}"

    @staticmethod
    def parse(name: str) -> SaveName | None:
        match = _SAVE.fullmatch(name)
        return SaveName(int(match[1]), int(match[2]), match[3]) if match else None


def save_name(step: int, incarnation: int, save_id_: str) -> SaveName:
    return SaveName(step, incarnation, save_id_.replace("-", "")[:12])


def save_id(incarnation_id: str, step: int, attempt: int) -> str:
    """Derived, so that every rank has it without a message: UUIDv5 of incarnation and step."""
    return str(uuid.uuid5(uuid.UUID(incarnation_id), f"{step}:{attempt}"))


def generation_of(save_id_: str) -> int:
    """The word that ties a digest table to its save: 64 bits of the id, never 0."""
    return int(uuid.UUID(save_id_)) & 0xFFFF_FFFF_FFFF_FFFF or 1


def shard_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def table_file(rank: int) -> str:
    return f"rank-{rank:05d}.xxh3"


def record_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


MANIFEST_FILE = "manifest.json"


def commit_file(step: int, incarnation: int) -> str:
    """The marker of a save in a store, below its run."""
    return f"commit/{step:012d}.{incarnation:06d}"


def parse_commit_file(name: str) -> tuple[int, int] | None:
    """``(step, incarnation)`` of a marker's last name."""
    match = _COMMIT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def incarnation_file(number: int, id_: str) -> str:
    return f"incarnation-{number:06d}.{id_.replace('-', '')[:12]}.json"


def parse_record_file(name: str) -> int | None:
    match = _RECORD.fullmatch(name)
    return int(match[1]) if match else None


def is_record_file(name: str) -> bool:
    return parse_record_file(name) is not None


def parse_incarnation_file(name: str) -> int | None:
    match = _INCARNATION.fullmatch(name)
    return int(match[1]) if match else None


# -- pure decisions about saves and incarnations ---------------------------------------------------


@dataclass(slots=True)
class SaveEntry:
    """One save as one tier has it. ``records`` by rank; ``problems`` says what is wrong with it.

    ``reported``: some of its metrics were told after it was saved. ``has_manifest``: it was
    complete here once.
    ``committed``: a store has a marker for its step. That is no part of being complete.
    ``digests`` are those of the records' bytes.
    """

    name: SaveName
    tier: str
    records: dict[int, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    reported: bool = False
    has_manifest: bool = False
    committed: bool = False
    digests: dict[int, str] = field(default_factory=dict)

    @property
    def unfinished(self) -> bool:
        """It has begun to be here, and was never whole: no step was lost."""
        whole_once = self.complete or self.has_manifest or self.committed
        return not (whole_once or self.problems or self.aborted)

    @property
    def complete(self) -> bool:
        """The commit rule. Only the records themselves count."""
        return is_complete(self.records)

    @property
    def size_bytes(self) -> int:
        return sum(record.shard.size_bytes for record in self.records.values())

    @property
    def aborted(self) -> str:
        return next((r.aborted for r in self.records.values() if r.aborted), "")


def is_complete(records: Mapping[int, Record]) -> bool:
    """Every record that the plan names is there, and all are of one save."""
    if not records:
        return False
    first = next(iter(records.values()))
    return sorted(records) == list(range(len(records))) and all(
        (r.save_id, r.world_size, r.step, r.incarnation, r.plan_digest)
        == (first.save_id, len(records), first.step, first.incarnation, first.plan_digest)
        for r in records.values()
    )


def newest_line(incarnations: Iterable[Incarnation]) -> list[tuple[int, int | None]]:
    """From the latest incarnation back through its parents: ``(number, last step that counts)``.

    The latest one counts whole (None). A rolled-back branch is not on the line, so it never comes
    back by itself. Two incarnations of one number (two tiers were apart) are both followed by the
    higher id, which every reader decides alike.
    """
    by_number: dict[int, Incarnation] = {}
    for incarnation in incarnations:
        other = by_number.get(incarnation.number)
        if other is None or other.id <= incarnation.id:
            by_number[incarnation.number] = incarnation
    if not by_number:
        return []
    line: list[tuple[int, int | None]] = []
    number: int | None = max(by_number)
    limit: int | None = None
    while number is not None and number in by_number and len(line) <= len(by_number):
        line.append((number, limit))
        parent = by_number[number].parent
        if parent is None:
            break
        number, step = parent
        limit = step if limit is None else min(step, limit)
    else:
        if number is not None and len(line) <= len(by_number):
            line.append((number, limit))  # its record is lost; its saves still count
    return line


def on_line(name: SaveName, line: Sequence[tuple[int, int | None]]) -> bool:
    """True if a save is on the line; one off it is abandoned."""
    for number, limit in line:
        if name.incarnation == number:
            return limit is None or name.step <= limit
    return False


def describe(value: Any) -> str:
    """A record or save in a few words, for messages."""
    return f"step {value.step} (incarnation {value.incarnation})"
