"""Orbax's directories in and out: bit for bit, both formats, and nothing half done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mtckpt
from mtckpt import _building, _manifest, _state
from mtckpt._building import Pieced
from mtckpt._state import ArraySpec, Node
from mtckpt.cli import main
from mtckpt.errors import AlreadyExists, Damaged, TierError
from mtckpt.tiers import LocalTier

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
optax = pytest.importorskip("optax")
jnp = jax.numpy

# What Orbax and absl do on their way is theirs.
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
    pytest.mark.filterwarnings("ignore::Warning:jax"),
]


def make_tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),
        "tiny": jnp.asarray(rng.normal(size=(4,)), jnp.float8_e4m3fn),
        "a/b": jnp.asarray(rng.integers(0, 9, 2), jnp.int32),
    }
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "key": jax.random.key(seed, impl="rbg"),
        "old": jax.random.PRNGKey(seed),
        "numpy": rng.normal(size=(2, 2)),
        "list": [jnp.asarray(seed), {"x": jnp.ones(1, bool)}],
        "step": seed,
        "loss": 2.5,
        "flag": True,
        "none": None,
        "empty": {},
    }


def bits(leaf: Any) -> tuple[str, bytes]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.dtype.name, array.tobytes()


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert list(map(bits, jax.tree.leaves(one))) == list(map(bits, jax.tree.leaves(other)))


def write_orbax(path: Path, tree: Any, **options: Any) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def call(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return str(done.output)


def restored(location: Path, template: Any) -> Any:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(location, every=1)]
    with mtckpt.Checkpointer("r", tiers, timeout_s=20) as checkpointer:
        return checkpointer.restore(template).state


@pytest.mark.parametrize(
    "options",
    [
        {"use_ocdbt": True, "use_zarr3": False},
        {"use_ocdbt": False, "use_zarr3": False},
        {"use_ocdbt": True, "use_zarr3": True},
    ],
)
def test_out_of_orbax_and_back(tmp_path: Path, options: dict[str, bool]) -> None:
    tree = make_tree(3)
    write_orbax(tmp_path / "orbax", tree, **options)
    call("import", tmp_path / "orbax", tmp_path / "ck", "--run", "r", "--step", 12)
    call("verify", tmp_path / "ck", "--read-data")
    same(restored(tmp_path / "ck", make_tree(0)), tree)
    for extra in ([], ["--zarr"]):
        out = tmp_path / f"out{len(extra)}"
        call("export", tmp_path / "ck", out, *extra)
        with ocp.StandardCheckpointer() as checkpointer:
            same(checkpointer.restore(out, make_tree(0)), tree)
            plain = checkpointer.restore(out)
        assert bits(plain["params"]["tiny"]) == bits(tree["params"]["tiny"])
        assert (plain["step"], plain["loss"], plain["flag"], plain["none"]) == (3, 2.5, True, None)


def test_a_managers_steps_and_items(tmp_path: Path) -> None:
    trees = {5: make_tree(5), 9: make_tree(9)}
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        for step, tree in trees.items():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(tree), data=ocp.args.JsonSave({"at": [step, None]})
            )
            manager.save(step, args=items)
            manager.wait_until_finished()
    call("import", tmp_path / "orbax", tmp_path / "ck", "--run", "r", "--step", "all")
    assert [step.step for step in mtckpt.steps(tmp_path / "ck")] == [5, 9]
    template = {"state": make_tree(0), "data": {"at": [0, 0]}}
    found = restored(tmp_path / "ck", template)
    same(found["state"], trees[9])
    assert found["data"] == {"at": [9, None]}
    assert "is there" in call("import", tmp_path / "orbax", tmp_path / "ck", "--run", "r", code=2)
    assert "5, 9" in call(
        "import", tmp_path / "orbax", tmp_path / "ck", "--run", "s", "--step", "7", code=1
    )


def test_what_a_manager_restores(tmp_path: Path) -> None:
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "ck")], timeout_s=20) as checkpointer:
        tree = {**make_tree(1), "text": "ä", "zero": jnp.zeros((0, 3)), "pair": (1, 2)}
        checkpointer.save(1, tree, tiers="all").wait("local", timeout_s=20)
    call("export", tmp_path / "ck" / "r", tmp_path / "orbax" / "7" / "default")
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        assert manager.latest_step() == 7
        found = manager.restore(7, args=ocp.args.PyTreeRestore())
    assert (found["text"], found["pair"], found["zero"].shape) == ("ä", [1, 2], (0, 3))
    assert bits(found["params"]["w"]) == bits(tree["params"]["w"])


def test_arrays_come_in_bands_of_whole_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtckpt.adapters.jax import orbax_export, orbax_files

    monkeypatch.setattr(orbax_files, "BAND_BYTES", 100_000)
    monkeypatch.setattr(orbax_export, "BAND_BYTES", 60_000)
    rng = np.random.default_rng(7)
    tree: dict[str, Any] = {
        "w": rng.normal(size=(1000, 37)),
        "v": rng.normal(size=200_001).astype(np.float32),
    }
    write_orbax(tmp_path / "orbax", tree)
    call("import", tmp_path / "orbax", tmp_path / "ck", "--run", "r")
    call("export", tmp_path / "ck", tmp_path / "out")
    item = orbax_files.read_step(tmp_path / "out")
    for each in item.arrays:
        pieces = list(map(bytes, each.pieces()))
        assert b"".join(pieces) == tree[each.path].tobytes()
        assert max(map(len, pieces)) <= 100_000
    call("import", tmp_path / "out", tmp_path / "again", "--run", "r")
    with mtckpt.load(tmp_path / "again") as checkpoint:
        assert {path: bits(array) for path, array in checkpoint.items()} == {
            path: bits(array) for path, array in tree.items()
        }


def test_shards_of_eight_devices(tmp_path: Path) -> None:
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=devices)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("y", "x"))
    whole = np.random.default_rng(7).normal(size=(8, 16)).astype(np.float32)
    write_orbax(tmp_path / "orbax", {"w": jax.device_put(whole, sharding)})
    call("import", tmp_path / "orbax", tmp_path / "ck", "--run", "r")
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    template = {"w": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=other)}
    assert bits(restored(tmp_path / "ck", template)["w"]) == bits(whole)
    with mtckpt.Checkpointer("s", [mtckpt.Disk(tmp_path / "ck2")], timeout_s=20) as checkpointer:
        state = {"w": jax.device_put(whole, sharding)}
        checkpointer.save(1, state, tiers="all").wait("local", timeout_s=20)
    call("export", tmp_path / "ck2", tmp_path / "out")
    with ocp.StandardCheckpointer() as reader:
        assert bits(reader.restore(tmp_path / "out", template)["w"]) == bits(whole)


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_lost_chunk_is_no_zeros(tmp_path: Path) -> None:
    write_orbax(tmp_path / "orbax", {"w": jnp.ones((4, 4))}, use_ocdbt=False)
    (tmp_path / "orbax" / "w" / "0.0").unlink()
    assert "cannot be read" in call(
        "import", tmp_path / "orbax", tmp_path / "ck", "--run", "r", code=1
    )
    assert list((tmp_path / "ck").rglob("*.*")) == []
    write_orbax(tmp_path / "sound", {"w": jnp.ones((4, 4))}, use_ocdbt=False)
    call("import", tmp_path / "sound", tmp_path / "ck", "--run", "r")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda meta: meta.pop("tree_metadata"), "not what Orbax writes"),
        (lambda meta: meta["tree_metadata"].update(x=3), "not what Orbax writes"),
        (lambda meta: _first(meta)["key_metadata"][0].update(key="../w"), "out of its directory"),
        (lambda meta: _first(meta)["key_metadata"][0].update(key="v"), "cannot be opened"),
        (lambda meta: _first(meta)["value_metadata"].update(value_type="Odd"), "Odd"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, change: Any, text: str) -> None:
    write_orbax(tmp_path / "orbax", {"w": jnp.ones(2)}, use_ocdbt=False)
    path = tmp_path / "orbax" / "_METADATA"
    metadata = json.loads(path.read_bytes())
    change(metadata)
    path.write_text(json.dumps(metadata))
    done = CliRunner().invoke(
        main, ["import", str(tmp_path / "orbax"), str(tmp_path / "ck"), "--run", "r"]
    )
    assert done.exit_code in (1, 2)
    assert text in done.output


def _first(metadata: Any) -> Any:
    return next(iter(metadata["tree_metadata"].values()))


def test_what_orbax_cannot_have(tmp_path: Path) -> None:
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "ck")], timeout_s=20) as checkpointer:
        states: list[dict[str, Any]] = [
            {"raw": b"x"},
            {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)},
            {"w": jnp.ones(1)},
        ]
        for step, state in enumerate(states):
            checkpointer.save(step, state, tiers="all").wait("local", timeout_s=20)
    out = tmp_path / "out"
    assert "no bytes" in call("export", tmp_path / "ck", out, "--step", 0, code=2)
    assert "the name of a/b" in call("export", tmp_path / "ck", out, "--step", 1, code=2)
    assert not out.exists()
    out.mkdir()
    assert "is there" in call("export", tmp_path / "ck", out, "--step", 2, code=2)
    assert "no checkpoint of Orbax" in call("import", out, tmp_path / "x", "--run", "r", code=2)
    assert list(tmp_path.glob("*tmp*")) == []
    shutil.rmtree(out)
    call("export", tmp_path / "ck", out, "--step", 2)


# -- the builder -----------------------------------------------------------------------------------


def build(tmp_path: Path, pieces: list[bytes], step: int = 1, size: int = 700_000) -> LocalTier:
    tier = LocalTier(tmp_path / "tier")
    incarnation = _manifest.Incarnation(1, "r", 1, "9c44e903-efb0-4e63-9e48-9a80987f90e7")

    def made() -> Iterator[memoryview]:
        for piece in pieces:
            yield memoryview(piece)

    root = Node(_state.DICT, keys=["w"], children=[Node(_state.ARRAY, index=0)])
    array = Pieced("w", ArraySpec("uint8", (size,), "numpy"), made)
    _building.build_save(tier, incarnation, step, [array], root, [])
    return tier


@pytest.mark.parametrize("cut", [1, 4096, 262_144, 300_000, 700_000])
def test_pieces_of_any_size_make_the_same_file(tmp_path: Path, cut: int) -> None:
    data = np.random.default_rng(7).bytes(700_000) if cut > 1 else bytes(range(256)) * 4
    build(tmp_path, [data[i : i + cut] for i in range(0, len(data), cut)], size=len(data))
    with mtckpt.load(tmp_path / "tier") as checkpoint:
        assert checkpoint["w"].tobytes() == data
    with pytest.raises(AlreadyExists):
        build(tmp_path, [data], size=len(data))


@pytest.mark.parametrize("pieces", [[], [b"x" * 699_999], [b"x" * 400_000, b"x" * 400_000]])
def test_too_many_or_too_few_bytes_leave_nothing(tmp_path: Path, pieces: list[bytes]) -> None:
    with pytest.raises(Damaged, match="not as many bytes"):
        build(tmp_path, pieces)
    assert list((tmp_path / "tier").rglob("*.*")) == []


def test_a_source_that_ends_in_an_error_ends_every_writer(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "tier")
    incarnation = _manifest.Incarnation(1, "r", 1, "9c44e903-efb0-4e63-9e48-9a80987f90e7")

    def made() -> Iterator[memoryview]:
        yield memoryview(bytes(1 << 20))
        raise Damaged("a chunk is gone")

    size = 64 << 20  # more blocks than there are threads
    root = Node(_state.DICT, keys=["w"], children=[Node(_state.ARRAY, index=0)])
    array = Pieced("w", ArraySpec("uint8", (size,), "numpy"), made)
    with pytest.raises((Damaged, TierError)):
        _building.build_save(tier, incarnation, 1, [array], root, [])
    assert list((tmp_path / "tier").rglob("*.*")) == []
