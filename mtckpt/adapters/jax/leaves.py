"""Arrays of JAX as leaves: what they are, where their bytes lie, and how bytes become arrays.

Knows ``jax.Array`` of every type and sharding that this process can read, ``jax.random`` keys of
both styles, and ``jax.ShapeDtypeStruct`` as a template. Does not know pytrees (``nodes``). Does not
promise speed for other devices than the CPU: their bytes come through host memory of JAX's own.

JAX's arrays never change, so nothing is ever written into one: bytes go into fresh host memory,
aligned so that a CPU device adopts it as it is, and become new arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from mtckpt._state import ArraySpec, check_dtype
from mtckpt.adapters.jax import casting
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from jax.sharding import Sharding

__all__ = [
    "PLAIN",
    "Fresh",
    "addresses_of",
    "check",
    "fingerprint",
    "identity",
    "is_leaf",
    "made",
    "new",
    "number",
    "on_device",
    "spec_of",
]

# What ArraySpec.framework says: an array whose type yields to others' (weak), a new-style key.
PLAIN = "jax"
WEAK = "jax.weak"
KEY = "jax.key."
# Two or more elements share a byte in XLA's memory; NumPy and our files give each its own.
_PACKED_ON_DEVICE = frozenset(
    np.dtype(getattr(ml_dtypes, name))
    for name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn")
    if hasattr(ml_dtypes, name)
)
# XLA's CPU devices adopt memory that starts at a multiple of this.
_ALIGN_BYTES = 64
_dtype, _shape, _sharding = map(operator.attrgetter, ("dtype", "shape", "sharding"))


@dataclass(frozen=True, slots=True)
class Fresh:
    """Host memory that is waiting for bytes, and what they will be."""

    host: np.ndarray[Any, Any]
    spec: ArraySpec


def is_leaf(value: object) -> bool:
    """True for arrays, keys and tracers (which ``spec_of`` refuses), and for their descriptions."""
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct))


def is_key(value: Any) -> bool:
    """True for an array of new-style random keys."""
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))


def spec_of(value: Any, path: str, *, template: bool = False) -> ArraySpec:
    """Type and shape; of a key, those of its numbers. Raises UnsupportedState for the rest."""
    what, action = _refusal(value, template)
    if what:
        raise UnsupportedState(
            what,
            path=path,
            type_name=type(value).__qualname__,
            state="live state unchanged" if template else "nothing was written",
            actions=(action,),
        )
    if is_key(value):
        data = jax.eval_shape(jax.random.key_data, value)
        return ArraySpec(data.dtype.name, tuple(data.shape), KEY + _impl(value))
    name = check_dtype(value.dtype.name, path)
    kind = casting.CAST if isinstance(value, casting.Cast) else WEAK if value.weak_type else PLAIN
    return ArraySpec(name, tuple(value.shape), kind)


def _refusal(value: Any, template: bool) -> tuple[str, str]:
    """Why this cannot be saved (or restored into), and what to do; two empty strings if it can."""
    if isinstance(value, jax.core.Tracer):
        return (
            "cannot save a traced value: it has no bytes while its function is compiled",
            "call save() and restore() outside of jax.jit, jax.grad and the like",
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        if not template:
            return "a jax.ShapeDtypeStruct has no bytes", "save the array that it describes"
        return _unusable(value.sharding, tuple(value.shape))
    if value.is_deleted() and not template:
        return (
            "the memory of this array was given back: it was donated or deleted",
            "save the arrays that the step returned, not those that were donated to it",
        )
    return "", ""


def _unusable(sharding: Sharding | None, shape: tuple[int, ...]) -> tuple[str, str]:
    if sharding is None:
        return "", ""
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return f"the sharding of this template does not fit: {error}", "give it another sharding"
    return "", ""


def _impl(value: Any) -> str:
    """The name of a key's random number generator."""
    if isinstance(value, jax.Array):
        return str(jax.random.key_impl(value))
    return str(value.dtype._impl.name)  # JAX tells it of arrays only


def fingerprint(values: Sequence[Any]) -> list[list[Any]]:
    """By columns, for speed: types, shapes, weakness and placement."""
    return [
        list(map(_dtype, values)),
        list(map(_shape, values)),
        [getattr(value, "weak_type", False) for value in values],
        [
            # Each array has a sharding of its own, and they are dear to compare.
            sharding._device if type(sharding) is SingleDeviceSharding else sharding
            for sharding in map(_sharding, values)
        ],
    ]


