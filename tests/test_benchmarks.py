"""The benchmarks run at a tiny size and print rows: their figures say nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("torch")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "figures"),
    [
        (["benchmarks.imported", "--rounds=1"], {"import mtckpt"}),
        (["benchmarks.idle", "--rounds=1"], {"nothing due"}),
        (["benchmarks.looked", "--tensors=50", "--rounds=1"], {"small tensor looked at"}),
        (["benchmarks.staged", "--size-mib=2", "--rounds=1"], {"staged", "save blocks"}),
        (
            ["benchmarks.staged", "--kind=small", "--tensors=50", "--rounds=1"],
            {"small tensors staged"},
        ),
        (["benchmarks.flushed", "--size-mib=2", "--rounds=1"], {"flushed to disk"}),
        (
            ["benchmarks.peers_pull", "--size-mib=2", "--rounds=1", "--tls=1"],
            {"pulled, sealed and verified", "pulled over TLS"},
        ),
        (
            ["benchmarks.store", "--only=gcs", "--size-mib=2", "--rounds=1"],
            {"down, 1 object, GCS, mtckpt, gs / obstore"},
        ),
        (
            ["benchmarks.nodes", "--only=agree", "--ranks=80", "--tensors=20", "--rounds=1"],
            {"agree and plan", "messages a node, answers too"},
        ),
        *(
            pytest.param(
                [
                    "benchmarks.lost",
                    f"--role={role}",
                    "--size-mib=2",
                    "--rounds=1",
                    "--block-s=0.1",
                ],
                {f"training time lost, {role}", f"training time lost, {role} / {last}"},
                marks=pytest.mark.torture,
            )
            for role, last in (("ram and disk", "ram"), ("ram and store", "ram and obstore"))
        ),
        *(
            pytest.param(
                ["benchmarks.nodes", f"--only={row}", "--size-mib=16", "--rounds=1"],
                {figure},
                marks=[pytest.mark.torture, pytest.mark.timeout(600)],
            )
            for row, figure in (
                ("lost", "node lost, first resumed step: over a start from nothing"),
                ("crashed", "process crash: bytes not from the own node"),
                ("ddp", "DDP over 4 nodes, copies=1, node: a rank captures, of the state"),
                ("fsdp", "training time lost, 2 ranks FSDP2, mtckpt"),
                ("mesh", "restored, 4 ranks onto 2, FSDP2"),
            )
        ),
        pytest.param(
            ["benchmarks.memory", "--size-mib=2", "--rounds=1"],
            {"memory beyond state and slots"},
            marks=pytest.mark.torture,
        ),
        pytest.param(
            ["benchmarks.in_jax", "--kind=small", "--tensors=50", "--rounds=1"],
            {"JAX, small arrays, mtckpt: complete", "JAX, small arrays, Orbax async: restored"},
            marks=pytest.mark.torture,
        ),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if isinstance(value, list) else "",
)
def test_a_benchmark_prints_a_line_for_each_figure(script: list[str], figures: set[str]) -> None:
    rows = [json.loads(line) for line in run(*script).splitlines()]
    assert figures <= {row["figure"] for row in rows}
    for row in rows:
        assert row["min"] <= row["median"] <= row["max"], row
        assert row["n"] >= 1, row
        assert row["machine"]["cores"], row
        assert row["versions"]["python"], row


def test_a_row_is_not_printed_when_bytes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import measuring

    state = measuring.gpt_state(1)
    measuring.fill(state, 1)
    assert measuring.same(state, 1)
    state["model"]["wte"][0, 0] += 1
    assert not measuring.same(state, 1)


def test_without_a_gpu_the_gpu_benchmark_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run("benchmarks.gpu.smoke").strip() == "skipped: no GPU"
