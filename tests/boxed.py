"""Arrays of which a process holds boxes, as a framework that shards has them; NumPy underneath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mtckpt import adapters
from mtckpt._boxes import Box
from mtckpt._state import ArraySpec, Part
from mtckpt.adapters.numpy import NumpyAdapter


class Boxed:
    """``boxes`` of a global array, each with its own ndarray.

    ``holders`` are the ranks that hold each of them too, ``sharers`` all with a box of the array.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        boxes: Sequence[Box],
        holders: tuple[int, ...] = (),
        of: np.ndarray[Any, Any] | None = None,
        sharers: tuple[int, ...] = (),
    ) -> None:
        self.shape, self.dtype, self.boxes = shape, np.dtype(dtype), list(boxes)
        self.holders, self.sharers = holders, sharers
        self.arrays = [
            np.zeros(box.shape, dtype) if of is None else np.array(of[place(box)]) for box in boxes
        ]

    def equals(self, whole: np.ndarray[Any, Any]) -> bool:
        return all(
            np.array_equal(array, whole[place(box)])
            for box, array in zip(self.boxes, self.arrays, strict=True)
        )


def place(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))


class BoxedAdapter(NumpyAdapter):
    """NumPy's adapter, and ``Boxed``."""

    def is_array(self, value: object) -> bool:
        return isinstance(value, Boxed) or super().is_array(value)

    def spec(self, value: Any, path: str, *, template: bool = False) -> ArraySpec:
        if not isinstance(value, Boxed):
            return super().spec(value, path, template=template)
        return self._specs(value)[0]

    def _specs(self, value: Boxed) -> list[ArraySpec]:
        return [
            ArraySpec(value.dtype.name, box.shape, "numpy", box.offsets, value.shape)
            for box in value.boxes
        ]

    def parts(  # type: ignore[override]  # NumPy's own has none
        self, value: Any, path: str, *, template: bool = False
    ) -> Sequence[Part] | None:
        if not isinstance(value, Boxed):
            return None
        return [
            Part(spec, array, value.holders, value.sharers)
            for spec, array in zip(self._specs(value), value.arrays, strict=True)
        ]

    def identity(self, value: Any) -> object | None:
        if isinstance(value, Boxed):
            return "boxed", id(value)
        return super().identity(value)


@contextmanager
def boxed_arrays() -> Iterator[None]:
    """While this is held, NumPy's adapter knows ``Boxed`` too."""
    before = dict(adapters._made)
    adapters._made["mtckpt.adapters.numpy"] = BoxedAdapter()
    try:
        yield
    finally:
        adapters._made.clear()
        adapters._made.update(before)
