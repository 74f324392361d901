"""NumPy arrays and scalars as leaves, with ml_dtypes' small float types; and its generators.

Knows ``numpy.ndarray``, ``numpy.memmap``, ``numpy.matrix``, NumPy's scalars, and what
``numpy.random.default_rng`` makes. Does not know objects, strings, dates, records or masked arrays:
they are refused with their path. Byte order is not kept, values are: what was stored big-endian
comes back the same number.

NumPy is imported by the first call that needs it, so a process without arrays never pays for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mtckpt._dtypes import check_dtype, name_of
from mtckpt._settling import settle
from mtckpt._state import ArraySpec
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    import numpy as np

    from mtckpt._state import Node

__all__ = ["NumpyAdapter"]

SCALAR = "numpy.scalar"  # what ArraySpec.framework says for a numpy.generic
# By the kind of a type that cannot be stored: what to save in its place.
_OTHERWISE = "save it as another type, such as array.astype(...), or leave it out of the state"
_INSTEAD = {
    "U": "save it as Python texts: array.tolist(), or str(value)",
    "S": "save it as Python bytes: array.tolist(), or bytes(value)",
    "O": "save array.tolist() if its items are plain values, or each array in it by itself",
    "M": "save its numbers, array.view('int64'), and np.datetime_data(array.dtype) beside them",
    "m": "save its numbers, array.view('int64'), and np.datetime_data(array.dtype) beside them",
    "V": "save each field by itself: array['name']",
}


class NumpyAdapter:
    """``StateAdapter`` of NumPy; where a torch dtype has no NumPy twin, its nearest plain form."""

    framework = "numpy"
    replaces = False  # the few that cannot be written into are written back by who holds them

    def is_array(self, value: object) -> bool:
        """True for arrays and for NumPy's scalars (``numpy.float64`` is a Python float too)."""
        numpy = sys.modules.get("numpy")
        return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))

    def spec(self, value: Any, path: str, *, template: bool = False) -> ArraySpec:
        """Raises UnsupportedState for masked arrays, unknown subclasses and types without bytes."""
        import numpy as np

        if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap, np.matrix):
            raise UnsupportedState(
                f"cannot save an array of type {type(value).__qualname__}: what it has besides "
                "its numbers would be lost",
                path=path,
                type_name=type(value).__qualname__,
                state="live state unchanged" if template else "nothing was written",
                actions=("save its parts as plain arrays, for a masked array .data and .mask",),
            )
        name = check_dtype(name_of(value.dtype), path, _INSTEAD.get(value.dtype.kind, _OTHERWISE))
        kind = self.framework if isinstance(value, np.ndarray) else SCALAR
        return ArraySpec(name, tuple(value.shape), kind)

    def specs(self, values: Sequence[Any], paths: Sequence[str]) -> tuple[list[ArraySpec], None]:
        """One by one."""
        return list(map(self.spec, values, paths)), None

    def misfit(self, live: Any) -> str:
        """Empty: an array is filled where it is."""
        del live
        return ""

    def survey(self, state: object) -> None:
        """Nothing here says anything of the rest."""

    def parts(self, value: Any, path: str, *, template: bool = False) -> None:
        """None: an ndarray is no part of anything."""
        del value, path, template

    def rows(self, array: Any, first: int, stop: int) -> Any:
        """A view."""
        return array[first:stop]

    def assembled(self, live: Any, arrays: Sequence[Any]) -> Any:
        """Nothing has parts here."""
        del arrays
        return live

    def fingerprint(self, values: Sequence[Any]) -> object:
        """Types, shapes and strides; the byte order is part of the type."""
        return [
            [type(value) for value in values],
            [value.dtype for value in values],
            [value.shape for value in values],
            [value.strides for value in values],
        ]

    def addresses(
        self, values: Sequence[Any], paths: Sequence[str] = (), fingerprint: object = None
    ) -> tuple[list[int], object]:
        """The array's own memory where it is C-contiguous and native, else that of a copy."""
        import numpy as np

        del paths, fingerprint  # nothing can fail here, and flags are cheap to ask
        addresses = []
        copies = []
        for value in values:
            if isinstance(value, np.ndarray) and value.flags.c_contiguous and value.dtype.isnative:
                array = value
            else:
                array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", subok=False)
                copies.append(array)
            addresses.append(_address(array))
        return addresses, copies

    def identity(self, value: Any) -> object | None:
        """Two arrays over the same bytes; a scalar is never the same as another."""
        import numpy as np

        if not isinstance(value, np.ndarray) or not value.nbytes:
            return None
        return (_address(value), value.shape, value.strides, value.dtype.str, value.dtype.name)

    def state_of(self, value: object) -> object | None:
        """What a random generator says of itself: names, numbers, and arrays for some kinds."""
        bits = _bit_generator(value)
        return None if bits is None else bits.state

    def writable_address(self, value: Any) -> int | None:
        """The address of a writable, C-contiguous array of native byte order."""
        import numpy as np

        if not isinstance(value, np.ndarray):
            return None
        flags = value.flags
        plain = flags.c_contiguous and flags.writeable and value.dtype.isnative
        return _address(value) if plain else None

    def writable_addresses(
        self, values: Sequence[Any], specs: Sequence[ArraySpec]
    ) -> list[int] | None:
        """The addresses of writable, C-contiguous arrays of native byte order."""
        import numpy as np

        if set(map(type, values)) != {np.ndarray}:
            return None
        if [value.shape for value in values] != [spec.shape for spec in specs]:
            return None
        names = {dtype: dtype.name for dtype in {value.dtype for value in values}}
        if [names[value.dtype] for value in values] != [spec.dtype for spec in specs]:
            return None
        addresses = [self.writable_address(value) for value in values]
        return None if None in addresses else cast("list[int]", addresses)

    def new(self, spec: ArraySpec, like: object | None = None) -> tuple[Any, int]:
        """An empty ndarray. Types that NumPy lacks get their bytes under the nearest type."""
        import numpy as np

        del like
        array: np.ndarray[Any, Any]
        if spec.dtype == "complex32":
            array = np.empty((*spec.shape, 2), np.float16)
        elif spec.dtype == "float4_e2m1fn_x2":
            array = np.empty(spec.shape, np.uint8)
        else:
            array = np.empty(spec.shape, _dtype(spec.dtype))
        return array, _address(array)

    def reserved(self, freshes: Sequence[Any]) -> list[int]:
        """Nothing: what is new has its memory at once."""
        del freshes
        return []

    def finished(self, fresh: Any, spec: ArraySpec) -> Any:
        """A filled array as the user gets it: scalars are scalars again."""
        return fresh[()] if spec.framework == SCALAR else fresh

    def assign(self, live: Any, fresh: Any) -> Any:
        """Into a live array where it is writable; a scalar or read-only array is replaced."""
        import numpy as np

        if not isinstance(live, np.ndarray):
            return fresh[()]
        if self.keeps(live):
            live[...] = fresh
            return live
        fresh.flags.writeable = live.flags.writeable
        return fresh

    def keeps(self, live: Any) -> bool:
        """True for an array that is writable, each element in memory of its own."""
        import numpy as np

        return isinstance(live, np.ndarray) and live.flags.writeable and not _overlaps_itself(live)

    def number(self, live: Any, value: Any) -> Any | None:
        """The number itself in the place of a scalar; None for an array."""
        import numpy as np

        is_number = isinstance(live, np.generic) and isinstance(value, (int, float))
        return value if is_number else None

    def written(self, lives: Sequence[Any]) -> None:
        """Nothing: NumPy keeps no record of writes."""

    def place_object(self, live: Any, node: Node, path: str, placing: Any) -> Any | None:
        """Match a random generator with a saved one of its kind."""
        bits = _bit_generator(live)
        if bits is None:
            return None
        state = placing.tree(node, path)
        saved = state.get("bit_generator") if isinstance(state, dict) else None
        kind = bits.state["bit_generator"]
        if saved == kind:
            placing.finish.append(lambda: setattr(bits, "state", settle(state)))
        else:
            placing.diff.differing.append(
                f"{path}: a generator of kind {kind} here, {saved or node.kind} in the checkpoint"
            )
        return live


def _bit_generator(value: object) -> Any | None:
    """What has the state of a random generator of NumPy's, but of the old ``RandomState``."""
    random = sys.modules.get("numpy.random")
    if random is None:
        return None
    if isinstance(value, random.Generator):
        return value.bit_generator
    return value if isinstance(value, random.BitGenerator) else None


def _dtype(name: str) -> Any:
    import numpy as np

    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0]) if array.nbytes else 0


def _overlaps_itself(array: Any) -> bool:
    """True for broadcast views, where one element stands at several places."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(array.strides, array.shape, strict=True)
    )
