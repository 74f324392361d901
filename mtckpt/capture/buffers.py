"""Memory that is kept and grows: pinned host memory, and device memory.

Knows the driver, and that PyTorch, where it is there, may hold memory that nobody uses.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from mtckpt.capture.driver import OUT_OF_MEMORY, CudaError
from mtckpt.capture.memory import view_at

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

__all__ = ["DeviceMemory", "PinnedMemory"]


class PinnedMemory:
    """Host memory that a device copies to and from, of at least the size last asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._size_bytes = 0
        self.address = 0

    def hold(self, size_bytes: int) -> None:
        """Have at least so much; what was in it may be gone."""
        if size_bytes > self._size_bytes:
            self.free()
            self.address = self._driver.alloc_host(size_bytes)
            self._size_bytes = size_bytes

    def words(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The first 64-bit words of it."""
        return np.frombuffer(view_at(self.address, count * 8), np.uint64)

    def free(self) -> None:
        """Give it back. Nothing may be under way."""
        if self.address:
            self._driver.free_host(self.address)
        self.address = self._size_bytes = 0


def _let_go_of_caches() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class DeviceMemory:
    """Device memory of at least the size last asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._size_bytes = 0
        self.address = 0

    def hold(self, size_bytes: int) -> bool:
        """Have at least so much; True if it is new, so that nothing is in it yet."""
        if size_bytes <= self._size_bytes:
            return False
        self.free()
        try:
            self.address = self._driver.alloc(size_bytes)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            _let_go_of_caches()
            self.address = self._driver.alloc(size_bytes)
        self._size_bytes = size_bytes
        return True

    def free(self) -> None:
        """Give it back. Nothing may be under way."""
        if self.address:
            self._driver.free(self.address)
        self.address = self._size_bytes = 0
