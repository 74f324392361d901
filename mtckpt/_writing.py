"""The files of one shard: header, data with digests, record, and last the generation word.

Knows what a captured state leaves in a slot, and in which order. Does not know when a save is due
or what becomes of it afterwards. A capture that fails leaves the slot without its generation word,
which makes it garbage; the previous save is in another slot.
"""

from __future__ import annotations

import base64
import errno
import functools
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_128

from mtckpt import _manifest, _shard, _state
from mtckpt._crash import crash_point
from mtckpt._manifest import Record, ShardEntry
from mtckpt._shard import Table
from mtckpt.capture.collector import collector_paused
from mtckpt.errors import CaptureFailed, TierFull, UnsupportedState

if TYPE_CHECKING:
    from mtckpt._save import Captured, HeldSlot, Identity, Plan
    from mtckpt.agent.protocol import SlotGrant
    from mtckpt.capture.base import Engine, Mode

__all__ = ["Writing"]


class Writing:
    """A shard on its way into its slot: header, data with digests, record, generation word last.

    The order is the promise: without the word the slot is garbage, with it everything is there.
    The values are those when this was made; ``finish`` waits for bytes that devices still copy.
    """

    @collector_paused()
    def __init__(
        self,
        captured: Captured,
        slot: HeldSlot,
        identity: Identity,
        engine: Engine,
        *,
        due: Sequence[str],
        metrics: Mapping[str, float],
        every: int,
        mode: Mode = "auto",
        may_leave: bool = False,
        write: Callable[[SlotGrant, Callable[[], None]], None] | None = None,
    ) -> None:
        """``may_leave``: what lies in the slot already may stay, since the seal looks at it.
        ``write`` does work on the files of the slot, which may lie where nobody answers."""
        layout = captured.plan.layout
        plain = msgspec.json.encode([_state.encode_plain(value) for value in captured.plain])
        self._slot = slot
        self._identity = identity
        self._write = write
        self._keep = captured  # the arrays, for as long as they are read
        self._draft = _draft(captured.plan, identity, plain, due, metrics, every)
        table = slot.table.view
        is_known = may_leave and Table.is_of(table, layout)
        # The digests of a shard whose bytes change say nothing of them any more.
        table[: _shard.TABLE_HEADER.size] = bytes(_shard.TABLE_HEADER.size)
        # Every time: since this process last had the slot, another rank may have had it.
        slot.data.view[: layout.data_start] = layout.header
        self._digests = table[_shard.TABLE_HEADER.size :].cast("Q")
        self._capture = engine.capture(
            captured.sources, captured.plan.spans, slot.data.address, self._digests, mode,
            is_known=is_known,
        )  # fmt: skip
        self.is_captured = self._capture.is_captured
        self.is_done = self._capture.is_done

    @collector_paused()
    def finish(self) -> bytes:
        """Which chunks were left as they lay in the slot, a bit each: nobody has looked at them.

        Raises what the capture does, TierFull and TierUnavailable for the record.
        """
        layout = self._keep.plan.layout
        table = self._slot.table.view
        left = self._capture.finish(self._digests)
        crash_point("capture.copied")
        header = Table.header(layout, _manifest.generation_of(self._identity.save_id))
        table_digest = xxh3_128(header)
        table_digest.update(self._digests)
        record = _record(self._keep.plan, self._draft, table_digest.hexdigest(), self._digests)
        grant = self._slot.grant
        write = functools.partial(_write_record, grant, record)
        self._write(grant, write) if self._write else write()
        at = _shard.GENERATION_OFFSET
        table[: len(header)] = header[:at] + bytes(8) + header[at + 8 :]
        table[at : at + 8] = header[at : at + 8]
        return left


def _draft(
    plan: Plan,
    identity: Identity,
    plain: bytes,
    due: Sequence[str],
    metrics: Mapping[str, float],
    every: int,
) -> Record:
    """The record but for what is known only once the bytes are there."""
    return Record(
        version=_manifest.FORMAT_VERSION,
        run=identity.run,
        step=identity.step,
        incarnation=identity.incarnation,
        incarnation_id=identity.incarnation_id,
        save_id=identity.save_id,
        rank=identity.rank,
        world_size=identity.world_size,
        plan_digest=plan.digest,
        shard=ShardEntry(
            size_bytes=plan.layout.size_bytes,
            data_start=plan.layout.data_start,
            header_digest=f"{plan.layout.header_digest:016x}",
            table_digest="",
            chunk_bytes=_shard.CHUNK_BYTES,
        ),
        roots="",
        arrays=plan.arrays_json,
        structure=plan.structure_json,
        plain=msgspec.Raw(plain),
        writer="mtckpt",
        host=socket.gethostname(),
        saved_at_s=round(time.time(), 3),
        every=every,
        metrics={name: float(value) for name, value in metrics.items()},
        due=tuple(due),
    )


def _record(plan: Plan, draft: Record, table_digest: str, digests: memoryview) -> bytes:
    record = msgspec.structs.replace(
        draft,
        shard=msgspec.structs.replace(draft.shard, table_digest=table_digest),
        roots=base64.b64encode(_shard.root_digests(plan.layout, digests, plan.roots)).decode(),
    )
    data = _manifest.encode_sealed(record)
    if len(data) > _manifest.MAX_RECORD_BYTES:
        raise UnsupportedState(
            f"plain values and names need a record of {len(data):,} bytes",
            path="",
            limit_bytes=_manifest.MAX_RECORD_BYTES,
            state="nothing was saved",
            actions=("hold large data in arrays instead of lists, strings and bytes",),
        )
    return data


def _write_record(grant: SlotGrant, data: bytes) -> None:
    """Put the record beside its slot, readable for whom the slot is, whatever the umask."""
    temporary = f"{grant.record_path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    mode = os.stat(grant.data_path).st_mode & 0o660
    try:
        fd = os.open(temporary, flags, 0o600)
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, grant.record_path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (TierFull if full else CaptureFailed)(
            f"the record could not be written: {error.strerror}",
            tier="ram",
            needed_bytes=len(data),
            state="the step was not saved; earlier steps are unchanged",
            actions=("make room there",) if full else ("see the cause of this error",),
        ) from error
