"""The shard: one rank's tensors of one save, as a safetensors file and a table of digests.

Knows the layout of both files byte for byte (``docs/format.md``), plans it before anything is
copied, and checks bytes against it. Does not know where a shard lies, which step it belongs to,
or what a leaf means. A digest guards against accidents (bit rot, torn pages, bad memory), not
against somebody who can recompute it.

File: ``u64 header length | JSON header, padded with spaces | data``, data from a multiple of 4096.
Tensors stand by descending element size, then by name, so all are aligned without holes.
Table: a header of 64 bytes, then the XXH3-64 of every 256 KiB of every tensor, counted from that
tensor's start, so that two ranks that hold the same bytes at other offsets can compare.
XXH3: https://github.com/Cyan4973/xxHash. safetensors: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128_digest, xxh3_128_hexdigest

from mtckpt._dtypes import DTYPES, size_bytes_of
from mtckpt.errors import Damaged, FormatError, FormatTooNew, UnsupportedState

__all__ = [
    "CHUNK_BYTES",
    "ShardLayout",
    "StoredTensor",
    "Table",
    "check_chunks",
    "check_range",
    "generation_in",
    "header_digest",
    "header_length",
    "parse_layout",
    "plan_layout",
    "read_header",
    "root_digests",
    "root_pieces",
    "table_digest",
    "verify_mapped",
]

CHUNK_BYTES = 256 * 1024
DATA_ALIGNMENT_BYTES = 4096
# A thread's share of a verification: small enough to end soon after the other has failed.
VERIFY_BLOCK_BYTES = 8 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_SHARD_BYTES = 2**46
TABLE_VERSION = 1
TABLE_MAGIC = b"MTCKXXH3"
# magic, version, chunk bytes, tensors, chunks, header digest, generation, two words reserved
TABLE_HEADER = struct.Struct("<8sIIQQQQQQ")
GENERATION_OFFSET = 40
_CODES = {dtype.stored_code: dtype for dtype in DTYPES.values() if dtype.code}


class StoredTensor(NamedTuple):
    """One tensor of the file. ``start`` is its offset in the file; its chunks are numbered on."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int
    first_chunk: int

    @property
    def num_chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)


