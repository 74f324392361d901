"""What a save asks every tensor: type, shape, layout, device, and where its bytes lie.

Knows columns of many tensors, and how to see quickly that all of them are as they were. Does not
know paths, copies or what a tensor may be (``leaves``). Everything here works on lists and keeps to
calls that make no Python object where it can: 20,000 tensors are looked at in some 10 ms.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mtckpt.capture.driver import Driver

__all__ = [
    "COMPLEX",
    "Guard",
    "Layouts",
    "fingerprint",
    "guarding",
    "in_blocks",
    "is_plain",
    "look",
    "on_host",
    "ordinals_of",
    "unchanged",
]

COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
_storage = torch.Tensor.untyped_storage
_held_bytes = torch.UntypedStorage.nbytes
_device_of = torch.Tensor.get_device
_is_ordinal = (0).__le__
# So many tensors, with their storages, stay in a first-level cache while they are asked.
_BLOCK = 128
Guard = Callable[..., bool]


@dataclass(slots=True)
class Layouts:
    """The fingerprint of a list of tensors, by column; ``odd`` are those that are not plain.

    A plain tensor is a dense one in host memory, or in that of a CUDA device (``ordinals``, below 0
    for the host), whose bytes are its elements in C order.
    ``details`` says of the others what the columns do not. Where the bytes lie and how long the
    storages are is looked up along with it and no part of what is compared.
    """

    dtypes: list[Any] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    odd: list[int] = field(default_factory=list)
    details: list[object] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list, compare=False)
    held_bytes: list[int] = field(default_factory=list, compare=False)
    located: list[int] = field(default_factory=list, compare=False)
    guards: list[Guard] = field(default_factory=list, compare=False)

    def where(self) -> tuple[object, ...]:
        """All of it. As long as this is the same, tensors that lay in their storages still do."""
        return (self.addresses, self.held_bytes, self)


def ordinals_of(block: Sequence[torch.Tensor]) -> list[int]:
    """The CUDA device of each tensor; below 0 for the host's and other devices' memory."""
    there = [tensor.is_cuda for tensor in block]
    if not any(there) or torch.version.cuda is None or Driver.load() is None:
        return [-1] * len(block)
    if all(there):
        return [0] * len(block) if torch.cuda.device_count() == 1 else list(map(_device_of, block))
    return [
        _device_of(tensor) if is_there else -1
        for tensor, is_there in zip(block, there, strict=True)
    ]


def on_host(block: Sequence[torch.Tensor]) -> list[bool]:
    """Which of the tensors are in host memory."""
    return [tensor.is_cpu for tensor in block]


def is_plain(tensor: torch.Tensor) -> bool:
    """True if the tensor's bytes, in memory that bytes can be copied to, are those of its elements.

    In C order, in host memory or that of a CUDA device.
    """
    return bool(
        (on_host([tensor])[0] or ordinals_of([tensor])[0] >= 0)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def fingerprint(values: Sequence[torch.Tensor]) -> Layouts:
    """Compares equal exactly when dtype, shape, layout and device of all do. Never raises."""
    found = Layouts()
    columns = (found.dtypes, found.shapes, found.ordinals, found.addresses, found.held_bytes)
    plain = True
    # Without this, torch.set_default_device and the like add microseconds to every call.
    with torch._C.DisableTorchFunction():
        try:
            for block in in_blocks(values):
                *more, (all_plain,) = look(block)
                for column, values_of_it in zip(columns, more, strict=True):
                    column += values_of_it
                plain = all_plain and plain
        except RuntimeError:  # sparse and nested tensors have no strides, nested ones no shape
            return Layouts(details=[_details(tensor) for tensor in values])
        if not plain:
            found.odd = [i for i, tensor in enumerate(values) if not is_plain(tensor)]
            found.details = [_details(values[i]) for i in found.odd]
    return found


def unchanged(values: Sequence[torch.Tensor], last: Layouts) -> bool:
    """True if all is as in ``last``, of plain tensors: types, layouts, addresses and storages.

    Not a tensor is taken at its word, least of all at its ``_version``: every one is asked for all
    of that, at every save. What was asked is compared and forgotten before the next is asked for,
    so that nothing of it takes memory of its own.
    """
    if len(values) != len(last.dtypes) or last.odd or last.details:
        return False
    with torch._C.DisableTorchFunction():
        if last.guards:
            where = map(in_blocks, (values, last.addresses, last.held_bytes))
            return all(map(_is_as_guarded, last.guards, *where))
        known = (last.dtypes, last.shapes, last.ordinals, last.addresses, last.held_bytes)
        for block, *expected in zip(in_blocks(values), *map(in_blocks, known), strict=True):
            try:
                if not all(map(operator.eq, look(block), (*expected, [True]))):
                    return False
            except RuntimeError:  # see ``fingerprint``
                return False
        guard = guarding()
        last.guards = [] if guard is None else [guard(block) for block in in_blocks(values)]
    return True


@functools.cache
def guarding() -> Callable[[Sequence[torch.Tensor]], Guard] | None:
    """What remembers types, shapes, strides and devices of tensors, and compares those of others.

    It is how torch.compile guards what it has compiled: one call for many tensors, in a tenth of
    the time. It is not public, so it is believed only where it tells apart what has to be told
    apart; None where it does not.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        def guard(block: Sequence[torch.Tensor]) -> Guard:
            guards = TensorGuards(*block, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            check: Guard = guards.check
            return check

        known = torch.zeros(2, 2, device="cpu")
        check = guard([known])
        others = [
            torch.nn.Parameter(known, requires_grad=False),
            torch.zeros(2, 2, dtype=torch.int32, device="cpu"),
            torch.zeros(4, device="cpu"),
            torch.zeros(2, 3, device="cpu"),
            known.t(),
            torch._neg_view(known),
            known.to("meta"),
            known.to_sparse(),
        ]
        pair = torch.zeros(2, dtype=torch.complex64, device="cpu")
        is_told = not any(map(check, others)) and not guard([pair])(pair.conj())
        if is_told and check(torch.ones(2, 2, device="cpu")) is True:
            return guard
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        pass  # another torch, in which it is something else
    return None


def _is_as_guarded(
    guard: Guard,
    block: Sequence[torch.Tensor],
    addresses: Sequence[int],
    held_bytes: Sequence[int],
) -> bool:
    return (
        guard(*block)
        and list(map(torch.Tensor.data_ptr, block)) == addresses
        and list(map(_held_bytes, map(_storage, block))) == held_bytes
    )


def in_blocks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK))


