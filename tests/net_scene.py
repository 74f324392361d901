"""Nodes as network namespaces: each with an address, a host name, memory and a disk of its own.

All hosts hang on one bridge, which is in a namespace too: nothing of this machine's own network is
touched. A host can lose its cable, some of its packets, those of one other host, or everything.
Processes and files are reached from outside as ever: only the network is divided.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import _isolation
from node_scene import Node

_PREFIX = "mtk-"
_SUBNET = "10.77.0."
_networks = itertools.count()
# Set in the namespace of the host alone, and before anything there asks for it.
_NAMED = 'hostname "$0" && exec "$@"'


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


class Network:
    """A switch, and what is plugged into it."""

    def __init__(self, path: Path) -> None:
        _sweep_dead()
        self.path = path
        self._name = f"{_PREFIX}{os.getpid()}-{next(_networks)}"
        self._ports = itertools.count(1)
        self._hosts: list[Host] = []
        _ip("netns", "add", self._name)
        _ip("-n", self._name, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", self._name, "link", "set", "br0", "up")

    def host(self, name: str) -> Host:
        """A host that is plugged in. The first one is where the job's ranks meet."""
        number = next(self._ports)
        made = Host(self, name, number, f"{self._name}-{number}", f"port{number}", self._name)
        self._hosts.append(made)
        return made

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        _delete(self._name)


class Host(Node):
    """One host. ``Node.start`` starts ranks on it; they find their address by the route to the
    first host, as on a real network."""

    def __init__(
        self, network: Network, name: str, number: int, namespace: str, port: str, switch: str
    ) -> None:
        super().__init__(network.path, name, host="")
        self.address = f"{_SUBNET}{number}"
        self.namespace = namespace
        self._port, self._switch = port, switch
        self.prefix = [*self.inside, "unshare", "--uts", "sh", "-c", _NAMED, name]
        self.environment["MASTER_ADDR"] = f"{_SUBNET}1"
        _ip("netns", "add", namespace)
        _ip("link", "add", "name", "eth0", "netns", namespace, "type", "veth",
            "peer", "name", port, "netns", switch)  # fmt: skip
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        for words in (
            ("addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", namespace, *words)

    @property
    def inside(self) -> list[str]:
        """Words before a command that runs on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def output(self, *words: str) -> str:
        """What a command prints on this host."""
        return _run(*self.inside, *words)

    # -- the network -----------------------------------------------------------------------------

    def rule(self, *words: str) -> None:
        """A rule for the packets that come in."""
        _run(*self.inside, "iptables", "-w", "20", *words)

    def deaf_to(self, *others: Host) -> None:
        """Nothing that these send arrives here; what this host sends does arrive there."""
        for other in others:
            self.rule("-A", "INPUT", "-s", other.address, "-j", "DROP")

    def loses(self, share: float) -> None:
        """So many of the packets that come in are dropped, at random."""
        dice = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        self.rule("-A", "INPUT", "-i", "eth0", *dice, "-j", "DROP")

    def resets(self, share: float, port: int) -> None:
        """So many of the segments that come in at a port end their connection."""
        dice = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        self.rule("-A", "INPUT", "-i", "eth0", "-p", "tcp", "--dport", str(port), *dice,
                  "-j", "REJECT", "--reject-with", "tcp-reset")  # fmt: skip

    def diverts(self, port: int, other_port: int) -> None:
        """What others send to a port here arrives at another."""
        to = ("-j", "REDIRECT", "--to-ports", str(other_port))
        self.rule("-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", str(port), *to)

    def heal(self) -> None:
        """All is as it was."""
        self.rule("-F")
        self.rule("-t", "nat", "-F")
        self.plug()

    def unplug(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def plug(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")

    # -- the end ---------------------------------------------------------------------------------

    def lose(self) -> None:
        """A power cut without a return: link, processes, memory and disk."""
        self.unplug()
        super().lose()

    def close(self) -> None:
        _isolation.sweep(self.places)
        shutil.rmtree(self.disk, ignore_errors=True)
        _delete(self.namespace)


@contextlib.contextmanager
def apart(one: Host, *others: Host) -> Iterator[None]:
    """Nothing passes between ``one`` and the others."""
    for other in others:
        one.deaf_to(other)
        other.deaf_to(one)
    try:
        yield
    finally:
        for host in (one, *others):
            host.heal()


@functools.cache
def why_no_network() -> str:
    """Why there cannot be a network here; "" if there can."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "iptables", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    name = f"{_PREFIX}{os.getpid()}-try"
    tried = (
        ("ip", "netns", "add", name),
        ("ip", "-n", name, "link", "add", "name", "br0", "type", "bridge"),
        ("ip", "-n", name, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1"),
        ("ip", "netns", "exec", name, "unshare", "--uts", "iptables", "-A", "INPUT",
         "-m", "statistic", "--mode", "random", "--probability", "0.5", "-j", "DROP"),
    )  # fmt: skip
    try:
        for words in tried:
            _run(*words)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        return f"network namespaces cannot be made here: {error}"
    finally:
        _delete(name)
    return ""


def _delete(namespace: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(
            ["ip", "netns", "del", namespace], capture_output=True, timeout=30, check=False
        )


def _sweep_dead() -> None:
    """Delete what test processes left that were killed."""
    for path in Path("/run/netns").glob(f"{_PREFIX}[0-9]*-*"):
        pid = int(path.name.removeprefix(_PREFIX).partition("-")[0])
        if not _isolation._is_alive(pid):
            _delete(path.name)
