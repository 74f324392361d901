"""The tracer counts what strace counts, kills before a given call, and fails what it is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from syscall_tracer import ON_FILES, Call, Tracer, why_not

pytestmark = [
    pytest.mark.strace,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "processes can be traced"),
]

# Two threads, one after the other, each writing and syncing three times.
PROGRAM = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print("ready", flush=True)
sys.stdin.readline()
def write():
    for _ in range(3):
        try:
            os.write(fd, b"x")
            os.fsync(fd)
        except OSError as error:
            print(error.errno, flush=True)
for _ in range(2):
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
"""


def trace(
    place: Path, *, kill: int = 0, fail: int = 0, times: int = 1
) -> tuple[int, list[str], list[Call]]:
    """How the program ended, which errors it met, and its calls on files below ``place``."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(place / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        with Tracer(
            program.pid, calls=ON_FILES, below=str(place), kill=kill, fail=fail, times=times
        ) as tracer:
            out, _ = program.communicate(b"\n", timeout=30)
            assert tracer.ended(10.0)
            calls = tracer.stop()
    finally:
        program.kill()
        program.communicate()
    return program.returncode, out.decode().split(), calls


def test_every_call_of_every_thread_is_counted_in_order(tmp_path: Path) -> None:
    status, errors, calls = trace(tmp_path)
    assert (status, errors) == (0, [])
    assert [call.name for call in calls] == ["write", "fsync"] * 6
    assert {call.path for call in calls} == {str(tmp_path / "file")}


def test_a_kill_comes_before_the_call(tmp_path: Path) -> None:
    status, _, calls = trace(tmp_path, kill=9)
    assert status == -signal.SIGKILL
    assert len(calls) == 9
    assert os.path.getsize(tmp_path / "file") == 4  # the fifth write was number nine


@pytest.mark.parametrize(("times", "errors", "size"), [(1, 1, 6), (2, 2, 5), (0, 5, 2)])
def test_calls_fail_as_told(tmp_path: Path, times: int, errors: int, size: int) -> None:
    status, met, calls = trace(tmp_path, fail=4, times=times)
    assert status == 0
    assert met == ["5"] * errors
    assert os.path.getsize(tmp_path / "file") == size
    assert calls[3] == Call("fsync", str(tmp_path / "file"), True)


CHANGES = """
import fcntl, os, sys
print("ready", flush=True)
sys.stdin.readline()
place, file = sys.argv[1], f"{sys.argv[1]}/file"
os.close(os.open(place, os.O_RDONLY))
made = os.open(file, os.O_CREAT | os.O_WRONLY)
os.write(made, b"x")
os.close(os.dup(os.open(file, os.O_RDONLY)))
os.close(made)
locked = os.open(file, os.O_RDONLY)
fcntl.fcntl(locked, fcntl.F_GETFL)
fcntl.flock(locked, fcntl.LOCK_SH)
os.close(locked)
os.open(place, os.O_TMPFILE | os.O_RDWR)
"""


def test_only_what_changes_something_is_counted(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", CHANGES, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    with Tracer(program.pid, below=str(tmp_path), changing=True) as tracer:
        program.communicate(b"\n", timeout=30)
        assert tracer.ended(10.0)
        calls = tracer.stop()
    names = ["openat", "write", "close", "flock", "close", "openat"]
    assert [call.name for call in calls] == names
    assert all(call.changes for call in calls)


def test_strace_counts_the_same(tmp_path: Path) -> None:
    script = (
        "import os\nfor n in range(7): os.mkdir(f'{d}/{n}'); os.rename(f'{d}/{n}', f'{d}/m{n}')"
    )
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for place in (ours, theirs):
        place.mkdir()
    log = tmp_path / "strace"
    code = f"d = {str(theirs)!r}\n{script}"
    names = "trace=mkdir,rename"
    command = ["strace", "-f", "-o", str(log), "-e", names, sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=50)
    theirs_counted = Counter(
        found[1] for line in log.read_text().splitlines() if (found := re.search(r"(\w+)\(", line))
    )
    waiting = f"import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nd = {str(ours)!r}\n"
    program = subprocess.Popen(
        [sys.executable, "-c", waiting + script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    with Tracer(program.pid, calls=frozenset({"mkdir", "rename"})) as tracer:
        program.communicate(b"\n", timeout=30)
        assert tracer.ended(10.0)
        counted = Counter(call.name for call in tracer.stop())
    assert counted == {name: theirs_counted[name] for name in ("mkdir", "rename")}
    assert counted["mkdir"] == 7
