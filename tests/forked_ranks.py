"""Jobs of several ranks whose ranks are forked from one warm process: torch is imported once.

    python tests/forked_ranks.py MODULE '[[4, ["matrix", "DIRECTORY"]], ...]'

The ranks of each job meet as under torchrun, in a store that belongs to none of them, and run
``main()`` of the module with these arguments. Jobs come one after the other. That ``torchrun``
itself starts ranks that save and resume other tests see.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_jobs"]

TIMEOUT_S = 100.0
# What the modules import only once they are called.
WARM = (
    "mtckpt.adapters.torch.dcp",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
)
END_OF_JOB = "\x1e"


def run_jobs(module: str, *jobs: tuple[int, Sequence[object]], cwd: Path) -> list[str]:
    """What the ranks of each job said, given how many there are and their arguments."""
    listed = [(ranks, [str(argument) for argument in arguments]) for ranks, arguments in jobs]
    done = subprocess.run(
        [sys.executable, __file__, module, json.dumps(listed)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-8000:]
    *said, _ = done.stdout.split(END_OF_JOB)
    return said


def _serve_store(writer: int) -> None:
    """Host what joins the ranks, as a launcher does, until the end of the job."""
    dist: Any = importlib.import_module("torch.distributed")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, str(store.port).encode())
    while True:
        signal.pause()


def _fork(work: Callable[[], None]) -> int:
    """A process that does this and ends as a program does."""
    if pid := os.fork():
        return pid
    work()
    sys.exit()


def _play(main: Callable[[], None], num_ranks: int, arguments: list[str]) -> bool:
    """Whether all ranks ended well; the others are ended where one did not."""
    reader, writer = os.pipe()
    store = _fork(lambda: _serve_store(writer))
    os.close(writer)
    port = os.read(reader, 16).decode()
    os.close(reader)
    assert port, "what joins the ranks could not begin"

    def rank(number: int) -> None:
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        sys.argv[1:] = arguments
        main()

    left = {_fork(lambda number=number: rank(number)) for number in range(num_ranks)}  # type: ignore[misc]  # a default binds the number of this turn
    well = True
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and well:
            well = False
            for other in left:
                os.kill(other, signal.SIGKILL)
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    return well


def main(name: str, jobs: str) -> None:
    module = importlib.import_module(name)
    for warm in WARM:
        importlib.import_module(warm)
    for num_ranks, arguments in json.loads(jobs):
        if not _play(module.main, num_ranks, arguments):
            sys.exit(1)
        os.write(1, END_OF_JOB.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
