"""Directories of PyTorch's distributed checkpoint in and out, and pickles that want something."""

from __future__ import annotations

import copyreg
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mtckpt
from mtckpt.adapters import dcp_files, dcp_stand_ins
from mtckpt.cli import main
from mtckpt.errors import CheckpointError, Damaged, FormatError, UnsupportedState

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

pytestmark = [
    pytest.mark.usefixtures("runtime_dir"),
    # DCP says in each call that there are no other ranks.
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
]


def state_of(fill: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((300, 7), fill), "b": torch.arange(7)},
        "turned": torch.arange(24.0).reshape(4, 6).t(),
        "scalar": torch.tensor(fill),
        "empty": torch.zeros(0, 3),
        "half": torch.full((5,), fill, dtype=torch.bfloat16),
        "eighth": torch.full((5,), fill).to(torch.float8_e4m3fn),
        "complex": torch.full((2,), fill, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "list": [1, 2.5, "a", None, True, 2**80, float("inf")],
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": torch.tensor(0.2)}],
        "pair": (fill, torch.full((2, 2), fill)),
        "bytes": bytes(range(256)),
        "numpy": np.arange(5, dtype=np.uint32),
        "number": np.float64(1.5),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DCP wrote."""
    path = tmp_path_factory.mktemp("dcp") / "step-7"
    dcp.save(state_of(3), checkpoint_id=path)
    return path


def bits(value: Any) -> Any:
    """A value that compares equal when every bit is."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), bytes(data.numpy()))
    if isinstance(value, (np.ndarray, np.generic)):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(bits, value))
    return value


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_in_and_out_again_it_is_the_same(written: Path, tmp_path: Path) -> None:
    done = invoke("import", written.parent, tmp_path / "ck", "--run=r", "--unpickle", "--json")
    assert done.exit_code == 0, done.output
    assert [step["step"] for step in json.loads(done.output)["steps"]] == [7]
    with mtckpt.load(tmp_path / "ck" / "r", framework="torch") as checkpoint:
        tree = checkpoint.tree()
    for name in ("numpy", "number"):
        tree[name] = tree[name].numpy()
    assert bits(tree) == bits(state_of(3))
    with mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "ck")]) as checkpointer:
        live = state_of(0)
        assert checkpointer.restore(live).next_step == 8
        assert bits(live) == bits(state_of(3))

    done = invoke("export", tmp_path / "ck" / "r", tmp_path / "out", "--to=dcp")
    assert done.exit_code == 0, done.output
    found = state_of(0)
    dcp.load(found, checkpoint_id=tmp_path / "out")
    assert bits(found) == bits(state_of(3))
    assert invoke("export", tmp_path / "ck" / "r", tmp_path / "out", "--to=dcp").exit_code == 2


