"""What this machine can do for checkpoints: sizes, limits and measured rates.

Knows what the kernel's files say and how to measure a copy and a write in a fraction of a second.
Does not judge (``mtckpt doctor`` does) and keeps nothing: what it writes for a measurement has no
name and is gone when it returns. Functions that take text are pure.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Mount",
    "copy_bytes_per_s",
    "limit_of",
    "mount_of",
    "parse_mounts",
    "pmd_mapped_bytes",
    "shmem_enabled",
    "tier_label",
    "write_bytes_per_s",
]

MIB = 1 << 20
_SO_PEERPIDFD = 77
_HUGE_PAGE_BYTES = 2 * MIB
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mounted file system. ``options`` are those of the mount and of the file system."""

    path: str
    kind: str
    source: str
    options: frozenset[str]

    def option(self, name: str) -> str | None:
        """The value of ``name=value``, or None."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(f"{name}=")), None)


def parse_mounts(text: str) -> list[Mount]:
    """Read /proc/self/mountinfo; lines that do not parse are left out."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) >= 6 and len(after) >= 2:
            options = {*before[5].split(","), *(after[2].split(",") if len(after) > 2 else ())}
            path = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), before[4])
            mounts.append(Mount(path, after[0], after[1], frozenset(options)))
    return mounts


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that an absolute path without links lies on; of two at one place the later."""
    best = None
    for mount in mounts:
        inside = path == mount.path or path.startswith(mount.path.rstrip("/") + "/")
        if inside and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    return best


def mount_at(path: str) -> Mount | None:
    """The mount of a path as it is now; None where the kernel does not say."""
    return mount_of(os.path.realpath(path), parse_mounts(read_text("/proc/self/mountinfo")))


def tier_label(path: str) -> str:
    """What a tier at ``path`` is called: "ram" on tmpfs, else "disk"."""
    mount = mount_at(path)
    return "ram" if mount is not None and mount.kind in ("tmpfs", "ramfs") else "disk"


def shmem_enabled(text: str) -> str:
    """The chosen word of /sys/kernel/mm/transparent_hugepage/shmem_enabled; "" if none is."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def pmd_mapped_bytes(smaps: str, address: int) -> int | None:
    """Bytes of the mapping at ``address`` that huge pages map, from /proc/self/smaps.

    The only witness: madvise returns 0 on a tmpfs that gives no huge pages. None: not found.
    """
    inside = False
    for line in smaps.splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and (match := re.match(r"ShmemPmdMapped:\s+(\d+) kB", line)):
            return int(match[1]) * 1024
    return None


def limit_of(limits: str, name: str) -> int | None:
    """The soft limit of a line of /proc/self/limits; None for unlimited or not there."""
    match = re.search(rf"^{re.escape(name)}\s+(\d+|unlimited)\s", limits, re.MULTILINE)
    return int(match[1]) if match and match[1] != "unlimited" else None


def container_of(environ: Iterable[str], markers: Iterable[str], cgroup: str) -> str:
    """What kind of container this process is in, "" if none can be seen.

    ``markers`` are those of /.dockerenv and /run/.containerenv that exist.
    """
    found = set(markers)
    if "KUBERNETES_SERVICE_HOST" in set(environ) or "kubepods" in cgroup:
        return "kubernetes"
    if "/run/.containerenv" in found or "libpod" in cgroup:
        return "podman"
    if "/.dockerenv" in found or re.search(r"docker|containerd", cgroup):
        return "docker"
    return "lxc" if "/lxc" in cgroup else ""


def container() -> str:
    """``container_of`` this process."""
    markers = [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)]
    return container_of(os.environ, markers, read_text("/proc/self/cgroup"))


def is_gvisor(version: str) -> bool:
    """Whether /proc/version is that of gVisor, which calls itself an old Linux of one date."""
    return "gvisor" in version or "Sun Jan 10 15:06:54 PST 2016" in version


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(cores())


def core_list(text: str) -> set[int]:
    """Numbers in a list as the kernel writes it: 0-3,8; what does not parse is left out."""
    found: set[int] = set()
    for match in re.finditer(r"(\d+)(?:-(\d+))?", text):
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def cores_of_numa_node(node: int) -> set[int]:
    """Cores of a NUMA node; none where the kernel does not say."""
    return core_list(read_text(f"/sys/devices/system/node/node{node}/cpulist"))


def numa_node_of_pci(address: str) -> int | None:
    """The NUMA node that a PCI device is at; None where the kernel does not say."""
    text = read_text(f"/sys/bus/pci/devices/{address}/numa_node").strip()
    return int(text) if text.isdecimal() else None


