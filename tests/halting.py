"""A training script that waits for its kill: however busy the machine, it has not ended before.

It knows that the examples print the losses of each step to a file. Started in the environment that
is made here, a script does not go on behind one of these prints; its other threads and the node's
agent do. Who kills it earlier finds it anywhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["halting_after"]

# Python imports this at its start, in every process of that environment.
_SOURCE = """
import builtins
import signal

whole = builtins.print


def print(*words, **options):
    whole(*words, **options)
    if words[:1] == ({step},) and "losses" in str(getattr(options.get("file"), "name", "")):
        while True:
            signal.pause()


builtins.print = print
"""


def halting_after(step: int, directory: Path) -> dict[str, str]:
    """Variables with which a script halts once the losses of ``step`` are written."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(_SOURCE.format(step=step))
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, sys.path)])}
