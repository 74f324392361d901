"""Where a save stands at one instant: processes are frozen, and their files say what they were at.

A phase is read from files alone, while nobody can change them:
capture: the slot has bytes of the step, and no generation word yet
seal: the generation word is written, and the record is not in the save's directory yet
flush: on disk, the save's directory lacks its data or its digests
commit: both are there, and the record or the manifest is not
retention: an old save's record is gone, and something of it is still there
Phases of one moment may be several: a trainer captures while the agent flushes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from crash_worker import NUM_WORDS, TAGGED, step_of_word

from mtckpt import _manifest, _shard
from mtckpt._manifest import Record, SaveName
from mtckpt.errors import FormatError

PHASES = ("capture", "seal", "flush", "commit", "retention")
DATA, TABLE = _manifest.shard_file(0), _manifest.table_file(0)
RECORD, MANIFEST = _manifest.record_file(0), _manifest.MANIFEST_FILE
_FREEZE_TIMEOUT_S = 30.0
_SAMPLES = 9


# -- processes -----------------------------------------------------------------------------------


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(pids: list[int]) -> None:
    """Stop processes, and return when none of their threads can run."""
    send(pids, signal.SIGSTOP)
    deadline_s = time.monotonic() + _FREEZE_TIMEOUT_S
    while not all(map(_is_still, pids)):
        assert time.monotonic() < deadline_s, f"these do not stop: {pids}"


def _is_still(pid: int) -> bool:
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            if (state := _state(f"/proc/{pid}/task/{task}/stat")) not in "TZX":
                return False
            if state == "Z" and int(task) == pid:
                return True
    except FileNotFoundError:
        pass
    return True


def _state(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_alive(pid: int) -> bool:
    return _state(f"/proc/{pid}/stat") not in "ZX"


def agent_of(runtime_dir: Path) -> int:
    """The agent's control process, 0 if there is none."""
    try:
        pid = int((runtime_dir / "agent.pid").read_text())
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return pid if b"mtckpt.agent" in line and is_alive(pid) else 0
    except (OSError, ValueError):
        return 0  # a pid file may be of one that was killed


def children_of(pid: int) -> list[int]:
    """The data processes of an agent: its main thread starts them."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind; files by their path."""
    found: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                kind, bracket, _ = target.partition(":[")
                found[kind if bracket and not target.startswith("/") else target] += 1
    return found


# -- files ---------------------------------------------------------------------------------------


def files_below(path: Path) -> list[str]:
    # os.walk passes over what the agent removes meanwhile.
    found = [Path(home) / name for home, _, names in os.walk(path) for name in names]
    return sorted(str(p.relative_to(path)) for p in found)


@dataclass(slots=True)
class Look:
    """Reads the phases of a run. ``left`` is what a kill left half done: nobody is at it now."""

    run_key: str
    ram_dir: Path
    disk: Path
    left: dict[str, frozenset[str]] = field(default_factory=dict)
    _tagged_at: int = 0

    def phases(self, num: int, step: int) -> set[str]:
        """What life ``num`` and its agent are at; ``step`` is the last one that it started."""
        return self._in_ram(num, step) | self._on_disk()

    def remember(self) -> None:
        """An agent dies now: what it was at stays as it is until somebody goes on with it."""
        self.left = self.saves()

    def saves(self) -> dict[str, frozenset[str]]:
        """What is in each save's directory on disk."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.disk / self.run_key):
                if SaveName.parse(name) is not None:
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = frozenset(os.listdir(self.disk / self.run_key / name))
        return found

    def _on_disk(self) -> set[str]:
        saves = self.saves()
        newest = max((_order(name) for name, files in saves.items() if RECORD in files), default=())
        found = set()
        for name, files in saves.items():
            if self.left.get(name) == files or {RECORD, MANIFEST} <= files:
                continue
            if RECORD in files:
                found.add("commit")
            elif _order(name) < newest:
                found.add("retention")
            else:
                found.add("commit" if {DATA, TABLE} <= files else "flush")
        return found

    def _in_ram(self, num: int, step: int) -> set[str]:
        found = set()
        for table in self.ram_dir.glob(f"*/{self.run_key}/.slots/*.xxh3"):
            if _generation(table) == 0 and self._holds(
                table.with_suffix(".safetensors"), num, step
            ):
                found.add("capture")
        for path in self.ram_dir.glob(f"*/{self.run_key}/.slots/*.json"):
            with contextlib.suppress(FormatError, FileNotFoundError):
                record = _manifest.decode_sealed(path.read_bytes(), Record)
                tables = (path.with_suffix(".xxh3"), path.parents[1] / str(record.name) / TABLE)
                if record.step == step and any(map(_generation, tables)):
                    found.add("seal")
        return found

    def _holds(self, data: Path, num: int, step: int) -> bool:
        """Whether a slot has anything of this step."""
        try:
            with open(data, "rb") as file:
                if not self._tagged_at:
                    self._tagged_at = _tagged_at(file.read(1 << 16))
                if not self._tagged_at:
                    return False
                for at in range(0, NUM_WORDS, NUM_WORDS // _SAMPLES):
                    word = os.pread(file.fileno(), 8, self._tagged_at + 8 * at)
                    if step_of_word(int.from_bytes(word, "little")) == (num, step):
                        return True
        except FileNotFoundError:
            pass
        return False


def _order(name: str) -> tuple[int, ...]:
    parsed = SaveName.parse(name)
    assert parsed is not None
    return parsed.incarnation, parsed.step


def _generation(table: Path) -> int:
    try:
        with open(table, "rb") as file:
            return _shard.generation_in(file.read(_shard.TABLE_HEADER.size))
    except FileNotFoundError:
        return 0


def _tagged_at(head: bytes) -> int:
    """Where in the file the tagged array begins; 0 while there is no header."""
    size_bytes = int.from_bytes(head[:8], "little")
    if not 0 < size_bytes < len(head):
        return 0
    header = json.loads(head[8 : 8 + size_bytes])
    return 8 + size_bytes + int(header[TAGGED]["data_offsets"][0])