def test_an_export_is_written_in_bands(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtckpt.adapters.torch import dcp_export

    monkeypatch.setattr(dcp_export, "BAND_BYTES", 40)
    invoke("import", written, tmp_path / "ck", "--run=r", "--unpickle")
    done = invoke("export", tmp_path / "ck" / "r", tmp_path / "out", "--to=dcp", "--json")
    assert done.exit_code == 0, done.output
    told = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    chunks = {name: each.chunks for name, each in told.items() if hasattr(each, "chunks")}
    assert max(math.prod(chunk.sizes) for chunk in chunks["model.w"]) <= 10
    assert max(map(len, chunks.values())) > 3
    assert (
        sum(
            told[name].properties.dtype.itemsize * math.prod(chunk.sizes)
            for name in chunks
            for chunk in chunks[name]
        )
        == json.loads(done.output)["size_bytes"]
    )
    found = state_of(0)
    dcp.load(found, checkpoint_id=tmp_path / "out")
    assert bits(found) == bits(state_of(3))


def test_pickles_are_read_only_when_that_was_said(written: Path, tmp_path: Path) -> None:
    done = invoke("import", written, tmp_path / "ck", "--run=r")
    assert done.exit_code == 2
    assert "--unpickle" in done.output
    assert not (tmp_path / "ck").exists()


def test_what_pytorch_writes_without_metadata_of_the_whole_is_named(tmp_path: Path) -> None:
    for name, text in (
        ("__0.metadata", "use_collectives=False"),
        ("model-00001-of-00001.safetensors", "HuggingFaceStorageWriter"),
    ):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(b"x")
        done = invoke("import", tmp_path / "in", tmp_path / "ck", "--run=r", "--unpickle")
        assert (done.exit_code, text in done.output) == (2, True)
        shutil.rmtree(tmp_path / "in")


def test_an_array_comes_in_bands(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_files, "BAND_BYTES", 100)
    item = dcp_files.read_step(written)
    wanted = {"model/w": state_of(3)["model"]["w"], "turned": state_of(3)["turned"]}
    for array in item.arrays:
        pieces = [bytes(piece) for piece in array.pieces()]
        assert sum(map(len, pieces)) == array.spec.size_bytes
        assert max(map(len, pieces), default=0) <= 100
        if array.path in wanted:
            assert b"".join(pieces) == bits(wanted[array.path])[2]


@pytest.mark.parametrize(
    ("shape", "most"),
    [((1, 1000), 30), ((2, 3, 7), 10), ((2, 3, 7), 7), ((2, 3, 7), 1), ((5,), 2), ((1, 1, 9), 4)],
)
def test_an_array_is_cut_wherever_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], most: int
) -> None:
    wanted = torch.arange(float(np.prod(shape))).reshape(shape)
    dcp.save({"w": wanted, "turned": wanted.t() if len(shape) == 2 else 0}, checkpoint_id=tmp_path)
    monkeypatch.setattr(dcp_files, "BAND_BYTES", 4 * most)
    for array in dcp_files.read_step(tmp_path).arrays:
        pieces = [bytes(piece) for piece in array.pieces()]
        assert max(map(len, pieces)) <= 4 * most
        assert len(pieces) <= 2 * -(-wanted.numel() // most)
        whole = wanted if array.path == "w" else wanted.t()
        assert b"".join(pieces) == bits(whole)[2]


def test_blocks_are_few_and_in_order() -> None:
    for shape in ((4, 6, 5), (1, 6, 1, 5), (120,)):
        seen = np.zeros(shape, int)
        last = -1
        for first, sizes in dcp_files._blocks(shape, 12):
            at = tuple(slice(f, f + n) for f, n in zip(first, sizes, strict=True))
            index = int(np.ravel_multi_index(first, shape))
            assert index > last
            last = index
            seen[at] += 1
            assert np.prod(sizes) <= 12
        assert (seen == 1).all()


def test_a_file_that_changes_after_it_was_looked_at_is_an_error(
    written: Path, tmp_path: Path
) -> None:
    for change in ("link", "short"):
        shutil.copytree(written, tmp_path / "c")
        item = dcp_files.read_step(tmp_path / "c")
        file = tmp_path / "c" / "__0_0.distcp"
        if change == "link":
            file.rename(tmp_path / "moved")
            file.symlink_to(tmp_path / "moved")
        else:
            os.truncate(file, 10)
        (array,) = (each for each in item.arrays if each.path == "model/w")
        with pytest.raises(Damaged):
            list(array.pieces())
        shutil.rmtree(tmp_path / "c")


# -- pickles that want something ------------------------------------------------------------------


class Calling:
    """Pickles into a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    mark = tmp_path / "mark"
    yield Calling(os.system, f"touch {mark}"), "posix.system"
    yield Calling(eval, f"open({str(mark)!r}, 'w')"), r"(builtins|__builtin__)\.eval"
    yield Calling(getattr, "a", "upper"), r"(builtins|__builtin__)\.getattr"
    yield Calling(torch.load, str(mark)), "torch.serialization.load"
    yield Calling(open, str(mark), "w"), "open"
    yield Calling(copyreg._reconstructor, object, object, None), r"copy_?reg\._reconstructor"  # type: ignore[attr-defined]  # not told to type checkers


def test_a_pickle_that_calls_something_calls_nothing(written: Path, tmp_path: Path) -> None:
    for value, name in hostile(tmp_path):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        (bad / ".metadata").write_bytes(pickle.dumps(value))
        with pytest.raises(UnsupportedState, match=name):
            dcp_files.read_step(bad)
        # And a value of a checkpoint whose metadata is sound.
        shutil.rmtree(bad)
        dcp.save({"fine": torch.ones(2), "v": [1, value]}, checkpoint_id=bad)
        with pytest.raises(UnsupportedState, match=name) as caught:
            dcp_files.read_step(bad)
        assert caught.value.details["path"] == '["v"]'
        shutil.rmtree(bad)
    assert not (tmp_path / "mark").exists()


def test_members_of_enumerations_are_read_as_older_pythons_write_them() -> None:
    """By ``getattr``, which is good for nothing else."""

    def pickled(module: str, kind: str, name: str) -> bytes:
        named = f"cbuiltins\ngetattr\n(c{module}\n{kind}\nV{name}\ntR."
        return pickle.PROTO + b"\x02" + named.encode()

    def read(*what: str) -> Any:
        names = dcp_stand_ins.METADATA_NAMES
        return dcp_stand_ins.Unpickler(io.BytesIO(pickled(*what)), names).load()

    metadata = "torch.distributed.checkpoint.metadata"
    assert read(metadata, "_MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT").state == {}
    for what in ((metadata, "Metadata", "__init__"), ("pathlib", "Path", "unlink")):
        with pytest.raises(dcp_stand_ins.Refused, match=r"builtins\.getattr"):
            read(*what)


def test_names_are_exact(tmp_path: Path) -> None:
    """No module is allowed as such, and no attribute of what is allowed."""
    for module, name in (
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("collections", "OrderedDict.__init__"),
        ("numpy", "ndarray.tofile"),
        ("pathlib", "Path.unlink"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ):
        data = pickle.PROTO + b"\x04"
        for text in (module, name):
            data += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
        (tmp_path / ".metadata").write_bytes(data + pickle.STACK_GLOBAL + pickle.STOP)
        with pytest.raises(UnsupportedState, match=name):
            dcp_files.read_step(tmp_path)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({1, 2}, "set"),
        (1j, "complex"),
        (np.arange(3, dtype=">i4"), "type or order"),
        (torch.ones(2).to_sparse(), "sparse"),
        (2**14_000, "13,600 bits"),
    ],
    ids=["set", "complex", "big-endian", "sparse", "large"],
)
def test_what_has_no_form_is_named(tmp_path: Path, value: Any, why: str) -> None:
    dcp.save({"n": {"odd": value} if why != "sparse" else [1, (value,)]}, checkpoint_id=tmp_path)
    with pytest.raises(UnsupportedState, match=why):
        dcp_files.read_step(tmp_path)


def named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


INDEX = named("torch.distributed.checkpoint.metadata", "MetadataIndex")
STATE = pickle.MARK + pickle.UNICODE + b"name\n" + pickle.UNICODE + b"int8\n" + pickle.DICT


@pytest.mark.parametrize(
    "built",
    [
        named("torch", "float32"),
        named("torch", "FloatStorage"),
        named("torch._utils", "_rebuild_tensor_v2"),
        named("torch", "Size"),
        named("collections", "OrderedDict"),
        INDEX,
        named("torch", "Size") + pickle.EMPTY_TUPLE + pickle.REDUCE,
        INDEX + pickle.EMPTY_TUPLE + pickle.REDUCE + STATE + pickle.BUILD,
        named("collections", "OrderedDict") + b")R" + STATE + pickle.BUILD,
    ],
    ids=["dtype", "storage", "function", "tuple", "dict", "class", "size", "twice", "dict-twice"],
)
def test_a_pickle_changes_nothing_that_is_there_already(built: bytes) -> None:
    """BUILD sets attributes of whatever it is given, that of every later value's type, too."""
    names = {**dcp_stand_ins.METADATA_NAMES, **dcp_stand_ins.VALUE_NAMES}
    data = pickle.PROTO + b"\x02" + built + STATE + pickle.BUILD + pickle.STOP
    with pytest.raises((dcp_stand_ins.Refused, TypeError)):
        dcp_stand_ins.Unpickler(io.BytesIO(data), names).load()
    assert dcp_stand_ins._KNOWN["torch", "float32"].name == "float32"


def test_attributes_of_a_state_dict_are_left_out(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    assert state._metadata
    wrapped = {"values": (state, 1)}  # in a tuple, it is one value for DCP
    dcp.save(wrapped, checkpoint_id=tmp_path)
    item = dcp_files.read_step(tmp_path)
    assert sorted(array.path for array in item.arrays) == ["values/0/bias", "values/0/weight"]


def test_a_pickle_of_endless_values_ends(tmp_path: Path) -> None:
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    dcp.save({"v": value}, checkpoint_id=tmp_path)
    with pytest.raises(UnsupportedState, match="too many"):
        dcp_files.read_step(tmp_path)


def test_limits_hold_in_the_child(tmp_path: Path) -> None:
    """Asking for more memory than there is ends the child, not this process."""
    asks = pickle.BINUNICODE8 + (1 << 40).to_bytes(8, "little")
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + asks)
    with pytest.raises(FormatError):
        dcp_files.read_step(tmp_path)


# -- files that lie --------------------------------------------------------------------------------


def change_metadata(path: Path, change: Any) -> None:
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def info_of(metadata: Any, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: setattr(info_of(m, "half"), "relative_path", "../x"), UnsupportedState),
        (lambda m: setattr(info_of(m, "half"), "offset", 10**15), CheckpointError),
        (lambda m: setattr(info_of(m, "half"), "length", 100), CheckpointError),
        (lambda m: setattr(m.state_dict_metadata["half"], "size", torch.Size([6])), Damaged),
        (
            lambda m: setattr(m.state_dict_metadata["half"].chunks[0], "sizes", torch.Size([4])),
            UnsupportedState,
        ),
        (lambda m: m.planner_data.update(half=("scalar",)), FormatError),
        (lambda m: m.planner_data.update(half=("scalar", "x")), FormatError),
        (lambda m: m.planner_data.update(half=()), FormatError),
    ],
)
def test_metadata_that_lies_is_an_error(
    written: Path, tmp_path: Path, change: Any, error: type[Exception]
) -> None:
    shutil.copytree(written, tmp_path / "c")
    change_metadata(tmp_path / "c", change)
    with pytest.raises(error):
        dcp_files.read_step(tmp_path / "c")


