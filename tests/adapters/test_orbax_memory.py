"""Arrays larger than what is in memory at a time: out of Orbax's directories and into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import build_save
from click.testing import CliRunner

import mtckpt
from mtckpt.cli import main

pytest.importorskip("jax")
tensorstore = pytest.importorskip("tensorstore")

from mtckpt.adapters.jax import orbax_export, orbax_files  # noqa: E402 - they need TensorStore

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

MIB = 1024 * 1024
# A band, one that TensorStore makes of it, and what it and the tier have under way.
MOST_BYTES = 5 * orbax_export.BAND_BYTES
# Each line of the input is a command line; what is said of it is how much memory it took.
_RUN = """
import json, sys
from pathlib import Path
from mtckpt.cli import main
def peak_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
for line in sys.stdin:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    main(json.loads(line), standalone_mode=False)
    print(peak_bytes() - before)
"""


def peaks_bytes(*commands: Sequence[object]) -> list[int]:
    """The most memory that each of some command lines took, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input="".join(json.dumps(list(map(str, each))) + "\n" for each in commands),
        capture_output=True,
        text=True,
        timeout=80,
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            # What was freed is no memory that is taken: it goes back at once.
            "MALLOC_MMAP_THRESHOLD_": str(MIB),
            "MALLOC_ARENA_MAX": "2",
        },
    )
    return [int(line) for line in done.stdout.splitlines() if line.isdecimal()]


def rows(count: int) -> np.ndarray[Any, Any]:
    """Rows of 64 KiB that differ and cost no time."""
    line = np.arange(16 * 1024, dtype=np.float32)
    return np.add.outer(np.arange(count, dtype=np.float32), line)


def write_chunks(path: Path, whole: np.ndarray[Any, Any], chunks: list[int]) -> None:
    """What Orbax writes for an array of these chunks, one for each part of a device."""
    orbax_export.write(
        path,
        *tree_of(),
        [orbax_export.Leaf("float32", "jax", whole.shape, lambda _: pieces(whole, chunks))],
        ocdbt=False,
    )


def tree_of() -> tuple[Any, list[Any]]:
    from mtckpt import _state
    from mtckpt._state import Node

    return Node(_state.DICT, keys=["w"], children=[Node(_state.ARRAY, index=0)]), []


def pieces(whole: Any, chunks: list[int]) -> Iterator[tuple[tuple[int, ...], Any]]:
    for first in range(0, whole.shape[0], chunks[0]):
        for left in range(0, whole.shape[1], chunks[1]):
            yield (first, left), whole[first : first + chunks[0], left : left + chunks[1]]


def test_no_whole_array_is_in_memory(tmp_path: Path) -> None:
    whole = rows(3 * 1024)
    assert whole.nbytes == 192 * MIB
    for name in ("first", "large"):  # the first ones load what they need
        write_chunks(tmp_path / name, whole[:2] if name == "first" else whole, [1536, 1024])
    first, tier, out, again = (tmp_path / name for name in ("1", "2", "3", "4"))
    _, _, brought, taken = peaks_bytes(
        ("import", tmp_path / "first", first, "--run", "r"),
        ("export", first, again),
        ("import", tmp_path / "large", tier, "--run", "r"),
        ("export", tier, out),
    )
    assert MIB < brought < MOST_BYTES
    assert MIB < taken < MOST_BYTES
    assert whole.nbytes > MOST_BYTES
    with mtckpt.load(tier) as checkpoint:
        assert np.array_equal(checkpoint["w"], whole)
    item = orbax_files.read_step(out)
    assert b"".join(item.arrays[0].pieces()) == whole.tobytes()


