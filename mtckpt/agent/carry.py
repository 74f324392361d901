"""Carrying out one command: from a message to the functions that do it, and back.

It knows which function does what, keeps the tiers that were named open, and lets calls for the
slots of one run follow one another. It does not know sockets or threads. Errors are the typed ones;
a foreign one is a bug, and travels as such.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from mtckpt import _inventory, _transfer, _twins
from mtckpt._left import Left, Looked
from mtckpt._manifest import SaveName
from mtckpt._room import check_room
from mtckpt._slots import Slot, SlotFinding, Slots
from mtckpt.agent import work
from mtckpt.agent.configs import read_configs
from mtckpt.agent.findings import save_scan, slot_scan
from mtckpt.agent.places import close_place, open_place, without_cap
from mtckpt.errors import (
    AccessDenied,
    AlreadyExists,
    CheckpointError,
    ObjectNotFound,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers.base import BytesSource, check_key, read_all
from mtckpt.tiers.object_store import ObjectStoreTier

if TYPE_CHECKING:
    from mtckpt._manifest import Record
    from mtckpt._run_files import RunFiles
    from mtckpt._source import Place
    from mtckpt.agent.peer_server import PeerServer

__all__ = ["Carrier"]

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.1
# Longer than any upload that somebody still goes on with.
OLD_UPLOAD_S = 7 * 86400.0
MAX_LOOKED = 64  # slots of which something is known: many more than ranks
Report = Callable[[work.Progress], None]


class Carrier:
    """Carries out commands, any number at once. ``report`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[work.TierRef, tuple[Place, RunFiles | None]] = {}
        self._run_locks: dict[tuple[str, str], threading.Lock] = {}
        self._peer_server: PeerServer | None = None
        self._looked: OrderedDict[int, Looked] = OrderedDict()  # by the inode of a slot
        self._table: dict[type, Callable[..., work.Result]] = {
            work.Ping: lambda _: work.Pong(os.getpid()),
            work.Allocate: self._allocate,
            work.SealSlot: self._seal,
            work.LookAhead: self._look_ahead,
            work.ReadRoots: self._roots,
            work.Recycle: self._recycle,
            work.Free: self._free,
            work.Scan: self._scan,
            work.Flush: self._flush,
            work.Pull: self._pull,
            work.Complete: self._complete,
            work.Verify: self._verify,
            work.Delete: self._delete,
            work.Heal: self._heal,
            work.PutSmall: self._put_small,
            work.WriteRunConfig: self._write_config,
            work.ReadRunConfigs: self._read_configs,
            work.WriteJoin: self._write_join,
            work.ServePeers: self._serve_peers,
            work.Wipe: self._wipe,
        }

    def carry(self, command: work.Command, report: Report, *, again: bool = False) -> work.Result:
        """Do it and say what came of it. Raises the errors that the command's text names.

        ``again``: an earlier process died of or with this command.
        """
        carry = self._table[type(command)]
        try:
            if again and isinstance(command, work.Allocate):
                # What was left of it is nobody's yet: the id was never answered.
                self._slots(command.tier).free(command.run_key, command.slot_id)
            if isinstance(command, (work.Flush, work.Heal, work.Pull)):
                return carry(command, report)
            return carry(command)
        except TierUnavailable:
            # Mounted anew, or made anew by somebody: the next call opens what is there then.
            self._forget(command)
            raise

    def close(self) -> None:
        """Close every tier. Idempotent."""
        with self._lock:
            for place, files in self._places.values():
                close_place(place, files)
            self._places.clear()

    # -- places ----------------------------------------------------------------------------------

    def _place(self, ref: work.TierRef) -> Place:
        return self._opened(ref)[0]

    def _slots(self, ref: work.TierRef) -> Slots:
        return Slots(self._place(ref).local, self._files(ref))

    def _files(self, ref: work.TierRef) -> RunFiles:
        """The hidden files of a directory."""
        files = self._opened(ref)[1]
        assert files is not None
        return files

    def _opened(self, ref: work.TierRef) -> tuple[Place, RunFiles | None]:
        with self._lock:
            known = self._places.get(ref)
            if known is not None and known[0].in_memory and not known[0].local.is_there():
                # Somebody has emptied /dev/shm, say: what the run has lost its agent finds out.
                logger.warning("%s was taken away: memory is begun anew there", ref.path)
                self._drop(ref)
                known = None
            if known is None:
                known = self._places[ref] = open_place(ref)
            return known

    def _forget(self, command: work.Command) -> None:
        with self._lock:
            for field in ("tier", "source", "target", "bad", "good"):
                ref = getattr(command, field, None)
                for known in {ref, without_cap(ref)} & self._places.keys() if ref else ():
                    self._drop(known)

    def _drop(self, ref: work.TierRef) -> None:
        """A directory is closed with its last user, who hears that it is gone, not that it is
        closed. Under the lock."""
        place, files = self._places.pop(ref)
        if files is None:
            close_place(place, files)  # Calls that are under way end normally.

    def _run_lock(self, ref: work.TierRef, run_key: str) -> threading.Lock:
        with self._lock:
            return self._run_locks.setdefault((ref.path, run_key), threading.Lock())

    # -- slots -----------------------------------------------------------------------------------

    def _allocate(self, command: work.Allocate) -> work.SlotFiles:
        # Not under the run's lock: reserving many GiB takes seconds, and the id is new.
        slots = self._slots(command.tier)
        return _slot_files(
            slots.allocate(
                command.run_key, command.slot_id, command.shard_bytes, command.table_bytes
            )
        )

    def _seal(self, command: work.SealSlot) -> work.SealedSlot:
        name = _save_name(command.save)
        looked = self._looked.pop(command.inode, None)
        if looked is not None:
            looked.over = True
        left = Left(command.left, looked)
        with self._run_lock(command.tier, command.run_key):
            record, again = self._slots(command.tier).seal(
                command.run_key,
                command.slot_id,
                command.inode,
                name,
                command.rank,
                verify=command.verify,
                left=left,
            )
        return work.SealedSlot(
            save=command.save,
            save_id=record.save_id,
            step=record.step,
            incarnation=record.incarnation,
            incarnation_id=record.incarnation_id,
            rank=record.rank,
            world_size=record.world_size,
            size_bytes=record.shard.size_bytes,
            due=list(record.due),
            metrics=dict(record.metrics),
            aborted=record.aborted,
            plan_digest=record.plan_digest,
            again=again,
            twins=_twins_of(record),
            left_bytes=left.size_bytes,
        )

    def _look_ahead(self, command: work.LookAhead) -> work.Looked:
        looked = self._looked[command.inode] = Looked()
        while len(self._looked) > MAX_LOOKED:
            self._looked.popitem(last=False)
        self._slots(command.tier).look_ahead(
            command.run_key, command.slot_id, command.inode, command.left, looked
        )
        return work.Looked(sum(looked.sound))

    def _roots(self, command: work.ReadRoots) -> work.Roots:
        tier, name = self._place(command.tier).tier, _save_name(command.save)
        record = _inventory.read_record(tier, command.run_key, name, command.rank)
        return work.Roots(_twins.roots_of(record, command.boxes))

    def _recycle(self, command: work.Recycle) -> work.Recycled:
        name = _save_name(command.save)
        with self._run_lock(command.tier, command.run_key):
            slot = self._slots(command.tier).recycle(
                command.run_key, name, command.rank, command.slot_id
            )
        return work.Recycled(None if slot is None else _slot_files(slot))

    def _free(self, command: work.Free) -> work.Freed:
        with self._run_lock(command.tier, command.run_key):
            return work.Freed(self._slots(command.tier).free(command.run_key, command.slot_id))

    def _wipe(self, command: work.Wipe) -> work.Freed:
        files = self._files(command.tier)
        with self._run_lock(command.tier, command.run_key):
            return work.Freed(files.wipe(command.run_key))

    # -- looking ---------------------------------------------------------------------------------

    def _scan(self, command: work.Scan) -> work.Scanned:
        place = self._place(command.tier)
        if not place.is_local:
            keys = [check_key(command.run_key or "")]
            if command.repair:
                _end_old_uploads(place, keys[0])
            return work.Scanned([self._scan_run(command, place, key) for key in keys])
        swept = place.local.sweep_temporaries() if command.repair else 0
        keys = (
            self._files(command.tier).run_keys()
            if command.run_key is None
            else [check_key(command.run_key)]
        )
        runs: list[work.RunScan] = []
        for key in keys:
            try:
                runs.append(self._scan_run(command, place, key))
            except AccessDenied as error:
                if command.run_key is not None:
                    raise
                # What somebody planted in one run must not keep the others from being found.
                logger.warning("a run is left alone: %s", error.what)
        try:
            usage = os.statvfs(command.tier.path)
        except OSError as error:
            raise TierUnavailable(
                f"{command.tier.path} went away: {error.strerror}", tier=command.tier.label
            ) from error
        return work.Scanned(
            runs=runs,
            swept=swept,
            quarantined=[item.key for item in place.local.quarantined()],
            free_bytes=usage.f_bavail * usage.f_frsize,
            total_bytes=usage.f_blocks * usage.f_frsize,
        )

    def _scan_run(self, command: work.Scan, place: Place, run_key: str) -> work.RunScan:
        found: list[SlotFinding] = []
        repaired: list[str] = []
        if place.in_memory:
            with self._run_lock(command.tier, run_key):
                findings = self._slots(command.tier).scan(run_key, repair=command.repair)
            found, repaired = findings.slots, findings.repaired
        elif command.repair and place.is_local:
            repaired = self._files(command.tier).drop_empty(run_key)
        inventory = _inventory.scan(place.tier, run_key, label=command.tier.label or None)
        return work.RunScan(
            run_key=run_key,
            saves=[save_scan(save) for _, save in sorted(inventory.saves.items())],
            incarnations=inventory.incarnations,
            slots=[slot_scan(finding) for finding in found],
            repaired=repaired,
            problems=inventory.problems,
        )

    def _verify(self, command: work.Verify) -> work.Verified:
        start_s = time.monotonic()
        result = _transfer.verify_shard(
            self._place(command.tier),
            command.run_key,
            _save_name(command.save),
            command.rank,
            read_data=command.read_data,
        )
        return work.Verified(
            read_bytes=result.read_bytes,
            elapsed_s=_since(start_s),
            damaged=[work.DamagedKey(key, why) for key, why in result.damaged.items()],
        )

    # -- moving ----------------------------------------------------------------------------------

    def _flush(self, command: work.Flush, report: Report) -> work.Flushed:
        start_s = time.monotonic()
        name = _save_name(command.save)
        report(work.Progress(0, 0))
        source = self._place(without_cap(command.source))
        target = self._place(command.target)
        key = _inventory.shard_keys(command.run_key, name, command.rank)[0]
        size_bytes = source.tier.stat(key).size_bytes
        if target.is_local:
            with contextlib.suppress(ObjectNotFound):
                target.tier.stat(key)  # A place that hangs is found here, in little time.
        if target.in_memory:
            check_room(command.target.path, size_bytes)
        if command.incarnation and not target.is_local:
            _inventory.check_newest(target.tier, command.run_key, command.incarnation)
        report(work.Progress(0, size_bytes))
        meter = _Meter(size_bytes, report)
        result = _transfer.copy_shard(
            source,
            target,
            command.run_key,
            name,
            command.rank,
            base=_save_name(command.base) if command.base else None,
            progress=meter.add,
        )
        done = None
        if command.is_last:
            known = None if target.is_local else result.record
            done = _transfer.write_manifest(
                target, command.run_key, name, known,
                reused_bytes=command.reused_bytes + result.reused_bytes,
                parts=command.parts and target.is_local,
            )  # fmt: skip
        return work.Flushed(
            result.copied_bytes,
            _since(start_s),
            done is not None,
            result.rewritten,
            weak=done is not None and not done.atomic,
            reused_bytes=result.reused_bytes,
        )

    def _pull(self, command: work.Pull, report: Report) -> work.Flushed:
        # The other data processes have no use for sockets.
        from mtckpt.agent.receiving import receive

        def begin(size_bytes: int) -> Callable[[int], None]:
            report(work.Progress(0, size_bytes))
            return _Meter(size_bytes, report).add

        report(work.Progress(0, 0))
        return receive(command, self._place(command.target), _save_name(command.save), begin)

    def _complete(self, command: work.Complete) -> work.Completed:
        name = _save_name(command.save)
        place = self._place(command.tier)
        done = _transfer.write_manifest(place, command.run_key, name, parts=command.parts)
        return work.Completed(done is not None, weak=done is not None and not done.atomic)

    def _heal(self, command: work.Heal, report: Report) -> work.Healed:
        name = _save_name(command.save)
        bad, good = self._place(command.bad), self._place(command.good)
        key = _inventory.shard_keys(command.run_key, name, command.rank)[0]
        size_bytes = good.tier.stat(key).size_bytes
        meter = _Meter(size_bytes, report)
        replaced = _transfer.heal_shard(
            bad, good, command.run_key, name, command.rank, progress=meter.add
        )
        return work.Healed(replaced, size_bytes if key in replaced else 0)

    def _delete(self, command: work.Delete) -> work.Deleted:
        with self._run_lock(command.tier, command.run_key):
            busy, freed_bytes = _transfer.delete_save(
                self._place(command.tier),
                command.run_key,
                _save_name(command.save),
                records_only=command.records_only,
                ranks=command.ranks,
            )
        return work.Deleted(busy, freed_bytes)

    def _put_small(self, command: work.PutSmall) -> work.Stored:
        place = self._place(command.tier)
        try:
            place.tier.put(command.key, BytesSource(command.data))
        except AlreadyExists:
            size_bytes = place.tier.stat(command.key).size_bytes
            if size_bytes != len(command.data) or (
                read_all(place.tier, command.key, max_bytes=size_bytes) != command.data
            ):
                raise
            return work.Stored(already=True)
        return work.Stored()

    def _serve_peers(self, command: work.ServePeers) -> work.Serving:
        from mtckpt.agent.peer_server import PeerServer

        with self._lock:
            if self._peer_server is None:
                self._peer_server = PeerServer()
        return self._peer_server.serve(command)

    # -- configuration ---------------------------------------------------------------------------

    def _write_config(self, command: work.WriteRunConfig) -> work.Stored:
        files = self._files(command.tier)
        with self._run_lock(command.tier, command.config.run_key):
            files.write_config(command.config.run_key, msgspec.json.encode(command.config))
        return work.Stored()

    def _write_join(self, command: work.WriteJoin) -> work.Stored:
        files = self._files(command.tier)
        with self._run_lock(command.tier, command.run_key):
            files.write_secret(command.run_key, command.data)
        return work.Stored()

    def _read_configs(self, command: work.ReadRunConfigs) -> work.RunConfigs:
        return read_configs(self._files(command.tier))


class _Meter:
    """Adds up bytes from several threads and reports them, ten times a second at most."""

    def __init__(self, total_bytes: int, report: Report) -> None:
        self._total_bytes = total_bytes
        self._report = report
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._next_s = 0.0

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            now_s = time.monotonic()
            done_bytes = min(self._done_bytes, self._total_bytes)
            # That all of it is done is always said: what follows may take a while.
            if now_s < self._next_s and done_bytes < self._total_bytes:
                return
            self._next_s = now_s + PROGRESS_INTERVAL_S
        self._report(work.Progress(done_bytes, self._total_bytes))


def _end_old_uploads(place: Place, run_key: str) -> None:
    """Throw away uploads that nobody goes on with: they are billed, and never listed."""
    if isinstance(place.tier, ObjectStoreTier):
        try:
            ended = place.tier.abort_uploads(f"{run_key}/", older_than_s=OLD_UPLOAD_S)
            if ended:
                logger.info("%s: %d unfinished uploads were thrown away", place.tier.name, ended)
        except CheckpointError as error:
            # Not everybody has the right to; saves do not need it.
            logger.info("%s: unfinished uploads are not looked at: %s", place.tier.name, error.what)


def _twins_of(record: Record) -> dict[str, str]:
    """To be compared with those of other ranks, if there are any and it can be told."""
    if record.world_size == 1:
        return {}
    try:
        return _twins.twins_of(record)
    except CheckpointError as error:
        # The shard is as its record says; that what others hold cannot be read from it changes
        # nothing of that.
        logger.warning("%s: its replicas are not compared: %s", record.name, error.what)
        return {}


def _save_name(text: str) -> SaveName:
    name = SaveName.parse(text)
    if name is None:
        raise UsageError(f"not the name of a save: {text[:80]!r}", state="nothing was done")
    return name


def _slot_files(slot: Slot) -> work.SlotFiles:
    return work.SlotFiles(
        slot_id=slot.slot_id,
        inode=slot.inode,
        data_path=slot.data_path,
        table_path=slot.table_path,
        record_path=slot.record_path,
        shard_bytes=slot.shard_bytes,
        table_bytes=slot.table_bytes,
    )


def _since(start_s: float) -> float:
    return round(time.monotonic() - start_s, 6)
