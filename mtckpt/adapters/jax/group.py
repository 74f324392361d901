"""The processes of ``jax.distributed``, joined by its coordination service.

Knows the service's key-value store only: no computation is run across processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtckpt._coordination import StoreGroup

__all__ = ["find_group"]


class _Store:
    """See ``Store``; what JAX's client raises are RuntimeErrors."""

    def __init__(self, client: Any, place: str) -> None:
        self._client = client
        self.place = place

    def put(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value, allow_overwrite=True)

    def have(self, directory: str, names: Sequence[str]) -> bool:
        return len(self.read(directory, names)) == len(names)

    def read(self, directory: str, names: Sequence[str]) -> dict[str, bytes]:
        wanted = set(names)
        found = {}
        for key, value in self._client.key_value_dir_get_bytes(f"{directory}/"):
            name = key.rpartition("/")[2]
            if name in wanted:
                found[name] = bytes(value)
        return found

    def delete(self, key: str) -> None:
        self._client.key_value_delete(key)


def find_group(name: str) -> StoreGroup | None:
    """The job's group if ``jax.distributed`` has been initialized with several processes."""
    # JAX has no public way to its key-value store; Orbax goes this way too.
    from jax._src.distributed import global_state

    if global_state.client is None or (global_state.num_processes or 1) < 2:
        return None
    store = _Store(global_state.client, global_state.coordinator_address or "")
    return StoreGroup(store, global_state.process_id, global_state.num_processes, name)
