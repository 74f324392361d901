"""The ranks of ``torch.distributed``, joined by the key-value store that it was started with.

Knows the store only: no collective is called, so it works beside any backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtckpt._coordination import StoreGroup

__all__ = ["find_group"]


class _Store:
    """See ``Store``; what torch's own raise are RuntimeErrors."""

    def __init__(self, store: Any) -> None:
        self._store = store
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        host = getattr(store, "host", "")  # a file or a table in memory has none
        self.place = f"{host}:{store.port}" if host else ""

    def put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def have(self, directory: str, names: Sequence[str]) -> bool:
        return bool(self._store.check([f"{directory}/{name}" for name in names]))

    def read(self, directory: str, names: Sequence[str]) -> dict[str, bytes]:
        keys = {name: f"{directory}/{name}" for name in names}
        if not self._store.check(list(keys.values())):
            keys = {name: key for name, key in keys.items() if self._store.check([key])}
        return {name: bytes(self._store.get(key)) for name, key in keys.items()}

    def delete(self, key: str) -> None:
        self._store.delete_key(key)


def find_group(name: str) -> StoreGroup | None:
    """The job's group if ``torch.distributed`` has been started with several ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    store = _Store(dist.distributed_c10d._get_default_store())
    return StoreGroup(store, dist.get_rank(), dist.get_world_size(), name)
