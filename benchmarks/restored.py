"""A fresh process restores from RAM into existing tensors: every byte verified, then compared.

A process saves and is killed with SIGKILL; others come after it, as a restarted job would. Rows:
restore() itself next to a memcpy, and from before ``import mtckpt`` to restored (torch was
imported), with the agent still there and with the agent killed as well. The process that was
killed had saved two steps, as a job has that ran for a while; a row of its own is for a single one,
whose only copy is checked as a whole before it is placed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measuring


def main() -> None:
    chosen = measuring.options(__doc__, kind="gpt", tensors=20_000, role="", steps=2)
    size = chosen.size_mib if chosen.kind == "gpt" else chosen.tensors
    if chosen.role == "save":
        _save(chosen.kind, size, chosen.steps)
    elif chosen.role == "restore":
        _restore(chosen.kind, size)
    elif chosen.kind == "small":
        both = [done for runs in _lives(chosen, 2) for done in runs]
        _row("small tensors restored", both, "value <= 0.15")
    else:
        alive, gone = _lives(chosen, 2)
        _row("restored", alive + gone, "ratio <= 1.8")
        for name, runs in (("agent alive", alive), ("agent killed too", gone)):
            fresh = [done["fresh_s"] for done in runs]
            measuring.row(f"fresh process, {name}", fresh, goal="value <= 0.8")
        alive, gone = _lives(chosen, 1)
        _row("restored, the only copy of the only step", alive + gone, "")


def _lives(chosen: Any, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What fresh processes tell that came after one that had saved so many steps and was killed.

    With the agent alive, and with the agent killed too.
    """
    alive: list[dict[str, Any]] = []
    gone: list[dict[str, Any]] = []
    with measuring.places() as where:
        arguments = (
            f"--kind={chosen.kind}",
            f"--size-mib={chosen.size_mib}",
            f"--tensors={chosen.tensors}",
            f"--steps={steps}",
        )
        measuring.child("benchmarks.restored", "--role=save", *arguments, check=False)
        for number in range(2 * chosen.rounds):
            if number % 2:
                where.kill_agent()
            out = measuring.child("benchmarks.restored", "--role=restore", *arguments)
            (gone if number % 2 else alive).append(json.loads(out.splitlines()[-1]))
    return alive, gone


def _row(name: str, runs: list[dict[str, Any]], goal: str) -> None:
    facts = {"size_bytes": runs[0]["size_bytes"], "tensors": runs[0]["tensors"]}
    took = [done["restore_s"] for done in runs]
    copied = [done["memcpy_s"] for done in runs]
    measuring.row(name, took, limit=copied, goal=goal, **facts)


def _save(kind: str, size: int, steps: int) -> None:
    import mtckpt

    state = measuring.make_state(kind, size)
    measuring.fill(state, 3)
    checkpointer = mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1)], max_stall_s=60)
    for step in range(1, steps + 1):
        checkpointer.save(step, state).wait("staged", timeout_s=120)
    os.kill(os.getpid(), signal.SIGKILL)


def _restore(kind: str, size: int) -> None:
    state = measuring.make_state(kind, size)  # imports torch; other values than were saved
    started_s = time.perf_counter()
    import mtckpt

    checkpointer = mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1)], max_stall_s=60)
    checkpointer.status()  # reaches the agent, starting one if need be
    opened_s = time.perf_counter()
    restored = checkpointer.restore(state)
    ended_s = time.perf_counter()
    if not restored or set(restored.sources) != {"ram"} or not measuring.same(state, 3):
        sys.exit(f"{restored!r}: other bytes, or not from RAM")
    memcpy = measuring.Memcpy(state)
    done = {
        "restore_s": ended_s - opened_s,
        "fresh_s": ended_s - started_s,
        "memcpy_s": median([memcpy() for _ in range(5)]),
        "size_bytes": memcpy.size_bytes,
        "tensors": len(measuring.tensors_of(state)),
        "maxrss_kib": int(Path("/proc/self/statm").read_text().split()[1]) * 4,
    }
    print(json.dumps(done), flush=True)
    os._exit(0)  # as a job that is killed: closing would free the slots


if __name__ == "__main__":
    main()
