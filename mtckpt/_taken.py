"""What another agent's directory of slots had of a run, on its way into the run that is here.

Knows where it waits (``RUN/.taken-*``, hidden from listings), and in which order its files move to
where they would have been had this agent made them. Data, table, record: what has its record here
is whole, and what has it there yet is moved on by the next look. Does not know who had it, or
whether that agent is gone. All calls block; calls for one run must not overlap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mtckpt import _manifest
from mtckpt._crash import crash_point
from mtckpt._manifest import Record
from mtckpt._run_files import is_directory, is_there, unlink
from mtckpt.errors import FormatError, ObjectNotFound

if TYPE_CHECKING:
    from mtckpt._run_files import RunFiles

__all__ = ["take_in", "waiting_name"]

_PREFIX = ".taken-"
_DATA, _TABLE, _RECORD = ".safetensors", ".xxh3", ".json"


def waiting_name() -> str:
    """What a run is called in another one of its name until it is taken in."""
    return f"{_PREFIX}{os.urandom(8).hex()}"


def take_in(files: RunFiles, run_key: str) -> list[str]:
    """Move what waits to where it belongs; a line for each that did. Goes on where it was killed.
    What is here already stays; slots that are free may go."""
    try:
        with files.directory(run_key) as run_fd:
            waiting = [name for name in sorted(os.listdir(run_fd)) if name.startswith(_PREFIX)]
    except ObjectNotFound:
        return []
    for name in waiting:
        with files.directory(run_key) as run_fd, files.directory(run_key, name) as from_fd:
            for entry in sorted(os.listdir(from_fd)):
                known, is_part = is_there(entry, run_fd), is_directory(entry, from_fd)
                if known and is_part:
                    _move(files, run_key, name, entry)
                    os.rmdir(entry, dir_fd=from_fd)
                elif not known and (is_part or _manifest.parse_incarnation_file(entry) is not None):
                    # As a whole, which takes no room.
                    os.rename(entry, entry, src_dir_fd=from_fd, dst_dir_fd=run_fd)
                else:
                    unlink(entry, from_fd)
                crash_point("take.entry")
            os.rmdir(name, dir_fd=run_fd)
    return [f"{name} is part of the run now: an agent that is gone had left it" for name in waiting]


def _move(files: RunFiles, run_key: str, waiting: str, directory: str) -> None:
    """A save, or the slots: what has a record moves, and the rest goes."""
    with (
        files.directory(run_key, waiting, directory) as from_fd,
        files.directory(run_key, directory, create=True) as to_fd,
    ):
        records = [name for name in sorted(os.listdir(from_fd)) if name.endswith(_RECORD)]
        for record in records:
            if _stays(files, record, from_fd, to_fd):
                continue
            for name in (record.removesuffix(_RECORD) + suffix for suffix in (_DATA, _TABLE)):
                if is_there(name, from_fd):
                    os.rename(name, name, src_dir_fd=from_fd, dst_dir_fd=to_fd)
                    crash_point("take.file")
            os.rename(record, record, src_dir_fd=from_fd, dst_dir_fd=to_fd)
            crash_point("take.record")
        for name in sorted(os.listdir(from_fd)):  # of a shard the record first
            unlink(name, from_fd)
            crash_point("take.rest")


def _stays(files: RunFiles, record: str, from_fd: int, to_fd: int) -> bool:
    """Whether what is here is as good: a thin copy is not, where that of its owner comes."""
    if not is_there(record, to_fd):
        return False
    if not _manifest.is_record_file(record):
        return True
    stem = record.removesuffix(_RECORD)
    here, comes = (_left_out(files, record, fd) for fd in (to_fd, from_fd))
    if comes is None or not all(is_there(stem + suffix, to_fd) for suffix in (_DATA, _TABLE)):
        return comes is None
    return here is not None and (here == 0 or comes > 0)


def _left_out(files: RunFiles, record: str, dir_fd: int) -> int | None:
    """How much a copy lacks that others have; None of a record that cannot be read."""
    try:
        data = files.read(dir_fd, record, _manifest.MAX_RECORD_BYTES)
        return _manifest.decode_sealed(data, Record).left_out
    except FormatError:
        return None