def addresses_of(
    values: Sequence[Any], paths: Sequence[str], columns: Sequence[Sequence[Any]]
) -> tuple[list[int], list[np.ndarray[Any, Any]]]:
    """Where the bytes lie once they are computed, and the copies among them.

    On a CPU device that is where XLA keeps them; from all others they are copied to host memory.
    ``columns`` is the fingerprint of these very arrays.
    """
    dtypes, shapes, _, placements = columns
    kinds = set(dtypes)
    keys = {kind for kind in kinds if not isinstance(kind, np.dtype)}
    apart = {kind for kind in kinds - keys if kind not in _PACKED_ON_DEVICE}
    _wait(values, paths, [i for i, kind in enumerate(dtypes) if kind in keys] if keys else [])
    here = {placement for placement in set(placements) if _is_one_cpu(placement)}
    addresses = []
    others = []
    for value, dtype, shape, placement in zip(values, dtypes, shapes, placements, strict=True):
        if placement in here and dtype in apart and (len(shape) < 2 or _is_in_c_order(value)):
            addresses.append(value.unsafe_buffer_pointer())
        else:
            others.append((len(addresses), _one_of_many(value)))
            addresses.append(0)
    for _, piece in others:
        piece.copy_to_host_async()  # all devices at once; on a CPU there is nothing to do
    copies: list[np.ndarray[Any, Any]] = []
    for at, piece in others:
        if _is_one_cpu(piece.sharding) and _is_dense(piece):
            addresses[at] = piece.unsafe_buffer_pointer()
        else:
            copy = np.ascontiguousarray(np.asarray(piece))
            addresses[at] = address_of(copy)
            copies.append(copy)
    return addresses, copies


def _is_one_cpu(placement: Any) -> bool:
    """True for one device, or a sharding over one, whose memory is the host's."""
    devices = getattr(placement, "device_set", None) or {placement}
    one = next(iter(devices))
    return len(devices) == 1 and bool(one.platform == "cpu")


def _one_of_many(value: Any) -> Any:
    """One device's copy of an array that each of its devices holds whole; of a key, its numbers."""
    plain = value if _is_plain(value) else jax.random.key_data(value)
    return plain if plain.sharding.num_devices == 1 else plain.addressable_data(0)


def _wait(values: Sequence[Any], paths: Sequence[str], keys: Sequence[int]) -> None:
    """Wait until all are computed. Raises UnsupportedState for one that is gone, keys included."""
    try:
        jax.block_until_ready(list(values))  # type: ignore[no-untyped-call]  # jax leaves it untyped
    except RuntimeError:
        for i, value in enumerate(values):
            if value.is_deleted():
                spec_of(value, paths[i] if paths else "")  # which says so
        raise
    for i in keys:
        if values[i].is_deleted():
            spec_of(values[i], paths[i] if paths else "")


def _is_dense(value: Any) -> bool:
    """True if the buffer of a plain array holds its elements in C order, each in its own bytes."""
    return value.dtype not in _PACKED_ON_DEVICE and (value.ndim < 2 or _is_in_c_order(value))


def _is_in_c_order(value: Any) -> bool:
    ndim = value.ndim
    # What ``format`` is made of, for a tenth of the time; it is not public, so it may be gone.
    layout = getattr(value, "_pjrt_layout", None)
    known = _dense.get(layout)
    if known is None:
        known = value.format.layout.major_to_minor == tuple(range(ndim))
        if layout is not None:
            _dense[layout] = known
    return known


def _is_plain(value: Any) -> bool:
    """True for an array of numbers; False for one of keys, which are made of several."""
    return isinstance(value.dtype, np.dtype)


_dense: dict[Any, bool] = {}


def identity(value: Any) -> object | None:
    """The same object: JAX's arrays never change, so sharing a buffer otherwise means nothing."""
    return id(value)


# -- from bytes to arrays --------------------------------------------------------------------------


def new(spec: ArraySpec, casts_to: np.dtype[Any] | None = None) -> tuple[Fresh, int]:
    """Host memory for an array, which may become one of another type.

    Raises UnsupportedState where JAX would not keep its type.
    """
    kept = spec if casts_to is None else spec._replace(dtype=casts_to.name)
    dtype = check(kept, "", state="live state unchanged")
    if casts_to is not None:
        dtype = casting.stored_type(spec)
    host = _aligned(spec.size_bytes).view(dtype).reshape(spec.shape)
    return Fresh(host, spec), address_of(host)