def look(block: Sequence[torch.Tensor]) -> Iterator[list[Any]]:
    """The columns of a few tensors, which come into the cache but once: dtypes, shapes, ordinals,
    addresses, lengths of their storages, and last whether all are plain.

    The first look at a tensor costs as much as all others together.
    """
    dtypes = [tensor.dtype for tensor in block]
    yield dtypes
    yield list(map(torch.Tensor.size, block))
    here = on_host(block)
    all_here = all(here)
    ordinals = [-1] * len(block) if all_here else ordinals_of(block)
    yield ordinals
    yield list(map(torch.Tensor.data_ptr, block))
    yield list(map(_held_bytes, map(_storage, block)))
    within_reach = all_here or all(map(operator.or_, here, map(_is_ordinal, ordinals)))
    yield [
        all(map(torch.Tensor.is_contiguous, block))
        and within_reach
        and not any(map(torch.Tensor.is_neg, block))
        and COMPLEX.isdisjoint(dtypes)
    ]


def _details(tensor: torch.Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return (tensor.dtype, tensor.device, tensor.layout, tensor.is_nested)
    shape = tuple(tensor.shape)
    return (
        *(tensor.dtype, shape, tensor.stride(), tensor.device),
        *(tensor.is_conj(), tensor.is_neg()),
    )
