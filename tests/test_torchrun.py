"""Real ranks, of torchrun or forked: gloo, small models in every parallelism, killed, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_ranks import run_jobs
from halting import halting_after

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 100.0
STEPS = 30

pytestmark = [pytest.mark.timeout(2 * int(TIMEOUT_S)), pytest.mark.usefixtures("runtime_dir")]


def start(
    ranks: int,
    script: str,
    *arguments: object,
    cwd: Path,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **(environment or {}),
        },
    )


def finish(process: subprocess.Popen[str], *, ended_well: bool = True) -> str:
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode == 0) is ended_well, said[-8000:]
    return said


def test_every_kind_is_restored_into_every_other_and_on_fewer_ranks(tmp_path: Path) -> None:
    kinds = ("ddp", "fsdp", "hsdp", "tp_fsdp")
    on_four, on_two = run_jobs(
        "torch_ranks",
        (4, ["matrix", tmp_path]),
        (2, ["restore_all", tmp_path, *kinds]),
        cwd=tmp_path,
    )
    for source in kinds:
        for kind in kinds:
            assert on_four.count(f": {source} into {kind}\n") == 4
        for kind in ("ddp", "fsdp"):
            assert on_two.count(f": {source} into {kind}\n") == 2
    sizes = {
        kind: sum(path.stat().st_size for path in (tmp_path / "disk" / kind).rglob("*.safetensors"))
        for kind in kinds
    }
    # What ranks hold alike is stored once: no kind takes more than the others, but for headers.
    assert max(sizes.values()) < 1.3 * min(sizes.values())


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The ranks of a torchrun, in order."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, pids))


def kill_one(process: subprocess.Popen[str], losses: Path, step: int) -> None:
    """SIGKILL a rank once it has done ``step``; torchrun ends the others."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if losses.exists() and losses.read_text().count("\n") > step:
            os.kill(workers(process)[1], signal.SIGKILL)
            break
        time.sleep(0.005)
    finish(process, ended_well=False)


def test_a_killed_rank_costs_nothing_but_time(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, killed):
        directory.mkdir()
    script = "examples/train_fsdp.py"
    run_jobs("train_fsdp_plain", (2, [f"--steps={STEPS}"]), cwd=plain)
    halting = halting_after(STEPS - 2, tmp_path / "halting")
    victim = start(2, script, f"--steps={STEPS}", cwd=killed, environment=halting)
    kill_one(victim, killed / "out" / "losses-1.tsv", STEPS // 2)
    said = finish(start(2, script, f"--steps={STEPS}", cwd=killed))
    restored = re.findall(r"restored step (\d+)", said)
    assert len(restored) == 2, said
    assert len(set(restored)) == 1, said
    parameters = "out/parameters.safetensors"
    assert (killed / parameters).read_bytes() == (plain / parameters).read_bytes()
    for rank in range(2):
        name = f"out/losses-{rank}.tsv"
        expected = (plain / name).read_text().splitlines()
        written = (killed / name).read_text().splitlines()
        assert len(expected) == STEPS
        assert sorted(set(written), key=lambda line: int(line.split("\t")[0])) == expected
        assert len(written) < 2 * STEPS - 5


def test_a_rank_that_is_stopped_is_named_and_saves_resume_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_RANK_S", "2")
    (said,) = run_jobs("torch_ranks", (2, ["stuck", tmp_path]), cwd=tmp_path)
    for rank in range(2):  # rank 1, which goes on later, hears it too
        assert f"rank {rank}: step 2: RankTimeout of [1] at staged" in said
        assert f"rank {rank}: step 3: SaveFailed" in said
    assert said.count("step 4: staged") == 2


def test_fsdp1_is_restored_into_other_kinds_and_on_fewer_ranks(tmp_path: Path) -> None:
    on_four, on_two = run_jobs(
        "fsdp1_ranks",
        (4, ["save,load,refused", tmp_path]),
        (2, ["load", tmp_path]),
        cwd=tmp_path,
    )
    pairs = ("flat into flat", "flat into hybrid", "hybrid into pieces", "fsdp into flat")
    assert all(on_four.count(f": {pair}\n") == 4 for pair in pairs), on_four
    assert on_four.count("refused: 6 of 6 parameters of an optimizer are of an FSDP1 module") == 4
    for pair in ("flat into pieces", "hybrid into flat", "pieces into ddp"):
        assert on_two.count(f": {pair}\n") == 2
    # No rank has stored more than its pieces: all kinds take as much, but for headers.
    sizes = {
        kind: sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
        for kind, directory in (
            (kind, max((tmp_path / "disk" / kind).glob("**/step-*0000002.*")))
            for kind in ("fsdp", "flat", "pieces", "hybrid")
        )
    }
    assert max(sizes.values()) < 1.3 * min(sizes.values()), sizes
