"""A disk whose power can be cut: a file system on a loop device on a FUSE file that logs writes.

As a program it is the FUSE file: it keeps the image in memory and appends every write and every
flush to a log before it answers. The rest makes images of what a disk may hold after a power cut:
all that was written before the last flush, and any of the 4 KiB blocks written since.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE_BYTES = 24 << 20
BLOCK_BYTES = 4096
HEADER = struct.Struct("<QQ")  # offset and size; FLUSH for the offset of a flush
FLUSH = (1 << 64) - 1
TOOLS = ("mkfs.ext4", "losetup", "mount", "umount")


def why_not() -> str:
    """What is missing for such a disk; empty if nothing is."""
    missing = [
        tool
        for tool in TOOLS
        if shutil.which(tool, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None
    ]
    if missing:
        return f"needs {', '.join(missing)}"
    return "" if os.path.exists("/dev/loop-control") else "needs loop devices"


def run(*command: str | Path) -> str:
    """What a command says. Raises AssertionError with all of it if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"},
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def recorded_disk(directory: Path, log: Path) -> Iterator[Path]:
    """An empty ext4, mounted; the path of its root. Everything is taken away at the end."""
    fuse_dir, mounted = directory / "fuse", directory / "mounted"
    fuse_dir.mkdir()
    mounted.mkdir()
    with contextlib.ExitStack() as stack:
        daemon = subprocess.Popen([sys.executable, __file__, str(fuse_dir), str(log)])
        stack.callback(daemon.wait, 20)
        stack.callback(daemon.send_signal, signal.SIGKILL)
        stack.callback(_let_go, "umount", "-l", fuse_dir)
        image = fuse_dir / "image"
        _until(lambda: image.exists() or daemon.poll() is not None)
        assert daemon.poll() is None, "the FUSE file did not start"
        run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0",
            "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", image)  # fmt: skip
        device = run("losetup", "--find", "--show", image)
        stack.callback(_let_go, "losetup", "-d", device)
        run("mount", "-t", "ext4", "-o", "noatime,nodiscard", device, mounted)
        stack.callback(_unmount, mounted)
        run("sync", "-f", mounted)
        yield mounted


@contextlib.contextmanager
def mounted_image(image: Path, place: Path) -> Iterator[Path]:
    """A crash image as the next boot finds it: mounting replays its journal."""
    run("mount", "-t", "ext4", "-o", "loop,noatime", image, place)
    try:
        yield place
    finally:
        _unmount(place)


def _unmount(place: Path) -> None:
    deadline_s = time.monotonic() + 10.0
    while True:
        done = subprocess.run(["umount", place], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline_s:  # whatever holds it must not keep the test's mount
            _let_go("umount", "-l", place)
            raise AssertionError(f"{place} stays busy: {done.stderr}")
        time.sleep(0.02)


def _let_go(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], capture_output=True, timeout=60, check=False)


def _until(what: Any) -> None:
    deadline_s = time.monotonic() + 20.0
    while not what() and time.monotonic() < deadline_s:
        time.sleep(0.01)


# -- crash images ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """A write, or a flush (``data`` is None). ``end`` is the size of the log with it."""

    end: int
    offset: int
    data: bytes | None


def read_events(log: Path) -> list[Event]:
    """Everything that the disk was told, in order."""
    text, events, place = log.read_bytes(), [], 0
    while place < len(text):
        offset, size = HEADER.unpack_from(text, place)
        place += HEADER.size
        if offset == FLUSH:
            events.append(Event(place, offset, None))
        else:
            events.append(Event(place + size, offset, text[place : place + size]))
            place += size
    return events


class Replay:
    """Makes crash images, for moments in ascending order."""

    def __init__(self, events: list[Event], directory: Path) -> None:
        self._events = events
        self._done = 0
        self._directory = directory
        self._base = directory / "flushed.img"
        self._count = 0
        self.image = directory / "crash-0.img"
        with open(self._base, "wb") as file:
            file.truncate(SIZE_BYTES)

    def cut(self, count: int, rng: random.Random | None) -> int:
        """Write the image of a cut after ``count`` events; blocks since the last flush by ``rng``.

        Without it none of them. Returns how many of them there are.
        """
        flushed = max((n for n in range(count) if self._events[n].data is None), default=-1) + 1
        with open(self._base, "r+b") as file:
            for event in self._events[self._done : flushed]:
                _apply(file.fileno(), event)
        self._done = max(self._done, flushed)
        # Never the file of the image before: its loop device may go a moment after its mount.
        self.image.unlink(missing_ok=True)
        self._count += 1
        self.image = self._directory / f"crash-{self._count}.img"
        shutil.copyfile(self._base, self.image)
        blocks = [
            Event(event.end, event.offset + start, event.data[start : start + BLOCK_BYTES])
            for event in self._events[flushed:count]
            if event.data is not None
            for start in range(0, len(event.data), BLOCK_BYTES)
        ]
        if rng is not None:
            # Often nearly all or nearly none of them: those are the orders that disks do make.
            share = rng.choice((0.1, 0.5, 0.9, 1.0))
            with open(self.image, "r+b") as file:
                for block in blocks:
                    if rng.random() < share:
                        _apply(file.fileno(), block)
        return len(blocks)


def _apply(fd: int, event: Event) -> None:
    if event.data is not None:
        os.pwrite(fd, event.data, event.offset)


# -- the program -----------------------------------------------------------------------------------


def main(mount_point: str, log_path: str) -> None:
    import mfusepy

    image = bytearray(SIZE_BYTES)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    class File(mfusepy.Operations):  # type: ignore[misc]  # mfusepy comes without type information
        """One file, as large as the disk."""

        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
            if path != "/image":
                raise mfusepy.FuseOSError(errno.ENOENT)
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": SIZE_BYTES}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", "image"]

        def open(self, path: str, flags: int) -> int:
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return bytes(image[offset : offset + size])

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            os.write(log, HEADER.pack(offset, len(data)) + data)
            image[offset : offset + len(data)] = data
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return 0

        def flush(self, path: str, fh: int) -> int:
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            os.write(log, HEADER.pack(FLUSH, 0))
            return 0

    mfusepy.FUSE(File(), mount_point, foreground=True, nothreads=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
