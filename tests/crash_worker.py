"""Trainers that tests kill: forked from one warm process, so that a life costs milliseconds.

As a program it is the warm process: it imports everything, has no thread, and forks a trainer for
each line on stdin. What a trainer has seen it appends to a log, one write a line, so that a line
is there exactly if it was reached before the kill. What it saves is its argument: ``numpy`` arrays,
a model of ``torch`` with AdamW, or a tree of ``jax`` on two devices.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import mtckpt
import mtckpt._checkpointer
import mtckpt.adapters.numpy
from mtckpt.errors import CheckpointError

# More than one digest chunk, several types, an empty and a 0-d array.
SIZES = {"half": ("<f2", (3, 50_000)), "bytes": ("u1", (400_003,))}
# Every word of this array tells which life and step it is of: a test reads it in a slot.
TAGGED = "w"
NUM_WORDS = 131_072
_STEP_BITS, _INDEX_BITS = 24, 20


@dataclass(frozen=True, slots=True)
class Life:
    """One trainer: ``num`` tells lives apart in what they save. After ``max_steps`` it waits for
    ``linger_s``, and until the file ``hold`` is gone; then it closes. With ``source`` it saves
    nothing: it restores what others save there, over and over."""

    run: str
    disk: str
    log: str
    num: int
    every: int = 1
    max_steps: int = 100_000
    linger_s: float = 0.0
    hold: str = ""
    source: str = ""


def tagged_words(num: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What life ``num`` saves at ``step`` under ``TAGGED``."""
    return np.arange(NUM_WORDS, dtype=np.int64) + (((num << _STEP_BITS) + step) << _INDEX_BITS)


def step_of_word(word: int) -> tuple[int, int]:
    """Life and step that a word of ``tagged_words`` is of."""
    tag = word >> _INDEX_BITS
    return tag >> _STEP_BITS, tag & ((1 << _STEP_BITS) - 1)


class State(Protocol):
    """What a trainer saves and restores; every byte of it tells which life and step it is of."""

    tree: dict[str, Any]

    def fill(self, num: int, step: int) -> None:
        """Become what life ``num`` saves at ``step``."""

    def life(self) -> int:
        """The life that saved what is there now."""

    def what_differs(self, step: int) -> str:
        """Empty if this is what some life saved at ``step``, every byte of it."""


def make_state(num: int, step: int) -> dict[str, Any]:
    """What life ``num`` saves at ``step`` as arrays and plain values."""
    seed = (step * 1_000_003 + num * 7919) % (1 << 16)
    state: dict[str, Any] = {TAGGED: tagged_words(num, step)}
    for name, (code, shape) in SIZES.items():
        values = (np.arange(np.prod(shape), dtype=np.int32) + seed) % 1024
        state[name] = values.reshape(shape).astype(code)
    state["scalar"] = np.array(seed, dtype="<i4")
    state["empty"] = np.zeros((0, 3))
    state["plain"] = {"num": num, "step": step, "text": "x" * (seed % 50)}
    return state


def what_differs(state: dict[str, Any], step: int) -> str:
    """Empty if ``state`` is what ``make_state`` made for some life and ``step``, every byte."""
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


class NumpyState:
    """Arrays and plain values."""

    def __init__(self) -> None:
        self.tree = make_state(0, 0)

    def fill(self, num: int, step: int) -> None:
        self.tree = make_state(num, step)

    def life(self) -> int:
        return int(self.tree["plain"]["num"])

    def what_differs(self, step: int) -> str:
        return what_differs(self.tree, step)


