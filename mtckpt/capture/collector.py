"""The garbage collector, kept from walking what a save or a restore makes.

Taking a state of 20,000 tensors apart makes as many small objects several times over. None of them
is part of a cycle, and the collector would walk all of a training process again and again to find
that out: half of the time of such a save or restore.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No collections in this block; whoever had switched the collector off finds it off."""
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
