"""The time that the whole suite may take, and where it went.

A pytest plugin of the controlling process: it adds up what every test took, by file, says so at the
end, and fails a session whose wall time passed MTCKPT_TEST_BUDGET_S seconds (0 or unset: no limit).
It does not stop a session: the tests that took too long have to be in the report.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict

import pytest

NUM_FILES_SHOWN = 10


class Budget:
    """Counts time by test file; one instance a session."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.start_s = time.monotonic()
        self.elapsed_s = 0.0
        self.spent_s: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, _, _ = report.nodeid.partition("::")
        self.spent_s[file] += report.duration

    # Last, so that the time the other plugins need to finish counts too.
    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.elapsed_s = time.monotonic() - self.start_s
        if self.exceeded and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def exceeded(self) -> bool:
        return 0 < self.limit_s < self.elapsed_s

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        limit = f"{self.limit_s:.0f} s" if self.limit_s else "no limit"
        terminalreporter.section("time by file")
        longest = sorted(self.spent_s.items(), key=lambda item: -item[1])[:NUM_FILES_SHOWN]
        for file, spent_s in longest:
            terminalreporter.write_line(f"{spent_s:8.1f} s  {file}")
        total_s = sum(self.spent_s.values())
        terminalreporter.write_line(
            f"{total_s:8.1f} s  in all tests; the session took {self.elapsed_s:.0f} s of {limit}"
        )
        if self.exceeded:
            terminalreporter.write_line(
                f"FAILED: the session took {self.elapsed_s:.0f} s, more than {self.limit_s:.0f} s "
                "(MTCKPT_TEST_BUDGET_S); mark the long tests 'torture' or make them shorter",
                red=True,
            )


def limit_from_environment() -> float:
    """Return MTCKPT_TEST_BUDGET_S in seconds; 0 where it is not set."""
    return float(os.environ.get("MTCKPT_TEST_BUDGET_S") or 0)
