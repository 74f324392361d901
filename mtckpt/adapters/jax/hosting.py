"""Host memory that becomes arrays of JAX.

Knows what a CPU device adopts as it is, and where memory is to be got. Does not know what the bytes
are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["address_of", "aligned"]

# XLA's CPU devices adopt memory that starts at a multiple of this.
_ALIGN_BYTES = 64
# What is smaller is the allocator's, which may have used its memory before.
_OWN_PAGES_BYTES = 64 * 1024


def aligned(size_bytes: int) -> np.ndarray[Any, Any]:
    """Memory that nobody else has, with any bytes in it."""
    if size_bytes >= _OWN_PAGES_BYTES:
        from mtckpt.capture.pages import fresh  # of this system; to load needs none of it

        return np.frombuffer(fresh(size_bytes), np.uint8)
    memory = np.empty(size_bytes + _ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % _ALIGN_BYTES
    return memory[start : start + size_bytes]


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Where an array's memory starts; 0 for an empty one."""
    return int(array.__array_interface__["data"][0]) if array.nbytes else 0
