"""The committed checkpoints of every format version load bit for bit, in any later version too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import stored_name
from golden import make
from safetensors import safe_open

import mtckpt._manifest as _manifest
from mtckpt._dtypes import DTYPES
from mtckpt._load import load

GOLDEN = Path(__file__).resolve().parent / "golden"
V1 = GOLDEN / "v1"
# What the safetensors library can turn into NumPy arrays; the others it opens and describes.
_READ_BY_SAFETENSORS = {
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "bfloat16"),
}


def save_of(dtype: str) -> Path:
    (save_dir,) = (V1 / dtype).glob("step-*")
    return save_dir


def test_every_type_has_a_checkpoint_and_no_other_is_there() -> None:
    assert sorted(path.name for path in V1.iterdir()) == sorted(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_loads_bit_for_bit(dtype: str) -> None:
    with load(V1 / dtype) as checkpoint:
        assert checkpoint.step == make.STEP
        assert list(checkpoint) == ["whole", "scalar", "empty", "tied"]
        raw = make.pattern(dtype, 256)
        for path in ("whole", "tied"):
            assert checkpoint.dtype(path) == dtype
            assert checkpoint.shape(path) == (16, 16)
            assert checkpoint[path].tobytes() == raw
        item_bytes = DTYPES[dtype].item_bytes
        assert checkpoint["scalar"].tobytes() == make.pattern(dtype, 2)[item_bytes:]
        assert checkpoint["empty"].size == 0
        plain = dict(checkpoint.plain)
        assert np.isnan(plain.pop("nan"))
        assert plain == {key: value for key, value in make.PLAIN.items() if key != "nan"}
        assert dict(checkpoint.metrics) == {"loss": 0.5}


@pytest.mark.parametrize("dtype", DTYPES)
def test_today_would_write_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    """Not a promise to users, but a change here is a change of the format, and has to be meant."""
    made = make.make(tmp_path, dtype)
    golden = save_of(dtype)
    assert made.name == golden.name
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in golden.iterdir())
    for path in made.iterdir():
        assert path.read_bytes() == (golden / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_it(dtype: str) -> None:
    save_dir = save_of(dtype)
    record = _manifest.decode_sealed((save_dir / "rank-00000.json").read_bytes(), _manifest.Record)
    kind = DTYPES[dtype]
    with safe_open(save_dir / "rank-00000.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "mtckpt", "version": "1"}
        names = [stored_name(e) for e in record.array_entries() if e.same_as is None]
        assert sorted(file.keys()) == sorted(names)
        for entry in record.array_entries():
            if entry.same_as is None:
                described = file.get_slice(stored_name(entry))
                assert tuple(described.get_shape()) == kind.stored_shape(entry.shape)
                assert described.get_dtype() == kind.stored_code
        if kind.stored_code == "U8" or dtype in _READ_BY_SAFETENSORS:
            assert file.get_tensor("whole").tobytes() == make.pattern(dtype, 256)
