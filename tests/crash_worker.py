"""Trainers that tests kill: forked from one warm process, so that a life costs milliseconds.

As a program it is the warm process: it imports everything, has no thread, and forks a trainer for
each line on stdin. What a trainer has seen it appends to a log, one write a line, so that a line
is there exactly if it was reached before the kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mtckpt
import mtckpt._checkpointer
import mtckpt.adapters.numpy
from mtckpt.errors import CheckpointError

# More than one digest chunk, several types, an empty and a 0-d array.
SIZES = {"w": ("<f8", (90_001,)), "half": ("<f2", (3, 50_000)), "bytes": ("u1", (400_003,))}


@dataclass(frozen=True, slots=True)
class Life:
    """One trainer: ``num`` tells lives apart in what they save; it ends after ``max_steps`` and
    ``linger_s``."""

    run: str
    disk: str
    log: str
    num: int
    every: int = 1
    max_steps: int = 100_000
    linger_s: float = 0.0


def make_state(num: int, step: int) -> dict[str, Any]:
    """What life ``num`` saves at ``step``: every byte tells which it is of."""
    seed = (step * 1_000_003 + num * 7919) % (1 << 16)
    state: dict[str, Any] = {
        name: (np.arange(np.prod(shape), dtype=np.int64) * 3 + seed).reshape(shape).astype(code)
        if code != "<f2"
        else ((np.arange(np.prod(shape)) + seed) % 1024).reshape(shape).astype(code)
        for name, (code, shape) in SIZES.items()
    }
    state["scalar"] = np.array(seed, dtype="<i4")
    state["empty"] = np.zeros((0, 3))
    state["plain"] = {"num": num, "step": step, "text": "x" * (seed % 50)}
    return state


def what_differs(state: dict[str, Any], step: int) -> str:
    """Empty if ``state`` is what some life saved at ``step``, every byte of it."""
    plain = state["plain"]
    if plain["step"] != step:
        return f"plain values of step {plain['step']}, not {step}"
    wanted = make_state(plain["num"], step)
    if plain != wanted["plain"]:
        return f"plain values {plain}"
    for name, array in wanted.items():
        if name != "plain" and not (
            state[name].dtype == array.dtype and np.array_equal(state[name], array)
        ):
            return f"{name} is not that of life {plain['num']} step {step}"
    return ""


def train(life: Life) -> None:
    """Restore, check, then save at every step until somebody ends it."""
    fd = os.open(life.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*words: object) -> None:
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())

    state = make_state(0, 0)
    tiers: list[mtckpt.Ram | mtckpt.Disk] = [
        mtckpt.Ram(every=life.every),
        mtckpt.Disk(life.disk, every=1, keep=3),
    ]
    try:
        with mtckpt.Checkpointer(life.run, tiers, timeout_s=15.0, max_stall_s=1.0) as c:
            restored = c.restore(state)
            bad = what_differs(state, restored.step) if restored.step is not None else ""
            num = state["plain"]["num"]
            say("restored", restored.step, bad or "ok", num, "|", dict(restored.skipped))
            first = max(1, restored.next_step)
            for step in range(first, first + life.max_steps):
                _save(c, life, step, say)
            time.sleep(life.linger_s)
        say("closed")
    except BaseException:
        say("error", json.dumps(traceback.format_exc()))
        raise


def _save(c: mtckpt.Checkpointer, life: Life, step: int, say: Any) -> None:
    state = make_state(life.num, step)
    say("start", step)
    try:
        save = c.save(step, state)
        if not save.due:
            return
        save.wait("staged", timeout_s=10.0)
        say("staged", step)
        if step % 3 == 0:
            save.wait("local", timeout_s=10.0)
            say("local", step)
    except CheckpointError as error:
        say("failed", step, type(error).__name__, json.dumps(str(error)))


class Nursery:
    """The warm process, from the test's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._ask("ready")

    def start(self, life: Life) -> int:
        """Fork a trainer, the leader of a process group of its own; returns its pid."""
        return int(self._ask("start", asdict(life)))

    def wait(self, pid: int) -> int:
        """Until that trainer has ended; its exit status, negative for a signal."""
        return int(self._ask("wait", pid))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _ask(self, *words: Any, timeout_s: float = 60.0) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the warm process ended at {words}"
        return json.loads(line)


def _fork(spec: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        devnull = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(devnull, fd)
        train(Life(**spec))
        status = 0
    finally:
        # A fork of a warm process: what the parent had buffered or registered is not ours to run.
        os._exit(status)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        verb, *words = json.loads(line)
        answer: Any = None
        if verb == "start":
            assert threading.active_count() == 1
            answer = _fork(words[0])
        elif verb == "wait":
            _, status = os.waitpid(words[0], 0)
            answer = os.waitstatus_to_exitcode(status)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def read_log(path: Path) -> list[list[str]]:
    """Whole lines of a trainer's log, as words."""
    text = path.read_text() if path.exists() else ""
    return [line.split(" ") for line in text.split("\n")[:-1]]


if __name__ == "__main__":
    main()
