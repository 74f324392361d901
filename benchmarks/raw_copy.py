"""The limit of every pull: ``sendfile`` on one side, ``recv_into`` a mapped file on the other.

Two streams, nothing checked. ``serve PATH HOST`` prints a port and serves the file until killed;
``pull HOST PORT SIZE TARGET`` makes the file ``TARGET`` and prints the seconds that its bytes took.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20
STREAMS = 2
PIECE_BYTES = 4 * MIB
RANGE_BYTES = 32 * MIB


def main() -> None:
    verb, *words = sys.argv[1:]
    if verb == "serve":
        path, host = words
        serve(Path(path), host)
        return
    host, port, size_bytes, target = words[0], int(words[1]), int(words[2]), Path(words[3])

    def pull(view: memoryview, stream: int) -> None:
        pull_stream(port, view, stream, host=host)

    in_streams(target, size_bytes, pull)  # its pages are there from now on
    started_s = time.perf_counter()
    in_streams(target, size_bytes, pull)
    print(time.perf_counter() - started_s)
    target.unlink()


def serve(path: Path, host: str = "127.0.0.1") -> None:
    """Print a port of ``host`` and send ranges of the file there until killed."""
    fd = os.open(path, os.O_RDONLY)

    def answer(sock: socket.socket) -> None:
        while words := sock.recv(32, socket.MSG_WAITALL):
            start, stop = int(words[:16]), int(words[16:])
            while start < stop:
                start += os.sendfile(sock.fileno(), fd, start, stop - start)

    listener = socket.create_server((host, 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def in_streams(path: Path, size_bytes: int, pull: Callable[[memoryview, int], None]) -> None:
    """Fill a mapped file by ``pull(view, stream)``, one thread a stream."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, size_bytes)
    with mmap.mmap(fd, size_bytes) as mapped, memoryview(mapped) as view:
        threads = [threading.Thread(target=pull, args=(view, i)) for i in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    os.close(fd)


def ranges(size_bytes: int, stream: int) -> Iterator[tuple[int, int]]:
    """What one of the streams brings: ``(start, stop)``."""
    for start in range(stream * RANGE_BYTES, size_bytes, STREAMS * RANGE_BYTES):
        yield start, min(start + RANGE_BYTES, size_bytes)


def pull_stream(port: int, view: memoryview, stream: int, *, host: str = "127.0.0.1") -> None:
    """What one stream brings, into its places of ``view``."""
    with socket.create_connection((host, port)) as sock:
        for start, stop in ranges(len(view), stream):
            sock.sendall(b"%016d%016d" % (start, stop))
            while start < stop:
                got = sock.recv_into(view[start : min(stop, start + PIECE_BYTES)])
                if not got:
                    raise ConnectionError("the raw server has ended")
                start += got


if __name__ == "__main__":
    main()
