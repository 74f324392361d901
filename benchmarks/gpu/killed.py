"""A trainer is killed with SIGKILL at random moments in the middle of copies: nothing is lost.

Each process restores what the one before it left, and checks it against the bits that belong to
that step; then it saves one step after another without a pause until it is killed. The step that
comes back must be the last that was told to be staged, or a later one, whole.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, differing, forget, make_state, options, ram, saved, scramble

_RUN = "killed"
_RUN_S = 90.0
_USUAL_MIB = 1024
_FIRST = 3  # steps that a process has to have staged before it may be killed


def measure(bench: Bench) -> None:
    dice = random.Random(bench.chosen.seed)
    newest, taken = 0, list[float]()
    for life in range(bench.chosen.kills + 1):
        is_last = life == bench.chosen.kills or bench.left_s() < 2.5 * max(taken, default=0.0)
        started_s = time.monotonic()
        newest = _life(bench, newest, dice, is_last)
        taken.append(time.monotonic() - started_s)
        if is_last:
            break
    forget(_RUN)
    kills = len(taken) - 1
    if kills < 1:
        raise RuntimeError("no time for a kill")
    facts = {"kills": kills, "steps": newest, "seed": bench.chosen.seed}
    bench.row("killed in the middle of a copy: steps lost", [0.0] * kills, unit="", **facts)


def _life(bench: Bench, newest: int, dice: random.Random, is_last: bool) -> int:
    """One process, up to its death; returns the newest step that it told to be staged."""
    arguments = [*bench.arguments(), f"--role={'check' if is_last else 'train'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.killed", *arguments],
        cwd=measuring.ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    killer = threading.Timer(min(_RUN_S, max(10.0, bench.left_s())), process.kill)
    killer.start()
    staged, at_s = 0, list[float]()
    restored: int | None = None
    try:
        for line in process.stdout:
            said = re.fullmatch(r"(restored|wrong|staged) (\d+)(.*)\n", line)
            if said is None:
                continue
            word, step = said.group(1), int(said.group(2))
            if word == "wrong" or (word == "restored" and step < newest):
                raise RuntimeError(f"{line.strip()}; step {newest} had been staged")
            if word == "restored":
                restored = step
            else:
                newest, staged = step, staged + 1
                at_s.append(time.monotonic())
            if staged >= _FIRST + 1:
                # A save follows at once: anywhere inside the next two.
                time.sleep(dice.uniform(0, 2 * (at_s[-1] - at_s[-2])))
                break
    finally:
        killer.cancel()
        process.kill()
        rest = process.stdout.read()
        process.wait()
    if restored is None:
        raise RuntimeError("the process said nothing of what it restored")
    told = [int(step) for step in re.findall(r"^staged (\d+)$", rest, re.MULTILINE)]
    return max([newest, *told])


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    if not bench.chosen.role:
        with measuring.places():
            bench.attempt("killed", measure, bench)
        sys.exit(bench.failed)
    _train(bench, goes_on=bench.chosen.role == "train")


def _train(bench: Bench, *, goes_on: bool) -> None:
    import mtckpt

    state: dict[str, Any] = make_state(bench.size_mib(_USUAL_MIB), bench.device)
    checkpointer = mtckpt.Checkpointer(_RUN, [ram()], max_stall_s=60)
    for tensor in state.values():
        tensor.fill_(-1.0)
    restored = checkpointer.restore(dict(state))
    step = restored.step or 0
    wrong = differing(state, step) if restored else []
    print(f"wrong {step}: {wrong[:3]}" if wrong else f"restored {step}", flush=True)
    while goes_on:
        step += 1
        scramble(state, step)
        save = saved(checkpointer, step, state)
        scramble(state, step + 7)  # what came at the call is what counts
        save.wait("staged", timeout_s=60)
        print(f"staged {step}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # closing would free the slots


if __name__ == "__main__":
    main()
