"""explain: the source of each shard, and for each other place the reason why it is not the one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_save
from click.testing import CliRunner, Result
from test_ranks import Job, job  # noqa: F401  # a fixture

from mtckpt import _inventory, _striped
from mtckpt._delivery import Place
from mtckpt.cli import main
from mtckpt.cli._explain import Looked, _choose
from mtckpt.tiers import LocalTier


def explain(*words: object) -> Result:
    result = CliRunner().invoke(main, ["explain", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*words: object, code: int = 0) -> dict[str, Any]:
    result = explain(*words, "--json")
    assert result.exit_code == code, result.output
    body = json.loads(result.stdout)
    assert body["version"] == 1
    return dict(body)


def build(root: Path, step: int, *ranks: int) -> Path:
    for rank in ranks:
        made = build_save(root, "gpt", step, {"w": np.zeros(9)}, rank=rank, world_size=2)
    return made


@pytest.mark.usefixtures("runtime_dir")
def test_a_location(tmp_path: Path) -> None:
    build(tmp_path, 10, 0, 1)
    newer = build(tmp_path, 20, 0)
    told = as_json(tmp_path)
    assert (told["run"], told["step"]) == ("gpt", 10)
    assert [(each["rank"], each["source"], each["rejected"]) for each in told["shards"]] == [
        (0, "disk", []), (1, "disk", []),
    ]  # fmt: skip
    assert told["passed_over"] == {"step 20": "records of ranks [1] are missing from disk"}
    text = explain(tmp_path).output
    assert "passed over step 20: records of ranks [1] are missing from disk" in text
    assert "gpt: step 10 of incarnation 1" in text
    (newer / "rank-00000.json").write_bytes(b"")
    for path in tmp_path.glob("gpt/*10.*/rank-00001.xxh3"):
        path.write_bytes(b"")
    told = as_json(tmp_path, code=1)
    assert told["error"]["type"] == "NoHealthyStep"
    assert any("digest table has another size" in each for each in told["error"]["actions"])
    assert as_json(tmp_path, "--step", 30, code=1)["error"]["type"] == "StepNotFound"
    assert explain(tmp_path, "--step", "x").exit_code == 2


@pytest.mark.usefixtures("runtime_dir")
def test_a_run_of_this_node(
    job: Callable[..., Job],  # noqa: F811
    ram_dir: Path,
    tmp_path: Path,
) -> None:
    """Two ranks; RAM has lost one part, disk another: the one step has a source for each."""
    for save in job(2)(lambda _, each: each.save(1, {"w": np.zeros(9)})):
        save.wait("local")
    told = as_json("run")
    for shard in told["shards"]:
        assert shard["source"] == "ram"
        assert shard["rejected"] == [{"tier": "disk", "reason": "not needed: ram comes first"}]
    (ram,), (disk,) = ram_dir.rglob("step-*"), (tmp_path / "disk").rglob("step-*")
    (ram / "rank-00001.json").unlink()
    (disk / "rank-00000.json").write_bytes(b"{}")
    told = as_json("run", code=1)
    assert [shard["source"] for shard in told["shards"]] == ["ram", "disk"]
    reasons = [{each["tier"]: each["reason"] for each in s["rejected"]} for s in told["shards"]]
    assert reasons[0]["disk"].startswith("run/")
    assert reasons[1] == {"ram": "has no record of this rank"}
    shutil.rmtree(ram)
    result = explain("run")
    assert result.exit_code == 1
    assert "rank-00000.json" in result.output


def test_nodes_that_bring_what_is_large_side_by_side_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_striped, "STRIPED_BYTES", 1)
    looked = Looked("gpt", "gpt")
    for label in ("peers-a-1-ram", "peers-b-2-ram", "store"):
        build(tmp_path / label, 10, 0, 1)
        tier = LocalTier(tmp_path / label, name=label, read_only=True)
        looked.places.append(Place(label, tier, mapped=False))
        looked.inventories[label] = _inventory.scan(tier, "gpt")
    _, shards, _ = _choose(looked, "latest")
    for shard in shards:
        assert shard.source == "peers-a-1-ram"
        assert shard.rejected == {
            "peers-b-2-ram": "brings some of it, beside peers-a-1-ram",
            "store": "not needed: peers-a-1-ram comes first",
        }
