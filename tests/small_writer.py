"""A writer with some hundred kilobytes of NumPy state that does what a test tells it, step by step.

As a program it is a warm process: it has imported everything, has no thread, and forks a writer for
each line on stdin. A writer connects to the test's socket and answers one JSON line with another.
What it was promised it appends to a log, one write a line: a line is there if it was reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import mtckpt
import mtckpt._checkpointer
import mtckpt._load
import mtckpt.adapters.numpy
from mtckpt.errors import CheckpointError
from mtckpt.tiers import BytesSource, LocalTier

TIMEOUT_S = 60.0
RUN = "small"
KEEP = 2


def make_state(num: int, step: int) -> dict[str, Any]:
    """What writer ``num`` saves at ``step``: every element tells which it is of."""
    seed = (step * 1_000_003 + num * 7919) % (1 << 20)
    return {
        "w": np.arange(40_009, dtype="<i8") + seed,  # more than one chunk of the digests
        "bytes": ((np.arange(5003) + seed) % 251).astype("u1"),
        "scalar": np.array(seed, dtype="<i4"),
        "plain": {"num": num, "step": step},
    }


def what_differs(state: dict[str, Any], step: int) -> str:
    """Empty if ``state`` is what some writer saved at ``step``, every byte of it."""
    plain = state["plain"]
    if plain["step"] != step:
        return f"plain values of step {plain['step']}, not {step}"
    wanted = make_state(plain["num"], step)
    differ = [
        name
        for name, array in wanted.items()
        if name != "plain"
        and not (state[name].dtype == array.dtype and np.array_equal(state[name], array))
    ]
    return f"{differ} not of writer {plain['num']} step {step}" if differ else ""


def offered(disk: Path) -> dict[str, int]:
    """Ids and steps of what a directory says is complete; a save without its records is not."""
    steps = mtckpt.steps(disk) if disk.exists() else []
    return {step.id: step.step for step in steps if step.stages}


def whole_steps(disk: Path) -> dict[int, int]:
    """Steps that a directory offers and who saved each, all read to the last byte; no agent asked.

    AssertionError for one that is offered and cannot be read, or has bytes of another. One that
    retention deletes meanwhile is not offered.
    """
    found = {}
    for save_id, step in offered(disk).items():
        try:
            with mtckpt.load(disk, step=save_id) as checkpoint:
                state = checkpoint.tree()
        except CheckpointError as error:
            if save_id in offered(disk):
                raise AssertionError(f"step {step} is offered, but {error}") from error
            continue
        bad = what_differs(state, step)
        assert not bad, bad
        found[step] = state["plain"]["num"]
    return found


class WriterGone(Exception):
    """The writer ended before it answered."""


class WriterError(Exception):
    """An error of mtckpt's in the writer: the name of its class, its text, its causes."""

    def __init__(self, name: str, text: str, causes: list[str]) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text, self.causes = name, text, causes