def num_numa_nodes() -> int:
    """NUMA nodes with memory of their own; 1 where the kernel does not say."""
    with contextlib.suppress(OSError):
        names = os.listdir("/sys/devices/system/node")
        return max(1, sum(re.fullmatch(r"node\d+", name) is not None for name in names))
    return 1


def has_peer_pidfd() -> bool:
    """Whether the kernel hands out a pidfd of the process at the other end of a socket (6.5)."""
    if not hasattr(socket, "AF_UNIX"):
        return False
    with contextlib.suppress(OSError):
        one, other = socket.socketpair()
        with one, other:
            raw = one.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            os.close(int.from_bytes(raw, "little"))
            return True
    return False


def free_and_total_bytes(path: str) -> tuple[int, int]:
    """Of the file system at ``path``; (0, 0) where it does not say."""
    try:
        usage = os.statvfs(path)
    except OSError:
        return 0, 0
    return usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize


def read_text(path: str) -> str:
    """A file of the kernel; "" where it is not there or not readable."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text()
    return ""


# -- measured --------------------------------------------------------------------------------------


def copy_bytes_per_s(size_bytes: int = 64 * MIB, repeats: int = 3) -> float:
    """The rate of one core's memcpy between touched pages."""
    with mmap.mmap(-1, size_bytes) as source, mmap.mmap(-1, size_bytes) as target:
        into, out_of = _address(target), _address(source)
        ctypes.memset(into, 1, size_bytes)
        ctypes.memset(out_of, 2, size_bytes)
        best_s = min(
            _timed(lambda: ctypes.memmove(into, out_of, size_bytes)) for _ in range(repeats)
        )
    return size_bytes / best_s


@dataclass(frozen=True, slots=True)
class Written:
    """A measured write. ``direct``: past the page cache. ``huge``: pages of 2 MiB were mapped."""

    bytes_per_s: float
    direct: bool = False
    huge: bool = False


def tmpfs_bytes_per_s(directory: str, size_bytes: int = 32 * MIB) -> Written:
    """Allocate, map and fill a file that has no name: what a slot costs the first time.

    Raises OSError where the directory cannot take it.
    """
    started_s = time.perf_counter()
    with filled_file(directory, size_bytes) as address:
        elapsed_s = time.perf_counter() - started_s
        pmd_bytes = pmd_mapped_bytes(read_text("/proc/self/smaps"), address)
    return Written(size_bytes / elapsed_s, huge=(pmd_bytes or 0) >= _HUGE_PAGE_BYTES)


@contextlib.contextmanager
def filled_file(directory: str, size_bytes: int) -> Iterator[int]:
    """The address of a mapped file that has no name, and all of its pages.

    Raises OSError where the directory cannot take it.
    """
    with _nameless(directory, 0) as fd:
        os.posix_fallocate(fd, 0, size_bytes)
        with mmap.mmap(fd, size_bytes) as mapped:
            address = _address(mapped)
            ctypes.memset(address, 1, size_bytes)
            yield address


def write_bytes_per_s(directory: str, size_bytes: int = 64 * MIB, limit_s: float = 1.5) -> Written:
    """Write and fsync a file that has no name, past the page cache where that works.

    Stops after ``limit_s`` on a slow disk. Raises OSError where the directory cannot take it.
    """
    direct_flag = getattr(os, "O_DIRECT", 0)
    for flag in dict.fromkeys((direct_flag, 0)):
        try:
            with _nameless(directory, flag) as fd:
                return Written(_fill(fd, size_bytes, limit_s), direct=bool(flag))
        except OSError:
            if not flag:
                raise
    raise AssertionError("the last try returns or raises")


def _fill(fd: int, size_bytes: int, limit_s: float) -> float:
    block_bytes = 8 * MIB
    with mmap.mmap(-1, block_bytes) as block, memoryview(block) as view:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(block)), 7, block_bytes)
        started_s = time.perf_counter()
        done = 0
        while done < size_bytes and time.perf_counter() - started_s < limit_s:
            done += os.pwrite(fd, view, done)
        os.fsync(fd)
        return done / max(time.perf_counter() - started_s, 1e-9)


@contextlib.contextmanager
def _nameless(directory: str, flags: int) -> Iterator[int]:
    """A file that has no name, or loses it at once where the file system needs one."""
    nameless_flag = getattr(os, "O_TMPFILE", 0)
    fd = -1
    if nameless_flag:
        with contextlib.suppress(OSError):
            fd = os.open(directory, nameless_flag | os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    if fd < 0:
        named_fd, name = tempfile.mkstemp(prefix=".mtckpt-doctor-", dir=directory)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | flags)
        finally:
            os.close(named_fd)
            os.unlink(name)
    try:
        yield fd
    finally:
        os.close(fd)


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return max(time.perf_counter() - started_s, 1e-9)
