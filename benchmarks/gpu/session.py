"""Some of the benchmarks in one process, one after another: ``--only limits,staged,lost``.

One process imports the framework and starts the device once. Those that need processes of their
own start them. Prints a JSON line for every figure at once; ends with 1 if any could not be taken.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, machine, options, show

if TYPE_CHECKING:
    from collections.abc import Callable

_GRACE_S = 10.0  # behind the budget, before this process gives up
# name -> (module, function)
MEASURES = {
    "limits": ("limits", "measure"),
    "staged": ("staged", "measure"),
    "small": ("staged", "measure_small"),
    "changed": ("staged", "measure_changed"),
    "lost": ("lost", "measure"),
    "restored": ("restored", "measure"),
    "killed": ("killed", "measure"),
    "stress": ("stress", "measure"),
    "memory": ("memory", "measure"),
    "big": ("big", "measure"),
    "jax": ("in_jax", "measure"),
    "peers": ("peers", "measure"),
}


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    names = bench.chosen.only.split(",") if bench.chosen.only else list(MEASURES)
    with measuring.places() as where:
        watchdog = threading.Timer(max(1.0, bench.left_s() + _GRACE_S), _give_up, [where])
        watchdog.daemon = True
        watchdog.start()
        show(machine(bench))
        for name in names:
            bench.attempt(name, _measure_of(name), bench, needs_s=1)
    sys.stdout.flush()
    os._exit(1 if bench.failed else 0)  # what a figure that failed left open is not closed


def _give_up(where: measuring.Places) -> None:
    """A figure that hangs takes no memory along: the slots are freed, and this process ends."""
    where.kill_agent()
    for directory in (where.ram, where.runtime, where.disk):
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(3)


def _measure_of(name: str) -> Callable[[Bench], None]:
    module, function = MEASURES[name]
    measure: Callable[[Bench], None] = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return measure


if __name__ == "__main__":
    main()