# What many tensors have alike: code and shape in the file, size in bytes, number of chunks.
_Kind = tuple[str, tuple[int, ...], int, int]
# From a tuple of its fields: calling the class takes three times as long.
_tensor_of: Callable[[tuple[Any, ...]], StoredTensor] = functools.partial(
    tuple.__new__, StoredTensor
)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where everything lies. ``tensors`` is in file order; ``header`` is ``[0, data_start)``."""

    tensors: tuple[StoredTensor, ...]
    header: bytes
    size_bytes: int
    num_chunks: int

    @property
    def data_start(self) -> int:
        return len(self.header)

    @property
    def header_digest(self) -> int:
        return xxh3_64_intdigest(self.header)

    @property
    def header_digest_hex(self) -> str:
        """As a record has it."""
        return header_digest(self.header)

    @property
    def table_bytes(self) -> int:
        return TABLE_HEADER.size + 8 * self.num_chunks

    def by_name(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.tensors}


def plan_layout(arrays: Iterable[tuple[str, str, tuple[int, ...]]]) -> ShardLayout:
    """Plan the file of arrays given as ``(name, dtype name, shape)``.

    Raises UnsupportedState for a name that the format cannot hold or that comes twice, and if the
    header would pass 64 MiB or the file 64 TiB.
    """
    kinds: dict[tuple[str, tuple[int, ...]], tuple[int, _Kind]] = {}  # many are of few kinds
    rows = []
    for name, dtype_name, shape in arrays:
        known = kinds.get(key := (dtype_name, shape))
        if known is None:
            known = kinds[key] = _planned_kind(*key)
        rows.append((known[0], name, known[1]))
    rows.sort()
    entries: dict[str, object] = {"__metadata__": {"format": "mtckpt", "version": "1"}}
    offset = 0
    for _, name, (code, shape, size_bytes, _) in rows:
        entries[name] = _Entry(code, shape, (offset, offset + size_bytes))
        offset += size_bytes
    try:
        text = msgspec.json.encode(entries)
    except UnicodeEncodeError:
        text = b""
    if not text or len(entries) <= len(rows):
        raise _refused_name([name for _, name, _ in rows])
    if offset > MAX_SHARD_BYTES:
        raise UnsupportedState(
            f"one shard cannot have {offset:,} bytes",
            path="",
            limit_bytes=MAX_SHARD_BYTES,
            state="nothing was written",
            actions=("spread the state over more ranks",),
        )
    data_start = -(-(8 + len(text)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES
    if data_start > MAX_HEADER_BYTES:
        raise UnsupportedState(
            f"{len(rows):,} tensors in one shard need a header of {data_start:,} bytes",
            path="",
            limit_bytes=MAX_HEADER_BYTES,
            state="nothing was written",
            actions=(
                "stack small tensors of one shape into one, or give them shorter names",
                "or spread them over more ranks: each has a shard of its own",
            ),
        )
    header = struct.pack("<Q", data_start - 8) + text.ljust(data_start - 8)
    return _layout([row[1:] for row in rows], header)


def _planned_kind(dtype_name: str, shape: tuple[int, ...]) -> tuple[int, _Kind]:
    """What decides where in the file such arrays stand, and how they are stored."""
    dtype, size_bytes = DTYPES[dtype_name], size_bytes_of(dtype_name, shape)
    kind = dtype.stored_code, dtype.stored_shape(shape), size_bytes, -(-size_bytes // CHUNK_BYTES)
    return -dtype.stored_item_bytes, kind


def _refused_name(names: Iterable[str]) -> UnsupportedState:
    """About the one that a reader would refuse later: reserved or repeated, half a character."""
    taken = {"__metadata__"}
    for name in names:
        half = name.encode(errors="ignore").decode() != name
        if half or name in taken:
            break
        taken.add(name)
    why = "is not valid Unicode (a lone surrogate)"
    if not half:
        why = "comes twice, or is reserved by the file format"
    return UnsupportedState(
        f"a tensor's name {why}: {ascii(name)[:200]}",
        path=ascii(name)[1:201],
        state="nothing was written",
        actions=("rename that entry of the state",),
    )


def _layout(named: Iterable[tuple[str, _Kind]], header: bytes) -> ShardLayout:
    """Of tensors that follow each other without a gap."""
    tensors = []
    first_chunk = 0
    start = len(header)
    for name, (code, shape, size_bytes, num_chunks) in named:
        tensors.append(_tensor_of((name, code, shape, start, size_bytes, first_chunk)))
        first_chunk += num_chunks
        start += size_bytes
    return ShardLayout(tuple(tensors), header, start, first_chunk)


class _Entry(msgspec.Struct, forbid_unknown_fields=False, gc=False):
    """One tensor of a header; by its defaults ``__metadata__`` decodes in the same call.

    No tensor can be as they say.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (-1, -1)


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Bytes up to the data, from the first 8 bytes; refused before anything is allocated."""
    if len(prefix) < 8:
        raise Damaged("shard is shorter than its first word", got_bytes=len(prefix))
    length = 8 + int(struct.unpack("<Q", prefix[:8])[0])
    if length > min(MAX_HEADER_BYTES, file_bytes):
        raise Damaged(
            "shard header is longer than it can be", header_bytes=length, file_bytes=file_bytes
        )
    return length


def read_header(fd: int, file_bytes: int) -> bytes:
    """Everything up to the data of a shard file. Raises Damaged."""
    length = header_length(os.pread(fd, 8, 0), file_bytes)
    header = os.pread(fd, length, 0)
    if len(header) != length:
        raise Damaged("shard header is cut short", wanted_bytes=length, got_bytes=len(header))
    return header


def generation_in(table: bytes | memoryview) -> int:
    """The generation word of a table, whatever else is in it; 0 before a capture is finished."""
    return int.from_bytes(table[GENERATION_OFFSET : GENERATION_OFFSET + 8], "little")


def parse_layout(header: bytes, file_bytes: int) -> ShardLayout:
    """Read ``[0, header_length)`` of a shard file. Raises Damaged for anything inconsistent.

    Offsets must cover the data exactly: no hole, no overlap, no byte behind the last tensor.
    """
    if header_length(header, file_bytes) != len(header):
        raise Damaged("shard header is cut short", got_bytes=len(header))
    entries = _entries(memoryview(header)[8:])
    try:
        layout = _layout(_spans(entries.items()), bytes(header))
    except Damaged:
        # What mtckpt has written comes in the order of the file, others may write it in any.
        items = sorted(entries.items(), key=lambda item: item[1].data_offsets)
        layout = _layout(_spans(items), bytes(header))
    if layout.size_bytes != file_bytes:
        raise Damaged(
            "shard file has another size than its header says",
            wanted_bytes=layout.size_bytes,
            got_bytes=file_bytes,
        )
    return layout


def _spans(items: Iterable[tuple[str, _Entry]]) -> Iterator[tuple[str, _Kind]]:
    """Name and kind of each tensor, in the order of the data. Raises as ``parse_layout``."""
    end = 0
    kinds: dict[tuple[str, tuple[int, ...]], _Kind] = {}  # many are of few kinds
    for name, entry in items:
        kind = kinds.get(key := (entry.dtype, entry.shape))
        if kind is None:
            kind = kinds[key] = _stored_kind(*key, name)
        start, stop = entry.data_offsets
        if start != end or stop - start != kind[2]:
            raise Damaged("shard header has offsets that do not fit", tensor=name[:200])
        end = stop
        yield name, kind


def _stored_kind(code: str, shape: tuple[int, ...], name: str) -> _Kind:
    dtype = _CODES.get(code)
    if dtype is None and code:
        raise FormatTooNew(f"shard has a tensor of unknown type {code[:20]!r}")
    if dtype is None:
        raise Damaged("shard header has a tensor without a type", tensor=name[:200])
    if shape and (min(shape) < 0 or max(shape) >= 2**48 or len(shape) > 64):
        raise Damaged("shard header has an impossible shape", tensor=name[:200])
    size_bytes = math.prod(shape) * dtype.stored_item_bytes
    return code, shape, size_bytes, -(-size_bytes // CHUNK_BYTES)


def _entries(text: memoryview) -> dict[str, _Entry]:
    try:
        found = msgspec.json.decode(text, type=dict[str, _Entry])
        found.pop("__metadata__", None)
        return found
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the metadata may have entries of these names and any kind
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(body, type=_Entry) for name, body in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"shard header does not parse: {error}") from error


@dataclass(frozen=True, slots=True)
class Table:
    """The digests of one shard. ``digests`` is little-endian u64, a chunk each, in file order."""

    header_digest: int
    generation: int
    digests: memoryview

    @staticmethod
    def header(layout: ShardLayout, generation: int) -> bytes:
        return TABLE_HEADER.pack(
            TABLE_MAGIC,
            TABLE_VERSION,
            CHUNK_BYTES,
            len(layout.tensors),
            layout.num_chunks,
            layout.header_digest,
            generation,
            0,
            0,
        )

    @staticmethod
    def parse(data: bytes | memoryview, layout: ShardLayout | None = None) -> Table:
        """Read a table; with a layout, also check that it is of that shard."""
        view = memoryview(data).cast("B")
        if len(view) < TABLE_HEADER.size:
            raise Damaged("digest table is cut short", got_bytes=len(view))
        magic, version, chunk, tensors, chunks, header_digest, generation, *_ = (
            TABLE_HEADER.unpack_from(view)
        )
        if magic != TABLE_MAGIC or chunk != CHUNK_BYTES:
            raise Damaged("not a digest table")
        if version > TABLE_VERSION:
            raise FormatTooNew(
                "digest table of a later version", version=version, supported=TABLE_VERSION
            )
        if len(view) != TABLE_HEADER.size + 8 * chunks:
            raise Damaged("digest table has another size than it says", got_bytes=len(view))
        if layout is not None and (
            (tensors, chunks) != (len(layout.tensors), layout.num_chunks)
            or header_digest != layout.header_digest
        ):
            raise Damaged("digest table is not of this shard, or the shard's header is damaged")
        return Table(header_digest, generation, view[TABLE_HEADER.size :].cast("Q"))

    @staticmethod
    def is_of(data: bytes | memoryview, layout: ShardLayout) -> bool:
        """Whether it is the table of a shard of this layout, of whichever save."""
        try:
            Table.parse(data, layout)
        except FormatError:
            return False
        return True


def header_digest(header: bytes) -> str:
    """What a record says of its shard's header: the XXH3-64 of all bytes up to the data."""
    return xxh3_64_hexdigest(header)


