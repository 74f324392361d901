"""A fork of a process that saves from a device neither uses nor gives back what is its parent's.

In a process of its own, which is no place for other tests' threads.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import device_trainer
import numpy as np
import pytest
from fake_cuda import FakeCuda, Mode

import mtckpt
from mtckpt.capture import gates
from mtckpt.capture.driver import Driver
from mtckpt.capture.memory import _libc, view_at
from mtckpt.errors import ForkedProcess

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

_FIXED_PRIVATE_ANONYMOUS = 0x10 | 0x02 | 0x20
_READ_WRITE = 3


def test_a_fork_leaves_its_parents_device_and_slots_alone(
    fake_cuda: FakeCuda, tmp_path: Path
) -> None:
    here = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(fake_cuda.folder), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child", "parent"], done.stderr


def in_a_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(built: str, folder: str) -> None:
    fake = FakeCuda(Path(built))
    fake.reset()
    fake.mode(Mode.LAZY)
    state = device_trainer.make_state()
    device_trainer.put_on_device(fake, Driver(str(fake.path)), setattr, state)
    opened: list[mtckpt.Checkpointer] = [device_trainer.open_run(Path(folder))]
    device_trainer.saved_twice(opened[0], state)
    gates.open_one(gates.Gate(Driver(str(fake.path)), 0, 0))
    ring = opened[0]._saver.ring
    slots = [slot.data for slot in ring._slots.values()]
    places = [(mapping.address, mapping.size_bytes) for mapping in slots]
    assert len(places) == 2
    before = fake.counts()
    fake.calls()

    def child() -> None:
        try:
            opened[0].save(3, state)
        except ForkedProcess:
            print("child", flush=True)
        assert gates.open_gates() == []  # a step of an optimizer waits for nobody
        # Nothing is mapped where the slots are, so it is free for others, as here.
        for address, size_bytes in places:
            there = _libc.mmap(address, size_bytes, _READ_WRITE, _FIXED_PRIVATE_ANONYMOUS, -1, 0)
            assert there == address
        opened.clear()
        gc.collect()
        ring.close()  # as whoever collects it does
        for mapping in slots:
            mapping.close()
        for address, size_bytes in places:
            found = view_at(address, size_bytes)
            found[:] = bytes([7]) * size_bytes
        assert fake.calls() == []

    assert in_a_child(child) == 0
    assert fake.counts() == before
    gates._forget()
    device_trainer.values_at(3, state)
    opened[0].save(3, state).wait("local", timeout_s=30)
    wanted = {name: array.copy() for name, array in state.items()}
    state["base"][:] = 0
    restored = opened[0].restore(state)
    assert (restored.step, set(restored.sources)) == (3, {"ram"})
    assert all(np.array_equal(state[name], wanted[name]) for name in wanted)
    opened[0].close(timeout_s=30)
    print("parent", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
