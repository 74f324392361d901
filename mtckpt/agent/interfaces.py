"""Which address and ports of this node other nodes are to reach it at: one address, never all.

Knows routes and interfaces as the kernel tells them; nothing is sent. Does not listen.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import struct
import sys

from mtckpt.errors import UsageError

if sys.platform != "win32":
    import fcntl

__all__ = ["choose_host", "fixed_ports"]

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")
# Addresses for documentation: no host has one, so the route to it is the default route.
_ANYWHERE = ("192.0.2.1", "2001:db8::1")
_ANY_PORT = 9


def choose_host(wanted: str, towards: str) -> str:
    """An address of this node: ``wanted`` (an address, or an interface's name), else the one that
    packets to ``towards`` leave from, else the default route's. Raises UsageError.

    A node often calls itself by a name that means its loopback, as other nodes do not understand
    it: that is chosen where ``towards`` says so in numbers, or as localhost, or there is no other.
    """
    if wanted:
        return _named(wanted)
    loopback = None
    for place in (towards, *_ANYWHERE) if towards else _ANYWHERE:
        found = _route_to(place)
        if found is None:
            continue
        if ipaddress.ip_address(found).is_loopback and not _is_loopback(place):
            loopback = loopback or found
            continue
        return found
    if loopback is not None:
        return loopback
    raise UsageError(
        "this node has no route to any other",
        state="nothing listens for other nodes",
        actions=["set MTCKPT_PEER_HOST to an address of this node, or to an interface's name"],
        towards=towards,
    )


def _is_loopback(place: str) -> bool:
    try:
        return place == "localhost" or ipaddress.ip_address(place).is_loopback
    except ValueError:
        return False


def fixed_ports() -> tuple[int, int] | None:
    """The ports for small messages and for bytes that MTCKPT_PEER_PORTS names, for rules of a
    network; None: any that are free. Raises UsageError."""
    text = os.environ.get("MTCKPT_PEER_PORTS", "")
    if not text:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", text)
    ports = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(0 < port < 1 << 16 for port in ports) or ports[0] == ports[1]:
        raise UsageError(
            f"MTCKPT_PEER_PORTS={text[:40]!r} is not two ports such as 7600,7601",
            state="nothing listens for other nodes",
        )
    return ports


def _named(wanted: str) -> str:
    try:
        given = ipaddress.ip_address(wanted)
    except ValueError:
        return _address_of(wanted)
    if given.is_unspecified:
        raise UsageError(
            "MTCKPT_PEER_HOST names every interface of this node",
            state="nothing listens for other nodes",
            actions=["name one: its address, or its name as in `ip addr`"],
            host=wanted,
        )
    return wanted


def _address_of(interface: str) -> str:
    """The first IPv4 address of an interface, else its first global IPv6 one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = _IFREQ.pack(interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope == "00":
                return str(ipaddress.IPv6Address(int(digits, 16)))
    raise UsageError(
        "MTCKPT_PEER_HOST is neither an address nor an interface that has one",
        state="nothing listens for other nodes",
        actions=["see what there is: ip addr"],
        host=interface,
    )


def _route_to(place: str) -> str | None:
    """The address that packets to ``place`` would leave from; None if there is no way."""
    try:
        found = socket.getaddrinfo(place, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, number, _, where in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, number) as probe:
            probe.connect(where)  # of datagrams: a look at the routes, and nothing else
            return str(probe.getsockname()[0])
    return None
