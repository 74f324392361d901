"""Checkpoints written by hand, byte by byte, without an agent or a Checkpointer.

What a test writes here is what ``docs/format.md`` says, nothing that the writing code happens to
do. Arrays are NumPy's; the tree around them is built from their paths.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from mtckpt import _manifest, _shard, _state
from mtckpt._manifest import Incarnation, Manifest, ManifestEntry, Metrics, Record

Box = tuple[tuple[int, ...], tuple[int, ...]]


def incarnation_id(run: str, number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{run}:{number}"))


def build_incarnation(
    root: Path, run: str, number: int = 1, parent: tuple[int, int] | None = None
) -> Path:
    """The file that one start of a job leaves in every tier."""
    run_dir = _directory(root / _manifest.run_key(run))
    id_ = incarnation_id(run, number)
    path = run_dir / _manifest.incarnation_file(number, id_)
    if not path.exists():
        value = Incarnation(_manifest.FORMAT_VERSION, run, number, id_, parent, "host", 1)
        _write(path, _manifest.encode_sealed(value))
    return path


def build_save(
    root: Path,
    run: str,
    step: int,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    plain: Mapping[str, Any] | None = None,
    *,
    incarnation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    boxes: Mapping[str, Box] | None = None,
    same_as: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
    ranks: tuple[int, ...] | None = None,
    alike: str = "",
    metrics: Mapping[str, float] | None = None,
    parent: tuple[int, int] | None = None,
    aborted: str = "",
) -> Path:
    """One rank's part of one save below the tier ``root``; its directory.

    ``boxes`` gives offsets and global shape of an array that is a part of a global one, ``same_as``
    the first path of a tied one, ``dtypes`` the type of an array that NumPy has no name for,
    ``ranks`` those that the global arrays are spread over, ``alike`` is there if others hold them.
    """
    build_incarnation(root, run, incarnation, parent)
    id_ = incarnation_id(run, incarnation)
    save_id = _manifest.save_id(id_, step, 0)
    save_dir = root / _manifest.run_key(run) / str(_manifest.save_name(step, incarnation, save_id))
    _directory(save_dir)
    entries = [
        msgspec.structs.replace(entry, alike=alike) if entry.offsets is not None else entry
        for entry in _entries(arrays, boxes or {}, same_as or {}, dtypes or {}, ranks)
    ]
    layout, data, table, roots = _shard_bytes(entries, arrays, save_id)
    structure, plain_values = _structure([entry.path for entry in entries], plain or {})
    record = Record(
        version=_manifest.FORMAT_VERSION,
        run=run,
        step=step,
        incarnation=incarnation,
        incarnation_id=id_,
        save_id=save_id,
        rank=rank,
        world_size=world_size,
        plan_digest=xxh3_128_hexdigest(msgspec.json.encode(entries) if world_size == 1 else b""),
        shard=_manifest.ShardEntry(
            layout.size_bytes,
            layout.data_start,
            f"{layout.header_digest:016x}",
            xxh3_128_hexdigest(table),
            _shard.CHUNK_BYTES,
        ),
        roots=base64.b64encode(roots).decode(),
        arrays=msgspec.Raw(msgspec.json.encode(entries)),
        structure=msgspec.Raw(msgspec.json.encode(structure)),
        plain=msgspec.Raw(msgspec.json.encode(plain_values)),
        host="host",
        metrics=dict(metrics or {}),
        aborted=aborted,
    )
    _write(save_dir / _manifest.shard_file(rank), data)
    _write(save_dir / _manifest.table_file(rank), table)
    _write(save_dir / _manifest.record_file(rank), _manifest.encode_sealed(record))
    return save_dir


def build_manifest(save_dir: Path) -> Path:
    """The manifest over the records that lie in ``save_dir``."""
    entries = []
    for path in sorted(save_dir.glob("rank-*.json")):
        data = path.read_bytes()
        record = _manifest.decode_sealed(data, Record)
        entries.append(
            ManifestEntry(record.rank, record.shard.size_bytes, xxh3_128_hexdigest(data))
        )
    value = Manifest(
        _manifest.FORMAT_VERSION,
        record.run,
        record.step,
        record.incarnation,
        record.save_id,
        record.world_size,
        entries,
    )
    path = save_dir / _manifest.MANIFEST_FILE
    _write(path, _manifest.encode_sealed(value))
    return path


def build_metrics(save_dir: Path, metrics: Mapping[str, float]) -> Path:
    """Metrics that were reported after the save."""
    data = (save_dir / _manifest.record_file(0)).read_bytes()
    record = _manifest.decode_sealed(data, Record)
    value = Metrics(_manifest.FORMAT_VERSION, record.step, record.save_id, dict(metrics))
    path = save_dir / "metrics-1.json"
    _write(path, _manifest.encode_sealed(value))
    return path


def stored_name(entry: _manifest.ArrayEntry) -> str:
    """The name of an array in the shard file."""
    if entry.offsets is None:
        return entry.path
    return f"{entry.path}@{','.join(map(str, entry.offsets))}"


def _shard_bytes(
    entries: Sequence[_manifest.ArrayEntry],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    save_id: str,
) -> tuple[_shard.ShardLayout, bytes, bytes, bytes]:
    """Layout, shard file, digest table and roots."""
    stored = {
        stored_name(entry): (entry, np.ascontiguousarray(arrays[entry.path]))
        for entry in entries
        if entry.same_as is None
    }
    layout = _shard.plan_layout([(n, e.dtype, e.shape) for n, (e, _) in stored.items()])
    data = bytearray(layout.size_bytes)
    data[: layout.data_start] = layout.header
    digests = []
    for tensor in layout.tensors:
        body = stored[tensor.name][1].tobytes()
        data[tensor.start : tensor.start + tensor.size_bytes] = body
        for begin in range(0, tensor.size_bytes, _shard.CHUNK_BYTES):
            digests.append(xxh3_64_intdigest(body[begin : begin + _shard.CHUNK_BYTES]))
    body = np.array(digests, dtype="<u8").tobytes()
    table = _shard.Table.header(layout, _manifest.generation_of(save_id)) + body
    roots = _shard.root_digests(layout, memoryview(body).cast("Q"))
    return layout, bytes(data), table, roots


def _entries(
    arrays: Mapping[str, np.ndarray[Any, Any]],
    boxes: Mapping[str, Box],
    same_as: Mapping[str, str],
    dtypes: Mapping[str, str],
    ranks: tuple[int, ...] | None = None,
) -> list[_manifest.ArrayEntry]:
    paths = [*arrays, *same_as]
    entries = []
    for path in paths:
        array = arrays[same_as.get(path, path)]
        dtype = dtypes.get(same_as.get(path, path), array.dtype.name)
        shape = array.shape
        if array.dtype.names:  # complex32 as pairs: one element a pair
            dtype = "complex32"
        offsets, global_shape = boxes.get(path, (None, None))
        twin = paths.index(same_as[path]) if path in same_as else None
        entries.append(
            _manifest.ArrayEntry(
                path,
                dtype,
                shape,
                "numpy",
                offsets,
                global_shape,
                twin,
                ranks if path in boxes else None,
            )
        )
    return entries


def _structure(paths: Sequence[str], plain: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Dicts within dicts, as the paths say; plain values in the order in which they are given."""
    tree: dict[Any, Any] = {}
    leaves = [(path, _state.ARRAY, i) for i, path in enumerate(paths)]
    leaves += [(path, _state.PLAIN, i) for i, path in enumerate(plain)]
    for path, kind, index in leaves:
        *parents, last = [unquote(part) for part in path.split("/")]
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = (kind, index)

    def as_json(node: Any) -> Any:
        if isinstance(node, tuple):
            return {node[0]: node[1]}
        return {_state.DICT: [[key, as_json(child)] for key, child in node.items()]}

    return as_json(tree), [_state.encode_plain(value) for value in plain.values()]


def _directory(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
