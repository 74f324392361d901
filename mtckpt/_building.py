"""A save made of arrays that arrive piece by piece, written straight into a tier.

Knows the three files of a shard and the order in which they are put. Does not know where pieces
come from, nor runs that train, slots or agents. Holds a few blocks in memory, whatever the size of
an array; until the record is there, nobody sees a save.
"""

from __future__ import annotations

import base64
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from xxhash import xxh3_64, xxh3_128_hexdigest

from mtckpt import _inventory, _manifest, _shard, _state
from mtckpt._manifest import ArrayEntry, Incarnation, Record, ShardEntry
from mtckpt._shard import CHUNK_BYTES, ShardLayout, Table
from mtckpt.capture.memory import anonymous
from mtckpt.errors import Damaged, TierUnavailable, UnsupportedState
from mtckpt.tiers import BytesSource

if TYPE_CHECKING:
    from mtckpt._state import ArraySpec, Node
    from mtckpt.tiers import LocalTier

__all__ = ["Pieced", "build_save"]

# A block that nobody has asked for meanwhile will not be asked for: its writer has given up.
_TURN_S = 30.0


@dataclass(frozen=True, slots=True)
class Pieced:
    """One array, or one box of it: ``pieces`` gives its bytes in C order, in pieces of any size.

    It is called once. Boxes of one array have one path.
    """

    path: str
    spec: ArraySpec
    pieces: Callable[[], Iterator[memoryview]]


def build_save(
    tier: LocalTier,
    incarnation: Incarnation,
    step: int,
    arrays: Sequence[Pieced],
    root: Node,
    plain: Sequence[Any],
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write one save of one rank; returns the size of its shard. The incarnation is there already.

    Raises:
        Damaged: an array has more or fewer bytes than its type and shape mean.
        AlreadyExists: the step is there. TierError: it could not be written. Both leave nothing.
    """
    entries = [ArrayEntry(each.path, *each.spec) for each in arrays]
    names = [entry.stored_name for entry in entries]
    layout = _shard.plan_layout(
        (name, each.spec.dtype, each.spec.shape) for name, each in zip(names, arrays, strict=True)
    )
    id_ = _manifest.save_id(incarnation.id, step, 0)
    name = _manifest.save_name(step, incarnation.number, id_)
    keys = _inventory.shard_keys(_manifest.run_key(incarnation.run), name, 0)
    stream = _Stream(
        layout, {name: each.pieces for name, each in zip(names, arrays, strict=True)}, progress
    )
    tier.put(keys[0], stream)
    digests = memoryview(stream.digests)
    table = Table.header(layout, _manifest.generation_of(id_)) + digests.tobytes()
    arrays_json = msgspec.json.encode(entries)
    record = Record(
        version=_manifest.FORMAT_VERSION,
        run=incarnation.run,
        step=step,
        incarnation=incarnation.number,
        incarnation_id=incarnation.id,
        save_id=id_,
        rank=0,
        world_size=1,
        plan_digest=xxh3_128_hexdigest(arrays_json),
        shard=ShardEntry(
            size_bytes=layout.size_bytes,
            data_start=layout.data_start,
            header_digest=layout.header_digest_hex,
            table_digest=_shard.table_digest(table),
            chunk_bytes=CHUNK_BYTES,
        ),
        roots=base64.b64encode(_shard.root_digests(layout, digests)).decode(),
        arrays=msgspec.Raw(arrays_json),
        structure=msgspec.Raw(msgspec.json.encode(_state.node_to_json(root))),
        plain=msgspec.Raw(msgspec.json.encode([_state.encode_plain(value) for value in plain])),
        writer="mtckpt import",
        host=socket.gethostname(),
        saved_at_s=round(time.time(), 3),
    )
    sealed = _manifest.encode_sealed(record)
    if len(sealed) > _manifest.MAX_RECORD_BYTES:
        raise UnsupportedState(
            f"plain values and names need a record of {len(sealed):,} bytes",
            path="",
            limit_bytes=_manifest.MAX_RECORD_BYTES,
            state="the step was not written",
            actions=("leave out what is no array",),
        )
    tier.put(keys[1], BytesSource(table))
    tier.put(keys[2], BytesSource(sealed))
    return layout.size_bytes


class _Stream:
    """The shard file as a source. Blocks are made one after the other, whoever asks for them."""

    def __init__(
        self,
        layout: ShardLayout,
        pieces_of: dict[str, Callable[[], Iterator[memoryview]]],
        progress: Callable[[int], None],
    ) -> None:
        self.size_bytes = layout.size_bytes
        self.digests = array("Q", bytes(8 * layout.num_chunks))
        self._layout = layout
        self._pieces_of = pieces_of
        self._progress = progress
        self._turn = threading.Condition()
        self._next = 0
        self._failed = False
        self._pieces = self._made()
        self._rest = memoryview(b"")
        self._own = threading.local()

    def read(self, offset: int, size_bytes: int) -> memoryview:
        """The block at ``offset``, once all before it have been made."""
        with self._turn:
            self._await(offset)
            try:
                view = self._block(size_bytes)
            except BaseException:
                self._failed = True
                self._turn.notify_all()
                raise
            self._next = offset + size_bytes
            self._turn.notify_all()
            self._progress(self._next)
            return view

    def _await(self, offset: int) -> None:
        seen = -1
        while self._next != offset and not self._failed:
            if self._next == seen:
                break
            seen = self._next
            self._turn.wait_for(lambda: self._next == offset or self._failed, _TURN_S)
        if self._next != offset or self._failed:
            raise TierUnavailable("a block of the shard before this one was not written")

    def _block(self, size_bytes: int) -> memoryview:
        """Aligned memory of this thread, filled with the next bytes."""
        memory = getattr(self._own, "memory", None)
        if memory is None or memory.size_bytes < size_bytes:
            memory = self._own.memory = anonymous(size_bytes)
        view: memoryview = memory.view[:size_bytes]
        done = 0
        while done < size_bytes:
            if not self._rest:
                self._rest = next(self._pieces)
            take = min(len(self._rest), size_bytes - done)
            view[done : done + take] = self._rest[:take]
            self._rest = self._rest[take:]
            done += take
        return view

    def _made(self) -> Iterator[memoryview]:
        """All bytes of the file in order; the digests are filled in on the way."""
        yield memoryview(self._layout.header)
        for tensor in self._layout.tensors:
            done, chunk, digest = 0, tensor.first_chunk, xxh3_64()
            for piece in self._pieces_of[tensor.name]():
                if done + len(piece) > tensor.size_bytes:
                    raise _other_size(tensor.name, tensor.size_bytes)
                at = 0
                while at < len(piece):
                    take = min(len(piece) - at, CHUNK_BYTES - done % CHUNK_BYTES)
                    digest.update(piece[at : at + take])
                    at, done = at + take, done + take
                    if done % CHUNK_BYTES == 0 or done == tensor.size_bytes:
                        self.digests[chunk] = digest.intdigest()
                        chunk, digest = chunk + 1, xxh3_64()
                yield piece
            if done != tensor.size_bytes:
                raise _other_size(tensor.name, tensor.size_bytes)


def _other_size(name: str, size_bytes: int) -> Damaged:
    return Damaged(
        "an array has not as many bytes as its type and shape mean",
        leaf=name[:200],
        wanted_bytes=size_bytes,
        state="the step was not written",
    )
