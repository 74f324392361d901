"""RAM slots: files in tmpfs that trainers map and capture into, handed out by the agent.

It knows the files of a slot, where they wait (``RUN/.slots/ID.*``, hidden from listings), and the
order of the renames that turn a slot into a sealed shard and back. It does not know who owns a
slot, when one is free, or what a retention rule says: the agent decides, this carries it out. All
calls block; calls for one run must not overlap. A process killed between any two steps leaves what
``scan`` understands: never a shard that is offered and not whole.

Seal: data, table, record are renamed in this order, so a shard whose record shows is whole.
Recycle: the record is unlinked first, then the table's generation word is zeroed, then table and
data move. Rename keeps the inode, so the trainer's mapping stays valid.

Killed after (seal)     what is there                    scan with repair
checks                  all three in .slots              reports a finished slot
mkdir                   the same, an empty directory     the same; the directory goes
rename of data          table and record in .slots       moves the data back: a finished slot
rename of table         record in .slots                 moves both back: a finished slot
rename of record        all three in the save            a sealed shard
Killed after (recycle)
unlink of the record    data and table in the save       both are deleted
zeroing, same as above
rename of the table     table in .slots, data in save    both are deleted
rename of the data      data and table in .slots         reports a free slot; the directory goes
Free and allocate leave a part of a slot, which is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest, _shard
from mtckpt._crash import crash_point
from mtckpt._held import Mapped
from mtckpt._manifest import Record, SaveName
from mtckpt._room import check_room, ram_full
from mtckpt._run_files import is_there, size_bytes_at, unlink
from mtckpt._shard import Table
from mtckpt._taken import take_in
from mtckpt.errors import AlreadyExists, Damaged, FormatError, ObjectNotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mtckpt._left import Left, Looked
    from mtckpt._run_files import RunFiles
    from mtckpt.tiers.local import LocalTier

__all__ = ["Slot", "SlotFinding", "SlotFindings", "Slots"]

DIRECTORY = ".slots"
# In a tier on disk, beside its runs: the RAM directory of those for which memory has no room.
BESIDE = ".mtckpt-slots"
DATA, TABLE, RECORD = ".safetensors", ".xxh3", ".json"
# A trainer writes its record under this name and renames it.
UNFINISHED_RECORD = ".json.new"
MAX_TABLE_BYTES = 1 << 31
_SLOT_ID = re.compile(r"[a-z0-9_-]{1,64}")
_RANK_FILE = re.compile(r"rank-(\d{5})\.(safetensors|xxh3|json)")


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot and the paths that a trainer opens; ``inode`` is that of the data file."""

    slot_id: str
    inode: int
    shard_bytes: int
    table_bytes: int
    data_path: str
    table_path: str
    record_path: str


@dataclass(frozen=True, slots=True)
class SlotFinding:
    """A slot that ``scan`` met. ``record`` is None unless the capture into it was finished."""

    slot: Slot
    generation: int
    record: Record | None


@dataclass(slots=True)
class SlotFindings:
    """``repaired`` has a line for each thing that a crash had left half done."""

    slots: list[SlotFinding] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


