"""What a script leaves open says nothing when the interpreter ends, whatever is left by then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import mtckpt

# Where something keeps the modules (JAX does), they are emptied from the last to the first.
LEFT_OPEN = """
import codecs, sys, types
first = sys.modules["first"] = types.ModuleType("first")
import mtckpt
from mtckpt.agent.client import AgentClient
from mtckpt.capture.memory import Buffer
first.kept = (
    mtckpt.load(sys.argv[1]),
    AgentClient("/nowhere"),
    Buffer(4096),
)
codecs.register(lambda name, modules=[*sys.modules.values()]: None)
"""


def test_the_end_of_the_interpreter_is_quiet(tmp_path: Path) -> None:
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path)]) as checkpointer:
        checkpointer.save(1, {"w": np.ones(4)}, tiers="all")
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path / "r")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
