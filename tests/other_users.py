"""Programs as other users, in namespaces of their own, on kernels that know less."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

NOBODY = 65534

# As a kernel before 6.5 answers: getsockopt(..., SOL_SOCKET, SO_PEERPIDFD) is ENOPROTOOPT.
_WITHOUT_PEERPIDFD = """
import ctypes, os, struct, sys
number = {"x86_64": 55, "aarch64": 209}[os.uname().machine]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join(struct.pack("=HBBI", *line) for line in (
    (LOAD, 0, 0, 0), (EQUAL, 0, 5, number),
    (LOAD, 0, 0, 24), (EQUAL, 0, 3, 1),
    (LOAD, 0, 0, 32), (EQUAL, 0, 1, 77),
    (RETURN, 0, 0, 0x00050000 | 92),
    (RETURN, 0, 0, 0x7FFF0000),
))
libc = ctypes.CDLL(None, use_errno=True)
lines = ctypes.create_string_buffer(program)
filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0):
    sys.exit(f"no filter: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
"""


@functools.cache
def python_for_others() -> str:
    """An interpreter that another user can run; ours may lie in a home directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for python in (sys.executable, "/usr/bin/python3"):
        # env executes it as it is; setpriv itself would go on looking along PATH.
        command = [*_become(NOBODY, NOBODY), "env", python, "-c", "import aiohttp, msgspec, numpy"]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        if done.returncode == 0:
            return python
    pytest.skip("another user cannot run Python with these packages here")


def _become(uid: int, gid: int, groups: Sequence[int] = ()) -> list[str]:
    others = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", others]


def as_user(uid: int, gid: int, groups: Sequence[int] = ()) -> list[str]:
    """What a command is started through to be another user's; python_for_others() follows."""
    return [*_become(uid, gid, groups), "env"]


def unshared(prepare: str = "true") -> list[str]:
    """Start through this: pid and mount namespaces of its own, after a line of shell as root."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    return [
        *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"),
        *("sh", "-c", f'{prepare} && exec "$@"', "sh"),
    ]


def without_peerpidfd() -> list[str]:
    """Start through this: a process that the kernel gives no pidfd of whoever connects to it."""
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("the filter is written for x86_64 and aarch64")
    return [python_for_others(), "-c", _WITHOUT_PEERPIDFD]
