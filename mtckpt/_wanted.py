"""Which stored bytes a restore wants at which addresses: whole arrays, and boxes of global ones.

Knows addresses and stored arrays. Does not know live objects, trees or files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mtckpt._boxes import Box, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._aliases import Aliases
    from mtckpt._renaming import Stored

__all__ = ["Wanted"]


class Wanted:
    """What one restore wants of ``arrays``; ``aliases`` are told what meets at one address."""

    def __init__(self, arrays: Sequence[Stored], aliases: Aliases) -> None:
        self._arrays = arrays
        self._aliases = aliases
        self._whole: dict[int, int] = {}  # the array that is wanted at an address
        self._boxes: dict[int, tuple[int, Box]] = {}  # and of which arrays only a part is

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Where all bytes of stored arrays are wanted, and of which; tied ones not twice."""
        arrays = self._arrays
        return [(address, arrays[index].bytes_of) for address, index in self._whole.items()]

    @property
    def boxes(self) -> list[tuple[int, int, Box]]:
        """Where boxes of global arrays are wanted, of which stored array, and which box of it."""
        arrays = self._arrays
        return [
            (address, arrays[index].bytes_of, box) for address, (index, box) in self._boxes.items()
        ]

    def into(self, index: int, address: int, box: Box | None = None) -> None:
        """Want the bytes of array ``index`` at ``address``: of all of it, or of one box."""
        spec = self._arrays[index].spec
        if box is None and spec.offsets is not None:
            box = whole(spec.whole_shape)
        # Of two leaves at one address, one is a view of the other: the longer is all of it.
        if box is None:
            known = self._whole.get(address, index)
            self._aliases.share(known, index)
            if spec.size_bytes and spec.size_bytes >= self._arrays[known].spec.size_bytes:
                self._whole[address] = index
        elif not box.is_empty:
            known, other = self._boxes.get(address, (index, box))
            self._aliases.share(known, index)
            if math.prod(box.shape) >= math.prod(other.shape):
                self._boxes[address] = (index, box)

    def all_into(self, indexes: Sequence[int], addresses: Sequence[int]) -> None:
        """``into`` for many arrays that are held whole."""
        wanted = dict(zip(addresses, indexes, strict=True))
        if len(wanted) == len(indexes) and self._whole.keys().isdisjoint(wanted):
            self._whole.update(wanted)
            self._whole.pop(0, None)  # an empty array
        else:  # several empty ones, tied ones, or views of others
            for index, address in zip(indexes, addresses, strict=True):
                self.into(index, address)
