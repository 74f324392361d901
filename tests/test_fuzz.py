"""No bytes surprise a parser: errors of ours, bounded memory, no code run, and no name a path."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import TARGETS, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
RSS_LIMIT_MB = 512
INPUT_TIMEOUT_S = 10
SHORT_S = 5
LONG_S = 60

needs_fuzzer = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris, which is for Linux only"
)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_seed_is_taken(target: str) -> None:
    found = seeds(target)
    assert found
    for seed in found:
        TARGETS[target](seed)


@st.composite
def edited(draw: st.DrawFn, target: str) -> bytes:
    """A seed with a few pieces exchanged; or anything."""
    data = draw(st.sampled_from([*seeds(target), b""]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 8))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + cut :]
    return data


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_no_edit_of_a_seed_surprises(target: str) -> None:
    @settings(max_examples=settings().max_examples // 2)
    @given(edited(target))
    def check(data: bytes) -> None:
        TARGETS[target](data)

    check()


@needs_fuzzer
@pytest.mark.timeout(120)
def test_the_fuzzer_finds_nothing_in_a_few_seconds(tmp_path: Path, seed: int) -> None:
    assert fuzz("everything", SHORT_S, tmp_path, seed) > 100


@needs_fuzzer
@pytest.mark.torture
@pytest.mark.timeout(LONG_S + 120)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_fuzzer_finds_nothing(target: str, tmp_path: Path, seed: int) -> None:
    assert fuzz(target, LONG_S, tmp_path, seed) > 1000


@needs_fuzzer
@pytest.mark.torture
@pytest.mark.timeout(120)
def test_the_fuzzer_would_find_something(tmp_path: Path, seed: int) -> None:
    """The same run over a target with a bug behind a few bytes."""
    broken = (
        "\n\ndef broken(data: bytes) -> None:\n"
        '    if data[:1] == b"B" and data[1:2] == b"U":\n        raise ValueError("found")\n\n\n'
        'TARGETS["broken"] = broken\n_SEEDS["broken"] = lambda: [b"A"]\n'
    )
    source = Path(fuzz_targets.__file__).read_text()
    head, mark, tail = source.rpartition('\n\nif __name__ == "__main__":\n    main')
    (tmp_path / "fuzz_targets.py").write_text(head + broken + mark + tail)
    done = run_fuzzer(tmp_path / "fuzz_targets.py", "broken", 30, tmp_path, seed)
    assert done.returncode != 0
    assert "ValueError: found" in done.stdout, done.stdout[-3000:]


def fuzz(target: str, seconds: int, tmp_path: Path, seed: int) -> int:
    """Executions; the test fails with the input if one of them surprised."""
    done = run_fuzzer(Path(fuzz_targets.__file__), target, seconds, tmp_path, seed)
    crashes = [f"{path.name}: {path.read_bytes()!r}" for path in tmp_path.glob("found-*")]
    assert done.returncode == 0, f"{crashes}\n{done.stdout[-5000:]}"
    count = re.search(r"number_of_executed_units: (\d+)", done.stdout)
    memory = re.search(r"peak_rss_mb: +(\d+)", done.stdout)
    assert count, done.stdout[-3000:]
    assert memory, done.stdout[-3000:]
    print(f"{target}: {int(count[1]):,} inputs in {seconds} s, {memory[1]} MiB at most")
    return int(count[1])


def run_fuzzer(
    script: Path, target: str, seconds: int, tmp_path: Path, seed: int
) -> subprocess.CompletedProcess[str]:
    options = [
        f"-seed={seed or 1}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={INPUT_TIMEOUT_S}",
        f"-artifact_prefix={tmp_path}/found-",
    ]
    # By way of a shell that forks: a program counts as its own peak what the process that became it
    # had in memory, and this one may have imported torch.
    through = ["sh", "-c", '"$@"; exit $?', "sh"]
    return subprocess.run(
        [
            *through,
            sys.executable,
            str(script),
            target,
            str(seconds),
            str(tmp_path / "corpus"),
            *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds + 60,
        check=False,
    )
