"""A trainer whose arrays are on a device of the fake driver: in a test's process, or killed in its
own one.

Its state is mostly frozen: two saves fill both slots, and the third leaves most of what lies in
the slot of the first. A trainer of its own process ends in the midst of that third save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from agent_checks import data_processes
from fake_cuda import FakeCuda, Mode

import mtckpt
from mtckpt._shard import CHUNK_BYTES
from mtckpt.adapters.numpy import NumpyAdapter
from mtckpt.agent.client import _UnixConnection
from mtckpt.capture.addresses import located
from mtckpt.capture.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable


NUM_CHUNKS = 16
CHANGED = (3, 12)  # by the third save; what lies between them is more than is moved along
BETWEEN = 7

State = dict[str, "np.ndarray[Any, Any]"]


def put_on_device(
    fake: FakeCuda, driver: Driver, patch: Callable[[Any, str, Any], None], state: State
) -> None:
    """Let the arrays of ``state`` count as a device's wherever a save asks where they lie."""
    known = [array.ctypes.data for array in state.values()]
    for array in state.values():
        fake.adopt(array.ctypes.data, array.nbytes)
    plain = NumpyAdapter.addresses

    def addresses(self: NumpyAdapter, *arguments: Any) -> tuple[list[int], object]:
        found, keep = plain(self, *arguments)
        return located(found, [0 if address in known else -1 for address in found]), keep

    patch(Driver, "_loaded", (os.getpid(), driver))
    patch(NumpyAdapter, "addresses", addresses)


def make_state() -> State:
    numbers = np.random.default_rng(1)
    base = numbers.integers(0, 256, NUM_CHUNKS * CHUNK_BYTES, np.uint8)
    return {"base": base, "tuned": np.ones(1000, np.float32)}


def values_at(step: int, state: State) -> None:
    """What a step makes of the state of the step before it."""
    state["tuned"] += 1
    if step == 3:
        for chunk in CHANGED:
            state["base"][chunk * CHUNK_BYTES] ^= 1


def open_run(folder: Path) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(folder / "disk", every=1)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=30, max_stall_s=20)


def saved_twice(checkpointer: mtckpt.Checkpointer, state: State) -> None:
    for step in (1, 2):
        values_at(step, state)
        checkpointer.save(step, state).wait("local", timeout_s=30)
    assert checkpointer._session.wait_idle(30)


def when_sent(verb: str, do: Callable[[], None], patch: Callable[[Any, str, Any], None]) -> None:
    """Call ``do`` as soon as a request about it is on its way to the agent."""
    request = _UnixConnection.request

    def sent(self: _UnixConnection, method: str, url: str, *rest: Any, **more: Any) -> None:
        request(self, method, url, *rest, **more)
        if url.endswith(f"/{verb}"):
            do()

    patch(_UnixConnection, "request", sent)


def signal_all(number: int) -> set[int]:
    """Send a signal to all data processes; their pids."""
    found = set(data_processes().values())
    for pid in found:
        os.kill(pid, number)
    return found


def killed(fake: FakeCuda, folder: Path, where: str) -> None:
    """Run a trainer until it is killed: "draining" or "sealing"."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(fake.folder), str(folder), where]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_draining(patch: Callable[[Any, str, Any], None]) -> None:
    """Once the first of two stretches of the base is in the slot."""
    to_host = Driver.to_host
    done: list[int] = []

    def counted(self: Driver, target: int, source: int, size_bytes: int, stream: int) -> None:
        to_host(self, target, source, size_bytes, stream)
        done.append(size_bytes)
        if done.count(CHUNK_BYTES) == 1:
            _die()

    patch(Driver, "to_host", counted)


def main(built: str, folder: str, where: str) -> None:
    fake = FakeCuda(Path(built))
    fake.reset()
    fake.mode(Mode.IMMEDIATE)
    state = make_state()
    put_on_device(fake, Driver(str(fake.path)), setattr, state)
    checkpointer = open_run(Path(folder))
    saved_twice(checkpointer, state)
    if where == "draining":
        _die_draining(setattr)
    else:
        signal_all(signal.SIGSTOP)
        when_sent("seal", _die, setattr)
    values_at(3, state)
    checkpointer.save(3, state).wait("local", timeout_s=30)


if __name__ == "__main__":
    main(*sys.argv[1:])
