"""The example differs from its plain twin by eight lines, and what those lines promise holds."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MAX_CHANGED_LINES = 8
TIMEOUT_S = 60
STEPS = 60


def changed_lines(before: str, after: str) -> list[str]:
    """Lines removed and lines added: a line that was changed counts twice."""
    changed = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in changed if line[:2] in ("- ", "+ ")]


def test_the_example_is_its_twin_but_for_eight_lines() -> None:
    plain = (EXAMPLES / "train_plain.py").read_text()
    changed = changed_lines(plain, (EXAMPLES / "train_gpt.py").read_text())
    assert 0 < len(changed) <= MAX_CHANGED_LINES, "\n".join(changed)
    # No second statement hides behind a first one.
    assert not [line for line in changed if ";" in line]


def test_changes_are_counted() -> None:
    assert changed_lines("a\nb\nc", "a\nb\nc") == []
    assert len(changed_lines("a\nb\nc", "a\nx\nc\nd")) == 3


def start(script: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), f"--steps={STEPS}"],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What the process said; it must have ended well."""
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    return said


def kill_after(process: subprocess.Popen[str], losses: Path, step: int) -> None:
    """SIGKILL once the losses of ``step`` are written."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if losses.exists() and losses.read_text().count("\n") > step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_a_killed_example_ends_like_its_plain_twin(tmp_path: Path, runtime_dir: Path) -> None:
    assert os.environ["MTCKPT_RUNTIME_DIR"] == str(runtime_dir)
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, killed):
        directory.mkdir()
    # Side by side: two cores, two trainers.
    twin, victim = start("train_plain.py", plain), start("train_gpt.py", killed)
    kill_after(victim, killed / "out" / "losses.tsv", step=STEPS // 2)
    said = finish(start("train_gpt.py", killed))
    finish(twin)

    assert "restored step" in said
    parameters = "out/parameters.safetensors"
    assert (killed / parameters).read_bytes() == (plain / parameters).read_bytes()
    expected = (plain / "out" / "losses.tsv").read_text().splitlines()
    written = (killed / "out" / "losses.tsv").read_text().splitlines()
    assert len(expected) == STEPS
    # Steps behind the restored one were done twice, with the same losses, and not from step 0.
    assert sorted(set(written), key=lambda line: int(line.split("\t")[0])) == expected
    assert STEPS < len(written) < 2 * STEPS - 15