class Slots:
    """The slots of every run below one RAM root; ``tier`` and ``files`` are of that root."""

    def __init__(self, tier: LocalTier, files: RunFiles) -> None:
        self._tier = tier
        self._files = files

    # -- the life of a slot ----------------------------------------------------------------------

    def allocate(self, run_key: str, slot_id: str, shard_bytes: int, table_bytes: int) -> Slot:
        """Make a slot of exactly these sizes, its pages reserved.

        Raises:
            TierFull: with the arithmetic; nothing is left behind.
            AlreadyExists: there is a slot of that id.
        """
        needed_bytes = shard_bytes + table_bytes
        with self._files.directory(run_key, DIRECTORY, create=True) as slots_fd:
            check_room(str(self._files.path), needed_bytes)
            made: list[str] = []
            try:
                for suffix, size_bytes in ((DATA, shard_bytes), (TABLE, table_bytes)):
                    self._reserve(slots_fd, _slot_file(slot_id, suffix), size_bytes, made)
                    crash_point(f"allocate{suffix}")
            except BaseException as error:
                for name in made:
                    unlink(name, slots_fd)
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise ram_full(str(self._files.path), needed_bytes) from error
                raise
            return self._slot(run_key, slot_id, slots_fd)

    def seal(
        self,
        run_key: str,
        slot_id: str,
        inode: int,
        name: SaveName,
        rank: int,
        *,
        verify: bool,
        left: Left | None = None,
    ) -> tuple[Record, bool]:
        """Turn a captured slot into the shard of ``rank``; also True if it was one already.

        All of its data is read, or the chunks that were ``left`` as they lay there, or none.

        Raises:
            Damaged, FormatTooNew: what lies in the slot is not that shard; the slot is freed.
            AlreadyExists: another slot was sealed as this shard; nothing changed.
            ObjectNotFound: there is no such slot, or its data is another file.
        """
        with self._files.directory(run_key, DIRECTORY, create=True) as slots_fd:
            self._undo_half_seal(run_key, slot_id, slots_fd)
            if (record := self._sealed_before(run_key, inode, name, rank)) is not None:
                return record, True
            try:
                with self._captured(run_key, slot_id, inode, slots_fd) as fd:
                    record = self._check(slot_id, fd, name, rank, slots_fd, verify, left)
            except FormatError:
                self._free(slot_id, slots_fd)
                raise
            crash_point("seal.checked")
            with self._files.directory(run_key, str(name), create=True) as save_fd:
                crash_point("seal.directory")
                for suffix, file in _shard_files(rank):
                    os.rename(
                        _slot_file(slot_id, suffix), file, src_dir_fd=slots_fd, dst_dir_fd=save_fd
                    )
                    crash_point(f"seal{suffix}")
        return record, False

    def recycle(self, run_key: str, name: SaveName, rank: int, slot_id: str) -> Slot | None:
        """Turn a sealed shard into a free slot; None, and nothing done, while somebody reads it.

        Goes on where an earlier call was killed. ObjectNotFound: there was no such shard, or only
        a part of one, which is gone now.
        """
        data_key, _, _ = _inventory.shard_keys(run_key, name, rank)
        with self._files.directory(run_key, DIRECTORY, create=True) as slots_fd:
            try:
                with self._tier.try_exclusive(data_key) as fd:
                    if fd is None:
                        return None
                    self._take_apart(run_key, name, rank, slot_id, slots_fd)
            except ObjectNotFound:
                if not is_there(_slot_file(slot_id, DATA), slots_fd):
                    self._free(slot_id, slots_fd)
                    raise
            with contextlib.suppress(ObjectNotFound):
                self._drop_remains(run_key, str(name), parts=False)
            crash_point("recycle.done")
            return self._slot(run_key, slot_id, slots_fd)

    def _take_apart(
        self, run_key: str, name: SaveName, rank: int, slot_id: str, slots_fd: int
    ) -> None:
        with self._files.directory(run_key, str(name)) as save_fd:
            unlink(_manifest.record_file(rank), save_fd)
            crash_point("recycle.record")
            table = _manifest.table_file(rank)
            if is_there(table, save_fd):
                # A slot never waits with the word of a save that it no longer holds.
                fd = self._files.open(save_fd, table, writable=True)
                try:
                    os.pwrite(fd, bytes(8), _shard.GENERATION_OFFSET)
                finally:
                    os.close(fd)
                crash_point("recycle.generation")
            for suffix, file in reversed(_shard_files(rank)[:2]):
                if is_there(file, save_fd):
                    os.rename(
                        file, _slot_file(slot_id, suffix), src_dir_fd=save_fd, dst_dir_fd=slots_fd
                    )
                crash_point(f"recycle{suffix}")

    def free(self, run_key: str, slot_id: str) -> int:
        """Delete a slot, captured or not; the bytes freed. One that is not there is no error."""
        with (
            contextlib.suppress(ObjectNotFound),
            self._files.directory(run_key, DIRECTORY) as slots_fd,
        ):
            self._undo_half_seal(run_key, slot_id, slots_fd)
            return self._free(slot_id, slots_fd)
        return 0

    def _free(self, slot_id: str, slots_fd: int) -> int:
        freed_bytes = 0
        for suffix in (RECORD, UNFINISHED_RECORD, TABLE, DATA):
            freed_bytes += unlink(_slot_file(slot_id, suffix), slots_fd)
            crash_point(f"free{suffix}")
        return freed_bytes

    # -- what a crash left -----------------------------------------------------------------------

    def scan(self, run_key: str, *, repair: bool) -> SlotFindings:
        """Every slot of a run. With ``repair`` also undo what is half done; see the module's text.

        Slots that a live trainer is capturing into are whole and unfinished: they are left alone.
        """
        findings = SlotFindings()
        if repair:
            findings.repaired += take_in(self._files, run_key)
        for slot_id in self._slot_ids(run_key):
            with self._files.directory(run_key, DIRECTORY) as slots_fd:
                self._scan_slot(run_key, slot_id, slots_fd, findings, repair)
        if repair:
            for name in self._files.save_names(run_key):
                with contextlib.suppress(ObjectNotFound):
                    findings.repaired += self._drop_remains(run_key, name, parts=True)
        return findings

    def _slot_ids(self, run_key: str) -> list[str]:
        try:
            with self._files.directory(run_key, DIRECTORY) as slots_fd:
                ids = {name.partition(".")[0] for name in os.listdir(slots_fd)}
        except ObjectNotFound:
            return []  # No slots were ever made for this run.
        return sorted(filter(_SLOT_ID.fullmatch, ids))

    def _scan_slot(
        self, run_key: str, slot_id: str, slots_fd: int, findings: SlotFindings, repair: bool
    ) -> None:
        if repair and self._undo_half_seal(run_key, slot_id, slots_fd):
            findings.repaired.append(f"slot {slot_id} had been sealed by half: it is whole again")
        table_bytes = size_bytes_at(_slot_file(slot_id, TABLE), slots_fd)
        if not is_there(_slot_file(slot_id, DATA), slots_fd) or (
            table_bytes < _shard.TABLE_HEADER.size
        ):
            if repair:
                freed_bytes = self._free(slot_id, slots_fd)
                findings.repaired.append(f"a part of slot {slot_id} is gone ({freed_bytes} bytes)")
            return
        slot = self._slot(run_key, slot_id, slots_fd)
        table = self._files.read(slots_fd, _slot_file(slot_id, TABLE), MAX_TABLE_BYTES)
        record = None
        with contextlib.suppress(FormatError, FileNotFoundError):
            record = self._read_record(slots_fd, _slot_file(slot_id, RECORD))
        if record is not None and (
            _shard.table_digest(table) != record.shard.table_digest
            or _shard.generation_in(table) != _manifest.generation_of(record.save_id)
            or record.shard.size_bytes != slot.shard_bytes
        ):
            record = None
        findings.slots.append(SlotFinding(slot, _shard.generation_in(table), record))

    def _undo_half_seal(self, run_key: str, slot_id: str, slots_fd: int) -> bool:
        """Move data and table back to a record that waits for them. True if any was moved."""
        missing = [
            suffix
            for suffix in (DATA, TABLE)
            if not is_there(_slot_file(slot_id, suffix), slots_fd)
        ]
        if not missing or not is_there(_slot_file(slot_id, RECORD), slots_fd):
            return False
        try:
            record = self._read_record(slots_fd, _slot_file(slot_id, RECORD))
        except FormatError:
            return False  # A record that was never finished: then nothing was sealed.
        name = record.name
        moved = False
        with (
            contextlib.suppress(ObjectNotFound),
            self._files.directory(run_key, str(name)) as save_fd,
        ):
            if is_there(_manifest.record_file(record.rank), save_fd):
                return False  # Another slot was sealed as this shard; its files are its own.
            for suffix, file in reversed(_shard_files(record.rank)[:2]):
                if suffix in missing and is_there(file, save_fd):
                    os.rename(
                        file, _slot_file(slot_id, suffix), src_dir_fd=save_fd, dst_dir_fd=slots_fd
                    )
                    moved = True
        return moved

    def _drop_remains(self, run_key: str, name: str, *, parts: bool) -> list[str]:
        """Delete what no record speaks for in a save of the RAM tier; the directory if empty.

        Without ``parts``, only what is left once no file of any shard is there.
        """
        dropped: list[str] = []
        with self._files.directory(run_key, name) as save_fd:
            files = sorted(os.listdir(save_fd))
            if not parts and any(map(_RANK_FILE.fullmatch, files)):
                return dropped  # Another rank's, perhaps on its way in.
            sealed = {
                m[1] for file in files if (m := _RANK_FILE.fullmatch(file)) and m[2] == "json"
            }
            for file in files:
                match = _RANK_FILE.fullmatch(file)
                if (match[1] not in sealed) if match else not sealed:
                    unlink(file, save_fd)
                    dropped.append(f"{name}/{file} is gone: no record spoke for it")
        with self._files.directory(run_key) as run_fd, contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=run_fd)  # Refused, as it should be, while a shard is in it.
        return dropped

    # -- inside ----------------------------------------------------------------------------------

    def _slot(self, run_key: str, slot_id: str, slots_fd: int) -> Slot:
        data = os.lstat(_slot_file(slot_id, DATA), dir_fd=slots_fd)
        base = self._files.path / run_key / DIRECTORY
        return Slot(
            slot_id,
            data.st_ino,
            data.st_size,
            os.lstat(_slot_file(slot_id, TABLE), dir_fd=slots_fd).st_size,
            *(str(base / _slot_file(slot_id, suffix)) for suffix in (DATA, TABLE, RECORD)),
        )

    def _reserve(self, slots_fd: int, name: str, size_bytes: int, made: list[str]) -> None:
        """Take every page now: a full tmpfs is an error here, and never a SIGBUS in a mapping."""
        try:
            fd = self._files.create(name, slots_fd)
        except FileExistsError as error:
            raise AlreadyExists(
                f"{name} is there already", tier=self._tier.name, key=name
            ) from error
        made.append(name)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        finally:
            os.close(fd)

    def _read_record(self, dir_fd: int, name: str) -> Record:
        return _manifest.decode_sealed(
            self._files.read(dir_fd, name, _manifest.MAX_RECORD_BYTES), Record
        )

    @contextlib.contextmanager
    def _captured(self, run_key: str, slot_id: str, inode: int, slots_fd: int) -> Iterator[int]:
        """The data of a slot, open. ObjectNotFound if it is not there, or another file."""
        key = f"{run_key}/{DIRECTORY}/{slot_id}"
        try:
            fd = self._files.open(slots_fd, _slot_file(slot_id, DATA))
        except FileNotFoundError as error:
            raise ObjectNotFound(f"no slot {slot_id}", tier=self._tier.name, key=key) from error
        try:
            if (found := os.fstat(fd).st_ino) != inode:
                raise ObjectNotFound(
                    f"slot {slot_id} is another file by now",
                    tier=self._tier.name, key=key, inode=found, wanted_inode=inode,
                )  # fmt: skip
            yield fd
        finally:
            os.close(fd)

    def _check(
        self,
        slot_id: str,
        fd: int,
        name: SaveName,
        rank: int,
        slots_fd: int,
        verify: bool,
        left: Left | None,
    ) -> Record:
        """The record of a slot whose three files belong together and are that shard."""
        try:
            record = self._read_record(slots_fd, _slot_file(slot_id, RECORD))
            table_data = self._files.read(slots_fd, _slot_file(slot_id, TABLE), MAX_TABLE_BYTES)
        except FileNotFoundError as error:
            raise Damaged(
                f"slot {slot_id} lacks a file: {error.filename}", slot_id=slot_id
            ) from error
        _inventory.check_record(record, name, rank)
        size_bytes = os.fstat(fd).st_size
        header = _shard.read_header(fd, size_bytes)
        if not (verify or left):
            # Its trainer lives and planned that header: the digests tell that it is the one.
            _inventory.check_digests(record, header, size_bytes, table_data)
            return record
        layout, table = _inventory.check_identity(record, header, size_bytes, table_data)
        with contextlib.closing(Mapped(fd, size_bytes)) as reader:
            view = reader.window(0, size_bytes)
            if verify:
                _shard.verify_mapped(layout, table, view)
            elif left:
                left.check(layout, table.digests, view)
        return record

    def look_ahead(
        self, run_key: str, slot_id: str, inode: int, left: bytes, looked: Looked
    ) -> None:
        """Look at chunks of a slot that is given out, before it is captured into again.

        Nothing comes of a slot that is being captured into, or is gone.
        """
        with (
            contextlib.suppress(FormatError, ObjectNotFound),
            self._files.directory(run_key, DIRECTORY) as slots_fd,
            self._captured(run_key, slot_id, inode, slots_fd) as fd,
        ):
            data = self._files.read(slots_fd, _slot_file(slot_id, TABLE), MAX_TABLE_BYTES)
            size_bytes = os.fstat(fd).st_size
            layout = _shard.parse_layout(_shard.read_header(fd, size_bytes), size_bytes)
            table = Table.parse(data, layout)
            with contextlib.closing(Mapped(fd, size_bytes)) as reader:
                looked.look(layout, table.digests, reader.window(0, size_bytes), left)

    def _sealed_before(self, run_key: str, inode: int, name: SaveName, rank: int) -> Record | None:
        """The record, if this very slot is that shard already. AlreadyExists if another one is."""
        try:
            with self._files.directory(run_key, str(name)) as save_fd:
                there = os.lstat(_manifest.shard_file(rank), dir_fd=save_fd)
                record = self._read_record(save_fd, _manifest.record_file(rank))
        except ObjectNotFound:
            return None
        if there.st_ino == inode:
            return record
        raise AlreadyExists(
            f"{name} has a shard of rank {rank}",
            state="it is unchanged, and so is the slot",
            tier=self._tier.name,
            key=f"{run_key}/{name}/{_manifest.shard_file(rank)}",
        )


def _slot_file(slot_id: str, suffix: str) -> str:
    if not _SLOT_ID.fullmatch(slot_id):
        raise UsageError(f"not a slot: {slot_id[:80]!r}", state="nothing was done")
    return slot_id + suffix


def _shard_files(rank: int) -> list[tuple[str, str]]:
    """The suffix in the slot and the name in the save, in the order of sealing."""
    return [
        (DATA, _manifest.shard_file(rank)),
        (TABLE, _manifest.table_file(rank)),
        (RECORD, _manifest.record_file(rank)),
    ]
