"""Arrays of JAX as leaves: what they are, where their bytes lie, and how bytes become arrays.

Knows ``jax.Array`` of every type and sharding that this process can read, ``jax.random`` keys of
both styles, and ``jax.ShapeDtypeStruct`` as a template. Does not know pytrees (``nodes``). Does not
promise speed for other devices than the CPU and CUDA's: their bytes come through host memory of
JAX's own.

JAX's arrays never change, so nothing is ever written into one that somebody has seen: bytes go into
fresh host memory, aligned so that a CPU device adopts it as it is, and become new arrays.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from mtckpt._dtypes import check_dtype, name_of
from mtckpt._state import ArraySpec
from mtckpt.adapters.jax import casting
from mtckpt.adapters.jax.arriving import Arriving, Kind, empties
from mtckpt.adapters.jax.hosting import address_of, aligned
from mtckpt.adapters.jax.meshes import misfit, sharding_of
from mtckpt.capture.addresses import on_device as addresses_on
from mtckpt.capture.driver import Driver
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
    "is_as_held",
    "is_leaf",
    "made",
    "new",
    "number",
    "on_device",
    "ordinal_of",
    "reserved",
    "spec_of",
    "weakened",
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
# What a sharding says of memory that is the device's, and not the host's beside it.
_OWN_MEMORY = (None, "device")
_dtype, _shape, _sharding = map(operator.attrgetter, ("dtype", "shape", "sharding"))


@dataclass(frozen=True, slots=True)
class Fresh:
    """Host memory that is waiting for bytes, and what they will be."""

    host: np.ndarray[Any, Any]
    spec: ArraySpec

    @property
    def is_weak(self) -> bool:
        return self.spec.framework == WEAK


def is_leaf(value: object) -> bool:
    """True for arrays, keys and tracers (which ``spec_of`` refuses), and for their descriptions."""
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct))


def is_key(value: Any) -> bool:
    """True for an array of new-style random keys."""
    return not _is_plain(value) and bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))


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
    name = check_dtype(name_of(value.dtype), path)
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
        return "", ""
    if template:
        return "", ""
    if value.is_deleted():
        return (
            "the memory of this array was given back: it was donated or deleted",
            "save the arrays that the step returned, not those that were donated to it",
        )
    return misfit(value), "let every process save what has a part on a device of its own"


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
            sharding._device
            if type(sharding) is SingleDeviceSharding and sharding._memory_kind in _OWN_MEMORY
            else sharding
            for sharding in map(_sharding, values)
        ],
    ]


def addresses_of(
    values: Sequence[Any], paths: Sequence[str], columns: Sequence[Sequence[Any]]
) -> tuple[list[int], list[np.ndarray[Any, Any]]]:
    """Where the bytes lie once they are computed, and the copies among them.

    On one CPU device or CUDA device that is where XLA keeps them; from all others they are copied
    to host memory. ``columns`` is the fingerprint of these very arrays.
    """
    dtypes, shapes, _, placements = columns
    kinds = set(dtypes)
    keys = {kind for kind in kinds if not isinstance(kind, np.dtype)}
    apart = {kind for kind in kinds - keys if kind not in _PACKED_ON_DEVICE}
    _wait(values, paths, [i for i, kind in enumerate(dtypes) if kind in keys] if keys else [])
    here = {placement: _memory_of(placement) for placement in set(placements)}
    addresses: list[int] = []
    others = []
    for value, dtype, shape, placement in zip(values, dtypes, shapes, placements, strict=True):
        memory = here[placement]
        if memory and dtype in apart and (len(shape) < 2 or _is_in_c_order(value)):
            addresses.append(memory(value.unsafe_buffer_pointer()))
        else:
            others.append((len(addresses), _one_of_many(value)))
            addresses.append(0)
    copied = []
    for at, piece in others:
        memory = _memory_of(piece.sharding)
        if memory and _is_dense(piece):  # a part of an array, which keeps it
            addresses[at] = memory(piece.unsafe_buffer_pointer())
        else:
            piece.copy_to_host_async()  # all devices at once; on a CPU there is nothing to do
            copied.append((at, piece))
    copies: list[np.ndarray[Any, Any]] = []
    for at, piece in copied:
        copy = np.ascontiguousarray(np.asarray(piece))
        addresses[at] = address_of(copy)
        copies.append(copy)
    return addresses, copies


def _memory_of(placement: Any) -> type[int] | None:
    """The addresses of the memory of one device, or of a sharding over one; None out of reach.

    XLA's own stream cannot be made to wait until such memory was read, and gives it to others as
    soon as an array is donated or deleted.
    """
    devices = getattr(placement, "device_set", None) or {placement}
    if len(devices) != 1:
        return None
    (device,) = devices
    if getattr(placement, "memory_kind", None) in _OWN_MEMORY:
        ordinal = ordinal_of(device)
        if ordinal >= 0:
            return addresses_on(ordinal, awaited=True)
    return int if device.platform == "cpu" else None


@functools.cache
def ordinal_of(device: Any) -> int:
    """The CUDA device that one of JAX's is; below 0 for the host and other kinds of devices.

    The driver tells it by an address: neither library has to count as the other does.
    """
    driver = None if device.platform == "cpu" else Driver.load()
    if driver is None:
        return -1
    probe: Any = jax.device_put(np.zeros(1, np.uint8), device)
    with driver.current(device.local_hardware_id):
        ordinal = driver.ordinal_of(probe.unsafe_buffer_pointer())
    return -1 if ordinal is None else ordinal


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


def new(spec: ArraySpec, like: Any = None) -> tuple[Fresh | Arriving, int | None]:
    """Memory for an array that is to stand in the place of ``like``: host's, or its device's,
    which is ``reserved`` later.

    Raises UnsupportedState where JAX would not keep its type.
    """
    casts_to = getattr(like, "casts_to", None)
    kept = spec if casts_to is None else spec._replace(dtype=casts_to.name)
    dtype = check(kept, "", state="live state unchanged")
    if casts_to is not None:
        dtype = casting.stored_type(spec)
    if like is not None and casts_to in (None, dtype) and _is_dense_kind(spec, dtype):
        place = _place_of(like)
        if place is not None and (ordinal := ordinal_of(place[0])) >= 0:
            return Arriving(Kind(spec.shape, dtype, place[1]), ordinal), None
    return _on_host(spec, dtype)


def _on_host(spec: ArraySpec, dtype: np.dtype[Any]) -> tuple[Fresh, int]:
    host = aligned(spec.size_bytes).view(dtype).reshape(spec.shape)
    return Fresh(host, spec), address_of(host)


def _is_dense_kind(spec: ArraySpec, dtype: np.dtype[Any]) -> bool:
    """True for what a device holds as the file does, and needs nothing done to it there."""
    return spec.framework == PLAIN and dtype not in _PACKED_ON_DEVICE and spec.size_bytes > 0


def reserved(arrivings: Sequence[Arriving]) -> list[int]:
    """Have arrays of no values yet on their devices; where their memory is."""
    arrays = empties([arriving.kind for arriving in arrivings])
    # Until now XLA may still have used this memory for others.
    jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]  # jax leaves it untyped
    addresses: list[int] = []
    for arriving, array in zip(arrivings, arrays, strict=True):
        if _is_dense(array):
            arriving.array = array
            addresses.append(addresses_on(arriving.ordinal)(array.unsafe_buffer_pointer()))
        else:
            shape, dtype, _ = arriving.kind
            arriving.host, address = _on_host(ArraySpec(dtype.name, shape, PLAIN), dtype)
            addresses.append(address)
    return addresses


def _place_of(like: Any) -> tuple[Any, Sharding | None] | None:
    """A device that holds all of ``like``, and what puts an array there; None if there is none.

    Without a sharding it is put on the default device, and not committed to it.
    """
    sharding = sharding_of(like)
    if is_key(like):
        return None
    if sharding is None or not getattr(like, "committed", True):
        config: Any = jax.config  # jax leaves its options untyped
        default = config.jax_default_device
        if default is None or isinstance(default, str):
            default = jax.local_devices(backend=default)[0]
        return default, None
    if sharding.memory_kind not in _OWN_MEMORY or not sharding.is_fully_replicated:
        return None
    device = min(sharding.addressable_devices, key=operator.attrgetter("id"))
    return device, SingleDeviceSharding(device)


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


def made(fresh: Fresh | Arriving, like: Any = None) -> Any:
    """The array of filled memory, placed as ``like`` is; on the default device without it."""
    is_bound = like is not None and getattr(like, "committed", True)
    sharding = sharding_of(like) if is_bound else None
    fresh = _filled(fresh)
    if isinstance(fresh, Fresh):
        return _put(fresh, like, sharding)
    array = fresh.array
    if sharding is None or sharding.num_devices == 1:
        same = array.sharding == sharding
        return array if same else jax.device_put(array, sharding, may_alias=True)
    arrays = [jax.device_put(array, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, arrays)


def is_as_held(fresh: Fresh | Arriving, like: Any) -> TypeGuard[Fresh]:
    """True for host memory with the very bytes that ``like``'s devices are to have."""
    return (
        isinstance(fresh, Fresh)
        and fresh.spec.framework in (PLAIN, WEAK)
        and getattr(like, "casts_to", None) in (None, fresh.host.dtype)
        and not is_key(like)
    )


