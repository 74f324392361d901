"""Who has to go when too many have connected that have not proved anything yet. Pure.

Knows how many may be there at a time, in all and from one place, and who makes room for one more.
Does not know sockets, nor what a proof is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Stranger", "source_of", "who_goes"]

# An IPv6 host has a network of this many bits for itself, and as many addresses as it likes.
_IPV6_HOST_BITS = 64


class Stranger(Protocol):
    """A connection: the place that it came from (``source_of``), and when."""

    @property
    def source(self) -> str: ...

    @property
    def since_s(self) -> float: ...


_S = TypeVar("_S", bound=Stranger)


def source_of(host: str) -> str:
    """The place that is counted as one: an IPv4 address, or the network of an IPv6 host."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address.packed, _IPV6_HOST_BITS), strict=False))


def who_goes(strangers: Iterable[_S], source: str, most: int, most_of_one: int) -> _S | None:
    """The one that has to go before another from ``source`` comes; None while there is room.

    It is the oldest from the place that has the most: whoever floods a port ends his own, and the
    few words of somebody from elsewhere come through meanwhile.
    """
    by_source: dict[str, list[_S]] = {}
    for stranger in strangers:
        by_source.setdefault(stranger.source, []).append(stranger)
    own = by_source.get(source, [])
    if len(own) >= most_of_one:
        crowd = own
    elif sum(map(len, by_source.values())) >= most:
        crowd = max(by_source.values(), key=len)
    else:
        return None
    return min(crowd, key=lambda stranger: stranger.since_s)
