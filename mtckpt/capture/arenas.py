"""Device memory that snapshots pass through, lent for one capture at a time.

Knows the driver, and PyTorch if it is there, which lends from a pool of its own that it may take
back when it runs out; without PyTorch memory comes from the driver. Does not know what passes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mtckpt.capture.driver import CudaError

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

__all__ = ["Arenas"]


class Arenas:
    """Device memory for snapshots, lent for one capture at a time."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._driver = driver
        self._ordinal = ordinal
        self._pool: Any = None
        self._pooled_bytes = 0  # what a pool of PyTorch's still holds for us
        self._own = (0, 0)  # address and size of memory of the driver's

    def free_bytes(self) -> tuple[int, int]:
        """What a new arena could have, and the whole memory of the device."""
        free, total = self._driver.memory()
        return free + self._pooled_bytes + self._own[1], total

    def take(self, size_bytes: int) -> tuple[int, object] | None:
        """Memory and what keeps it; None if there is none after all."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return self._of_torch(torch, size_bytes)
        if self._own[1] < size_bytes:
            self.close()
            try:
                self._own = (self._driver.alloc(size_bytes), size_bytes)
            except CudaError:
                return None
        return self._own[0], None

    def _of_torch(self, torch: Any, size_bytes: int) -> tuple[int, object] | None:
        try:
            with self._pool_of(torch):
                memory = torch.empty(
                    size_bytes, dtype=torch.uint8, device=torch.device("cuda", self._ordinal)
                )
        except torch.OutOfMemoryError:
            self._pooled_bytes = 0
            return None
        # Memory that is cached for all may be anybody's by the next save.
        self._pooled_bytes = size_bytes if self._pool else 0
        return memory.data_ptr(), memory

    @contextlib.contextmanager
    def _pool_of(self, torch: Any) -> Iterator[None]:
        """A pool that PyTorch uses for others before it runs out of memory, where it can."""
        if self._pool is None:
            try:
                self._pool = torch.cuda.MemPool(use_on_oom=True)
            except (AttributeError, TypeError):  # PyTorch before 2.8: memory is cached for all
                self._pool = False
        if self._pool is False:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool, device=self._ordinal):
            yield

    def close(self) -> None:
        """Give back memory of the driver's, and the pool."""
        self._pool, self._pooled_bytes = None, 0
        if self._own[0]:
            self._driver.free(self._own[0])
        self._own = (0, 0)
