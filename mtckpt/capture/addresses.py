"""Addresses that know which device their memory belongs to.

A plain ``int`` is an address in host memory. Host and devices share one range of addresses, so one
of a device is still unique, and may stand in any list of addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtckpt.capture.base import Span

__all__ = ["OnDevice", "by_device", "has_devices", "located", "must_be_awaited", "on_device"]


class OnDevice(int):
    """An address in the memory of CUDA device ``ordinal``, as this process counts them.

    ``awaited``: whoever owns it lets nobody order his next work behind a read of it, so that the
    host has to wait until it is read.
    """

    ordinal = -1
    awaited = False

    def __add__(self, offset: int) -> OnDevice:
        return type(self)(int.__add__(self, offset))

    __radd__ = __add__


@functools.cache
def on_device(ordinal: int, *, awaited: bool = False) -> type[OnDevice]:
    """The addresses of one device."""
    name = f"{'Awaited' if awaited else ''}OnDevice{ordinal}"
    return type(name, (OnDevice,), {"ordinal": ordinal, "awaited": awaited})


def located(addresses: Sequence[int], ordinals: Sequence[int]) -> list[int]:
    """The addresses with their devices; an ordinal below 0 means host memory."""
    if max(ordinals, default=-1) < 0:
        return list(addresses)
    return [
        on_device(ordinal)(address) if ordinal >= 0 and address else address
        for address, ordinal in zip(addresses, ordinals, strict=True)
    ]


def has_devices(addresses: Iterable[int]) -> bool:
    """True if one of the addresses belongs to a device."""
    return not {int}.issuperset(map(type, addresses))


def by_device(
    addresses: Sequence[int], spans: Sequence[Span]
) -> tuple[dict[int, list[int]], list[int]]:
    """Which addresses are on each device, and which in host memory; those of no bytes nowhere."""
    there: dict[int, list[int]] = {}
    on_host: list[int] = []
    for i, (address, span) in enumerate(zip(addresses, spans, strict=True)):
        if not span.size_bytes:
            continue
        if isinstance(address, OnDevice):
            there.setdefault(address.ordinal, []).append(i)
        else:
            on_host.append(i)
    return there, on_host


def must_be_awaited(addresses: Iterable[int]) -> bool:
    """True if one of the addresses is ``awaited``."""
    return any(getattr(kind, "awaited", False) for kind in set(map(type, addresses)))
