"""A tmpfs file whose pages are there, mapped and registered with the CUDA driver: the limit.

It is what a RAM slot can be at best. On a CPU it is only mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from benchmarks.gpu.bench import Bench

__all__ = ["Pinned", "pinned"]


class Pinned:
    """``tensor`` is the memory as bytes; what making it took is in ``*_s``."""

    def __init__(self, bench: Bench, directory: str, size_bytes: int) -> None:
        import torch

        self.path = f"{directory}/limit-{os.getpid()}"
        self._on_gpu = bench.on_gpu
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        started_s = time.perf_counter()
        os.posix_fallocate(self._fd, 0, size_bytes)
        self.allocate_s = time.perf_counter() - started_s
        self._map = mmap.mmap(self._fd, size_bytes)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.register_s = 0.0
        if self._on_gpu:
            started_s = time.perf_counter()
            result = _driver().cudaHostRegister(self.tensor.data_ptr(), size_bytes, 0)
            self.register_s = time.perf_counter() - started_s
            if int(result) != 0:
                raise RuntimeError(f"cudaHostRegister: {result}")

    def views(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Places for the tensors of a state, one behind the other."""
        views, offset = [], 0
        for tensor in state.values():
            part = self.tensor[offset : offset + tensor.nbytes]
            views.append(part.view(tensor.dtype).view(tensor.shape))
            offset += -(-tensor.nbytes // 64) * 64
        return views

    def close(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            _driver().cudaHostUnregister(self.tensor.data_ptr())
        os.close(self._fd)
        os.unlink(self.path)


@contextlib.contextmanager
def pinned(bench: Bench, directory: str, size_bytes: int) -> Iterator[Pinned]:
    made = Pinned(bench, directory, size_bytes)
    try:
        yield made
    finally:
        made.close()


def _driver() -> Any:
    import torch

    load: Any = torch.cuda.cudart
    return load()
