"""``torch.distributed.checkpoint`` on real ranks: saved on four, loaded on four, two and one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from forked_ranks import run_jobs

import mtckpt
from mtckpt.cli import main

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from mtckpt.adapters.torch.dcp import Reader  # noqa: E402

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]


def test_states_of_four_ranks_are_loaded_on_four_two_and_one(tmp_path: Path) -> None:
    said, on_two = run_jobs(
        "dcp_ranks",
        (4, ["save_plain,load_plain,save_models,load_models,first_fsdp", tmp_path]),
        (2, ["load_plain,load_models,first_fsdp", tmp_path]),
        cwd=tmp_path,
    )
    assert said.count("loaded plain") == said.count("restored fsdp1") == 4
    assert said.count("refused: rank 1: DCP would pickle a value of type builtins.object") == 3
    assert said.count("rank 1: refused: DCP would pickle a value of type builtins.object") == 1
    for pair in ("ddp into tp_fsdp", "tp_fsdp into fsdp"):
        assert said.count(f": {pair}\n") == 4
    # What several ranks hold under one key is stored once: 1.2 MB and 0.8 MB, each in two steps.
    sizes = [path.stat().st_size for path in (tmp_path / "disk/plain").rglob("*.safetensors")]
    assert sum(sizes) < 2 * 1.3 * (300_000 + 200_000) * 4

    assert on_two.count("loaded plain") == 2
    for pair in ("tp_fsdp into ddp", "ddp into fsdp", "fsdp into fsdp"):
        assert on_two.count(f": {pair}\n") == 2
    assert on_two.count("loaded fsdp1") == 2

    # What DCP wrote by itself holds the same.
    command = ["import", str(tmp_path / "foreign"), str(tmp_path / "in"), "--run=r", "--unpickle"]
    assert CliRunner().invoke(main, command).exit_code == 0
    with (
        mtckpt.load(tmp_path / "in") as imported,
        mtckpt.load(tmp_path / "disk/plain", step=1) as saved,
    ):
        assert imported.step == 1
        assert set(imported) == set(saved)
        for path in saved:
            assert imported[path].tobytes() == saved[path].tobytes()

    # And DCP loads by itself what it saved through the tiers.
    command = ["export", str(tmp_path / "disk/plain"), str(tmp_path / "out"), "--to=dcp"]
    assert CliRunner().invoke(main, command).exit_code == 0
    exported: dict[str, Any] = {"large": torch.zeros(300_000), "stage2": {"rank": -1}}
    dcp.load(exported, checkpoint_id=tmp_path / "out")
    assert torch.equal(exported["large"], 2 * torch.arange(300_000.0))
    assert exported["stage2"]["rank"] == 2

    # In a process without torch.distributed.
    state: dict[str, Any] = {
        "arrays": {name: torch.zeros(7, 5) for name in ("rows", "columns", "grid", "replicated")},
        "large": torch.zeros(300_000),
        "stage3": {"w": torch.zeros(4), "rank": -1},
    }
    with mtckpt.Checkpointer("plain", [mtckpt.Disk(tmp_path / "disk")]) as checkpointer:
        dcp.load(state, storage_reader=Reader(checkpointer, 2))
    for value in state["arrays"].values():
        assert torch.equal(value, 2 * torch.arange(35.0).reshape(7, 5))
    assert torch.equal(state["large"], 2 * torch.arange(300_000.0))
    assert state["stage3"]["w"].tolist() == [6, 6, 6, 6]
    assert state["stage3"]["rank"] == 3
