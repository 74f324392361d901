"""A JAX job of several processes: global arrays of all kinds, saved and restored otherwise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mtckpt

pytest.importorskip("jax")
ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 100.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.timeout(int(TIMEOUT_S) + 20)
def test_two_processes(tmp_path: Path, runtime_dir: Path) -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/jax_ranks.py"), str(rank), "2", str(port), tmp_path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(started):
        said, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, said[-8000:]
        assert f"rank {rank}: good" in said
    with mtckpt.load(tmp_path / "disk") as checkpoint:
        assert checkpoint["rows"].shape == (600, 300)
        assert (checkpoint["all"] == checkpoint["rows"] + 2).all()
        # Replicated bytes are stored once, not by each process.
        assert checkpoint.size_bytes < 3.2 * checkpoint["all"].nbytes
