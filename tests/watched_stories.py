"""Tells some stories of the simulation, and what of the real machine they would have touched.

A program of its own: nothing can make a process forget a hook that it was given.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from mtckpt.testing.simulation import run_seed

SEEDS = ((12, False), (13, True), (19, True))  # the last with a node that goes, and its note
HARMLESS = ("sys.", "object.__", "builtins.id")
# What no event tells of, and what no story may ask for either.
SILENT = ("stat", "lstat", "statvfs", "access", "readlink", "getcwd", "uname")


class Watch:
    """Writes down what is asked of the machine while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self.touched: list[str] = []

    def heard(self, event: str, values: Any) -> None:
        if self.on and not event.startswith(HARMLESS):
            self.touched.append(f"touched: {event} {values!r}")

    def over(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """``real``, which is no secret any more."""

        def watched(*values: Any, **named: Any) -> Any:
            self.heard(f"os.{name}", values)
            return real(*values, **named)

        return watched


def main() -> None:
    watch = Watch()
    for seed, partners in SEEDS:
        run_seed(seed, partners=partners)  # modules are read when they are needed first
    for name in SILENT:
        setattr(os, name, watch.over(name, getattr(os, name)))
    sys.addaudithook(watch.heard)
    start = threading.Thread.start
    threading.Thread.start = watch.over("thread", start)  # type: ignore[method-assign]
    told: list[str] = []
    watch.on = True
    for seed, partners in SEEDS:
        told.append(str(run_seed(seed, told.append, partners=partners)))
    watch.on = False
    sys.stdout.write("\n".join([*watch.touched, *told]) + "\n")


if __name__ == "__main__":
    main()
