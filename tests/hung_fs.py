"""A file system that hangs when it is told to: a directory, mounted again by FUSE.

As a program it is the file system: ``python hung_fs.py BACKING MOUNT CONTROL``. While the file
CONTROL exists, every request waits, however long: whoever asked is stuck in the kernel, as with a
dead NFS server. ``HungDisk`` is the test's side.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT_S = 0.01


class HungDisk:
    """Mounted at ``path``; ``hang`` and ``free`` any number of times, ``close`` unmounts."""

    def __init__(self, scratch: Path) -> None:
        self.path = scratch / "mount"
        self.backing = scratch / "backing"
        self._control = scratch / "hang"
        self.path.mkdir()
        self.backing.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.backing), str(self.path), str(self._control)],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 20.0
        while not os.path.ismount(self.path):
            assert self._process.poll() is None, "the FUSE program ended"
            assert time.monotonic() < deadline_s, "it was not mounted in time"
            time.sleep(0.02)

    def hang(self) -> None:
        """Let no request be answered from now on."""
        self._control.touch()

    def free(self) -> None:
        """Answer every request, those that wait too."""
        self._control.unlink(missing_ok=True)

    def die(self) -> None:
        """End the program: the mount stays, and nothing in it can be looked at any more."""
        self._process.kill()
        self._process.wait(20.0)

    def close(self) -> None:
        """Free it, unmount it and end the program, whoever still uses it. Idempotent."""
        self.free()
        # Lazily: what is open there is closed by whoever has it, and everything new is refused.
        subprocess.run(["umount", "--lazy", str(self.path)], capture_output=True, check=False)
        self._process.kill()  # which also ends every request that still waits
        self._process.wait(20.0)


class Requests:
    """Every request, carried out on the backing directory."""

    use_ns = True

    def __init__(self, backing: str) -> None:
        self._backing = backing

    def _real(self, path: str) -> str:
        return self._backing + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        info = os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
        times = {f"st_{k}time": getattr(info, f"st_{k}time_ns") for k in ("a", "m", "c")}
        return {**{name: getattr(info, name) for name in names}, **times}

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        with os.scandir(self._real(path)) as entries:
            return [(e.name, {"st_ino": e.inode(), "st_mode": 0}, 0) for e in entries]

    def statfs(self, path: str) -> dict[str, int]:
        info = os.statvfs(self._real(path))
        return {n: getattr(info, n) for n in dir(info) if n.startswith("f_") and n != "f_fsid"}

    def open(self, path: str, flags: int) -> int:
        return os.open(self._real(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._real(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self._real(path), uid, gid)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._real(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._real(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._real(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._real(old), self._real(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._real(source), self._real(target))
        return 0


def waiting(request: Callable[..., Any], control: str) -> Callable[..., Any]:
    """The same request, once nothing hangs."""

    @functools.wraps(request)
    def waits(*arguments: Any, **more: Any) -> Any:
        while os.path.exists(control):
            time.sleep(WAIT_S)
        return request(*arguments, **more)

    return waits


def main(backing: str, mount: str, control: str) -> None:
    import mfusepy

    answers = {
        name: waiting(request, control)
        for name, request in vars(Requests).items()
        if callable(request) and not name.startswith("_")
    }
    passing = type("Passing", (Requests, mfusepy.Operations), answers)
    mfusepy.FUSE(
        passing(backing), mount, foreground=True, nothreads=False, use_ino=True, attr_timeout=0.0,
        entry_timeout=0.0, negative_timeout=0.0,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
