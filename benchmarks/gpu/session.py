"""Some of the benchmarks in one process, one after another: ``--only limits,staged,lost``.

One process imports the framework and starts the device once. Those that need processes of their
own start them. Prints a JSON line for every figure at once; ends with 1 if any could not be taken.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, machine, options, show

if TYPE_CHECKING:
    from collections.abc import Callable

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
}


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    names = bench.chosen.only.split(",") if bench.chosen.only else list(MEASURES)
    with measuring.places():
        show(machine(bench))
        for name in names:
            bench.attempt(name, _measure_of(name), bench, needs_s=1)
    sys.stdout.flush()
    os._exit(1 if bench.failed else 0)  # what a figure that failed left open is not closed


def _measure_of(name: str) -> Callable[[Bench], None]:
    module, function = MEASURES[name]
    measure: Callable[[Bench], None] = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return measure


if __name__ == "__main__":
    main()
