"""A save and a restore without files, slots or tiers: bytes in a list stand for the store."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtckpt import _state
from mtckpt._dtypes import DTYPES
from mtckpt._placing import Placing, Stored, rename_tree, settle
from mtckpt.adapters import active_adapters


@dataclass(frozen=True)
class Saved:
    """What a checkpoint keeps of a state."""

    structure: str
    arrays: list[Stored]
    data: list[bytes]
    plain: str
    plain_paths: list[str]

    @property
    def paths(self) -> list[str]:
        return [array.path for array in self.arrays]

    def bytes_at(self, path: str) -> bytes:
        index = self.paths.index(path)
        return self.data[self.arrays[index].bytes_of]


def save(state: Any) -> Saved:
    """Flatten a state and copy its bytes from where the adapters say that they lie."""
    flat = _state.flatten(state, active_adapters())
    first: dict[object, int] = {}
    arrays, data = [], []
    specs = [
        owner.spec(array, path)
        for owner, array, path in zip(flat.owners, flat.arrays, flat.paths, strict=True)
    ]
    for i in sorted(range(len(flat.arrays)), key=lambda i: flat.paths[i]):
        identity = flat.owners[i].identity(flat.arrays[i])
        if identity is not None:
            first.setdefault(identity, i)
    for i, (owner, array, path) in enumerate(
        zip(flat.owners, flat.arrays, flat.paths, strict=True)
    ):
        spec = specs[i]
        known = owner.fingerprint([array])
        (address,), keep = owner.addresses([array], [path], known)
        data.append(ctypes.string_at(address, spec.size_bytes) if spec.size_bytes else b"")
        del keep
        arrays.append(Stored(path, spec, first.get(owner.identity(array), i)))
    return Saved(
        json.dumps(_state.node_to_json(flat.root)),
        arrays,
        data,
        json.dumps([_state.encode_plain(value) for value in flat.plain]),
        flat.plain_paths,
    )


def plan(
    saved: Saved,
    live: Any,
    *,
    partial: bool = False,
    rename: Callable[[str], str | None] | None = None,
) -> tuple[Placing, Any]:
    """Match, and raise if anything differs; nothing is written yet."""
    plain = [_state.decode_plain(value) for value in json.loads(saved.plain)]
    root = _state.node_from_json(json.loads(saved.structure), len(saved.arrays), len(plain))
    arrays = saved.arrays
    if rename is not None:
        root, arrays = rename_tree(root, arrays, saved.plain_paths, rename)
    placing = Placing(arrays, plain, active_adapters(), partial=partial)
    result = placing.match(live, root)
    placing.tell_apart(*[lambda one, other: saved.data[one] == saved.data[other]] * 2)
    placing.raise_diff(step=1)
    return placing, result


@dataclass(frozen=True)
class Fill:
    """``size_bytes`` of stored array ``index`` are wanted at ``address``."""

    index: int
    address: int
    size_bytes: int


def fills(placing: Placing) -> list[Fill]:
    """Every wanted array once an address."""
    return [
        Fill(index, address, placing.arrays[index].spec.size_bytes)
        for address, index in placing.addresses
    ]


def restore(saved: Saved, live: Any, **options: Any) -> Any:
    """Put a saved state into a live one; returns what stands in its place."""
    placing, result = plan(saved, live, **options)
    placing.reserve()
    for fill in fills(placing):
        assert fill.size_bytes == len(saved.data[fill.index])
        ctypes.memmove(fill.address, saved.data[fill.index], fill.size_bytes)
    for address, index, box in placing.boxes:
        spec = placing.arrays[index].spec
        assert spec.offsets is None
        item = np.dtype((np.void, DTYPES[spec.dtype].item_bytes))
        whole = np.frombuffer(saved.data[index], item).reshape(spec.shape)
        part = whole[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))].tobytes()
        ctypes.memmove(address, part, len(part))
    for work in placing.finish:
        work()
    return settle(result)
