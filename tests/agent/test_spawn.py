"""One agent a node, however many start it; it outlives whoever did, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtckpt.agent import address, protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import child_environment, ensure_agent
from mtckpt.errors import AccessDenied, AgentUnavailable

pytestmark = pytest.mark.usefixtures("fresh_agents")

READY_S = 20.0


def program(text: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that has our code."""
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def status() -> protocol.AgentStatus:
    with AgentClient(ensure_agent(READY_S), READY_S) as client:
        return client.call("/status", None, protocol.AgentStatus)


def wait_until(what: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


ASK = """
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import ensure_agent
with AgentClient(ensure_agent(20.0), 20.0) as client:
    print(client.call("/status", None, protocol.AgentStatus).pid, flush=True)
"""


def test_eight_processes_at_once_make_one_agent(runtime_dir: Path) -> None:
    started = [program(ASK) for _ in range(8)]
    outputs = [process.communicate(timeout=40)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * 8
    assert len(set(outputs)) == 1
    assert status().pid == int(outputs[0])


def zombies() -> list[str]:
    """Ended children of this process that nobody has waited for."""
    children = Path("/proc/self/task").glob("*/children")
    pids = [pid for path in children for pid in path.read_text().split()]
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # waited for meanwhile
            stat = Path(f"/proc/{pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "Z":
                found.append(pid)
    return found


def test_the_agent_is_nobodys_child_and_inherits_nothing(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-93481")
    monkeypatch.setenv("MTCKPT_TOKEN", "canary-93482")
    monkeypatch.chdir(tmp_path)
    fd = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(fd, True)
    before_mask = os.umask(0)
    try:
        pid = status().pid
    finally:
        os.umask(before_mask)
        os.close(fd)
    proc = Path(f"/proc/{pid}")
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    assert int(fields[1]) != os.getpid()
    assert int(fields[3]) not in (os.getsid(0), pid)  # a session of its own, and not its leader
    environment = (proc / "environ").read_bytes()
    assert b"canary" not in environment
    assert b"MTCKPT_RUNTIME_DIR=" in environment
    assert b"canary" not in (proc / "cmdline").read_bytes()
    assert os.readlink(proc / "cwd") == "/"
    targets = {n.name: os.readlink(n) for n in (proc / "fd").iterdir()}
    assert str(tmp_path) not in targets.values()
    assert (targets["0"], targets["1"]) == ("/dev/null", "/dev/null")
    assert targets["2"] == str(runtime_dir / protocol.LOG_NAME)
    assert "Umask:\t0077" in (proc / "status").read_text()
    assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
    assert oct((runtime_dir / protocol.SOCKET_NAME).stat().st_mode & 0o777) == "0o600"
    assert not zombies()  # what started it has been waited for


def test_affinity_and_priority_are_its_own(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_CPUS", "0")
    text = f"import os\nos.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\nos.nice(5)\n"
    process = program(text + ASK)
    pid = int(process.communicate(timeout=40)[0])
    assert os.sched_getaffinity(pid) == {0}
    if os.geteuid() == 0:
        assert os.getpriority(os.PRIO_PROCESS, pid) == 0


def test_it_survives_the_process_group_that_started_it(runtime_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ASK + "\nimport time\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert status().pid == pid


def test_a_pipe_ends_with_the_trainer(runtime_dir: Path) -> None:
    started_s = time.monotonic()
    process = program(ASK)
    process.communicate(timeout=40)  # returns at EOF: an agent with our stdout would hold it open
    assert time.monotonic() - started_s < 20
    assert status().pid > 0


def test_a_socket_that_nobody_listens_on_is_replaced(runtime_dir: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(runtime_dir / protocol.SOCKET_NAME))
    stale.close()
    assert status().pid > 0


def test_a_path_too_long_for_a_socket_works(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = runtime_dir / ("d" * 120)
    monkeypatch.setenv("MTCKPT_RUNTIME_DIR", str(long))
    pid = status().pid
    assert status().pid == pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid))
    assert sorted(p.name for p in long.iterdir()) == [address.LOCK_NAME, protocol.LOG_NAME]


@pytest.fixture
def planted(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = runtime_dir / "inner"
    monkeypatch.setenv("MTCKPT_RUNTIME_DIR", str(path))
    return path


def refused(match: str) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(AccessDenied, match=match)


def test_a_directory_that_is_not_ours_alone_is_refused(planted: Path) -> None:
    planted.symlink_to("/tmp")
    with refused("is a link") as caught:
        ensure_agent(1.0)
    assert "MTCKPT_RUNTIME_DIR" in str(getattr(caught, "value", ""))
    planted.unlink()
    planted.write_text("")
    with refused("not a directory"):
        ensure_agent(1.0)
    planted.unlink()
    planted.mkdir()
    planted.chmod(0o770)
    with refused("written by others .mode 0770"):
        ensure_agent(1.0)
    planted.chmod(0o700)
    (planted / protocol.SOCKET_NAME).write_text("")
    with refused("of another kind"):
        ensure_agent(1.0)


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(planted: Path) -> None:
    planted.mkdir(0o700)
    os.chown(planted, 65534, -1)
    with refused("belongs to user 65534"):
        ensure_agent(1.0)


def test_an_agent_that_cannot_start_says_why(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AgentUnavailable, match="ended at once with status 1"):
        ensure_agent(5.0)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(AgentUnavailable, match="could not be started"):
        ensure_agent(5.0)
    assert not (runtime_dir / protocol.SOCKET_NAME).exists()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(AgentUnavailable, match="does not know its Python"):
        ensure_agent(5.0)


def test_a_lock_that_is_held_is_waited_for_and_no_longer(runtime_dir: Path) -> None:
    with address.locked(address.find(), 1.0), pytest.raises(AgentUnavailable, match="too long"):
        ensure_agent(0.3)


def test_a_service_is_never_started(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(runtime_dir / "service.sock"))
    with pytest.raises(AgentUnavailable, match="service does not run"):
        ensure_agent(1.0)
    assert list(runtime_dir.iterdir()) == []


def test_it_leaves_when_idle_and_nothing_is_left(
    runtime_dir: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.3")
    pid = status().pid
    wait_until(lambda: not is_alive(pid))
    left = {address.LOCK_NAME, protocol.LOG_NAME}
    wait_until(lambda: {p.name for p in runtime_dir.iterdir()} == left)
    assert list(ram_dir.rglob("*")) == []


def test_whoever_comes_while_it_leaves_gets_an_agent(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_AGENT_IDLE_S", "0.2")
    pids = set()
    for pause_s in (0.18, 0.21, 0.24, 0.27, 0.3):
        pids.add(status().pid)
        time.sleep(pause_s)
    assert all(pids)


def test_the_environment_is_what_the_agent_needs(tmp_path: Path) -> None:
    kept = child_environment(
        {
            "PATH": "/bin",
            "PYTHONPATH": f"lib{os.pathsep}/abs",
            "MTCKPT_RAM_DIR": "/ram",
            "MTCKPT_TOKEN": "x",
            "HF_TOKEN": "x",
            "PYTHONSTARTUP": "x",
            "LD_PRELOAD": "x",
        },
        str(tmp_path),
    )
    assert kept.pop("PYTHONPATH").split(os.pathsep) == [
        os.path.abspath("lib"),
        "/abs",
        str(tmp_path),  # found by the trainer's own directory alone: the agent must find it too
    ]
    assert kept == {"PATH": "/bin", "MTCKPT_RAM_DIR": "/ram", "PYTHONSAFEPATH": "1"}
    site_packages = site.getsitepackages()[0]
    assert "PYTHONPATH" not in child_environment({}, site_packages)


def test_the_log_is_bounded(runtime_dir: Path) -> None:
    text = f"""
import logging
from mtckpt.agent.life import BoundedLog
handler = BoundedLog({str(runtime_dir / "a.log")!r}, 1000)
for number in range(200):
    handler.emit(logging.makeLogRecord({{"msg": "line %d", "args": (number,)}}))
import sys
print("from the interpreter", file=sys.stderr, flush=True)
"""
    process = program(text)
    process.communicate(timeout=20)
    assert process.returncode == 0
    sizes = {p.name: p.stat().st_size for p in runtime_dir.iterdir()}
    assert set(sizes) == {"a.log", "a.log.1"}
    assert max(sizes.values()) < 1200
    assert "from the interpreter" in (runtime_dir / "a.log").read_text()
