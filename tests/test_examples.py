"""The example differs from its plain twin by eight lines, and what those lines promise holds.

A few more give it a store where one is asked for: what stands in these is about that alone.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from halting import halting_after

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MAX_CHANGED_LINES = 8
TIMEOUT_S = 60
STEPS = 60


def changed_lines(before: str, after: str) -> list[str]:
    """Lines removed and lines added: a line that was changed counts twice."""
    changed = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in changed if line[:2] in ("- ", "+ ")]


@pytest.mark.parametrize(
    ("twin", "example", "num_for_a_store"),
    [("train_plain.py", "train_gpt.py", 3), ("train_fsdp_plain.py", "train_fsdp.py", 0)],
)
def test_the_example_is_its_twin_but_for_eight_lines(
    twin: str, example: str, num_for_a_store: int
) -> None:
    plain = (EXAMPLES / twin).read_text()
    changed = changed_lines(plain, (EXAMPLES / example).read_text())
    for_a_store = [line for line in changed if re.search(r"\bstore\b", line)]
    assert len(for_a_store) == num_for_a_store
    changed = [line for line in changed if line not in for_a_store]
    assert 0 < len(changed) <= MAX_CHANGED_LINES, "\n".join(changed)
    # No second statement hides behind a first one.
    assert not [line for line in changed if ";" in line]


def test_changes_are_counted() -> None:
    assert changed_lines("a\nb\nc", "a\nb\nc") == []
    assert len(changed_lines("a\nb\nc", "a\nx\nc\nd")) == 3


def start(
    script: str, directory: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), f"--steps={STEPS}"],
        cwd=directory,
        env={**os.environ, **(environment or {})},
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
    """SIGKILL once the losses of ``step`` are written, of a script that halts before its end."""
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
    twin = start("train_plain.py", plain)
    victim = start("train_gpt.py", killed, halting_after(STEPS - 2, tmp_path / "halting"))
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


# --------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module", params=["demo"])
def demo(request: pytest.FixtureRequest) -> Any:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules["demo"]
    return module


def trained(demo: Any, out: Path, losses: str, parameters: bytes) -> Any:
    out.mkdir()
    (out / "losses.tsv").write_text(losses)
    (out / "parameters.safetensors").write_bytes(parameters)
    return demo.Training(out.name, out)


def test_the_demo_sees_one_bit(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = demo.Screen()
    whole = trained(demo, tmp_path / "whole", "0\t1.5\n1\t1.25\n", b"\0\1")
    again = trained(demo, tmp_path / "again", "0\t1.5\n0\t1.5\n1\t1.25\n", b"\0\1")
    bit = trained(demo, tmp_path / "bit", "0\t1.5\n1\t1.25\n", b"\0\0")
    loss = trained(demo, tmp_path / "loss", "0\t1.5\n1\t1.2500000000000002\n", b"\0\1")
    short = trained(demo, tmp_path / "short", "0\t1.5\n", b"\0\1")
    assert demo.compare([whole, again], screen)
    assert "equal bit for bit" in capsys.readouterr().out
    for other in (bit, loss, short):
        assert not demo.compare([whole, again, other], screen), other.title
        assert "DIFFER" in capsys.readouterr().out


def test_the_demo_sees_a_step_done_again_otherwise(demo: Any, tmp_path: Path) -> None:
    twice = trained(demo, tmp_path / "twice", "0\t1.5\n0\t1.25\n", b"")
    with pytest.raises(SystemExit, match="step 0 was done again with another loss"):
        demo.read_losses(twice)


def test_the_demo_reads_what_the_log_says(demo: Any) -> None:
    from mtckpt._handle import Restored

    restored = Restored(120, None, sources={"ram": 7_000_000}, elapsed_s=0.031)
    found = demo.RESTORED.search(f"run gpt-small: {restored}")
    assert found.groups() == ("120", "ram", "0.03")


def test_the_kills_of_a_demo_replay(demo: Any) -> None:
    kinds = [demo.ANYWHERE, demo.CAPTURE, demo.FLUSH, demo.FLUSH_AND_AGENT] * 2
    kills = demo.plan_kills(kinds, 800, random.Random(7))
    assert kills == demo.plan_kills(kinds, 800, random.Random(7))
    assert sorted(kill.kind for kill in kills) == sorted(kinds)
    assert [kill.step for kill in kills] == sorted({kill.step for kill in kills})


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--steps=200", "--kills=4"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("anywhere", "in capture", "in flush", "in flush, agent too"):
        assert f"SIGKILL {kind}, after step" in done.stdout
    assert "resumed from ram" in done.stdout
    assert "resumed from disk" in done.stdout
    assert (tmp_path / "demo-output" / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("demo", ["demo_cluster"], indirect=True)
def test_the_cluster_demo_sees_another_loss(demo: Any, tmp_path: Path) -> None:
    (tmp_path / "losses-0.tsv").write_text("0\t1.5\n1\t1.25\n0\t1.5\n2\t1.0\n")
    assert demo.losses(tmp_path, 0) == {0: "1.5", 1: "1.25", 2: "1.0"}
    assert (demo.last_step(tmp_path), demo.losses(tmp_path, 1)) == (2, {})
    (tmp_path / "losses-0.tsv").write_text("0\t1.5\n0\t1.25\n")
    with pytest.raises(SystemExit, match="step 0 was done again with another loss"):
        demo.losses(tmp_path, 0)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_the_cluster_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo_cluster.py"), "--steps=200"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rank \d on dog begins with step \d+: [\d.]+ MiB from peers\n", done.stdout)
    assert "losses of 3 ranks: equal bit for bit" in done.stdout
    assert "two hosts have come to the end: step 199" in done.stdout
