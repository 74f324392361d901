"""Memory by address: mapped files, anonymous staging, views over what lies at an address.

Uses libc through ctypes, since ``mmap.mmap`` holds the interpreter lock while it populates, keeps
a second descriptor that lets a forked child pin a slot, and cannot be closed while a view exists.
Whoever holds a ``Mapping`` keeps its bytes; nothing here checks what a caller does with an address.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtckpt.errors import TierFull

if TYPE_CHECKING:
    from array import array

__all__ = [
    "Buffer",
    "Mapping",
    "anonymous",
    "map_file",
    "populate",
    "prefer_huge",
    "read_at",
    "view_at",
]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.preadv.restype = ctypes.c_ssize_t
_libc.preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value

# Linux 5.14; not in the mmap module of Python 3.11.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_IOV_MAX = 1024


def view_at(address: int, size_bytes: int) -> memoryview:
    """A byte view over memory that the caller keeps alive."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from a file; fewer bytes than that only where the file ends."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            break
        done += got
    return done


class Mapping:
    """``size_bytes`` of mapped memory at ``address``, until closed or collected.

    Not in a fork: what lies at the address there may be somebody else's.
    """

    __slots__ = ("_pid", "address", "size_bytes", "writable")

    def __init__(self, address: int, size_bytes: int, *, writable: bool) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.writable = writable
        self._pid = os.getpid()

    @property
    def view(self) -> memoryview:
        """All of it. Not to be used after ``close``."""
        view = view_at(self.address, self.size_bytes)
        return view if self.writable else view.toreadonly()

    def populate(self) -> None:
        """Fault the pages in now, with the interpreter lock released.

        Raises TierFull where the file system has no room for them: an error instead of a SIGBUS.
        """
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ
        if self.size_bytes and _libc.madvise(self.address, self.size_bytes, advice) != 0:
            code = ctypes.get_errno()
            if code in (errno.EFAULT, errno.ENOSPC):
                raise TierFull(
                    "no room for the pages of a slot", tier="ram", needed_bytes=self.size_bytes
                )
            # EINVAL: a kernel before 5.14. The pages then fault in during the first copy.

    def close(self) -> None:
        if self.address and self._pid == os.getpid():
            _libc.munmap(self.address, self.size_bytes)
        self.address = 0

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_ending():  # then what this needs may be gone, and the kernel unmaps all
            self.close()


def _map(size_bytes: int, prot: int, flags: int, fd: int) -> int:
    address = _libc.mmap(None, size_bytes, prot, flags, fd, 0)
    if address is None or address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise MemoryError(f"cannot map {size_bytes:,} bytes: {os.strerror(error)}")
    return int(address)


def map_file(fd: int, size_bytes: int, *, writable: bool) -> Mapping:
    """Map an open file, shared. The descriptor may be closed afterwards. Raises MemoryError.

    A forked child does not inherit the mapping, so it keeps no slot alive.
    """
    if size_bytes == 0:
        return Mapping(0, 0, writable=writable)
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _map(size_bytes, prot, mmap.MAP_SHARED, fd)
    _libc.madvise(address, size_bytes, _MADV_DONTFORK)
    return Mapping(address, size_bytes, writable=writable)


def anonymous(size_bytes: int, *, huge: bool = True) -> Mapping:
    """Fresh private memory, page aligned; ``huge``: in huge pages where the kernel gives them.

    Raises MemoryError.
    """
    if size_bytes == 0:
        return Mapping(0, 0, writable=True)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _map(size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)
    if huge:
        _libc.madvise(address, size_bytes, _MADV_HUGEPAGE)
    return Mapping(address, size_bytes, writable=True)


def populate(address: int, size_bytes: int) -> None:
    """Fault in pages that are to be written to, without the interpreter lock; a wish, no promise.

    What lies there stays as it is.
    """
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(begin, address + size_bytes - begin, _MADV_POPULATE_WRITE)


def prefer_huge(address: int, size_bytes: int, *, huge: bool = True) -> None:
    """Which pages a mapping is to get where it has none yet."""
    _libc.madvise(address, size_bytes, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)


class Buffer:
    """Memory whose bytes are copied to many addresses by one call, without the interpreter lock."""

    def __init__(self, size_bytes: int) -> None:
        self._fd = -1
        try:
            self._fd = os.memfd_create("mtckpt", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, size_bytes)
            self._mapping = map_file(self._fd, size_bytes, writable=True)
        except OSError:
            # Some kernels are told to refuse it. A copy a place then does the same, more slowly.
            self._mapping = anonymous(size_bytes)
        self.view = self._mapping.view

    def scatter(self, offset: int, places: array[int]) -> None:
        """Copy what lies from ``offset`` on to ``places``: addresses and sizes in turns.

        Raises OSError for an address that cannot be written to.
        """
        address = places.buffer_info()[0]
        for first in range(0, len(places), 2 * _IOV_MAX):
            sizes = places[first + 1 : first + 2 * _IOV_MAX : 2]
            wanted = sum(sizes)
            if self._fd < 0:
                self._copy_each(offset, places[first : first + 2 * _IOV_MAX])
            elif _libc.preadv(self._fd, address + 8 * first, len(sizes), offset) != wanted:
                error = ctypes.get_errno() or errno.EFAULT  # after fewer bytes, too
                raise OSError(error, os.strerror(error))
            offset += wanted

    def _copy_each(self, offset: int, places: array[int]) -> None:
        source = self._mapping.address + offset
        for target, size_bytes in zip(places[::2], places[1::2], strict=True):
            ctypes.memmove(target, source, size_bytes)
            source += size_bytes

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._fd >= 0 and not is_ending():
            os.close(self._fd)
            self._fd = -1
