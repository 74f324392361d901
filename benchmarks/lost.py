"""Training time lost per save: the extra wall time of a loop that saves over the same one without.

The trainer and all its threads are pinned to one core, the agent and its data processes to
another. Blocks of the same number of steps come in pairs, one of them with a save at its start, in
alternating order; a block is long enough for everything that the save sets off to be over. Rows
for RAM alone, for RAM and a disk, and for RAM and an object store (SeaweedFS on the agent's core),
each next to a memcpy on the trainer's core.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks import measuring

_LAST_STAGE: dict[str, Literal["staged", "local", "durable"]] = {
    "ram": "staged",
    "ram and disk": "local",
    "ram and store": "durable",
}


def main() -> None:
    chosen = measuring.options(__doc__, rounds=9, block_s=1.5, role="")
    if chosen.role:
        _measure(chosen.role, chosen.size_mib, chosen.rounds, chosen.block_s)
        return
    if len(os.sched_getaffinity(0)) < 2:
        print("training time lost: skipped, one core only", file=sys.stderr)
        return
    for role in ("ram", "ram and disk", "ram and store"):
        out = measuring.child(
            "benchmarks.lost",
            f"--role={role}",
            f"--size-mib={chosen.size_mib}",
            f"--rounds={chosen.rounds}",
            f"--block-s={chosen.block_s}",
        )
        print(out, end="", flush=True)


def _measure(role: str, size_mib: int, rounds: int, block_s: float) -> None:
    import torch

    torch.set_num_threads(1)
    trainer_core, agent_core = sorted(os.sched_getaffinity(0))[:2]
    with measuring.places() as where, contextlib.ExitStack() as servers:
        import mtckpt

        state = measuring.gpt_state(size_mib)
        measuring.fill(state, 1)
        tiers: list[Any] = [mtckpt.Ram(every=1)]
        os.sched_setaffinity(0, {agent_core})  # what is started from here on inherits it
        if role == "ram and disk":
            tiers.append(mtckpt.Disk(where.disk, keep=2))
        elif role == "ram and store":
            tiers.append(_store(servers))
        checkpointer = mtckpt.Checkpointer("bench", tiers, max_stall_s=60)
        step = 0
        while (step := step + 1) <= 4:
            checkpointer.save(step, state).wait("staged", timeout_s=60)
            measuring.settle(0.5)
        _pin(os.getpid(), trainer_core)
        for pid in where.agent_pids():
            _pin(pid, agent_core)
        memcpy = measuring.Memcpy(state)
        lost, copied = [], []
        steps = max(5, int(block_s / _train(50) * 50))
        for pair in range(rounds):
            took = {}
            for saving in (pair % 2 == 0, pair % 2 == 1):
                started_s = time.perf_counter()
                if saving:
                    save = checkpointer.save(step, state)
                    step += 1
                _train(steps)
                took[saving] = time.perf_counter() - started_s
            lost.append(took[True] - took[False])
            copied.append(memcpy())
            if save.skipped:
                sys.exit(f"a save was called off: {save.skipped}")
        save.wait(_LAST_STAGE[role], timeout_s=120)
        for tensor in measuring.tensors_of(state):
            tensor.fill_(-2.0)
        if not checkpointer.restore(state) or not measuring.same(state, 1):
            sys.exit("restored bytes differ: no row")
        checkpointer.close()
    facts: dict[str, Any] = {"size_bytes": memcpy.size_bytes, "steps_a_block": steps}
    name = f"training time lost, {role}"
    measuring.row(name, lost, limit=copied, goal="ratio <= 1.4", **facts)


def _store(servers: contextlib.ExitStack) -> Any:
    sys.path.append(str(measuring.ROOT / "tests"))
    from stores import s3_server

    import mtckpt

    directory = servers.enter_context(tempfile.TemporaryDirectory())
    server = servers.enter_context(s3_server(Path(directory)))
    return mtckpt.ObjectStore(f"s3://{server.new_prefix()}", storage_options=server.options)


def _pin(pid: int, core: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def _train(steps: int) -> float:
    """Steps of a few milliseconds of small operations, as an eager trainer's host side has."""
    import torch

    weight = torch.full((128, 128), 0.01)
    started_s = time.perf_counter()
    for _ in range(steps):
        hidden = weight
        for _ in range(40):
            hidden = torch.tanh(hidden @ weight)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
