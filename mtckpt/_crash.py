"""Named places in production code where a test can have the process killed.

It knows a name and a count, from ``MTCKPT_CRASH_AT="put.linked:2"``: the second time that place is
passed the process gets SIGKILL, with nothing flushed and no handler run. Without the variable at
import a crash point is an empty function. It promises nothing about what the place means.
"""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["CRASH_VARIABLE", "crash_point"]

CRASH_VARIABLE = "MTCKPT_CRASH_AT"


def _parse(spec: str) -> tuple[str, int]:
    name, _, count = spec.partition(":")
    return name, int(count or 1)


if os.environ.get(CRASH_VARIABLE):
    _NAME, _left = _parse(os.environ[CRASH_VARIABLE])
    _lock = threading.Lock()

    def crash_point(name: str) -> None:
        """Kill this process when ``name`` is passed for the chosen time."""
        global _left
        if name != _NAME:
            return
        with _lock:
            _left -= 1
            if _left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

else:

    def crash_point(name: str) -> None:
        """Nothing: no crash was asked for when this process started."""
