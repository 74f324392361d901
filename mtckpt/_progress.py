"""Shows what takes over a second: a bar on a terminal or notebook, a log line per 10 s elsewhere.

Knows one operation at a time: its name, its bytes, how far it is. Shows nothing for what is quick,
nothing on other ranks than the first of a node, and never writes to standard output: it may be a
pipe that somebody reads. A display that fails is given up; the operation goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mtckpt._handle import size_text

__all__ = ["Progress", "progress"]

logger = logging.getLogger("mtckpt")

QUIET_S = 1.0
LOG_EVERY_S = 10.0
_TICK_S = 0.1
_JOIN_S = 1.0
_MAX_BAR_COLUMNS = 30


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

    def __call__(self, done_bytes: int, note: str = "") -> None:
        self._done_bytes = done_bytes
        self._note = note or self._note

    @property
    def fraction(self) -> float | None:
        """How much is done, 0 to 1; None where the total is not known."""
        return min(1.0, self._done_bytes / self.total_bytes) if self.total_bytes else None

    def line(self) -> str:
        """Where it stands, in words: done, total, rate and time left where they are known."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        parts = [f"{elapsed_s:.0f} s"]
        done_bytes = self._done_bytes
        if done_bytes:
            rate = done_bytes / elapsed_s
            total = f" of {size_text(self.total_bytes)}" if self.total_bytes else ""
            parts.append(f"{size_text(done_bytes)}{total} at {size_text(rate)}/s")
            if self.total_bytes > done_bytes:
                parts.append(f"{(self.total_bytes - done_bytes) / rate:.0f} s left")
        if self._note:
            parts.append(self._note)
        return f"{self._title()}: {', '.join(parts)}"

    def _title(self) -> str:
        step = f"step {self.step}" if self.step is not None else ""
        return " ".join(word for word in (self.what, self.run, step) if word)

    # -- the display's own thread ----------------------------------------------------------------

    def _show(self) -> None:
        if self._ended.wait(QUIET_S):
            return
        try:
            if _in_notebook() or _is_terminal():
                self._show_bar()
        except Exception:
            # A terminal that went away, a broken rich: the loop below still says how it goes.
            logger.debug("the progress bar failed", exc_info=True)
        while not self._ended.wait(LOG_EVERY_S):
            logger.info("%s", self.line())

    def _show_bar(self) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.progress_bar import ProgressBar
            from rich.table import Table
        except ImportError:
            self._show_plain_bar()
            return

        def render() -> Any:
            table = Table.grid(padding=(0, 1))
            fraction = self.fraction
            bar = ProgressBar(1.0, fraction or 0.0, width=_MAX_BAR_COLUMNS, pulse=fraction is None)
            table.add_row(bar, self.line())
            return table

        # transient: the bar goes when the operation is over, and the log says how it ended.
        with Live(
            render(), console=Console(stderr=True), transient=True, auto_refresh=False
        ) as live:
            while not self._ended.wait(_TICK_S):
                live.update(render(), refresh=True)

    def _show_plain_bar(self) -> None:
        """Without rich: one line that is written over, on standard error."""
        columns = 0
        while not self._ended.wait(_TICK_S):
            filled = round((self.fraction or 0.0) * _MAX_BAR_COLUMNS)
            bar = f"[{'#' * filled}{'.' * (_MAX_BAR_COLUMNS - filled)}] " if self.fraction else ""
            text = (bar + self.line())[: _terminal_columns() - 1]
            sys.stderr.write("\r" + text.ljust(columns))
            sys.stderr.flush()
            columns = len(text)
        sys.stderr.write("\r" + " " * columns + "\r")
        sys.stderr.flush()


@contextlib.contextmanager
def progress(
    what: str, *, total_bytes: int = 0, run: str = "", step: int | None = None
) -> Iterator[Progress]:
    """Follow one operation: ``with progress("restore", total_bytes=n) as report: report(done)``.

    A generator, so that its display ends with it where an interrupt comes right before the end.
    """
    report = Progress(what, total_bytes=total_bytes, run=run, step=step)
    # A timer thread does nothing at all for the first second: quick operations pay for starting it
    # and for nothing else.
    thread = threading.Thread(target=report._show, name="mtckpt-progress", daemon=True)
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # There are too many, or the process ends (with some versions of Python).
            with contextlib.suppress(RuntimeError):
                thread.start()
        yield report
    finally:
        report._ended.set()
        if thread.is_alive():
            # Bounded: a terminal that was stopped (^S) holds the display, never the operation.
            thread.join(_JOIN_S)


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _terminal_columns() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max(20, columns) if columns else 80  # a terminal of no size does not know it
