"""``torch.distributed.checkpoint`` on real ranks: saved on four, loaded on four, two and one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 110.0

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("runtime_dir")]


def run(ranks: int, commands: str, directory: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(ROOT / "tests/dcp_ranks.py"), commands]
    done = subprocess.run(
        [*command, str(directory)],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_states_of_four_ranks_are_loaded_on_four_two_and_one(tmp_path: Path) -> None:
    said = run(4, "save_plain,load_plain", tmp_path)
    assert said.count("loaded plain") == 4
    # What several ranks hold under one key is stored once: 1.2 MB and 0.8 MB, each in two steps.
    sizes = [path.stat().st_size for path in (tmp_path / "disk").rglob("*.safetensors")]
    assert sum(sizes) < 2 * 1.3 * (300_000 + 200_000) * 4
    said = run(2, "load_plain", tmp_path)
    assert said.count("loaded plain") == 2
    assert run(1, "load_plain", tmp_path).count("loaded plain") == 1


def test_models_in_every_kind_of_parallelism_come_back_in_another(tmp_path: Path) -> None:
    said = run(4, "save_models,load_models", tmp_path)
    for pair in ("ddp into tp_fsdp", "tp_fsdp into hsdp", "hsdp into ddp", "fsdp into fsdp"):
        assert said.count(f": {pair}\n") == 4
    said = run(2, "load_models,first_fsdp", tmp_path)
    for pair in ("ddp into fsdp", "tp_fsdp into ddp", "hsdp into fsdp", "fsdp into fsdp"):
        assert said.count(f": {pair}\n") == 2
    assert said.count("loaded fsdp1") == 2
