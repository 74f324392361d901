"""What several ranks hold alike, and the wrapper that says so. Knows nothing of what is inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Replicated", "replicated"]


class Replicated:
    """``value`` is equal, bit for bit, on ``ranks``: on all of the job where that is None."""

    __slots__ = ("ranks", "value")

    def __init__(self, value: Any, ranks: tuple[int, ...] | None = None) -> None:
        self.value = value
        self.ranks = ranks


def replicated(value: Any, ranks: Iterable[int] | None = None) -> Replicated:
    """Say of a part of the state that all ranks hold the same, so that each byte is stored once.

        state = {"ema": mtckpt.replicated(ema), "model": model}

    Args:
        value: anything that can be saved. After a restore ``.value`` of the result has what was
            loaded, where that could not be put into what was there.
        ranks: the ranks that hold it; by default every rank of the job.

    What is not the same on all of them comes back as one of them had it. Ranks of one node do not
    compare; where several nodes have stored it, a difference is told of and kept in mind, as
    ``ReplicaDivergence`` in ``mtckpt show``. Modules in ``DistributedDataParallel``, their
    optimizers, and DTensors need no wrapper. On a single rank it changes nothing.
    """
    return Replicated(value, None if ranks is None else tuple(sorted(set(ranks))))