@pytest.mark.parametrize(
    ("sizes", "strides", "lies"),
    [
        ((4, 5), (5, 1), True),
        ((5, 4), (1, 5), True),
        ((4, 4), (5, 1), True),
        ((4, 6), (5, 1), False),
        # One element, a thousand million times: it would be written out.
        ((2**15, 2**15), (0, 0), False),
        ((7, 3), (1, 1), False),
    ],
)
def test_a_view_that_has_bytes_twice_is_none_of_what_dcp_writes(
    tmp_path: Path, sizes: tuple[int, ...], strides: tuple[int, ...], lies: bool
) -> None:
    (tmp_path / "data").write_bytes(bytes(range(20)))
    chunk = dcp_files._Chunk((0, 0), sizes, strides, 0, "data", 0, 20)
    tensor = dcp_files._Tensor("uint8", sizes, [chunk])
    reader = dcp_files._Reader(tmp_path, dcp_files.Item())
    if lies:
        reader._check(chunk, tensor, "w")
    else:
        with pytest.raises(Damaged, match="does not lie in its file"):
            reader._check(chunk, tensor, "w")


def test_no_link_is_followed_and_no_pipe_waited_for(written: Path, tmp_path: Path) -> None:
    for make in (lambda path: path.symlink_to(written / path.name), os.mkfifo):
        shutil.copytree(written, tmp_path / "c")
        (tmp_path / "c" / "__0_0.distcp").unlink()
        make(tmp_path / "c" / "__0_0.distcp")
        with pytest.raises(CheckpointError):
            dcp_files.read_step(tmp_path / "c")
        shutil.rmtree(tmp_path / "c")