def on_device(fresh: Fresh | Arriving, like: Any, device: Any) -> Any:
    """What the memory of one box becomes on one device of those that ``like`` is on."""
    kind = like.sharding.memory_kind
    there = SingleDeviceSharding(device, memory_kind=kind)
    fresh = _filled(fresh)
    if isinstance(fresh, Arriving):
        return jax.device_put(fresh.array, there, may_alias=True)
    return _put(fresh, like, there)


def _filled(fresh: Fresh | Arriving) -> Fresh | Arriving:
    """Where the bytes are by now."""
    host: Fresh | None = fresh.host if isinstance(fresh, Arriving) else None
    return host or fresh


def _put(fresh: Fresh, like: Any, where: Any) -> Any:
    kind = fresh.spec.framework
    array: Any = fresh.host
    casts_to = getattr(like, "casts_to", None)
    if casts_to not in (None, array.dtype):
        size_bytes = array.size * casts_to.itemsize
        array = casting.converted(array, aligned(size_bytes).view(casts_to).reshape(array.shape))
    if is_key(like) if like is not None else kind.startswith(KEY):
        # An old-style key becomes a new-style one where the template says so.
        impl = kind[len(KEY) :] if kind.startswith(KEY) else _impl(like)
        array = jax.random.wrap_key_data(jax.device_put(array), impl=impl)
    if isinstance(host := array, np.ndarray) and type(where) is SingleDeviceSharding:
        array = jax.make_array_from_callback(host.shape, where, lambda _: host)  # in half the time
    else:
        array = jax.device_put(array, where, may_alias=True)
    return weakened(array) if kind == WEAK else array


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


def weakened(array: Any) -> Any:
    """The same values with a type that yields to others', as Python's numbers have."""
    scalar: Any = array.dtype.type(0).item()
    weak = jax.lax.full_like(jnp.asarray(scalar), 0, shape=array.shape)
    if weak.dtype != array.dtype or not weak.weak_type:
        return array  # no number of Python's has this type
    return weak.at[...].set(array)
