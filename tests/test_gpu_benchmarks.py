"""The GPU benchmarks run on a CPU at a tiny size: their figures say nothing here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent
# One thread: those of many processes would only wait for one another.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DRY = (
    "--device=cpu", "--size-mib=2", "--rounds=1", "--tensors=40", "--kills=1", "--times=2",
    "--fraction=0.02",
)  # fmt: skip


def run(*arguments: str) -> list[dict[str, object]]:
    """The rows of a dry run, every one of them a figure, or skipped with a reason."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=55,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    assert [row for row in rows if "error" in row] == []
    assert all("median" in row for row in rows if not {"skipped", "cores"} & row.keys())
    return rows


def test_figures_that_share_a_process_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    names = "--only=limits,staged,small,changed,lost"
    run("benchmarks.gpu", *DRY, "--seconds=50", names, f"--json={path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    taken = {row["figure"] for row in rows if "median" in row}
    assert {
        "limit: device to host, pinned",
        "limit: device to registered tmpfs, 4 KiB pages",
        "staged",
        "small tensors: captured",
        "5 % of the bytes changed: staged",
        "training time lost",
    } <= taken
    drawn = ElementTree.parse(tmp_path / "rows.svg").getroot()
    texts = {element.text for element in drawn.iter() if element.tag.endswith("text")}
    assert "staged" in texts


@pytest.mark.torture
def test_figures_with_processes_of_their_own_are_taken() -> None:
    names = "--only=restored,killed,memory,big"
    rows = run("benchmarks.gpu.session", *DRY, "--seconds=50", names)
    taken = {row["figure"] for row in rows if "median" in row}
    assert {
        "restored, 4 KiB pages",
        "killed in the middle of a copy: steps lost",
        "grown over saves and restores: slots",
        "big state, as it comes: lost per save",
    } <= taken


@pytest.mark.torture
def test_jax_and_the_peers_are_measured() -> None:
    pytest.importorskip("jax")
    rows = run("benchmarks.gpu.session", *DRY, "--seconds=50", "--only=jax,peers")
    taken = {row["figure"] for row in rows if "median" in row}
    assert {
        "JAX: staged",
        "JAX: restored",
        "JAX: donated behind the save, rounds with other bits",
        "JAX, Orbax, Zarr: restored, fresh process",
        "DCP async: complete in tmpfs",
        "torch.save: restored",
    } <= taken


def test_values_are_those_at_the_call(seed: int) -> None:
    rows = run("benchmarks.gpu.session", *DRY, f"--seed={seed}", "--seconds=10", "--only=stress")
    taken = [row for row in rows if "median" in row]
    assert taken
    assert all(row["compared_bytes"] for row in taken)


def test_the_stress_sees_one_bit(ram_dir: Path, runtime_dir: Path) -> None:
    from benchmarks.gpu import stress
    from benchmarks.gpu.bench import Bench, opened, options, ram

    bench = options("", [*DRY])
    assert isinstance(bench, Bench)
    scene = stress.Scene(bench, random.Random(1), spares_model=False)

    class Wrong:
        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def restore(self, state: dict[str, object], **how: object) -> object:
            restored = self._inner.restore(state, **how)  # type: ignore[attr-defined]  # a proxy
            state["loose"]["t000"].view(torch.int32)[0, 0] ^= 1  # type: ignore[index]  # a dict
            return restored

    with opened(ram()) as checkpointer:
        assert scene.round(checkpointer, 1) > 0
        wrong: object = Wrong(checkpointer)
        with pytest.raises(RuntimeError, match=r"1 tensors have other bits: \['t000'\]"):
            scene.round(wrong, 2)  # type: ignore[arg-type]  # a proxy


def test_a_figure_that_cannot_be_taken_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu.bench import Bench, Skipped, options

    bench = options("", [*DRY, "--seconds=5"])
    assert isinstance(bench, Bench)

    def fail(error: Exception) -> None:
        raise error

    bench.attempt("one", fail, ValueError("broken"))
    bench.attempt("two", fail, Skipped("not here"))
    bench.attempt("three", fail, ValueError("late"), needs_s=60)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["figure"] for row in rows] == ["one", "two", "three"]
    assert rows[0]["error"] == "ValueError: broken"
    assert rows[1]["skipped"] == "not here"
    assert "60 needed" in rows[2]["skipped"]
    assert bench.failed == 1


def test_without_a_gpu_all_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=55,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("skipped: no GPU")
