"""The example for JAX: eight lines from its plain twin, killed, resumed, moved to another mesh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from halting import halting_after
from test_examples import EXAMPLES, MAX_CHANGED_LINES, changed_lines, finish, kill_after

pytest.importorskip("flax")
pytest.importorskip("optax")

STEPS = 24
TIMEOUT_S = 150


def test_the_example_is_its_twin_but_for_eight_lines() -> None:
    plain = (EXAMPLES / "train_jax_plain.py").read_text()
    changed = changed_lines(plain, (EXAMPLES / "train_jax.py").read_text())
    assert 0 < len(changed) <= MAX_CHANGED_LINES, "\n".join(changed)
    assert not [line for line in changed if ";" in line]


def start(
    script: str,
    directory: Path,
    mesh: str = "2x2",
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    settings = {
        # Most of the time goes to compiling, which is the same for all of them.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), f"--steps={STEPS}", f"--mesh={mesh}"],
        cwd=directory,
        env={**os.environ, **settings, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.usefixtures("runtime_dir")
def test_a_killed_example_ends_like_its_plain_twin_and_moves_to_another_mesh(
    tmp_path: Path,
) -> None:
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    halting = halting_after(STEPS - 2, tmp_path / "halting")
    victim = start("train_jax.py", killed, environment=halting)
    kill_after(victim, killed / "out" / "losses.tsv", step=STEPS // 2)
    assert "restored step" in finish(start("train_jax.py", killed))
    finish(start("train_jax_plain.py", plain))

    parameters = "out/parameters.safetensors"
    assert (killed / parameters).read_bytes() == (plain / parameters).read_bytes()
    expected = (plain / "out" / "losses.tsv").read_text().splitlines()
    written = (killed / "out" / "losses.tsv").read_text().splitlines()
    assert len(expected) == STEPS < len(written) < 2 * STEPS
    assert sorted(set(written), key=lambda line: int(line.split("\t")[0])) == expected

    # The same checkpoint on other devices: sums come in another order there, and nothing else.
    shutil.rmtree(killed / "out")
    assert "restored step" in finish(start("train_jax.py", killed, mesh="4x1"))
    moved = (killed / "out" / "losses.tsv").read_text().splitlines()
    assert 0 < len(moved) < STEPS
    for line, whole in zip(moved, expected[-len(moved) :], strict=True):
        assert line.split("\t")[0] == whole.split("\t")[0]
        assert float(line.split("\t")[1]) == pytest.approx(float(whole.split("\t")[1]), rel=1e-3)
