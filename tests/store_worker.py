"""A training job whose last tier is a store: says what it was promised, until it is killed.

One JSON line for each thing that happened, written before the next one begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mtckpt

SIZE = 400_000
KEEP = 2


def state_at(step: int) -> dict[str, Any]:
    """All bytes follow from the step, so one look tells which step they are of."""
    return {"w": np.arange(SIZE, dtype=np.float32) + step, "n": np.array(step)}


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def main(disk: str, url: str) -> None:
    """Restore, then save every step to every tier and wait until each is durable."""
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(Path(disk), every=1),
        mtckpt.ObjectStore(url, every=1, keep=KEEP),
    ]
    checkpointer = mtckpt.Checkpointer("r", tiers, timeout_s=30, max_stall_s=20)
    state = state_at(-1)
    restored = checkpointer.restore(state)
    first = int(state["n"])
    whole = bool((state["w"] == state_at(first)["w"]).all())
    say(restored=restored.step, whole=whole and first == (-1 if not restored else restored.step))
    for step in range(restored.next_step or 1, 10_000):
        say(started=step)
        save = checkpointer.save(step, state_at(step))
        save.wait("durable", timeout_s=60)
        say(durable=step)


if __name__ == "__main__":
    main(*sys.argv[1:])