class Writer:
    """One forked writer, from the test's side."""

    def __init__(self, pid: int, connection: socket.socket, log: Path) -> None:
        self.pid, self.log = pid, log
        self._connection = connection
        self._buffer = b""

    def send(self, *words: Any) -> None:
        """Give it a command, and do not wait."""
        with contextlib.suppress(OSError):  # it was killed: the answer will say so
            self._connection.sendall(json.dumps(words).encode() + b"\n")

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to the oldest open command. Raises WriterGone, WriterError."""
        while b"\n" not in self._buffer:
            ready = select.select([self._connection], [], [], timeout_s)[0]
            assert ready, f"the writer said nothing for {timeout_s:g} s"
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = self._connection.recv(1 << 16)
            if not data:
                raise WriterGone
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        kind, value = json.loads(line)
        assert kind != "bug", value
        if kind == "error":
            raise WriterError(*value)
        return value

    def do(self, *words: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to a command."""
        self.send(*words)
        return self.answer(timeout_s)

    def said(self) -> list[tuple[str, int, int]]:
        """Whole lines of its log: what, of which step, and how long the disk's log was then."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = [line.split() for line in text.split("\n")[:-1]]
        return [(what, int(step), int(at)) for what, step, at in lines]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self._connection.close()


class Nursery:
    """The warm process, from the test's side. Each writer has a log of its own in ``directory``.

    Threads may share it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._count = 0
        self._writers: list[Writer] = []
        self._listener = socket.socket(socket.AF_UNIX)
        path = f"{os.environ['MTCKPT_RUNTIME_DIR']}/{os.urandom(4).hex()}"
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(TIMEOUT_S)
        self._process = subprocess.Popen(
            [sys.executable, __file__, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def start(self) -> Writer:
        """Fork a writer."""
        with self._lock:
            self._count += 1
            log = self._directory / f"writer-{self._count}.log"
            pid = self._ask("fork", str(log))
            connection, _ = self._listener.accept()
            writer = Writer(pid, connection, log)
            self._writers.append(writer)
            return writer

    def wait(self, writer: Writer) -> int:
        """Until it has ended; its exit status, negative for a signal."""
        with self._lock:
            status = int(self._ask("wait", writer.pid))
            writer.close()
            self._writers.remove(writer)
            return status

    def close(self) -> None:
        for writer in self._writers:
            writer.kill()
            writer.close()
        self._process.kill()
        self._process.wait(10)
        self._listener.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the warm process ended at {words}"
        return json.loads(line)


# -- the program -----------------------------------------------------------------------------------


class _Writing:
    """One method a command."""

    def __init__(self, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._checkpointer: Any = None
        self._num = 0
        self._disk_log = ""

    def _say(self, what: str, step: int) -> None:
        at_bytes = os.stat(self._disk_log).st_size if self._disk_log else 0
        os.write(self._log, f"{what} {step} {at_bytes}\n".encode())

    def open(
        self,
        num: int,
        disk: str,
        ram: str | None = None,
        keep: int = KEEP,
        disk_log: str = "",
        run: str = RUN,
        **options: Any,
    ) -> None:
        """``disk_log`` is a file whose size is noted with everything that is promised."""
        self._num, self._disk_log = num, disk_log
        tiers = [mtckpt.Ram(ram, every=1, slots=2), mtckpt.Disk(disk, every=1, keep=keep)]
        options = {"timeout_s": 30.0, "max_stall_s": 10.0, **options}
        self._checkpointer = mtckpt.Checkpointer(run, tiers, **options)

    def restore(self) -> dict[str, Any]:
        """The step, whose it is, from where, what is wrong with its bytes, what was passed over."""
        state = make_state(0, 0)
        restored = self._checkpointer.restore(state)
        bad = what_differs(state, restored.step) if restored.step is not None else ""
        return {
            "step": restored.step or 0,
            "num": state["plain"]["num"],
            "bad": bad,
            "sources": list(restored.sources),
            "skipped": {str(k): str(v) for k, v in dict(restored.skipped).items()},
        }

    def save(self, step: int, stage: str = "local") -> None:
        """Save, and wait until it is staged and then for ``stage``, each noted in the log."""
        self._say("saving", step)
        save = self._checkpointer.save(step, make_state(self._num, step))
        if save.skipped:
            raise CheckpointError(f"called off: {save.skipped}")
        for each in ("staged", "local")[: 2 if stage == "local" else 1]:
            save.wait(each, timeout_s=TIMEOUT_S / 2)
            self._say(each, step)

    def attempt(self, step: int, wait_s: float = TIMEOUT_S / 2) -> dict[str, Any]:
        """Save, and say how that ended: the stages that were reached, and the error if any.

        ``where`` is "save", if the call raised (nothing was saved then), or the stage that did.
        """
        reached: list[str] = []
        where = "save"
        self._say("saving", step)
        try:
            save = self._checkpointer.save(step, make_state(self._num, step))
            for where in ("staged", "local"):
                save.wait(where, timeout_s=wait_s)
                self._say(where, step)
                reached.append(where)
        except CheckpointError as error:
            names = [type(error).__name__, *_causes(error)]
            return {"reached": reached, "where": where, "errors": names, "text": str(error)}
        return {"reached": reached, "where": "", "errors": [], "text": ""}

    def saves(self, first: int, last: int, stage: str = "local") -> None:
        for step in range(first, last + 1):
            self.save(step, stage)

    def life(self, num: int, disk: str, run: str, count: int) -> None:
        """Open, restore, save so many steps and close, at one go."""
        self.open(num, disk, run=run)
        restored = self.restore()
        assert not restored["bad"], restored
        for step in range(restored["step"] + 1, restored["step"] + 1 + count):
            self.save(step)
        self.close()

    def put(self, root: str, key: str, size_bytes: int) -> bool:
        """One object of zeros into a tier, without a run and without an agent."""
        with contextlib.closing(LocalTier(root)) as tier:
            return tier.put(key, BytesSource(bytes(size_bytes))).atomic

    def close(self) -> None:
        self._checkpointer.close()


def _causes(error: BaseException) -> list[str]:
    causes: list[str] = []
    while error.__cause__ is not None and len(causes) < 10:  # one that causes itself has no end
        error = error.__cause__
        causes.append(type(error).__name__)
    return causes


def _write(path: str, log: str) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    writing = _Writing(log)
    with connection.makefile("r") as lines:
        for line in lines:
            verb, *words = json.loads(line)
            try:
                answer: Any = ["ok", getattr(writing, verb)(*words)]
            except CheckpointError as error:
                answer = ["error", [type(error).__name__, str(error), _causes(error)]]
            except Exception:
                # Not one of ours: the test has to see it, and fails.
                answer = ["bug", traceback.format_exc()]
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _fork(path: str, log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        devnull = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(devnull, fd)
        _write(path, log)
    finally:
        # A fork of a warm process: what the parent had buffered or registered is not ours to run.
        os._exit(0)


def main(path: str) -> None:
    for line in sys.stdin:
        verb, word = json.loads(line)
        if verb == "fork":
            assert threading.active_count() == 1
            answer = _fork(path, word)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(word, 0)[1])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
