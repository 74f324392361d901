"""Host memory beyond the state while a job saves to RAM and disk: its highest sample.

Counted: what the slots take in tmpfs, what the agent and its data processes have for themselves
(their share of private and file pages; slots they map are counted once, in tmpfs), and what the
trainer's own memory grew by. Less the slots themselves, the goal leaves 64 MiB.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from statistics import median

from benchmarks import measuring

_GOAL_MIB = 64.0


def main() -> None:
    chosen = measuring.options(__doc__)
    beyond, agents, trainers, slots = [], [], [], 0
    with measuring.places() as where:
        import mtckpt

        state = measuring.gpt_state(chosen.size_mib)
        measuring.fill(state, 1)
        size_bytes = sum(tensor.nbytes for tensor in measuring.tensors_of(state))
        before_bytes = own_bytes(os.getpid())
        tiers = [mtckpt.Ram(every=1, slots=2), mtckpt.Disk(where.disk, keep=2)]
        checkpointer = mtckpt.Checkpointer("bench", tiers, max_stall_s=60)
        stop = threading.Event()
        samples: list[tuple[int, int, int]] = []

        def watch() -> None:
            while not stop.wait(0.05):
                agent = sum(own_bytes(pid) for pid in where.agent_pids())
                samples.append((used_bytes(where.ram), agent, own_bytes(os.getpid())))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(1, 2 + chosen.rounds):
            samples.clear()
            checkpointer.save(step, state).wait("local", timeout_s=120)
            measuring.settle(0.2)
            if step > 1 and samples:
                tmpfs, agent, trainer = (max(column) for column in zip(*samples, strict=True))
                slots = max(slots, round(tmpfs / size_bytes))
                agents.append(agent / measuring.MIB)
                trainers.append((trainer - before_bytes) / measuring.MIB)
                beyond.append((tmpfs - 2 * size_bytes) / measuring.MIB + agents[-1] + trainers[-1])
        stop.set()
        watcher.join()
        checkpointer.close()
    measuring.row(
        "memory beyond state and slots",
        beyond,
        unit="MiB",
        goal=f"value <= {_GOAL_MIB}",
        slots=slots,
        agent_mib=round(median(agents), 1),
        trainer_mib=round(median(trainers), 1),
        size_bytes=size_bytes,
    )


def own_bytes(pid: int) -> int:
    """A process's share of memory, without pages of tmpfs."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    fields = {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return (fields.get("Pss", 0) - fields.get("Pss_Shmem", 0)) * 1024


def used_bytes(directory: str) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


if __name__ == "__main__":
    main()