def test_changed_bytes_are_an_error_or_another_value(
    written: Path, tmp_path: Path, seed: int
) -> None:
    """Whatever the files say: an error of ours, or an item whose arrays can be read."""
    chance = random.Random(seed)
    for turn in range(40):
        shutil.copytree(written, tmp_path / "c")
        path = tmp_path / "c" / (".metadata" if turn % 2 else "__0_0.distcp")
        data = bytearray(path.read_bytes())
        for _ in range(4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if turn % 5 == 0:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            item = dcp_files.read_step(tmp_path / "c")
            for array in item.arrays:
                size_bytes = sum(len(piece) for piece in array.pieces())
                assert size_bytes == array.spec.size_bytes
        except CheckpointError:
            pass  # as it should be
        shutil.rmtree(tmp_path / "c")


def test_the_child_knows_the_types_that_torch_has() -> None:
    for name in dcp_stand_ins._DTYPES:
        assert isinstance(getattr(torch, name, torch.float32), torch.dtype)
    for name, dtype in dcp_stand_ins._STORAGES.items():
        assert getattr(torch, name) in torch._storage_classes
        assert hasattr(torch, dtype)


def test_a_reader_of_pickles_that_does_not_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk hangs: the pipe stays open although the child was killed."""
    child, held = tmp_path / "child.py", tmp_path / "pid"
    child.write_text(
        "import subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"open({str(held)!r}, 'w').write(str(inner.pid))\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(dcp_files, "_CHILD", child)
    monkeypatch.setattr(dcp_files, "CHILD_S", 2.0)
    try:
        with pytest.raises(FormatError, match="within 2 s"):
            dcp_files.read_step(tmp_path)
    finally:
        os.kill(int(held.read_text()), signal.SIGKILL)
        for thread in threading.enumerate():
            if thread.name == "mtckpt-pickles":
                thread.join(20)
