"""Checkpoints in a store read where they lie: load(), steps() and the commands, by URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_manifest, build_save
from click.testing import CliRunner
from stores import S3Server

import mtckpt
from mtckpt.cli import main
from mtckpt.errors import Damaged, StepNotFound, UsageError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

ARRAYS: dict[str, Any] = {"w": np.arange(200_000, dtype=np.float32), "b": np.array(7)}


def build_tier(root: Path) -> None:
    for step in (10, 20):
        for rank in (0, 1):
            save_dir = build_save(
                root, "gpt", step, ARRAYS, {"epoch": step}, rank=rank, world_size=2
            )
        build_manifest(save_dir)


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store that holds one run; credentials are in the environment."""
    build_tier(tmp_path / "tier")
    if request.param == "file":
        return f"file://{tmp_path}/tier"
    server: S3Server = request.getfixturevalue("s3")
    for name, value in environment_of(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{upload(server, tmp_path / 'tier')}"


def environment_of(server: S3Server) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_ENDPOINT_URL": server.url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def upload(server: S3Server, root: Path) -> str:
    """A copy made with another tool, as anybody may make one; its bucket and prefix."""
    place, client = server.new_prefix(), server.client()
    bucket, _, prefix = place.partition("/")
    for path in files(root):
        key = f"{prefix}/{path.relative_to(root).as_posix()}"
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return place


def files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def run(*words: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def test_a_store_is_read_lazily(store: str) -> None:
    for location in (store, f"{store}/gpt", f"{store}/"):
        with mtckpt.load(location) as checkpoint:
            assert (checkpoint.step, len(checkpoint)) == (20, 2)
            assert (checkpoint["w"] == ARRAYS["w"]).all()
            assert checkpoint.read("b", rank=1) == 7
            assert checkpoint.plain["epoch"] == 20
            assert store.partition("://")[2] in repr(checkpoint)
    assert [step.step for step in mtckpt.steps(store)] == [10, 20]
    name = mtckpt.steps(store)[0].id
    with mtckpt.load(store, step=name) as checkpoint:
        assert checkpoint.step == 10
    with pytest.raises(StepNotFound, match="holds no run"):
        mtckpt.load(f"{store}/nowhere")


def test_one_save_is_a_location(store: str, tmp_path: Path) -> None:
    (save_dir,) = (tmp_path / "tier" / "gpt").glob("step-000000000010*")
    with mtckpt.load(f"{store}/gpt/{save_dir.name}") as checkpoint:
        assert checkpoint.step == 10
        assert (checkpoint["w"] == ARRAYS["w"]).all()


def test_commands_work_on_urls(store: str) -> None:
    (listed,) = run("ls", store)["runs"]
    assert listed["run"] == "gpt"
    assert [step["tiers"] for step in listed["steps"]] == [["store"], ["store"]]
    shown = run("show", f"{store}/gpt", "--step", "10")
    assert (shown["step"], shown["num_ranks"]) == (10, 2)
    checked = run("verify", store, "--read-data")
    assert checked["ok"]
    assert sum(item["checked_bytes"] for item in checked["checked"]) > 4 * 800_000


def test_damage_in_a_store_is_found_and_named(tmp_path: Path) -> None:
    build_tier(tmp_path / "tier")
    store = f"file://{tmp_path}/tier"
    shard = sorted((tmp_path / "tier" / "gpt").glob("step-*/rank-00001.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with mtckpt.load(store) as checkpoint, pytest.raises(Damaged) as raised:
        checkpoint.read("w", rank=1)
    assert raised.value.details["tier"] == "store"
    faults = [
        f for item in run("verify", store, "--read-data", code=1)["checked"] for f in item["faults"]
    ]
    assert [Path(fault["file"]).name for fault in faults] == ["rank-00001.safetensors"]


def test_several_runs_are_named(tmp_path: Path) -> None:
    build_tier(tmp_path / "tier")
    build_save(tmp_path / "tier", "other", 5, ARRAYS, {})
    store = f"file://{tmp_path}/tier"
    with pytest.raises(UsageError, match="2 runs"):
        mtckpt.load(store)
    assert {listed["run"] for listed in run("ls", store)["runs"]} == {"gpt", "other"}


def test_urls_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the URL of a store"):
        mtckpt.load("s3://")
    with pytest.raises(UsageError, match="'bucket/run' is not the URL"):
        mtckpt.ObjectStore("bucket/run")
    for url in ("key:hush@bucket", "key:a/hush@bucket", "key:x@hush@bucket", "bucket?t=hush"):
        with pytest.raises(UsageError, match="more in it than a place") as raised:
            mtckpt.load(f"s3://{url}/run")
        assert "hush" not in str(raised.value)
    with pytest.raises(StepNotFound, match="holds no run"):
        mtckpt.load(f"file://{tmp_path}/nowhere")
