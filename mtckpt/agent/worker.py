"""The data process: carries out commands from a socket pair, and ends when the pair does.

Started as ``python -m mtckpt.agent.worker FD``, one for each root of a tier. It knows lines,
threads and lanes. It does not know what to do on its own, keeps no state that matters, and may be
killed at any moment. Imports are kept few: it is one of several processes on a node that has a
training job to run.

It ends at the end of the socket pair, which the kernel brings about however the control process
ends. PR_SET_PDEATHSIG is set as well, for a worker that hangs in a device and cannot read; it
cannot be relied on alone, since it fires when the *thread* that started the worker ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading

from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.protocol import error_to_wire
from mtckpt.errors import CheckpointError, FormatError

__all__ = ["main", "serve"]

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
READ_BYTES = 1 << 16
# How many commands may wait in one lane; the control process has far fewer under way.
MAX_WAITING = 4096


class _Lane:
    """Commands that may wait for one another, and the threads that carry them out."""

    def __init__(self, name: str, num_threads: int, serve_one: _Serve) -> None:
        self._waiting: queue.Queue[work.Request] = queue.Queue(MAX_WAITING)
        self._serve_one = serve_one
        for number in range(num_threads):
            # Daemons: a thread inside a device that hangs must not keep the process.
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def add(self, request: work.Request) -> None:
        self._waiting.put(request)

    def _run(self) -> None:
        while True:
            self._serve_one(self._waiting.get())


class _Serve:
    """Carries out one request and sends what came of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._carrier = Carrier()

    def __call__(self, request: work.Request) -> None:
        def report(progress: work.Progress) -> None:
            self._send(work.Reply(request.id, progress=progress))

        if not isinstance(request.command, work.Ping):
            self._send(work.Reply(request.id, begun=True))
        try:
            result = self._carrier.carry(request.command, report, again=request.again)
            reply = work.Reply(request.id, result=result)
        except CheckpointError as error:
            reply = work.Reply(request.id, error=error_to_wire(error))
        except Exception as error:
            # The loop must live: the other commands of this process have nothing to do with this
            # one, and whoever asked gets the error.
            logger.exception("%s failed", type(request.command).__name__)
            reply = work.Reply(request.id, error=error_to_wire(error))
        self._send(reply)

    def _send(self, reply: work.Reply) -> None:
        with self._sending, contextlib.suppress(OSError):  # Nobody is there: the end will come.
            self._sock.sendall(work.encode_line(reply))


def serve(sock: socket.socket) -> None:
    """Serve requests until the other end is closed."""
    serve_one = _Serve(sock)
    lanes = {
        "slots": _Lane("slots", 2, serve_one),  # renames and small files
        "room": _Lane("room", 1, serve_one),  # reserving memory: seconds for many GiB
        "bulk": _Lane("bulk", 2, serve_one),  # whatever reads or writes shards
        "left": _Lane("left", 2, serve_one),  # what a trainer waits for reads a part of a shard
        "ahead": _Lane("ahead", 1, serve_one),  # and what nobody waits for
    }
    buffer = bytearray()
    while data := sock.recv(READ_BYTES):
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            request = work.decode_request(line)
            if isinstance(request.command, work.Ping):
                serve_one(request)
            else:
                lanes[_lane_of(request.command)].add(request)
        if len(buffer) > work.MAX_LINE_BYTES:
            raise FormatError("a request is longer than any can be", got_bytes=len(buffer))


def _lane_of(command: work.Command) -> str:
    if isinstance(command, work.Allocate):
        return "room"
    if isinstance(command, work.SealSlot):
        return "bulk" if command.verify else "left" if command.left else "slots"
    if isinstance(command, work.LookAhead):
        return "ahead"
    quick = (work.Recycle, work.Free, work.PutSmall, work.WriteRunConfig, work.ReadRunConfigs)
    return "slots" if isinstance(command, quick) else "bulk"


def main(arguments: list[str]) -> int:
    """Serve the socket whose descriptor is given."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"
    )
    parent_pid = os.getppid()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Ctrl-C in a terminal is for the trainer, and who is told to end may still need this process
    # to bring things away; it ends with the one that started it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(arguments[0]))
    sock.setblocking(True)
    if os.getppid() != parent_pid:
        return 1  # It died before the signal was asked for; the socket would say so as well.
    with contextlib.suppress(ConnectionError):
        serve(sock)
    # Not a return: threads may be inside a device that hangs, and nothing here needs flushing.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
