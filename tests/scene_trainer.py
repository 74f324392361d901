"""A training script that a test drives line by line: a real Checkpointer in a process of its own.

A scene starts it as users start theirs: under a launcher, in a cgroup, as another user, in
namespaces of its own. As a program it reads one JSON command a line on stdin and answers with one
on stdout. Children that it forks inherit both, so the test reads with a deadline, never to EOF.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mtckpt
from mtckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_S = 30.0


class TrainerError(Exception):
    """What a command of the trainer ended with: the name of its class, its text, its causes."""

    def __init__(self, name: str, text: str, causes: list[str]) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text, self.causes = name, text, causes


class SceneTrainer:
    """The process, from the test's side. ``wrap`` is what it is started through."""

    def __init__(
        self,
        run: str,
        disk: Path | str | Sequence[Path | str] = (),
        *,
        wrap: Sequence[str] = (),
        python: Sequence[str] = (sys.executable,),
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        disks = [disk] if isinstance(disk, Path | str) else disk
        spec = {"run": run, "disks": [str(path) for path in disks], **options}
        self.process = subprocess.Popen(
            [*wrap, *python, str(Path(__file__).resolve()), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **(environment or {}),
            },
        )
        self._buffer = b""

    def send(self, *words: Any) -> None:
        """Give it a command, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to the oldest command that was not answered."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            ready = select.select([fd], [], [], max(0.0, left_s))[0]
            assert ready, f"the trainer said nothing for {timeout_s:g} s"
            data = os.read(fd, 1 << 16)
            assert data, "the trainer ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        kind, value = json.loads(line)
        if kind == "error":
            raise TrainerError(*value)
        return value

    def do(self, *words: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to a command. Raises TrainerError for an error of mtckpt's."""
        self.send(*words)
        return self.answer(timeout_s)

    def save(self, step: int, stage: str = "staged") -> dict[str, Any]:
        """Save a step and wait for a stage."""
        save: dict[str, Any] = self.do("save", step, stage)
        assert save["skipped"] is None, save
        return save

    def kill(self) -> None:
        """SIGKILL of what was started, which is the trainer if nothing is around it."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it and let go of the pipes."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


# -- what is saved ---------------------------------------------------------------------------------

# More than one digest chunk, several types, an empty and a 0-d array.
SIZES = {"w": ("<f8", (90_001,)), "half": ("<f2", (3, 50_000)), "bytes": ("u1", (400_003,))}


def seed_of(num: int, step: int) -> int:
    return (step * 1_000_003 + num * 7919) % 1021


def make_state(num: int, step: int) -> dict[str, Any]:
    """What life ``num`` saves at ``step``: every array tells which it is of."""
    seed = seed_of(num, step)
    state: dict[str, Any] = {
        name: ((np.arange(np.prod(shape)) + seed) % 2039 % 251).reshape(shape).astype(code)
        for name, (code, shape) in SIZES.items()
    }
    state["scalar"] = np.array(seed, dtype="<i4")
    state["empty"] = np.zeros((0, 3))
    state["plain"] = {"num": num, "step": step, "text": "x" * (seed % 50)}
    return state


def what_differs(state: dict[str, Any], step: int) -> str:
    """Empty if ``state`` is what some life saved at ``step``, every byte of it."""
    plain = state["plain"]
    wanted = make_state(plain["num"], step)
    if plain != wanted["plain"]:
        return f"plain values {plain} at step {step}"
    for name, array in wanted.items():
        if name != "plain" and not (
            state[name].dtype == array.dtype and np.array_equal(state[name], array)
        ):
            return f"{name} is not that of life {plain['num']} step {step}"
    return ""


# -- the program -----------------------------------------------------------------------------------


class Trainer:
    """One method a command. ``num`` tells lives apart in what they save."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.num: int = spec.get("num", 1)
        self.torch: bool = spec.get("torch", False)
        self.scale: int = spec.get("scale", 0)
        tiers: list[mtckpt.Ram | mtckpt.Disk] = [mtckpt.Ram(every=1, **spec.get("ram", {}))]
        tiers += [mtckpt.Disk(path, every=1, keep=50) for path in spec["disks"]]
        self.checkpointer = mtckpt.Checkpointer(
            spec["run"], tiers, timeout_s=TIMEOUT_S, max_stall_s=10.0
        )
        self.loader: Any = None
        self.children: list[int] = []

    def _state(self, num: int, step: int) -> dict[str, Any]:
        state = make_state(num, step)
        if self.scale:
            state["large"] = np.full(self.scale, (step * 7 + num) % 251, "u1")
        if self.torch:
            import torch

            names = [name for name in state if name != "plain"]
            state.update({name: torch.from_numpy(state[name]) for name in names})
        return state

    def hello(self) -> dict[str, int]:
        return {"pid": os.getpid(), "parent": os.getppid(), "uid": os.getuid()}

    def restore(self) -> dict[str, Any]:
        """The step, where it came from, whose it is, and what is wrong with its bytes, if any."""
        state = self._state(0, 0)
        restored = self.checkpointer.restore(state)
        num, bad = state["plain"]["num"], ""
        if restored.step is not None:
            arrays = {k: v.numpy() if self.torch and k != "plain" else v for k, v in state.items()}
            large = arrays.pop("large", None)
            bad = what_differs(arrays, restored.step)
            if large is not None and not np.all(large == (restored.step * 7 + num) % 251):
                bad += " large"
        return {
            "step": restored.step,
            "sources": list(restored.sources),
            "num": num,
            "bad": bad,
            "skipped": {str(k): str(v) for k, v in dict(restored.skipped).items()},
        }

    def save(self, step: int, stage: str = "") -> dict[str, Any]:
        save = self.checkpointer.save(step, self._state(self.num, step))
        if stage and not save.skipped:
            save.wait(stage, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]  # checked when it runs
        return {"skipped": save.skipped, "reached": sorted(save.reached)}

    def granted(self) -> list[int]:
        """The inode of the slot that this process may write into next."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            slot = self.checkpointer._session.next_slot
            if slot is not None:
                return [slot.inode]
            time.sleep(0.01)
        return []

    def fork(self) -> dict[str, Any]:
        """A child that tries to save, says how that ended, and stays."""
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write_fd, _try_to_save(self.checkpointer).encode() + b"\n")
            signal.pause()
            os._exit(0)
        os.close(write_fd)
        with os.fdopen(read_fd) as file:
            return {"pid": pid, "said": file.readline().strip()}

    def load_data(self) -> dict[str, Any]:
        """Two workers of a DataLoader that stay; each item says how a save ended in the worker."""
        import torch.utils.data

        class Data(torch.utils.data.Dataset[tuple[int, str]]):
            def __init__(self, checkpointer: mtckpt.Checkpointer) -> None:
                self.checkpointer = checkpointer

            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> tuple[int, str]:
                return os.getpid(), _try_to_save(self.checkpointer)

        self.loader = torch.utils.data.DataLoader(
            Data(self.checkpointer),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            persistent_workers=True,
        )
        items = list(self.loader)
        return {"pids": sorted({pid for pid, _ in items}), "said": sorted({s for _, s in items})}

    def hog(self, log: str) -> None:
        """Save as fast as it goes while memory fills, until the kernel ends it."""
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        held = []

        def eat() -> None:
            while True:
                held.append(b"\x01" * (4 << 20))
                time.sleep(0.01)

        threading.Thread(target=eat, daemon=True).start()
        for step in range(1, 1_000_000):
            self.save(step, "staged")
            os.write(fd, f"{step}\n".encode())

    def close(self) -> None:
        self.checkpointer.close()


def _try_to_save(checkpointer: mtckpt.Checkpointer) -> str:
    try:
        checkpointer.save(1_000, make_state(9, 1_000))
    except CheckpointError as error:
        return type(error).__name__
    return "saved"


def _causes(error: BaseException) -> list[str]:
    causes = []
    while error.__cause__ is not None:
        assert error.__cause__ is not error, "an error is its own cause"
        error = error.__cause__
        causes.append(type(error).__name__)
    return causes


def main(spec: dict[str, Any]) -> None:
    trainer: Trainer | None = None
    for line in sys.stdin:
        verb, *words = json.loads(line)
        try:
            trainer = trainer or Trainer(spec)
            answer: Any = ["ok", getattr(trainer, verb)(*words)]
        except CheckpointError as error:
            answer = ["error", [type(error).__name__, str(error), _causes(error)]]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
