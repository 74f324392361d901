"""What doctor makes of facts, and of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_save
from click.testing import CliRunner
from terminals import on_terminal

from mtckpt.agent.beside import Left
from mtckpt.cli import main
from mtckpt.cli._judge import GIB, MIB, Facts, Gpu, judge

GOOD = Facts(
    platform="linux",
    kernel="6.8.0",
    versions={"mtckpt": "0.1.0"},
    num_cores=8,
    num_numa_nodes=2,
    copy_bytes_per_s=10.0 * GIB,
    memory_left_bytes=64 * GIB,
    memory_limit_bytes=None,
    memory_bounded_by="this machine",
    memlock_bytes=None,
    open_files=65536,
    peer_pidfd=True,
    ram_path="/dev/shm",
    ram_kind="tmpfs",
    ram_mount="/dev/shm",
    ram_free_bytes=60 * GIB,
    ram_total_bytes=64 * GIB,
    ram_bytes_per_s=5.0 * GIB,
    ram_huge=True,
    ram_huge_option="within_size",
    ram_problem="",
    disk_path="/nvme",
    disk_kind="ext4",
    disk_free_bytes=900 * GIB,
    disk_bytes_per_s=2.0 * GIB,
    disk_direct=True,
    disk_problem="",
    container="",
    gvisor=False,
    gpu_driver="13.0",
    gpu_problem="",
    gpu_nodes=True,
    gpus=(
        Gpu("H100", "9.0", 1, True, 80 * GIB, "kernels.sm_90.cubin.zlib", 51.0 * GIB, 50.0 * GIB),
    ),
    slot_bytes_per_s=27.0 * GIB,
    slot_problem="",
    bounded_by="",
)
(GPU,) = GOOD.gpus
AGENT = {"pid": 5, "mode": "own", "mtckpt": "0.1.0", "uptime_s": 1.0, "num_runs": 0}


def test_a_good_machine_has_nothing_to_say() -> None:
    findings = judge(GOOD)
    assert [finding.level for finding in findings] == ["ok"] * len(findings)
    assert "2 NUMA nodes" in str(findings)
    assert "H100, compute capability 9.0, 80.0 GiB, NUMA node 1: to slots 51.0 GiB/s" in str(
        findings
    )
    assert {finding.level for finding in judge(dataclasses.replace(GOOD, agent=AGENT))} == {"ok"}


GONE = Left("/nvme/.mtckpt-slots/x.y", "gpt", 3 * GIB, "gone")


@pytest.mark.parametrize(
    ("change", "name", "level", "text"),
    [
        ({"platform": "darwin"}, "system", "wrong", "saving needs Linux"),
        ({"ram_kind": "ext4"}, "RAM tier", "wrong", "mount -t tmpfs"),
        (
            {"ram_problem": "cannot be written: No space left"},
            "RAM tier",
            "wrong",
            "MTCKPT_RAM_DIR",
        ),
        ({"ram_total_bytes": 64 * MIB}, "RAM tier", "wrong", "--shm-size"),
        (
            {"ram_total_bytes": 64 * MIB, "container": "kubernetes"},
            *("RAM tier", "wrong", "medium: Memory"),
        ),
        ({"ram_free_bytes": GIB}, "RAM tier", "note", "mtckpt rm RUN"),
        ({"ram_huge": False, "ram_huge_option": ""}, "huge pages", "note", "huge=within_size"),
        (
            {"ram_huge": False, "ram_huge_option": "never", "ram_mount": "/mnt/huge"},
            *("huge pages", "note", "mount -o remount,huge=within_size /mnt/huge"),
        ),
        ({"ram_huge": False, "ram_huge_option": "deny"}, "huge pages", "note", "echo never >"),
        (
            {"ram_huge": False, "container": "kubernetes"},
            *("huge pages", "note", "daemonset-huge-pages"),
        ),
        ({"gpus": (), "gpu_problem": "no device"}, "GPU", "note", "--gpus all"),
        ({"gpus": (), "gpu_driver": "", "gpu_problem": "no libcuda"}, "GPU", "note", "nvidia-smi"),
        (
            {"gpus": (GPU, dataclasses.replace(GPU, is_near=False))},
            *("GPU 1", "note", "--cpunodebind=1"),
        ),
        ({"gpus": (Gpu("T4", "7.5", kernels="kernels.ptx"),)}, "GPU 0", "note", "compiles"),
        ({"gpus": (Gpu("T4", "7.5", problem="no memory"),)}, "GPU 0", "note", "no memory"),
        ({"slot_bytes_per_s": None}, "GPU slots", "note", "no room"),
        (
            {"slot_bytes_per_s": None, "slot_problem": "NOT_PERMITTED (800)"},
            *("GPU slots", "note", "memlock=-1"),
        ),
        (
            {"slot_bytes_per_s": None, "slot_problem": "NOT_PERMITTED (800)", "gvisor": True},
            *("GPU slots", "note", "runtimeClassName"),
        ),
        ({"memory_limit_bytes": 8 * GIB}, "memory", "note", "cgroup limit 8.0 GiB"),
        ({"disk_kind": "tmpfs"}, "disk tier", "wrong", "--disk PATH"),
        ({"disk_kind": "overlay"}, "disk tier", "note", "mount a volume"),
        ({"disk_kind": "nfs4"}, "disk tier", "note", "network"),
        ({"disk_kind": "fuse.sshfs"}, "disk tier", "note", "network"),
        ({"left": (GONE,)}, "left slots", "note", "mtckpt rm gpt --beside /nvme"),
        ({"left": (GONE,)}, "left slots", "note", "gpt: 3.0 GiB in /nvme/.mtckpt-slots/x.y"),
        (
            {"left": (dataclasses.replace(GONE, agent="unknown"),)},
            *("left slots", "note", "rm -r /nvme/.mtckpt-slots/x.y"),
        ),
        ({"disk_direct": False}, "disk tier", "note", "no O_DIRECT"),
        ({"disk_problem": "cannot be written"}, "disk tier", "wrong", "another directory"),
        ({"num_cores": 1}, "machine", "note", "only core"),
        ({"memlock_bytes": 8 * MIB}, "memlock", "note", "ulimit -l"),
        ({"open_files": 1024}, "open files", "note", "ulimit -n"),
        ({"peer_pidfd": False}, "pidfd", "note", "6.5"),
        ({"agent_problem": "did not answer"}, "agent", "wrong", "agent stop"),
        ({"agent": {**AGENT, "mtckpt": "0.0.9"}}, "agent", "note", "0.0.9"),
        ({"bounded_by": "Slurm job 7"}, "agent's life", "note", "Slurm job 7"),
    ],
)
def test_what_falls_back_says_why_and_what_to_do(
    change: dict[str, Any], name: str, level: str, text: str
) -> None:
    findings = judge(dataclasses.replace(GOOD, **change))
    (finding,) = [finding for finding in findings if finding.level != "ok"]
    assert (finding.name, finding.level) == (name, level)
    assert text in f"{finding.value} {finding.why} {' '.join(finding.actions)}"


def test_no_gpu_is_nothing_that_falls_back() -> None:
    facts = dataclasses.replace(
        GOOD, gpus=(), gpu_driver="", gpu_nodes=False, gpu_problem="libcuda.so.1: not there"
    )
    findings = judge(facts)
    assert {finding.level for finding in findings} == {"ok"}
    assert "none: libcuda.so.1: not there" in str(findings)


def test_this_machine_fits_on_one_page(tmp_path: Path, runtime_dir: Path) -> None:
    started_s = time.monotonic()
    result = CliRunner().invoke(main, ["doctor", "--disk", str(tmp_path / "not/yet")])
    assert time.monotonic() - started_s < 5
    assert result.exit_code in (0, 1), result.output
    for name in ("RAM tier", "huge pages", "disk tier", "memlock", "pidfd", "agent's life"):
        assert name in result.output
    assert len(result.output.splitlines()) < 70
    assert list(tmp_path.iterdir()) == []
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.usefixtures("runtime_dir")
def test_as_json_and_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_RAM_DIR", str(tmp_path / "nowhere"))
    result = CliRunner().invoke(main, ["doctor", "--disk", "/proc", "--json"])
    assert result.exit_code == 1
    body = json.loads(result.stdout)
    assert body["version"] == 1
    levels = {finding["name"]: finding["level"] for finding in body["findings"]}
    assert levels["RAM tier"] == levels["disk tier"] == "wrong"
    assert body["facts"]["disk_path"] == "/proc"
    assert body["facts"]["copy_bytes_per_s"] > 0


@pytest.mark.parametrize("without_rich", [False, True])
def test_tables_on_a_terminal(tmp_path: Path, without_rich: bool) -> None:
    build_save(tmp_path, "gpt", 7, {"[red]w[/red]": np.zeros(3)})
    before = "sys.modules['rich'] = sys.modules['rich.console'] = None;" if without_rich else ""
    program = f"import sys; {before} from mtckpt.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    shown = on_terminal([sys.executable, "-c", program, "show", f"{tmp_path}/"], environment)
    assert "[red]w[/red]" in shown
    assert "float64" in shown