class TorchState:
    """A model, AdamW with moments, and a tensor to read in slots."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)  # A fork must not need a pool that its parent had.
        self._torch = torch
        self.model = torch.nn.Sequential(
            torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 50)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tree: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            TAGGED: torch.zeros(NUM_WORDS, dtype=torch.int64),
            "plain": {"num": 0, "step": 0},
        }

    def fill(self, num: int, step: int) -> None:
        if not self.optimizer.state:  # One step makes the moments, which are filled like the rest.
            for parameter in self.model.parameters():
                parameter.grad = self._torch.zeros_like(parameter)
            self.optimizer.step()
        for index, tensor in enumerate(self._tensors()):
            tensor.copy_(self._values(tensor, index, num, step))
        self.tree[TAGGED].copy_(self._torch.from_numpy(tagged_words(num, step)))
        self.tree["plain"] = {"num": num, "step": step}

    def life(self) -> int:
        return int(self.tree["plain"]["num"])

    def what_differs(self, step: int) -> str:
        plain, num = self.tree["plain"], self.life()
        if plain["step"] != step:
            return f"plain values of step {plain['step']}, not {step}"
        wanted = self._torch.from_numpy(tagged_words(num, step))
        if not self._torch.equal(self.tree[TAGGED], wanted):
            return f"{TAGGED} is not that of life {num} step {step}"
        for index, tensor in enumerate(self._tensors()):
            if not self._torch.equal(tensor, self._values(tensor, index, num, step)):
                return f"tensor {index} is not that of life {num} step {step}"
        return ""

    def _tensors(self) -> list[Any]:
        model = list(self.model.state_dict().values())
        of_optimizer = self.optimizer.state.values()
        return [*model, *(tensor for values in of_optimizer for tensor in values.values())]

    def _values(self, like: Any, index: int, num: int, step: int) -> Any:
        first = (step * 1_003 + num * 7919 + index * 101) % (1 << 20)
        values = self._torch.arange(first, first + like.numel())
        return values.reshape(like.shape).to(like.dtype)


JAX_SHAPES = {"kernel": (200, 300), "half": (3, 50_000), "scalar": (), "empty": (0, 3)}


class JaxState:
    """A tree of arrays on two devices, a key, and moments in a named tuple. What was saved is
    deleted as soon as the next step is there, as if it had been donated to it."""

    def __init__(self) -> None:
        import jax

        self._jax: Any = jax
        mesh = self._jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
        axes = self._jax.sharding.PartitionSpec(None, "x")
        self._halves = self._jax.sharding.NamedSharding(mesh, axes)
        self.tree: dict[str, Any] = {}
        self.tree = self._made(0, 0)

    def fill(self, num: int, step: int) -> None:
        made = self._made(num, step)
        for array in self._jax.tree.leaves(self.tree):
            if isinstance(array, self._jax.Array):
                array.delete()
        self.tree = made

    def life(self) -> int:
        return int(self.tree["plain"]["num"])

    def what_differs(self, step: int) -> str:
        plain, num = self.tree["plain"], self.life()
        if plain["step"] != step:
            return f"plain values of step {plain['step']}, not {step}"
        wanted, here = map(
            self._jax.tree_util.tree_leaves_with_path, (self._made(num, step), self.tree)
        )
        for (path, array), (other_path, found) in zip(wanted, here, strict=True):
            if path != other_path or self._bits(array) != self._bits(found):
                return f"{self._jax.tree_util.keystr(path)} is not that of life {num} step {step}"
        return ""

    def _made(self, num: int, step: int) -> dict[str, Any]:
        put = self._jax.device_put
        seed = (step * 1_003 + num * 7919) % (1 << 20)
        params = {
            name: (np.arange(np.prod(shape), dtype=np.float32) + seed + i).reshape(shape)
            for i, (name, shape) in enumerate(JAX_SHAPES.items())
        }
        params["half"] = (params["half"] % 251).astype(self._jax.numpy.bfloat16)
        placed = {name: put(array) for name, array in params.items()}
        placed["kernel"] = put(params["kernel"], self._halves)
        moments = [put(params["kernel"] * 2, self._halves), put(np.int32(step))]
        numbers = put(np.array([num, step], np.uint32))
        return {
            "params": placed,
            "moments": Moments(*moments),
            "key": self._jax.random.wrap_key_data(numbers),
            TAGGED: put(tagged_words(num, step)),
            "plain": {"num": num, "step": step},
        }

    def _bits(self, leaf: Any) -> Any:
        if isinstance(leaf, self._jax.Array):
            if leaf.dtype == self.tree["key"].dtype:
                leaf = self._jax.random.key_data(leaf)
            return leaf.sharding, np.asarray(leaf).tobytes()
        return leaf


class Moments(NamedTuple):
    mu: Any
    count: Any


KINDS: dict[str, Callable[[], State]] = {
    "numpy": NumpyState,
    "torch": TorchState,
    "jax": JaxState,
}


def train(life: Life, state: State) -> None:
    """Restore, check, then save at every step until somebody ends it."""
    fd = os.open(life.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*words: object) -> None:
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())

    tiers: list[mtckpt.Ram | mtckpt.Disk] = [
        mtckpt.Ram(every=life.every),
        mtckpt.Disk(life.disk, every=1, keep=3),
    ]
    try:
        with mtckpt.Checkpointer(life.run, tiers, timeout_s=30.0, max_stall_s=5.0) as c:
            restored = c.restore(state.tree)
            state.tree = restored.state
            if life.source:
                _read(c, life, state, say)
            bad = state.what_differs(restored.step) if restored.step is not None else ""
            say("restored", restored.step, bad or "ok", state.life(), "|", dict(restored.skipped))
            first = max(1, restored.next_step)
            for step in range(first, first + life.max_steps):
                _save(c, life, state, step, say)
            say("done")
            time.sleep(life.linger_s)
            while life.hold and os.path.exists(life.hold):
                time.sleep(0.005)
        say("closed")
    except BaseException:
        say("error", json.dumps(traceback.format_exc()))
        raise


def _read(c: mtckpt.Checkpointer, life: Life, state: State, say: Any) -> None:
    for _ in range(life.max_steps):
        try:
            restored = c.restore(state.tree, source=life.source)
        except CheckpointError as error:
            say("failed", type(error).__name__, json.dumps(str(error)))
            continue
        state.tree = restored.state
        assert restored.step is not None
        say("read", restored.step, state.what_differs(restored.step) or "ok")


def _save(c: mtckpt.Checkpointer, life: Life, state: State, step: int, say: Any) -> None:
    state.fill(life.num, step)
    say("start", step)
    try:
        save = c.save(step, state.tree)
        if not save.due:
            return
        if save.skipped:
            say("skipped", step, json.dumps(save.skipped))
            return
        say("captured", step)
        save.wait("staged", timeout_s=15.0)
        say("staged", step)
        if step % 3 == 0:
            # Less than the 20 s after which news that were missed are asked for again.
            save.wait("local", timeout_s=15.0)
            say("local", step)
    except CheckpointError as error:
        say("failed", step, type(error).__name__, json.dumps(str(error)))


class Nursery:
    """The warm process, from the test's side. ``kind``: numpy, torch or jax."""

    def __init__(self, kind: str = "numpy") -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._ask("ready")

    @property
    def pid(self) -> int:
        """Of the warm process itself."""
        return self._process.pid

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

    def _ask(self, *words: Any, timeout_s: float = 90.0) -> Any:
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


def _fork(spec: dict[str, Any], kind: Callable[[], State]) -> int:
    pid = os.fork()
    if pid:
        # Here as well as there, whoever comes first: the answer says that the group is there.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        devnull = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(devnull, fd)
        train(Life(**spec), kind())
        status = 0
    finally:
        # A fork of a warm process: what the parent had buffered or registered is not ours to run.
        os._exit(status)


def main(kind: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    state = KINDS[kind]
    if kind == "torch":
        importlib.import_module("mtckpt.adapters.torch")
        state().fill(0, 0)  # torch imports much of itself only now
    elif kind == "jax":
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        os.environ["JAX_ENABLE_X64"] = "1"  # for the tagged words
        # Its threads start with the first array, in the trainer.
        importlib.import_module("mtckpt.adapters.jax")
    for line in sys.stdin:
        verb, *words = json.loads(line)
        answer: Any = None
        if verb == "start":
            assert threading.active_count() == 1
            answer = _fork(words[0], state)
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
    main(*sys.argv[1:])
