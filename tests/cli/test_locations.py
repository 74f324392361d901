"""ls, show and verify on directories: no agent, nothing written, every kind of damage found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_incarnation, build_manifest, build_metrics, build_save
from click.testing import CliRunner, Result

from mtckpt.cli import main

pytestmark = pytest.mark.usefixtures("runtime_dir")


def mtckpt(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*words: object, code: int = 0) -> dict[str, Any]:
    result = mtckpt(*words, "--json")
    assert result.exit_code == code, result.output
    body = json.loads(result.stdout)
    assert body["version"] == 1
    return dict(body)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """Two ranks, three steps, the last one abandoned by a roll-back to the first."""
    root = tmp_path / "tier"
    for rank in (0, 1):
        more: dict[str, Any] = {"rank": rank, "world_size": 2}
        arrays = {"model/w": np.arange(200_000, dtype=np.float32) + rank, "b": np.array(rank)}
        build_save(root, "gpt", 10, arrays, {"epoch": 1}, metrics={"loss": 2.5}, **more)
        build_save(root, "gpt", 30, arrays, {"epoch": 3}, **more)
        save_dir = build_save(
            root,
            "gpt",
            20,
            arrays,
            {"epoch": 2, "lr": float("inf"), "key": b"x"},
            incarnation=2,
            parent=(1, 10),
            same_as={"model/tied": "model/w"},
            **more,
        )
    build_manifest(save_dir)
    build_metrics(save_dir, {"accuracy": 0.5})
    return root


def saves(tier: Path) -> dict[int, Path]:
    return {int(p.name[5:17]): p for p in (tier / "gpt").glob("step-*")}


# -- ls --------------------------------------------------------------------------------------------


def test_ls_lists_nothing_but_runs(tier: Path) -> None:
    """A place may hold much else: a directory of configuration, the rest of a bucket."""
    for name in ("ssl/certs/a.pem", "git/commit/message", "notes.txt"):
        (tier / name).parent.mkdir(parents=True, exist_ok=True)
        (tier / name).write_text("x")
    for where in (str(tier), f"file://{tier}"):
        assert [each["run"] for each in as_json("ls", where)["runs"]] == ["gpt"]
    assert as_json("ls", f"file://{tier}/ssl")["runs"] == []


def test_ls_lists_what_counts(tier: Path) -> None:
    result = mtckpt("ls", tier)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "gpt"
    assert lines[1].split() == ["step", "incarnation", "id", "tiers", "size", "state", "metrics"]
    assert [line.split()[0] for line in lines[2:]] == ["10", "20"]
    assert "loss=2.5" in lines[2]
    assert "abandoned" in mtckpt("ls", tier, "--all").output


def test_ls_as_json(tier: Path) -> None:
    body = as_json("ls", tier, "--all")
    (run,) = body["runs"]
    assert run["run"] == "gpt"
    by_step = {step["step"]: step for step in run["steps"]}
    assert sorted(by_step) == [10, 20, 30]
    assert [by_step[step]["abandoned"] for step in (10, 20, 30)] == [False, False, True]
    assert by_step[20]["metrics"] == {"accuracy": 0.5}
    assert by_step[20]["tiers"] == ["disk"]
    assert by_step[20]["size_bytes"] == sum(
        path.stat().st_size for path in saves(tier)[20].glob("*.safetensors")
    )


def test_ls_of_a_tier_with_several_runs_and_with_none(tier: Path, tmp_path: Path) -> None:
    build_save(tier, "other", 1, {"w": np.zeros(1)})
    assert [run["run"] for run in as_json("ls", tier)["runs"]] == ["gpt", "other"]
    (tmp_path / "empty").mkdir()
    assert as_json("ls", tmp_path / "empty")["runs"] == []
    assert "no runs" in mtckpt("ls", tmp_path / "empty").output


def test_a_directory_that_is_named_like_a_run_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_save(tmp_path / "checkpoints", "my run", 1, {"w": np.zeros(1)})
    (place,) = (tmp_path / "checkpoints").iterdir()
    for command, name in (("ls", "my run"), ("status", "my run"), ("show", place.name)):
        (*_, action) = as_json(command, name, code=1)["error"]["actions"]
        assert action.endswith(f": mtckpt ls ./checkpoints/{place.name}")
    (*_, action) = as_json("ls", "checkpoints", code=1)["error"]["actions"]
    assert action.endswith(": mtckpt ls ./checkpoints")


def test_ls_shows_damage_and_missing_ranks(tier: Path) -> None:
    flip(saves(tier)[10] / "rank-00001.json", 300)
    (saves(tier)[20] / "rank-00001.json").unlink()
    result = mtckpt("ls", tier)
    assert result.exit_code == 1
    assert "damaged: " in result.output
    assert "incomplete" in result.output


def test_names_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    build_save(tmp_path, "ev\x1b[2Jil", 1, {"w\x1b]0;x\x07": np.zeros(1)}, {"p\r": "\x1b[31m"})
    for command in (("ls", tmp_path), ("show", tmp_path), ("verify", tmp_path)):
        output = mtckpt(*command).output
        assert "\x1b" not in output
        assert "\r" not in output
    assert "\\x1b[2J" in mtckpt("ls", tmp_path).output


# -- show ------------------------------------------------------------------------------------------


def test_show_tells_what_is_in_a_step(tier: Path) -> None:
    output = mtckpt("show", tier).output
    assert "model/w" in output
    assert "float32" in output
    assert "same as model/w" in output
    assert "epoch" in output
    body = as_json("show", tier / "gpt", "--step", 10)
    assert (body["step"], body["incarnation"], body["num_ranks"]) == (10, 1, 2)
    assert body["plain"] == {"epoch": 1}
    assert body["arrays"][0] == {
        "path": "model/w",
        "dtype": "float32",
        "shape": [200_000],
        "size_bytes": 800_000,
        "same_as": None,
        "ranks": [0, 1],
    }
    assert as_json("show", tier, "--step", body["id"])["step"] == 10
    assert as_json("show", tier)["plain"]["lr"] == {"float": "inf"}


def test_show_of_what_is_not_there(tier: Path) -> None:
    error = as_json("show", tier, "--step", 11, code=1)["error"]
    assert error["type"] == "StepNotFound"
    assert error["details"]["step"] == 11
    result = mtckpt("show", tier, "--step", 11)
    assert result.exit_code == 1
    assert "StepNotFound: step 11 is not there" in result.stderr
    assert "Traceback" not in result.output
    build_save(tier, "other", 1, {"w": np.zeros(1)})
    assert mtckpt("show", tier).exit_code == 2


# -- verify ----------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_verify_finds_nothing_where_all_is_well(tier: Path) -> None:
    assert "all well;" in mtckpt("verify", tier).output
    assert mtckpt("verify", tier, "--read-data").output.endswith("all well, every byte\n")
    body = as_json("verify", tier, "--read-data")
    assert body["ok"]
    stored_bytes = sum(path.stat().st_size for path in tier.rglob("*.safetensors"))
    assert sum(item["checked_bytes"] for item in body["checked"]) == stored_bytes
    assert [i["step"] for i in as_json("verify", tier, "--step", 10)["checked"]] == [10]
    assert [i["step"] for i in as_json("verify", tier, "--step", "latest")["checked"]] == [20]
    assert mtckpt("verify", tier, "--step", 11).exit_code == 1


def files_of(tier: Path) -> list[Path]:
    """One file of every kind."""
    names = ("rank-00001.json", "rank-00001.xxh3", "rank-00001.safetensors", "manifest.json")
    own = next((tier / "gpt").glob("incarnation-000002.*"))
    return [own, *(saves(tier)[20] / name for name in (*names, "metrics-1.json"))]


def test_verify_finds_flips_in_every_kind_of_file(tier: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for path in files_of(tier):
        size_bytes = path.stat().st_size
        offsets = {0, 9, 45, 50, size_bytes // 2, size_bytes - 2, *rng.integers(0, size_bytes, 4)}
        for offset in sorted(int(o) for o in offsets if o < size_bytes):
            original = path.read_bytes()
            flip(path, offset, int(rng.integers(8)))
            body = as_json("verify", tier, "--read-data", code=1)
            faults = [fault for item in body["checked"] for fault in item["faults"]]
            assert any(path.name in fault["file"] for fault in faults) or (
                # A shard's header is vouched for by its table: either may be the one named.
                path.suffix in (".xxh3", ".safetensors") and faults
            ), (path.name, offset, faults)
            path.write_bytes(original)
    assert mtckpt("verify", tier, "--read-data").exit_code == 0


def test_verify_finds_cuts_growth_and_absence(tier: Path) -> None:
    for path in files_of(tier):
        original = path.read_bytes()
        for data in (
            original[:-2],  # the last byte of JSON is a newline that nobody misses
            original[: len(original) // 2],
            b"",
            original + b"\0",
        ):
            path.write_bytes(data)
            assert mtckpt("verify", tier, "--read-data").exit_code == 1, (path.name, len(data))
        path.unlink()
        # Only these may be missing: one is a cache, the others are said nowhere to exist.
        may_miss = path.name.startswith(("manifest", "metrics", "incarnation"))
        assert mtckpt("verify", tier).exit_code == (0 if may_miss else 1), path.name
        path.write_bytes(original)


def test_verify_finds_another_steps_files(tier: Path) -> None:
    for name in ("rank-00000.json", "rank-00000.xxh3", "rank-00000.safetensors", "manifest.json"):
        path = saves(tier)[20] / name
        original = path.read_bytes()
        other = saves(tier)[10] / name
        source = other if other.exists() else build_manifest(saves(tier)[10])
        path.write_bytes(source.read_bytes())
        result = mtckpt("verify", tier, "--read-data")
        # The same bytes in a shard are the same shard: the data of both steps is equal here.
        same = path.read_bytes() == original
        assert result.exit_code == (0 if same else 1), (name, result.output)
        path.write_bytes(original)


def test_verify_names_the_tensor_and_the_place(tier: Path) -> None:
    shard = saves(tier)[10] / "rank-00001.safetensors"
    flip(shard, shard.stat().st_size - 300_000)
    assert mtckpt("verify", tier).exit_code == 0  # without --read-data nobody looks there
    result = mtckpt("verify", tier, "--read-data")
    assert result.exit_code == 1
    assert "rank-00001.safetensors: bytes differ from their digest, tensor model/w" in result.output
    assert "nothing was changed" in result.output


def test_verify_mentions_what_was_set_aside(tier: Path) -> None:
    save_dir = saves(tier)[10]
    shutil.copy(save_dir / "rank-00000.json", save_dir / ".quarantine-00.damaged.rank-00000.json")
    result = mtckpt("verify", tier)
    assert result.exit_code == 0
    assert "set aside as damaged before" in result.output


def test_a_run_without_saves_has_nothing_to_verify(tmp_path: Path) -> None:
    build_incarnation(tmp_path, "gpt")
    assert mtckpt("verify", tmp_path).exit_code == 1


def test_reading_verbs_write_nothing_and_start_nothing(tier: Path, runtime_dir: Path) -> None:
    def state() -> dict[Path, tuple[int, int, int]]:
        return {
            path: (info.st_mtime_ns, info.st_ctime_ns, info.st_size)
            for path in tier.rglob("*")
            for info in [path.stat()]
        }

    before = state()
    for words in (
        ("ls", tier, "--all"),
        ("show", tier),
        ("verify", tier, "--read-data"),
        ("status",),
        ("ls",),
    ):
        assert mtckpt(*words).exit_code == 0
    assert state() == before
    assert list(runtime_dir.iterdir()) == []


# -- the command line itself -----------------------------------------------------------------------


def test_wrong_usage_is_2(tmp_path: Path) -> None:
    for words in (
        ("ls", "s3://"),
        ("show",),
        ("nothing",),
        ("ls", tmp_path / "nowhere"),
        ("verify", tmp_path, "--step", ""),
        ("rm", "a/b", "--yes"),
    ):
        assert mtckpt(*words).exit_code == 2, words


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom mtckpt.cli import main\n"
        "try:\n    main(['--help'], prog_name='mtckpt')\nexcept SystemExit:\n    pass\n"
        "heavy = ('numpy','torch','jax','asyncio','aiohttp','rich','msgspec','xxhash',"
        "'http.client')\n"
        "print('HEAVY', *(m for m in heavy if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "Usage: mtckpt" in done.stdout
    assert done.stdout.strip().endswith("HEAVY")


def test_output_to_a_closed_pipe_and_in_ascii(tier: Path) -> None:
    build_save(tier, "caf\u00e9", 1, {"w\u00fc": np.zeros(1)})
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mtckpt.cli", "ls", str(tier)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout
    shell = f"'{sys.executable}' -m mtckpt.cli show '{tier}/gpt' | true"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=30)
    assert "Traceback" not in done.stderr
