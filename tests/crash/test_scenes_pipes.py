"""Whoever started the trainer gets its prompt back when the trainer ends: the agent holds nothing.

``| cat`` alone is in ``tests/agent/test_spawn.py``, ``2>&1 | cat`` in ``test_semantics.py``.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent_checks import agent_pid

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

TRAIN = """
import os, sys
import numpy as np, mtckpt
checkpointer = mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), mtckpt.Disk(sys.argv[1])])
checkpointer.save(1, {"a": np.zeros(1000)}).wait("staged", timeout_s=20)
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
os._exit(3)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_whoever_reads_both_outputs_to_their_end_is_not_kept(tmp_path: Path) -> None:
    """As subprocess.run, ssh without a terminal and a cluster's log collector do."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "to stdout\n")
    assert "to stderr" in done.stderr
    assert agent_pid() > 0  # it lives, with nothing of theirs open


def test_a_terminal_is_let_go_and_its_hangup_does_not_end_the_agent(tmp_path: Path) -> None:
    """As ssh with a terminal does: the trainer leads the session, and the session ends with it."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        # setsid does not fork here: the trainer itself leads the session and has the terminal.
        ["setsid", "--ctty", sys.executable, "-c", TRAIN, str(tmp_path)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
    )
    os.close(theirs)
    said = b""
    deadline_s = time.monotonic() + 60
    try:
        while True:
            left_s = deadline_s - time.monotonic()
            assert select.select([terminal], [], [], max(0.0, left_s))[0], said
            try:
                data = os.read(terminal, 4096)
            except OSError:  # EIO: nobody has the other end open any more
                break
            if not data:
                break
            said += data
    finally:
        os.close(terminal)
        status = process.wait(30)
    assert status == 3, said
    assert b"to stdout" in said
    running = agent_pid()
    stat = Path(f"/proc/{running}/stat").read_text().rpartition(")")[2].split()
    assert stat[4] == "0", "the agent has a controlling terminal"