def table_digest(data: bytes | memoryview) -> str:
    """What a record says of its table: the XXH3-128 of all its bytes, generation included."""
    return xxh3_128_hexdigest(data)


def root_pieces(layout: ShardLayout) -> struct.Struct:
    """Takes the chunk digests apart, those of a tensor together; for whoever needs it often."""
    return struct.Struct("".join([f"{8 * tensor.num_chunks}s" for tensor in layout.tensors]))


def root_digests(
    layout: ShardLayout, digests: memoryview, pieces: struct.Struct | None = None
) -> bytes:
    """XXH3-128 over the chunk digests of every tensor, 16 bytes a tensor, in file order."""
    pieces = pieces or root_pieces(layout)
    return b"".join(map(xxh3_128_digest, pieces.unpack_from(digests)))


def check_chunks(
    tensor: StoredTensor,
    digests: memoryview,
    view: memoryview,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Compare chunks ``[first, last)`` of a tensor with the table; ``view`` is the whole tensor.

    Raises Damaged naming tensor, chunk and offset in the file.
    """
    end = tensor.num_chunks if last is None else last
    for chunk in range(first, end):
        begin = chunk * CHUNK_BYTES
        found = xxh3_64_intdigest(view[begin : begin + CHUNK_BYTES])
        if found != digests[tensor.first_chunk + chunk]:
            raise Damaged(
                "bytes differ from their digest",
                tensor=tensor.name[:200],
                chunk=chunk,
                offset=tensor.start + begin,
            )


def chunk_spans(
    layout: ShardLayout, start: int, stop: int
) -> Iterator[tuple[StoredTensor, int, int]]:
    """The chunks that begin in file range ``[start, stop)``, as ``(tensor, first, last)``."""
    low, high = 0, len(layout.tensors)
    while low < high:
        middle = (low + high) // 2
        tensor = layout.tensors[middle]
        if tensor.start + tensor.size_bytes <= start:
            low = middle + 1
        else:
            high = middle
    for tensor in layout.tensors[low:]:
        if tensor.start >= stop:
            return
        first = max(0, -(-(start - tensor.start) // CHUNK_BYTES))
        last = min(tensor.num_chunks, -(-(stop - tensor.start) // CHUNK_BYTES))
        if first < last:
            yield tensor, first, last


def check_range(
    layout: ShardLayout, digests: memoryview, window: memoryview, start: int, stop: int
) -> None:
    """Compare the chunks that begin in file range ``[start, stop)``, and the header's bytes there.

    ``window`` is the file from ``start`` on; the last chunk may need CHUNK_BYTES behind ``stop``.
    Raises Damaged naming tensor, chunk and offset in the file.
    """
    if start < layout.data_start:
        header = layout.header[start:stop]
        if window[: len(header)] != header:
            raise Damaged("shard header changed while it was read", offset=start)
    for tensor, first, last in chunk_spans(layout, start, stop):
        for chunk in range(first, last):
            begin = chunk * CHUNK_BYTES
            at = tensor.start + begin - start
            end = at + min(CHUNK_BYTES, tensor.size_bytes - begin)
            found = xxh3_64_intdigest(window[at:end])
            if found != digests[tensor.first_chunk + chunk]:
                raise Damaged(
                    "bytes differ from their digest",
                    tensor=tensor.name[:200],
                    chunk=chunk,
                    offset=tensor.start + begin,
                )


def verify_mapped(
    layout: ShardLayout, table: Table, view: memoryview, *, num_threads: int = 2
) -> None:
    """Check every byte of a whole shard in memory. Raises Damaged for the first bad chunk found."""
    if len(view) != layout.size_bytes:
        raise Damaged("shard has another size", wanted_bytes=layout.size_bytes, got_bytes=len(view))
    starts = itertools.count(0, VERIFY_BLOCK_BYTES)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for start in iter(lambda: next(starts), None):
                if start >= len(view) or failed:
                    return
                stop = min(start + VERIFY_BLOCK_BYTES, len(view))
                check_range(layout, table.digests, view[start:], start, stop)
        except BaseException as error:  # noqa: BLE001  (raised below, in the caller's thread)
            failed.append(error)

    wanted = min(num_threads, -(-len(view) // VERIFY_BLOCK_BYTES)) - 1
    others = []
    for _ in range(wanted):
        other = threading.Thread(target=work, name="mtckpt-verify", daemon=True)
        with contextlib.suppress(RuntimeError):  # none to be had: slower, not an error
            other.start()
            others.append(other)
    work()
    for other in others:
        other.join()
    if failed:
        raise failed[0]
