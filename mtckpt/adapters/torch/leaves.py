"""Tensors as leaves: what they are, where their bytes lie, and how bytes come back.

Knows dense tensors, parameters and buffers on any device, as views, expanded, with lazy
conjugation or negation. Does not know modules or optimizers (``objects``), nor tensors that are
sharded, sparse, quantised or nested: those are refused with their path. Does not promise speed for
other devices than the CPU and CUDA's: their bytes come through pageable host memory.

Everything that a save calls works on lists; what it asks of each tensor is in ``looks``.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import torch
from torch.nn.parameter import is_lazy

from mtckpt._codecs import CODECS, register_codec
from mtckpt._dtypes import DTYPES
from mtckpt._state import ArraySpec
from mtckpt.adapters.torch import looks
from mtckpt.adapters.torch.looks import Layouts
from mtckpt.capture.addresses import located
from mtckpt.errors import UnsupportedState

__all__ = [
    "FRAMEWORK",
    "addresses_of",
    "assign",
    "bump_versions",
    "identity",
    "laid_out",
    "new_tensor",
    "order_in",
    "order_of",
    "same_bits",
    "spec_of",
    "specs_of",
    "writable_address",
    "writable_addresses",
]

NAME_OF: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in DTYPES if hasattr(torch, name)
}
FRAMEWORK = "torch"
_IN_ORDER = "torch.order"  # and the axes, by descending stride
DTYPE_OF = {name: dtype for dtype, name in NAME_OF.items()}
_ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter})
_storage = torch.Tensor.untyped_storage
_held_bytes = torch.UntypedStorage.nbytes
# Moving bytes as integers asks no kernel for a type that has none (int4, float4) and leaves the
# payload of every NaN alone.
BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def addresses_of(
    values: Sequence[torch.Tensor],
    paths: Sequence[str],
    known: object,
    last: Layouts | None = None,
) -> tuple[list[int], list[torch.Tensor], Layouts | None]:
    """Where the bytes lie, the copies among them, and what to pass as ``last`` the next time.

    ``known`` is the fingerprint just taken of these very values, or anything else. Raises
    UnsupportedState.
    """
    layouts = known if isinstance(known, Layouts) else looks.fingerprint(values)
    odd = layouts.odd
    if layouts.details and not odd:  # some cannot even be described by columns
        odd = list(range(len(values)))
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if not odd:
            if last is not None and layouts.where() == last.where():
                layouts.located = last.located  # the same list: who has seen it need not look again
            else:
                _check_storages(values, layouts.held_bytes, paths)
                layouts.located = located(layouts.addresses, layouts.ordinals)
            return layouts.located, [], layouts
        _check_storages(values, [_held_bytes(_storage(tensor)) for tensor in values], paths)
        copied = {i: _plain_copy(values[i]) for i in odd}
        final = [copied.get(i, tensor) for i, tensor in enumerate(values)]
        addresses = located([tensor.data_ptr() for tensor in final], looks.ordinals_of(final))
    return addresses, list(copied.values()), None


def _check_storages(values: Sequence[torch.Tensor], held: list[int], paths: Sequence[str]) -> None:
    """Raise for a tensor whose memory was given back, is shorter than the tensor, or never was.

    FSDP and donated buffers resize a storage to nothing and keep the tensor; its address then is
    its offset, and reading there kills the process. The zeros that derivatives are made of have a
    storage without memory.
    """
    which = _outside_storage(values, held, [tensor.nbytes for tensor in values])
    if which is not None:
        raise UnsupportedState(
            "this tensor has no memory: it was given back (its storage was resized), or never was",
            path=paths[which] if paths else "",
            wanted_bytes=_end_bytes(values[which]),
            storage_bytes=held[which],
            state="nothing was written",
            actions=("save it while it has its memory, or leave it out of the state",),
        )


def _outside_storage(
    values: Sequence[torch.Tensor], held: list[int], sizes: list[int]
) -> int | None:
    """The first tensor that ends behind its storage, or has none; both hold so many bytes."""
    offsets = [tensor.storage_offset() for tensor in values]
    # No address, which is 0, is below every size but that of an empty tensor.
    reach = map(operator.ge, map(torch.Tensor.data_ptr, values), sizes)
    if sizes == held and not any(offsets) and all(reach):
        return None
    for i, tensor in enumerate(values):
        if tensor.numel() and (_end_bytes(tensor) > held[i] or _is_nowhere(tensor)):
            return i
    return None


def _is_nowhere(tensor: torch.Tensor) -> bool:
    """True for what has no memory; other devices than these need not have addresses."""
    return (tensor.is_cpu or tensor.is_cuda) and not tensor.data_ptr()


def _end_bytes(tensor: torch.Tensor) -> int:
    """Where the last element ends in its storage."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in C order: of a CUDA tensor on its device, of any other in host memory."""
    with warnings.catch_warnings():
        # complex32 warns that it is experimental; moving its bytes is not.
        warnings.simplefilter("ignore", UserWarning)
        real = tensor.detach().resolve_conj().resolve_neg()
        dense = _bits(real).contiguous()
        # A blocking copy on the current stream: it comes after what that stream still has to do.
        host = dense if looks.ordinals_of([dense])[0] >= 0 else dense.cpu()
        # .cpu() and .contiguous() hand back what already fits; a copy is never the live tensor.
        return host.clone() if host.data_ptr() == tensor.data_ptr() else host


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same size; complex128 stays what it is."""
    bits = BITS_OF.get(tensor.element_size())
    return tensor if bits is None else tensor.view(bits)


def identity(tensor: torch.Tensor) -> object | None:
    """Equal for two tensors that are the same bytes with the same shape."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return None
    return (
        tensor.data_ptr(),
        tensor.device,
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def spec_of(tensor: torch.Tensor, path: str, *, template: bool = False) -> ArraySpec:
    """Type and shape. A template may be on the meta device; what is saved must have bytes."""
    what, action = _refusal(tensor, template)
    if what:
        raise UnsupportedState(
            f"cannot save {what}",
            path=path,
            type_name=type(tensor).__qualname__,
            state="live state unchanged" if template else "nothing was written",
            actions=(action,),
        )
    kind = "" if template else "".join(f".{axis}" for axis in order_of(tensor))
    framework = _IN_ORDER + kind if kind else FRAMEWORK
    return ArraySpec(NAME_OF[tensor.dtype], tuple(tensor.shape), framework)


def specs_of(values: Sequence[torch.Tensor]) -> tuple[list[ArraySpec], Layouts] | None:
    """``spec_of`` of many, and their fingerprint; None unless all are plain, and can be saved."""
    if not _ORDINARY.issuperset(map(type, values)):
        return None
    found = looks.fingerprint(values)
    if found.odd or found.details or not NAME_OF.keys() >= set(found.dtypes):
        return None
    kinds = list(zip(found.dtypes, found.shapes, strict=True))
    specs = {
        (dtype, shape): ArraySpec(NAME_OF[dtype], tuple(shape), FRAMEWORK)
        for dtype, shape in set(kinds)
    }
    return list(map(specs.__getitem__, kinds)), found


def order_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes by how far apart their elements lie, where that is not their own order.

    Empty for tensors with holes or overlaps too: they come back without. The order is no part of a
    value, but sums are taken along it: a matrix that comes back transposed in memory gives other
    last digits than one that was never away.
    """
    if tensor.is_contiguous() or not tensor.numel():
        return ()
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    return order if tensor.permute(order).is_contiguous() else ()


def order_in(spec: ArraySpec) -> tuple[int, ...]:
    """What ``order_of`` said of the tensor that was saved; empty for what no order can be."""
    axes = spec.framework.removeprefix(_IN_ORDER + ".").split(".")
    if not spec.framework.startswith(_IN_ORDER) or not all(map(str.isdecimal, axes)):
        return ()
    order = tuple(map(int, axes))
    return order if sorted(order) == list(range(len(spec.whole_shape))) else ()


def laid_out(fresh: torch.Tensor, spec: ArraySpec) -> torch.Tensor:
    """The same tensor with its elements in the order of ``spec`` in memory."""
    order = order_in(spec)
    if order and not fresh.permute(order).is_contiguous():
        shape = tuple(fresh.shape[axis] for axis in order)
        moved, _ = new_tensor(ArraySpec(spec.dtype, shape, FRAMEWORK))
        target = moved.permute([order.index(axis) for axis in range(len(order))])
        assign(target, fresh)
        # In place: another leaf may be this very tensor.
        fresh.set_(target.untyped_storage(), 0, target.shape, target.stride())
    return fresh


def _refusal(tensor: torch.Tensor, template: bool) -> tuple[str, str]:
    """What kind of tensor this is and what to do instead; two empty strings if it can be saved."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "a parameter of a lazy module before it has a shape", "run one forward pass first"
    if tensor.is_nested:
        return "a nested tensor", "save the tensors of .unbind(), or .values() and .offsets()"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"a tensor of type {kind.__module__}.{kind.__qualname__}, which is more than its bytes",
            "save the plain tensors it is made of, or describe it once with mtckpt.register_codec",
        )
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})", (
            "save its indices and values, or .to_dense(); a buffer that is built again anyway:"
            " register_buffer(..., persistent=False)"
        )
    if tensor.is_quantized:
        return "a quantised tensor", (
            "save .int_repr(), .q_scale() and .q_zero_point(); of a quantised module, save the one"
            " that it was made of, and quantise that again after restore()"
        )
    if tensor.dtype not in NAME_OF:
        return f"a tensor of type {tensor.dtype}", "save it as another type, or leave it out"
    if tensor.is_meta and not template:
        return "a tensor on the meta device: it has no bytes", "give it memory with .to_empty()"
    return "", ""


