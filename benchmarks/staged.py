"""From save() to staged in RAM with digests, next to one warm memcpy of the same bytes.

Runs the real Checkpointer and agent. Prints a row for a GPT-like state (``--kind gpt``) or for
many small tensors (``--kind small``).
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from benchmarks import measuring

_WARM_UPS = 4  # each slot of the ring is allocated and faulted in once


def main() -> None:
    chosen = measuring.options(__doc__, kind="gpt", tensors=20_000)
    size = chosen.size_mib if chosen.kind == "gpt" else chosen.tensors
    with measuring.places() as where:
        import mtckpt

        state = measuring.make_state(chosen.kind, size)
        measuring.fill(state, 1)
        memcpy = measuring.Memcpy(state)
        tmpfs = measuring.TmpfsWrite(state, where.ram)
        staged, blocked, copied, written = [], [], [], []
        checkpointer = mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1)], max_stall_s=60)
        for step in range(1, 1 + _WARM_UPS + chosen.rounds):
            measuring.settle()
            copy_s, write_s = memcpy(), tmpfs()
            started_s = time.perf_counter()
            save = checkpointer.save(step, state)
            returned_s = time.perf_counter()
            save.wait("staged", timeout_s=60)
            ended_s = time.perf_counter()
            if step > _WARM_UPS:
                staged.append(ended_s - started_s)
                blocked.append(returned_s - started_s)
                copied.append(copy_s)
                written.append(write_s)
        tmpfs.close()
        if not _comes_back(checkpointer, state):
            raise SystemExit("restored bytes differ: no row")
        checkpointer.close()
    facts: dict[str, Any] = {
        "tensors": len(measuring.tensors_of(state)),
        "size_bytes": memcpy.size_bytes,
        "tmpfs_write_s": median(written),
    }
    if chosen.kind == "gpt":
        measuring.row("staged", staged, limit=copied, goal="ratio <= 1.25", **facts)
        measuring.row("save blocks", blocked, limit=copied, **facts)
    else:
        measuring.row("small tensors staged", staged, limit=copied, goal="value <= 0.10", **facts)
        measuring.row("small tensors, save blocks", blocked, limit=copied, **facts)


def _comes_back(checkpointer: object, state: object) -> bool:
    for tensor in measuring.tensors_of(state):
        tensor.fill_(-2.0)
    restored = checkpointer.restore(state)  # type: ignore[attr-defined]
    return bool(restored) and set(restored.sources) == {"ram"} and measuring.same(state, 1)


if __name__ == "__main__":
    main()