def test_strips_of_wide_chunks_are_boxes_of_one_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax_files, "BAND_BYTES", 40_000)
    whole = np.random.default_rng(7).normal(size=(203, 120)).astype(np.float32)
    write_chunks(tmp_path / "orbax", whole, [100, 30])
    item = orbax_files.read_step(tmp_path / "orbax")
    assert [array.spec.shape for array in item.arrays] == [(203, 90), (203, 30)]
    assert max(len(piece) for array in item.arrays for piece in array.pieces()) <= 40_000
    done = CliRunner().invoke(
        main, ["import", str(tmp_path / "orbax"), str(tmp_path / "ck"), "--run", "r"]
    )
    assert (done.exit_code, done.output) == (0, f"step 0: 1 arrays, {_size(tmp_path):,} bytes\n")
    with mtckpt.load(tmp_path / "ck") as checkpoint:
        assert np.array_equal(checkpoint["w"], whole)
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "ck")], timeout_s=20) as checkpointer:
        template = {"w": np.zeros_like(whole)}
        assert checkpointer.restore(template)
        assert np.array_equal(template["w"], whole)


def _size(tmp_path: Path) -> int:
    (shard,) = (tmp_path / "ck").rglob("*.safetensors")
    return shard.stat().st_size


@pytest.mark.parametrize(
    ("shape", "max_bytes"),
    [
        *(((), 1), ((0, 3), 1), ((5,), 1), ((5,), 7), ((5,), 4096)),
        *(((37, 6, 401), 700), ((37, 6, 401), 4096), ((37, 6, 401), 10**9)),
        *(((3, 2, 90_001), 4097), ((3, 2, 90_001), 300_000), ((3, 2, 90_001), 10**9)),
    ],
)
def test_bands_of_any_size_are_the_array(
    tmp_path: Path, shape: tuple[int, ...], max_bytes: int
) -> None:
    whole = np.random.default_rng(7).integers(0, 99, shape).astype(np.int16)
    build_save(tmp_path, "run", 1, {"w": whole})
    with mtckpt.load(tmp_path) as checkpoint:
        _same(checkpoint, whole, max_bytes)


@pytest.mark.parametrize("max_bytes", [500, 4096, 10**9])
@pytest.mark.parametrize("cuts", [(10, 7), (90, 500), (37, 250)])
def test_bands_are_joined_from_the_boxes_of_all_ranks(
    tmp_path: Path, cuts: tuple[int, int], max_bytes: int
) -> None:
    whole = np.random.default_rng(7).integers(0, 99, (90, 500)).astype(np.int64)
    marks = [[*range(0, n, cut), n] for n, cut in zip(whole.shape, cuts, strict=True)]
    boxes = [
        ((a, c), whole[a:b, c:d])
        for a, b in zip(marks[0], marks[0][1:], strict=False)
        for c, d in zip(marks[1], marks[1][1:], strict=False)
    ][:: 1 if cuts[0] > 10 else -1]
    if len(boxes) > 20:
        boxes = [((0, 0), whole[:, :250]), ((0, 200), whole[:, 200:])]  # which overlap
    for rank, (offsets, box) in enumerate(boxes):
        build_save(
            tmp_path,
            "run",
            1,
            {"w": box},
            rank=rank,
            world_size=len(boxes),
            boxes={"w": (offsets, whole.shape)},
        )
    with mtckpt.load(tmp_path) as checkpoint:
        _same(checkpoint, whole, max_bytes)


def _same(checkpoint: Any, whole: np.ndarray[Any, Any], max_bytes: int) -> None:
    found = np.zeros_like(whole)
    sizes = []
    for offsets, band in checkpoint._read_bands("w", max_bytes):
        found[tuple(slice(o, o + n) for o, n in zip(offsets, band.shape, strict=True))] = band
        sizes.append(band.nbytes)
    assert np.array_equal(found, whole)
    assert max(sizes) <= max(max_bytes, whole.itemsize)
    assert sum(sizes) == whole.nbytes


def test_a_damaged_chunk_is_found_in_its_band(tmp_path: Path) -> None:
    save_dir = build_save(tmp_path, "run", 1, {"w": np.arange(200_000)})
    (shard,) = save_dir.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with mtckpt.load(tmp_path) as checkpoint:
        seen = 0
        with pytest.raises(mtckpt.errors.Damaged, match="digest"):
            for _, band in checkpoint._read_bands("w", 100_000):
                seen += band.size
        assert 0 < seen < 200_000
