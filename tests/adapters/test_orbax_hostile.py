"""Orbax's directories that lie: an error of ours, bounded memory, and no wait without an end."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtckpt.errors import CheckpointError, Damaged, FormatError

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")

from mtckpt.adapters.jax import orbax_files  # noqa: E402 - it needs TensorStore, which Orbax brings

pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
    pytest.mark.filterwarnings("ignore::Warning:jax"),
]
OPTIONS: dict[str, dict[str, bool]] = {
    "ocdbt": {"use_ocdbt": True},
    "zarr2": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def write(path: Path, tree: Any, kind: str) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**OPTIONS[kind])) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orbax")
    tree = {"w": np.arange(30.0).reshape(6, 5), "n": 2.5, "text": "hello", "l": [{"x": np.ones(2)}]}
    for kind in OPTIONS:
        write(path / kind, tree, kind)
    return path


def copied(written: Path, kind: str, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(written / kind, target))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def deep(metadata: Any) -> None:
    (first, *_) = metadata["tree_metadata"].values()
    first["key_metadata"] = [{"key": "a", "key_type": 2}] * 20_000


def no_text(metadata: Any) -> None:
    (first, *_) = metadata["tree_metadata"].values()
    first["key_metadata"][0]["key"] = "\ud800"


def huge(array: Any) -> None:
    array.update(shape=[10**6, 10**6], chunks=[10**6, 10**6])


@pytest.mark.parametrize(
    ("kind", "file", "change", "error"),
    [
        ("ocdbt", "_METADATA", deep, FormatError),
        ("ocdbt", "_METADATA", no_text, FormatError),
        ("zarr2", "_strings.json", lambda _: ["x"], FormatError),
        ("zarr2", "_strings.json", lambda _: {"text": 5}, FormatError),
        ("zarr2", "_strings.json", lambda _: {"text": "\ud800"}, FormatError),
        # A few bytes claim terabytes; TensorStore would end this process.
        ("zarr2", "w/.zarray", huge, FormatError),
        ("zarr2", "n/.zarray", lambda a: a.update(shape=[10**12], chunks=[10**12]), Damaged),
    ],
)
def test_what_metadata_claims_is_looked_at_first(
    written: Path, tmp_path: Path, kind: str, file: str, change: Any, error: type[Exception]
) -> None:
    path = copied(written, kind, tmp_path / "c")
    change_json(path / file, change)
    with pytest.raises(error):
        orbax_files.read_step(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_no_pipe_is_waited_for_and_no_link_followed(
    written: Path, tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    path = copied(written, "ocdbt", tmp_path / "c")
    shutil.rmtree(path / "array_metadatas", ignore_errors=True)
    (path / "array_metadatas").mkdir()
    make(path / "array_metadatas" / "process_0")
    with pytest.raises(FormatError):
        orbax_files.read_step(path)


@pytest.mark.parametrize("shape", [(1, 40_000), (1, 1, 40_000), (3, 1, 20_000), (40_000,)])
def test_an_array_is_cut_where_its_chunks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    import tensorstore

    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/w/"},
            "metadata": {
                "shape": list(shape),
                "chunks": [*[1] * (len(shape) - 1), 2000],
                "dtype": "<f4",
            },
        },
        create=True,
    ).result()
    store.write(whole).result()
    monkeypatch.setattr(orbax_files, "BAND_BYTES", 16_000)
    (strip,) = orbax_files._strips(store)
    pieces = list(map(bytes, orbax_files._bands(store, strip)))
    assert b"".join(pieces) == whole.tobytes()
    assert max(map(len, pieces)) <= 16_000


def test_a_chunk_larger_than_memory_is_an_error(written: Path, tmp_path: Path) -> None:
    """TensorStore unpacks it whole, whatever its array has of it, and ends the process."""
    path = copied(written, "zarr2", tmp_path / "c")
    change_json(path / "w" / ".zarray", lambda value: {**value, "chunks": [6, 10**12]})
    with pytest.raises(FormatError, match="bytes of memory at a time"):
        for array in orbax_files.read_step(path).arrays:
            list(array.pieces())


def test_changed_files_are_an_error_or_another_value(
    written: Path, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    for turn in range(30):
        path = copied(written, (*OPTIONS,)[turn % 3], tmp_path / "c")
        file = chance.choice(sorted(each for each in path.rglob("*") if each.is_file()))
        change(file, chance)
        try:
            for array in orbax_files.read_step(path).arrays:
                if array.spec.size_bytes < 1 << 26:
                    assert sum(map(len, array.pieces())) == array.spec.size_bytes
        except CheckpointError:
            pass  # as it should be


def change(file: Path, chance: random.Random) -> None:
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        data = bytearray(file.read_bytes())
        for _ in range(3 if data else 0):
            data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(data)
        return
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            places.append((inside, key))
            if isinstance(inside[key], (dict, list)):
                walk(inside[key])

    walk(value)
    new: Any = chance.choice(
        [None, [], {}, 0, -1, 10**12, 10**30, 1e300, "x", "../..", "\ud800", True]
    )
    if places:
        inside, key = chance.choice(places)
        inside[key] = new
    file.write_text(json.dumps(value if places else new))
