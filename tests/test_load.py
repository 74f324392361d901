"""load() and steps(): what lies in a directory, read whole, verified and leased."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_incarnation, build_metrics, build_save
from hypothesis import given
from hypothesis import strategies as st

from mtckpt import _bands, _manifest, _reading, errors
from mtckpt._load import load, steps

WEIGHT = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
PLAIN = {"epoch": 3, "optimizer/lr": 1e-3, "loader/note": "caf\u00e9"}


def save(root: Path, step: int, value: float = 0.0, **options: Any) -> Path:
    arrays = {"model/w": np.full((3, 2), value or step, np.float32)}
    return build_save(root, "run", step, arrays, {"step": step}, **options)


# -- places ----------------------------------------------------------------------------------------


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    save(tmp_path / "tier", 10)
    save(tmp_path / "tier", 20)
    return tmp_path / "tier"


def test_a_tier_a_run_and_a_save_are_all_locations(tier: Path) -> None:
    save_dir = max((tier / "run").glob("step-*"))
    for location in (tier, tier / "run", str(tier / "run"), save_dir):
        with load(location) as checkpoint:
            assert checkpoint.step == 20, location
            assert checkpoint.run == "run"
            np.testing.assert_array_equal(checkpoint["model/w"], np.full((3, 2), 20, np.float32))


def test_copies_under_any_name_are_checkpoints(tier: Path, tmp_path: Path) -> None:
    copied_run = tmp_path / "My Copy (2)"
    shutil.copytree(tier / "run", copied_run)
    copied_save = tmp_path / "best model"
    shutil.copytree(min((tier / "run").glob("step-*")), copied_save)
    with load(copied_run) as checkpoint:
        assert checkpoint.step == 20
    with load(copied_save) as checkpoint:
        assert checkpoint.step == 10
    assert [step.step for step in steps(copied_save)] == [10]


def test_a_run_whose_name_is_no_file_name_is_found_by_name(tmp_path: Path) -> None:
    build_save(tmp_path, "GPT Small!", 1, {"w": np.zeros(2, np.int8)})
    with load(tmp_path / "GPT Small!") as checkpoint:
        assert checkpoint.run == "GPT Small!"


def test_a_link_to_a_run_is_followed(tier: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tier / "run")
    with load(tmp_path / "latest") as checkpoint:
        assert checkpoint.step == 20


def test_a_directory_of_several_runs_names_them(tier: Path) -> None:
    build_save(tier, "other", 1, {"w": np.zeros(2, np.int8)})
    with pytest.raises(errors.UsageError, match="2 runs") as caught:
        load(tier)
    assert str(tier / "other") in str(caught.value)
    with pytest.raises(errors.UsageError, match="2 runs"):
        steps(tier)


def test_places_that_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(tmp_path) == []
    with pytest.raises(errors.StepNotFound, match="no run and no save"):
        load(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "seven").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    places = {"nowhere": "not exist", "seven": "name: checkpoints/seven", "file": "is a file"}
    for place, said in places.items():
        with pytest.raises(errors.UsageError, match=said):
            load(place)


@pytest.mark.root
def test_foreign_and_read_only_directories_are_readable(tier: Path) -> None:
    for directory, _, files in os.walk(tier):
        os.chown(directory, 12345, 12345)
        os.chmod(directory, 0o555)
        for file in files:
            os.chown(os.path.join(directory, file), 12345, 12345)
            os.chmod(os.path.join(directory, file), 0o444)
    before = {path: path.stat().st_mtime_ns for path in tier.rglob("*")}
    with load(tier) as checkpoint:
        assert checkpoint["model/w"].shape == (3, 2)
    assert {path: path.stat().st_mtime_ns for path in tier.rglob("*")} == before


# -- which step ------------------------------------------------------------------------------------


def test_a_rolled_back_branch_is_not_the_latest(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        save(tmp_path, step, incarnation=1)
    save(tmp_path, 12, 99, incarnation=2, parent=(1, 10))
    save(tmp_path, 10, 77, incarnation=2, parent=(1, 10))
    assert load(tmp_path).step == 12
    assert load(tmp_path, step=20)["model/w"][0, 0] == 20
    assert load(tmp_path, step=10).incarnation == 2
    listed = {(s.incarnation, s.step): s.abandoned for s in steps(tmp_path)}
    assert listed == {
        (1, 5): False,
        (1, 10): False,
        (1, 20): True,
        (2, 10): False,
        (2, 12): False,
    }


def test_without_incarnation_files_the_newest_incarnation_wins(tmp_path: Path) -> None:
    save(tmp_path, 20, incarnation=1)
    save(tmp_path, 12, incarnation=2)
    for path in (tmp_path / "run").glob("incarnation-*"):
        path.unlink()
    assert load(tmp_path).step == 12
    assert load(tmp_path, step=20).incarnation == 1


@pytest.mark.parametrize("lost", [(1,), (2,), (3,), (2, 3), (1, 2, 3)])
def test_lost_incarnation_files_hide_no_step_and_bring_no_branch_back(
    tmp_path: Path, lost: tuple[int, ...]
) -> None:
    """The second start went back to step 10, the third went on from step 13."""
    for step in (10, 20):
        save(tmp_path, step, incarnation=1)
    for step in (11, 13):
        save(tmp_path, step, incarnation=2, parent=(1, 10))
    save(tmp_path, 14, incarnation=3, parent=(2, 13))
    for number in lost:
        (path,) = (tmp_path / "run").glob(f"incarnation-{number:06d}*")
        path.unlink()
    assert load(tmp_path).step == 14
    listed = {(s.incarnation, s.step): s.abandoned for s in steps(tmp_path)}
    assert listed == {
        (1, 10): False,
        (1, 20): True,
        (2, 11): False,
        (2, 13): False,
        (3, 14): False,
    }


def test_an_incarnation_that_saved_nothing_falls_back_to_its_parent(tmp_path: Path) -> None:
    save(tmp_path, 20, incarnation=1)
    build_incarnation(tmp_path, "run", 2, parent=(1, 20))
    assert load(tmp_path).step == 20


def test_a_save_is_found_by_its_id(tier: Path) -> None:
    for step in steps(tier):
        for text in (step.id, step.id.replace("-", "")[:12], step.id.upper()):
            assert load(tier, step=text).step == step.step
    assert load(tier, step=min((tier / "run").glob("step-*")).name).step == 10
    for text in ("best", "", "../..", "12345", "0" * 12):
        with pytest.raises(errors.StepNotFound):
            load(tier, step=text)


def test_a_step_that_is_not_there_names_those_that_are(tier: Path) -> None:
    with pytest.raises(errors.StepNotFound, match="10, 20") as caught:
        load(tier, step=15)
    assert caught.value.step == 15  # type: ignore[attr-defined]


def test_missing_ranks_are_named_for_every_step(tmp_path: Path) -> None:
    for rank in (0, 2):
        save(tmp_path, 10, rank=rank, world_size=4)
    save(tmp_path, 20, rank=1, world_size=2)
    with pytest.raises(errors.NoHealthyStep) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "step 10 (incarnation 1): records of 2 of 4 ranks are missing: 1, 3" in text
    assert "step 20 (incarnation 1): records of 1 of 2 ranks are missing: 0" in text
    with pytest.raises(errors.NoHealthyStep, match="step 10"):
        load(tmp_path, step=10)


def test_a_newer_step_that_does_not_open_is_passed_over_and_named(
    tier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = next((tier / "run").glob("step-000000000020.*/rank-00000.xxh3"))
    flip(table, 20)
    with load(tier) as checkpoint:
        assert checkpoint.step == 10
        assert "step 20" in checkpoint.skipped[0]
    assert "step 20" in caplog.text
    with pytest.raises(errors.NoHealthyStep, match="digest table"):
        load(tier, step=20)


def test_a_save_called_off_is_offered_by_name_only(tmp_path: Path) -> None:
    save(tmp_path, 10)
    name = save(tmp_path, 20, aborted="rank 3 had no slot").name
    assert load(tmp_path).step == 10
    with pytest.raises(errors.StepNotFound):
        load(tmp_path, step=20)
    assert load(tmp_path, step=name).step == 20


# -- arrays ----------------------------------------------------------------------------------------


def test_mapping_plain_and_tree(tmp_path: Path) -> None:
    arrays = {"model/w": WEIGHT, "model/b": np.array(2.5), "odd%2Fname/e": np.zeros((0, 4))}
    save_dir = build_save(
        tmp_path, "run", 1, arrays, PLAIN, same_as={"model/tied": "model/w"}, metrics={"loss": 2.0}
    )
    build_metrics(save_dir, {"accuracy": 0.5})
    with load(tmp_path) as checkpoint:
        assert list(checkpoint) == [*arrays, "model/tied"]
        assert len(checkpoint) == 4
        assert "model/w" in checkpoint
        assert "model/x" not in checkpoint
        for path, said in (("model/x", "no array has"), ("model", "such as model/w")):
            with pytest.raises(KeyError, match=said):
                checkpoint[path]
        for path, array in arrays.items():
            np.testing.assert_array_equal(checkpoint[path], array)
            assert checkpoint.shape(path) == array.shape
            assert checkpoint.dtype(path) == array.dtype.name
        np.testing.assert_array_equal(checkpoint["model/tied"], WEIGHT)
        assert dict(checkpoint.plain) == PLAIN
        assert dict(checkpoint.metrics) == {"loss": 2.0, "accuracy": 0.5}
        tree = checkpoint.tree()
        assert tree["epoch"] == 3
        assert tree["odd/name"]["e"].shape == (0, 4)
        assert tree["model"]["tied"] is tree["model"]["w"]
        checkpoint["model/w"][:] = 0  # its own memory: the next reader sees the file
        np.testing.assert_array_equal(checkpoint["model/w"], WEIGHT)
    with pytest.raises(errors.UsageError, match="closed"):
        checkpoint["model/w"]


@given(data=st.data())
def test_boxes_of_all_ranks_join_into_the_whole_array(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape
    ]
    whole = np.arange(shape[0] * shape[1], dtype=np.int16).reshape(shape)
    boxes = [
        ((a, c), whole[a:b, c:d])
        for a, b in zip(cuts[0], cuts[0][1:], strict=False)
        for c, d in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    copies = data.draw(st.integers(1, 2))
    root = tmp_path_factory.mktemp("boxes")
    ranks = boxes * copies
    for rank, (offsets, box) in enumerate(ranks):
        build_save(
            root,
            "run",
            1,
            {"w": box, "own": np.array([rank])},
            {"rank": rank},
            rank=rank,
            world_size=len(ranks),
            boxes={"w": (offsets, shape)},
        )
    with load(root) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"], whole)
        assert checkpoint.shape("w") == shape
        assert checkpoint["own"] == [0]
        last = len(ranks) - 1
        assert checkpoint.read("own", rank=last) == [last]
        assert checkpoint.tree(rank=last)["rank"] == last
        assert checkpoint.ranks("w") == tuple(range(len(ranks)))
    shutil.rmtree(root)


def test_boxes_with_a_hole_are_damage(tmp_path: Path) -> None:
    for rank, offset in enumerate((0, 3)):
        build_save(
            tmp_path,
            "run",
            1,
            {"w": np.zeros(2, np.int8)},
            rank=rank,
            world_size=2,
            boxes={"w": ((offset,), (5,))},
        )
    with load(tmp_path) as checkpoint, pytest.raises(errors.Damaged, match="whole array"):
        checkpoint["w"]


@pytest.mark.parametrize(
    ("boxes", "whole", "covered"),
    [
        ([((0,), (4,))], (4,), True),
        ([((0,), (3,)), ((2,), (2,))], (4,), True),
        ([((0,), (2,)), ((0,), (2,))], (4,), False),
        ([((0, 0), (2, 1)), ((0, 1), (1, 1))], (2, 2), False),
        ([((), ())], (), True),
        ([], (0, 5), True),
        ([], (1,), False),
    ],
)
def test_covers(boxes: Any, whole: Any, covered: bool) -> None:
    assert _bands._covers(boxes, whole) is covered


def test_other_frameworks_have_the_same_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    build_save(tmp_path, "run", 1, {"w": WEIGHT, "d": np.zeros(2)})
    tensor = load(tmp_path, framework="torch")["w"]
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    with load(tmp_path, framework="jax") as checkpoint:
        assert isinstance(checkpoint["w"], jax.Array)
        np.testing.assert_array_equal(np.asarray(checkpoint["w"]), WEIGHT)
        with pytest.raises(errors.UnsupportedState, match="narrow float64"):
            checkpoint["d"]
    with pytest.raises(errors.UsageError, match="framework"):
        load(tmp_path, framework="tensorflow")  # type: ignore[arg-type]


def test_loading_imports_no_framework_and_little_at_first() -> None:
    program = (
        "import sys, mtckpt._load; print(*(m for m in"
        " ('numpy','torch','jax','asyncio','aiohttp','rich','click') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == ""


# -- damage and leases -----------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_byte_is_never_handed_out(tmp_path: Path) -> None:
    save_dir = build_save(tmp_path, "run", 1, {"w": WEIGHT, "x": np.arange(5)})
    shard = save_dir / "rank-00000.safetensors"
    flip(shard, shard.stat().st_size - 2_000_000)
    with load(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"], np.arange(5))
        with pytest.raises(errors.Damaged) as caught:
            checkpoint["w"]
    facts = caught.value.details
    assert facts["tensor"] == "w"
    assert str(facts["key"]).endswith("rank-00000.safetensors")
    assert facts["chunk"] == (4_000_000 - 2_000_000) // (256 * 1024)


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    save_dir = build_save(tmp_path, "run", 1, {"w": WEIGHT})
    with load(tmp_path) as checkpoint:
        os.truncate(save_dir / "rank-00000.safetensors", 8192)
        with pytest.raises(errors.ShortRead, match="ends early"):
            checkpoint["w"]


def test_shards_are_leased_until_closed_or_forgotten(tier: Path) -> None:
    shard = max((tier / "run").glob("step-*")) / "rank-00000.safetensors"

    def is_leased() -> bool:
        with shard.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    checkpoint = load(tier)
    assert is_leased()
    array = checkpoint["model/w"]
    checkpoint.close()
    assert not is_leased()
    assert array[0, 0] == 20
    checkpoint = load(tier)
    assert is_leased()
    del checkpoint
    gc.collect()
    assert not is_leased()


def test_what_is_deleted_meanwhile_stays_readable(tier: Path) -> None:
    with load(tier) as checkpoint:
        shutil.rmtree(tier)
        assert checkpoint["model/w"][0, 0] == 20


def test_a_save_that_is_recycled_while_it_is_opened_is_looked_for_again(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _reading.open_shard
    newest = max((tier / "run").glob("step-*"))

    def recycle_first(*arguments: Any) -> Any:
        monkeypatch.setattr(_reading, "open_shard", opened)
        (newest / "rank-00000.json").unlink()
        (newest / "rank-00000.safetensors").unlink()
        save(tier, 30)
        return opened(*arguments)

    monkeypatch.setattr(_reading, "open_shard", recycle_first)
    with load(tier) as checkpoint:
        assert checkpoint.step == 30


@pytest.mark.usefixtures("runtime_dir")
def test_a_reader_parked_in_ram_for_ten_saves_sees_its_bytes_unchanged() -> None:
    import mtckpt
    from mtckpt.agent.protocol import ram_base

    state = {"w": np.zeros(500_000, np.float32)}
    with mtckpt.Checkpointer("parked", tiers=[mtckpt.Ram(every=1, slots=3)]) as checkpointer:
        checkpointer.restore(state)
        state["w"][:] = 1
        checkpointer.save(1, state).wait("staged", timeout_s=30)
        with load(ram_base(), step=1) as checkpoint:
            for step in range(2, 12):
                state["w"][:] = step
                checkpointer.save(step, state).wait("staged", timeout_s=30)
            assert (checkpoint["w"] == 1).all()
            assert load(ram_base()).step == 11
        for step in range(12, 16):  # the slot is given back, so it is used again
            checkpointer.save(step, state).wait("staged", timeout_s=30)
        assert 1 not in [found.step for found in steps(ram_base())]


def test_names_in_a_checkpoint_never_become_paths(tmp_path: Path) -> None:
    names = ["../../etc/passwd", "/abs", "a\x00b", "\n", "@", "."]
    tier = tmp_path / "tier"
    build_save(tier, "run", 1, {name: np.array([i]) for i, name in enumerate(names)})
    with load(tier) as checkpoint:
        assert [checkpoint[name][0] for name in names] == list(range(len(names)))
    assert {path.name for path in tmp_path.iterdir()} == {"tier"}


def test_a_record_that_lies_about_a_leaf_is_damage(tmp_path: Path) -> None:
    for path, dtypes in (("a", {"w": "int32"}), ("b", {"w": "int64"})):
        build_save(tmp_path / path, "run", 1, {"w": np.zeros(4, dtypes["w"])}, dtypes=dtypes)
    liar = next((tmp_path / "a" / "run").glob("step-*"))
    other = next((tmp_path / "b" / "run").glob("step-*"))
    shutil.copy(other / "rank-00000.json", liar / "rank-00000.json")
    with pytest.raises(errors.NoHealthyStep):
        load(tmp_path / "a")


def test_a_later_version_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(_manifest, "FORMAT_VERSION", 2)
        save(tmp_path, 1)
    with pytest.raises(errors.NoHealthyStep, match="later version"):
        load(tmp_path, step=1)


# -- steps -----------------------------------------------------------------------------------------


def test_steps_tell_size_metrics_tier_and_damage(tier: Path) -> None:
    save_dir = save(tier, 30, metrics={"loss": 1.5})
    bad = save(tier, 40)
    flip(bad / "rank-00000.json", 200)
    first, _, third, fourth = steps(tier)
    assert (first.tiers, first.stages, first.damaged) == (("disk",), ("local",), ())
    assert third.metrics == {"loss": 1.5}
    assert third.size_bytes == (save_dir / "rank-00000.safetensors").stat().st_size
    assert fourth.tiers == ()
    assert "rank-00000.json" in fourth.damaged[0]


def test_a_tier_on_tmpfs_is_called_ram(ram_dir: Path) -> None:
    if not str(ram_dir).startswith("/dev/shm"):
        pytest.skip("no tmpfs")
    save(ram_dir, 1)
    assert steps(ram_dir)[0].tiers == ("ram",)