def writable_address(tensor: torch.Tensor) -> int | None:
    """The address of a plain tensor whose storage holds all of it."""
    if not looks.is_plain(tensor):
        return None
    if _outside_storage([tensor], [_held_bytes(_storage(tensor))], [tensor.nbytes]) is not None:
        return None
    return located([tensor.data_ptr()], looks.ordinals_of([tensor]))[0]


def writable_addresses(
    values: Sequence[torch.Tensor], specs: Sequence[ArraySpec]
) -> list[int] | None:
    """Addresses of tensors that all are plain and as their specs say, 0 for empty ones; or None."""
    if not _ORDINARY.issuperset(map(type, values)):
        return None
    # Of many tensors that are of few kinds, one of each is looked at, and compared with the others.
    kinds = list(map(id, specs))
    some = dict(zip(kinds, zip(values, specs, strict=True), strict=True))
    guarding = looks.guarding() if 2 * len(some) < len(values) else None
    if guarding:
        one_each, what_they_are = zip(*some.values(), strict=True)
        if _writable(one_each, what_they_are) is None:
            return None
    examples = [some[kind][0] for kind in kinds]
    addresses: list[int] = []
    blocks = zip(*map(looks.in_blocks, (values, specs, examples)), strict=True)
    for block, wanted, example in blocks:
        found = _writable(block, wanted, guarding and guarding(example))
        if found is None:
            return None
        addresses += found
    return addresses


