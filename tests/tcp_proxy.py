"""A proxy between two agents that damages what the server sends: it knows bytes, and no protocol.

What goes wrong goes wrong at a place that a test chooses, in each connection that comes so far,
``times`` in all.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Literal

Kind = Literal["flip", "truncate", "duplicate", "reset", "stall"]


class TcpProxy:
    """Listens at ``port`` while it is entered; ``hits`` counts what went wrong.

    Args:
        target: where the real server listens.
        kind: a bit is flipped; the connection ends; 1,000 bytes come twice; it is reset; nothing
            comes any more while the connection stays.
        at: the byte of the server's, in one connection, that it happens to; then every so many.
        times: how often.
    """

    def __init__(self, target: tuple[str, int], kind: Kind, at: int, times: int = 1) -> None:
        self._target = target
        self._kind = kind
        self._at = at
        self._left = times
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.hits = 0
        self.sent_bytes = 0  # by the server, as far as it has come through

    def __enter__(self) -> TcpProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
                threading.Thread(target=self._damage, args=(server, client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                # Not in recv: a socket that a thread waits in is not reset when it is closed.
                while not select.select([source], [], [], 0.02)[0]:
                    pass
                if not (data := source.recv(1 << 16)):
                    break
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _damage(self, server: socket.socket, client: socket.socket) -> None:
        seen, at = 0, self._at
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                start, seen = seen, seen + len(data)
                with self._lock:
                    self.sent_bytes += len(data)
                if start <= at < seen and self._take():
                    if not self._hit(client, bytearray(data), at - start):
                        return
                    at += self._at
                    continue
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def _take(self) -> bool:
        with self._lock:
            if not self._left:
                return False
            self._left -= 1
            self.hits += 1
            return True

    def _hit(self, client: socket.socket, data: bytearray, at: int) -> bool:
        """Send the piece with what is wrong in it; False if the connection goes no further."""
        if self._kind == "flip":
            data[at] ^= 0x10
        elif self._kind == "duplicate":
            data = data[:at] + data[max(0, at - 1000) :]
        else:
            client.sendall(data[:at])
            if self._kind == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
            elif self._kind == "truncate":
                client.shutdown(socket.SHUT_WR)
            return False
        client.sendall(data)
        return True
