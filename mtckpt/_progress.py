"""Shows what takes over a second: a bar on a terminal or notebook, a log line per 10 s elsewhere.

Knows one operation at a time: its name, its bytes, how far it is. Shows nothing for what is quick,
nothing on other ranks than the first of a node, and never writes to standard output.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any

from mtckpt._handle import size_text

__all__ = ["Progress", "progress"]

logger = logging.getLogger("mtckpt")

_QUIET_S = 1.0
_LOG_EVERY_S = 10.0
_TICK_S = 0.1


class Progress:
    """One operation. Call it with the bytes done so far; any thread may, at any rate."""

    def __init__(self, what: str, *, total_bytes: int, run: str, step: int | None) -> None:
        self.what = what
        self.total_bytes = total_bytes
        self.run = run
        self.step = step
        self._done_bytes = 0
        self._note = ""
        self._started_s = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, done_bytes: int, note: str = "") -> None:
        self._done_bytes = done_bytes
        self._note = note or self._note

    def __enter__(self) -> Progress:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self._thread = threading.Thread(target=self._show, name="mtckpt-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def line(self) -> str:
        """Where it stands, in words: done, total, rate and time left where they are known."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        title = f"{self.what} {self.run}" + (f" step {self.step}" if self.step is not None else "")
        parts = [f"{elapsed_s:.0f} s"]
        if self._done_bytes:
            rate = self._done_bytes / elapsed_s
            total = f" of {size_text(self.total_bytes)}" if self.total_bytes else ""
            parts.append(f"{size_text(self._done_bytes)}{total} at {size_text(rate)}/s")
            if self.total_bytes > self._done_bytes:
                parts.append(f"{(self.total_bytes - self._done_bytes) / rate:.0f} s left")
        if self._note:
            parts.append(self._note)
        return f"{title}: {', '.join(parts)}"

    def _show(self) -> None:
        if self._ended.wait(_QUIET_S):
            return
        if _is_interactive() and self._show_bar():
            return
        while not self._ended.wait(_LOG_EVERY_S):
            logger.info("%s", self.line())

    def _show_bar(self) -> bool:
        try:
            from rich.console import Console
            from rich.status import Status
        except ImportError:
            return False
        with Status(self.line(), console=Console(stderr=True)) as status:
            while not self._ended.wait(_TICK_S):
                status.update(self.line())
        return True


def progress(
    what: str, *, total_bytes: int = 0, run: str = "", step: int | None = None
) -> Progress:
    """Follow one operation: ``with progress("restore", total_bytes=n) as report: report(done)``."""
    return Progress(what, total_bytes=total_bytes, run=run, step=step)


def _is_interactive() -> bool:
    kernel: Any = sys.modules.get("ipykernel")
    return kernel is not None or (sys.stderr is not None and sys.stderr.isatty())