def check(spec: ArraySpec, path: str, *, state: str) -> np.dtype[Any]:
    """The type as JAX keeps it. Raises UnsupportedState for one that it lacks or would narrow."""
    try:
        dtype = np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype))
    except TypeError:  # complex32 and packed pairs are torch's alone
        raise UnsupportedState(
            f"jax {jax.__version__} has no type {spec.dtype}",
            path=path,
            type_name=spec.dtype,
            state=state,
            actions=("load it with framework='numpy'",),
        ) from None
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if kept != dtype:
        raise UnsupportedState(
            f"jax would narrow {spec.dtype} to {kept}",
            path=path,
            type_name=spec.dtype,
            state=state,
            actions=(
                "jax.config.update('jax_enable_x64', True) before arrays are made",
                "or load with framework='numpy'",
            ),
        )
    if spec.framework.startswith(KEY):
        _check_impl(spec, path, state)
    return dtype


def _check_impl(spec: ArraySpec, path: str, state: str) -> None:
    impl = spec.framework[len(KEY) :]
    numbers: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype)  # type: ignore[no-untyped-call]  # jax leaves it untyped
    try:
        jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=impl), numbers)
    except (TypeError, ValueError) as error:
        raise UnsupportedState(
            f"these are no keys that jax {jax.__version__} knows: {error}",
            path=path,
            type_name=spec.framework[:80],
            state=state,
            actions=("register its generator first, or load it with framework='numpy'",),
        ) from error


def made(fresh: Fresh, like: Any = None) -> Any:
    """The array of filled host memory, placed as ``like`` is; on the default device without it."""
    sharding = None if like is None else like.sharding
    if sharding is None or not getattr(like, "committed", True):
        return _put(fresh, like, None)
    return _put(fresh, like, sharding)


def on_device(fresh: Fresh, like: Any, device: Any) -> Any:
    """What the host memory of one box becomes on one device of those that ``like`` is on."""
    kind = like.sharding.memory_kind
    return _put(fresh, like, jax.sharding.SingleDeviceSharding(device, memory_kind=kind))


def _put(fresh: Fresh, like: Any, where: Any) -> Any:
    kind = fresh.spec.framework
    array: Any = fresh.host
    casts_to = getattr(like, "casts_to", None)
    if casts_to not in (None, array.dtype):
        size_bytes = array.size * casts_to.itemsize
        array = casting.converted(array, _aligned(size_bytes).view(casts_to).reshape(array.shape))
    if is_key(like) if like is not None else kind.startswith(KEY):
        # An old-style key becomes a new-style one where the template says so.
        impl = kind[len(KEY) :] if kind.startswith(KEY) else _impl(like)
        array = jax.random.wrap_key_data(jax.device_put(array), impl=impl)
    array = jax.device_put(array, where, may_alias=True)
    return _weakened(array) if kind == WEAK else array


def number(live: Any, value: Any) -> Any | None:
    """A number as an array like ``live``, or None where that would not be the same number."""
    kinds = {bool: np.bool_, int: np.integer, float: np.floating}
    kind = kinds.get(type(value))
    if kind is None or live.shape or not jnp.issubdtype(live.dtype, kind):
        return None
    if kind is np.integer:
        limits: Any = jnp.iinfo(live.dtype)  # type: ignore[no-untyped-call]  # jax leaves it untyped
        if not limits.min <= value <= limits.max:
            return None
    weak = WEAK if live.weak_type else PLAIN
    host = np.asarray(value, live.dtype)
    return made(Fresh(host, ArraySpec(live.dtype.name, (), weak)), live)


def _weakened(array: Any) -> Any:
    """The same values with a type that yields to others', as Python's numbers have."""
    scalar: Any = array.dtype.type(0).item()
    weak = jax.lax.full_like(jnp.asarray(scalar), 0, shape=array.shape)
    if weak.dtype != array.dtype or not weak.weak_type:
        return array  # no number of Python's has this type
    return weak.at[...].set(array)


def _aligned(size_bytes: int) -> np.ndarray[Any, Any]:
    memory = np.empty(size_bytes + _ALIGN_BYTES, np.uint8)
    start = -address_of(memory) % _ALIGN_BYTES
    return memory[start : start + size_bytes]


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Where an array's memory starts; 0 for an empty one."""
    return int(array.__array_interface__["data"][0]) if array.nbytes else 0
