"""An agent that was forked from a warm process is what a fresh one is, whoever looks at it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import _isolation
import pytest
from agent_checks import until
from fake_trainer import FakeTrainer

from mtckpt.agent import protocol, spawn
from mtckpt.agent.client import AgentClient

SAME = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "Cap", "NoNew")


@pytest.fixture
def other() -> Iterator[_isolation.Places]:
    places = _isolation.make_places()
    yield places
    _isolation.sweep(places)


def ask() -> protocol.AgentStatus:
    with AgentClient(spawn.ensure_agent(20.0), 20.0) as client:
        return client.call("/status", None, protocol.AgentStatus)


def begun() -> int:
    """An agent that has a run, and so a data process."""
    trainer = FakeTrainer("r")
    trainer.open()
    trainer.client.close()
    return ask().pid


def target(fd: Path, places: _isolation.Places) -> str:
    """What a descriptor is of; "" for one that is closed by now."""
    try:
        name = os.readlink(fd)
    except FileNotFoundError:
        return ""
    name = name.replace(str(places.runtime), "runtime").replace(str(places.ram), "ram")
    return re.sub(r"\[\d+\]", "", name)


def seen(pid: int, places: _isolation.Places) -> dict[str, object]:
    """All that /proc tells of an agent, less what differs between any two."""
    proc = Path(f"/proc/{pid}")
    lines = (proc / "status").read_text().splitlines()
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    parent, group, session, terminal, nice = (fields[i] for i in (1, 2, 3, 4, 16))
    (child,) = _isolation._children(pid)
    environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    return {
        "status": [line for line in lines if line.startswith(SAME)],
        "limits": (proc / "limits").read_text(),
        "fds": {name for fd in (proc / "fd").iterdir() if (name := target(fd, places))},
        "cwd": os.readlink(proc / "cwd"),
        "cgroup": (proc / "cgroup").read_text(),
        "oom": (proc / "oom_score_adj").read_text(),
        "is leader": (group == str(pid), session == str(pid)),
        "group is session": group == session,
        "others": (parent, terminal, nice),
        "what its data process has": sorted(
            line for line in environment if not line.startswith((b"MTCKPT_RUNTIME", b"MTCKPT_RAM"))
        ),
    }


def test_a_forked_agent_is_what_a_fresh_one_is(
    runtime_dir: Path, ram_dir: Path, other: _isolation.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTCKPT_SLOTS", "5")
    started_s = time.monotonic()
    forked, places = begun(), _isolation.Places(runtime_dir, ram_dir)
    assert b"warm_agents" in Path(f"/proc/{forked}/cmdline").read_bytes()
    assert ask().uptime_s <= time.monotonic() - started_s + 0.001
    monkeypatch.setattr(spawn, "subprocess", subprocess)
    for name, value in other.environment().items():
        monkeypatch.setenv(name, value)
    fresh = begun()
    assert b"warm_agents" not in Path(f"/proc/{fresh}/cmdline").read_bytes()
    until(lambda: seen(forked, places) == seen(fresh, other))  # each opens and closes files


def test_a_forked_agent_is_found_and_ended(runtime_dir: Path) -> None:
    pid = ask().pid
    (runtime_dir / "agent.pid").unlink()
    _isolation.end_all(runtime_dir)
    assert not _isolation._is_alive(pid)


@pytest.mark.parametrize("what", ["umask", "environment", "crash"])
def test_one_that_would_differ_is_fresh(
    what: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "environment":
        monkeypatch.setenv("LC_ALL", "C")
    if what == "crash":
        monkeypatch.setenv("MTCKPT_CRASH_AT", "nowhere")
    before = os.umask(0)
    os.umask(before ^ 0o011 if what == "umask" else before)
    try:
        pid = ask().pid
    finally:
        os.umask(before)
    assert b"warm_agents" not in Path(f"/proc/{pid}/cmdline").read_bytes()
