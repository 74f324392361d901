"""A rank on a node of its own, told what to do by lines: ``["save", 3]``, ``["wait", 3, "local"]``.

    python tests/node_worker.py '{"rank": 0, "world_size": 4, "board": "/tmp/...", ...}'

The group is a directory that all ranks see. One JSON line of answer for each line of input; an
error of ours is told as its class, its text and the class of its cause.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from boxed import Boxed, boxed_arrays

import mtckpt
from mtckpt import _assembly, _gathering
from mtckpt._boxes import Box
from mtckpt._coordination import StoreGroup
from mtckpt.errors import CheckpointError

SIZE = 100_000
MESH = (5_000, 4_000)


class Board:
    """A key-value store in a directory: what joins the ranks of these tests."""

    def __init__(self, root: Path, place: str) -> None:
        self.place = place or str(root)
        self._root = root

    def put(self, key: str, value: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=self._root)
        with os.fdopen(fd, "wb") as file:
            file.write(value)
        os.rename(temporary, path)

    def have(self, directory: str, names: Sequence[str]) -> bool:
        return all((self._root / directory / name).exists() for name in names)

    def read(self, directory: str, names: Sequence[str]) -> dict[str, bytes]:
        paths = {name: self._root / directory / name for name in names}
        return {name: path.read_bytes() for name, path in paths.items() if path.exists()}

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)


def state_at(step: int, rank: int) -> dict[str, Any]:
    """What a rank holds at a step: an array of its own, one that all hold alike, and a number."""
    return {
        "own": np.full(SIZE, 1000.0 * step + rank),
        "shared": mtckpt.replicated(np.arange(SIZE, dtype=np.float64) + step),
        "step": step,
    }


def meshed(rank: int, world_size: int, cut: str) -> Boxed:
    """Every rank's part of one array of ``MESH``, by rows or by columns."""
    axis = 0 if cut == "rows" else 1
    first, stop = (MESH[axis] * r // world_size for r in (rank, rank + 1))
    box = (
        Box((first, 0), (stop - first, MESH[1]))
        if axis == 0
        else Box((0, first), (MESH[0], stop - first))
    )
    whole = np.arange(math.prod(MESH), dtype=np.float32).reshape(MESH)
    return Boxed(MESH, np.float32, [box], of=whole, sharers=tuple(range(world_size)))


def memory_bytes(what: str) -> int:
    """Of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


class Worker:
    """The verbs, one method each."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        board: str,
        disk: str,
        run: str = "run",
        **settings: Any,
    ) -> None:
        self.rank = rank
        place = settings.pop("place", "")
        group = StoreGroup(Board(Path(board), place), rank, world_size, run)
        slots = settings.pop("slots", "auto")
        keep = settings.pop("keep", 2)
        every = settings.pop("every", 1)
        store = settings.pop("store", "")
        copies, strict = settings.pop("copies", 0), settings.pop("strict", False)
        _gathering._PEER_TIMEOUT_S = settings.pop("peer_s", _gathering._PEER_TIMEOUT_S)
        tiers = [
            mtckpt.Ram(settings.pop("ram", None), every=1, slots=slots),
            mtckpt.Disk(disk, every=every, keep=keep),
            *([mtckpt.Peers(copies=copies, strict_placement=strict)] if copies else []),
            *([mtckpt.ObjectStore(store, every=every)] if store else []),
        ]
        options = {"timeout_s": 45.0, "max_stall_s": 5.0, **settings}
        self.checkpointer = mtckpt.Checkpointer(run, tiers, group=group, **options)
        self.saves: dict[int, mtckpt.Save] = {}

    def restore(self, source: str | None = None) -> Any:
        live = state_at(0, self.rank)
        restored = self.checkpointer.restore(live, source=source)
        if restored.step is None:
            return None
        wanted = state_at(restored.step, self.rank)
        assert np.array_equal(live["own"], wanted["own"])
        assert np.array_equal(live["shared"].value, wanted["shared"].value)
        assert live["step"] == restored.step
        return [restored.step, dict(restored.sources)]

    def adopt(self) -> Any:
        """In a job with another number of ranks: the step, whose private state came, sources."""
        live = state_at(0, self.rank)
        restored = self.checkpointer.restore(live)
        step = restored.step or 0
        assert np.array_equal(live["shared"].value, state_at(step, 0)["shared"].value)
        (own,) = set(live["own"].tolist())
        return [step, int(own - 1000 * step), dict(restored.sources)]

    def steps(self) -> Any:
        return [[s.step, list(s.tiers), list(s.stages)] for s in self.checkpointer.steps()]

    def save_mesh(self, step: int, cut: str, world_size: int) -> str:
        """Save this rank's rows or columns of one large array, whose numbers count up."""
        self.saves[step] = self.checkpointer.save(step, {"w": meshed(self.rank, world_size, cut)})
        return self.saves[step].skipped or ""

    def restore_mesh(self, cut: str, world_size: int, staged_bytes: int) -> Any:
        """Restore this rank's part: step, its bytes, the most memory besides, sources."""
        _assembly.MAX_STAGED_BYTES = staged_bytes
        live = meshed(self.rank, world_size, cut)
        wanted = live.arrays[0].copy()
        live.arrays[0][:] = 0
        before_bytes = memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        restored = self.checkpointer.restore({"w": live})
        peak_bytes = memory_bytes("VmHWM") - before_bytes
        assert np.array_equal(live.arrays[0], wanted)
        return [restored.step, wanted.nbytes, peak_bytes, dict(restored.sources)]

    def save(self, step: int) -> Any:
        self.saves[step] = self.checkpointer.save(step, state_at(step, self.rank))
        return self.saves[step].skipped or ""

    def save_flipped(self, step: int) -> str:
        """One bit of what all ranks hold alike is wrong here."""
        state = state_at(step, self.rank)
        state["shared"].value.view(np.uint8)[12345] ^= 4
        self.saves[step] = self.checkpointer.save(step, state)
        return self.saves[step].skipped or ""

    def bad(self, step: int) -> None:
        """A state that cannot be saved: this rank declines."""
        self.checkpointer.save(step, {**state_at(step, self.rank), "more": object()})

    def other(self, step: int) -> None:
        """Another global array than the others have."""
        state = {**state_at(step, self.rank), "shared": mtckpt.replicated(np.zeros(7))}
        self.saves[step] = self.checkpointer.save(step, state)

    def wait(self, step: int, stage: str, timeout_s: float = 45.0) -> str:
        save = self.saves[step]
        save.wait(stage, timeout_s=timeout_s)  # type: ignore[arg-type]
        return ",".join(sorted(save.reached))

    def reached(self, step: int) -> list[str]:
        return sorted(self.saves[step].reached)

    def close(self, timeout_s: float = 30.0) -> None:
        self.checkpointer.close(timeout_s=timeout_s)

    def status(self) -> Any:
        (run,) = self.checkpointer._session.status().runs
        return {"counters": run.counters, "slots": [slot.state for slot in run.slots]}


def main() -> None:
    worker = Worker(**json.loads(sys.argv[1]))
    with boxed_arrays():
        listen(worker)


def listen(worker: Worker) -> None:
    for line in sys.stdin:
        verb, *words = json.loads(line)
        try:
            answer = {"ok": getattr(worker, verb)(*words)}
        except CheckpointError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else ""
            answer = {"error": type(error).__name__, "text": str(error), "cause": cause}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