def _writable(
    block: Sequence[torch.Tensor], specs: Sequence[ArraySpec], guard: looks.Guard | None = None
) -> list[int] | None:
    """``writable_addresses`` of a few, which come into the cache but once.

    ``guard`` is true for what is as plain as others that are as the specs say.
    """
    with torch._C.DisableTorchFunction():
        if not (guard and guard(*block)) and not _are(block, specs):
            return None
        addresses = list(map(torch.Tensor.data_ptr, block))  # 0 for an empty one
        held_bytes = list(map(_held_bytes, map(_storage, block)))
        if _outside_storage(block, held_bytes, [tensor.nbytes for tensor in block]) is not None:
            return None
        return located(addresses, looks.ordinals_of(block))


def _are(block: Sequence[torch.Tensor], specs: Sequence[ArraySpec]) -> bool:
    """True if all are plain, and have the types and shapes of these specs."""
    try:
        dtypes, shapes, *_, (plain,) = looks.look(block)
    except RuntimeError:  # sparse and nested tensors have no address, nested ones no shape
        return False
    return (
        dtypes == [DTYPE_OF.get(spec.dtype) for spec in specs]
        and shapes == [spec.shape for spec in specs]
        and (plain or all(map(looks.is_plain, block)))
    )


def new_tensor(spec: ArraySpec, path: str = "") -> tuple[torch.Tensor, int]:
    """An empty host tensor in memory of its own, whatever default device is set.

    Raises MemoryError, and UnsupportedState for a type that this torch lacks.
    """
    dtype = DTYPE_OF.get(spec.dtype)
    if dtype is None:
        raise UnsupportedState(
            f"torch {torch.__version__} has no type {spec.dtype}",
            path=path,
            type_name=spec.dtype,
            state="live state unchanged",
            actions=("restore with a torch that has it, or read it with mtckpt.load",),
        )
    try:
        if dtype is torch.complex32:  # its own constructor warns that it is experimental
            pairs = torch.empty((*spec.shape, 2), dtype=torch.float16, device="cpu")
            tensor = torch.view_as_complex(pairs)
        else:
            tensor = torch.empty(spec.shape, dtype=dtype, device="cpu")
    except RuntimeError as error:  # of its allocator
        raise MemoryError(str(error).splitlines()[0]) from error
    return tensor, tensor.data_ptr()


def assign(live: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Copy into a live tensor; returns ``live``, or ``fresh`` where the live one has no memory."""
    if live.is_meta:
        return fresh.requires_grad_(live.requires_grad)
    with torch.inference_mode(live.is_inference()), torch.no_grad():
        target = live.detach()
        source = fresh
        for dim, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
            if size > 1 and stride == 0:  # expanded: one element of memory for the whole dimension
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        if source.shape != fresh.shape and not same_bits(source.expand_as(fresh), fresh):
            live.data = fresh  # what was one element when expanded is several in the checkpoint
        elif target.is_conj() or target.is_neg():
            target.copy_(source)
        else:
            _bits(target).copy_(_bits(source))
    return live


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors of one type and shape have the same bits, whatever they mean."""
    return torch.equal(_bits(one), _bits(other))


def bump_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that bytes were written behind its back, as in-place operations would."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # some are of inference mode, which count nothing
        counting = [tensor for tensor in tensors if not tensor.is_inference()]
        torch.autograd.graph.increment_version(counting)


def _dtype_named(name: object) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise _not_here("dtype", name)
    return dtype


def _device_named(name: object) -> torch.device:
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise _not_here("device", name) from error


def _not_here(kind: str, name: object) -> UnsupportedState:
    return UnsupportedState(
        f"torch {torch.__version__} has no {kind} {name!r}",
        path="",
        type_name=kind,
        state="live state unchanged",
        actions=("restore with a torch that has it",),
    )


# Settings of users name devices, those of optimizers and quantised modules types.
if torch.device not in CODECS:
    register_codec(torch.device, name="torch.device", encode=str, decode=_device_named)
if torch.dtype not in CODECS:
    register_codec(
        torch.dtype,
        name="torch.dtype",
        encode=lambda dtype: str(dtype).removeprefix("torch."),
        decode=_dtype_named,
    )
