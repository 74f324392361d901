"""A terminal for a program to write to, and what it wrote."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time


def on_terminal(command: list[str], environment: dict[str, str]) -> str:
    """What a program writes to a terminal of its own, until it ends."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    out = b""
    deadline_s = time.monotonic() + 30
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(leader, select.POLLIN)
    while time.monotonic() < deadline_s:
        if not poll.poll(100):
            continue
        try:
            piece = os.read(leader, 65536)
        except OSError:  # EIO: nobody has the other end any more
            break
        if not piece:
            break
        out += piece
    os.close(leader)
    assert process.wait(10) == 0, out.decode()
    return out.decode()
