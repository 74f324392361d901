"""Bars on terminals, log lines elsewhere, nothing for what is quick."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from terminals import on_terminal

from mtckpt import _progress
from mtckpt._progress import progress

ROOT = Path(__file__).resolve().parent.parent
# Times are shortened in the program itself, so that a test of seconds takes a few tenths.
PROGRAM = """
import logging, sys, time
from mtckpt import _progress
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
_progress.QUIET_S, _progress.LOG_EVERY_S = 0.2, 0.15
{before}
with _progress.progress("restore", total_bytes=4 << 20, run="gpt", step=3) as report:
    for done in range(1, 5):
        time.sleep({pause_s})
        report(done << 20, "from ram")
print("finished")
"""
NO_RICH = "sys.modules['rich'] = None; sys.modules['rich.console'] = None"


def program(pause_s: float, before: str = "") -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(pause_s=pause_s, before=before)]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", **more}


@pytest.mark.parametrize("before", ["", NO_RICH], ids=["rich", "plain"])
def test_a_terminal_shows_a_bar(before: str) -> None:
    shown = on_terminal(program(0.2, before), environment())
    assert "restore gpt step 3" in shown
    assert "of 4.0 MiB at" in shown
    assert "s left" in shown
    assert "from ram" in shown
    assert "LOG" not in shown
    assert shown.rstrip().endswith("finished")


@pytest.mark.parametrize("before", ["", NO_RICH], ids=["rich", "plain"])
def test_a_terminal_shows_nothing_for_what_is_quick(before: str) -> None:
    assert on_terminal(program(0.0, before), environment()).strip() == "finished"


def test_a_pipe_gets_log_lines_and_ends(tmp_path: Path) -> None:
    command = f"{' '.join(map(_quoted, program(0.15)))} 2>{tmp_path}/err | cat"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=30, env=environment()
    )
    assert done.stdout == "finished\n"
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines
    assert all(line.startswith("LOG restore gpt step 3: ") for line in lines)
    assert "MiB of 4.0 MiB at" in lines[-1]


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'"


def test_a_pipe_gets_nothing_for_what_is_quick() -> None:
    done = subprocess.run(
        program(0.0), capture_output=True, text=True, timeout=30, env=environment(), check=True
    )
    assert (done.stdout, done.stderr) == ("finished\n", "")


def test_other_local_ranks_are_silent() -> None:
    assert on_terminal(program(0.15), environment(LOCAL_RANK="1")).strip() == "finished"


def test_a_standard_error_that_is_closed_hurts_nobody() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(map(_quoted, program(0.15)))} 2>&-"],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment(),
    )
    assert (done.returncode, done.stdout) == (0, "finished\n")


def test_a_display_that_fails_falls_back_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise OSError("the terminal went away")

    monkeypatch.setattr(_progress.Progress, "_show_bar", broken)
    monkeypatch.setattr(_progress, "_is_terminal", lambda: True)
    monkeypatch.setattr(_progress, "QUIET_S", 0.0)
    monkeypatch.setattr(_progress, "LOG_EVERY_S", 0.01)
    with caplog.at_level(logging.INFO, "mtckpt"), progress("flush", run="gpt"):
        _wait_for(lambda: bool(caplog.messages))
    assert caplog.messages[0].startswith("flush gpt: ")


def _wait_for(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def test_errors_pass_and_threads_end() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"), progress("restore"):
        raise ValueError("mine")
    _wait_for(lambda: threading.active_count() <= before)


def test_reports_come_from_any_thread_and_cost_little() -> None:
    with progress("restore", total_bytes=1000) as report:

        def report_often() -> None:
            for done_bytes in range(1000):
                report(done_bytes)

        threads = [threading.Thread(target=report_often) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert report.fraction == 0.999
        started_s = time.perf_counter()
        for i in range(1000):
            report(i)
        assert time.perf_counter() - started_s < 0.1


def test_lines_without_a_total_and_without_anything() -> None:
    report = _progress.Progress("close", total_bytes=0, run="gpt", step=None)
    assert report.line().startswith("close gpt: ")
    assert report.fraction is None
    report(3 << 20)
    assert "3.0 MiB at" in report.line()
    assert "left" not in report.line()
    report(0, "waiting for disk")
    assert report.line().endswith("waiting for disk")
