"""The files of a simulated node that are in no tier: small ones, beside its agent's socket.

Knows as much of ``os`` and ``open`` as agents use of them there, and nothing else: what a module
asks for besides is not to be had, so that no story touches a file of the machine that it is played
on. Slots beside a disk are of no story yet: at their place there is nothing.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import stat
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, Any

__all__ = ["UID", "Files", "open_of", "os_of"]

_devices = itertools.count(1)
UID = 1000
_PURE = ("basename", "dirname", "isabs", "join", "normpath", "split")
_FLAGS = ("O_CLOEXEC", "O_CREAT", "O_NOFOLLOW", "O_NONBLOCK", "O_RDONLY", "O_TRUNC", "O_WRONLY")


class Files:
    """Those of one node. Descriptors are of this alone."""

    def __init__(self) -> None:
        self._device = next(_devices)
        self._content: dict[str, bytes] = {}
        self._opened: dict[int, str] = {}

    def clear(self) -> None:
        """The machine boots again: all of them lay in memory."""
        self._content.clear()

    def descriptor(self, path: str, flags: int, mode: int = 0o777) -> int:
        """``os.open``."""
        del mode
        if flags & os.O_CREAT:
            self._content.setdefault(path, b"")
        self._check(path)
        if flags & os.O_TRUNC:
            self._content[path] = b""
        fd = 1 + max(self._opened, default=0)
        self._opened[fd] = path
        return fd

    def file(self, where: str | int, mode: str) -> IO[Any]:
        """``open``."""
        flags = os.O_CREAT | os.O_TRUNC if mode.startswith("w") else 0
        fd = self.descriptor(where, flags) if isinstance(where, str) else where
        opened = _File(self, fd)
        return opened if mode.endswith("b") else io.TextIOWrapper(opened)

    def content(self, fd: int) -> bytes:
        """What the file of a descriptor has."""
        return self._content[self._opened[fd]]

    def close(self, fd: int, content: bytes) -> None:
        """The file of a descriptor has this from now on."""
        self._content[self._opened.pop(fd)] = content

    def status(self, path: str | int) -> SimpleNamespace:
        """``os.stat`` and its like. The root alone is a directory."""
        if path == "/":
            mode, number = stat.S_IFDIR | 0o700, 0
        else:
            self._check(self._opened[path] if isinstance(path, int) else str(path))
            mode, number = stat.S_IFREG | 0o600, 1
        return SimpleNamespace(st_mode=mode, st_uid=UID, st_dev=self._device, st_ino=number)

    def replace(self, path: str, other: str) -> None:
        """``os.replace``."""
        self._check(path)
        self._content[other] = self._content.pop(path)

    def unlink(self, path: str) -> None:
        """``os.unlink``."""
        self._check(path)
        del self._content[path]

    def _check(self, path: str) -> None:
        if path not in self._content:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class _File(io.BytesIO):
    """An open one, which is written as it is closed."""

    def __init__(self, files: Files, fd: int) -> None:
        super().__init__(files.content(fd))
        self._files = files
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if not self.closed:
            self._files.close(self._fd, self.getvalue())
        super().close()


def os_of(here: Callable[[], Files]) -> SimpleNamespace:
    """In the place of ``os``; ``here`` gives the files of the node whose code is running."""
    return SimpleNamespace(
        **{name: getattr(os, name) for name in _FLAGS},
        path=SimpleNamespace(**{name: getattr(os.path, name) for name in _PURE}),
        fsencode=os.fsencode,
        fsdecode=os.fsdecode,
        geteuid=lambda: UID,
        getpid=lambda: 1,
        open=lambda *values: here().descriptor(*values),
        fstat=lambda fd: here().status(fd),
        stat=lambda path: here().status(path),
        lstat=lambda path: here().status(path),
        replace=lambda path, other: here().replace(path, other),
        unlink=lambda path: here().unlink(path),
    )


def open_of(here: Callable[[], Files]) -> Callable[..., IO[Any]]:
    """In the place of ``open``."""
    return lambda where, mode: here().file(where, mode)
