"""The suite against bugs planted into a copy of the package: each has to be caught.

A copy of ``mtckpt`` and of the tests lies in a directory of its own; one text of one file is
replaced, and the tests that are named for that bug run there in a process of their own. The copy
comes first on the path of every process that they start, agents and their data processes too.
"""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _isolation
import pytest
from planted_bug import ROOT, edited
from planted_bugs import BUGS, Bug

NUM_BUGS_AT_ONCE = 4
RUN_TIMEOUT_S = 300.0
TEST_TIMEOUT_S = 30
# Files that start agents or import frameworks: only `make torture` plants what these catch.
SLOW = (
    *("adapters/", "agent/test_flushing", "agent/test_recovery", "agent/test_spawn", "crash/"),
    *(
        "capture/test_device_runs",
        "test_checkpointer",
        "test_delivery",
        "test_errors_raised",
        "test_guards",
        "test_ranks",
    ),
    *("test_store_", "tiers/test_object_store"),
)
# A slip of whoever wrote the replacement: this is no bug that a test has caught.
SLIPS = ("NameError", "ImportError", "SyntaxError", "UnboundLocalError", "IndentationError")

CHECK = """

import mtckpt as _planted

assert _planted.__file__.startswith({home!r}), _planted.__file__
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pytest said: ``failed`` are tests that failed in their own body, by their id."""

    code: int
    passed: list[str]
    failed: dict[str, str]
    errors: list[str]
    output: str


def plant(home: Path, bug: Bug | None) -> Path:
    """A copy of the package and its tests, with one bug or none."""
    ignored = shutil.ignore_patterns("*.pyc.*", ".hypothesis")
    for name in ("mtckpt", "tests"):
        shutil.copytree(ROOT / name, home / name, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", home)
    with open(home / "tests" / "conftest.py", "a") as conftest:
        conftest.write(CHECK.format(home=str(home)))
    if bug is not None:
        path = home / "mtckpt" / bug.file
        path.write_text(edited(bug))
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            stale.unlink()
    return home


def run_tests(home: Path, tests: Sequence[str], times: int = 1) -> Outcome:
    """Run tests of a planted copy, from a clean environment, each so many times as patiently."""
    report = home / "report.xml"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "MTCKPT_", "COV_"))
    }
    environment |= {"PYTHONPATH": f"{home}{os.pathsep}{home / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += [f"--timeout={times * TEST_TIMEOUT_S}", f"--junitxml={report}", "--tb=short"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=times * RUN_TIMEOUT_S,
            check=False,
        )
    finally:
        _isolation.sweep_dead()
    output = done.stdout[-6000:]
    assert report.exists(), output
    passed, failed, errors = [], {}, []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name')}"
        if (failure := case.find("failure")) is not None:
            failed[name] = f"{failure.get('message')}\n{failure.text}"
        elif case.find("error") is not None:
            errors.append(name)
        elif case.find("skipped") is None:
            passed.append(name)
    return Outcome(done.returncode, passed, failed, errors, output)


def of_test(test: str, names: Sequence[str]) -> list[str]:
    """The cases of one test among the names of a report."""
    stem = "tests." + test.replace(".py::", ".").replace("::", ".").replace("/", ".")
    return [name for name in names if name == stem or name.startswith(f"{stem}[")]


def assert_caught(bug: Bug, home: Path) -> None:
    outcome = run_tests(plant(home, bug), bug.caught_by)
    assert outcome.code == pytest.ExitCode.TESTS_FAILED, f"{bug.name} lives\n{outcome.output}"
    assert not outcome.errors, outcome.output
    for test in bug.caught_by:
        assert of_test(test, list(outcome.failed)), f"{test} misses {bug.name}\n{outcome.output}"
    for text in outcome.failed.values():
        slip = re.search(rf"^E +({'|'.join(SLIPS)})\b", text, re.MULTILINE)
        assert not slip, f"{bug.name} is not a bug but a slip: {text}"


def assert_pass_without(bugs: Sequence[Bug], home: Path) -> None:
    tests = sorted({test for bug in bugs for test in bug.caught_by})
    outcome = run_tests(plant(home, None), tests, 10)
    assert outcome.code == pytest.ExitCode.OK, outcome.output
    assert not outcome.failed
    assert not outcome.errors
    for test in tests:
        assert of_test(test, outcome.passed), f"{test} did not run\n{outcome.output}"


def test_every_bug_can_still_be_planted() -> None:
    assert len(BUGS) >= 30
    assert max(collections.Counter(bug.name for bug in BUGS).values()) == 1
    for bug in BUGS:
        assert bug.caught_by, bug.name
        assert edited(bug) != (ROOT / "mtckpt" / bug.file).read_text()
        for test in bug.caught_by:
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text()
            # Methods of the tier suite are inherited from the package.
            inherited = file == "tiers/test_suite.py"
            text += (ROOT / "mtckpt/testing/tier_suite.py").read_text() if inherited else ""
            assert f"def {name.split('::')[-1].partition('[')[0]}(" in text, test


@pytest.mark.timeout(180)
def test_some_bugs_are_caught(seed: int, tmp_path: Path) -> None:
    """A few, others each time; ``make torture`` plants all."""
    quick = [b for b in BUGS if b.quick and not any(t.startswith(SLOW) for t in b.caught_by)]
    for bug in random.Random(seed).sample(quick, NUM_BUGS_AT_ONCE):
        assert_caught(bug, tmp_path / bug.name)


@pytest.mark.timeout(120)
def test_every_process_runs_the_copy(tmp_path: Path) -> None:
    """Trainer, agent (or what it is forked from), data process: who imports it says which."""
    home = plant(tmp_path / "home", None)
    seen = home / "seen"
    with open(home / "mtckpt" / "errors.py", "a") as module:
        module.write(
            "\nimport os as _os, sys as _sys\n"
            f"with open({str(seen)!r}, 'a') as _seen:\n"
            "    print(_os.getpid(), *_sys.orig_argv[1:3], __file__, file=_seen)\n"
        )
    outcome = run_tests(home, ["agent/test_flushing.py::test_retention_keeps_what_the_rule_says"])
    assert outcome.code == pytest.ExitCode.OK, outcome.output
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert all(line[-1].startswith(str(home)) for line in lines), lines
    assert {"pytest", "mtckpt.agent", "mtckpt.agent.worker"} <= {line[2] for line in lines}, lines


@pytest.mark.torture
@pytest.mark.timeout(3100)
def test_without_a_bug_they_pass(tmp_path: Path) -> None:
    assert_pass_without(BUGS, tmp_path / "home")


@pytest.mark.torture
@pytest.mark.timeout(400)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    assert_caught(bug, tmp_path / "home")
