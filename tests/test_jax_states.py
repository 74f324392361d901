"""States of every kind come back in another process, bit for bit, as what they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("jax", "flax", "optax", "equinox"):
    pytest.importorskip(name)
SCRIPT = Path(__file__).with_name("jax_states.py")
TIMEOUT_S = 100


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_states_of_every_kind(tmp_path: Path, runtime_dir: Path) -> None:
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # Both compile the same.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for what in ("save", "restore"):
        done = subprocess.run(
            [sys.executable, "-W", "error", str(SCRIPT), what, str(tmp_path)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-8000:]
        assert done.stdout == f"{what}d\n"
